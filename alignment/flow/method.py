"""What a method is: its roles, its flow, the losses of what it trains, its own keys.

Importing this loads neither Paddle nor a model: a method's module is read to parse arguments and to answer ``--help``.
"""

# ruff: noqa: B027  (hooks that most methods need not have)
from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from alignment.errors import ArgumentsError
from alignment.flow.flow import Flow, optimizer_of

if TYPE_CHECKING:
    from pathlib import Path

    from paddle import Tensor

    from alignment.flow.flow import Call, PhaseTimer
    from alignment.flow.loop import Loop
    from alignment.flow.statistics import Statistics
    from alignment.rollout.batch import Batch

#: A sum over things, how many things, and (where it is not 1) what the sum had been divided by.
Figure = "tuple[Tensor | float, float] | tuple[Tensor | float, float, float]"


@dataclass(frozen=True)
class RoleSpec:
    """A model in a part.

    Attributes:
        name: of the role; offloading, messages and metrics call it so.
        kind: ``"policy"`` (log-probs; generates), ``"value"`` (one number per state), ``"score"`` (one per answer), or
            ``"rows"`` (reads given rows).
        key: the argument that names its folder.
        trained: whether it has an optimizer.
        folder: where a checkpoint has its weights (``"."``: in its root); empty for one that never changes.
        metric: what its metrics are called, ``train/<metric>_lr``; empty: its name.
        starts_at: optimizer steps of the run before it learns.
        evaluates: whether evaluation needs it, so that it is loaded without training too.
        temperature: of a policy's log-probs; None: that of sampling.
        present: whether the run has it at all; a call of one that is not there is given None.
        masked: of a policy that is trained, whether over the tokens of ``rollout.allowed`` alone.
        options: further words for the loader of its kind.
    """

    name: str
    kind: str
    key: str
    trained: bool = False
    folder: str = ""
    metric: str = ""
    starts_at: int = 0
    evaluates: bool = False
    temperature: float | None = None
    present: bool = True
    masked: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What its metrics are called."""
        return self.metric or self.name

    @property
    def optimizer_file(self) -> str:
        """The name of its optimizer's file in a checkpoint."""
        return "optimizer.safetensors" if self.folder == "." else f"{self.name}_optimizer.safetensors"


@dataclass(frozen=True)
class Window:
    """One optimizer step's rows.

    Attributes:
        mine: this data rank's rows.
        tokens: response tokens that the policy chose, of the window, on all ranks.
        answers: rows with at least one response token, on all ranks.
        all_tokens: tokens of prompts and responses, on all ranks.
        rows: rows on all ranks.
        first_pass: whether nothing was learnt from these rows before (first window of the first pass).
        after: where the next window begins; None behind the last one.
        row_denominator: with an aggregation, what its weighted sum is divided by; its weights are the column
            ``row_weights`` of ``mine``.
    """

    mine: Batch
    tokens: int
    answers: int
    all_tokens: int
    rows: int
    first_pass: bool
    after: Any
    row_denominator: float | None = None

    def denominator(self, mean: str) -> float:
        """What a loss of this window is divided by: its ``"token"`` or ``"sequence"`` count, at least 1."""
        return float(max(1, self.tokens if mean == "token" else self.answers))


@dataclass
class Loss:
    """What a loss function gives for a micro batch.

    Attributes:
        total: ``[]``, already divided by the window's count, so that the micro batches of all ranks add up.
        sums: means to log: name -> (sum, weight[, what the sum was divided by]).
        maxima: largest values to log.
    """

    total: Tensor
    sums: dict[str, Any] = field(default_factory=dict)
    maxima: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Train:
    """The training call's function: passes over the rows in freshly shuffled windows, in each of which the roles take a
    step one after the other.

    Attributes:
        losses: in this order, of a policy ``loss(logprobs, entropy, batch, window) -> Loss``, of a value or score model
            ``loss(values, batch, window) -> Loss``; tensors ``[b, R]``.
        passes: over the rows; None: ``update_iters``.
        aggregation: a name of :data:`~alignment.losses.aggregation.AGGREGATIONS`; None: the losses use the window's
            ``denominator``.
        length_constant: the L of ``constant``.
        takes_part: a column ``[B]`` of how many passes a row takes part in, the first ones; None: in all.
    """

    losses: Mapping[str, Callable[..., Loss]]
    passes: int | None = None
    aggregation: str | None = None
    length_constant: float | None = None
    takes_part: str | None = None


