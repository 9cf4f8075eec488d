"""Combinations of arguments that cannot be run.

Each is refused with the numbers and a way out, before any model is loaded.
"""

from __future__ import annotations

import glob
import math
from pathlib import Path
from typing import Any

from alignment.arguments import device
from alignment.arguments.critic_keys import CriticKeys
from alignment.arguments.foreign import RL_ALGORITHMS
from alignment.arguments.layout import topology_of
from alignment.arguments.online_arguments import OnlineArguments
from alignment.arguments.resolve import default_metric, greater_is_better
from alignment.arguments.reward_arguments import RewardArguments
from alignment.arguments.row_arguments import RowArguments
from alignment.arguments.sft_arguments import LoRAFields, SFTArguments
from alignment.arguments.stage_arguments import Arguments
from alignment.arguments.training import BF16_ON_CPU
from alignment.arguments.values import LATEST, short_names
from alignment.errors import ArgumentsError, DataError, nearest
from alignment.losses.compat import compat_settings

#: What an output_dir may hold without counting as an earlier run: what a start leaves that fails before its first step.
_HARMLESS = {
    "heartbeat", "log", "logs", "runs", "vdl_log", "arguments.json", "data_mixture.json", "data_summary.json",
}  # fmt: skip
#: The same as long as no step was trained: the first evaluation's.
_UNTRAINED = {"metrics.jsonl", "eval_samples.jsonl"}


class Problems:
    """Collects mistakes, so that all are told at once.

    A combination is not judged when one of its keys is already known to be wrong.

    Args:
        file: name of the argument file, for the headline; empty without one.
    """

    def __init__(self, file: str = "") -> None:
        self._file = file
        self._messages: list[str] = []
        self._broken: set[str] = set()

    def add(self, message: str, *keys: str) -> None:
        """Note a mistake in ``keys`` unless one of them is already known to be wrong."""
        if not self._broken.intersection(keys):
            self._messages.append(message)
        self._broken.update(keys[:1])

    def raise_all(self) -> None:
        """Raise :class:`ArgumentsError` with everything that was noted; return if that is nothing."""
        if len(self._messages) == 1:
            raise ArgumentsError(self._messages[0])
        if self._messages:
            source = f" in {self._file}" if self._file else ""
            raise ArgumentsError(
                f"{len(self._messages)} problems with the arguments{source}:\n  - " + "\n  - ".join(self._messages)
            )


def check(args: Arguments, problems: Problems) -> None:
    """Note every contradiction among resolved arguments in ``problems``, and what is merely odd in ``args.notes``."""
    for name, spec in args.specs().items():
        if spec.required and not getattr(args, name):
            problems.add(f"{name} is missing: {spec.help[0].lower()}{spec.help[1:]}", name)
    _check_length(args, problems)
    _check_learning_rate(args, problems, "")
    _check_evaluation(args, problems)
    _check_precision(args, problems)
    check_processes(args, problems)
    _check_folders(args, problems)
    if isinstance(args, LoRAFields):
        _check_lora(args, problems)
    if isinstance(args, SFTArguments):
        _check_sft(args, problems)
    if isinstance(args, RowArguments):
        _check_rows(args, problems)
    if isinstance(args, RewardArguments):
        _check_reward(args)
    if isinstance(args, OnlineArguments):
        _check_online(args, problems)
    if isinstance(args, CriticKeys):
        _check_critic(args, problems)
    args.check_keys(problems)


def _check_length(args: Arguments, problems: Problems) -> None:
    if args.max_steps == 0:
        problems.add(
            "max_steps is 0, which trains nothing; use -1 for as many steps as num_train_epochs makes", "max_steps"
        )
    if not args.do_train and not args.do_eval:
        problems.add("do_train and do_eval are both false: there is nothing to do", "do_train", "do_eval")


def _check_learning_rate(args: Arguments, problems: Problems, prefix: str) -> None:
    low, high = getattr(args, f"{prefix}min_learning_rate"), getattr(args, f"{prefix}learning_rate")
    if low is not None and low > high:
        problems.add(
            f"{prefix}min_learning_rate {low:g} is above {prefix}learning_rate {high:g}",
            f"{prefix}min_learning_rate",
            f"{prefix}learning_rate",
        )
    names = (f"{prefix}warmup_ratio",) if prefix else ("warmup_ratio", "warmup_steps")  # critic_warmup_steps is no rate
    asked = [name for name in names if name in args.given and getattr(args, name)]
    if getattr(args, f"{prefix}lr_scheduler_type") == "constant" and asked:
        args.notes.append(
            f"{' and '.join(asked)}: not used, because {prefix}lr_scheduler_type constant has no warm-up; "
            "constant_with_warmup has"
        )


