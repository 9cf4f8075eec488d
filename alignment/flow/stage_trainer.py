"""`StageTrainer`: the training loop of SFT and reward modelling. It reads like the algorithm; what a stage is, it asks
the stage.

for step in range(...):
    micro batches of this rank            order.py: the same rows for any number of processes
    global count                          valid tokens or pairs of the whole step, over all ranks, before any backward
    forward, backward of loss_sum / global count, once per micro batch
    step                                  engine.py: sum over ranks, clip, AdamW
    log, evaluate, save                   as the strategies say
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from alignment.errors import ArgumentsError, CheckpointError, NonFiniteError
from alignment.flow.best import best_metric, is_better
from alignment.flow.checkpoint import CheckpointStore, write_json
from alignment.flow.interrupt import EXIT_INTERRUPTED, Interrupt, resume_command
from alignment.flow.metrics import MetricWriter
from alignment.flow.nonfinite import dump_batches, nonfinite
from alignment.flow.order import TrainingOrder, micro_batches, rank_slice
from alignment.flow.output import on_main, publishing
from alignment.flow.resume import save_arguments
from alignment.flow.stage import Batch, Progress, Stage
from alignment.flow.stats import Stats, finite_or_none, from_json, merge, merge_ranks, to_json
from alignment.log import get_logger
from alignment.parallel import World
from alignment.tally import Tally

STATE_FILE = "trainer/state.json"
OPTIMIZER_FILE = "trainer/optimizer.safetensors"
EVALUATION_BATCHES = 32  # micro batches of an evaluation that are collated together; enough to fill a pipeline


class StageTrainer:
    """Trains one stage.

    Args:
        stage: what is trained and how.
        args: the stage's arguments (names of paddlenlp's ``TrainingArguments``).
        world: the processes of the run.
        train_rows: training rows (or packs); None with ``do_train`` false.
        eval_rows: evaluation rows; None where there are none.
        argv: the command line of the stage, for the line that says how to resume.
        resume: checkpoint folder to continue from, already verified.
    """

    def __init__(
        self,
        stage: Stage,
        args: Any,
        world: World,
        train_rows: Sequence[Any] | None,
        eval_rows: Sequence[Any] | None = None,
        *,
        argv: list[str] | None = None,
        resume: Path | None = None,
    ) -> None:
        self.stage, self.args, self.world, self.argv, self.resume = stage, args, world, argv, resume
        self.train_rows, self.eval_rows = train_rows, eval_rows
        self.output_dir = Path(args.output_dir)
        self.store = CheckpointStore(self.output_dir, args.save_total_limit)
        self.order = make_order(args, world.size, len(train_rows)) if train_rows is not None else None
        self.total_steps = self.order.total_steps(args.num_train_epochs, args.max_steps) if self.order else 0
        self.progress = Progress()
        self.writer: MetricWriter | None = None
        self._saved_step = -1
        self._learning_rate = 0.0

    # -- the loop ----------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Train and evaluate as the arguments say; save the final model; return the exit status (0, or 130 after an
        interruption).
        """
        if self.resume is not None:
            self.load_checkpoint(self.resume)
        self.stage.engine.check_same_on_all_ranks()
        start = self.progress.step
        self.writer = MetricWriter(self.output_dir, self.args, self.world, self.total_steps, start_step=start)
        begin = time.monotonic()
        try:
            with Interrupt() as interrupt:
                if self.order is None or not self.args.do_train:
                    self.evaluate()
                    self._write_results({})
                    return 0
                if start == 0 and self.args.eval_on_start and self.evaluates:
                    self.evaluate()
                tokens = 0
                for step in range(start, self.total_steps):
                    step_tokens, interrupted = self.train_step(step, interrupt.requested)
                    if interrupted:
                        return self._stop()
                    tokens += step_tokens
                    self._after_step()
                return self._finish(start, tokens, time.monotonic() - begin)
        finally:
            self.writer.close()

    @property
    def evaluates(self) -> bool:
        """Whether there is anything to evaluate and the arguments ask for it."""
        return bool(self.args.do_eval and self.eval_rows is not None and len(self.eval_rows))

    def train_step(self, step: int, interrupt_requested: bool = False) -> tuple[int, bool]:
        """One optimizer step.

        Returns:
            Tokens read over all ranks, and whether the run was interrupted instead (on any rank; then nothing was
            done).

        Raises:
            NonFiniteError: a loss or the gradient norm is NaN or infinite; the batch has been written out.
        """
        assert self.order is not None and self.train_rows is not None and self.writer is not None
        stage, engine = self.stage, self.stage.engine
        self.world.phase("train", step)
        mine = rank_slice(self.order.batch(step), self.world.rank, self.world.size)
        batches = self._micro_batches([self.train_rows[int(i)] for i in mine], self.args.per_device_train_batch_size)
        here = (sum(map(stage.count, batches)), sum(map(stage.tokens, batches)), interrupt_requested)
        everyone = self.world.all_gather_object(here, f"count of step {step + 1}")
        count, tokens, interrupted = (sum(values) for values in zip(*everyone, strict=True))
        if interrupted:
            return 0, True
        # Random numbers (dropout) depend on seed, step and rank alone, so that a resumed run draws the same ones.
        paddle.seed(_step_seed(self.args.seed, step, self.world.rank))

        def loss_of(hidden: Tensor, batch: Batch) -> tuple[Tensor, tuple[float, Stats]]:
            loss_sum, stats = stage.loss(hidden, batch)
            value = float(loss_sum)
            if not math.isfinite(value):
                raise nonfinite(f"{stage.name}: the loss", value, step + 1, self._dump(step, [batch]))
            return loss_sum / max(1, count), (value, stats)

        with engine.in_passes():
            results = engine.train_pass(batches, stage.rows, loss_of)
            try:
                result = engine.step()
            except NonFiniteError as error:
                raise NonFiniteError(f"{error}; this rank's batch is in {self._dump(step, batches)}") from error
        loss_here, parts = sum(value for value, _ in results), [stats for _, stats in results]
        progress = self.progress
        progress.step = step + 1
        progress.window_steps += 1
        step_stats: Stats = {
            "loss/sum": loss_here / max(1, count),
            "grad_norm/sum": result.grad_norm if self.world.rank == 0 else 0.0,
        }
        mine_stats = merge(parts)
        stage.after_step(mine_stats)
        progress.window = merge([progress.window, step_stats, mine_stats])
        self._learning_rate = result.learning_rate
        self.writer.advance(progress.step, tokens)
        return tokens, False

    def _micro_batches(self, rows: list[Any], size: int) -> list[Batch]:
        """This rank's rows, collated by ``size`` or by the budget of tokens."""
        lengths = [self.stage.row_tokens(row) for row in rows]
        groups = micro_batches(lengths, size, self.args.max_tokens_per_micro_batch)
        return [self.stage.collate([rows[i] for i in group]) for group in groups]

    def _evaluation_groups(self) -> list[np.ndarray]:
        """The numbers of this rank's evaluation rows, micro batch by micro batch; the longest rows come first, and rows
        of like length together, so that little is padded and memory is found too small at once.
        """
        assert self.eval_rows is not None
        mine = rank_slice(np.arange(len(self.eval_rows)), self.world.rank, self.world.size)
        lengths = np.array([self.stage.row_tokens(self.eval_rows[int(i)]) for i in mine], dtype=np.int64)
        by_length = np.argsort(-lengths, kind="stable")
        args = self.args
        groups = micro_batches(lengths[by_length], args.per_device_eval_batch_size, args.max_tokens_per_micro_batch)
        return [mine[by_length[group]] for group in groups]

    def evaluate(self) -> dict[str, float]:
        """Evaluate over all ranks and log a row of ``eval/*``.

        Returns:
            Metrics without prefix; every rank gets the same.
        """
        assert self.writer is not None
        if self.eval_rows is None or not len(self.eval_rows):
            raise ArgumentsError(
                f"{self.stage.name}: there is no evaluation data (eval_datasets, dev.json, eval_split_ratio)"
            )
        begin = time.monotonic()
        self.world.phase("evaluate", self.progress.step)
        engine, stage = self.stage.engine, self.stage
        engine.model.eval()
        groups = self._evaluation_groups()
        most = max(self.world.all_gather_object(len(groups), "evaluation batches"))

        def measure(hidden: Tensor, batch: Batch) -> Stats:
            loss_sum, stats = stage.loss(hidden, batch)
            shown.add()
            return {"loss_sum": float(loss_sum), "count": float(stage.count(batch)), **stats}

        parts: list[Stats] = []
        bar, main = not self.args.disable_tqdm, self.world.is_main
        try:
            with engine.in_passes(), Tally("evaluation", len(groups), unit="batches", bar=bar, active=main) as shown:
                # A few micro batches at a time: what they are collated to takes far more memory than the rows.
                for start in range(0, most, EVALUATION_BATCHES):
                    taken = groups[start : start + EVALUATION_BATCHES]
                    batches = [stage.collate([self.eval_rows[int(i)] for i in rows]) for rows in taken]
                    parts += engine.infer_pass(batches, stage.rows, measure)  # no batch: other ranks may have more
                    shown.add(start + len(taken) - shown.done)  # a pipeline's first stage measures nothing itself
        finally:
            if engine.trainable:
                engine.model.train()
        stats = merge_ranks(self.world, merge(parts))
        seconds = time.monotonic() - begin
        metrics = {"loss": float(stats["loss_sum"]) / max(1.0, float(stats["count"])), **self.stage.metrics(stats)}
        progress = self.progress
        progress.last_eval_step, progress.eval_metrics = progress.step, metrics
        shown = {f"eval/{name}": value for name, value in metrics.items()}
        self.writer.log(progress.step, {**shown, "eval/runtime": seconds}, epoch=self._epoch(), echo=False)
        scalars = ", ".join(
            f"{name} {value:.4f}" for name, value in metrics.items() if not name.startswith("calibration/")
        )
        self.writer.write(f"evaluation at step {progress.step}: {scalars}")
        self.writer.pause(seconds)
        return metrics

    # -- around a step -----------------------------------------------------------------------------------------

    def _after_step(self) -> None:
        step, args = self.progress.step, self.args
        last = step == self.total_steps
        if step % args.logging_steps == 0 or last:
            self._log_window()
        improved = False
        if self.evaluates and (self._due(args.evaluation_strategy, args.eval_steps, step) or last):
            improved = self._is_best(self.evaluate())
        # The best model must be on the disk to be loaded at the end, whether or not a save is due.
        keep_best = improved and args.load_best_model_at_end
        if self._due(args.save_strategy, args.save_steps, step) or keep_best:
            self.save_checkpoint(best=improved)

    def _due(self, strategy: str, every: int, step: int) -> bool:
        assert self.order is not None
        if strategy == "steps":
            return step % every == 0
        return strategy == "epoch" and (step % self.order.steps_per_epoch == 0 or step == self.total_steps)

    def _log_window(self) -> None:
        assert self.writer is not None
        progress = self.progress
        stats = merge_ranks(self.world, progress.window)
        steps = max(1, progress.window_steps)
        loss = float(stats.pop("loss/sum")) / steps
        progress.loss_sum += loss * steps
        row = {
            "train/loss": loss,
            **{
                f"train/{name}": value for name, value in self.stage.metrics(stats).items() if "calibration" not in name
            },
            "train/grad_norm": float(stats.pop("grad_norm/sum")) / steps,
            "train/learning_rate": self._learning_rate,
        }
        rates = self.writer.rates()
        row["train/steps_per_second"] = rates["steps_per_second"]
        row["train/tokens_per_second"] = rates["tokens_per_second"]
        progress.window, progress.window_steps = {}, 0
        self.writer.log(progress.step, row, epoch=self._epoch())

    def _is_best(self, metrics: Mapping[str, float]) -> bool:
        name, value = best_metric(self.args, metrics)
        progress = self.progress
        if not is_better(self.args, name, value, progress.best_value):
            return False
        progress.best_step, progress.best_value, progress.best_metrics = progress.step, value, dict(metrics)
        return True

    def _stop(self) -> int:
        """The run was interrupted: save, say how to go on."""
        assert self.writer is not None
        if self.progress.step > 0 and not self.store.path(self.progress.step).exists():
            self.save_checkpoint()
        if self.world.is_main:
            command = resume_command(
                self.argv, world_size=self.world.processes, overwrites=self.args.overwrite_output_dir
            )
            if self.progress.step > 0:
                saved = f"saved {self.store.path(self.progress.step)}"
                self.writer.write(f"interrupted after step {self.progress.step}; {saved}. Continue with:\n  {command}")
            else:
                self.writer.write("interrupted before the first step; nothing was saved")
        return EXIT_INTERRUPTED

    def _finish(self, start: int, tokens: int, seconds: float) -> int:
        progress, args = self.progress, self.args
        if args.save_strategy != "no" and self._saved_step != progress.step and progress.step > start:
            self.save_checkpoint()
        final = progress.eval_metrics
        self.world.phase("save", progress.step)
        if args.load_best_model_at_end and progress.best_step >= 0:
            if progress.best_step != progress.step:
                best = self.store.path(progress.best_step)
                get_logger().info("the best model is that of step %d; loading %s", progress.best_step, best)
                self.stage.engine.load_weights(best)
            final = progress.best_metrics
        with on_main(self.world, lambda: publishing(self.output_dir)) as folder:
            self.stage.save(folder)
        get_logger().info("the final model is in %s", self.output_dir)
        self.world.barrier()
        steps = progress.step - start
        self._write_results(
            {
                "train_loss": progress.loss_sum / max(1, progress.step),
                "train_runtime": seconds,
                "train_steps_per_second": steps / max(seconds, 1e-9),
                "train_samples_per_second": steps * self.order.global_batch / max(seconds, 1e-9),  # type: ignore[union-attr]
                "train_tokens_per_second": tokens / max(seconds, 1e-9),
                "global_step": progress.step,
                "epoch": self._epoch(),
                "best_step": progress.best_step,
            },
            final,
        )
        return 0

    def _write_results(self, train: dict[str, float], final: Mapping[str, float] | None = None) -> None:
        if not self.world.is_main:
            return
        final = self.progress.eval_metrics if final is None else final
        evaluation = {f"eval_{name.replace('/', '_')}": value for name, value in final.items()}
        for name, values in (("train", train), ("eval", evaluation), ("all", {**train, **evaluation})):
            if values:
                write_json(self.output_dir / f"{name}_results.json", finite_or_none(values))

    def _epoch(self) -> float:
        return self.order.epoch_at(self.progress.step) if self.order else 0.0

    def _dump(self, step: int, batches: list[Batch]) -> Path:
        return dump_batches(self.output_dir, step + 1, self.world.rank, batches, self.stage.decode)

    # -- checkpoints -------------------------------------------------------------------------------------------

    def save_checkpoint(self, *, best: bool = False) -> None:
        """Write ``checkpoint-{step}``: model files, and in ``trainer/`` optimizer, position and arguments."""
        begin = time.monotonic()
        progress = self.progress
        self.world.phase("save", progress.step)
        window = merge_ranks(self.world, progress.window)
        with on_main(self.world, lambda: self.store.writing(progress.step, best=best)) as folder:
            self.stage.save(folder)
            if self.world.is_main:
                (folder / "trainer").mkdir()
            self.stage.engine.save_state(folder / OPTIMIZER_FILE)
            if self.world.is_main:
                self._write_state(folder, window)
        self.world.barrier()
        self._saved_step = progress.step
        if self.writer is not None:
            self.writer.pause(time.monotonic() - begin)

    def _write_state(self, folder: Path, window: Stats) -> None:
        progress = self.progress
        state = {**asdict(progress), "window": to_json(window), "order": asdict(self.order) if self.order else None}
        for name in ("eval_metrics", "best_metrics"):
            state[name] = finite_or_none(state[name])
        state["rng"] = {"kind": "counter", "seed": self.args.seed, "next_step": progress.step}
        state["world_size"], state["total_steps"] = self.world.size, self.total_steps
        write_json(folder / STATE_FILE, state)
        save_arguments(folder, self.args, self.world)

    def load_checkpoint(self, folder: Path) -> None:
        """Put everything back as :meth:`save_checkpoint` found it.

        Raises:
            CheckpointError: the checkpoint belongs to a run with other data, batch size or seed, or its files do not
                fit.
        """
        try:
            state = json.loads((folder / STATE_FILE).read_text())
            saved = Progress(**{name: state[name] for name in Progress.__dataclass_fields__})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder / STATE_FILE} cannot be used to resume {self.stage.name}: {error!r}"
            ) from error
        if self.order is not None:
            for name, now in asdict(self.order).items():
                then = state["order"].get(name)
                if then != now:
                    meaning = {"rows": "rows of training data", "global_batch": "rows per optimizer step"}.get(
                        name, name
                    )
                    raise CheckpointError(
                        f"{folder} was saved by a run with {then} {meaning}, this one has {now}: the position in the "
                        "data would mean something else. Use the same data, batch sizes and seed, or start a new run "
                        "from that model."
                    )
        self.stage.engine.load_weights(folder)
        self.stage.engine.load_state(folder / OPTIMIZER_FILE)
        # The window holds all ranks' sums; one rank takes them on.
        saved.window = from_json(saved.window) if self.world.rank == 0 else {}  # type: ignore[arg-type]
        self.progress, self._saved_step = saved, saved.step
        if self.world.is_main:
            self.store.remember_best(saved.best_step)
        get_logger().info("resuming from %s: step %d of %d", folder, saved.step, self.total_steps)
        if saved.step >= self.total_steps > 0:
            get_logger().warning(
                "%s has already done all %d steps; only the final model is written", folder, self.total_steps
            )


def make_order(args: Any, world_size: int, rows: int) -> TrainingOrder:
    """The run's order of rows from its arguments."""
    batch = args.per_device_train_batch_size * world_size * args.gradient_accumulation_steps
    return TrainingOrder(rows, batch, args.seed, bool(args.dataloader_drop_last), args.shuffle)


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed & 0xFFFFFFFF, step, rank]).generate_state(1)[0])
