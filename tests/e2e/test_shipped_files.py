"""The shipped argument files from SFT to the exported model, with tiny models: in bfloat16, as they say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from alignment.cli import main
from alignment.flow.metrics import read_metrics
from tests.precision import read_weights, stored_codes
from tests.tiny import copy_rows, preference_rows, tiny_model_dir, write_jsonl


@pytest.mark.parametrize(("family", "arch"), [("llama", "llama"), ("qwen", "qwen2")])
def test_sft_reward_model_ppo_generate_export(family: str, arch: str, repo: Path, tmp_path: Path) -> None:
    """A1-A3: these files could not train PPO on a GPU, and exported integers; on a CPU they were float32."""
    tiny_model_dir(tmp_path / "model", arch, initializer_range=0.1, max_position_embeddings=2048)
    for name, rows in (("train", copy_rows(10)), ("dev", copy_rows(5, seed=1))):
        write_jsonl(tmp_path / "data" / f"{name}.json", rows)
    pairs = write_jsonl(tmp_path / "pairs.jsonl", preference_rows(8))
    dev_pairs = write_jsonl(tmp_path / "dev_pairs.jsonl", preference_rows(4, seed=1))
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"say {i}"} for i in range(8)])
    dev_prompts = write_jsonl(tmp_path / "dev_prompts.jsonl", [{"prompt": f"say {i}"} for i in range(20, 24)])

    def run(stage: str, **changes: object) -> list[dict]:
        words = [f"{key}={value}" for key, value in {"output_dir": tmp_path / stage, **changes}.items()]
        assert main([stage, str(repo / "config" / family / f"{stage}_argument.json"), *words, "report_to=none"]) == 0
        return read_metrics(tmp_path / stage)

    run("sft", model_name_or_path=tmp_path / "model", dataset_name_or_path=tmp_path / "data", num_train_epochs=1)
    pairs_words = {"train_datasets": f"jsonl::{pairs}", "eval_datasets": f"jsonl::{dev_pairs}", "num_train_epochs": 1}
    run("rm", model_name_or_path=tmp_path / "sft", **pairs_words)
    rows = run(
        "ppo",
        actor_model_name_or_path=tmp_path / "sft",
        reward_model_name_or_path=tmp_path / "rm",
        train_datasets=f"jsonl::{prompts}",
        eval_datasets=f"jsonl::{dev_prompts}",
        ptx_datasets=f"jsonl::{tmp_path / 'data' / 'train.json'}",
        per_device_prompt_batch_size=4,
        per_device_train_batch_size=4,
        max_length=48,
    )
    first = next(row for row in rows if "train/kl_divergence" in row)
    assert first["train/rollout_logprob_gap"] < 0.1 and abs(first["train/ratio_mean"] - 1) < 0.02
    for folder in ("sft", "rm", "ppo/policy", "ppo/value"):
        assert stored_codes(tmp_path / folder) == {"BF16"}, folder

    policy, exported = str(tmp_path / "ppo" / "policy"), str(tmp_path / "exported")
    assert main(["export", "--checkpoint", policy, "--output", exported, "--format", "huggingface"]) == 0
    assert stored_codes(tmp_path / "exported") == {"BF16"}
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    theirs, head = read_weights(tmp_path / "exported"), "lm_head.weight"
    np.testing.assert_array_equal(theirs[head].T, read_weights(tmp_path / "ppo" / "policy")[head])
    assert main(["generate", "--model", policy, "--prompts", str(prompts), "--max_new_tokens", "4", "--greedy"]) == 0
