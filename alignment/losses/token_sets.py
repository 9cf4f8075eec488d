"""`TokenSets`: which tokens were allowed at each position, ragged.

A set of a vocabulary is V / 8 bytes as bits and 4 bytes a token as a list. What is kept are lists: a nucleus of a
language model has tens to hundreds of some 100,000 tokens (0.4 kB against 19 kB for a vocabulary of 152,000), and where
a list is longer than the bits, in a small vocabulary or of an untrained model, it is small all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TokenSets:
    """One set of tokens for each of N positions.

    Attributes:
        ids: ``[n]`` int32, the tokens of all sets, one set behind the other, rising in each.
        counts: ``[N]`` int32, tokens of each set; ``n`` together.
    """

    ids: np.ndarray
    counts: np.ndarray

    def __len__(self) -> int:
        return len(self.counts)

    @classmethod
    def of(cls, mask: np.ndarray) -> TokenSets:
        """The sets that a mask ``[N, V]`` bool shows."""
        return cls(np.nonzero(mask)[1].astype(np.int32), mask.sum(axis=1).astype(np.int32))

    @classmethod
    def join(cls, sets: Sequence[np.ndarray]) -> TokenSets:
        """Of one int32 array of rising tokens for each position, at least one."""
        return cls(np.concatenate(sets), np.array([len(tokens) for tokens in sets], dtype=np.int32))

    def mask(self, vocabulary: int) -> np.ndarray:
        """``[N, vocabulary]`` bool."""
        shown = np.zeros((len(self), vocabulary), dtype=bool)
        shown[self.entries(0, len(self))] = True
        return shown

    def entries(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """``(position - first, token)``, int64 each, of every token in the sets of the positions ``[first, last)``."""
        counts = self.counts[first:last]
        begin = int(self.counts[:first].sum())
        ids = self.ids[begin : begin + int(counts.sum())]
        return np.repeat(np.arange(len(counts)), counts), ids.astype(np.int64)
