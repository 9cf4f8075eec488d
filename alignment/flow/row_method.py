"""What methods that learn from given rows have in common: one optimizer step is an iteration, its rows follow from the
seed and the step, its loss is a sum divided by the step's global count; evaluation is that loss on held-out rows.
"""

from __future__ import annotations

import abc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from alignment.errors import ArgumentsError, CheckpointError, NonFiniteError
from alignment.flow.checkpoint import write_json
from alignment.flow.evaluation import SAMPLES_FILE, drop_samples_after, write_samples
from alignment.flow.flow import Call, Flow
from alignment.flow.method import Method, RoleSpec, Train
from alignment.flow.nonfinite import dump_batches, nonfinite
from alignment.flow.order import TrainingOrder, micro_batches, rank_slice
from alignment.flow.statistics import Statistics
from alignment.tally import Tally

if TYPE_CHECKING:
    from paddle import Tensor

    from alignment.engine.engine import Engine
    from alignment.flow.flow import PhaseTimer
    from alignment.flow.loop import Loop
    from alignment.parallel import World
    from alignment.ppo.models import Rows

Collated = dict[str, np.ndarray]
Stats = dict[str, "float | np.ndarray"]
EVALUATION_BATCHES = 32  # micro batches of an evaluation that are collated together; enough to fill a pipeline


@dataclass
class RowRole:
    """A model that reads rows."""

    engine: Engine


@dataclass
class RowData:
    """A run's rows.

    Attributes:
        train: training rows (or packs); None without training.
        evaluation: evaluation rows; None where there are none.
        sets: the data sets behind them, for summaries: "train", "eval" -> a data set with ``summary`` and
            ``mixture_record()``.
    """

    train: Sequence[Any] | None
    evaluation: Sequence[Any] | None
    sets: dict[str, Any]


class RowFeed:
    """The rows of each optimizer step, by number: of all data ranks, the same on each.

    Args:
        order: the run's; None without training.
        args: ``num_train_epochs``, ``max_steps``.
    """

    input = "rows"
    of_all_ranks = True

    def __init__(self, order: TrainingOrder | None, args: Any) -> None:
        self.order, self.position = order, 0
        self.steps = order.total_steps(args.num_train_epochs, args.max_steps) if order is not None else 0

    @property
    def epoch(self) -> float:
        """Epochs since the start of the run."""
        return self.order.epoch_at(self.position) if self.order is not None else 0.0

    @property
    def epoch_ended(self) -> bool:
        """Whether the next row begins an epoch, or the run is at its end."""
        assert self.order is not None
        return self.position % self.order.steps_per_epoch == 0 or self.position == self.steps

    def exhausted(self, iterations: int) -> bool:
        """Never: the steps end the run."""
        return False

    def next(self) -> np.ndarray:
        """The next step's row numbers, ``[at most the global batch]`` int64."""
        assert self.order is not None
        self.position += 1
        return self.order.batch(self.position - 1)


