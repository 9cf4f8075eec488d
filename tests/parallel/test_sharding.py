"""Sharding stage 3 holds what its words say: between passes what a rank owns, in a pass one layer more at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle
import pytest

from alignment.flow.metrics import read_metrics
from alignment.ppo.models import final_hidden_states, load_causal_lm
from alignment.ppo.models.safetensors_file import SafetensorsFile
from tests.parallel import sharding_jobs
from tests.parallel.forked import run_ranks
from tests.tiny import tiny_model_dir


def test_a_rank_holds_its_own_parameters_and_the_layer_that_runs(tmp_path: Path) -> None:
    folder = tiny_model_dir(tmp_path / "model", layers=4)
    ranks = run_ranks(2, sharding_jobs.held, str(folder))
    for rank, seen in enumerate(ranks):
        assert seen["own"] < 0.6 * seen["whole"]
        assert seen["between"] == seen["after"] == seen["own"]
        assert seen["trained"] == seen["frozen"] == seen["own_and_outside"] < seen["whole"]
        assert seen["results"] == 2 * (2 - rank)
    # the gradients at their owners are those of one process with the same three micro batches
    model = load_causal_lm(folder)
    for ids in ([[1, 2, 3, 4]], [[5, 6, 7, 8]], [[1, 2, 3, 4]]):
        final_hidden_states(model, paddle.to_tensor(ids)).square().sum().backward()
    square = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    assert square > 0
    assert sum(seen["gradients"] for seen in ranks) == pytest.approx(square, rel=1e-5)


@pytest.mark.parametrize("stage", ["stage1", "stage3"])
def test_more_ranks_than_trained_tensors(tmp_path: Path, stage: str) -> None:
    """A7: a rank that owns none takes part all the same, also when the run is resumed."""
    job, folder = sharding_jobs.train_two_tensors, str(tmp_path)
    assert run_ranks(3, job, folder, stage, "max_steps=2") == [0, 0, 0]
    assert run_ranks(3, job, folder, stage, "max_steps=4", "resume_from_checkpoint=true") == [0, 0, 0]
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]
    state = SafetensorsFile(tmp_path / "run" / "checkpoint-4" / "trainer" / "optimizer.safetensors")
    moments = [name for name in state.shapes() if "moment1" in name]
    assert len(moments) == 2 and all(np.any(state.read(name)) for name in moments)