def _check_evaluation(args: Arguments, problems: Problems) -> None:
    evaluation = getattr(args, "eval_datasets", None)
    folder = getattr(args, "dataset_name_or_path", None)
    # A folder may hold evaluation data too; _check_data_folder looks.
    holds_both = isinstance(folder, str) and (Path(folder).expanduser().is_dir() or folder.startswith((".", "/", "~")))
    data = evaluation or args.eval_split_ratio or holds_both
    if args.do_eval and not data:
        why = "do_eval is true" if "do_eval" in args.given else f"evaluation_strategy is {args.evaluation_strategy}"
        problems.add(
            f"{why}, but there are no evaluation data: give eval_datasets or eval_split_ratio, or set do_eval to false",
            "eval_datasets",
            "eval_split_ratio",
            "do_eval",
            "evaluation_strategy",
        )
    _check_best_metric(args, problems)
    if args.early_stopping_patience is not None and args.evaluation_strategy == "no":
        problems.add(
            "early_stopping_patience counts evaluations: set evaluation_strategy to steps or epoch",
            "early_stopping_patience",
            "evaluation_strategy",
        )
    if evaluation and args.eval_split_ratio is not None:
        args.notes.append("eval_split_ratio is not used, because eval_datasets is given")
    if args.load_best_model_at_end:
        keys = ("load_best_model_at_end", "evaluation_strategy", "save_strategy", "eval_steps", "save_steps")
        if args.evaluation_strategy == "no":
            problems.add("load_best_model_at_end needs evaluations: set evaluation_strategy to steps or epoch", *keys)
        elif args.evaluation_strategy != args.save_strategy:
            problems.add(
                f"load_best_model_at_end needs equal strategies, but evaluation_strategy is {args.evaluation_strategy} "
                f"and save_strategy is {args.save_strategy}",
                *keys,
            )
        elif args.evaluation_strategy == "steps" and args.save_steps % args.eval_steps:  # type: ignore[operator]
            problems.add(
                f"load_best_model_at_end needs save_steps to be a multiple of eval_steps, but they are "
                f"{args.save_steps} and {args.eval_steps}",
                *keys,
            )


def evaluation_metrics(args: Arguments) -> list[str]:
    """Names that ``metric_for_best_model`` may say: what every evaluation of this stage gives, without ``eval_``."""
    if isinstance(args, RewardArguments):
        cost = ("accuracy_sign", "accuracy_sign_safer", "accuracy_sign_unsafer")
        cost += ("costs_mean", "costs_std", "safer_mean", "unsafer_mean")
        reward = ("rewards_mean", "rewards_std", "chosen_mean", "rejected_mean")
        normalizer = ("normalizer_mean", "normalizer_std") if args.normalize_score_during_training else ()
        return [*args.METRICS, *(cost if args.score_type == "cost" else reward), *normalizer]
    if not isinstance(args, OnlineArguments):
        return list(args.METRICS)
    scored = [name for name in args.METRICS if name in args.specs()]  # the key of a score's name says what gives it
    found = [name for name in args.METRICS if name not in scored]
    for suffix in ("", "_greedy") if args.eval_temperature > 0 else ("_greedy",):
        found += [f"{name}{suffix}" for name in (*scored, "mean_generated_length", "truncation_rate")]
        for name in scored:
            sources = getattr(args, name)
            if isinstance(sources, dict) and len(sources) > 1:
                found += [f"{name}{suffix}/{source}" for source in short_names(list(sources))]
    return found


def _check_best_metric(args: Arguments, problems: Problems) -> None:
    """A name that no evaluation gives would end the run at its first evaluation, with nothing saved."""
    if not args.do_eval:
        return
    wanted = args.metric_for_best_model or ""
    name, known = wanted.removeprefix("eval_").removeprefix("eval/"), evaluation_metrics(args)
    if name in known:
        return
    message = f"metric_for_best_model {wanted}: no such metric (there are {', '.join(known)}){nearest(name, known)}"
    if args.load_best_model_at_end:
        problems.add(message, "metric_for_best_model")
        return
    args.metric_for_best_model = default_metric(args)
    if "greater_is_better" not in args.given:
        args.greater_is_better = greater_is_better(args.metric_for_best_model)
    args.notes.append(f"{message}. The best checkpoint is that by {args.metric_for_best_model}")


