"""Does a checkpoint belong to the run that wants to go on from it: its stage, its model, its arguments.

A checkpoint holds the arguments it was made with (``trainer/arguments.json``) and where it comes from
(``trainer/origin.json``). On resume they are compared, before anything heavy is loaded:

- arguments in :data:`MUST_EQUAL` make another run of it: an error, unless ``allow_changed_arguments`` is set;
- arguments in :data:`FREE` concern where, how fast and with what output it runs: nothing is said;
- any other change takes effect from here on, and a warning names it.

The files behind the arguments may have changed, too. ``trainer/data_mixture.json`` holds a hash of the token rows of
every data set; those that are trained on must still have it.

``docs/resume.md`` explains the table.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignment import __version__
from alignment.errors import CheckpointError
from alignment.flow.checkpoint import write_json
from alignment.log import get_logger
from alignment.parallel import World

ARGUMENTS_FILE = "trainer/arguments.json"
ORIGIN_FILE = "trainer/origin.json"
MIXTURE_FILE = "data_mixture.json"  # in output_dir, and in the checkpoint's trainer/

_ROWS = "the position in the data would mean other rows"
_MODEL = "the saved weights or optimizer would not fit, or the model would be another one"
_OBJECTIVE = "the model would be trained for something else"

#: Arguments that must be the same on resume, and what would go wrong.
MUST_EQUAL = {
    "seed": "the order of the data and all random numbers follow from it",
    "train_datasets": _ROWS,
    "dataset_name_or_path": _ROWS,
    "ptx_datasets": _ROWS,
    "eval_split_ratio": _ROWS,
    "dataloader_drop_last": _ROWS,
    "shuffle": _ROWS,
    "skip_bad_rows": _ROWS,
    "overlong_prompts": _ROWS,
    "overlong_answers": _ROWS,
    "max_length": _ROWS,
    "src_length": _ROWS,
    "max_src_len": _ROWS,
    "zero_padding": _ROWS,
    "greedy_zero_padding": _ROWS,
    "prompt_template": "the texts would have another form than those learnt from",
    "enable_thinking": "the texts would have another form than those learnt from",
    "reward_prompt_template": "the reward model would read texts of another form",
    "cost_prompt_template": "the cost model would read texts of another form",
    "tokenizer_name_or_path": "the token ids would mean something else",
    "reward_tokenizer_name_or_path": "the token ids would mean something else",
    "cost_tokenizer_name_or_path": "the token ids would mean something else",
    "model_name_or_path": _MODEL,
    "actor_model_name_or_path": "the reference model, from which the KL is measured, would be another one",
    "lora": _MODEL,
    "lora_rank": _MODEL,
    "lora_alpha": _MODEL,
    "lora_target_modules": _MODEL,
    "reward": _OBJECTIVE,
    "reward_model_name_or_path": _OBJECTIVE,
    "cost": _OBJECTIVE,
    "cost_model_name_or_path": _OBJECTIVE,
    "normalize_reward": "the saved statistics of the scores would be missing or unused",
    "adaptive_kl": "the saved state belongs to the other controller",
    "score_type": _OBJECTIVE,
    "loss_type": _OBJECTIVE,
    "normalizer_type": "the saved statistics of the scores would mean something else",
}

#: Arguments that may change on resume without a word.
FREE = frozenset(
    {
        # where and how often
        "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "allow_changed_arguments", "dry_run", "plugins",
        "do_train", "do_eval", "evaluation_strategy", "eval_steps", "eval_on_start", "eval_accumulation_steps",
        "eval_num_samples", "eval_with_do_generation", "save_generation_output", "sample_table_rows", "checks",
        "reward_timeout",
        "save_strategy", "save_steps", "save_total_limit", "unified_checkpoint", "logging_steps", "logging_dir",
        "disable_tqdm", "report_to", "data_cache_dir", "dataset_num_proc", "hang_timeout", "join_timeout",
        "allow_template_mismatch", "show_sample_ids",
        # the layout of the processes, and memory
        "sharding", "sharding_parallel_degree", "tensor_parallel_degree", "pipeline_parallel_degree",
        "pipeline_parallel_config", "sequence_parallel", "recompute", "critic_recompute", "offload_level",
        "offload_dir", "eval_mode", "use_fusemt", "rollout_token_budget",
        "per_device_eval_batch_size", "per_device_rollout_batch_size", "rollout_logprob_batch_size",
        "max_tokens_per_micro_batch", "pad_to_multiple_of", "pad_to_max_length",
        # starting points, which the checkpoint replaces
        "lora_path", "reward_critic_model_name_or_path", "cost_critic_model_name_or_path",
    }
)  # fmt: skip

#: What tells two models apart in their ``config.json``.
_MODEL_KEYS = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size", "head_dim",
)  # fmt: skip
_WORDS = {"sft": "SFT", "reward": "reward-model training", "ppo": "PPO"}


def save_arguments(folder: Path, args: Any, world: World) -> None:
    """Write the arguments, the origin and the run's data mixture into a checkpoint that is being written.

    Args:
        folder: the checkpoint's temporary folder; its ``trainer/`` exists.
        args: the stage's arguments.
        world: the processes of the run.
    """
    write_json(folder / ARGUMENTS_FILE, args.to_dict())
    write_json(folder / ORIGIN_FILE, {"stage": args.STAGE, "version": __version__, "world_size": world.processes})
    mixture = Path(args.output_dir) / MIXTURE_FILE
    if mixture.exists():
        shutil.copyfile(mixture, folder / "trainer" / MIXTURE_FILE)


def check_resumable(args: Any, world: World, checkpoint: Path | None) -> None:
    """Compare a checkpoint with the run that is to continue from it. Call it on every rank; the first one looks.

    Args:
        args: the stage's arguments, their limits already fitted to the model.
        world: the processes of the run.
        checkpoint: a verified checkpoint; None for a fresh start, and nothing happens.

    Raises:
        CheckpointError: another stage's checkpoint, another model's, or arguments differ that make it another run.
    """
    if checkpoint is None or not world.is_main:
        return
    origin, saved = _read(checkpoint / ORIGIN_FILE), _read(checkpoint / ARGUMENTS_FILE)
    stage = origin.get("stage", args.STAGE)
    if stage != args.STAGE:
        raise CheckpointError(
            f"{checkpoint} is a checkpoint of {_WORDS.get(stage, stage)}, and this is "
            f"{_WORDS.get(args.STAGE, args.TITLE)}: "
            "give its model as the one to start from, and no resume_from_checkpoint"
        )
    _check_models(args, checkpoint)
    refused, changed = compare_arguments(saved, args)
    if changed:
        lines = [f"  {_change(key, saved[key], getattr(args, key))}" for key in changed]
        get_logger().warning("resuming from %s with changed arguments, from here on:\n%s", checkpoint, "\n".join(lines))
    if not refused:
        return
    lines = [f"  {_change(key, saved[key], getattr(args, key))}: {MUST_EQUAL[key]}" for key in refused]
    if not args.allow_changed_arguments:
        raise CheckpointError(
            f"{checkpoint} was made with other arguments:\n" + "\n".join(lines) + "\n"
            "Use the old values, or start a new run from that model, or set allow_changed_arguments=true to go on all "
            "the same."
        )
    get_logger().warning("allow_changed_arguments: going on from %s although\n%s", checkpoint, "\n".join(lines))


def check_same_data(args: Any, world: World, checkpoint: Path | None, sets: Mapping[str, Any]) -> None:
    """Compare the token rows of a run with those its checkpoint was trained on. Call it on every rank; the first one
    looks. Data sets that the checkpoint keeps no hash of (an older version's) are not compared.

    Args:
        args: the stage's arguments.
        world: the processes of the run.
        checkpoint: a verified checkpoint; None for a fresh start, and nothing happens.
        sets: "train", "eval", "ptx" -> the tokenised data set.

    Raises:
        CheckpointError: rows that are trained on are others now; ``allow_changed_arguments`` makes it a warning, and
            other evaluation rows are one always.
    """
    if checkpoint is None or not world.is_main:
        return
    saved = _read(checkpoint / "trainer" / MIXTURE_FILE)
    changed = {}
    for name, dataset in sets.items():
        then = saved.get(name) or {}
        if "hash" in then and then["hash"] != dataset.rows_hash:
            changed[name] = (
                f"  {name} ({', '.join(sorted(set(dataset.reads.values())))}): {then['kept']} token rows with hash "
                f"{then['hash'][:8]} then, {len(dataset)} with {dataset.rows_hash[:8]} now"
            )
    trained = [line for name, line in changed.items() if name != "eval"]
    if trained and not args.allow_changed_arguments:
        raise CheckpointError(
            f"{checkpoint} was trained on other rows than the data sets give now:\n" + "\n".join(trained) + "\n"
            "The files, the tokenizer or the toolkit's version changed, and the position in the data would mean other "
            "rows. Put the old files back, or start a new run from that model, or set allow_changed_arguments=true to "
            "go on all the same."
        )
    if changed:
        lines = "\n".join(changed.values())
        get_logger().warning("going on from %s although these rows are others now:\n%s", checkpoint, lines)


def compare_arguments(saved: dict[str, Any], args: Any) -> tuple[list[str], list[str]]:
    """Find what differs between a checkpoint's arguments and a run's.

    Args:
        saved: the checkpoint's; keys that it does not have (an older version's) are not compared.
        args: the run's.

    Returns:
        The keys that must be equal but are not, and those that may change but are worth a warning; both in the order
        of declaration.
    """
    now = args.to_dict()
    differing = [key for key in args.specs() if key in saved and not _same(key, saved[key], now[key])]
    return (
        [key for key in differing if key in MUST_EQUAL],
        [key for key in differing if key not in MUST_EQUAL and key not in FREE],
    )


def _same(key: str, then: Any, now: Any) -> bool:
    if then == now or (key == "prompt_template" and then is None and now == "auto"):  # null: auto's older name
        return True
    is_path = key.endswith("_name_or_path") and isinstance(then, str) and isinstance(now, str)
    return is_path and os.path.realpath(then) == os.path.realpath(now)


def _change(key: str, then: Any, now: Any) -> str:
    return f"{key}: {json.dumps(then, ensure_ascii=False)} then, {json.dumps(now, ensure_ascii=False)} now"


def _check_models(args: Any, checkpoint: Path) -> None:
    """Compare the configurations of the saved models with those that this run starts from."""
    if not hasattr(args, "actor_model_name_or_path"):
        pairs = {".": ("model_name_or_path", args.model_name_or_path)}
    else:
        pairs = {"policy": ("actor_model_name_or_path", args.actor_model_name_or_path)}
        if hasattr(args, "reward_critic_model_name_or_path"):
            critic = args.reward_critic_model_name_or_path or args.reward_model_name_or_path
            pairs["value"] = ("reward_critic_model_name_or_path", critic or args.actor_model_name_or_path)
        if hasattr(args, "cost_critic_model_name_or_path"):
            key = "cost_critic_model_name_or_path"
            pairs["cost_value"] = (key, getattr(args, key))
    for name, (key, source) in pairs.items():
        then, now = _read(checkpoint / name / "config.json"), _read(Path(source) / "config.json")
        differing = [k for k in _MODEL_KEYS if k in then and k in now and then[k] != now[k]]
        if differing:
            details = ", ".join(f"{k} {then[k]!r} there, {now[k]!r} here" for k in differing)
            raise CheckpointError(
                f"{checkpoint / name} holds another model than {key}={source}: {details}. Resume with the model that "
                "the run was started with."
            )


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none (a model by name, a checkpoint of an older version)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    return value if isinstance(value, dict) else {}
