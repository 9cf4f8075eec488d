"""What micro batches leave behind for metrics: numbers that add up and arrays that join, merged over micro batches and
ranks.

A mean of means is wrong as soon as batches differ in size; therefore nothing is averaged before everything is here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from alignment.parallel import World

Stats = dict[str, "float | np.ndarray"]


def merge(parts: Iterable[Mapping[str, float | np.ndarray]]) -> Stats:
    """Add numbers and concatenate arrays (along axis 0) of the same name; a name may be missing in some parts."""
    result: Stats = {}
    for part in parts:
        for name, value in part.items():
            if name not in result:
                result[name] = value
            elif isinstance(value, np.ndarray):
                result[name] = np.concatenate([result[name], value])
            else:
                result[name] = result[name] + value
    return result


def merge_ranks(world: World, stats: Mapping[str, float | np.ndarray]) -> Stats:
    """The merged stats of all ranks, in rank order, on every rank."""
    return merge(world.all_gather_object(dict(stats), "merge_ranks"))


def to_json(stats: Mapping[str, float | np.ndarray]) -> dict[str, object]:
    """Plain JSON values (arrays become lists); NaN and infinity do not survive strict JSON and must not be in here."""
    return {name: value.tolist() if isinstance(value, np.ndarray) else float(value) for name, value in stats.items()}


def finite_or_none(values: Mapping[str, float]) -> dict[str, float | None]:
    """NaN and infinity as None, so that strict JSON can hold the rest."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def from_json(values: Mapping[str, object]) -> Stats:
    """Undo :func:`to_json` (arrays come back as float64)."""
    return {
        name: np.asarray(value, dtype=np.float64) if isinstance(value, list) else float(value)  # type: ignore[arg-type]
        for name, value in values.items()
    }
