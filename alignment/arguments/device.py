"""What this process computes on and in which run, judged without loading Paddle (which takes seconds)."""

from __future__ import annotations

import os

from alignment import runtime


def gpu_available() -> bool:
    """Say whether Paddle computes on a GPU: its own answer once it is loaded, before that by build and devices."""
    return runtime.gpu_found()


def world_size() -> int:
    """Return the number of processes that ``paddle.distributed.launch`` started; 1 without it."""
    value = os.environ.get("PADDLE_TRAINERS_NUM", "1")
    return max(1, int(value)) if value.isdigit() else 1


def rank() -> int:
    """Return this process's rank; 0 without ``paddle.distributed.launch``."""
    value = os.environ.get("PADDLE_TRAINER_ID", "0")
    return int(value) if value.isdigit() else 0
