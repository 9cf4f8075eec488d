"""Fleet's parallel training on CPU processes: the losses of 5 AdamW steps equal those of one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.parallel.cpu_backend_models import Layout, make_model, train_both
from tests.parallel.forked import run_ranks

LAYOUTS = {
    "TP2": Layout(tp=2),
    "TP2 with sequence parallel": Layout(tp=2, sequence_parallel=True),
    "PP2": Layout(pp=2),
    "DP2": Layout(dp=2),
    "sharding stage 1": Layout(sharding=2),
    "sharding stage 1, split parameters": Layout(sharding=2, split_param=True),
    "sharding stage 2": Layout(sharding=2, stage=2),
    "sharding stage 3": Layout(sharding=2, stage=3),
    "TP2 x PP2": Layout(tp=2, pp=2),
}
SLOW_LAYOUTS = {
    "PP4": Layout(pp=4),
    "TP2 x DP2": Layout(tp=2, dp=2),
    "TP2 x sharding stage 1": Layout(tp=2, sharding=2),
    "TP2 x sharding stage 2": Layout(tp=2, sharding=2, stage=2),
    "PP2 x sharding stage 1": Layout(pp=2, sharding=2),
    "PP2 x DP2": Layout(pp=2, dp=2),
    "TP2 x PP2 with sequence parallel": Layout(tp=2, pp=2, sequence_parallel=True),
    "TP2 x PP2 with recomputation": Layout(tp=2, pp=2, recompute=True),
    "TP2 x PP2 x sharding stage 1": Layout(tp=2, pp=2, sharding=2),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Class prefix -> folder of a tiny model."""
    folders: dict[str, str] = {}
    for arch in ("Llama", "Qwen2"):
        folders[arch] = str(tmp_path_factory.mktemp(arch))
        run_ranks(1, make_model, folders[arch], arch)
        assert (Path(folders[arch]) / "model.safetensors").is_file()
    return folders


@pytest.fixture(scope="module")
def one_process(models: dict[str, str]) -> dict[str, list[float]]:
    """The losses of a run of one process, by model."""
    (losses,) = run_ranks(1, train_both, models, Layout())
    for arch, values in losses.items():
        # The steps move the loss by far more than the tolerance, so a wrong gradient would show.
        assert len(values) == 5 and values[0] - values[-1] > 0.1, (arch, values)
    return losses


def check(layout: Layout, models: dict[str, str], one_process: dict[str, list[float]]) -> None:
    for losses in run_ranks(layout.ranks, train_both, models, layout, timeout=120):
        for arch, expected in one_process.items():
            np.testing.assert_allclose(losses[arch], expected, rtol=0, atol=2e-6, err_msg=arch)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_losses_equal_one_process(layout: Layout, models: dict[str, str], one_process: dict[str, list[float]]) -> None:
    check(layout, models, one_process)


@pytest.mark.slow
@pytest.mark.parametrize("layout", SLOW_LAYOUTS.values(), ids=SLOW_LAYOUTS)
def test_losses_of_larger_layouts_equal_one_process(
    layout: Layout, models: dict[str, str], one_process: dict[str, list[float]]
) -> None:
    check(layout, models, one_process)
