"""Defaults that follow from other keys. Nothing here refuses anything; :mod:`alignment.arguments.checks` does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from alignment.arguments.critic_keys import FROM_ACTOR, CriticKeys
from alignment.arguments.online_arguments import OnlineArguments
from alignment.arguments.sft_arguments import LoRAFields
from alignment.arguments.stage_arguments import Arguments
from alignment.arguments.values import LATEST
from alignment.paths import cache_folder

#: Bounds of rollout_correction where they are not given: (low, high).
_CORRECTION_BOUNDS = {"none": (None, None), "tis": (None, 2.0), "icepop": (0.5, 5.0), "mask": (0.99, 1.01)}
#: paddlenlp's early_stopping_patience, where only its early_stopping is given.
_PADDLENLP_PATIENCE = 4
_SMALLER_IS_BETTER = (
    "loss", "ppl", "perplexity", "kl", "kl_divergence", "cost", "cost_greedy", "calibration_error", "truncation_rate",
    "truncation_rate_greedy",
)  # fmt: skip


def resolve(args: Arguments) -> None:
    """Fill in, in place, every value that was not given and follows from others."""
    if args.passthrough.get("no_cuda"):
        args.device = "cpu"
    args.output_dir = os.path.expanduser(args.output_dir)
    resume = args.resume_from_checkpoint
    if resume and resume != LATEST and not Path(resume).is_dir() and (Path(args.output_dir) / resume).is_dir():
        args.resume_from_checkpoint = str(Path(args.output_dir) / resume)
    if args.logging_dir is None:
        args.logging_dir = str(Path(args.output_dir) / "runs")
    if args.offload_dir is None:
        args.offload_dir = str(Path(args.output_dir) / ".offload")
    if args.data_cache_dir is None:
        args.data_cache_dir = str(cache_folder() / "data")
    if args.report_to is None:
        args.report_to = ["visualdl"]
    args.disable_tqdm = bool(args.disable_tqdm)
    if args.max_steps > 0 and {"max_steps", "num_train_epochs"} <= args.given:
        args.notes.append(f"max_steps {args.max_steps} wins over num_train_epochs {args.num_train_epochs:g}")
    if args.warmup_steps > 0 and args.warmup_ratio > 0:
        args.notes.append(f"warmup_steps {args.warmup_steps} wins over warmup_ratio {args.warmup_ratio:g}")
    _resolve_evaluation(args)
    args.plugins = [beside_file(plugin, args.file) for plugin in args.plugins]
    if isinstance(args, LoRAFields) and args.lora_alpha is None:
        args.lora_alpha = 2 * args.lora_rank
    if isinstance(args, OnlineArguments):
        _resolve_online(args)
    if isinstance(args, CriticKeys):
        _resolve_critic(args)
    args.resolve_keys()


def _resolve_evaluation(args: Arguments) -> None:
    if "do_eval" in args.given and not args.do_eval and args.evaluation_strategy != "no":
        args.notes.append(f"do_eval is false, so evaluation_strategy {args.evaluation_strategy} does nothing")
        args.evaluation_strategy = "no"
    args.do_eval = args.do_eval or args.evaluation_strategy != "no"
    if args.eval_steps is None:
        args.eval_steps = args.logging_steps
    if args.passthrough.get("early_stopping") and args.early_stopping_patience is None:
        args.early_stopping_patience = _PADDLENLP_PATIENCE
    elif args.passthrough.get("early_stopping") is False and args.early_stopping_patience is not None:
        args.remarks.append("early_stopping_patience is not used, because early_stopping is false")
        args.early_stopping_patience = None
    if args.metric_for_best_model is None:
        args.metric_for_best_model = default_metric(args)
    if args.greater_is_better is None:
        args.greater_is_better = greater_is_better(args.metric_for_best_model)


def default_metric(args: Arguments) -> str:
    """What ``metric_for_best_model`` is unless the user says."""
    greedy_only = isinstance(args, OnlineArguments) and args.eval_temperature == 0
    return "reward_greedy" if greedy_only and args.METRICS[0] == "reward" else args.METRICS[0]


def greater_is_better(metric: str) -> bool:
    """Whether a greater value of an evaluation's metric is the better one."""
    name, _, _ = metric.removeprefix("eval/").partition("/")  # one of several costs is a cost
    return not name.endswith(_SMALLER_IS_BETTER)


def beside_file(name: str, argument_file: str | None) -> str:
    """Return where a ``.py`` file (or ``file.py:function``) is: as given, else beside the argument file.

    A name that is no such file, or is found in neither place, comes back unchanged.
    """
    place, colon, function = name.rpartition(":") if ".py:" in name else (name, "", "")
    if not place.endswith(".py") or argument_file is None or Path(place).expanduser().is_file():
        return name
    beside = Path(argument_file).parent / place
    return f"{beside}{colon}{function}" if beside.is_file() else name


def sources_beside_file(sources: Any, argument_file: str | None) -> Any:
    """What ``reward`` (or a key like it) names, with every file as :func:`beside_file` finds it."""
    if isinstance(sources, str):
        return beside_file(sources, argument_file)
    return sources and {beside_file(name, argument_file): weight for name, weight in sources.items()}


def _resolve_online(args: OnlineArguments) -> None:
    args.reward = sources_beside_file(args.reward, args.file)
    if args.max_src_len is None:
        args.max_src_len = args.max_length
    if args.max_dec_len is None:
        args.max_dec_len = args.max_length
    if args.rollout_logprob_batch_size is None:
        args.rollout_logprob_batch_size = args.per_device_train_batch_size
    if args.clip_range_ratio_low is None:
        args.clip_range_ratio_low = args.clip_range_ratio
    if args.clip_range_ratio_high is None:
        args.clip_range_ratio_high = args.clip_range_ratio
    if args.passthrough.get("rl_algorithm") == "grpo" and (args.normalize_reward or args.normalize_advantage):
        args.remarks.append("normalize_reward and normalize_advantage are false, as in paddlenlp's GRPO")
        args.normalize_reward = args.normalize_advantage = False
    args.normalize_reward = bool(args.normalize_reward)
    args.normalize_advantage = bool(args.normalize_advantage)
    args.eval_mode = args.eval_mode or ""
    low, high = _CORRECTION_BOUNDS[args.rollout_correction]
    if args.rollout_correction_low is None:
        args.rollout_correction_low = low
    if args.rollout_correction_high is None:
        args.rollout_correction_high = high


def _resolve_critic(args: Any) -> None:
    if args.reward_critic_model_name_or_path is None:
        args.reward_critic_model_name_or_path = args.reward_model_name_or_path or args.actor_model_name_or_path
    for name in FROM_ACTOR:
        if getattr(args, f"critic_{name}") is None:
            setattr(args, f"critic_{name}", getattr(args, name))
