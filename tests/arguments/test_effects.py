"""Keys that change nothing in a run are said, once; remarks about odd combinations too."""

from __future__ import annotations

from typing import Any

import pytest

from alignment.arguments import PPOArguments, RewardArguments, SFTArguments, device, from_dict

TUNE = {"output_dir": "out", "model_name_or_path": "m", "train_datasets": "a"}
PPO = {"output_dir": "out", "actor_model_name_or_path": "m", "reward_model_name_or_path": "r", "train_datasets": "a"}
BASE = {SFTArguments: TUNE, RewardArguments: TUNE, PPOArguments: PPO}


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "gpu_available", lambda: False)


def _args(cls: type, **values: Any) -> Any:
    return from_dict(cls, {**BASE[cls], **values})


@pytest.mark.parametrize(
    ("values", "key", "part"),
    [
        ({"bf16": True, "amp_master_grad": True}, "amp_master_grad", "gradients always add up in float32"),
        ({"use_flash_attention": True}, "use_flash_attention", "need a GPU"),
        ({"fused_linear": 1}, "fused_linear", "GPU kernels"),
        ({"tensor_parallel_degree": 2}, "tensor_parallel_degree", "no effect with one process"),
        ({"pipeline_parallel_degree": 2}, "pipeline_parallel_degree", "no effect with one process"),
        ({"sharding": "stage1"}, "sharding", "no effect with one process"),
        ({"sharding_parallel_degree": 4}, "sharding_parallel_degree", "no effect with one process"),
        ({"eval_mode": "single"}, "eval_mode", "no effect with one process"),
        ({"pipeline_parallel_config": "x"}, "pipeline_parallel_config", "the pipeline needs no options"),
        ({"optim": "adafactor"}, "optim", "this toolkit's does not"),
        ({"device": "gpu"}, "device", "no GPU"),
    ],
)
def test_a_key_without_effect_is_listed(values: dict[str, Any], key: str, part: str) -> None:
    assert part in _args(PPOArguments, **values).unused[key]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"bf16": False, "fp16_opt_level": "O2"},
        {"tensor_parallel_degree": 1, "pipeline_parallel_degree": -1, "sharding": "", "sharding_parallel_degree": 1},
        {"offload_level": "", "eval_mode": "", "use_fusemt": False},
        {"offload_level": "freeze_model optimizer", "offload_dir": "/scratch"},
        {"optim": "adamw", "skip_profile_timer": True, "sequence_parallel": False},
        {"device": "cpu"},
    ],
)
def test_what_asks_for_nothing_is_not_listed(values: dict[str, Any]) -> None:
    assert _args(PPOArguments, **values).unused == {}


def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "gpu_available", lambda: True)
    args = _args(PPOArguments, bf16=True, fp16_opt_level="O2", use_flash_attention=True)
    assert args.unused == {}
    assert (args.on_cpu, args.dtype, args.notes) == (False, "bfloat16", [])


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("level", ["O0", "O1", "O2", None])
def test_bf16_is_bfloat16_at_every_level_and_everywhere(
    gpu: bool, level: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A3: bf16 without O2 was float32 without a word; on a CPU it always was."""
    monkeypatch.setattr(device, "gpu_available", lambda: gpu)
    values = {} if level is None else {"fp16_opt_level": level}
    args = _args(PPOArguments, bf16=True, **values)
    assert args.dtype == "bfloat16"
    assert any("bf16 on a CPU" in note for note in args.notes) != gpu
    assert any("bfloat16 at every level" in note for note in args.notes) == (level in ("O0", "O1"))
    assert _args(PPOArguments, **values).dtype == "float32"
    assert _args(PPOArguments, **values).notes == []


def test_several_processes_make_a_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "8")
    monkeypatch.setenv("PADDLE_TRAINER_ID", "5")
    layout = _args(PPOArguments, sharding="stage2", tensor_parallel_degree=2).topology()
    assert (layout.tensor, layout.sharding, layout.sharding_stage, layout.data_size) == (2, 4, 2, 4)
    assert (layout.tensor_rank, layout.sharding_rank, layout.data_rank) == (1, 2, 2)
    layout = _args(PPOArguments, pipeline_parallel_degree=2).topology()
    assert (layout.pipeline, layout.stage, layout.data_size, layout.data_rank) == (2, 1, 4, 2)


def test_one_process_is_one_process_whatever_the_degrees() -> None:
    args = _args(PPOArguments, sharding="stage1", tensor_parallel_degree=2)
    assert args.topology().processes == 1
    assert args.unused["sharding"] == args.unused["tensor_parallel_degree"] == "no effect with one process"


@pytest.mark.parametrize(
    ("cls", "values", "note"),
    [
        (PPOArguments, {"ptx_datasets": "b"}, "ptx_datasets is not used, because ptx_coeff is 0"),
        (PPOArguments, {"kl_target": 3}, "kl_target: not used, because adaptive_kl is false"),
        (
            PPOArguments,
            {"missing_eos_penalty": 2},
            "missing_eos_penalty is not used, because missing_eos_rule is none, not penalty",
        ),
        (
            PPOArguments,
            {"missing_eos_rule": "penalty", "missing_eos_score": -3},
            "missing_eos_score is not used, because missing_eos_rule is penalty, not score",
        ),
        (PPOArguments, {"max_steps": 5, "num_train_epochs": 2}, "max_steps 5 wins over num_train_epochs 2"),
        (SFTArguments, {"warmup_steps": 5, "warmup_ratio": 0.1}, "warmup_steps 5 wins over warmup_ratio 0.1"),
        (SFTArguments, {"lora_rank": 4}, "lora_rank: not used, because lora is false"),
        (
            SFTArguments,
            {"greedy_zero_padding": True},
            "greedy_zero_padding does nothing, because zero_padding is false",
        ),
        (
            SFTArguments,
            {"eval_datasets": "b", "eval_split_ratio": 0.1},
            "eval_split_ratio is not used, because eval_datasets is given",
        ),
        (
            RewardArguments,
            {
                "normalizer_type": "RunningMeanStd",
                "normalizer_momentum": 0.5,
                "normalize_score_during_training": True,
            },
            "normalizer_momentum is not used by RunningMeanStd",
        ),
        (
            PPOArguments,
            {"reward": "brevity"},
            "reward_model_name_or_path is not used except to start the critic, "
            "because reward does not name the reward model",
        ),
    ],
)
def test_notes(cls: type, values: dict[str, Any], note: str) -> None:
    assert note in _args(cls, **values).notes


def test_the_report_is_said_once(said: list[tuple[str, str]]) -> None:
    args = _args(PPOArguments, optim="adafactor", skip_profile_timer=False, kl_target=3)
    args.report()
    args.report()
    keys = "optim, skip_profile_timer: paddlenlp's trainer uses it, this toolkit's does not"
    assert said == [("INFO", keys), ("WARNING", "kl_target: not used, because adaptive_kl is false")]


def test_a_constant_schedule_has_no_warm_up() -> None:
    """D30: a warm-up that does not happen is said."""
    args = _args(SFTArguments, lr_scheduler_type="constant", warmup_steps=5)
    assert any(note.startswith("warmup_steps: not used") for note in args.notes)
    assert not any("warmup" in note for note in _args(SFTArguments, lr_scheduler_type="linear", warmup_steps=5).notes)
    args = _args(PPOArguments, critic_lr_scheduler_type="constant", critic_warmup_ratio=0.1)
    assert any(note.startswith("critic_warmup_ratio: not used") for note in args.notes)
