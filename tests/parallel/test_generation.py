"""The rollout engine on tensor ranks answers as the whole model does, token for token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.parallel import generation_jobs
from tests.parallel.forked import run_ranks
from tests.tiny import tiny_model_dir


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 with grouped queries and biases, and a tied Llama."""
    folder = tmp_path_factory.mktemp("generation") / request.param
    return tiny_model_dir(folder, request.param, layers=2, tie_word_embeddings=request.param == "llama")


@pytest.fixture(scope="module")
def alone(model: Path) -> dict[str, Any]:
    return run_ranks(1, generation_jobs.answers, str(model), 1, "kernels", 0)[0]


def test_one_process_answers_as_paddlenlps_generate(alone: dict[str, Any]) -> None:
    assert alone["greedy"] == alone["wanted"]


@pytest.mark.parametrize("way", ["kernels", "paddle"])
@pytest.mark.parametrize("budget", [0, 64], ids=["all at once", "a few at a time"])
def test_tensor_ranks_answer_as_one_process(model: Path, alone: dict[str, Any], way: str, budget: int) -> None:
    for found in run_ranks(2, generation_jobs.answers, str(model), 2, way, budget):
        assert found["group"], "the model was to be divided"
        assert found["ops"] == ("CpuKernelOps" if way == "kernels" else "LayerOps")
        assert found["greedy"] == alone["wanted"]
        assert found["sampled"] == alone["sampled"]
        np.testing.assert_allclose(found["logprobs"], alone["logprobs"], atol=1e-5)


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}], ids=str)
def test_a_masking_policy_allows_the_same_in_every_layout(model: Path, layout: dict[str, int]) -> None:
    """NLPO: the copy is divided as the policy is; the stages of a pipeline read with both."""
    (wanted,) = run_ranks(1, generation_jobs.masked_answers, str(model), {}, "tensor" in layout)
    assert 1 < np.mean(wanted["allowed"][1]) < 250
    for found in run_ranks(2, generation_jobs.masked_answers, str(model), layout, True):
        assert found == wanted
