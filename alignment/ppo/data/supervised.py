"""Question and answer as one row: for SFT and for the ptx loss of PPO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from alignment.ppo.data.collate import IGNORE_INDEX
from alignment.ppo.data.encode import Encoded, Encoder
from alignment.ppo.data.tokenized import TokenizedDataset


class SupervisedDataset(TokenizedDataset):
    """Rows of prompt and answer.

    ``ds[i]``: ``input_ids`` int64 [len] and ``labels`` int64 [len], not shifted: -100 on the prompt, the id itself on
    the answer and the end-of-sequence token that closes it (an answer that was cut has none). Of a ``dialogue`` every
    answer is learned, of an ``input`` list with an ``answer`` that answer alone.
    """

    KIND = "supervised"

    def encode(self, encoder: Encoder, sample: Mapping[str, Any]) -> Encoded | str:
        return encoder.supervised(sample)

    def item(self, sample: int, position: int) -> dict[str, Any]:
        ids = self._table.row(sample)
        return {"input_ids": ids, "labels": np.where(self._table.trained_of(sample), ids, IGNORE_INDEX)}

    def trained_tokens(self, samples: np.ndarray) -> int | None:
        per_sample = np.concatenate([[0], np.cumsum(self._table.trained, dtype=np.int64)])
        offsets = self._table.offsets[0]
        return int((per_sample[offsets[samples + 1]] - per_sample[offsets[samples]]).sum())
