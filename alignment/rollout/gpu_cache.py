"""Places in a cache of blocks: from the arena's regions to the block tables of Paddle's attention operator.

The cache is ``[blocks, key_heads, BLOCK, head_dim]``; place ``p`` is token ``p % BLOCK`` of block ``p // BLOCK``. Every
region begins with a block, so a row's table is the blocks of its prompt and then those of its own region. Only whole
blocks can be shared, and the last block of a prompt is mostly filled in part: the rest of it stays a gap in the row,
which the mask hides. So the answers of a prompt share all of it, and nothing is ever copied.

    row        | prompt ............ gap | answer ........
    columns    0            prompt_len   padded   padded + own_len
    positions  0 .......... prompt_len - 1   prompt_len ...
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import paddle
from paddle import Tensor

from alignment.rollout.gpu_operators import BLOCK, UNSEEN, CachedRows


def padded(tokens: np.ndarray) -> np.ndarray:
    """Up to whole blocks."""
    return -(-tokens // BLOCK) * BLOCK


def block_tables(spans: np.ndarray, steps: int, blocks: int) -> np.ndarray:
    """The blocks of each row, in order, far enough for a burst.

    Args:
        spans: ``[B, 4]``, see :class:`~alignment.rollout.layers.CachedBatch`, of the burst's first step.
        steps: of the burst.
        blocks: of the cache; entries that no row reaches stay below it.

    Returns:
        ``[B, W]`` int64.
    """
    prompt, prompt_len, own, own_len = spans.T[:, :, None]
    shared = padded(prompt_len) // BLOCK
    width = int((shared + padded(own_len + steps - 1) // BLOCK).max())
    column = np.arange(width)
    tables = np.where(column < shared, prompt // BLOCK + column, own // BLOCK + column - shared)
    return np.minimum(tables, blocks - 1)


def slots(places: Tensor, key_heads: int) -> Tensor:
    """``[T * key_heads]`` int64: where the heads of tokens at ``places`` ``[T]`` lie in the cache as one list of
    ``[head_dim]``.
    """
    block, within = places // BLOCK, places % BLOCK
    heads = paddle.arange(key_heads)
    return ((block.unsqueeze(-1) * key_heads + heads) * BLOCK + within.unsqueeze(-1)).reshape([-1])


@dataclass
class Burst:
    """The rows of a burst of decoding steps on the device; steps are taken there, nothing comes from the host.

    Attributes:
        positions, places: ``[B]`` int64 of the new tokens.
        lengths: ``[B, 1]`` int64, columns before the new token's.
        tables: ``[B, W]`` int32.
        real: ``[B, W * BLOCK]`` int64, the position that each column stands for.
        gap: ``[B, W * BLOCK]`` bool, columns that stand for none.
        longest: the longest row's columns at the burst's end.
    """

    positions: Tensor
    places: Tensor
    lengths: Tensor
    tables: Tensor
    real: Tensor
    gap: Tensor
    longest: int

    @classmethod
    def start(cls, positions: np.ndarray, places: np.ndarray, spans: np.ndarray, steps: int, blocks: int) -> Burst:
        """From the first step's batch, in one transfer; see :func:`block_tables`."""
        tables = block_tables(spans, steps, blocks)
        prompt_len, columns = spans[:, 1], padded(spans[:, 1])
        before = columns + spans[:, 3] - 1
        numbers = np.stack([positions, places, before, prompt_len, columns], axis=1)
        sent = paddle.to_tensor(np.concatenate([numbers, tables], axis=1))
        positions, places, before, prompt_len, columns = (sent[:, i : i + 1] for i in range(5))
        column = paddle.arange(tables.shape[1] * BLOCK).unsqueeze(0)
        gap = paddle.logical_and(column >= prompt_len, column < columns)
        real = paddle.where(column < prompt_len, column + 0 * columns, column - columns + prompt_len)
        longest = int((padded(spans[:, 1]) + spans[:, 3]).max()) + steps - 1
        tables = sent[:, 5:].astype("int32")
        return cls(positions.reshape([-1]), places.reshape([-1]), before, tables, real, gap, longest)

    def advance(self) -> None:
        """One token more in every row."""
        self.positions, self.places, self.lengths = self.positions + 1, self.places + 1, self.lengths + 1

    def hidden(self, window: int) -> Tensor:
        """``[B, W * BLOCK]`` bool: columns up to the new token's that it does not see; ``window`` 0 for no window."""
        if not window:
            return self.gap
        return paddle.logical_or(self.gap, self.real <= self.positions.unsqueeze(-1) - window)

    def rows(self, window: int, dtype: paddle.dtype) -> CachedRows:
        """As the operator takes them."""
        count, width = (int(size) for size in self.tables.shape)
        mask = self.hidden(window).astype("float32") * UNSEEN
        one = paddle.ones([count, 1], dtype="int32")
        host = paddle.CPUPlace()
        return CachedRows(
            tables=self.tables,
            lengths=self.lengths.astype("int32"),
            mask=mask.astype(dtype).reshape([count, 1, 1, width * BLOCK]),
            none=paddle.zeros([count, 1], dtype="int32"),
            one=one,
            offsets=paddle.arange(count, dtype="int32") * (width * BLOCK - 1),
            starts=paddle.arange(count + 1, dtype="int32"),
            longest_prompt=paddle.to_tensor([0], dtype="int32", place=host),
            longest=paddle.to_tensor([self.longest], dtype="int32", place=host),
        )
