"""Token rows -> batches. NumPy, int64, padded on the right; lengths travel with the ids, so no mask is read off the
ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alignment.errors import DataError

IGNORE_INDEX = -100
"""The label of a token that no loss looks at."""


def pad_right(rows: Sequence[Any], value: int) -> np.ndarray:
    """Pad rows of ids to the longest: int64 ``[batch, seq]``."""
    if not len(rows):
        raise DataError("an empty batch cannot be collated")
    out = np.full((len(rows), max(len(row) for row in rows)), value, dtype=np.int64)
    for padded, row in zip(out, rows, strict=True):
        padded[: len(row)] = row
    return out


def lengths_of(rows: Sequence[Any]) -> np.ndarray:
    """Return int64 ``[batch]``: the number of real tokens of each row."""
    return np.array([len(row) for row in rows], dtype=np.int64)


def collate_supervised(rows: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, np.ndarray]:
    """Batch rows of :class:`SupervisedDataset`.

    Returns:
        ``input_ids`` [batch, seq]; ``labels`` [batch, seq], not shifted, -100 where nothing is learned; ``lengths``
        [batch].
    """
    ids = [row["input_ids"] for row in rows]
    labels = pad_right([row["labels"] for row in rows], IGNORE_INDEX)
    return {"input_ids": pad_right(ids, pad_id), "labels": labels, "lengths": lengths_of(ids)}


def collate_preference(rows: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, np.ndarray]:
    """Batch rows of :class:`PreferenceDataset` or :class:`SafetyPreferenceDataset`.

    Returns:
        ``input_ids`` [2 * batch, seq], the better rows first and the worse ones in the same order; ``lengths`` [2 *
        batch]; ``prompt_lens`` [batch]; of safety pairs ``signs`` [2 * batch], too.
    """
    ids = [row["better_input_ids"] for row in rows] + [row["worse_input_ids"] for row in rows]
    prompt_lens = np.array([row["prompt_len"] for row in rows], dtype=np.int64)
    batch = {"input_ids": pad_right(ids, pad_id), "lengths": lengths_of(ids), "prompt_lens": prompt_lens}
    if "signs" in rows[0]:
        batch["signs"] = np.stack([row["signs"] for row in rows], axis=1).reshape(-1)
    return batch


def collate_prompts(rows: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, Any]:
    """Batch rows of :class:`PromptOnlyDataset`.

    Returns:
        ``input_ids`` [batch, seq] and ``lengths`` [batch]; ``index`` [batch]; the lists ``prompt``, ``row`` and
        ``source``.
    """
    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": pad_right(ids, pad_id),
        "lengths": lengths_of(ids),
        "index": np.array([row["index"] for row in rows], dtype=np.int64),
        "prompt": [row["prompt"] for row in rows],
        "row": [row["row"] for row in rows],
        "source": [row["source"] for row in rows],
    }


def collate_packed(rows: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, np.ndarray]:
    """Batch rows of :func:`pack_supervised`.

    Returns:
        ``input_ids``, ``labels`` (pads -100), ``segment_ids`` (pads 0), ``position_ids`` (pads 0), all [batch, seq],
        and ``lengths`` [batch].
    """
    fills = {"input_ids": pad_id, "labels": IGNORE_INDEX, "segment_ids": 0, "position_ids": 0}
    batch = {name: pad_right([row[name] for row in rows], fill) for name, fill in fills.items()}
    batch["lengths"] = lengths_of([row["input_ids"] for row in rows])
    return batch
