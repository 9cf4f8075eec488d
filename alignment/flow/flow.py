"""An iteration of RLHF as a small graph of model calls.

The graph says what is computed from what; from it follow the order, which roles must be resident when (what offloading
needs), and the phase timings. PPO's own graph is :data:`PPO_ITERATION`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ModelCall:
    """One call of one or more roles.

    Attributes:
        name: of the phase, as it appears in the metrics.
        kind: ``"generate"``, ``"infer"`` (no gradient), ``"train"``, or ``"host"`` for a step without a model.
        roles: what must be resident while it runs.
        needs: names of the values it takes, in the order of its arguments.
        gives: name of the value it returns.
    """

    name: str
    kind: Literal["generate", "infer", "train", "host"]
    roles: tuple[str, ...]
    needs: tuple[str, ...]
    gives: str


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


class Dataflow:
    """Model calls in an order in which each finds what it needs.

    Args:
        calls: in any order.
        inputs: names of the values that are there from the start.

    Raises:
        ValueError: two calls give the same value, or one needs a value that nothing gives (a cycle shows as that, too).
    """

    def __init__(self, calls: Sequence[ModelCall], inputs: Iterable[str]) -> None:
        self.inputs = tuple(inputs)
        self.calls = self._sorted(calls)

    def _sorted(self, calls: Sequence[ModelCall]) -> tuple[ModelCall, ...]:
        known, waiting, order = set(self.inputs), list(calls), []
        names = [call.gives for call in calls]
        twice = {name for name in names if names.count(name) > 1 or name in known}
        if twice:
            raise ValueError(f"more than one call gives {', '.join(sorted(twice))}")
        while waiting:
            ready = next((call for call in waiting if known.issuperset(call.needs)), None)
            if ready is None:
                missing = {f"{call.name} needs {', '.join(sorted(set(call.needs) - known))}" for call in waiting}
                raise ValueError(f"the dataflow cannot run: {'; '.join(sorted(missing))}")
            waiting.remove(ready)
            order.append(ready)
            known.add(ready.gives)
        return tuple(order)

    def residency(self) -> list[tuple[str, frozenset[str]]]:
        """For each phase in order, what it needs in memory: its roles' parameters, by the role's name, and while they
        are trained their optimizers' states, as ``<role>_optimizer``.

        A host phase needs none. It is given what the phases before and behind it have in common, so that nothing
        leaves only to come back at once.
        """
        needed = [
            frozenset(call.roles) | {optimizer_of(role) for role in call.roles if call.kind == "train"}
            for call in self.calls
        ]
        for i, call in enumerate(self.calls):
            if call.kind == "host":
                needed[i] = needed[i - 1] & needed[(i + 1) % len(needed)]
        return [(call.name, groups) for call, groups in zip(self.calls, needed, strict=True)]

    def run(
        self,
        functions: Mapping[str, Callable[..., Any]],
        values: Mapping[str, Any],
        timer: PhaseTimer,
        on_phase: Callable[[ModelCall], None] | None = None,
        first: str | None = None,
    ) -> dict[str, Any]:
        """Run the calls in order.

        Args:
            functions: by the call's name.
            values: the inputs by name; with ``first``, what the calls from there on need.
            timer: gets each phase's seconds.
            on_phase: called before each phase (residency, heartbeats).
            first: name of the call to begin with (an iteration that is taken up again); ``None`` for all.

        Returns:
            All values by name.
        """
        known = dict(values)
        begin = [call.name for call in self.calls].index(first) if first is not None else 0
        for call in self.calls[begin:]:
            if on_phase is not None:
                on_phase(call)
            started = time.perf_counter()
            known[call.gives] = functions[call.name](*(known[name] for name in call.needs))
            timer.add(call.name, time.perf_counter() - started)
        return known


def optimizer_of(role: str) -> str:
    """The name of a role's optimizer states among what may be resident."""
    return f"{role}_optimizer"


PPO_ITERATION = Dataflow(
    [
        ModelCall("generate", "generate", ("actor",), ("prompts",), "rollout"),
        ModelCall("actor_logprobs", "infer", ("actor",), ("rollout",), "logprobs"),
        ModelCall("reference_logprobs", "infer", ("reference",), ("rollout",), "ref_logprobs"),
        ModelCall("reward_scores", "infer", ("reward",), ("rollout",), "scores"),
        ModelCall("critic_values", "infer", ("critic",), ("rollout",), "values"),
        ModelCall("advantages", "host", (), ("rollout", "logprobs", "ref_logprobs", "scores", "values"), "experience"),
        ModelCall("update", "train", ("actor", "critic"), ("experience",), "stats"),
    ],
    inputs=("prompts",),
)
"""One iteration: sample, the four forwards without gradient, advantages, learn.

``update`` needs both trained models and both optimizers' states throughout: its steps take turns, critic and actor in
each window, and moving either of them between two windows would move both once per optimizer step.
"""

PPO_BETWEEN: dict[str, frozenset[str]] = {
    "evaluation": frozenset({"actor", "reward"}),
    "checkpoint": frozenset({"actor", "critic", optimizer_of("actor"), optimizer_of("critic")}),
    "weights": frozenset({"actor", "critic"}),
}
"""What is needed between iterations: to evaluate, to write or read a checkpoint, to write, read or compare the trained
weights alone.
"""