class Method(abc.ABC):
    """An algorithm.

    A subclass says its :meth:`roles` and its :meth:`flow`; the functions of the flow's calls are its methods. The loop
    gives it everything else: resume, interruption, evaluation, best model, checkpoints, metrics, offloading, layouts.

    Attributes:
        name: what the command calls it.
        title: what messages call it.
        summary: one line for ``alignment methods``.
        Keys: a dataclass of its own arguments.
        base: ``"online"`` where it answers prompts, ``"rows"`` where it learns from given rows.
        presets: names that set keys.
        bar: metrics that the progress bar shows.
        runtime_metric: what the seconds of an evaluation are called.
        echoes_evaluation: whether an evaluation's row is shown as rows are; else :meth:`tell_evaluation` shows it.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    Keys: ClassVar[type | None] = None
    base: ClassVar[str] = "online"
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    bar: ClassVar[tuple[str, ...]] = ()
    runtime_metric: ClassVar[str] = "eval/runtime_seconds"
    echoes_evaluation: ClassVar[bool] = True

    def __init__(self, args: Any) -> None:
        self.args = args

    # -- what a method says of itself

    @abc.abstractmethod
    def roles(self) -> list[RoleSpec]:
        """Its roles, in the order in which they are loaded."""

    @abc.abstractmethod
    def flow(self) -> Flow:
        """One iteration."""

    def between(self) -> dict[str, frozenset[str]]:
        """What must be resident between iterations: to evaluate, to write or read a checkpoint, to write, read or
        compare the weights that change.
        """
        changing = frozenset(spec.name for spec in self.roles() if spec.folder)
        optimizers = frozenset(optimizer_of(spec.name) for spec in self.roles() if spec.trained)
        evaluating = frozenset(spec.name for spec in self.roles() if spec.evaluates)
        return {"evaluation": evaluating, "checkpoint": changing | optimizers, "weights": changing}

    def checked_flow(self) -> Flow:
        """Its flow, looked over.

        Raises:
            ArgumentsError: it cannot be meant as it is; see :meth:`~alignment.flow.flow.Flow.check`.
        """
        specs = self.roles()
        try:
            flow = self.flow()
            flow.check([spec.name for spec in specs], [spec.name for spec in specs if spec.trained])
        except (ValueError, KeyError) as error:
            raise ArgumentsError(f"the flow of {self.title}: {error.args[0]}") from error
        return flow

    # -- what the loop asks of it

    def begin(self, loop: Loop) -> None:
        """The run's models are loaded: take from the loop what the functions need."""

    def before_iteration(self) -> contextlib.AbstractContextManager[None]:
        """What is around an iteration."""
        return contextlib.nullcontext()

    @property
    def evaluates(self) -> bool:
        """Whether there is anything to evaluate on."""
        return False

    def evaluate(self, step: int) -> dict[str, float]:
        """Figures of an evaluation, with their full names."""
        return {}

    def tell_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Show an evaluation's figures."""

    def updater(self, loop: Loop, call: Call) -> Any:
        """What runs a training call: it has ``run(batch, number, global_step, on_step, begin)`` and ``first_step`` (see
        :class:`~alignment.flow.update.Updater`).
        """
        from alignment.flow.update import Updater

        return Updater(self.args, loop.world, call.run, loop.specs, loop.roles, loop.ptx, loop.given.decode, loop.guard)

    def row(self, stats: Statistics, step: int) -> dict[str, float]:
        """A row of training metrics, from the statistics of the optimizer steps since the last one."""
        return {**stats.result(), "global_step": step}

    def drain(self, timer: PhaseTimer) -> dict[str, float]:
        """Times and rates since the last call, and other figures that are no means over rows."""
        return timer.drain()

    def finished(self, final: Mapping[str, float]) -> None:
        """The run is at its end; ``final`` are the evaluation figures of its model."""

    def state(self) -> dict[str, Any]:
        """What it must know to go on, as JSON values (controllers, running means)."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` gave."""

    def save_files(self, folder: Path) -> None:
        """Write what is too large for :meth:`state` into a checkpoint's ``trainer/``; the main process calls it."""

    def load_files(self, folder: Path) -> None:
        """Read what :meth:`save_files` wrote; every process calls it."""


def offload_levels(specs: Sequence[RoleSpec]) -> dict[str, tuple[str, ...]]:
    """What each word of ``offload_level`` allows to leave, of these roles."""
    return {
        "freeze_model": tuple(spec.name for spec in specs if not spec.folder),
        "optimizer": tuple(optimizer_of(spec.name) for spec in specs if spec.trained),
        "train_model": tuple(spec.name for spec in specs if spec.folder),
    }


def figures_of(loss: Loss) -> tuple[list[float], list[str], list[str]]:
    """A loss's numbers on the host, brought over in one copy (each copy waits for the device).

    Returns:
        ``(values, names of the sums, names of the maxima)``; the first value is the total.
    """
    import paddle

    names, tops = list(loss.sums), list(loss.maxima)
    numbers = [loss.total, *(loss.sums[name][0] for name in names), *(loss.maxima[name] for name in tops)]
    there = [isinstance(number, float | int | np.generic) for number in numbers]
    tensors = [n.detach().astype("float32").reshape([]) for n, host in zip(numbers, there, strict=True) if not host]
    brought = iter(paddle.stack(tensors).tolist())
    values = [float(number) if host else next(brought) for number, host in zip(numbers, there, strict=True)]
    return values, names, tops
