"""Endless, resumable streams of row numbers: the order depends on the seed and the position alone, never on the
layout.
"""

from __future__ import annotations

from dataclasses import dataclass

from alignment.flow.order import epoch_order


@dataclass
class IndexStream:
    """Row numbers in a fresh order each epoch.

    Attributes:
        rows: how many there are.
        seed: of the orders.
        position: how many numbers were taken since the start of the run.
        shuffle: a fresh order each epoch; False: 0, 1, 2, ... in each.
    """

    rows: int
    seed: int
    position: int = 0
    shuffle: bool = True

    @property
    def epoch(self) -> int:
        """The epoch that the next number belongs to."""
        return self.position // self.rows

    @property
    def left_in_epoch(self) -> int:
        """Numbers until the epoch ends."""
        return self.rows - self.position % self.rows

    def take(self, count: int) -> list[int]:
        """The next ``count`` numbers, over the ends of epochs where need be."""
        taken: list[int] = []
        while len(taken) < count:
            start = self.position % self.rows
            piece = epoch_order(self.seed, self.epoch, self.rows, self.shuffle)[start : start + count - len(taken)]
            taken.extend(int(i) for i in piece)
            self.position += len(piece)
        return taken

    def skip_epoch_rest(self) -> None:
        """Leave out what is left of the epoch (``dataloader_drop_last``)."""
        self.position += self.left_in_epoch
