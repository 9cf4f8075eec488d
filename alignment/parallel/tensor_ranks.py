"""What the tensor ranks of a divided model do together besides what paddlenlp's layers do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor


def tensor_group() -> Any:
    """Fleet's group of the tensor ranks, which paddlenlp's models are built over."""
    from paddle.distributed import fleet

    return fleet.get_hybrid_communicate_group().get_model_parallel_group()


def add_up(part: Tensor, group: Any) -> Tensor:
    """The sum of all ranks' ``part``, in its place."""
    dist.all_reduce(part, group=group)
    return part


def divided_product(hidden: Tensor, weight: Tensor, *, tied: bool, whole: bool) -> Tensor:
    """``[..., hidden]`` times this rank's columns of a weight, as paddlenlp's ``parallel_matmul``, which cannot tell
    that a widened weight is divided.

    Args:
        hidden: the same on all ranks; its gradient is summed over them.
        weight: ``[hidden, columns]``, or ``[columns, hidden]`` where ``tied``.
        whole: put all ranks' columns together.
    """
    from paddle.distributed import collective

    group = tensor_group()
    logits = paddle.matmul(collective._c_identity(hidden, group=group), weight, transpose_y=tied)
    return collective._c_concat(logits, group=group) if whole else logits


def gather_sequence(hidden: Tensor, rows: int, length: int) -> Tensor:
    """``[rows * length / tensor, hidden]`` on each tensor rank -> ``[rows, length, hidden]`` on all of them."""
    from paddle.distributed.fleet.utils.sequence_parallel_utils import GatherOp

    return GatherOp.apply(hidden).reshape([rows, length, hidden.shape[-1]])


@dataclass(frozen=True)
class VocabularyShard:
    """The vocabulary cut over tensor ranks: this process's columns of the logits, and sums and maxima over all columns,
    which a softmax needs.

    Attributes:
        group: the tensor ranks.
        start: the first of this process's tokens.
        size: how many it has.
    """

    group: Any
    start: int
    size: int

    def largest(self, values: Tensor) -> Tensor:
        """The largest of all processes' ``values``, elementwise."""
        result = paddle.assign(values)
        dist.all_reduce(result, op=dist.ReduceOp.MAX, group=self.group)
        return result

    def total(self, values: Tensor) -> Tensor:
        """The sum of all processes' ``values``, elementwise."""
        result = paddle.assign(values)
        dist.all_reduce(result, group=self.group)
        return result
