"""The update: passes over one experience in freshly shuffled minibatches, actor and critic each with its own optimizer.

A minibatch ("window") is one optimizer step: ``per_device_train_batch_size * gradient_accumulation_steps`` rows of each
data rank. Its rows are drawn from all ranks' rows, its losses are normalised by its global counts, so the step is the
same on any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from alignment import runtime
from alignment.flow.finite import FiniteCheck
from alignment.flow.invariants import FirstStepCheck, Guard, check_first_pass, check_later_pass, precision_of
from alignment.flow.order import micro_batches, rank_slice
from alignment.flow.ptx import PtxStream
from alignment.flow.statistics import Statistics
from alignment.losses.policy import policy_loss, value_loss
from alignment.parallel import World
from alignment.rollout.roles import PolicyRole, ValueRole
from alignment.rollout.rollout import Experience, Rollout

# An update stops when its approximate KL passes this multiple of target_kl (the factor of TRL v1 and
# Stable-Baselines3).
EARLY_STOP_FACTOR = 1.5


@dataclass(frozen=True)
class Position:
    """A place in the update: before the row ``rows`` of the pass ``number`` (both 0-based, in the order of that pass).

    Counted in rows of all ranks, so it means the same on any layout and with any batch size.
    """

    number: int = 0
    rows: int = 0


@dataclass(frozen=True)
class Window:
    """One optimizer step's rows.

    Attributes:
        mine: this rank's rows.
        tokens: response tokens of the window on all ranks.
        answers: rows with at least one response token, on all ranks.
        all_tokens: tokens of prompts and responses, on all ranks.
        rows: rows on all ranks.
        first_pass: whether nothing was learnt from this rollout before (first window of the first pass).
        after: where the next window begins; ``None`` behind the last one.
    """

    mine: Experience
    tokens: int
    answers: int
    all_tokens: int
    rows: int
    first_pass: bool
    after: Position | None

    def denominator(self, mean: str) -> float:
        """What a loss of this window is divided by."""
        return float(max(1, self.tokens if mean == "token" else self.answers))


def split_windows(
    experience: Experience, args: Any, world: World, rollout_number: int, begin: Position | None = None
) -> Iterator[Window]:
    """Shuffle the rows anew for each of ``update_iters`` passes and cut them into windows.

    Args:
        experience: the rows of all ranks.
        args: ``update_iters``, ``per_device_train_batch_size``, ``gradient_accumulation_steps``, ``seed``.
        world: how many ranks share a window.
        rollout_number: makes each rollout's orders its own.
        begin: leave out what lies before; ``None`` for everything.

    Yields:
        Windows; the last of a pass may be smaller, and a rank's share of it empty.
    """
    rows = len(experience)
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps * world.size
    lengths, whole = experience.rollout.response_len, experience.rollout.lengths
    begin = begin or Position()
    for number in range(begin.number, args.update_iters):
        order = np.random.default_rng([args.seed, 1, rollout_number, number]).permutation(rows)
        for start in range(begin.rows if number == begin.number else 0, rows, size):
            chosen = order[start : start + size]
            after: Position | None = Position(number, start + size)
            if start + size >= rows:
                after = Position(number + 1) if number + 1 < args.update_iters else None
            mine = rank_slice(chosen, world.rank, world.size)
            yield Window(
                mine=experience.select(mine),
                tokens=int(lengths[chosen].sum()),
                answers=int((lengths[chosen] > 0).sum()),
                all_tokens=int(whole[chosen].sum()),
                rows=len(chosen),
                first_pass=number == 0 and start == 0,
                after=after,
            )


class PPOUpdater:
    """Trains actor and critic on experiences.

    Args:
        args: the PPO arguments.
        world: the data ranks.
        actor: the trained policy.
        critic: the trained value function.
        ptx: supervised rows for the ptx loss, or ``None``.
        decode: turns token ids into text, for the dump of a batch whose loss is not finite.
        guard: what a check that fails does.

    Attributes:
        first_step: checks the first optimizer step of each role; ``None`` where there is nothing (more) to check.
    """

    def __init__(
        self,
        args: Any,
        world: World,
        actor: PolicyRole,
        critic: ValueRole,
        ptx: PtxStream | None,
        decode: Callable[[list[int]], str],
        guard: Guard,
    ) -> None:
        self.args, self.world, self.actor, self.critic, self.ptx = args, world, actor, critic, ptx
        self.finite = FiniteCheck(args.output_dir, world.rank, decode)
        self.guard = guard
        self.first_step: FirstStepCheck | None = None
        self._log_ratios: list[np.ndarray] | None = []  # of the first step; None behind it

    def run(
        self,
        experience: Experience,
        rollout_number: int,
        global_step: int,
        on_step: Callable[[Statistics, Position | None, int], bool],
        begin: Position | None = None,
    ) -> None:
        """Learn from one experience.

        Args:
            experience: the rows of all ranks.
            rollout_number: of this experience, for the orders.
            global_step: optimizer steps taken so far in the run.
            on_step: gets the statistics (over all ranks) of each optimizer step, where the update goes on (``None``:
                it ends here) and the tokens that were learnt from (all ranks); returning ``False`` ends the update.
            begin: where it goes on after a restart; ``None`` for the start.

        Raises:
            NonFiniteError: a loss or gradient is NaN or infinite; the batch is dumped.
            InvariantError: the first step breaks an invariant.
        """
        for window in split_windows(experience, self.args, self.world, rollout_number, begin):
            local = Statistics()
            self._critic_step(window, local, global_step)
            train_actor = global_step >= self.args.critic_warmup_steps
            stop = self._actor_step(window, local, global_step) if train_actor else False
            stats = local.over_ranks(self.world)
            if window.first_pass and train_actor:
                self._check_ratios(stats)
            global_step += 1
            if not on_step(stats, None if stop else window.after, window.all_tokens) or stop:
                break

    def _micro_batches(self, mine: Experience) -> list[Experience]:
        """This rank's rows in micro batches; those without any response token teach nothing."""
        args = self.args
        groups = micro_batches(mine.rollout.lengths, args.per_device_train_batch_size, args.max_tokens_per_micro_batch)
        parts = [mine.select(group) for group in groups]
        return [part for part in parts if part.rollout.response_len.any()]

    def _critic_step(self, window: Window, stats: Statistics, global_step: int) -> None:
        args = self.args
        denominator = window.denominator("token")

        def loss_of(values: Tensor, part: Experience) -> tuple[Tensor, tuple[float, float, float]]:
            loss, clipped = value_loss(
                values,
                paddle.to_tensor(part.values),
                paddle.to_tensor(part.returns),
                paddle.to_tensor(part.mask),
                args.clip_range_value,
                denominator=denominator,
            )
            value, clip_count = _to_host(loss, clipped)
            self.finite.require(value, "critic loss", part, global_step)
            return loss * args.value_coeff, (value, clip_count, float(part.mask.sum()))

        parts = self._micro_batches(window.mine)
        for value, clipped, tokens in self.critic.train(parts, _rollout, loss_of):
            stats.add("train/reward_critic_loss", value * denominator, tokens)
            stats.add("train/value_clip_fraction", clipped, tokens)
        result = self.critic.engine.step()
        stats.set("train/reward_critic_lr", result.learning_rate)
        stats.set("train/reward_critic_grad_norm", result.grad_norm)
        if self.first_step is not None:
            self.first_step.after_step("critic", result.grad_norm)

    def _actor_step(self, window: Window, stats: Statistics, global_step: int) -> bool:
        """One optimizer step of the actor; returns whether the update is to stop because the policy moved too far."""
        engine = self.actor.engine
        tokens = float(window.mine.mask.sum()) if len(window.mine) else 0.0
        self._actor_backward(window, stats, global_step)
        if self._moved_too_far(stats, tokens):
            engine.clear_gradients()
            stats.set("train/early_stopped", 1.0)
            return True
        if self.ptx is not None:
            self._ptx_backward(window.rows, stats, global_step)
        result = engine.step()
        stats.set("train/actor_lr", result.learning_rate)
        stats.set("train/actor_grad_norm", result.grad_norm)
        if self.first_step is not None:
            self.first_step.after_step("actor", result.grad_norm)
        return False

    def _actor_backward(self, window: Window, stats: Statistics, global_step: int) -> None:
        args = self.args

        wants_ratios = self.guard.looks and self._log_ratios is not None and window.first_pass

        def loss_of(
            logprobs: Tensor, entropy: Tensor, part: Experience
        ) -> tuple[Tensor, tuple[Statistics, np.ndarray | None]]:
            mask = paddle.to_tensor(part.mask)
            result = policy_loss(
                logprobs,
                paddle.to_tensor(part.logprobs),
                paddle.to_tensor(part.advantages),
                mask,
                args.clip_range_ratio_low,
                args.clip_range_ratio_high,
                args.dual_clip,
                args.policy_loss_mean,
                window.denominator(args.policy_loss_mean),
            )
            loss, entropies = result.loss, (entropy * mask).sum()
            # one look at the device for all figures
            value, entropy_sum, clip_count, approx_kl, ratio, max_ratio, max_error = _to_host(
                loss, entropies, result.clip_fraction, result.approx_kl, result.ratio, result.max_ratio,
                result.max_ratio_error,
            )  # fmt: skip
            self.finite.require(value, "actor loss", part, global_step)
            if args.entropy_coeff:
                loss = loss - args.entropy_coeff * entropies / window.denominator("token")
            tokens, answers = float(part.mask.sum()), float((part.rollout.response_len > 0).sum())
            weight = tokens if args.policy_loss_mean == "token" else answers
            figures = Statistics()
            figures.add("train/actor_loss", value * window.denominator(args.policy_loss_mean), weight)
            figures.add("train/entropy", entropy_sum, tokens)
            figures.add("train/clip_fraction", clip_count, tokens)
            figures.add("train/approx_kl", approx_kl, tokens)
            figures.add("train/ratio_mean", ratio, tokens)
            figures.maximum("train/ratio_max", max_ratio)
            figures.maximum("train/ratio_error_max", max_error)
            ratios = (logprobs.detach().numpy() - part.logprobs)[part.mask > 0] if wants_ratios else None
            return loss, (figures, ratios)

        parts = self._micro_batches(window.mine)
        for figures, ratios in self.actor.train(parts, _rollout, loss_of, args.entropy_coeff != 0.0):
            stats.merge(figures)
            if ratios is not None and self._log_ratios is not None:
                self._log_ratios.append(ratios)

    def _check_ratios(self, stats: Statistics) -> None:
        """Behind the first optimizer step of a rollout: of the first rollout by its ratios, later by the mean KL."""
        if not self.guard.looks or "train/approx_kl" not in stats.sums:
            return
        first, temperature = self._log_ratios is not None, self.actor.temperature
        exact = first and self.args.critic_warmup_steps == 0  # with a warm-up, exact products end before this step
        precision = precision_of(self.actor.engine.dtype, on_cpu=runtime.is_cpu(), exact=exact)
        if self._log_ratios is None:
            check_later_pass(stats.result()["train/approx_kl"], precision, temperature, self.guard)
            return
        everyone = self.world.all_gather_object([part for part in self._log_ratios if part is not None])
        self._log_ratios = None
        ratios = [part for parts in everyone for part in parts]
        check_first_pass(np.concatenate(ratios) if ratios else np.zeros(0), precision, temperature, self.guard)

    def _moved_too_far(self, stats: Statistics, tokens: float) -> bool:
        if self.args.target_kl is None:
            return False
        total = self.world.sum(np.array([stats.sums.get("train/approx_kl", 0.0), tokens]))
        return bool(total[0] / max(1.0, total[1]) > EARLY_STOP_FACTOR * self.args.target_kl)

    def _ptx_backward(self, rows: int, stats: Statistics, global_step: int) -> None:
        assert self.ptx is not None
        window = self.ptx.take(rows, self.world)
        coefficient = self.args.ptx_coeff

        def loss_of(total: Tensor, count: int, batch: dict[str, np.ndarray]) -> tuple[Tensor, tuple[float, int]]:
            value = self.finite.require(float(total), "ptx loss", batch, global_step)
            return total / window.tokens * coefficient, (value, count)

        batches = [
            batch
            for batch in window.micro_batches(
                self.args.per_device_train_batch_size, self.args.max_tokens_per_micro_batch
            )
            if (batch["labels"][:, 1:] != -100).any()
        ]
        for value, count in self.actor.train_supervised(batches, loss_of):
            stats.add("train/ptx_loss", value, count)


def _to_host(*figures: Tensor) -> list[float]:
    """Scalars ``[]`` float32, brought over in one copy: each copy waits for the device."""
    return paddle.stack([figure.detach() for figure in figures]).tolist()


def _rollout(part: Experience) -> Rollout:
    return part.rollout
