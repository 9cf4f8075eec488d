"""PPO with ``bf16`` on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from alignment.cli import main
from tests.precision import read_weights, stored_codes

from .conftest import metric_rows


def test_ppo_in_bfloat16(ppo_json: Callable[..., Path], policy_dir: Path, tmp_path: Path) -> None:
    """A1, A3: such a run stopped at its first step on a GPU, and computed in float32 on a CPU."""
    changes = {"bf16": True, "save_strategy": "steps", "save_steps": 3, "num_train_epochs": 1, "do_eval": False}
    changes |= {"eval_datasets": None, "evaluation_strategy": "no"}
    assert main(["ppo", str(ppo_json(**changes))]) == 0
    out = tmp_path / "ppo"
    for name in ("policy", "value"):
        assert stored_codes(out / name) == {"BF16"}
    before, after = read_weights(policy_dir), read_weights(out / "policy")
    assert all((after[name] != value).any() for name, value in before.items() if value.ndim > 1)
    rows = metric_rows(out)
    first = next(row for row in rows if "train/kl_divergence" in row)
    # rollout, training and reference see one model by the same kernels
    assert first["train/rollout_logprob_gap"] < 0.1 and abs(first["train/kl_divergence"]) < 1e-2
    # a resumed run goes on bit for bit, in the middle of a rollout's updates
    again = ppo_json("again", **changes, resume_from_checkpoint=str(out / "checkpoint-3"))
    assert main(["ppo", str(again)]) == 0
    for name, value in after.items():
        np.testing.assert_array_equal(read_weights(tmp_path / "again" / "policy")[name], value, err_msg=name)
