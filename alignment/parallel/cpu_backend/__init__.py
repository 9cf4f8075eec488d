"""What gloo and Paddle's CPU kernels lack, filled in, so that fleet runs unchanged on CPU processes.

Paddle's parallel training (fleet: tensor-parallel layers, pipeline schedule, sharding optimizers of stage 1, 2 and 3,
sequence parallelism) is the same on every device above two things: the process group's methods and a few kernels. On
CPUs many of them are missing. :func:`apply` puts them in; :data:`PATCHES` lists each with its reason. This room is the
only one that changes anything of Paddle's, and only when Paddle computes on the CPU and the run has several processes.

    from alignment.parallel import cpu_backend

    cpu_backend.apply()          # before init_parallel_env or fleet.init
    ...
    cpu_backend.leave()          # when the work is done (or leave(failure="...")): the others learn it

How it works. ``mailbox``: TCP connections between all ranks with buffered messages. ``collectives``: all-reduce and
the rest on those, in rank order, so that sums have the same bits everywhere. ``process_group``: the methods of Paddle's
gloo group on top. ``kernels``: tensor-parallel operators. ``rendezvous``: how ranks and groups find each other.
``device_names``: code that only looks at the device's name. A rank may be late by minutes (``patience``); one that dies
is named to all others at their next wait.

Paddle's gloo groups still exist underneath, for what calls them from C++: the reducer of ``paddle.DataParallel`` and
``paddle._C_ops.all_reduce_`` keep gloo's limit of 30 s.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from typing import TYPE_CHECKING

from alignment.errors import AlignmentError
from alignment.log import say_once
from alignment.parallel.cpu_backend.patches import PATCHES, Patch, install

if TYPE_CHECKING:
    from alignment.parallel.cpu_backend.rendezvous import Backend

__all__ = ["PATCHES", "TESTED_VERSIONS", "Patch", "apply", "fail", "is_active", "leave", "patch_table"]

TESTED_VERSIONS = ("3.3.1",)
PATIENCE = 1800.0


def apply(*, patience: float = PATIENCE) -> bool:
    """Fill in the gaps for this process. Call it before ``init_parallel_env`` and ``fleet.init``; once is enough.

    Does nothing on other devices and in runs of one process (``PADDLE_TRAINERS_NUM``).

    Args:
        patience: seconds to wait in a collective for a rank that lives but is late.

    Returns:
        whether the CPU backend is active now.

    Raises:
        AlignmentError: when Paddle's process group exists already, or the launcher's variables are no numbers.
    """
    rank, size = _environ_int("PADDLE_TRAINER_ID", 0), _environ_int("PADDLE_TRAINERS_NUM", 1)
    if size < 2:
        return False
    import paddle

    if paddle.get_device() != "cpu":
        return False
    if is_active():
        return True
    if paddle.distributed.is_initialized():
        raise AlignmentError(
            "the CPU backend must be applied before paddle.distributed.init_parallel_env() or fleet.init(), "
            "but the process group exists already"
        )
    from paddle.base import core

    from alignment.parallel.cpu_backend.rendezvous import Backend

    core.ProcessGroupGloo.alignment_backend = Backend(rank, size, patience)
    missing = [name for patch in PATCHES for name in install(patch)]
    if paddle.__version__ not in TESTED_VERSIONS:
        say_once(
            f"the CPU backend was tested with PaddlePaddle {', '.join(TESTED_VERSIONS)}; this is {paddle.__version__}"
            + (f", which has no {', '.join(missing)}" if missing else ""),
            logging.WARNING,
        )
    atexit.register(_leave_at_exit)
    return True


def is_active() -> bool:
    """Say whether :func:`apply` has filled in the gaps in this process."""
    return _backend() is not None


def leave(failure: str | None = None) -> None:
    """Say goodbye to the other ranks; nothing can be communicated afterwards. Does nothing when not active.

    Call it before ``os._exit``; a normal exit of Python calls it by itself.

    Args:
        failure: why this rank gives up. The others then stop at their next wait with this rank's number and this text.
    """
    backend = _backend()
    if backend is not None and backend.mailbox is not None:
        backend.mailbox.leave(failure)


def fail(reason: str) -> None:
    """Make a thread that waits for another rank give up with ``reason``, and :func:`leave` pass it on. Does nothing
    when not active.
    """
    backend = _backend()
    if backend is not None and backend.mailbox is not None:
        backend.mailbox.fail(reason)


def patch_table() -> str:
    """Return :data:`PATCHES` as a Markdown table."""
    lines = ["| what | without it | seen in | names exchanged |", "|---|---|---|---|"]
    for patch in PATCHES:
        names = ", ".join(f"`{name}`" for name in patch.exchanges)
        lines.append(f"| {patch.name} | {patch.reason} | {patch.seen_in} | {names} |")
    return "\n".join(lines) + "\n"


def _environ_int(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdigit():
        raise AlignmentError(f"the environment variable {name} must be a whole number, not {text!r}")
    return int(text)


def _backend() -> Backend | None:
    core = sys.modules.get("paddle.base.core")
    return getattr(core.ProcessGroupGloo, "alignment_backend", None) if hasattr(core, "ProcessGroupGloo") else None


def _leave_at_exit() -> None:
    error = getattr(sys, "last_value", None)  # what Python printed a traceback of before it began to exit
    leave(None if error is None else f"{type(error).__name__}: {error}")
