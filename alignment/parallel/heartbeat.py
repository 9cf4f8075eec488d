"""Signs of life of a run's processes: where each stands, in ``output_dir/heartbeat/rank-R.json``.

A heartbeat says the phase that a rank is in (the trainers name it), the optimizer step, and where its main thread
stands in the program, which a thread beside it looks up by itself. So it tells a rank that works from one that waits
for others and from one that stands still, without any help from the code that hangs.

``alignment.parallel.monitor`` writes and reads them; this module knows what they are.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

#: Phases in which one rank may work for hours while the others wait: tokenising, loading, writing a checkpoint. Who
#: moves is not late in them, and computing, reading and writing in one place count as moving.
LONG_PHASES = frozenset({"start", "data", "models", "save", "checkpoint", "weights"})

_STDLIB = os.path.dirname(os.__file__) + os.sep
_INSTALLED = tuple(os.sep + folder + os.sep for folder in ("site-packages", "dist-packages"))
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
# Whoever's code the main thread is in when it waits for other ranks.
_COLLECTIVES = (os.path.join(_PACKAGE, "parallel") + os.sep, os.sep + os.path.join("paddle", "distributed") + os.sep)


@dataclass(frozen=True)
class Member:
    """A process of the run, as it introduces itself at the start.

    Attributes:
        rank: its rank.
        host: its host's name, for people.
        pid: its process id.
        machine: equal for two processes that see each other's process ids.
        started: when the process began (Linux: clock ticks since boot), so that a process id used again is recognised;
            0 where unknown.
        clock: its wall clock (Unix seconds) at a moment that is the same for all ranks.
    """

    rank: int
    host: str
    pid: int
    machine: str
    started: int
    clock: float

    @classmethod
    def here(cls, rank: int) -> Member:
        """This process. Call it right after a barrier, for the sake of ``clock``."""
        pid = os.getpid()
        return cls(rank, socket.gethostname(), pid, machine_name(), start_time(pid) or 0, time.time())

    def is_gone(self) -> bool:
        """Whether the process has ended. Only for one on this machine (see ``machine``)."""
        return has_ended(self.pid, self.started)

    def __str__(self) -> str:
        return f"rank {self.rank} on host {self.host} (process {self.pid})"


def has_ended(pid: int, started: int) -> bool:
    """Whether a process of this machine has ended.

    Args:
        pid: its process id.
        started: its :func:`start_time`, 0 where unknown.
    """
    if started:
        return start_time(pid) != started
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def machine_name() -> str:
    """The host, boot and process-id namespace: containers may share a host's name."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def start_time(pid: int) -> int | None:
    """Start time (Linux: clock ticks since boot) of a living process; None if there is none, or it is a zombie, or
    there is no /proc.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command's name, in brackets, may hold anything; behind it come the state and 18 fields, then the start time.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


@dataclass(frozen=True)
class Place:
    """Where a thread stands.

    Attributes:
        where: the innermost line of this package or of the user's own code, such as
            ``"alignment/ppo/update.py:88 (run)"``.
        collective: whether it is inside a call that waits for other ranks.
        fingerprint: of the whole stack; while it stays the same the thread has not moved.
    """

    where: str
    collective: bool
    fingerprint: int


def find_place(thread: int) -> Place | None:
    """Look up where a thread of this process stands.

    Args:
        thread: its ``ident``.

    Returns:
        The place; None when the thread has ended.
    """
    frame = sys._current_frames().get(thread)
    lines: list[tuple[str, int, str]] = []
    while frame is not None:
        lines.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    if not lines:
        return None
    own = next((line for line in lines if _tells(line[0])), None)
    # Waiting is done by the standard library's sockets and queues on behalf of whoever called them.
    caller = next((name for name, _, _ in lines if not _is_stdlib(name)), "")
    collective = any(part in caller for part in _COLLECTIVES)
    return Place(_shown(own or lines[0]), collective, hash(tuple(lines)))


def _tells(name: str) -> bool:
    """Whether a file is worth naming: this package's or the user's own, but not what waiting is made of."""
    if name.startswith(_PACKAGE):
        return not name.startswith(_COLLECTIVES[0])
    return not name.startswith((_STDLIB, "<")) and not any(part in name for part in _INSTALLED)


def _is_stdlib(name: str) -> bool:
    return name.startswith((_STDLIB, "<")) and not any(part in name for part in _INSTALLED)


def _shown(line: tuple[str, int, str]) -> str:
    name, number, function = line
    name = os.path.relpath(name, os.path.dirname(_PACKAGE.rstrip(os.sep))) if name.startswith(_PACKAGE) else name
    return f"{name}:{number} ({function})"


@dataclass
class Beat:
    """What a heartbeat file holds.

    Attributes:
        rank, host, pid: who.
        phase: what it does: ``start``, ``data``, ``models``, ``train``, ``generate``, ``update``, ``evaluate``,
            ``save``, ...
        step: optimizer steps done, or None before the first phase that says so.
        phase_seconds: how long it has been in the phase.
        waiting: what it waits in for other ranks, or None.
        where: the line of the program.
        still_seconds: how long its main thread has not moved.
        state: ``running``, ``finished``, ``failed`` (an error of its own) or ``stopped`` (because of another rank).
        error: the error, or "".
        beats: counts this rank's heartbeats.
        time: Unix seconds.
    """

    rank: int
    host: str
    pid: int
    phase: str
    step: int | None
    phase_seconds: float
    waiting: str | None
    where: str
    still_seconds: float
    state: str
    error: str
    beats: int
    time: float

    def describe(self, age: float) -> str:
        """Where the rank was last seen, in words.

        Args:
            age: seconds since this beat.
        """
        step = "" if self.step is None else f", optimizer step {self.step}"
        waiting = f", waiting for other ranks in {self.waiting}" if self.waiting else ""
        where = f", at {self.where}" if self.where else ""
        return (
            f"last seen {max(0.0, age):.0f} s ago in phase '{self.phase}' (for {self.phase_seconds:.0f} s{step})"
            f"{waiting}{where}"
        )


def beat_path(folder: Path, rank: int) -> Path:
    """The heartbeat file of a rank."""
    return folder / f"rank-{rank}.json"


def write_beat(folder: Path, beat: Beat) -> None:
    """Write a rank's file by an atomic rename; it need not survive a power cut, so nothing is flushed to the disk.

    Raises:
        OSError: the folder cannot be written.
    """
    target = beat_path(folder, beat.rank)
    # Both the monitor's thread and the main thread write.
    temporary = target.with_name(f".{target.name}.{beat.pid}.{threading.get_ident()}")
    temporary.write_text(json.dumps(asdict(beat)) + "\n", encoding="utf-8")
    os.replace(temporary, target)


def read_beat(folder: Path, member: Member) -> Beat | None:
    """Read a rank's file; None when there is none of this very process here."""
    try:
        beat = Beat(**json.loads(beat_path(folder, member.rank).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return beat if (beat.host, beat.pid) == (member.host, member.pid) else None
