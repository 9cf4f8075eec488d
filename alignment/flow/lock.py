"""One run at a time in a folder: two would destroy each other's checkpoints and metrics.

``output_dir/.lock`` says who holds the folder. It is made with ``O_EXCL``, which network file systems honour, too, and
its holder touches it every few seconds. A lock never outlives its run for long:

- on the machine of its holder it counts for as long as that very process lives: after a SIGKILL the next start has the
  folder at once;
- on another machine it counts for as long as it is touched: a start waits for a sign of life, a minute at most.

    with RunLock(output_dir):
        ...
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from alignment.errors import ArgumentsError
from alignment.flow.checkpoint import disk_errors
from alignment.log import get_logger
from alignment.parallel.heartbeat import Member, machine_name
from alignment.paths import LOCK

BEAT = 5.0  # seconds between two signs of life
STALE = 60.0  # seconds without one, after which a lock of another machine does not count any more


class RunLock:
    """The lock of a run's folder, held for as long as it is entered. One process of a run enters it.

    Args:
        folder: made where it is missing.
        beat: seconds between two signs of life.
        stale: seconds without one, after which a lock of another machine does not count.
        end: ends this process with a status when another run has taken the lock away, which happens when this one was
            stopped for longer than ``stale``.

    Attributes:
        id: tells this lock from all others.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        beat: float = BEAT,
        stale: float = STALE,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self.folder, self.path = Path(folder), Path(folder) / LOCK
        self.id = secrets.token_hex(8)
        self._beat, self._stale, self._end = beat, stale, end
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._text = ""

    def __enter__(self) -> RunLock:
        """Take the folder.

        Raises:
            ArgumentsError: another run has it; the text says who and since when.
            CheckpointError: the folder cannot be written.
        """
        me = Member.here(0)
        self._text = json.dumps({"id": self.id, **asdict(me), "command": sys.argv[:6]}) + "\n"
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            while not self._create(self._text):
                holder = self._read()
                if holder is None:
                    continue  # given back in this moment
                if self._lives(holder):
                    raise ArgumentsError(self._refusal(holder))
                if self._read() != holder:
                    continue  # somebody else's by now
                get_logger().info("%s: the run that held this folder has ended (%s)", self.folder, _name(holder))
                self._take_away(holder)
        self._thread = threading.Thread(target=self._keep, name="alignment-lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join(self._beat)
        with contextlib.suppress(OSError):
            if self._read() == self._text:
                self.path.unlink()

    # -- the file ------------------------------------------------------------------------------------------------

    def _create(self, text: str) -> bool:
        """Make the lock, unless there is one."""
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)
        return True

    def _read(self) -> str | None:
        try:
            return self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None

    def _touched(self, path: Path) -> int | None:
        """When a file was last touched; opened first, since only then a network file system asks its server."""
        try:
            with open(path, "rb") as handle:
                return os.fstat(handle.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None

    def _age(self, path: Path) -> float:
        """Seconds since a file was touched, by the clock of the file system."""
        probe = self.folder / f"{LOCK}.{self.id}"
        probe.touch()
        now = probe.stat().st_mtime_ns
        probe.unlink()
        touched = self._touched(path)
        return 0.0 if touched is None else (now - touched) / 1e9

    def _take_away(self, text: str) -> None:
        """Remove a lock that does not count any more, and no other: several starts may have found it. One of them at a
        time has the marker of that very lock, and looks again.
        """
        marker = self.folder / f"{LOCK}.{zlib.crc32(text.encode()):08x}"
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            if self._age(marker) > self._stale:
                marker.unlink(missing_ok=True)  # of a start that died right here
            time.sleep(0.1)
            return
        try:
            if self._read() == text:
                self.path.unlink()
        finally:
            marker.unlink(missing_ok=True)

    # -- whose it is ---------------------------------------------------------------------------------------------

    def _lives(self, text: str) -> bool:
        """Whether the holder of a lock is still at work."""
        holder = _member(text)
        if holder is not None and holder.machine == machine_name():
            return not holder.is_gone()
        left, seen = self._stale - self._age(self.path), self._touched(self.path)
        if holder is not None and left > 0:
            get_logger().info(
                "%s is locked by %s: waiting up to %.0f s for a sign of life of it", self.folder, _name(text), left
            )
        deadline = time.monotonic() + left
        while time.monotonic() < deadline:
            # A lock that is cut short is most likely being written.
            time.sleep(0.05 if holder is None else min(1.0, self._beat / 5))
            now = self._touched(self.path)
            if now is None or self._read() != text:
                return False  # given back, or another start has taken it
            if now != seen:
                return True
        return False

    def _refusal(self, text: str) -> str:
        holder = _member(text)
        same = holder is not None and holder.machine == machine_name()
        how = f"`kill {holder.pid}` ends it after saving" if holder is not None and same else "end it there"
        command = " ".join(map(str, _fields(text).get("command") or [])) or "unknown"
        return (
            f"output_dir {self.folder} is in use by {_name(text)}; its command: {command}. Two runs in one folder "
            f"destroy each other's checkpoints and metrics: wait for that run, or {how}, or choose another output_dir"
        )

    # -- the thread ----------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """Touch the lock, and see that it is still this run's."""
        while not self._closed.wait(self._beat):
            # A disk that fails for a while is for the checkpoints to complain about.
            with contextlib.suppress(OSError):
                found = self._read()
                if found is None:
                    self._create(self._text)  # somebody has deleted it
                elif found != self._text:
                    self._lost(found)
                    return
                else:
                    os.utime(self.path)

    def _lost(self, text: str) -> None:
        sys.stderr.flush()
        reason = f"{self.folder} was taken over by {_name(text)}, because this run had given no sign of life"
        os.write(2, f"error: {reason} for {self._stale:.0f} s. It stops without writing anything\n".encode())
        self._end(2)


def _fields(text: str) -> dict[str, object]:
    try:
        fields = json.loads(text)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _member(text: str) -> Member | None:
    """The process that a lock names; None for a lock that was cut short."""
    fields = _fields(text)
    try:
        return Member(**{name: fields[name] for name in Member.__dataclass_fields__})  # type: ignore[arg-type]
    except KeyError:
        return None


def _name(text: str) -> str:
    holder = _member(text)
    if holder is None:
        return "an unknown process (its lock was cut short)"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.clock))
    return f"process {holder.pid} on host {holder.host}, since {since}"
