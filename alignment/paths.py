"""Names and modes of files that others wrote or shall read, and what a run's folder shows from outside."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

LOCK = ".lock"
METRICS_FILE = "metrics.jsonl"
CACHE = "ALIGNMENT_CACHE"


def cache_folder() -> Path:
    """``$ALIGNMENT_CACHE``, else ``alignment`` in the user's cache folder."""
    if os.environ.get(CACHE):
        return Path(os.environ[CACHE])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "alignment"


def last_step(path: Path) -> int:
    """The highest step in a ``metrics.jsonl``; -1 where there is no row, or no file."""
    last = -1
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # a last line that was cut short
                last = max(last, int(json.loads(line)["step"]))
    return last


def leaves_folder(name: str) -> bool:
    """Whether a file's name in an index or a manifest points outside the folder that holds it (links may)."""
    return os.path.isabs(name) or ".." in Path(name).parts


def open_to_others(folder: Path) -> None:
    """Give a folder and all below it the modes that the umask asks for; for what was made under a private temporary
    name, or by libraries that make files private whatever the umask says.
    """
    umask = _umask()
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _umask() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    current = os.umask(0)  # there is no other way to ask
    os.umask(current)
    return current
