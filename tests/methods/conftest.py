"""PPO's tiny policy, prompts and rewards, and argument files for any method that answers prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.ppo.conftest import copied, policy_dir, prompt_file, reward_file, supervised_file
from tests.precision import ARGUMENTS

__all__ = ["policy_dir", "prompt_file", "reward_file", "supervised_file"]


@pytest.fixture
def online_json(tmp_path: Path, policy_dir: Path, prompt_file: Path, reward_file: Path) -> Callable[..., Path]:
    """Writes an argument file of a short run (4 rollouts of 16 answers, 8 optimizer steps); keywords change or
    (``None``) remove keys.
    """

    def write(name: str, **changes: Any) -> Path:
        values: dict[str, Any] = {
            "train_datasets": f"jsonl::{prompt_file}",
            "eval_datasets": f"jsonl:4/-1:{copied(prompt_file)}",
            "actor_model_name_or_path": str(policy_dir),
            "reward": f"{reward_file}:vowels",
            "output_dir": str(tmp_path / name),
            "max_src_len": 32,
            "max_dec_len": 8,
            "num_return_sequences": 2,
            "per_device_prompt_batch_size": 8,
            "per_device_train_batch_size": 8,
            "max_steps": 6,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "top_p": 1.0,
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            **ARGUMENTS,
        }
        values.update(changes)
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
        return file

    return write
