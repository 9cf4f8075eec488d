"""PPO's loop: prompts -> answers -> scores -> advantages -> update, over and over, with metrics, evaluation and
checkpoints.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from alignment.arguments import Sizes
from alignment.engine.engine import Engine
from alignment.errors import AlignmentError
from alignment.flow.best import best_metric, is_better
from alignment.flow.checkpoint import CheckpointStore
from alignment.flow.evaluation import Evaluator
from alignment.flow.flow import PPO_ITERATION, PhaseTimer
from alignment.flow.halfway import HalfUsed, load_half_used
from alignment.flow.interrupt import EXIT_INTERRUPTED, Interrupt, resume_command
from alignment.flow.invariants import FirstStepCheck
from alignment.flow.metrics import MetricWriter
from alignment.flow.order import rank_slice
from alignment.flow.output import on_main, publishing
from alignment.flow.ptx import PtxStream
from alignment.flow.resume import save_arguments
from alignment.flow.state import PPOState, load_state, read_state, save_state
from alignment.flow.statistics import Statistics
from alignment.flow.streams import IndexStream
from alignment.log import get_logger
from alignment.losses.advantages import RunningMoments
from alignment.losses.kl import AdaptiveKLController, FixedKLController
from alignment.parallel import World
from alignment.parallel.offload import Residency
from alignment.ppo.phases import Roles, RolloutPhases
from alignment.ppo.update import Position, PPOUpdater
from alignment.rollout.generate import GenerationPrompt
from alignment.rollout.layouts import RolloutEngine
from alignment.rollout.rewards import RewardResult
from alignment.rollout.rollout import Experience, Rollout
from alignment.rollout.sampler import SamplingSettings

# Evaluation draws from a stream of its own, the same at every evaluation.
EVALUATION_SEED_OFFSET = 0x5EED
BAR_KEYS = ("train/reward", "train/kl_divergence", "train/actor_loss", "train/reward_critic_loss")


class PPOTrainer:
    """Runs PPO.

    Args:
        args: the PPO arguments.
        world: the data ranks.
        roles: the models.
        score: rewards of a rollout.
        generator: generates with the actor.
        train_prompts: a prompt-only data set.
        eval_prompts: prompts for evaluation; may be empty.
        ptx_dataset: supervised rows, or ``None``.
        sizes: derived sizes.
        save_extras: writes tokenizer and template into a model's folder.
        argv: the command's arguments, to say how to resume.
        running_normalization: normalise scores by their running mean and standard deviation.
        residency: what offloads; ``None``: everything stays in memory.
    """

    def __init__(
        self,
        args: Any,
        world: World,
        roles: Roles,
        score: Callable[[Rollout], RewardResult],
        generator: RolloutEngine,
        train_prompts: Any,
        eval_prompts: Sequence[GenerationPrompt],
        ptx_dataset: Any | None,
        sizes: Sizes,
        save_extras: Callable[[Path], None],
        argv: list[str],
        running_normalization: bool = False,
        residency: Residency | None = None,
    ) -> None:
        self.args, self.world, self.roles, self.score, self.sizes = args, world, roles, score, sizes
        self.generator, self.train_prompts, self.save_extras, self.argv = generator, train_prompts, save_extras, argv
        self.residency = residency
        self.state, self.pending, self.rows = PPOState(), Statistics(), []
        self.evaluated_at = self.saved_at = -1
        self.evaluation_bytes = 0
        self.interrupt = Interrupt()
        self.half_used: HalfUsed | None = None
        self.first_step, self.begin, self.update_began = 0, None, 0.0
        self.kl_controller: FixedKLController = (
            AdaptiveKLController(args.kl_coeff, args.kl_target, args.kl_horizon)
            if args.adaptive_kl
            else FixedKLController(args.kl_coeff)
        )
        self.moments = RunningMoments() if running_normalization else None
        self.prompt_stream = IndexStream(len(train_prompts), args.seed, shuffle=args.shuffle)
        pad_id = generator.pad_id
        self.ptx: PtxStream | None = None
        if ptx_dataset is not None:
            self.ptx = PtxStream(ptx_dataset, args.seed + 1, pad_id, args.shuffle)
        self.updater: PPOUpdater | None = None
        self.store = CheckpointStore(args.output_dir, args.save_total_limit)
        self.sampling = SamplingSettings(
            max_new_tokens=args.max_dec_len,
            min_new_tokens=args.min_dec_len,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            repetition_penalty=args.repetition_penalty,
            seed=args.seed,
            stop=tuple(args.stop_strings or ()),
        )
        self.eval_prompts = list(eval_prompts)
        self.phases = RolloutPhases(
            args, world, roles, score, generator, self.sampling, self.kl_controller, self.moments
        )
        self.functions: dict[str, Callable[..., Any]] = {}
        if roles.critic is not None:
            decode, guard = generator.tokenizer.decode, self.phases.guard
            self.updater = PPOUpdater(args, world, roles.actor, roles.critic, self.ptx, decode, guard)
            self.functions = {
                **self.phases.functions(),
                "update": self.phases.awake(("actor", "critic"), self._update, whole=False),
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
        for role in (self.roles.actor, self.roles.critic):
            if role is not None:
                role.engine.check_same_on_all_ranks()
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
        finally:
            self.writer.close()
        return 0

    def iterate(self) -> None:
        """One iteration of the dataflow, or what is left of it after a restart, then evaluation and checkpoint when
        due. When the run is interrupted in the middle of the update, the rest is left in ``half_used``.
        """
        half, self.half_used, self.evaluation_bytes = self.half_used, None, 0
        before = self.first_step = self.state.global_step if half is None else half.first_step
        self.begin = None if half is None else half.position
        self.phases.kl_adapts = before >= self.args.critic_warmup_steps
        if half is None:
            values, first = {"prompts": self._next_prompts()}, None
        else:
            values, first = {"experience": half.experience}, "update"
            self.phases.stats, self.rows = half.rollout_stats, half.rows
        with self.phases.exactly():
            PPO_ITERATION.run(self.functions, values, self.phases.timer, lambda call: self._enter(call.name), first)
        if self.half_used is not None:
            return
        self.state.rollouts += 1
        if not self._goes_on() and self.pending != Statistics():
            # prompts, not steps, have ended the run: its last figures are no multiple of logging_steps away
            self.rows.append((self.state.global_step, self.pending))
            self.pending = Statistics()
        self._write_rows()
        improved = self._due(self.args.evaluation_strategy, self.args.eval_steps, before) and self._improves()
        # the best model must be on the disk to be loaded at the end, whether or not a save is due
        keep_best = improved and self.args.load_best_model_at_end
        # checkpoints of steps inside the update are there already
        if keep_best or self._due(self.args.save_strategy, self.args.save_steps, self.state.global_step - 1):
            self.save_checkpoint(best=improved)

    def _enter(self, phase: str) -> None:
        """Say which phase of the dataflow, or of what lies between its iterations, begins, and make resident what it
        needs.
        """
        self.world.phase(phase, self.state.global_step)
        if self.residency is not None:
            self.residency.enter(phase)

    def _goes_on(self) -> bool:
        # An update that stops early takes fewer steps than planned: then the prompts, not the steps, end the run.
        more_prompts = self.args.max_steps > 0 or self.state.rollouts < self.sizes.rollouts
        return self.state.global_step < self.sizes.total_steps and more_prompts

    def _next_prompts(self) -> list[GenerationPrompt]:
        """This rank's share of the next global batch of prompts."""
        count = self.sizes.prompts_per_rollout
        first = self.prompt_stream.position
        if self.prompt_stream.left_in_epoch < count:
            if self.args.dataloader_drop_last and first % self.prompt_stream.rows != 0:
                self.prompt_stream.skip_epoch_rest()
                first = self.prompt_stream.position
            else:
                count = self.prompt_stream.left_in_epoch
        rows = self.prompt_stream.take(count)
        share = rank_slice(np.arange(len(rows)), self.world.rank, self.world.size)
        return [as_prompt(self.train_prompts[rows[i]], first + int(i)) for i in share]

    def _update(self, experience: Experience) -> None:
        assert self.updater is not None
        self.update_began = time.perf_counter()
        on_step = functools.partial(self._after_step, experience)
        self.updater.run(experience, self.state.rollouts, self.state.global_step, on_step, self.begin)

    def _after_step(self, experience: Experience, stats: Statistics, after: Position | None, tokens: int) -> bool:
        """Take in one optimizer step's figures, and save when due; returns whether the update goes on."""
        assert self.updater is not None
        self.state.global_step += 1
        self.phases.timer.count_tokens("update", float(tokens))
        step = self.state.global_step
        self.pending.merge(self.phases.stats)
        self.pending.merge(stats)
        first_step = self.updater.first_step
        if first_step is not None and first_step.done:
            first_step.frozen_tensors()
            self.updater.first_step = None
        self.writer.advance(step, tokens=self.phases.tokens)
        self.phases.tokens = 0
        if step % self.args.logging_steps == 0 or step >= self.sizes.total_steps:
            self.rows.append((step, self.pending))
            self.pending = Statistics()
        if step >= self.sizes.total_steps:
            return False
        if after is None:
            return True  # what is due is done behind the update
        half = HalfUsed(experience, after, self.first_step, self.phases.stats, self.rows)
        if self.args.save_strategy == "steps" and step % self.args.save_steps == 0:
            self._save_in_update(half)
        if self.world.any(self.interrupt.requested):
            self.half_used = half
            return False
        return True

    def _save_in_update(self, half: HalfUsed) -> None:
        """Save between two optimizer steps of one update, without counting the time as the update's."""
        started = time.perf_counter()
        self.phases.timer.add("update", started - self.update_began)
        self.save_checkpoint(half_used=half)
        self._enter("update")
        # the dataflow adds the whole call's time at its end
        self.phases.timer.add("update", self.update_began - time.perf_counter())

    def _write_rows(self) -> None:
        """Write the iteration's rows now that its update has been timed; the timings go into the last one."""
        for number, (step, stats) in enumerate(self.rows, 1):
            values: dict[str, float] = {**stats.result(), "global_step": step}
            if number == len(self.rows):
                values.update(self.phases.timer.drain())
                if self.generator.resharder is not None:
                    values["reshard/bytes"], self.phases.reshard_bytes = float(self.phases.reshard_bytes), 0
                values.update(self.residency.drain() if self.residency is not None else {})
            self.writer.log(step, values, epoch=self._epoch())
        self.rows = []

    def _epoch(self) -> float:
        return self.prompt_stream.position / self.prompt_stream.rows

    # -- around the loop

    def _begin(self) -> None:
        self.writer = MetricWriter(
            self.args.output_dir,
            self.args,
            self.world,
            self.sizes.total_steps,
            start_step=self.state.global_step,
            last_row=self.half_used.first_step if self.half_used is not None else None,
            bar_keys=BAR_KEYS,
        )
        self.writer.advance(self.state.global_step)
        self.evaluator = Evaluator(
            self.eval_prompts,
            functools.partial(self.generator.generate, batch_size=self.args.per_device_eval_batch_size),
            self._evaluation_modes(),
            self.score,
            self.world,
            self.args.output_dir,
            self.args.sample_table_rows,
            self.writer.write,
        )
        self.evaluator.drop_after(self.state.global_step or -1)
        if self.state.global_step == 0 and self.updater is not None and self.phases.guard.looks:
            roles = {name: getattr(self.roles, name) for name in ("actor", "critic", "reference", "reward")}
            engines = {name: role.engine for name, role in roles.items() if role is not None}
            using = {"using": self.residency.using} if self.residency is not None else {}
            self.updater.first_step = FirstStepCheck(engines, self.phases.guard, **using)

    def _evaluation_modes(self) -> dict[str, SamplingSettings]:
        base, temperature = (
            replace(self.sampling, seed=self.args.seed + EVALUATION_SEED_OFFSET),
            self.args.eval_temperature,
        )
        modes = {"sampled": replace(base, temperature=temperature)} if temperature > 0 else {}
        return {**modes, "greedy": base.as_greedy()}

    def _due(self, strategy: str, every: int, before: int) -> bool:
        """Whether a boundary lies between ``before`` and now. Evaluating happens between rollouts, saving also inside
        an update (:meth:`_after_step`).
        """
        now = self.state.global_step
        if strategy == "steps":
            return now // every > before // every
        if strategy == "epoch":
            left = self.prompt_stream.left_in_epoch
            dropped = self.args.dataloader_drop_last and left < self.sizes.prompts_per_rollout
            return left == self.prompt_stream.rows or dropped
        return False

    def _improves(self) -> bool:
        """Evaluate, and say whether this is the best model so far."""
        values = self._evaluate()
        if not values:
            return False
        name, value = best_metric(self.args, {key.removeprefix("eval/"): number for key, number in values.items()})
        if not is_better(self.args, name, value, self.state.best_value):
            return False
        self.state.best_value, self.state.best_step = value, self.state.global_step
        return True

    def _evaluate(self) -> dict[str, float]:
        if not self.args.do_eval or not self.eval_prompts or self.evaluated_at == self.state.global_step:
            return {}
        self.evaluated_at = self.state.global_step
        started = time.monotonic()
        self._enter("evaluation")
        self.evaluation_bytes = self.phases.awake(("actor",), self.phases.refresh)()
        values = self.phases.awake(("actor", "reward"), self.evaluator.run)(self.state.global_step)
        seconds = time.monotonic() - started
        self.writer.pause(seconds)
        self.writer.log(self.state.global_step, {**values, "eval/runtime_seconds": seconds}, epoch=self._epoch())
        return values

    def save_checkpoint(self, best: bool = False, half_used: HalfUsed | None = None) -> None:
        """Write ``checkpoint-N``.

        Args:
            best: whether it is the best one so far, which is never pruned.
            half_used: the rollout in work, in the middle of its update; the timer has its seconds so far.
        """
        self.state.prompt_position = self.prompt_stream.position
        self.state.ptx_position = self.ptx.stream.position if self.ptx else 0
        self.state.kl_controller = self.kl_controller.state_dict()
        self.state.reward_moments = self.moments.state_dict() if self.moments else {}
        self.state.evaluated_at, self.state.pending = self.evaluated_at, asdict(self.pending)
        self.state.timer = asdict(self.phases.timer)
        # what the evaluation has moved since the update is moved again after a restart
        self.state.reshard_bytes = self.phases.reshard_bytes - self.evaluation_bytes
        self.state.rng = {"kind": "counter", "seed": self.args.seed}
        self._enter("checkpoint")
        with on_main(self.world, lambda: self.store.writing(self.state.global_step, best=best)) as folder:
            engines = self._trained
            save_state(folder, self.state, *engines, self.save_extras, half_used)
            if self.world.is_main:
                save_arguments(folder, self.args, self.world)
        self.world.barrier()
        self.saved_at = self.state.global_step

    def _resume(self, path: Path) -> None:
        self._enter("checkpoint")
        if self.args.do_train:
            self.state = load_state(path, *self._trained)
        else:  # whatever was evaluated there before, this run was started to evaluate
            self.state = replace(read_state(path), evaluated_at=-1)
            self.roles.actor.engine.load_weights(path / "policy")
        self.prompt_stream.position = self.state.prompt_position
        if self.ptx is not None:
            self.ptx.stream.position = self.state.ptx_position
        self.kl_controller.load_state_dict(self.state.kl_controller)
        if self.moments is not None and self.state.reward_moments:
            self.moments.load_state_dict(self.state.reward_moments)
        if self.world.is_main:
            self.store.remember_best(self.state.best_step)
        self.half_used = load_half_used(path / "trainer") if self.args.do_train else None
        self.pending, self.phases.timer = Statistics(**self.state.pending), PhaseTimer(**self.state.timer)
        self.phases.reshard_bytes, self.evaluated_at = self.state.reshard_bytes, self.state.evaluated_at
        self.saved_at = self.state.global_step
        where = ", in the middle of an update" if self.half_used is not None else ""
        get_logger().info("resumed from %s (optimizer step %d%s)", path, self.state.global_step, where)
        if self.state.global_step > self.sizes.total_steps:
            raise AlignmentError(
                f"{path} is at optimizer step {self.state.global_step}, beyond the {self.sizes.total_steps} of this "
                f"run: raise num_train_epochs or max_steps, or choose an earlier checkpoint"
            )

    @property
    def _trained(self) -> tuple[Engine, Engine]:
        """Actor and critic."""
        assert self.roles.critic is not None
        return self.roles.actor.engine, self.roles.critic.engine

    def _stop_early(self) -> int:
        if self.saved_at != self.state.global_step:
            self.save_checkpoint(half_used=self.half_used)
        self._write_rows()  # those of an unfinished update; a resumed run writes them again
        command = resume_command(self.argv, world_size=self.world.processes, overwrites=self.args.overwrite_output_dir)
        get_logger().warning("stopped at step %d and saved; go on with:\n  %s", self.state.global_step, command)
        return EXIT_INTERRUPTED

    def _finish(self) -> None:
        """The last evaluation and checkpoint, then ``policy/`` and ``value/`` in ``output_dir``."""
        improved = self._improves()
        keep_best = improved and self.args.load_best_model_at_end
        if self.saved_at != self.state.global_step and (keep_best or self.args.save_strategy != "no"):
            self.save_checkpoint(best=improved)
        self._enter("weights")
        if self.args.load_best_model_at_end and self.state.best_step not in (-1, self.state.global_step):
            best = self.store.path(self.state.best_step)
            get_logger().info("the best policy is that of step %d; loading %s", self.state.best_step, best)
            for name, engine in zip(("policy", "value"), self._trained, strict=True):
                engine.load_weights(best / name)
        for name, engine in zip(("policy", "value"), self._trained, strict=True):
            with on_main(self.world, lambda name=name: publishing(Path(self.args.output_dir) / name)) as target:
                engine.save_weights(target)
                if self.world.is_main:
                    self.save_extras(target)
        self.world.barrier()
        get_logger().info("the policy is in %s, the value model in %s", *(
            Path(self.args.output_dir) / name for name in ("policy", "value")
        ))  # fmt: skip


def as_prompt(row: dict[str, Any], prompt_index: int) -> GenerationPrompt:
    """A row of a ``PromptOnlyDataset`` as the engine takes it."""
    return GenerationPrompt(row["input_ids"], prompt_index, row["prompt"], row["row"])
