"""The reference's argument files are accepted key by key, and mean what they say."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path

import pytest

from alignment.arguments import PPOArguments, RewardArguments, SFTArguments, foreign, from_dict, parse, parser
from alignment.errors import ArgumentsError

STAGES = {"sft": SFTArguments, "rm": RewardArguments, "ppo": PPOArguments}
MINIMUM = {
    "sft": {"output_dir": "out", "model_name_or_path": "m", "train_datasets": "a"},
    "rm": {"output_dir": "out", "model_name_or_path": "m", "train_datasets": "a"},
    "ppo": {
        "output_dir": "out",
        "actor_model_name_or_path": "m",
        "reward_model_name_or_path": "r",
        "train_datasets": "a",
    },
}

# The file that shipped with later versions of the reference, as they differ from the first one.
LATER_PPO_FILE = {
    "train_datasets": "PKU-SafeRLHF/train",
    "eval_datasets": "PKU-SafeRLHF/test",
    "ptx_datasets": "alpaca",
    "actor_model_name_or_path": "PKU-Alignment/alpaca-7b-reproduced",
    "reward_model_name_or_path": "PKU-Alignment/beaver-7b-v1.0-reward",
    "output_dir": "checkpoints/llama-ppo",
    "max_length": 2048,
    "use_fusemt": 1,
    "use_flash_attention": 1,
    "max_dec_len": 1024,
    "min_dec_len": 1,
    "top_p": 0.8,
    "temperature": 1.0,
    "rollout_n": 1,
    "repetition_penalty": 1.0,
    "num_train_epochs": 1,
    "max_steps": 17,
    "update_iters": 1,
    "per_device_prompt_batch_size": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 2e-6,
    "min_learning_rate": 2e-7,
    "weight_decay": 0.01,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.03,
    "recompute": 1,
    "recompute_granularity": "full",
    "recompute_use_reentrant": 1,
    "critic_learning_rate": 2e-6,
    "critic_min_learning_rate": 2e-7,
    "critic_weight_decay": 0.01,
    "critic_lr_scheduler_type": "cosine",
    "critic_warmup_ratio": 0.03,
    "critic_recompute": 1,
    "critic_recompute_granularity": "full",
    "normalize_reward": 1,
    "normalize_advantage": 1,
    "kl_coeff": 0.02,
    "clip_range_ratio": 0.2,
    "clip_range_score": 10.0,
    "clip_range_value": 5.0,
    "ptx_coeff": 16.0,
    "logging_steps": 1,
    "logging_dir": "vdl_log",
    "evaluation_strategy": "no",
    "per_device_eval_batch_size": 16,
    "eval_steps": 10000,
    "save_strategy": "steps",
    "save_steps": 400,
    "save_total_limit": 5,
    "bf16": 1,
    "fp16": 0,
    "fp16_opt_level": "O2",
    "do_train": 1,
    "do_eval": 0,
    "disable_tqdm": 1,
    "sharding_parallel_degree": 1,
    "sharding": "stage1",
    "tensor_parallel_degree": 8,
    "tensor_parallel_output": 0,
    "pipeline_parallel_degree": 1,
    "pipeline_parallel_config": "disable_p2p_cache_shape",
    "sequence_parallel": 0,
    "max_grad_norm": 1.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "dataloader_drop_last": 0,
    "eval_mode": "",
    "offload_level": "freeze_model optimizer train_model",
    "release_grads": 1,
    "seed": 23,
    "use_fused_head_and_loss_fn": 0,
    "fused_linear": 1,
    "autotuner_benchmark": 0,
    "skip_profile_timer": 1,
}

LATER_PPO_KEYS = [
    "kl_loss_coeff",
    "pg_loss_coeff",
    "entropy_coeff",
    "clip_range_ratio_low",
    "clip_range_ratio_high",
    "normalize_advantage",
    "max_dec_len",
    "min_dec_len",
    "max_src_len",
    "eos_token",
    "min_learning_rate",
    "decay_steps",
    "critic_min_learning_rate",
    "critic_decay_steps",
    "per_device_rollout_batch_size",
    "rollout_logprob_batch_size",
    "use_tgt_len_value",
    "rl_algorithm",
    "use_rm_server",
    "use_fp32_compute",
    "use_fused_head_and_loss_fn",
    "tensor_parallel_output",
    "recompute_use_reentrant",
    "autotuner_benchmark",
    "early_stopping",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "reward_server",
    "actor_tokenizer_alpha",
    "reward_tokenizer_alpha",
    "reward_critic_tokenizer_alpha",
    "chat_template",
    "recompute_granularity",
    "critic_recompute_granularity",
    "fused_linear",
    "max_prompt_len",
    "rollout_n",
]
SFT_KEYS = [
    "dataset_name_or_path",
    "task_name",
    "zero_padding",
    "greedy_zero_padding",
    "pad_to_multiple_of",
    "src_length",
    "max_length",
    "eval_with_do_generation",
    "save_generation_output",
    "lazy",
    "chat_template",
    "pad_to_max_length",
    "task_name_or_path",
    "intokens",
    "model_name_or_path",
    "tokenizer_name_or_path",
    "lora",
    "lora_path",
    "lora_rank",
    "use_quick_lora",
    "rslora",
    "lora_plus_scale",
    "pissa",
    "vera",
    "vera_rank",
    "prefix_tuning",
    "num_prefix_tokens",
    "reft",
    "weight_quantize_algo",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "continue_training",
    "neftune",
    "neftune_noise_alpha",
    "flash_mask",
    "fuse_attention_qkv",
    "fuse_attention_ffn",
    "aistudio_repo_id",
    "aistudio_repo_private",
    "aistudio_repo_license",
    "aistudio_token",
    "benchmark",
    "autotuner_benchmark",
    "decay_steps",
    "tensor_parallel_output",
    "unified_checkpoint",
    "unified_checkpoint_config",
    "use_flash_attention",
    "sequence_parallel",
    "recompute_granularity",
    "top_k",
    "top_p",
    "quant_type",
    "do_ptq",
    "do_gptq",
    "do_awq",
    "ptq_step",
]
RM_KEYS = [
    "model_name_or_path",
    "normalize_score_during_training",
    "normalizer_type",
    "normalizer_momentum",
    "use_flash_attention",
    "train_datasets",
    "eval_datasets",
    "max_length",
    "dataset_name_or_path",
    "task_name",
    "eval_with_do_generation",
    "save_generation_output",
    "lazy",
    "loss_type",
    "regularization",
]


@pytest.mark.parametrize(("stage", "count"), [("sft", 32), ("rm", 38), ("ppo", 55)])
@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_the_files_have_the_references_number_of_keys(repo: Path, family: str, stage: str, count: int) -> None:
    content = json.loads((repo / "config" / family / f"{stage}_argument.json").read_text())
    llama = json.loads((repo / "config" / "llama" / f"{stage}_argument.json").read_text())
    assert len(content) == count
    assert list(content) == list(llama)


@pytest.mark.parametrize("family", ["llama", "qwen"])
@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_the_files_parse_and_every_key_arrives(
    repo: Path, family: str, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "data" / f"{split}.json").write_text("")
    file = repo / "config" / family / f"{stage}_argument.json"
    args = parse(STAGES[stage], [str(file)])
    for key, value in json.loads(file.read_text()).items():
        assert getattr(args, key) == value, key
    assert args.file == str(file)
    assert args.raw == json.loads(file.read_text())


def test_the_later_ppo_file_parses() -> None:
    args = from_dict(PPOArguments, LATER_PPO_FILE)
    assert (args.num_return_sequences, args.max_dec_len, args.max_src_len) == (1, 1024, 2048)
    assert (args.normalize_reward, args.normalize_advantage, args.bf16, args.do_eval) == (True, True, True, False)
    assert args.passthrough["release_grads"] is True
    assert args.offload_level == "freeze_model optimizer train_model"
    assert "release_grads" in args.unused
    assert args.use_fusemt
    assert "use_fusemt" not in args.unused
    assert "skip_profile_timer" not in args.unused, "it is the default, so nothing is asked for"


@pytest.mark.parametrize(
    ("stage", "keys"), [("sft", SFT_KEYS), ("rm", RM_KEYS), ("ppo", LATER_PPO_KEYS)], ids=["sft", "rm", "ppo"]
)
def test_every_documented_key_is_known(stage: str, keys: list[str]) -> None:
    assert [key for key in keys if parser.find(STAGES[stage], key) is None] == []


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_every_key_takes_its_own_default(stage: str) -> None:
    cls = STAGES[stage]
    specs = {**cls.specs(), **parser.foreign_specs(cls)}
    defaults = {name: spec.default for name, spec in specs.items() if not spec.required and spec.default is not None}
    defaults.pop("output_dir", None)
    args = from_dict(cls, {**defaults, **MINIMUM[stage]})
    assert {name: getattr(args, name) for name in defaults if name in cls.specs()} == {
        **{name: value for name, value in defaults.items() if name in cls.specs()},
    }


def _real_fields() -> dict[str, ast.AnnAssign]:
    """Fields of paddlenlp's TrainingArguments, by parsing the whole file."""
    folder = Path(next(iter(importlib.util.find_spec("paddlenlp").submodule_search_locations)))
    tree = ast.parse((folder / "trainer" / "training_args.py").read_text(encoding="utf-8"))
    found = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    return {node.target.id: node for node in found.body if isinstance(node, ast.AnnAssign)}


