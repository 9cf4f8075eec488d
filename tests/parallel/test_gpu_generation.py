"""The rollout engine's GPU layers on tensor ranks answer as the whole model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignment.rollout.gpu_operators import KERNELS
from tests.parallel import gpu_generation_jobs
from tests.parallel.forked import run_ranks
from tests.tiny import tiny_model_dir


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2: grouped queries and biases."""
    return tiny_model_dir(tmp_path_factory.mktemp("gpu-generation"), "qwen2", layers=2)


@pytest.fixture(scope="module")
def alone(model: Path) -> dict[str, Any]:
    return run_ranks(1, gpu_generation_jobs.answers, str(model), 1, None)[0]


@pytest.mark.parametrize("steps", [[], list(KERNELS)], ids=["plain", "fused"])
def test_tensor_ranks_answer_as_one_process(model: Path, alone: dict[str, Any], steps: list[str]) -> None:
    for found in run_ranks(2, gpu_generation_jobs.answers, str(model), 2, steps):
        assert found["group"], "the model was to be divided"
        assert found["calls"] == sorted(steps)
        np.testing.assert_array_equal(found["tokens"], alone["tokens"])
        np.testing.assert_allclose(found["logprobs"], alone["logprobs"], atol=1e-5)