class RowMethod(Method):
    """A method whose iteration is one optimizer step on given rows.

    A subclass says how rows are collated and what the loss of a micro batch is; one model is trained, in the role
    ``model``.

    Attributes:
        engine: the model.
        tokenizer: for pads and readable dumps.
    """

    base: ClassVar[str] = "rows"
    echoes_evaluation: ClassVar[bool] = False
    runtime_metric: ClassVar[str] = "eval/runtime"

    @classmethod
    def run(cls, args: Any, world: World, argv: list[str]) -> int:
        """Train and evaluate as the arguments say; see :func:`alignment.flow.row_run.run_rows`."""
        from alignment.flow.row_run import run_rows

        return run_rows(cls(args), world, argv)

    # -- what a method on rows says of itself

    @property
    def label(self) -> str:
        """What messages call its model."""
        return f"{self.title} model"

    @abc.abstractmethod
    def build_data(self, tokenizer: Any, template: Any, show_progress: bool) -> RowData:
        """Tokenise (or read from the cache) what the arguments ask for.

        Raises:
            DataError: see :class:`alignment.ppo.data.TokenizedDataset`.
        """

    @abc.abstractmethod
    def load_model(self, world: World) -> Any:
        """The model of ``model_name_or_path``."""

    @abc.abstractmethod
    def collate(self, rows: Sequence[Any]) -> Collated:
        """Rows of the data set -> one micro batch of numpy arrays."""

    @abc.abstractmethod
    def row_tokens(self, row: Any) -> int:
        """Tokens that a row takes in a micro batch of its like, pads included."""

    @abc.abstractmethod
    def count(self, batch: Collated) -> int:
        """What the loss is a mean over: valid tokens or pairs in this batch."""

    def tokens(self, batch: Collated) -> int:
        """Real tokens that the model reads, for the rates."""
        return int(np.sum(batch["lengths"]))

    def rows(self, batch: Collated) -> Rows:
        """What the model reads of a batch."""
        from alignment.ppo.models import Rows

        return Rows(batch["input_ids"], lengths=batch["lengths"])

    @abc.abstractmethod
    def loss(self, hidden: Tensor, batch: Collated) -> tuple[Tensor, Stats]:
        """From final hidden states ``[rows, seq, hidden]``: the **sum** of the loss over the batch's :meth:`count`, and
        stats for metrics: numbers add up, arrays are joined, over micro batches, steps and ranks.
        """

    def after_step(self, stats: Stats) -> None:
        """Called on every rank after each optimizer step with this rank's stats of the step."""

    def metrics(self, stats: Mapping[str, float | np.ndarray]) -> dict[str, float]:
        """Metrics from merged stats; names without prefix."""
        return {}

    def records(self, batch: Collated, stats: Mapping[str, float | np.ndarray]) -> list[dict[str, Any]]:
        """What ``eval_samples.jsonl`` says of each row of an evaluated micro batch; nothing by default."""
        return []

    def decode(self, batch: Collated) -> list[str]:
        """One readable text per row."""
        rows = zip(batch["input_ids"], batch["lengths"], strict=True)
        return [self.tokenizer.decode(ids[: int(length)].tolist()) for ids, length in rows]

    # -- the iteration

    def roles(self) -> list[RoleSpec]:
        return [RoleSpec("model", "rows", "model_name_or_path", trained=True, folder=".", evaluates=True)]

    def flow(self) -> Flow:
        return Flow([Call("train", "train", ("model",), ("rows",), "stats", Train({"model": self.loss}))], ("rows",))

    def begin(self, loop: Loop) -> None:
        self.loop, self.world, self.engine = loop, loop.world, loop.roles["model"].engine
        data: RowData = loop.given.extras["data"]
        self.train_rows, self.eval_rows, self.order = data.train, data.evaluation, loop.feed.order
        if loop.world.is_main:  # a run that is resumed writes what it evaluated behind the checkpoint again
            drop_samples_after(Path(self.args.output_dir) / SAMPLES_FILE, loop.state.global_step or -1)
        self.began, self.first_step, self.tokens_read, self.loss_sum = time.monotonic(), loop.state.global_step, 0, 0.0
        if not self.args.do_train and not self.evaluates:
            raise ArgumentsError(
                f"{self.title}: there is no evaluation data (eval_datasets, dev.json, eval_split_ratio)"
            )

    def updater(self, loop: Loop, call: Call) -> RowUpdater:
        return RowUpdater(self, loop)

    def row(self, stats: Statistics, step: int) -> dict[str, float]:
        found = self.metrics({**stats.totals, **stats.arrays})
        return {
            **stats.result(),
            **{f"train/{name}": value for name, value in found.items() if "calibration" not in name},
        }

    def drain(self, timer: PhaseTimer) -> dict[str, float]:
        timer.drain()
        rates = self.loop.writer.rates()
        return {f"train/{name}": rates[name] for name in ("steps_per_second", "tokens_per_second")}

    # -- evaluation

    @property
    def evaluates(self) -> bool:
        """Whether there is anything to evaluate and the arguments ask for it."""
        return bool(self.args.do_eval and self.eval_rows is not None and len(self.eval_rows))

    def evaluate(self, step: int) -> dict[str, float]:
        return {f"eval/{name}": value for name, value in self.measure(step).items()}

    def measure(self, step: int = 0) -> dict[str, float]:
        """Metrics of the evaluation rows over all ranks, without prefix; every rank gets the same.

        Args:
            step: optimizer steps so far, for ``eval_samples.jsonl``.
        """
        engine, world = self.engine, self.world
        engine.model.eval()
        groups = self._evaluation_groups()
        most = max(world.all_gather_object(len(groups), "evaluation batches"))
        parts, samples = Statistics(), []

        def of_batch(hidden: Tensor, batch: Collated) -> tuple[Statistics, list[dict[str, Any]]]:
            loss_sum, stats = self.loss(hidden, batch)
            shown.add()
            found = Statistics.of({"loss_sum": float(loss_sum), "count": float(self.count(batch)), **stats})
            return found, self.records(batch, stats)

        bar, main = not self.args.disable_tqdm, world.is_main
        try:
            with engine.in_passes(), Tally("evaluation", len(groups), unit="batches", bar=bar, active=main) as shown:
                # A few micro batches at a time: what they are collated to takes far more memory than the rows.
                for start in range(0, most, EVALUATION_BATCHES):
                    taken = groups[start : start + EVALUATION_BATCHES]
                    batches = [self.collate([self.eval_rows[int(i)] for i in rows]) for rows in taken]  # type: ignore[index]
                    found = engine.infer_pass(batches, self.rows, of_batch)  # no batch: other ranks may have more
                    for numbers, (part, records) in zip(taken, found, strict=True):
                        parts.merge(part)
                        samples += [(int(number), record) for number, record in zip(numbers, records, strict=False)]
                    shown.add(start + len(taken) - shown.done)  # a pipeline's first stage measures nothing itself
        finally:
            if engine.trainable:
                engine.model.train()
        everyone = [record for part in world.all_gather_object(samples, "evaluated rows") for record in part]
        if main and everyone:
            in_order = sorted(everyone, key=lambda item: item[0])
            path = Path(self.args.output_dir) / SAMPLES_FILE
            write_samples(path, [{"step": step, "index": number, **record} for number, record in in_order])
        stats = parts.over_ranks(world)
        loss = stats.totals["loss_sum"] / max(1.0, stats.totals["count"])
        return {"loss": loss, **self.metrics({**stats.totals, **stats.arrays})}

    def _evaluation_groups(self) -> list[np.ndarray]:
        """The numbers of this rank's evaluation rows, micro batch by micro batch; the longest rows come first, and rows
        of like length together, so that little is padded and memory is found too small at once.
        """
        assert self.eval_rows is not None
        mine = rank_slice(np.arange(len(self.eval_rows)), self.world.rank, self.world.size)
        lengths = np.array([self.row_tokens(self.eval_rows[int(i)]) for i in mine], dtype=np.int64)
        by_length = np.argsort(-lengths, kind="stable")
        args = self.args
        groups = micro_batches(lengths[by_length], args.per_device_eval_batch_size, args.max_tokens_per_micro_batch)
        return [mine[by_length[group]] for group in groups]

    def tell_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        shown = {name.removeprefix("eval/"): value for name, value in values.items()}
        scalars = ", ".join(f"{n} {value:.4f}" for n, value in shown.items() if not n.startswith("calibration/"))
        self.loop.writer.write(f"evaluation at step {step}: {scalars}")

    # -- the end, and what a resumed run needs

    def finished(self, final: Mapping[str, float]) -> None:
        """Write ``train_results.json``, ``eval_results.json`` and ``all_results.json``."""
        state, seconds, train = self.loop.state, time.monotonic() - self.began, {}
        if self.args.do_train:
            assert self.order is not None
            steps = state.global_step - self.first_step
            train = {
                "train_loss": self.loss_sum / max(1, state.global_step),
                "train_runtime": seconds,
                "train_steps_per_second": steps / max(seconds, 1e-9),
                "train_samples_per_second": steps * self.order.global_batch / max(seconds, 1e-9),
                "train_tokens_per_second": self.tokens_read / max(seconds, 1e-9),
                "global_step": state.global_step,
                "epoch": self.loop.feed.epoch,
                "best_step": state.best_step,
            }
        evaluation = {f"eval_{name.removeprefix('eval/').replace('/', '_')}": value for name, value in final.items()}
        if not self.world.is_main:
            return
        for name, results in (("train", train), ("eval", evaluation), ("all", {**train, **evaluation})):
            if results:
                strict = {key: value if math.isfinite(value) else None for key, value in results.items()}
                write_json(Path(self.args.output_dir) / f"{name}_results.json", strict)

    def state(self) -> dict[str, Any]:
        return {"order": asdict(self.order) if self.order else None, "loss_sum": self.loss_sum}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` gave.

        Raises:
            CheckpointError: the checkpoint belongs to a run with other data, batch size or seed.
        """
        self.loss_sum = state["loss_sum"]
        if self.order is None or state["order"] is None:
            return
        for name, now in asdict(self.order).items():
            then = state["order"].get(name)
            if then != now:
                words = {"rows": "rows of training data", "global_batch": "rows per optimizer step"}
                meaning = words.get(name, name)
                raise CheckpointError(
                    f"the checkpoint was saved by a run with {then} {meaning}, this one has {now}: the position in the "
                    "data would mean something else. Use the same data, batch sizes and seed, or start a new run from "
                    "that model."
                )


class RowUpdater:
    """One optimizer step on a step's rows.

    Args:
        method: says what the loss is.
        loop: the run.

    Attributes:
        first_step: checks the first optimizer step; None where there is nothing (more) to check.
    """

    def __init__(self, method: RowMethod, loop: Loop) -> None:
        self.method, self.loop, self.first_step = method, loop, None

    def run(
        self,
        numbers: np.ndarray,
        iteration: int,
        global_step: int,
        on_step: Callable[[Statistics, Any, int], bool],
        begin: Any = None,
    ) -> None:
        """Learn from the rows of these numbers.

        Args:
            numbers: of all data ranks' rows.
            iteration: not used: the rows say all.
            global_step: optimizer steps taken so far in the run.
            on_step: gets the step's statistics over all ranks, None, and the tokens that were read.
            begin: not used: a step is taken or not.

        Raises:
            NonFiniteError: a loss or the gradient norm is NaN or infinite; the batch has been written out.
        """
        import paddle

        method, loop, args = self.method, self.loop, self.loop.args
        world, engine = loop.world, method.engine
        assert method.train_rows is not None
        mine = rank_slice(numbers, world.rank, world.size)
        rows = [method.train_rows[int(i)] for i in mine]
        lengths = [method.row_tokens(row) for row in rows]
        groups = micro_batches(lengths, args.per_device_train_batch_size, args.max_tokens_per_micro_batch)
        batches = [method.collate([rows[i] for i in group]) for group in groups]
        here = (sum(map(method.count, batches)), sum(map(method.tokens, batches)))
        everyone = world.all_gather_object(here, f"count of step {global_step + 1}")
        count, tokens = (sum(values) for values in zip(*everyone, strict=True))
        # Random numbers (dropout) depend on seed, step and rank alone, so that a resumed run draws the same ones.
        paddle.seed(step_seed(args.seed, global_step, world.rank))

        def loss_of(hidden: Tensor, batch: Collated) -> tuple[Tensor, tuple[float, Statistics]]:
            loss_sum, stats = method.loss(hidden, batch)
            value = float(loss_sum)
            if not math.isfinite(value):
                raise nonfinite(f"{method.title}: the loss", value, global_step + 1, self._dump(global_step, [batch]))
            return loss_sum / max(1, count), (value, Statistics.of(stats))

        results = engine.train_pass(batches, method.rows, loss_of)
        try:
            result = engine.step()
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}; this rank's batch is in {self._dump(global_step, batches)}") from error
        if self.first_step is not None:
            self.first_step.after_step("model", result.grad_norm)
        local = Statistics()
        for _, part in results:
            local.merge(part)
        stats = local.raw()
        method.after_step(stats)
        local = Statistics.of(stats)
        once = 1.0 if world.rank == 0 else 0.0
        local.add("train/loss", sum(value for value, _ in results) / max(1, count), once)
        local.add("train/grad_norm", result.grad_norm * once, once)
        local.set("train/learning_rate", result.learning_rate)
        merged = local.over_ranks(world)
        method.loss_sum += merged.sums["train/loss"]
        method.tokens_read += tokens
        loop.tokens = tokens
        on_step(merged, None, tokens)

    def _dump(self, step: int, batches: list[Collated]) -> Path:
        return dump_batches(self.loop.args.output_dir, step + 1, self.loop.world.rank, batches, self.method.decode)


def step_seed(seed: int, step: int, rank: int) -> int:
    """Of the random numbers of an optimizer step on a data rank."""
    return int(np.random.SeedSequence([seed & 0xFFFFFFFF, step, rank]).generate_state(1)[0])
