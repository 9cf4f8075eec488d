"""How rows are shared out among ranks and cut into micro batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def rank_slice(batch: np.ndarray, rank: int, size: int) -> np.ndarray:
    """Rank ``rank``'s contiguous share of a global batch; shares differ by at most one row, the first ranks take the
    longer ones.
    """
    short, longer = divmod(len(batch), size)
    start = rank * short + min(rank, longer)
    return batch[start : start + short + (1 if rank < longer else 0)]


def micro_batches(lengths: Sequence[int] | np.ndarray, size: int, max_tokens: int = 0) -> list[np.ndarray]:
    """Cut rows into micro batches.

    Args:
        lengths: ``[rows]`` tokens of each row.
        size: rows of a micro batch where there is no budget; the last may have fewer.
        max_tokens: the budget: a micro batch's rows times the longest of them stay within it, but for a single row that
            is longer. Rows are grouped by length, the longest first, so that padding is small and the largest micro
            batch is met at once. 0: no budget.

    Returns:
        The numbers of each micro batch's rows, int64.
    """
    rows = np.arange(len(lengths))
    if max_tokens <= 0:
        return [rows[start : start + size] for start in range(0, len(rows), size)]
    rows = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    parts, start = [], 0
    while start < len(rows):
        count = max(1, max_tokens // max(1, int(lengths[rows[start]])))
        parts.append(rows[start : start + count])
        start += count
    return parts
