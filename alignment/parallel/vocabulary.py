"""The vocabulary cut over tensor ranks: what a softmax over all of it needs from the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor


@dataclass(frozen=True)
class VocabularyShard:
    """This process's columns of the logits, and sums and maxima over all processes' columns.

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
