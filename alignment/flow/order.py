"""In which order rows are seen: the same for every number of processes, and found again from (seed, epoch, step) alone.

Global batch ``k`` of an epoch is ``order[k * G : (k + 1) * G]``, where the order is a permutation (or, with
``shuffle: false``, the data's own), with ``G`` rows per optimizer step over all ranks
and micro batches. Rank ``r`` takes the ``r``-th contiguous slice of it, in micro batches of
``per_device_train_batch_size``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from alignment.engine.batching import micro_batches, rank_slice

__all__ = ["TrainingOrder", "epoch_order", "epoch_permutation", "micro_batches", "rank_slice"]


@lru_cache(maxsize=4)
def epoch_permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """A permutation of ``range(n)``, int64 ``[n]``, that depends on (seed, epoch, n) only (Philox generator)."""
    key = np.random.SeedSequence([seed & 0xFFFFFFFF, epoch]).generate_state(2, np.uint64)
    order = np.random.Generator(np.random.Philox(key=key)).permutation(n).astype(np.int64)
    order.flags.writeable = False  # it is shared by all who ask for it
    return order


def epoch_order(seed: int, epoch: int, n: int, shuffle: bool = True) -> np.ndarray:
    """The order of ``n`` rows in an epoch, int64 ``[n]``: :func:`epoch_permutation`, or the data's own order."""
    return epoch_permutation(seed, epoch, n) if shuffle else np.arange(n, dtype=np.int64)


@dataclass(frozen=True)
class TrainingOrder:
    """The rows of every optimizer step of a run.

    Args:
        rows: number of rows (or packs) of the data set.
        global_batch: rows per optimizer step over all ranks and micro batches.
        seed: of the permutations.
        drop_last: drop an epoch's last, shorter batch.
        shuffle: a fresh permutation each epoch; False: the data's own order.
    """

    rows: int
    global_batch: int
    seed: int
    drop_last: bool = False
    shuffle: bool = True

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the data; at least 1."""
        whole = self.rows // self.global_batch if self.drop_last else math.ceil(self.rows / self.global_batch)
        return max(1, whole)

    def total_steps(self, num_train_epochs: float, max_steps: int = -1) -> int:
        """Optimizer steps of the run: ``max_steps`` where positive, else enough for ``num_train_epochs`` (which may be
        a fraction).
        """
        return max_steps if max_steps > 0 else max(1, math.ceil(num_train_epochs * self.steps_per_epoch))

    def batch(self, step: int) -> np.ndarray:
        """Row numbers of optimizer step ``step`` (0-based, counted through all epochs): int64 ``[<= global_batch]``."""
        epoch, k = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.seed, epoch, self.rows, self.shuffle)
        return order[k * self.global_batch : (k + 1) * self.global_batch]

    def epoch_at(self, step: int) -> float:
        """How many epochs are done after ``step`` steps."""
        return step / self.steps_per_epoch
