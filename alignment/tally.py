"""Progress of passes that take long, with rate and remaining time: a bar, or a line every half minute."""

from __future__ import annotations

import sys
import time
from typing import Any

from alignment.log import get_logger

EVERY = 30.0  # seconds between two lines where there is no bar


class Tally:
    """Counts what has been done.

    Args:
        what: "evaluation", "scoring", ...
        total: how many there are.
        unit: what is counted, in the plural.
        bar: a bar on standard error (tqdm's), which vanishes when it is full. False, and where standard error is no
            terminal: a log line every :data:`EVERY` seconds, so that short passes say nothing and log files stay short.
        active: False shows nothing (processes other than the main one).
    """

    def __init__(self, what: str, total: int, *, unit: str = "rows", bar: bool = True, active: bool = True) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, 0
        self._active = active
        self._begin = self._told = time.monotonic()
        self._bar: Any = None
        if active and bar and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=what, unit=f" {unit}", leave=False, dynamic_ncols=True, file=sys.stderr)

    def add(self, count: int = 1) -> None:
        """Tell that ``count`` more are done."""
        self.done += count
        if not self._active:
            return
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._told >= EVERY:
            self._told = now
            get_logger().info(self.line(now - self._begin))

    def line(self, elapsed: float) -> str:
        """What is said after ``elapsed`` seconds."""
        rate = self.done / max(elapsed, 1e-9)
        left = format_seconds((self.total - self.done) / rate) if rate > 0 else "?"
        return f"{self.what}: {self.done} of {self.total} {self.unit}, {rate:.3g} {self.unit}/s, {left} left"

    def __enter__(self) -> Tally:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()


def format_seconds(seconds: float) -> str:
    """``1:02:03`` or ``02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
