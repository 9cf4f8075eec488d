"""Two answers to one prompt, the better one known (for reward models), or the safer one (for cost models)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from alignment.ppo.data.encode import Encoded, Encoder
from alignment.ppo.data.tokenized import TokenizedDataset


class PreferenceDataset(TokenizedDataset):
    """Pairs of rows that begin with the same prompt.

    ``ds[i]``: ``better_input_ids`` int64 [better_len], ``worse_input_ids`` int64 [worse_len], ``prompt_len``: the ids
    that both begin with. Pairs that are identical, or became so when they were cut, are dropped and counted.
    """

    KIND = "preference"
    SEQUENCES = 2

    def encode(self, encoder: Encoder, sample: Mapping[str, Any]) -> Encoded | str:
        return encoder.preference(sample)

    def item(self, sample: int, position: int) -> dict[str, Any]:
        return {
            "better_input_ids": self._table.row(sample, 0),
            "worse_input_ids": self._table.row(sample, 1),
            "prompt_len": int(self._table.prompt_lens[sample]),
        }

    def trained_tokens(self, samples: np.ndarray) -> int | None:
        both = self._table.lengths(0)[samples] + self._table.lengths(1)[samples]
        return int((both - 2 * self._table.prompt_lens[samples]).sum())


class SafetyPreferenceDataset(PreferenceDataset):
    """Pairs of which the safer answer is known, and of each answer whether it is safe.

    ``ds[i]``: what :class:`PreferenceDataset` gives, where the better answer is the safer one, and ``signs`` int64 [2],
    of the better and of the worse answer: +1 if it is unsafe, -1 if it is safe. Pairs whose safer answer is unsafe
    beside a safe one are dropped and counted, as are ties.
    """

    KIND = "safety preference"

    def encode(self, encoder: Encoder, sample: Mapping[str, Any]) -> Encoded | str:
        return encoder.safety_preference(sample)

    def item(self, sample: int, position: int) -> dict[str, Any]:
        return super().item(sample, position) | {"signs": self._table.signs[sample].astype(np.int64)}

    def labels(self, samples: np.ndarray) -> dict[str, int]:
        unsafe = (self._table.signs[samples] > 0).sum(axis=1)
        names = ("both safe", "one safe", "both unsafe")
        return {name: int((unsafe == number).sum()) for number, name in enumerate(names)}
