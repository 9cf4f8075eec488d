"""A method's iteration as a small graph of calls to its roles.

The graph says what is computed from what. From it follow the order, which roles must be resident when (what offloading
needs), whose rows a call sees, and the timings. A call names the function that runs it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from alignment.errors import nearest

if TYPE_CHECKING:
    from alignment.parallel import World


@dataclass(frozen=True)
class Average:
    """What happens between two roles behind a call: ``target <- (1 - share) target + share source``, in every weight.

    Attributes:
        source: a role.
        target: a role of the same shape, which is not trained.
        share: of the source; 1 copies it.
    """

    source: str
    target: str
    share: float


@dataclass(frozen=True)
class Call:
    """One call of one or more roles.

    Attributes:
        name: of the phase, as it appears in the metrics.
        kind: ``"generate"`` or ``"infer"`` (no gradient): it sees the rows of this data rank; ``"train"``, or
            ``"host"`` for a step without a model: they see the rows of all data ranks, on each rank alike.
        roles: what must be resident while it runs.
        needs: names of the values it takes, in the order of its arguments.
        gives: name of the value it returns, or names of the values of the tuple that it returns.
        run: the function: ``run(*roles, *values)``, where a role that the run does not have is None. Of a training call
            it is a :class:`~alignment.flow.method.Train`.
        rename: ``{name in the graph: the function's own}``. Then values are given by keyword, and a dictionary that is
            returned is read by the function's names.
        when: ``when(step)``, by the optimizer steps taken: whether it runs in this iteration; else it gives None.
        after: averages that are taken when it is done.
        samples: of a call that generates: answers to each prompt, for the plan; None: ``num_return_sequences``.
    """

    name: str
    kind: Literal["generate", "infer", "train", "host"]
    roles: tuple[str, ...]
    needs: tuple[str, ...]
    gives: str | tuple[str, ...]
    run: Any = None
    rename: Mapping[str, str] = field(default_factory=dict)
    when: Callable[[int], bool] | None = None
    after: tuple[Average, ...] = ()
    samples: int | None = None

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what it gives."""
        return (self.gives,) if isinstance(self.gives, str) else tuple(self.gives)

    @property
    def sees_all_rows(self) -> bool:
        """Whether it is given the rows of all data ranks."""
        return self.kind in ("train", "host")

    @property
    def resident(self) -> frozenset[str]:
        """What it needs in memory: its roles, those of its averages, and the optimizers' states of what it trains."""
        averaged = {role for average in self.after for role in (average.source, average.target)}
        return frozenset({*self.roles, *averaged, *(optimizer_of(r) for r in self.roles if self.kind == "train")})

    def __call__(self, roles: Sequence[Any], values: Sequence[Any]) -> dict[str, Any]:
        """Run the function; the values by the names that the graph has for them."""
        if self.rename:
            named = {self.rename.get(name, name): value for name, value in zip(self.needs, values, strict=True)}
            given = self.run(*roles, **named)
        else:
            given = self.run(*roles, *values)
        return self.named(given)

    def named(self, given: Any) -> dict[str, Any]:
        """What the function returned, by the graph's names."""
        if isinstance(given, dict) and self.rename:
            return {name: given[self.rename.get(name, name)] for name in self.outputs}
        if isinstance(self.gives, str):
            return {self.gives: given}
        if not isinstance(given, tuple) or len(given) != len(self.gives):
            raise TypeError(f"{self.name}: a tuple of {', '.join(self.gives)} was to be returned, not {type(given)}")
        return dict(zip(self.gives, given, strict=True))


@dataclass
class PhaseTimer:
    """Seconds and tokens spent in each phase since the last :meth:`drain`."""

    seconds: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)

    def add(self, phase: str, seconds: float) -> None:
        """Count time for a phase."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def count_tokens(self, phase: str, tokens: float) -> None:
        """Count tokens that a phase worked on, for its rate."""
        self.tokens[phase] = self.tokens.get(phase, 0.0) + tokens

    def drain(self) -> dict[str, float]:
        """The figures as metrics (``time/<phase>_seconds``, ``tokens_per_second/<phase>``), and start anew."""
        result = {f"time/{phase}_seconds": seconds for phase, seconds in self.seconds.items()}
        for phase, tokens in self.tokens.items():
            if self.seconds.get(phase, 0.0) > 0:
                result[f"tokens_per_second/{phase}"] = tokens / self.seconds[phase]
        self.seconds, self.tokens = {}, {}
        return result


class Flow:
    """Calls in an order in which each finds what it needs.

    Args:
        calls: in any order; those that could run at the same time keep the order given.
        inputs: names of the values that are there from the start.

    Raises:
        ValueError: two calls give the same value, or one needs a value that nothing gives (a cycle shows as that, too).
    """

    def __init__(self, calls: Sequence[Call], inputs: Iterable[str]) -> None:
        self.inputs = tuple(inputs)
        self.calls = self._sorted(calls)

    def _sorted(self, calls: Sequence[Call]) -> tuple[Call, ...]:
        known, waiting, order = set(self.inputs), list(calls), []
        names = [name for call in calls for name in call.outputs]
        twice = {name for name in names if names.count(name) > 1 or name in known}
        if twice:
            raise ValueError(f"more than one call gives {', '.join(sorted(twice))}")
        while waiting:
            ready = next((call for call in waiting if known.issuperset(call.needs)), None)
            if ready is None:
                values = {*names, *self.inputs}
                missing = {
                    f"{call.name} needs "
                    + ", ".join(f"{n}{nearest(n, values - {n})}" for n in sorted(set(call.needs) - known))
                    for call in waiting
                }
                raise ValueError(f"the flow cannot run: {'; '.join(sorted(missing))}")
            waiting.remove(ready)
            order.append(ready)
            known.update(ready.outputs)
        return tuple(order)

    def __getitem__(self, name: str) -> Call:
        """The call of a name.

        Raises:
            KeyError: there is none; the nearest name is told.
        """
        names = {call.name: call for call in self.calls}
        if name not in names:
            raise KeyError(f"the flow has no call {name!r}{nearest(name, names)}; its calls: {', '.join(names)}")
        return names[name]

    def edit(
        self,
        change: Mapping[str, Mapping[str, Any]] = {},
        drop: Iterable[str] = (),
        add: Sequence[Call] = (),
        inputs: Iterable[str] | None = None,
    ) -> Flow:
        """Another flow: some calls with other fields, some left out, some more; it is checked when all is done.

        Args:
            change: fields of :class:`Call` by the call's name.
            drop: names of calls.
            add: further calls.
            inputs: other inputs than this flow's.

        Raises:
            KeyError: there is no call of that name.
            ValueError: as in :class:`Flow`.
        """
        dropped = {self[name].name for name in drop}
        changed = {self[name].name: replace(self[name], **dict(fields)) for name, fields in change.items()}
        calls = [changed.get(call.name, call) for call in self.calls if call.name not in dropped]
        return Flow([*calls, *add], self.inputs if inputs is None else inputs)

    def check(self, roles: Iterable[str], trained: Iterable[str] = ()) -> None:
        """Look for what cannot be meant.

        Args:
            roles: the names of the method's roles.
            trained: those that have an optimizer.

        Raises:
            ValueError: a call names a role that is none (the nearest is told) or trains one that is not trained, two
                calls train, a call behind the update needs what an iteration that is taken up again in the middle of
                its update does not have, a call has no function, or a value is never used.
        """
        known, trained = set(roles), set(trained)
        for call in self.calls:
            for role in [*call.roles, *(name for a in call.after for name in (a.source, a.target))]:
                if role not in known:
                    found = f"; the roles are {', '.join(sorted(known))}"
                    raise ValueError(f"{call.name}: there is no role {role!r}{nearest(role, known)}{found}")
            if call.run is None:
                raise ValueError(f"{call.name}: there is no function to run (run=...)")
            if call.kind == "train":
                for role in call.run.losses:
                    if role not in trained or role not in call.roles:
                        raise ValueError(f"{call.name}: {role} has a loss, but is not among the roles that it trains")
        self._check_update()
        used = {name for call in self.calls for name in call.needs}
        for call in self.calls:
            if call.kind in ("generate", "infer") and not used.intersection(call.outputs):
                raise ValueError(f"{call.name}: nothing uses {', '.join(call.outputs)}")

    def _check_update(self) -> None:
        """One call trains, on one batch, and what comes behind it can be done after a restart: a checkpoint in the
        middle of an update has its batch, and no other value.
        """
        trains = [number for number, call in enumerate(self.calls) if call.kind == "train"]
        if not trains:
            return
        first = self.calls[trains[0]]
        if len(trains) > 1:
            raise ValueError(
                f"{first.name} and {self.calls[trains[1]].name} both train: an optimizer step is one of each role, so "
                "give the losses of all roles to one call's Train"
            )
        if len(first.needs) != 1:
            raise ValueError(f"{first.name}: it trains on one batch, and needs {', '.join(first.needs)}")
        there = {*first.needs, *first.outputs}
        for call in self.calls[trains[0] + 1 :]:
            lost = [name for name in call.needs if name not in there]
            if lost:
                raise ValueError(
                    f"{call.name} comes behind {first.name} and needs {', '.join(lost)}, which an iteration that is "
                    f"taken up again in the middle of its update does not have: put the call in front of {first.name}, "
                    f"or what it needs into {first.needs[0]}"
                )
            there.update(call.outputs)

    def residency(self) -> list[tuple[str, frozenset[str]]]:
        """For each phase in order, what it needs in memory: its roles' parameters, by the role's name, and while they
        are trained their optimizers' states, as ``<role>_optimizer``.

        A host phase needs none. It is given what the phases before and behind it have in common, so that nothing
        leaves only to come back at once.
        """
        needed = [call.resident for call in self.calls]
        for i, call in enumerate(self.calls):
            if call.kind == "host" and not call.after:
                needed[i] = needed[i - 1] & needed[(i + 1) % len(needed)]
        return [(call.name, groups) for call, groups in zip(self.calls, needed, strict=True)]

    def run(
        self,
        values: Mapping[str, Any],
        roles: Mapping[str, Any],
        world: World,
        timer: PhaseTimer,
        *,
        train: Callable[[Call, Any], Any] | None = None,
        on_call: Callable[[Call], None] | None = None,
        on_values: Callable[[Mapping[str, Any]], None] | None = None,
        goes_on: Callable[[], bool] | None = None,
        first: str | None = None,
        step: int = 0,
        of_all_ranks: bool = False,
    ) -> dict[str, Any]:
        """Run the calls in order.

        Rows of one data rank that a call for all rows needs are gathered and joined, in the ranks' order. A rank
        without rows (its value is None) infers nothing, but takes part where models are gathered layer by layer.

        Args:
            values: the inputs by name; with ``first``, what the calls from there on need, of all data ranks.
            roles: by name; those that the run does not have are missing.
            world: the data ranks.
            timer: gets each phase's seconds.
            train: runs the training calls.
            on_call: called before each phase (residency, heartbeats).
            on_values: called with the values that a phase gave.
            goes_on: asked behind each training call whether it came to its end; an interrupted one ends the iteration:
                its averages and the calls behind it come when it is taken up again.
            first: name of the call to begin with (an iteration that is taken up again); None for all.
            step: optimizer steps taken so far, for ``when``.
            of_all_ranks: whether the inputs are those of all data ranks already.

        Returns:
            All values by name.
        """
        known, gathered = dict(values), dict(values) if first is not None or of_all_ranks else {}
        begin = [call.name for call in self.calls].index(first) if first is not None else 0
        for call in self.calls[begin:]:
            if call.when is not None and not call.when(step):
                known.update(dict.fromkeys(call.outputs))
                gathered.update(dict.fromkeys(call.outputs))
                continue
            if on_call is not None:
                on_call(call)
            started = time.perf_counter()
            there = [roles.get(name) for name in call.roles]
            with contextlib.ExitStack() as stack:
                for role in there:
                    if role is not None:
                        stack.enter_context(role.engine.awake() if call.kind == "generate" else role.engine.in_passes())
                if call.sees_all_rows:
                    self._gather(call, known, gathered, world)
                    needed = [gathered[name] for name in call.needs]
                    given = call.named(train(call, *needed)) if call.kind == "train" and train else call(there, needed)
                    gathered.update(given)
                elif call.kind == "infer":
                    given = self._infer(call, there, [known[name] for name in call.needs])
                else:
                    given = call(there, [known[name] for name in call.needs])
                known.update(given)
                if call.kind == "train" and goes_on is not None and not goes_on():
                    timer.add(call.name, time.perf_counter() - started)
                    return known
                for average in call.after:
                    roles[average.target].engine.average(roles[average.source].engine, average.share)
            timer.add(call.name, time.perf_counter() - started)
            if on_values is not None:
                on_values(given)
        return known

    @staticmethod
    def _infer(call: Call, roles: Sequence[Any], values: Sequence[Any]) -> dict[str, Any]:
        if not any(value is None for value in values):
            return call(roles, values)
        for role in roles:
            if role is not None:  # other data ranks may gather layers from this one
                role.engine.infer_pass([], _no_rows, _no_rows)
        return dict.fromkeys(call.outputs)

    @staticmethod
    def _gather(call: Call, known: Mapping[str, Any], gathered: dict[str, Any], world: World) -> None:
        """Bring what the call needs of all data ranks into ``gathered``, in one message."""
        names = [name for name in call.needs if name not in gathered]
        if not names:
            return
        parts = world.all_gather_object(tuple(known[name] for name in names), f"rows for {call.name}")
        for name, pieces in zip(names, zip(*parts, strict=True), strict=True):
            gathered[name] = join([piece for piece in pieces if piece is not None])


def join(pieces: Sequence[Any]) -> Any:
    """The rows of several data ranks as one: arrays ``[b]`` or ``[b, r]`` (padded with zeros to the widest), lists,
    dictionaries of these, and whatever has a ``join`` of its own; None where there is nothing.

    Raises:
        TypeError: it cannot be joined.
    """
    if not pieces:
        return None
    first = pieces[0]
    if len(pieces) == 1:
        return first
    if isinstance(first, np.ndarray):
        if first.ndim == 1:
            return np.concatenate(pieces)
        width = max(piece.shape[1] for piece in pieces)
        return np.concatenate([np.pad(piece, ((0, 0), (0, width - piece.shape[1]))) for piece in pieces])
    if isinstance(first, list):
        return [item for piece in pieces for item in piece]
    if isinstance(first, dict):
        return {key: join([piece[key] for piece in pieces]) for key in first}
    if hasattr(type(first), "join"):
        return type(first).join(pieces)
    raise TypeError(f"rows of data ranks as {type(first).__name__} cannot be joined: give arrays, lists or a Batch")


def optimizer_of(role: str) -> str:
    """The name of a role's optimizer states among what may be resident."""
    return f"{role}_optimizer"


def _no_rows(*_: Any) -> Any:
    """Stands for the functions of a pass over no micro batch."""
    raise AssertionError("a pass over nothing reads nothing")