def _check_precision(args: Arguments, problems: Problems) -> None:
    if args.fp16:
        problems.add(
            "fp16 is not offered: float16 gradients underflow without a loss scale, which this toolkit has not. Set "
            "bf16 to true, or leave both out for float32",
            "fp16",
        )
    if args.bf16 and args.on_cpu:
        args.notes.append(BF16_ON_CPU)
    if args.bf16 and "fp16_opt_level" in args.given and args.fp16_opt_level != "O2":
        args.notes.append(f"fp16_opt_level {args.fp16_opt_level}: with bf16 the weights are bfloat16 at every level")


def check_processes(args: Arguments, problems: Problems, processes: int | None = None) -> None:
    """Note what cannot be on ``processes`` processes (those of this run if not given)."""
    if (processes or device.world_size()) == 1:
        return
    degrees = ("tensor_parallel_degree", "pipeline_parallel_degree", "sharding_parallel_degree")
    if args.sharding_parallel_degree > 1 and not args.sharding:
        problems.add(
            f"sharding_parallel_degree is {args.sharding_parallel_degree}, but sharding says nothing to share; set "
            "sharding to stage1, stage2 or stage3",
            "sharding_parallel_degree",
        )
    if args.sequence_parallel and args.tensor_parallel_degree < 2:
        problems.add(
            "sequence_parallel splits what tensor-parallel ranks share; set tensor_parallel_degree to 2 or more",
            "sequence_parallel",
        )
    if "stage3" in args.sharding and args.pipeline_parallel_degree > 1:
        problems.add(
            "sharding stage3 with a pipeline would gather every stage's parameters for each micro batch; use stage1 or "
            "stage2 with pipeline_parallel_degree > 1",
            "sharding",
            "pipeline_parallel_degree",
        )
    if "offload" in args.sharding:
        args.notes.append("sharding's offload is not used: offload_level says what leaves the device's memory")
    try:
        topology_of(args, processes)
    except ArgumentsError as error:
        problems.add(str(error), *degrees)


def _check_folders(args: Arguments, problems: Problems) -> None:
    for plugin in args.plugins:
        if plugin.endswith(".py") and not Path(plugin).expanduser().is_file():
            problems.add(f"plugins: {plugin} does not exist (looked in {Path.cwd()})", "plugins")
    resume = args.resume_from_checkpoint
    if resume and resume != LATEST and not Path(resume).expanduser().is_dir():
        problems.add(
            f"resume_from_checkpoint: {resume} is not a folder (looked in {Path.cwd()}); true means the newest in "
            "output_dir",
            "resume_from_checkpoint",
        )
    if resume and args.overwrite_output_dir:
        problems.add(
            "resume_from_checkpoint continues a run and overwrite_output_dir starts afresh; choose one",
            "resume_from_checkpoint",
            "overwrite_output_dir",
        )
    if not args.output_dir:
        return
    output = Path(args.output_dir)
    if output.exists() and not output.is_dir():
        problems.add(f"output_dir {output} is a file, not a folder", "output_dir")
    # Only the first process looks: by the time the others do, it may have begun to write.
    elif output.is_dir() and args.do_train and not resume and not args.overwrite_output_dir and device.rank() == 0:
        from alignment.paths import LOCK, METRICS_FILE, last_step

        logs = Path(args.logging_dir or "")
        harmless = _HARMLESS if last_step(output / METRICS_FILE) > 0 else _HARMLESS | _UNTRAINED
        found = sorted(
            entry.name
            for entry in output.iterdir()
            if entry.name not in harmless
            and not entry.name.startswith(".")
            and entry.suffix != ".log"
            and entry != logs
        )
        if found:
            message = (
                f"output_dir {output} is not empty (it holds "
                f"{', '.join(found[:3])}{', ...' if len(found) > 3 else ''}): "
                "continue that run with resume_from_checkpoint=true, start afresh with overwrite_output_dir=true, "
                "or choose another output_dir"
            )
            if args.dry_run:
                args.notes.append(message)
            elif not (output / LOCK).exists():  # else that run may be at work: the lock is asked next, and says it
                problems.add(message, "output_dir", "overwrite_output_dir", "resume_from_checkpoint")


def _check_lora(args: Any, problems: Problems) -> None:
    if args.lora_path and not Path(args.lora_path).expanduser().is_dir():
        problems.add(f"lora_path: {args.lora_path} is not a folder (looked in {Path.cwd()})", "lora_path")
    options = sorted(args.given & {"lora_rank", "lora_alpha", "lora_path", "lora_target_modules"})
    if options and not args.lora:
        args.notes.append(f"{', '.join(options)}: not used, because lora is false")


