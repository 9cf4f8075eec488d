"""Offloading: what a phase does not need leaves memory, and comes back before the phase that does.

Tensors are held in named *groups*: the parameters of a role (``actor``, ``critic``, ``reference``, ``reward``) and the
optimizer states of the trained ones (``actor_optimizer``, ``critic_optimizer``). ``offload_level`` says which groups
may leave, the dataflow says which ones each phase needs, and :class:`Residency` moves whole groups once per phase, and
only those in which a phase differs from the one before it. How they move is a back end's business:
:class:`~alignment.parallel.offload_cpu.MappedFiles` or :class:`~alignment.parallel.offload_gpu.PinnedMemory`.

    residency = Residency("freeze_model optimizer", PPO_ITERATION.residency(), PPO_BETWEEN, MappedFiles(folder))
    residency.add("reference", reference.model.parameters, frozen=True)       # leaves at once
    residency.enter("reference_logprobs")                                     # comes back
    residency.drain()        # {"offload/reference_logprobs_bytes_in": ..., "offload/reference_logprobs_seconds": ...}

The tensors stay the same objects, and every bit of them comes back: results do not depend on offloading.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

#: What each word of ``offload_level`` allows to leave, of PPO; of another method see
#: :func:`alignment.flow.method.offload_levels`.
LEVELS: dict[str, tuple[str, ...]] = {
    "freeze_model": ("reference", "reward"),
    "optimizer": ("actor_optimizer", "critic_optimizer"),
    "train_model": ("actor", "critic"),
}
#: The name under which moves are counted that happen while groups are added.
START = "start"


class Backend(Protocol):
    """Moves the tensors of a group. A group is one string for all of a run."""

    def move_out(self, group: str, tensors: Sequence[Any], frozen: bool) -> int:
        """Give up the memory of the tensors; returns the bytes that had to be copied for that.

        Args:
            group: its name.
            tensors: all its tensors that exist now; there may be more than last time.
            frozen: they never change.
        """

    def move_in(self, group: str, tensors: Sequence[Any]) -> int:
        """Bring the tensors back and wait until they are there; returns the bytes that were copied."""

    def prefetch(self, group: str) -> None:
        """Begin to bring a group back that the next phase needs; returns at once."""

    def close(self) -> None:
        """Give up what the back end holds outside the tensors; they stay readable."""


@dataclass
class _Group:
    tensors: Callable[[], Iterable[Any]]
    frozen: bool
    managed: bool
    inside: bool = True


@dataclass
class _Moves:
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: float = 0.0


class Residency:
    """Which groups are in memory, phase after phase.

    Args:
        levels: words of :data:`LEVELS`, separated by spaces.
        cycle: the phases of an iteration in order, each with the groups it needs; the first follows the last.
        between: the same for what happens between iterations, in no order.
        backend: moves the tensors.
        allowed: what each word allows to leave.

    Raises:
        ValueError: a level is unknown.
    """

    def __init__(
        self,
        levels: str,
        cycle: Sequence[tuple[str, frozenset[str]]],
        between: Mapping[str, frozenset[str]],
        backend: Backend,
        allowed: Mapping[str, Sequence[str]] = LEVELS,
    ) -> None:
        words = levels.split()
        unknown = sorted(set(words) - set(allowed))
        if unknown:
            raise ValueError(f"unknown offload level {unknown[0]!r}; the levels are {', '.join(allowed)}")
        self.managed = frozenset(group for word in words for group in allowed[word])
        self.backend = backend
        self._needed = {**dict(cycle), **between}
        names = [name for name, _ in cycle]
        self._next = dict(zip(names, names[1:] + names[:1], strict=True))
        self._groups: dict[str, _Group] = {}
        self._moves: dict[str, _Moves] = {}

    def add(self, group: str, tensors: Callable[[], Iterable[Any]], frozen: bool = False) -> None:
        """Take charge of a group; where its level is on it leaves memory at once.

        Args:
            group: its name, as the phases call it.
            tensors: gives the group's tensors that exist now; an optimizer's appear with its first step.
            frozen: whether they never change, so that they are copied out only once.

        Raises:
            ValueError: there is a group of that name already.
            AlignmentError: the place that offloaded tensors go to is full or cannot be used.
        """
        if group in self._groups:
            raise ValueError(f"there is a group {group!r} already")
        self._groups[group] = _Group(tensors, frozen, group in self.managed)
        if group in self.managed:
            self._move(START, leave=[group], come=[])

    def enter(self, phase: str) -> None:
        """Make exactly what ``phase`` needs resident, of the groups that may leave.

        Raises:
            ValueError: the phase is unknown.
            AlignmentError: as in :meth:`add`; nothing is lost by it.
        """
        if phase not in self._needed:
            raise ValueError(f"unknown phase {phase!r}; known are {', '.join(self._needed)}")
        needed = self._needed[phase]
        managed = {name: group for name, group in self._groups.items() if group.managed}
        leave = [name for name, group in managed.items() if group.inside and name not in needed]
        come = [name for name, group in managed.items() if not group.inside and name in needed]
        self._move(phase, leave, come)
        following = self._needed[self._next[phase]] if phase in self._next else frozenset()
        for name, group in managed.items():
            if not group.inside and name in following:
                self.backend.prefetch(name)

    @contextlib.contextmanager
    def using(self, *groups: str) -> Iterator[None]:
        """Bring groups in for the body, beside what the current phase has there, and let them leave again after it.

        Unknown names are passed over: a run may have no reward model.
        """
        known = [(name, self._groups[name]) for name in groups if name in self._groups]
        come = [name for name, group in known if group.managed and not group.inside]
        self._move("+".join(come), [], come)
        try:
            yield
        finally:
            self._move("+".join(come), come, [])

    def resident(self) -> frozenset[str]:
        """The groups that are in memory."""
        return frozenset(name for name, group in self._groups.items() if group.inside)

    def tensors(self) -> dict[str, list[Any]]:
        """Every group's tensors that exist now."""
        return {name: list(group.tensors()) for name, group in self._groups.items()}

    def drain(self) -> dict[str, float]:
        """What was moved since the last call, as metrics, and start anew.

        ``offload/<phase>_bytes_in``, ``_bytes_out`` (copied out; what had not changed is only dropped) and
        ``_seconds``, for each phase at whose beginning something moved.
        """
        result: dict[str, float] = {}
        for phase, moves in self._moves.items():
            result[f"offload/{phase}_bytes_in"] = float(moves.bytes_in)
            result[f"offload/{phase}_bytes_out"] = float(moves.bytes_out)
            result[f"offload/{phase}_seconds"] = moves.seconds
        self._moves = {}
        return result

    def close(self) -> None:
        """End offloading: nothing more moves, and the back end's files go. The tensors stay valid."""
        for group in self._groups.values():
            group.managed = False
        self.backend.close()

    def _move(self, phase: str, leave: list[str], come: list[str]) -> None:
        if not leave and not come:
            return
        began, moves = time.perf_counter(), self._moves.setdefault(phase, _Moves())
        # Room is made before it is taken.
        for name in leave:
            group = self._groups[name]
            moves.bytes_out += self.backend.move_out(name, list(group.tensors()), group.frozen)
            group.inside = False
        for name in come:
            group = self._groups[name]
            moves.bytes_in += self.backend.move_in(name, list(group.tensors()))
            group.inside = True
        moves.seconds += time.perf_counter() - began


def build_residency(
    levels: str,
    cycle: Sequence[tuple[str, frozenset[str]]],
    between: Mapping[str, frozenset[str]],
    folder: str | Path,
    on_cpu: bool,
    allowed: Mapping[str, Sequence[str]] = LEVELS,
) -> Residency | None:
    """The :class:`Residency` of a run, or None where ``levels`` is empty.

    Args:
        levels, cycle, between: as in :class:`Residency`.
        folder: where files go on a CPU.
        on_cpu: whether Paddle computes on the CPU.
        allowed: as in :class:`Residency`.

    Raises:
        AlignmentError: the folder cannot be used.
    """
    if not levels.strip():
        return None
    backend: Backend
    if on_cpu:
        from alignment.parallel.offload_cpu import MappedFiles

        backend = MappedFiles(folder)
    else:
        from alignment.parallel.offload_gpu import PinnedMemory

        backend = PinnedMemory()
    return Residency(levels, cycle, between, backend, allowed)
