"""Whether Paddle will find a GPU, judged without loading it (which takes seconds)."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from pathlib import Path


@functools.cache
def gpu_available() -> bool:
    """Say whether the installed Paddle is a GPU build and a GPU of NVIDIA's is visible to this process."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1", "NoDevFiles"):
        return False
    return _gpu_build() and any(re.fullmatch(r"nvidia\d+", entry.name) for entry in Path("/dev").glob("nvidia*"))


def _gpu_build() -> bool:
    found = importlib.util.find_spec("paddle")
    if found is None or not found.submodule_search_locations:
        return False
    version = Path(next(iter(found.submodule_search_locations))) / "version" / "__init__.py"
    if not version.is_file():
        return False
    match = re.search(r"^cuda_version\s*=\s*'([^']*)'", version.read_text(encoding="utf-8"), re.MULTILINE)
    return match is not None and match.group(1) not in ("False", "0", "")


def world_size() -> int:
    """Return the number of processes that ``paddle.distributed.launch`` started; 1 without it."""
    value = os.environ.get("PADDLE_TRAINERS_NUM", "1")
    return max(1, int(value)) if value.isdigit() else 1


def rank() -> int:
    """Return this process's rank; 0 without ``paddle.distributed.launch``."""
    value = os.environ.get("PADDLE_TRAINER_ID", "0")
    return int(value) if value.isdigit() else 0
