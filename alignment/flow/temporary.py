"""Temporary folders with an owner in their names, so that one run never clears away what another one is writing.

A name is ``PREFIX MACHINE.PID.STARTED-RANDOM``. The process that it names can be looked up on its own machine; on
another one, a folder counts as abandoned when nothing in it has changed for an hour.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
import zlib
from pathlib import Path

from alignment.parallel.heartbeat import has_ended, machine_name, start_time

QUIET = 3600.0  # seconds without a change, after which a folder of another machine counts as abandoned
_OWNER = re.compile(r"([0-9a-f]{8})\.(\d+)\.(\d+)-[0-9a-f]{8}$")


def temporary_folder(parent: Path, prefix: str) -> Path:
    """Make an empty folder of this process in ``parent`` and return it. Its mode follows the umask: a checkpoint or a
    model that is renamed from it can be read by whoever may read its neighbours.

    Raises:
        OSError: the disk refuses.
    """
    owner = f"{_machine_code()}.{os.getpid()}.{start_time(os.getpid()) or 0}"
    path = parent / f"{prefix}{owner}-{secrets.token_hex(4)}"
    path.mkdir()
    return path


def is_abandoned(path: Path) -> bool:
    """Whether a folder of :func:`temporary_folder` belongs to no other living process. One without an owner in its name
    is an older version's, and abandoned.
    """
    owner = _OWNER.search(path.name)
    if owner is None:
        return True
    pid = int(owner[2])
    if owner[1] == _machine_code():
        return pid == os.getpid() or has_ended(pid, int(owner[3]))
    newest = 0.0
    for entry in [path, *path.rglob("*")]:
        with contextlib.suppress(OSError):  # cleared away in the meantime
            newest = max(newest, entry.lstat().st_mtime)
    return time.time() - newest > QUIET


def _machine_code() -> str:
    return f"{zlib.crc32(machine_name().encode()):08x}"
