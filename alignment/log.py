"""One logger for the whole package, and a way to say a thing only once.

Only the first process of a run speaks (``PADDLE_TRAINER_ID`` 0); warnings and errors of the others are shown too, with
their rank.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

_SAID: set[str] = set()


class _CurrentStderr(logging.StreamHandler):
    """Writes to what ``sys.stderr`` is at the moment: a test, a notebook or a progress bar may have exchanged it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class _RankFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        rank = int(os.environ.get("PADDLE_TRAINER_ID", "0") or 0)
        if rank == 0:
            return True
        record.msg = f"[rank {rank}] {record.msg}"
        return record.levelno >= logging.WARNING


def get_logger() -> logging.Logger:
    """Return the package's logger, set up on first use: one line per record, to standard error."""
    logger = logging.getLogger("alignment")
    if not logger.handlers:
        handler = _CurrentStderr()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s alignment: %(message)s", "%H:%M:%S"))
        handler.addFilter(_RankFilter())
        logger.addHandler(handler)
        logger.setLevel(os.environ.get("ALIGNMENT_LOG_LEVEL", "INFO").upper())
        logger.propagate = False
    return logger


def say_once(message: str, level: int = logging.INFO) -> None:
    """Log ``message`` unless exactly this text was already logged by this process."""
    if message not in _SAID:
        _SAID.add(message)
        get_logger().log(level, message)
