"""The heartbeats of all ranks as one of them sees them, and messages that say where a failed rank was last seen."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path

from alignment.log import say_once
from alignment.parallel.heartbeat import Beat, Member, beat_path, read_beat, write_beat

_SHOWN = 8  # ranks that a message describes at most
_LAST_WORDS = 0.3  # seconds for the last heartbeat of a rank that ends by an exception

# The ranks that a failure's text blames, as control.py, mailbox.py and monitor.py word it.
_BLAMED = re.compile(
    r"\brank (\d+) (?:failed:|ended without|has finished|at ['\"]|on host|did not get there|has probably ended)"
    r"|connection to rank (\d+)"
)
_SEEN = re.compile(r"\blast (?:seen|phase)\b")


class LastSeen:
    """The heartbeat files of a run.

    Args:
        folder: where they are; None: there are none.
        members: all processes of the run, in rank order.
        rank: this process.
    """

    def __init__(self, folder: Path | None, members: list[Member], rank: int) -> None:
        self._folder, self._members, self._me = folder, members, members[rank]
        self.others = [member for member in members if member.rank != rank]
        self._near = [member for member in self.others if member.machine == self._me.machine]
        self._make_folder()

    def _make_folder(self) -> None:
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._me.rank == 0:
                for path in self._folder.glob("rank-*.json"):
                    if path.name not in {beat_path(self._folder, member.rank).name for member in self._members}:
                        path.unlink(missing_ok=True)  # an earlier run had more ranks
        except OSError as error:
            say_once(f"no heartbeats: {error}", logging.WARNING)
            self._folder = None

    def write(self, beat: Beat) -> None:
        """Write this rank's heartbeat; where that is not possible, say so once."""
        if self._folder is None:
            return
        try:
            write_beat(self._folder, beat)
        except OSError as problem:
            # A full disk is for the checkpoints to complain about.
            say_once(f"a heartbeat could not be written: {problem}", logging.WARNING)

    def read(self, member: Member) -> Beat | None:
        """The newest heartbeat of a rank that can be seen from here."""
        return read_beat(self._folder, member) if self._folder is not None else None

    def age(self, member: Member, beat: Beat) -> float:
        """Seconds since a beat, the hosts' clocks compared at the start."""
        return time.time() + member.clock - self._me.clock - beat.time

    def gone(self) -> list[Member]:
        """The ranks on this machine whose processes have ended."""
        return [member for member in self._near if member.is_gone()]

    def ended(self, member: Member) -> str:
        """Why a rank has ended, by its last heartbeat."""
        beat = self.read(member)
        if beat is not None and beat.state == "failed":
            return f"rank {member.rank} failed: {beat.error}"
        if beat is not None and beat.state == "stopped":
            return beat.error  # not because of itself
        if beat is not None and beat.state == "finished":
            return f"rank {member.rank} has finished while other ranks still work"
        return f"rank {member.rank} ended without a word (killed, or out of memory?)"

    def blamed(self, text: str) -> list[int]:
        """The other ranks that a failure's text names as its cause."""
        found = {int(one or two) for one, two in _BLAMED.findall(text)}
        return sorted(rank for rank in found if rank < len(self._members) and rank != self._me.rank)

    def says_where(self, text: str) -> bool:
        """Whether a text has been through :meth:`explain` already, here or on another rank."""
        return _SEEN.search(text) is not None

    def explain(self, text: str) -> str:
        """Add to a failure's text where the ranks that it blames were last seen."""
        if self.says_where(text):
            return text
        blamed = [self._members[rank] for rank in self.blamed(text)[:_SHOWN]]
        self._let_them_speak(blamed)
        return "\n  ".join([text, *(self._last_seen(member, text) for member in blamed)])

    def unknown(self) -> str:
        """Why a rank's last phase is not known."""
        if self._folder is None:
            return "no heartbeats are written"
        return f"{self._folder} on {self._me.host} has no heartbeat of it"

    def _last_seen(self, member: Member, text: str) -> str:
        beat = self.read(member)
        if beat is None:
            return f"{member}: its last phase is unknown, {self.unknown()}"
        error = (beat.error.splitlines() or [""])[0]
        because = f", and {beat.state}: {error}" if error and error not in text else ""
        return f"{member} was {beat.describe(self.age(member, beat))}{because}"

    def _let_them_speak(self, members: list[Member]) -> None:
        """Wait a moment for the last heartbeats of ranks that are ending."""
        deadline = time.monotonic() + _LAST_WORDS
        while time.monotonic() < deadline:
            gone = {member.rank for member in self.gone()}
            beats = [self.read(member) for member in members if member.rank not in gone]
            if not any(beat is not None and beat.state == "running" for beat in beats):
                return
            time.sleep(0.02)


def listed(found: list[tuple[Member, str]]) -> str:
    """``"rank 1 on host a (process 7), WHAT; rank 2 ..."``, at most eight of them."""
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(f"{member}, {what}" for member, what in found[:_SHOWN]) + more
