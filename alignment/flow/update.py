"""A training call: passes over a batch in freshly shuffled windows, each trained role with its own optimizer.

A window is one optimizer step: ``per_device_train_batch_size * gradient_accumulation_steps`` rows of each data rank.
Its rows are drawn from all ranks' rows, its losses are normalised by its global counts, so the step is the same on any
number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from paddle import Tensor

from alignment import runtime
from alignment.engine.batching import micro_batches, rank_slice
from alignment.flow.invariants import FirstStepCheck, Guard, check_first_pass, check_later_pass, precision_of
from alignment.flow.method import Loss, RoleSpec, Train, Window, figures_of
from alignment.flow.nonfinite import FiniteCheck
from alignment.flow.ptx import PtxStream
from alignment.flow.statistics import Statistics
from alignment.losses.aggregation import row_weights
from alignment.parallel import World
from alignment.rollout.rollout import Rollout

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


def split_windows(
    batch: Rollout,
    args: Any,
    world: World,
    rollout_number: int,
    begin: Position | None = None,
    train: Train | None = None,
) -> Iterator[Window]:
    """Shuffle the rows anew for each of ``update_iters`` passes and cut them into windows.

    Args:
        batch: the rows of all ranks.
        args: ``update_iters``, ``per_device_train_batch_size``, ``gradient_accumulation_steps``, ``seed``.
        world: how many ranks share a window.
        rollout_number: makes each rollout's orders its own.
        begin: leave out what lies before; None for everything.
        train: may say other passes than ``update_iters``, and how token losses are aggregated.

    Yields:
        Windows; the last of a pass may be smaller, and a rank's share of it empty.
    """
    train = train or Train({})
    passes = args.update_iters if train.passes is None else train.passes
    takes_part = np.full(len(batch), passes) if train.takes_part is None else batch[train.takes_part]
    passes = min(passes, int(takes_part.max(initial=0)))
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps * world.size
    chosen_tokens, whole = batch.actions.sum(axis=1).astype(np.int64), batch.lengths
    begin = begin or Position()
    for number in range(begin.number, passes):
        order = np.random.default_rng([args.seed, 1, rollout_number, number]).permutation(len(batch))
        order = order[takes_part[order] > number]
        rows = len(order)
        for start in range(begin.rows if number == begin.number else 0, rows, size):
            chosen = order[start : start + size]
            after: Position | None = Position(number, start + size)
            if start + size >= rows:
                after = Position(number + 1) if number + 1 < passes else None
            mine, denominator = batch.select(rank_slice(chosen, world.rank, world.size)), None
            if train.aggregation is not None:
                # by all rows of the step, so that no weight depends on micro batches or ranks
                prompts = batch["prompt_index"][chosen]
                weighed = row_weights(train.aggregation, chosen_tokens[chosen], prompts, train.length_constant)
                weights = rank_slice(weighed.weights, world.rank, world.size)
                mine, denominator = mine.add(row_weights=weights.astype(np.float32)), weighed.denominator
            yield Window(
                mine=mine,
                tokens=int(chosen_tokens[chosen].sum()),
                answers=int((chosen_tokens[chosen] > 0).sum()),
                all_tokens=int(whole[chosen].sum()),
                rows=len(chosen),
                first_pass=number == 0 and start == 0,
                after=after,
                row_denominator=denominator,
            )


class Updater:
    """Trains the roles of a training call.

    Args:
        args: the method's arguments.
        world: the data ranks.
        train: the call's function.
        specs: the roles' descriptions by name.
        roles: the roles by name.
        ptx: supervised rows for the ptx loss of the policy, or None.
        decode: turns token ids into text, for the dump of a batch whose loss is not finite.
        guard: what a check that fails does.

    Attributes:
        first_step: checks the first optimizer step of each role; None where there is nothing (more) to check.
    """

    def __init__(
        self,
        args: Any,
        world: World,
        train: Train,
        specs: Mapping[str, RoleSpec],
        roles: Mapping[str, Any],
        ptx: PtxStream | None,
        decode: Callable[[list[int]], str],
        guard: Guard,
    ) -> None:
        self.args, self.world, self.train, self.specs, self.roles, self.ptx = args, world, train, specs, roles, ptx
        self.finite = FiniteCheck(args.output_dir, world.rank, decode)
        self.guard = guard
        self.first_step: FirstStepCheck | None = None
        self._log_ratios: list[np.ndarray] | None = []  # of the first step; None behind it

    def run(
        self,
        batch: Rollout,
        rollout_number: int,
        global_step: int,
        on_step: Callable[[Statistics, Position | None, int], bool],
        begin: Position | None = None,
    ) -> None:
        """Learn from one batch.

        Args:
            batch: the rows of all ranks.
            rollout_number: of this batch, for the orders.
            global_step: optimizer steps taken so far in the run.
            on_step: gets the statistics (over all ranks) of each optimizer step, where the update goes on (None: it
                ends here) and the tokens that were learnt from (all ranks); returning False ends the update.
            begin: where it goes on after a restart; None for the start.

        Raises:
            NonFiniteError: a loss or gradient is NaN or infinite; the batch is dumped.
            InvariantError: the first step breaks an invariant.
        """
        for window in split_windows(batch, self.args, self.world, rollout_number, begin, self.train):
            local, stop, checked = Statistics(), False, None
            for name, loss in self.train.losses.items():
                if global_step < self.specs[name].starts_at:
                    continue
                stop = self._step(name, loss, window, local, global_step) or stop
                if self.specs[name].kind == "policy":
                    checked = name
            stats = local.over_ranks(self.world)
            if window.first_pass and checked is not None:
                self._check_ratios(stats, checked)
            global_step += 1
            if not on_step(stats, None if stop else window.after, window.all_tokens) or stop:
                break

    def _micro_batches(self, mine: Rollout) -> list[Rollout]:
        """This rank's rows in micro batches; those without a token that the policy chose teach nothing."""
        args = self.args
        groups = micro_batches(mine.lengths, args.per_device_train_batch_size, args.max_tokens_per_micro_batch)
        parts = [mine.select(group) for group in groups]
        return [part for part in parts if part.chosen_len.any()]

    def _step(self, name: str, loss: Callable[..., Loss], window: Window, stats: Statistics, global_step: int) -> bool:
        """One optimizer step of a role; returns whether the update is to stop because the policy moved too far."""
        role, spec = self.roles[name], self.specs[name]
        policy = spec.kind == "policy"
        tokens = float(window.mine.actions.sum()) if len(window.mine) else 0.0
        self._backward(name, loss, window, stats, global_step)
        if policy and self._moved_too_far(stats, tokens):
            role.engine.clear_gradients()
            stats.set("train/early_stopped", 1.0)
            return True
        if policy and self.ptx is not None:
            self._ptx_backward(role, window.rows, stats, global_step)
        result = role.engine.step()
        stats.set(f"train/{spec.title}_lr", result.learning_rate)
        stats.set(f"train/{spec.title}_grad_norm", result.grad_norm)
        if self.first_step is not None:
            self.first_step.after_step(name, result.grad_norm)
        return False

    def _backward(
        self, name: str, loss: Callable[..., Loss], window: Window, stats: Statistics, global_step: int
    ) -> None:
        """Forward and backward of this rank's micro batches."""
        looks = self.specs[name].kind == "policy" and self.guard.looks and "logprobs" in window.mine
        wants_ratios = looks and self._log_ratios is not None and window.first_pass

        def loss_of(*outputs: Any) -> tuple[Tensor, tuple[Statistics, np.ndarray | None]]:
            part = outputs[-1]
            made = loss(*outputs, window)
            values, sums, maxima = figures_of(made)
            self.finite.require(values[0], f"{name} loss", part, global_step)
            figures = Statistics()
            for metric, value in zip(sums, values[1:], strict=False):
                _, weight, *divided = made.sums[metric]
                figures.add(metric, value * divided[0] if divided else value, weight)
            for metric, value in zip(maxima, values[1 + len(sums) :], strict=True):
                figures.maximum(metric, value)
            ratios = (outputs[0].detach().numpy() - part["logprobs"])[part.actions > 0] if wants_ratios else None
            return made.total, (figures, ratios)

        for figures, ratios in self.roles[name].train(self._micro_batches(window.mine), loss_of):
            stats.merge(figures)
            if ratios is not None and self._log_ratios is not None:
                self._log_ratios.append(ratios)

    def _check_ratios(self, stats: Statistics, name: str) -> None:
        """Behind the first optimizer step of a rollout: of the first rollout by its ratios, later by the mean KL."""
        if not self.guard.looks or not stats.weights.get("train/approx_kl"):
            return  # there is no token in it to look at
        role = self.roles[name]
        first, temperature = self._log_ratios is not None, role.temperature
        exact = first and self.specs[name].starts_at == 0  # with a warm-up, exact products end before this step
        precision = precision_of(role.engine.dtype, on_cpu=runtime.is_cpu(), exact=exact)
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

    def _ptx_backward(self, policy: Any, rows: int, stats: Statistics, global_step: int) -> None:
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
        for value, count in policy.train_supervised(batches, loss_of):
            stats.add("train/ptx_loss", value, count)
