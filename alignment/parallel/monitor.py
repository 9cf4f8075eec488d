"""`Monitor`: a thread in each process of a run that gives signs of life and ends the process when the run has failed.

    with world.guard(), Monitor(world, output_dir / "heartbeat", hang_timeout=1800) as monitor:
        world.phase("update", step)      # wherever the work changes
        ...

A failing rank is normally heard of through an exception: the control channel and the CPU backend raise
:class:`~alignment.parallel.control.RankFailure` in whoever waits for it, and :meth:`World.guard` passes it on. The
monitor adds the rest:

- the message gets the host of the rank that failed and the phase it was last seen in;
- a rank that computes, or is blocked inside a collective of gloo or nccl where no exception reaches it, ends as well;
- a rank that keeps the others waiting for longer than ``hang_timeout`` fails the run. Who waits is known by where it
  stands: in a call of the control channel or of ``paddle.distributed``, or, since a GPU's collectives are waited for
  wherever a result is read, anywhere without moving while another rank does. A rank that tokenises, loads or writes a
  checkpoint keeps nobody waiting as long as it computes, reads or writes;
- so does the end of the launcher, which would leave its ranks behind.

It first makes waiting calls give up, so that the exception takes its ordinary way; if the process is still at work
after that, it prints the message and ends the process at once. How long that takes:

| what happened | the others have ended |
|---|---|
| a process died, failed, or lost step with the others | within 10 s (usually 3 s) |
| a process hangs | ``hang_timeout`` + 10 s after the others began to wait for it |
| the launcher was killed | within 35 s: up to 30 s to finish the step and save, as after SIGTERM |

A host that vanishes without closing its connections counts as a process that hangs. Checkpoints are written beside and
renamed, so they stay whole however a process ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from alignment.log import get_logger
from alignment.parallel import cpu_backend
from alignment.parallel.control import RankFailure
from alignment.parallel.heartbeat import LONG_PHASES, Beat, Member, find_place
from alignment.parallel.last_seen import LastSeen, listed

if TYPE_CHECKING:
    from alignment.parallel.world import World

EXIT_FAILURE = 2  # what the command line gives for every AlignmentError
EXIT_INTERRUPTED = 130
POLL = 0.5  # seconds between two looks
INTERVAL = 2.0  # seconds between two heartbeats
SPACING = 0.1  # seconds between two heartbeats at least, however quickly the phases change
GRACE = 2.0  # seconds for the exception to end the process in the ordinary way
ORPHAN_GRACE = 30.0  # the same after the launcher's end: time to finish the step and save
_SURE = 1.0  # seconds for a dead process's last words to come through the channel


@dataclass(frozen=True)
class _Verdict:
    """The run has failed: why, how long the main thread has to end by itself, and the exit status otherwise."""

    reason: str
    grace: float = GRACE
    status: int = EXIT_FAILURE
    terminate: bool = False


class Monitor:
    """Watches the run from one of its processes, for as long as it is entered. Every rank enters it at the same time.

    Args:
        world: the processes of the run; in a run of one that no launcher started the monitor does nothing.
        folder: where the heartbeats go, one file per rank; None for none.
        hang_timeout: seconds that a rank may stay in one phase while others wait for it; 0 for ever.
        interval: seconds between two heartbeats.
        orphan_grace: seconds to finish the step and save after the launcher's end.
        end: ends the process with a status (``os._exit``).
    """

    def __init__(
        self,
        world: World,
        folder: str | Path | None,
        *,
        hang_timeout: float = 1800.0,
        interval: float = INTERVAL,
        orphan_grace: float = ORPHAN_GRACE,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._world, self._channel = world, world.channel
        self._folder = Path(folder) if folder is not None else None
        self._limit, self._interval, self._end = hang_timeout, interval, end
        self._orphan_grace = orphan_grace
        self._main = threading.get_ident()
        self._counters = Path(f"/proc/self/task/{threading.get_native_id()}/io")
        self._launcher = _launcher()
        self._me = Member.here(world.process)
        self._ranks = LastSeen(None, [self._me], 0)
        self._phase: tuple[str, int | None, float] = ("start", None, time.monotonic())
        self._fingerprint: object = None
        self._moved = time.monotonic()
        self._waiting: str | None = None
        self._where = ""
        self._beats = 0
        self._gone_since: dict[int, float] = {}
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    # -- for the rank itself -------------------------------------------------------------------------------------

    def phase(self, name: str, step: int | None = None) -> None:
        """Note what this rank does from now on.

        Args:
            name: ``"generate"``, ``"update"``, ``"save"``, ...
            step: optimizer steps done; None keeps the last one.
        """
        self._phase = (name, self._phase[1] if step is None else step, time.monotonic())
        self._wake.set()

    def __enter__(self) -> Monitor:
        if self._channel is None and self._launcher is None:
            return self
        self._world.barrier()
        self._me = Member.here(self._world.process)
        members = self._world.all_processes(self._me, "introduction")
        self._ranks = LastSeen(self._folder, members, self._world.process)
        self._look()
        self._beat("running")
        self._world.barrier()  # from here on there is a heartbeat of everybody
        self._world.monitor = self
        self._thread = threading.Thread(target=self._watch, name="alignment-monitor", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        if error is None:
            self.phase("end")
            try:
                # Nobody stops watching before everybody has come to the end.
                self._world.all_processes(None, "end of the run")
            except RankFailure as failure:
                error = failure
        with self._lock:
            self._closed.set()
        self._wake.set()
        self._world.monitor = None
        if error is None:
            self._beat("finished")
            return
        if isinstance(error, RankFailure):
            self._beat("stopped", str(error).removeprefix(f"rank {self._me.rank} stops because "))
        else:
            self._beat("failed", f"{type(error).__name__}: {error}")
        text = self._explain_error(error)
        if text is not None:
            raise RankFailure(text) from error

    # -- the thread ----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        poll = min(POLL, self._limit / 4) if self._limit > 0 else POLL
        written, phase = time.monotonic(), None
        while not self._closed.is_set():
            self._look()
            # A new phase is written at once: it may be the one that the process dies in.
            if phase != self._phase or time.monotonic() - written >= self._interval:
                written, phase = time.monotonic(), self._phase
                self._beat("running")
            verdict = self._verdict()
            if verdict is not None:
                self._stop(verdict)
                return
            self._closed.wait(min(poll, SPACING))
            self._wake.wait(max(0.0, poll - SPACING))
            self._wake.clear()

    def _look(self) -> None:
        """See where the main thread stands, and whether it has moved since the last look."""
        place = find_place(self._main)
        if place is None:
            return
        exchanges, label = (self._channel.exchanges, self._channel.waiting) if self._channel is not None else (0, None)
        waits = label is not None or place.collective
        fingerprint = (place.fingerprint, exchanges, self._phase[2], () if waits else self._signs_of_work())
        if fingerprint != self._fingerprint:
            self._fingerprint, self._moved = fingerprint, time.monotonic()
        self._where = place.where
        self._waiting = repr(label) if label is not None else "a collective operation" if place.collective else None

    def _signs_of_work(self) -> tuple[object, ...]:
        """CPU time, bytes read and bytes written of the main thread in a phase that may take hours: who waits for
        workers that tokenise, or writes a large file, stays in one place, but computes or writes now and then. In other
        phases a change of place is asked for: to wait for a GPU takes CPU time, too.
        """
        if self._phase[0] not in LONG_PHASES:
            return ()
        signs: list[object] = []
        if hasattr(time, "pthread_getcpuclockid"):
            signs.append(time.clock_gettime(time.pthread_getcpuclockid(self._main)))
        with contextlib.suppress(OSError):  # a kernel that does not count
            signs.append(self._counters.read_bytes())
        return tuple(signs)

    def _verdict(self) -> _Verdict | None:
        if self._launcher is not None and os.getppid() != self._launcher:
            reason = f"its launcher (process {self._launcher}) has ended"
            return _Verdict(reason, self._orphan_grace, EXIT_INTERRUPTED, terminate=True)
        failure = self._channel.peek_failure() if self._channel is not None else None
        if failure is None:
            failure = self._gone() or self._hang()
        return None if failure is None else _Verdict(failure)

    def _stop(self, verdict: _Verdict) -> None:
        """End the process: by an exception in the main thread if that can be had in time, else at once."""
        reason = self._ranks.explain(verdict.reason)
        text = f"rank {self._me.rank} stops because {reason}"
        if verdict.terminate:
            get_logger().warning("%s", text)
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._beat("stopped", reason)
            if self._channel is not None:
                self._channel.abort(reason)
            cpu_backend.fail(reason)
        if self._closed.wait(verdict.grace):
            return
        with self._lock:
            if not self._closed.is_set():
                say(self._me.rank, text)
                self._end(verdict.status)

    # -- verdicts ------------------------------------------------------------------------------------------------

    def _gone(self) -> str | None:
        """A process that has been gone for so long that no last words of it can be on their way."""
        now = time.monotonic()
        for member in self._ranks.gone():
            if now - self._gone_since.setdefault(member.rank, now) >= _SURE:
                return self._ranks.ended(member)
        return None

    def _hang(self) -> str | None:
        """Somebody for whom this rank has waited too long; or the whole run standing still."""
        still, limit = time.monotonic() - self._moved, self._limit
        if limit <= 0 or still <= limit or not self._ranks.others:
            return None
        late, moving, unknown, frozen, waiting = [], [], [], [], ""
        for member in self._ranks.others:
            beat = self._ranks.read(member)
            if beat is None:
                unknown.append(member)
                continue
            age = self._ranks.age(member, beat)
            stands = beat.still_seconds + age > limit
            stays = beat.still_seconds if beat.phase in LONG_PHASES else beat.phase_seconds
            if beat.waiting is None and stays + age > limit:
                late.append((member, beat.describe(age)))
                moving += [] if stands else late[-1:]
            if stands:
                frozen.append((member, beat.describe(age)))
                if beat.waiting is not None:
                    waiting = waiting or _waits(member.rank, beat.still_seconds + age, beat.waiting, limit)
        waits = _waits(self._me.rank, still, self._waiting or f"a call at {self._where}", limit)
        if self._waiting is None and moving and self._phase[0] not in LONG_PHASES:
            # To read a result from a GPU is to wait for all whose collectives it depends on.
            return f"{listed(moving)}; {waits} for it"
        if self._waiting is None and waiting:
            return f"{listed([(self._me, self._now().describe(0.0))])}; {waiting} for it"
        if self._waiting is not None and late:
            return f"{listed(late)}; {waits} for it"
        if self._waiting is not None and unknown and self._phase[0] not in LONG_PHASES:
            names = [(member, "last phase unknown, " + self._ranks.unknown()) for member in unknown]
            return f"one of these does not come: {listed(names)}; {waits}"
        if len(frozen) == len(self._ranks.others):
            frozen.append((self._me, self._now().describe(0.0)))
            return f"no rank has moved for {limit:g} s (hang_timeout): {listed(frozen)}"
        return None

    def _explain_error(self, error: BaseException) -> str | None:
        """The message of an exception that another rank has caused; None for one of this rank's own."""
        ours = isinstance(error, RankFailure)
        if not ours and not isinstance(error, (RuntimeError, OSError)):
            return None
        text = str(error)
        if ours and (self._ranks.says_where(text) or self._ranks.blamed(text)):
            return self._ranks.explain(text)
        # A collective that broke does not say for whom; who ended does.
        deadline = time.monotonic() + _SURE
        while True:
            cause = self._channel.peek_failure() if self._channel is not None else None
            gone = self._ranks.gone()
            if cause is None and gone:
                cause = self._ranks.ended(gone[0])
            if cause is not None:
                here = "" if ours else f"{type(error).__name__}: "
                return self._ranks.explain(f"rank {self._me.rank} stops because {cause} ({here}{text})")
            if time.monotonic() > deadline:
                return text if ours else None
            time.sleep(0.05)

    # -- heartbeats ----------------------------------------------------------------------------------------------

    def _now(self, state: str = "running", error: str = "") -> Beat:
        """Where this rank is."""
        name, step, since = self._phase
        now = time.monotonic()
        return Beat(
            rank=self._me.rank,
            host=self._me.host,
            pid=self._me.pid,
            phase=name,
            step=step,
            phase_seconds=round(now - since, 3),
            waiting=self._waiting,
            where=self._where,
            still_seconds=round(now - self._moved, 3),
            state=state,
            error=error[:2000],
            beats=self._beats,
            time=time.time(),
        )

    def _beat(self, state: str, error: str = "") -> None:
        self._beats += 1
        self._ranks.write(self._now(state, error))


def _waits(rank: int, seconds: float, where: str, limit: float) -> str:
    return f"rank {rank} has waited {seconds:.0f} s in {where} (hang_timeout is {limit:g} s)"


def _launcher() -> int | None:
    """The process id of ``paddle.distributed.launch``, if that has started this process."""
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        return None
    return parent if b"paddle.distributed.launch" in command or b"paddle/distributed/launch" in command else None


def say(rank: int, text: str) -> None:
    """Print an error past Python's streams, whose locks the main thread may hold."""
    flush = threading.Thread(target=_flush, daemon=True)
    flush.start()
    flush.join(1.0)
    line = f"[rank {rank}] error: {text}\n".encode(errors="replace")
    try:
        os.write(2, line)
    except OSError:
        return  # nobody reads any more


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue  # closed, or nobody reads
