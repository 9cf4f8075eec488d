"""The one loop: an iteration of the method's flow, over and over, with what is due around it.

    until the planned optimizer steps are done:
        rows of the feed -> the flow's calls -> windows -> optimizer steps      resume begins at any of them
        metrics, evaluation, best model, checkpoint, interruption               as the strategies say

What an iteration is, a :class:`~alignment.flow.method.Method` says; the loop knows no algorithm.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from alignment.errors import AlignmentError
from alignment.flow.best import best_metric, is_better
from alignment.flow.checkpoint import CheckpointStore
from alignment.flow.flow import Call, PhaseTimer
from alignment.flow.halfway import HalfUsed, load_half_used
from alignment.flow.interrupt import EXIT_INTERRUPTED, Interrupt, resume_command
from alignment.flow.invariants import FirstStepCheck, Guard
from alignment.flow.method import Method
from alignment.flow.metrics import MetricWriter
from alignment.flow.output import on_main, publishing
from alignment.flow.ptx import PtxStream
from alignment.flow.resume import save_arguments
from alignment.flow.state import LoopState, load_state, load_weights, read_state, save_state
from alignment.flow.statistics import Statistics
from alignment.flow.update import Position
from alignment.log import get_logger
from alignment.parallel import World
from alignment.parallel.offload import Residency
from alignment.rollout.rollout import Rollout


@dataclass
class Given:
    """What a method that answers prompts is given besides its roles.

    Attributes:
        generator: generates with the actor (:class:`~alignment.rollout.layouts.RolloutEngine`).
        scores: scores of a rollout, by what they are: ``"reward"``.
        eval_prompts: prompts for evaluation; may be empty.
        running_normalization: whether scores are normalised by their running mean and standard deviation.
        decode: token ids to text.
        extras: further things by name.
    """

    generator: Any = None
    scores: Mapping[str, Callable[[Rollout], Any]] = field(default_factory=dict)
    eval_prompts: Sequence[Any] = ()
    running_normalization: bool = False
    decode: Callable[[list[int]], str] = str
    extras: dict[str, Any] = field(default_factory=dict)


class Loop:
    """Runs a method.

    Args:
        method: the algorithm.
        world: the processes of the run.
        roles: the models by the role's name; those that the run does not have are missing.
        feed: gives the rows of an iteration (:mod:`alignment.flow.feeds`).
        sizes: derived sizes.
        save_extras: writes tokenizer and template into a model's folder.
        argv: the command's arguments, to say how to resume.
        given: what the method needs besides.
        ptx: supervised rows for a ptx loss, or None.
        residency: what offloads; None: everything stays in memory.
    """

    def __init__(
        self,
        method: Method,
        world: World,
        roles: Mapping[str, Any],
        feed: Any,
        sizes: Any,
        save_extras: Callable[[Path], None],
        argv: list[str],
        given: Given,
        ptx: PtxStream | None = None,
        residency: Residency | None = None,
    ) -> None:
        self.method, self.args, self.world, self.roles = method, method.args, world, dict(roles)
        self.feed, self.sizes, self.save_extras, self.argv = feed, sizes, save_extras, argv
        self.given, self.ptx, self.residency = given, ptx, residency
        self.specs = {spec.name: spec for spec in method.roles()}
        self.flow = method.checked_flow()
        args = self.args
        self.state, self.pending, self.figures = LoopState(), Statistics(), Statistics()
        self.rows: list[tuple[int, Statistics]] = []
        self.timer, self.tokens = PhaseTimer(), 0
        self.evaluated_at = self.saved_at = -1
        self.interrupt, self.guard = Interrupt(), Guard(args.checks, world.is_main)
        self.half_used: HalfUsed | None = None
        self.resumed_from: Path | None = None
        self.first_step, self.begin, self.update_began = 0, None, 0.0
        self.store = CheckpointStore(args.output_dir, args.save_total_limit)
        trains = [call for call in self.flow.calls if call.kind == "train" and args.do_train]
        self.updaters = {call.name: method.updater(self, call) for call in trains}

    @property
    def changing(self) -> dict[str, Any]:
        """The engines whose weights change, by the folder that a checkpoint has them in."""
        there = {name: spec.folder for name, spec in self.specs.items() if spec.folder and name in self.roles}
        return {folder: self.roles[name].engine for name, folder in there.items()}

    @property
    def optimizers(self) -> dict[str, Any]:
        """The engines that are trained, by the name of their optimizer's file in a checkpoint."""
        trained = {spec.name: spec for spec in self.specs.values() if spec.trained and spec.name in self.roles}
        return {
            spec.optimizer_file: self.roles[name].engine
            for name, spec in trained.items()
            if self.roles[name].engine.trainable
        }

    # -- the loop

    def train(self, resume_path: Path | None = None) -> int:
        """Run until the planned number of optimizer steps.

        Args:
            resume_path: a verified checkpoint to go on from.

        Returns:
            The exit code: 0, or 130 after Ctrl-C, with a checkpoint saved.
        """
        try:
            return self._train(resume_path)
        finally:
            if self.residency is not None:
                self.residency.close()

    def _train(self, resume_path: Path | None) -> int:
        if resume_path is not None:
            self._resume(resume_path)
        self._enter("weights")
        for engine in self.changing.values():
            engine.check_same_on_all_ranks()
        self._begin()
        try:
            with self.interrupt:
                if not self.args.do_train or (self.state.global_step == 0 and self.args.eval_on_start):
                    self._evaluate()
                while self.args.do_train and self._goes_on():
                    self.iterate()
                    if self.world.any(self.interrupt.requested):
                        return self._stop_early()
                if self.args.do_train:
                    self._finish()
                self.method.finished(self._final_metrics)
        finally:
            self.writer.close()
        return 0

    def iterate(self) -> None:
        """One iteration of the flow, or what is left of it after a restart, then evaluation and checkpoint when due.
        When the run is interrupted in the middle of the update, the rest is left in ``half_used``.
        """
        half, self.half_used = self.half_used, None
        before = self.first_step = self.state.global_step if half is None else half.first_step
        self.begin = None if half is None else half.position
        if half is None:
            self.figures = Statistics()
            values, first = {self.feed.input: self.feed.next()}, None
        else:
            first = half.call
            values = {self.flow[first].needs[0]: half.batch}
            self.figures, self.rows = half.figures, half.rows
        with self.method.before_iteration():
            self.flow.run(
                values,
                self.roles,
                self.world,
                self.timer,
                train=self._update,
                goes_on=lambda: self.half_used is None,
                on_call=lambda call: self._enter(call.name),
                on_values=self._note_figures,
                first=first,
                step=before,
                of_all_ranks=self.feed.of_all_ranks,
            )
        if self.half_used is not None:
            return
        self.state.rollouts += 1
        self._write_rows_and_the_last()
        due = self._due(self.args.evaluation_strategy, self.args.eval_steps, before) or not self._goes_on()
        improved = due and self._improves()
        ended = not self._goes_on()
        if ended:  # perhaps by early_stopping_patience just now
            self._write_rows_and_the_last()
        # the best model must be on the disk to be loaded at the end, whether or not a save is due
        keep_best = improved and self.args.load_best_model_at_end
        # checkpoints of steps inside the update are there already; the last one is made when all is evaluated and
        # written, so that a run that is killed behind it does neither again
        due = self._due(self.args.save_strategy, self.args.save_steps, self.state.global_step - 1)
        if keep_best or due or (ended and self.args.save_strategy != "no"):
            self.save_checkpoint(best=improved)

    def _note_figures(self, given: Mapping[str, Any]) -> None:
        """Take the figures that a call has given: they go into every row of this iteration."""
        for value in given.values():
            if isinstance(value, Statistics):
                self.figures.merge(value)

    def _enter(self, phase: str) -> None:
        """Say which call of the flow, or what of what lies between its iterations, begins, and make resident what it
        needs.
        """
        self.world.phase(phase, self.state.global_step)
        if self.residency is not None:
            self.residency.enter(phase)

    def _goes_on(self) -> bool:
        # An update that stops early takes fewer steps than planned: then the prompts, not the steps, end the run.
        more_rows = self.args.max_steps > 0 or not self.feed.exhausted(self.state.rollouts)
        return self.state.global_step < self.sizes.total_steps and more_rows and not self.state.stopped

    def _update(self, call: Call, batch: Rollout) -> None:
        """Run a training call."""
        self.update_began = time.perf_counter()
        on_step = functools.partial(self._after_step, call, batch)
        self.updaters[call.name].run(batch, self.state.rollouts, self.state.global_step, on_step, self.begin)

    def _after_step(self, call: Call, batch: Rollout, stats: Statistics, after: Position | None, tokens: int) -> bool:
        """Take in one optimizer step's figures, and save when due; returns whether the update goes on."""
        self.state.global_step += 1
        self.timer.count_tokens(call.name, float(tokens))
        step = self.state.global_step
        self.pending.merge(self.figures)
        self.pending.merge(stats)
        updater = self.updaters[call.name]
        if updater.first_step is not None and updater.first_step.done:
            updater.first_step.frozen_tensors()
            updater.first_step = None
        self.writer.advance(step, tokens=self.tokens)
        self.tokens = 0
        if step % self.args.logging_steps == 0 or step >= self.sizes.total_steps:
            self.rows.append((step, self.pending))
            self.pending = Statistics()
        if step >= self.sizes.total_steps:
            return False
        if after is None:
            return True  # what is due is done behind the update
        half = HalfUsed(batch, after, self.first_step, self.figures, self.rows, call.name)
        if self.args.save_strategy == "steps" and step % self.args.save_steps == 0:
            self._save_in_update(half)
        if self.world.any(self.interrupt.requested):
            self.half_used = half
            return False
        return True

    def _save_in_update(self, half: HalfUsed) -> None:
        """Save between two optimizer steps of one update, without counting the time as the update's."""
        started = time.perf_counter()
        self.timer.add(half.call, started - self.update_began)
        self.save_checkpoint(half_used=half)
        self._enter(half.call)
        # the flow adds the whole call's time at its end
        self.timer.add(half.call, self.update_began - time.perf_counter())

    def _write_rows_and_the_last(self) -> None:
        """Write the iteration's rows, and behind the last one also figures that are no multiple of ``logging_steps``
        away, where the data or ``early_stopping_patience`` have ended the run.
        """
        if not self._goes_on() and self.pending != Statistics():
            self.rows.append((self.state.global_step, self.pending))
            self.pending = Statistics()
        self._write_rows()

    def _write_rows(self) -> None:
        """Write the iteration's rows now that its update has been timed; the timings go into the last one."""
        for number, (step, stats) in enumerate(self.rows, 1):
            values = self.method.row(stats, step)
            if number == len(self.rows):
                values.update(self.method.drain(self.timer))
                values.update(self.residency.drain() if self.residency is not None else {})
            self.writer.log(step, values, epoch=self.feed.epoch)
        self.rows = []

    # -- around the loop

    def _begin(self) -> None:
        self.writer = MetricWriter(
            self.args.output_dir,
            self.args,
            self.world,
            self.sizes.total_steps,
            start_step=self.state.global_step,
            last_row=self.half_used.first_step if self.half_used is not None else None,
            bar_keys=self.method.bar,
        )
        self.method.begin(self)
        self.writer.advance(self.state.global_step)
        if self.state.method:
            self.method.load_state(self.state.method)
        if self.resumed_from is not None:
            self.method.load_files(self.resumed_from / "trainer")
        if self.state.global_step == 0 and self.updaters and self.guard.looks and not getattr(self.args, "lora", False):
            moved = {average.target for call in self.flow.calls for average in call.after}
            engines = {name: role.engine for name, role in self.roles.items() if name not in moved}
            using = {"using": self.residency.using} if self.residency is not None else {}
            check = FirstStepCheck(engines, self.guard, **using)
            for updater in self.updaters.values():
                updater.first_step = check

    def _due(self, strategy: str, every: int, before: int) -> bool:
        """Whether a boundary lies between ``before`` and now. Evaluating happens between iterations, saving also inside
        an update (:meth:`_after_step`).
        """
        now = self.state.global_step
        if strategy == "steps":
            return now // every > before // every
        return strategy == "epoch" and self.feed.epoch_ended

    def _improves(self) -> bool:
        """Evaluate, and say whether this is the best model so far."""
        values = self._evaluate()
        if not values:
            return False
        name, value = best_metric(self.args, {key.removeprefix("eval/"): number for key, number in values.items()})
        if not is_better(self.args, value, self.state.best_value):
            self._lose_patience(name, value)
            return False
        self.state.best_value, self.state.best_step = value, self.state.global_step
        self.state.without_improvement, self.state.best_metrics = 0, dict(values)
        return True

    def _lose_patience(self, name: str, value: float) -> None:
        """Count an evaluation that was no better; end the run when there were ``early_stopping_patience`` of them."""
        self.state.without_improvement += 1
        patience = self.args.early_stopping_patience
        if patience is None or self.state.without_improvement < patience or self.state.stopped:
            return
        self.state.stopped = True
        if self.world.is_main:
            get_logger().warning(
                "early_stopping_patience: %s has not improved for %d evaluations (now %.6g, best %.6g at step %d); the "
                "run ends at step %d of %d",
                name, patience, value, self.state.best_value, self.state.best_step, self.state.global_step,
                self.sizes.total_steps,
            )  # fmt: skip

    def _evaluate(self) -> dict[str, float]:
        if not self.args.do_eval or not self.method.evaluates or self.evaluated_at == self.state.global_step:
            return {}
        self.evaluated_at = self.state.global_step
        started = time.monotonic()
        self._enter("evaluation")
        with self._awake("evaluation"):
            values = self.method.evaluate(self.state.global_step)
        seconds = time.monotonic() - started
        self.writer.pause(seconds)
        self.state.eval_metrics, step, method = dict(values), self.state.global_step, self.method
        row = {**values, method.runtime_metric: seconds}
        self.writer.log(step, row, epoch=self.feed.epoch, echo=method.echoes_evaluation)
        method.tell_evaluation(step, values)
        return values

    def _awake(self, phase: str) -> contextlib.ExitStack:
        """The parameters of the roles of something between iterations, whole (sharding stage 3 lets them rest)."""
        stack = contextlib.ExitStack()
        for name, role in self.roles.items():
            if name in self.method.between()[phase]:
                stack.enter_context(role.engine.awake() if self.method.base == "online" else role.engine.in_passes())
        return stack

    def save_checkpoint(self, best: bool = False, half_used: HalfUsed | None = None) -> None:
        """Write ``checkpoint-N``.

        Args:
            best: whether it is the best one so far, which is never pruned.
            half_used: the rows in work, in the middle of their update; the timer has its seconds so far.
        """
        self.state.position = self.feed.position
        self.state.ptx_position = self.ptx.stream.position if self.ptx else 0
        self.state.method = self.method.state()
        self.state.evaluated_at, self.state.pending = self.evaluated_at, self.pending.to_json()
        self.state.timer = asdict(self.timer)
        self.state.rng = {"kind": "counter", "seed": self.args.seed}
        began = time.monotonic()
        self._enter("checkpoint")
        with on_main(self.world, lambda: self.store.writing(self.state.global_step, best=best)) as folder:
            save_state(folder, self.state, self.changing, self.optimizers, self.save_extras, half_used)
            if self.world.is_main:
                save_arguments(folder, self.args, self.world)
                self.method.save_files(folder / "trainer")
        self.world.barrier()
        self.saved_at = self.state.global_step
        self.writer.pause(time.monotonic() - began)

    def _resume(self, path: Path) -> None:
        self.resumed_from = path
        self._enter("checkpoint")
        if self.args.do_train:
            self.state = load_state(path, self.changing, self.optimizers)
        else:  # whatever was evaluated there before, this run was started to evaluate
            self.state = replace(read_state(path), evaluated_at=-1)
            load_weights(path, self.changing)
        self.feed.position = self.state.position
        if self.ptx is not None:
            self.ptx.stream.position = self.state.ptx_position
        if self.world.is_main:
            self.store.remember_best(self.state.best_step)
        self.half_used = load_half_used(path / "trainer") if self.args.do_train else None
        self.pending, self.timer = Statistics.from_json(self.state.pending), PhaseTimer(**self.state.timer)
        self.evaluated_at, self.saved_at = self.state.evaluated_at, self.state.global_step
        where = ", in the middle of an update" if self.half_used is not None else ""
        get_logger().info("resumed from %s (optimizer step %d%s)", path, self.state.global_step, where)
        if self.state.global_step > self.sizes.total_steps:
            raise AlignmentError(
                f"{path} is at optimizer step {self.state.global_step}, beyond the {self.sizes.total_steps} of this "
                f"run: raise num_train_epochs or max_steps, or choose an earlier checkpoint"
            )

    def _stop_early(self) -> int:
        if self.saved_at != self.state.global_step:
            self.save_checkpoint(half_used=self.half_used)
        self._write_rows()  # those of an unfinished update; a resumed run writes them again
        command = resume_command(self.argv, world_size=self.world.processes, overwrites=self.args.overwrite_output_dir)
        step = self.state.global_step
        get_logger().warning("stopped at step %d; saved %s; go on with:\n  %s", step, self.store.path(step), command)
        return EXIT_INTERRUPTED

    @property
    def _final_metrics(self) -> dict[str, float]:
        """Of the evaluation of the model that the run ends with."""
        best = self.args.load_best_model_at_end and self.args.do_train and self.state.best_step >= 0
        return self.state.best_metrics if best else self.state.eval_metrics

    def _finish(self) -> None:
        """The last evaluation and checkpoint, then the trained models in ``output_dir``."""
        self._write_rows_and_the_last()  # of a run that was resumed where it was to end
        improved = self._improves()
        keep_best = improved and self.args.load_best_model_at_end
        if self.saved_at != self.state.global_step and (keep_best or self.args.save_strategy != "no"):
            self.save_checkpoint(best=improved)
        self._enter("weights")
        if self.args.load_best_model_at_end and self.state.best_step not in (-1, self.state.global_step):
            best = self.store.path(self.state.best_step)
            get_logger().info("the best model is that of step %d; loading %s", self.state.best_step, best)
            load_weights(best, self.changing)
        results = {name: engine for name, engine in self.changing.items() if engine.trainable}
        for name, engine in results.items():
            with on_main(self.world, lambda name=name: publishing(Path(self.args.output_dir) / name)) as target:
                engine.save_weights(target)
                if self.world.is_main:
                    self.save_extras(target)
        self.world.barrier()
        names = {
            "policy": "the policy",
            "value": "the value model",
            "cost_value": "the cost critic",
            ".": "the final model",
        }
        places = [f"{names.get(name, name)} is in {Path(self.args.output_dir) / name}" for name in results]
        get_logger().info("%s", ", ".join(places))