def _check_sft(args: SFTArguments, problems: Problems) -> None:
    if args.do_train and not (args.dataset_name_or_path or args.train_datasets):
        problems.add(
            "there are no training data: give dataset_name_or_path or train_datasets",
            "dataset_name_or_path",
            "train_datasets",
        )
    if args.dataset_name_or_path and args.train_datasets:
        problems.add(
            "dataset_name_or_path and train_datasets are both given; choose one",
            "dataset_name_or_path",
            "train_datasets",
        )
    elif isinstance(args.dataset_name_or_path, str):
        _check_data_folder(args, args.dataset_name_or_path, problems)
    if args.src_length >= args.max_length:
        if "src_length" in args.given:
            problems.add(
                f"src_length {args.src_length} leaves no token for the answer in max_length {args.max_length}",
                "src_length",
                "max_length",
            )
        else:
            args.src_length = args.max_length // 2
            args.notes.append(f"src_length is {args.src_length}, half of max_length {args.max_length}")
    if args.greedy_zero_padding and not args.zero_padding:
        args.notes.append("greedy_zero_padding does nothing, because zero_padding is false")


def _check_data_folder(args: SFTArguments, name: str, problems: Problems) -> None:
    from alignment.ppo.data.files import EVALUATION, find_files

    folder = Path(name).expanduser()
    if not folder.exists():
        if name.startswith((".", "/", "~")) and not glob.glob(str(folder), recursive=True):
            problems.add(
                f"dataset_name_or_path: {name} does not exist (looked in {Path.cwd()})", "dataset_name_or_path"
            )
        return
    if not folder.is_dir():
        return
    wants_eval = args.do_eval and not args.eval_datasets and args.eval_split_ratio is None
    asked = "train"
    try:
        files = find_files(folder, asked)
        if wants_eval:
            asked = EVALUATION
            if find_files(folder, asked) == files:
                raise DataError(f"the folder {name} holds no file of split {EVALUATION!r}")
    except DataError as error:
        way_out = "; evaluation needs one, or eval_split_ratio, or do_eval=false" if asked == EVALUATION else ""
        problems.add(f"dataset_name_or_path: {error}{way_out}", "dataset_name_or_path", "eval_split_ratio")


def _check_rows(args: RowArguments, problems: Problems) -> None:
    if args.do_train and not args.train_datasets:
        problems.add("there are no training data: give train_datasets", "train_datasets")
    if args.max_src_len is not None and args.max_src_len >= args.max_length:
        problems.add(
            f"max_src_len {args.max_src_len} leaves no token for the answer in max_length {args.max_length}",
            "max_src_len",
            "max_length",
        )


def _check_reward(args: RewardArguments) -> None:
    if (
        "normalizer_momentum" in args.given
        and args.normalizer_type == "RunningMeanStd"
        and args.normalize_score_during_training
    ):
        args.notes.append("normalizer_momentum is not used by RunningMeanStd")


def _check_online(args: OnlineArguments, problems: Problems) -> None:
    if args.do_train and not args.train_datasets:
        problems.add("there are no training prompts: give train_datasets", "train_datasets")
    check_sources(args, problems, "reward", "reward_critic_model_name_or_path")
    _check_windows(args, problems)
    _check_answer_limits(args, problems)
    algorithm = args.passthrough.get("rl_algorithm")
    if algorithm is not None and RL_ALGORITHMS[algorithm] != args.STAGE:
        named = RL_ALGORITHMS[algorithm]
        either = "" if named == "ppo" else ", or with `alignment ppo`, which reads rl_algorithm"
        problems.add(
            f"rl_algorithm is {algorithm}, but this is {args.TITLE}: start it with `alignment {named}`{either}",
            "rl_algorithm",
        )
    if args.compat is not None:
        try:
            compat_settings(args.compat, args.STAGE)
        except ArgumentsError as error:
            problems.add(str(error), "compat")
    _check_correction(args, problems)
    if args.ptx_coeff > 0 and not args.ptx_datasets:
        problems.add(
            f"ptx_coeff is {args.ptx_coeff:g}, but there are no ptx_datasets: give them, or set ptx_coeff to 0",
            "ptx_coeff",
            "ptx_datasets",
        )
    if args.ptx_datasets and args.ptx_coeff == 0:
        args.notes.append("ptx_datasets is not used, because ptx_coeff is 0")
    targets = sorted(args.given & {"kl_target", "kl_horizon"})
    if targets and not args.adaptive_kl:
        args.notes.append(f"{' and '.join(targets)}: not used, because adaptive_kl is false")
    if args.adaptive_kl and args.kl_coeff == 0:
        problems.add(
            "adaptive_kl multiplies kl_coeff, which is 0 and would stay 0: give a kl_coeff above 0",
            "kl_coeff",
            "adaptive_kl",
        )
    for name in ("missing_eos_score", "missing_eos_penalty"):
        rule = name.removeprefix("missing_eos_")
        if name in args.given and args.missing_eos_rule != rule:
            args.notes.append(f"{name} is not used, because missing_eos_rule is {args.missing_eos_rule}, not {rule}")
    if args.update_iters == 1 and args.target_kl is not None and args.prompt_batches_per_rollout > 1:
        args.notes.append("target_kl does nothing: each rollout is trained on in a single optimizer step")


