"""Numbers of steps, rollouts and tokens that follow from the arguments and the number of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignment.errors import ArgumentsError

if TYPE_CHECKING:
    from alignment.arguments.online_arguments import OnlineArguments
    from alignment.arguments.stage_arguments import Arguments


@dataclass(frozen=True)
class Sizes:
    """Derived sizes of a run.

    "Global" counts over all data ranks; a step is one optimizer step (of all models that are trained). Online methods
    are those that generate.

    Attributes:
        stage: the method's name: ``"sft"``, ``"reward"``, ``"ppo"``, ...
        rows: training rows (online: prompts).
        world_size: data ranks: processes that work on rows of their own.
        epochs: passes over the data that ``total_steps`` make.
        rows_per_step: global rows of a full step.
        micro_batches_per_step: micro batches of a full step, per data rank; with a budget of tokens the most there can
            be (one for each row).
        steps_per_epoch: steps of one epoch; a partial last one counts.
        total_steps: steps of the run.
        warmup_steps: of these, steps in which the learning rate rises.
        tokens_per_step: upper bound of the tokens of a step, global.
        prompts_per_rollout: Online: global prompts of a full rollout.
        prompt_batches_per_rollout: Online: batches of ``per_device_prompt_batch_size`` that a process reads for one
            rollout.
        rows_per_rollout: Online: global samples of a full rollout.
        steps_per_rollout: Online: steps made with a full rollout (``update_iters`` passes).
        rollouts_per_epoch: Online: rollouts of one epoch; a partial last one counts.
        rollouts: Online: rollouts of the run.
        ptx_rows_per_step: Online: global rows of the ptx loss in a step; 0 without it.
        micro_batch_tokens: the budget of padded tokens of a micro batch; 0 for fixed numbers of rows.
    """

    stage: str
    rows: int
    world_size: int
    epochs: float
    rows_per_step: int
    micro_batches_per_step: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    tokens_per_step: int
    prompts_per_rollout: int = 0
    prompt_batches_per_rollout: int = 0
    rows_per_rollout: int = 0
    steps_per_rollout: int = 0
    rollouts_per_epoch: int = 0
    rollouts: int = 0
    ptx_rows_per_step: int = 0
    micro_batch_tokens: int = 0

    def _micro_batches_in_words(self) -> str:
        if not self.micro_batch_tokens:
            return f"{self.micro_batches_per_step:,}"
        return f"by length, at most {self.micro_batch_tokens:,} padded tokens each"

    def render(self) -> str:
        """Return the sizes as lines of text."""
        name = "prompts" if self.rollouts else "rows"
        entries = [
            (f"training {name}", f"{self.rows:,}"),
            ("data ranks", f"{self.world_size:,}"),
        ]
        if self.rollouts:
            entries += [
                ("prompts per rollout", f"{self.prompts_per_rollout:,}"),
                ("samples per rollout", f"{self.rows_per_rollout:,}"),
                ("optimizer steps per rollout", f"{self.steps_per_rollout:,}"),
                ("rollouts per epoch", f"{self.rollouts_per_epoch:,}"),
                ("rollouts", f"{self.rollouts:,}"),
            ]
        entries += [
            ("rows per optimizer step", f"{self.rows_per_step:,}"),
            ("micro batches per step and data rank", self._micro_batches_in_words()),
            ("optimizer steps per epoch", f"{self.steps_per_epoch:,}"),
            ("optimizer steps", f"{self.total_steps:,} ({self.epochs:.4g} epochs, {self.warmup_steps:,} of warm-up)"),
            ("tokens per optimizer step", f"at most {self.tokens_per_step:,}"),
        ]
        if self.ptx_rows_per_step:
            entries.append(("ptx rows per optimizer step", f"{self.ptx_rows_per_step:,}"))
        width = max(len(label) for label, _ in entries)
        return "\n".join(["Derived sizes", *(f"  {label:<{width}}  {text}" for label, text in entries)])


def supervised_sizes(args: Arguments, num_rows: int, world_size: int) -> Sizes:
    """Sizes of training on given rows; see :meth:`Arguments.derive_sizes`."""
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size
    per_epoch = num_rows // per_step if args.dataloader_drop_last else math.ceil(num_rows / per_step)
    _refuse_nothing(args, num_rows, per_epoch, per_step, "rows")
    total = _total_steps(args, per_epoch)
    return Sizes(
        stage=args.STAGE,
        rows=num_rows,
        world_size=world_size,
        epochs=total / per_epoch,
        rows_per_step=per_step,
        micro_batches_per_step=_micro_batches_per_step(args),
        micro_batch_tokens=args.max_tokens_per_micro_batch,
        steps_per_epoch=per_epoch,
        total_steps=total,
        warmup_steps=_warmup_steps(args, total),
        tokens_per_step=per_step * args.context_needed * args.ROWS_EACH,
    )


def online_sizes(args: OnlineArguments, num_prompts: int, world_size: int) -> Sizes:
    """Sizes of a method that generates; see :meth:`Arguments.derive_sizes`.

    A rollout is one batch of prompts per process, or as many as fill one optimizer step. It is trained on in
    ``update_iters`` passes, each cut into windows of ``per_device_train_batch_size * gradient_accumulation_steps``
    samples per process; a window is one optimizer step.
    """
    window = args.per_device_train_batch_size * args.gradient_accumulation_steps
    batches = args.prompt_batches_per_rollout
    prompts = args.per_device_prompt_batch_size * batches * world_size
    samples, per_step = prompts * args.num_return_sequences, window * world_size
    steps = args.update_iters * (samples // per_step)
    whole, left = divmod(num_prompts, prompts)
    per_epoch, rollouts_per_epoch = whole * steps, whole
    if left and not args.dataloader_drop_last:
        per_epoch += args.update_iters * math.ceil(left * args.num_return_sequences / per_step)
        rollouts_per_epoch += 1
    _refuse_nothing(args, num_prompts, per_epoch, prompts, "prompts")
    total = _total_steps(args, per_epoch)
    warmup = getattr(args, "critic_warmup_steps", 0)
    if warmup >= total:
        raise ArgumentsError(
            f"critic_warmup_steps is {warmup}, but the run has {total} optimizer steps: the "
            "actor would never be trained"
        )
    epochs, rest = divmod(total, per_epoch)
    return Sizes(
        stage=args.STAGE,
        rows=num_prompts,
        world_size=world_size,
        epochs=total / per_epoch,
        rows_per_step=per_step,
        micro_batches_per_step=_micro_batches_per_step(args),
        micro_batch_tokens=args.max_tokens_per_micro_batch,
        steps_per_epoch=per_epoch,
        total_steps=total,
        warmup_steps=_warmup_steps(args, total),
        tokens_per_step=per_step * args.context_needed,
        prompts_per_rollout=prompts,
        prompt_batches_per_rollout=batches,
        rows_per_rollout=samples,
        steps_per_rollout=steps,
        rollouts_per_epoch=rollouts_per_epoch,
        rollouts=epochs * rollouts_per_epoch + math.ceil(rest / steps),
        ptx_rows_per_step=per_step if args.use_ptx else 0,
    )


def _micro_batches_per_step(args: Arguments) -> int:
    rows = args.per_device_train_batch_size if args.max_tokens_per_micro_batch else 1
    return args.gradient_accumulation_steps * rows


def _total_steps(args: Arguments, per_epoch: int) -> int:
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)


def _warmup_steps(args: Arguments, total: int) -> int:
    return 0 if args.lr_scheduler_type == "constant" else min(total, args.optimizer(total)["warmup_steps"])


def _refuse_nothing(args: Arguments, rows: int, per_epoch: int, batch: int, name: str) -> None:
    if rows < 1:
        raise ArgumentsError(f"there are no training {name}: the data sets are empty or every row was dropped")
    if per_epoch < 1:
        raise ArgumentsError(
            f"dataloader_drop_last leaves nothing to train on: {rows} {name}, but one full batch takes {batch}; "
            "set dataloader_drop_last to false or make the batches smaller"
        )
