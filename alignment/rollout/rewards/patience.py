"""A reward that does not come back: it is said, and at a limit it ends the run.

The reward is called in the main thread, because many graders set alarms (``signal.alarm``) or keep connections that
belong to it; a thread beside it looks at the clock. A signal's handler that raises wakes the main thread from whatever
Python waits for: sleep, socket, subprocess, lock.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from alignment.errors import RewardError
from alignment.log import get_logger

#: Seconds until a wait is said, and between two such lines.
NOTICE = 60.0
#: Seconds that a reward which ignores the limit (in a library that no signal wakes) has before the process ends.
GRACE = 60.0
_EVERY = 1.0


class _TimeIsUp(BaseException):
    """Not an ``Exception``: a reward that catches those to try again must not catch this."""


@contextlib.contextmanager
def patience(name: str, limit: float = 0.0, notice: float = NOTICE, grace: float = GRACE) -> Iterator[None]:
    """Watch over a call of a reward.

    Args:
        name: of the reward, for messages.
        limit: seconds that it may take; 0 for any number.
        notice: seconds until the log says that it is waited for, then again and again.
        grace: see :data:`GRACE`.

    Raises:
        RewardError: the limit is passed.
    """
    done = threading.Event()
    in_main = threading.current_thread() is threading.main_thread()
    wakes = in_main and limit > 0 and hasattr(signal, "SIGUSR2")
    former = signal.signal(signal.SIGUSR2, _raise) if wakes else None
    clock = threading.Thread(target=_watch, args=(name, limit, notice, grace, done, wakes), daemon=True)
    clock.start()
    try:
        yield
    except _TimeIsUp:
        raise RewardError(
            f"reward {name!r} has not come back within reward_timeout, {limit:g} s; if it may take longer, raise "
            "reward_timeout (0: no limit)"
        ) from None
    finally:
        done.set()
        clock.join()
        if wakes:
            signal.signal(signal.SIGUSR2, former)


def _raise(number: int, frame: FrameType | None) -> None:
    raise _TimeIsUp


def _watch(name: str, limit: float, notice: float, grace: float, done: threading.Event, wakes: bool) -> None:
    began, said = time.monotonic(), 0
    while True:
        passed = time.monotonic() - began
        over = limit > 0 and passed >= limit
        until = [notice * (said + 1) - passed, _EVERY if over else limit - passed if limit > 0 else notice]
        if done.wait(max(0.01, min(until))):
            return
        passed = time.monotonic() - began
        if passed >= notice * (said + 1):
            said += 1
            get_logger().warning("waiting for reward %r for %.0f s%s", name, passed, f" of {limit:g}" if limit else "")
        if wakes and passed >= limit:
            if passed >= limit + grace:
                get_logger().error("reward %r has not come back within %g s and cannot be woken: ending", name, limit)
                sys.stderr.flush()
                os._exit(2)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR2)
