"""Supervised rows for the ptx loss, in the order of an endless stream shared by all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignment.flow.order import micro_batches, rank_slice
from alignment.flow.streams import IndexStream
from alignment.parallel import World
from alignment.ppo.data import collate_supervised


@dataclass(frozen=True)
class PtxWindow:
    """The supervised rows of one optimizer step.

    Attributes:
        mine: this rank's rows.
        tokens: label tokens of the window on all ranks (at least 1).
        pad_id: for the collator.
    """

    mine: list[dict[str, Any]]
    tokens: int
    pad_id: int

    def micro_batches(self, size: int, max_tokens: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Collated batches of at most ``size`` rows, or of ``max_tokens`` padded tokens (see
        :func:`alignment.flow.order.micro_batches`): ``input_ids`` and ``labels`` ``[b, T]``, ``lengths`` ``[b]``.
        """
        for group in micro_batches([len(row["input_ids"]) for row in self.mine], size, max_tokens):
            yield collate_supervised([self.mine[i] for i in group], self.pad_id)


class PtxStream:
    """Takes the next rows of a supervised data set, each rank its share.

    Args:
        dataset: a ``SupervisedDataset``.
        seed: of the order.
        pad_id: for the collator.
        shuffle: see :class:`IndexStream`.
    """

    def __init__(self, dataset: Any, seed: int, pad_id: int, shuffle: bool = True) -> None:
        self.dataset, self.pad_id = dataset, pad_id
        self.stream = IndexStream(len(dataset), seed, shuffle=shuffle)

    def take(self, rows: int, world: World) -> PtxWindow:
        """The next ``rows`` rows of the stream (over all ranks), this rank's share collated on demand.

        The first token of a row has nothing to be predicted from, so it does not count.
        """
        chosen = [self.dataset[i] for i in self.stream.take(rows)]
        tokens = sum(int((row["labels"][1:] != -100).sum()) for row in chosen)
        share = rank_slice(np.arange(len(chosen)), world.rank, world.size)
        return PtxWindow([chosen[i] for i in share], max(1, tokens), self.pad_id)