def test_all_fields_of_paddlenlps_training_arguments_are_known() -> None:
    real = _real_fields()
    assert len(real) > 100
    assert set(real) <= set(foreign.paddlenlp_keys())
    for cls in STAGES.values():
        assert [name for name in real if parser.find(cls, name) is None] == []


def test_types_and_defaults_of_passed_keys_are_paddlenlps() -> None:
    keys = foreign.paddlenlp_keys()
    assert (keys["scale_loss"].kind, keys["scale_loss"].default) == ("float", 2**15)
    assert (keys["expert_max_capacity"].kind, keys["expert_max_capacity"].default) == ("int", 2**32)
    assert (keys["label_names"].kind, keys["label_names"].optional) == ("list", True)
    assert keys["logging_strategy"].choices == ("no", "steps", "epoch")
    assert keys["past_index"].default == -1
    assert keys["skip_data_intervals"].kind == "json"
    assert keys["use_fused_rope"].kind == "bool", "a flag of the model's configuration"


# Our defaults that differ from paddlenlp's on purpose; all others must be the same.
OTHER_DEFAULTS = {
    "output_dir": "must be given",
    "do_train": "without it a run would do nothing",
    "sharding": "same meaning",
}


def test_declared_defaults_are_paddlenlps() -> None:
    keys = foreign.paddlenlp_keys()
    own = SFTArguments.specs()
    differing = {
        name
        for name in set(own) & set(_real_fields())
        if own[name].default != keys[name].default and name not in OTHER_DEFAULTS
    }
    assert differing == set()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("dataloader_num_workers", "many", 'dataloader_num_workers: must be a whole number, not "many"'),
        ("logging_strategy", "sometimes", "'sometimes' is not one of 'no', 'steps', 'epoch'"),
        ("skip_memory_metrics", 3, "must be true or false, not 3"),
        ("label_names", 5, "must be a list of strings, not 5"),
    ],
)
def test_passed_keys_are_checked_by_type(key: str, value: object, message: str) -> None:
    with pytest.raises(ArgumentsError) as caught:
        from_dict(PPOArguments, {**MINIMUM["ppo"], key: value})
    assert message in str(caught.value)


def test_passed_keys_are_kept_and_said() -> None:
    args = from_dict(PPOArguments, {**MINIMUM["ppo"], "dataloader_num_workers": 3, "optim": "adafactor"})
    assert args.passthrough == {"dataloader_num_workers": 3, "optim": "adafactor"}
    assert set(args.unused) == {"dataloader_num_workers", "optim"}
    assert args.to_dict()["optim"] == "adafactor"