def _check_correction(args: OnlineArguments, problems: Problems) -> None:
    keys = ("rollout_correction_low", "rollout_correction_high")
    low, high = args.rollout_correction_low, args.rollout_correction_high
    given = [key for key in keys if key in args.given]
    if args.rollout_correction == "none" and given:
        args.notes.append(f"{' and '.join(given)}: not used, because rollout_correction is none")
    elif args.rollout_correction == "tis" and keys[0] in given:
        args.notes.append(f"{keys[0]} is not used: rollout_correction tis bounds weights from above only")
    elif low is not None and high is not None and low >= high:
        problems.add(f"rollout_correction_low {low:g} is not below rollout_correction_high {high:g}", *keys)


def _check_critic(args: Any, problems: Problems) -> None:
    if args.given & {"critic_learning_rate", "critic_min_learning_rate", "critic_lr_scheduler_type"}:
        _check_learning_rate(args, problems, "critic_")


def check_sources(args: OnlineArguments, problems: Problems, key: str, critic_key: str) -> None:
    """Note what is wrong with what ``key`` (``reward``) names as scoring the answers.

    Args:
        args: the arguments.
        problems: what is noted.
        key: the key; its model is that of ``KEY_model_name_or_path``.
        critic_key: names a critic's folder that is the model's unless it is given; ``args`` may lack it.
    """
    sources, model_key = getattr(args, key), f"{key}_model_name_or_path"
    names, model = [sources] if isinstance(sources, str) else list(sources or {"model": 1.0}), getattr(args, model_key)
    if "model" in names and not model:
        asked, other = f"there is no {key}", f', or {key} as "file.py:function"'
        if sources:
            asked, other = f"{key} asks for the {key} model", ""
        problems.add(f"{asked}: give {model_key}{other}", key, model_key)
    if "model" not in names and model:
        starts_critic = isinstance(args, CriticKeys) and critic_key not in args.given
        only = " except to start the critic" if starts_critic else ""
        args.notes.append(f"{model_key} is not used{only}, because {key} does not name the {key} model")
    for name in names:
        file, colon, function = name.rpartition(":")
        if not colon or not file.endswith(".py"):
            if name.endswith(".py"):
                problems.add(f"{key}: {name} names a file but no function; write {name}:FUNCTION", key)
            continue
        if not function.isidentifier():
            problems.add(f"{key}: {name} names no function; write {file}:FUNCTION", key)
        elif not Path(file).expanduser().is_file():
            problems.add(f"{key}: {file} does not exist (looked in {Path.cwd()})", key)


def _check_windows(args: OnlineArguments, problems: Problems) -> None:
    """Refuse a rollout that the windows of the optimizer steps do not fill exactly."""
    prompts, samples = args.per_device_prompt_batch_size, args.num_return_sequences
    rows = prompts * samples
    window = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if rows % window == 0 or window % rows == 0:
        return
    unit = math.lcm(window, samples) // samples
    fix = math.ceil(prompts / unit) * unit
    problems.add(
        f"the batch sizes do not divide: per_device_prompt_batch_size {prompts} x num_return_sequences {samples} = "
        f"{rows} samples per rollout, per_device_train_batch_size {args.per_device_train_batch_size} x "
        f"gradient_accumulation_steps {args.gradient_accumulation_steps} = {window} per optimizer step; one must be a "
        f"multiple of the other, for instance per_device_prompt_batch_size {fix}",
        "per_device_prompt_batch_size",
        "num_return_sequences",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
    )


def _check_answer_limits(args: OnlineArguments, problems: Problems) -> None:
    if args.min_dec_len > args.max_dec_len:  # type: ignore[operator]
        problems.add(
            f"min_dec_len {args.min_dec_len} is above max_dec_len {args.max_dec_len}",
            "min_dec_len",
            "max_dec_len",
            "max_length",
        )
