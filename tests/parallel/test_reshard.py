"""The rollout model has the training model's weights, bit for bit, and never those of another step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel import reshard_jobs
from tests.parallel.forked import run_ranks
from tests.tiny import tiny_model_dir


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Qwen2 with grouped queries and a tied Llama."""
    folder = tmp_path_factory.mktemp("reshard")
    return {
        "qwen2": tiny_model_dir(folder / "qwen2", "qwen2", layers=3),
        "llama": tiny_model_dir(folder / "llama", "llama", layers=3, tie_word_embeddings=True),
    }


@pytest.mark.parametrize("arch", ["qwen2", "llama"])
@pytest.mark.parametrize(
    ("layout", "eval_mode"),
    [
        ({"tensor": 2}, "single"),
        ({"pipeline": 2}, "tensor_parallel"),
        ({"tensor": 2, "pipeline": 2}, "tensor_parallel"),
        ({"tensor": 2, "pipeline": 2}, "single"),
    ],
)
def test_weights_arrive(arch: str, layout: dict[str, int], eval_mode: str, models: dict[str, Path]) -> None:
    ranks = layout.get("tensor", 1) * layout.get("pipeline", 1)
    for result in run_ranks(ranks, reshard_jobs.rollout_weights, str(models[arch]), layout, eval_mode):
        assert result["equal"] == [True, True]
        assert result["stale"].startswith("InvariantError: the rollout model has the weights of optimizer step 0, the")
        assert result["bytes"] > 0
        assert result["again"] is None  # up to date: nothing to move


def test_a_damaged_transfer_is_noticed(models: dict[str, Path]) -> None:
    told = run_ranks(2, reshard_jobs.damaged_transfer, str(models["qwen2"]))
    assert any(
        "arrived with checksum" in text and "the rollout would sample from wrong weights" in text for text in told
    )


def test_a_masking_policy_in_another_layout_is_refused(models: dict[str, Path]) -> None:
    for told in run_ranks(2, reshard_jobs.masked_elsewhere, str(models["qwen2"])):
        assert told.startswith("ArgumentsError: a masking policy (NLPO)") and "eval_mode" in told
