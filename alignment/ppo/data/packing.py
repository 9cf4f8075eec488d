"""Zero padding: several samples in one row, each attending to itself alone."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alignment.errors import DataError
from alignment.ppo.data.collate import IGNORE_INDEX


def pack_supervised(
    rows: Sequence[Mapping[str, Any]], max_length: int, greedy: bool = False
) -> list[dict[str, np.ndarray]]:
    """Join rows of :class:`SupervisedDataset` into fewer rows of at most ``max_length`` tokens.

    A segment's first label is -100: the token before it belongs to another sample and must not be asked to predict it.

    Args:
        rows: with ``input_ids`` [len] and ``labels`` [len].
        max_length: of a packed row.
        greedy: True packs best-fit in order of falling length (fewest rows); False fills row after row in the given
            order.

    Returns:
        Rows of int64 arrays [len]: ``input_ids``; ``labels``; ``segment_ids``, counted from 1 in each row;
        ``position_ids``, counted from 0 in each segment. No sample is lost, split or cut.

    Raises:
        DataError: a row is longer than ``max_length``, or empty.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    for number, length in enumerate(lengths):
        if not 0 < length <= max_length:
            raise DataError(f"row {number} has {length} tokens; packed rows hold between 1 and max_length={max_length}")
    groups = _best_fit(lengths, max_length) if greedy else _in_order(lengths, max_length)
    return [_join([rows[index] for index in group]) for group in groups]


def _in_order(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    groups: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if length > room:
            groups.append([])
            room = max_length
        groups[-1].append(index)
        room -= length
    return groups


def _best_fit(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Best-fit decreasing: every row goes where it leaves the least room."""
    groups: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, group), ascending
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        place = bisect.bisect_left(free, (lengths[index], -1))
        if place < len(free):
            room, group = free.pop(place)
        else:
            room, group = max_length, len(groups)
            groups.append([])
        groups[group].append(index)
        bisect.insort(free, (room - lengths[index], group))
    return groups


def _join(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    labels = []
    for row in rows:
        own = np.array(row["labels"], dtype=np.int64)
        own[0] = IGNORE_INDEX
        labels.append(own)
    sizes = [len(own) for own in labels]
    return {
        "input_ids": np.concatenate([np.asarray(row["input_ids"], dtype=np.int64) for row in rows]),
        "labels": np.concatenate(labels),
        "segment_ids": np.repeat(np.arange(1, len(rows) + 1, dtype=np.int64), sizes),
        "position_ids": np.concatenate([np.arange(size, dtype=np.int64) for size in sizes]),
    }
