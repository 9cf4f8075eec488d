"""The folder of token rows that all runs share."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from alignment.ppo.data import cache


def test_the_folder_stays_below_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D32: a folder that runs share would grow for ever. What was used last stays, whatever its size."""
    rows = {"ids0": np.zeros(1000, dtype=np.int32)}
    paths = [cache.cache_file(tmp_path, "Kind", f"{number}" * 20) for number in range(4)]
    for number, path in enumerate(paths[:3]):
        cache.write_cache(path, f"{number}" * 20, rows)
        os.utime(path, (number, number))
    assert cache.read_cache(paths[0], "0" * 20) is not None  # the oldest was used just now
    monkeypatch.setattr(cache, "MOST_BYTES", 2 * paths[0].stat().st_size + 100)
    cache.write_cache(paths[3], "3" * 20, rows)
    assert sorted(tmp_path.iterdir()) == [paths[0], paths[3]]
    monkeypatch.setattr(cache, "MOST_BYTES", 10)
    cache.write_cache(paths[1], "1" * 20, rows)
    assert sorted(tmp_path.iterdir()) == [paths[1]]
