"""Defaults: the documented ones, and those that follow from other keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alignment.arguments import parse_ppo, parse_reward, parse_sft
from alignment.paths import cache_folder

SFT = ["output_dir=out", "model_name_or_path=m", "train_datasets=a"]
RM = SFT
PPO = ["output_dir=out", "actor_model_name_or_path=m", "reward_model_name_or_path=r", "train_datasets=a"]
PARSERS = {"sft": (parse_sft, SFT), "rm": (parse_reward, RM), "ppo": (parse_ppo, PPO)}


def _parse(stage: str, *extra: str) -> Any:
    parse, words = PARSERS[stage]
    return parse([*words, *extra])


COMMON = {
    "overwrite_output_dir": False,
    "do_train": True,
    "do_eval": False,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 1.0,
    "max_steps": -1,
    "learning_rate": 5e-5,
    "min_learning_rate": None,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "warmup_steps": 0,
    "decay_steps": 0,
    "evaluation_strategy": "no",
    "save_strategy": "steps",
    "eval_steps": 500,
    "save_steps": 500,
    "logging_steps": 500,
    "logging_dir": "out/runs",
    "save_total_limit": None,
    "load_best_model_at_end": False,
    "greater_is_better": True,
    "seed": 42,
    "disable_tqdm": False,
    "dataloader_drop_last": False,
    "resume_from_checkpoint": None,
    "allow_changed_arguments": False,
    "hang_timeout": 1800.0,
    "join_timeout": 300.0,
    "report_to": ["visualdl"],
    "recompute": False,
    "bf16": False,
    "fp16": False,
    "fp16_opt_level": "O1",
    "plugins": [],
    "prompt_template": "auto",
    "allow_template_mismatch": False,
    "skip_bad_rows": False,
    "overlong_prompts": "truncate",
    "overlong_answers": "truncate",
    "data_cache_dir": str(cache_folder() / "data"),
    "dataset_num_proc": 1,
    "dry_run": False,
    "tokenizer_name_or_path": None,
    "eval_split_ratio": None,
}
STAGE = {
    "sft": {
        "src_length": 1024,
        "max_length": 2048,
        "zero_padding": False,
        "lora": False,
        "lora_rank": 8,
        "lora_alpha": 16,
        "lora_path": None,
        "metric_for_best_model": "loss",
        "greater_is_better": False,
        "top_k": 1,
        "top_p": 1.0,
    },
    "rm": {
        "max_length": 2048,
        "max_src_len": None,
        "loss_type": "sequence-wise",
        "regularization": 0.001,
        "normalize_score_during_training": False,
        "normalizer_type": "ExponentialMovingAverage",
        "normalizer_momentum": 0.9,
        "metric_for_best_model": "accuracy",
        "lora": False,
    },
    "ppo": {
        "reward": None,
        "reward_critic_model_name_or_path": "r",
        "reward_tokenizer_name_or_path": None,
        "ptx_datasets": None,
        "max_length": 2048,
        "max_src_len": 2048,
        "max_dec_len": 2048,
        "min_dec_len": 1,
        "kl_coeff": 0.02,
        "clip_range_ratio": 0.2,
        "clip_range_ratio_low": 0.2,
        "clip_range_ratio_high": 0.2,
        "clip_range_score": 50.0,
        "clip_range_value": 5.0,
        "ptx_coeff": 0.0,
        "update_iters": 1,
        "temperature": 1.0,
        "top_p": 0.8,
        "top_k": 0,
        "num_return_sequences": 1,
        "repetition_penalty": 1.0,
        "per_device_prompt_batch_size": 16,
        "per_device_rollout_batch_size": -1,
        "rollout_token_budget": 0,
        "stop_strings": None,
        "rollout_logprob_batch_size": 8,
        "eval_mode": "",
        "offload_level": "",
        "use_fusemt": True,
        "gamma": 1.0,
        "gae_lambda": 0.95,
        "kl_estimator": "k1",
        "adaptive_kl": False,
        "kl_target": 6.0,
        "kl_horizon": 10000,
        "normalize_reward": False,
        "normalize_advantage": False,
        "missing_eos_rule": "none",
        "missing_eos_score": -1.0,
        "missing_eos_penalty": 1.0,
        "value_coeff": 1.0,
        "dual_clip": None,
        "policy_loss_mean": "token",
        "critic_warmup_steps": 0,
        "target_kl": None,
        "entropy_coeff": 0.0,
        "eval_temperature": 1.0,
        "eval_num_samples": None,
        "sample_table_rows": 5,
        "metric_for_best_model": "reward",
        "critic_learning_rate": 5e-5,
        "critic_weight_decay": 0.0,
        "critic_lr_scheduler_type": "linear",
        "critic_warmup_ratio": 0.0,
        "critic_recompute": False,
    },
}


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_documented_defaults(stage: str) -> None:
    args = _parse(stage)
    wanted = {**COMMON, **STAGE[stage]}
    assert {key: getattr(args, key) for key in wanted} == wanted
    assert args.notes == []
    assert args.unused == {}


@pytest.mark.parametrize(
    ("stage", "words", "wanted"),
    [
        (
            "sft",
            ["evaluation_strategy=steps", "eval_datasets=b", "logging_steps=7"],
            {"do_eval": True, "eval_steps": 7},
        ),
        (
            "sft",
            ["evaluation_strategy=steps", "eval_datasets=b", "do_eval=false"],
            {"do_eval": False, "evaluation_strategy": "no"},
        ),
        ("sft", ["do_eval=true", "eval_split_ratio=0.1"], {"do_eval": True, "evaluation_strategy": "no"}),
        ("sft", ["lora=true", "lora_rank=4"], {"lora_alpha": 8}),
        ("sft", ["metric_for_best_model=accuracy"], {"greater_is_better": True}),
        ("sft", ["metric_for_best_model=eval_loss"], {"greater_is_better": False}),
        ("sft", ["metric_for_best_model=perplexity"], {"greater_is_better": False}),
        ("ppo", ["metric_for_best_model=kl_divergence"], {"greater_is_better": False}),
        ("ppo", ["metric_for_best_model=eval/truncation_rate"], {"greater_is_better": False}),
        ("ppo", ["metric_for_best_model=reward/no_loss"], {"greater_is_better": True}),
        ("rm", ["metric_for_best_model=calibration_error"], {"greater_is_better": False}),
        ("ppo", ["metric_for_best_model=reward", "greater_is_better=false"], {"greater_is_better": False}),
        ("sft", ["max_length=512"], {"src_length": 256}),
        ("ppo", ["max_length=64"], {"max_src_len": 64, "max_dec_len": 64}),
        ("ppo", ["max_length=64", "max_dec_len=16"], {"max_src_len": 64, "max_dec_len": 16}),
        ("ppo", ["learning_rate=3e-4", "weight_decay=0.2"], {"critic_learning_rate": 3e-4, "critic_weight_decay": 0.2}),
        ("ppo", ["learning_rate=3e-4", "critic_learning_rate=1e-4"], {"critic_learning_rate": 1e-4}),
        ("ppo", [], {"offload_dir": "out/.offload"}),
        ("ppo", ["offload_dir=/scratch"], {"offload_dir": "/scratch"}),
        ("ppo", ["recompute=true"], {"critic_recompute": True}),
        ("ppo", ["recompute=true", "critic_recompute=false"], {"critic_recompute": False}),
        ("ppo", ["clip_range_ratio_high=0.28"], {"clip_range_ratio_low": 0.2, "clip_range_ratio_high": 0.28}),
        ("ppo", ["rollout_logprob_batch_size=auto"], {"rollout_logprob_batch_size": 8}),
        ("ppo", ["reward_critic_model_name_or_path=c"], {"reward_critic_model_name_or_path": "c"}),
        ("ppo", ["report_to=none"], {"report_to": []}),
        ("ppo", ["report_to=all"], {"report_to": ["all"]}),
        ("ppo", ["no_cuda=true"], {"device": "cpu"}),
        ("ppo", ["sharding=2"], {"sharding": "stage2"}),
        ("ppo", ["resume_from_checkpoint=true"], {"resume_from_checkpoint": "latest"}),
        ("ppo", ["resume_from_checkpoint=false"], {"resume_from_checkpoint": None}),
    ],
)
def test_derived_values(stage: str, words: list[str], wanted: dict[str, Any]) -> None:
    args = _parse(stage, *words)
    assert {key: getattr(args, key) for key in wanted} == wanted


def test_the_critic_starts_from_the_actor_without_a_reward_model(tmp_path) -> None:
    file = tmp_path / "rewards.py"
    file.write_text("def f(prompts, responses): ...\n")
    args = parse_ppo(["output_dir=out", "actor_model_name_or_path=m", "train_datasets=a", f"reward={file}:f"])
    assert args.reward_critic_model_name_or_path == "m"


def test_python_files_are_found_beside_the_argument_file(tmp_path, monkeypatch) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "elsewhere").mkdir()
    for name in ("mine.py", "rewards.py"):
        (tmp_path / "conf" / name).write_text("def f(prompts, responses): ...\n")
    (tmp_path / "conf" / "ppo.json").write_text(
        '{"plugins": ["mine.py", "a.module"], "reward": {"rewards.py:f": 1, "x": 2}}'
    )
    monkeypatch.chdir(tmp_path / "elsewhere")
    args = parse_ppo(["../conf/ppo.json", "output_dir=out", "actor_model_name_or_path=m", "train_datasets=a"])
    assert args.plugins == ["../conf/mine.py", "a.module"]
    assert args.reward == {"../conf/rewards.py:f": 1.0, "x": 2.0}
    (tmp_path / "elsewhere" / "mine.py").write_text("")
    args = parse_ppo(["../conf/ppo.json", "output_dir=out", "actor_model_name_or_path=m", "train_datasets=a"])
    assert args.plugins[0] == "mine.py", "the current folder comes first"


def test_optimizer_settings_have_exactly_the_engines_fields() -> None:
    from alignment.engine.engine import OptimizerSettings

    args = _parse("ppo", "warmup_ratio=0.1", "critic_lr_scheduler_type=constant", "critic_learning_rate=1e-6")
    actor, critic = args.policy_optimizer(95), args.critic_optimizer(95)
    assert set(actor) == set(critic) == set(OptimizerSettings.__dataclass_fields__)
    assert OptimizerSettings(**actor).total_steps == 95
    assert (actor["warmup_steps"], actor["decay_steps"]) == (10, 95)
    assert (critic["learning_rate"], critic["lr_scheduler_type"]) == (1e-6, "constant")
    differing = {key for key in actor if actor[key] != critic[key]}
    assert differing == {"learning_rate", "lr_scheduler_type"}


def test_warmup_steps_win_over_the_ratio_but_not_over_the_critics_own_ratio() -> None:
    args = _parse("ppo", "warmup_steps=4", "warmup_ratio=0.5", "critic_warmup_ratio=0.2")
    assert args.policy_optimizer(100)["warmup_steps"] == 4
    assert args.critic_optimizer(100)["warmup_steps"] == 20
    assert args.notes == ["warmup_steps 4 wins over warmup_ratio 0.5"]


def test_critic_only_steps_do_not_touch_the_critics_learning_rate() -> None:
    args = _parse("ppo", "critic_warmup_steps=7")
    assert args.critic_optimizer(100)["warmup_steps"] == 0


@pytest.mark.parametrize("stage", PARSERS)
def test_runs_share_their_token_rows(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D32: they lay in output_dir, where no other run found them."""
    monkeypatch.delenv("ALIGNMENT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    found = {_parse(stage, f"output_dir={name}").data_cache_dir for name in ("a", "b")}
    assert found == {str(tmp_path / "xdg" / "alignment" / "data")}
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "own"))
    assert _parse(stage).data_cache_dir == str(tmp_path / "own" / "data")
    assert _parse(stage, "data_cache_dir=here").data_cache_dir == "here"
