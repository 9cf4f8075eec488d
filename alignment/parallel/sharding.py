"""Sharding of a trained model's state over the data ranks of a group (ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054).

Every parameter has one owner in its sharding group, which keeps its optimizer state. Stage 1: gradients are summed at
the owner, which updates the parameter and hands the new values out. Stage 2: they are summed at the end of every pass,
so that no rank keeps other owners' gradients. Stage 3: only the owner keeps a parameter at all; the others get it when
its layer runs, forward and backward, and drop it behind that (:meth:`Sharding.wake`, :meth:`Sharding.rest`).

Whole parameters are owned, as in fleet's ``DygraphShardingOptimizer``, so that a parameter's state is in one place: a
checkpoint does not depend on the number of ranks, and an update has the bits of the unsharded one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor

from alignment.parallel.gradients import gradient, gradient_dtype, set_gradient
from alignment.parallel.group_collectives import broadcast, buckets
from alignment.parallel.topology import Topology, assign_owners


class Sharding:
    """Who owns which parameter, and the traffic that follows.

    Args:
        topology: the layout.
        group: the sharding group of this process.
        parameters: of this process's part of the model, by whole name; the same on every rank of the group.
    """

    def __init__(self, topology: Topology, group: Any, parameters: Mapping[str, Tensor]) -> None:
        self.topology, self.group, self.parameters = topology, group, dict(parameters)
        self.owner = assign_owners({name: int(p.size) for name, p in parameters.items()}, topology.sharding)
        self._resting: set[str] = set()
        self._shapes = {name: list(p.shape) for name, p in parameters.items()}

    @property
    def owned(self) -> dict[str, Tensor]:
        """This rank's own parameters."""
        return {name: p for name, p in self.parameters.items() if self.owner[name] == self.topology.sharding_rank}

    def process_of(self, owner: int) -> int:
        """The process of a sharding rank of this group."""
        topology = self.topology
        return topology.process_at(topology.replica * topology.sharding + owner, topology.stage, topology.tensor_rank)

    @paddle.no_grad()
    def reduce_gradients(self, present: Mapping[str, bool]) -> None:
        """Sum the gradients at their owners and forget the others.

        Args:
            present: whether any rank of the group has a gradient for the parameter.
        """
        for owner in range(self.topology.sharding):
            mine = [p for name, p in self.parameters.items() if self.owner[name] == owner and present[name]]
            for bucket in buckets(mine):
                grads = [gradient(p) for p in bucket]
                flat = paddle.concat(
                    [
                        paddle.zeros([int(p.size)], "float32") if grad is None else grad.astype("float32").flatten()
                        for p, grad in zip(bucket, grads, strict=True)
                    ]
                )
                dist.reduce(flat, dst=self.process_of(owner), group=self.group)
                offset = 0
                for p, grad in zip(bucket, grads, strict=True):
                    size = int(p.size)
                    total = flat[offset : offset + size].reshape(p.shape).astype(gradient_dtype(p))
                    if owner != self.topology.sharding_rank:
                        set_gradient(p, None)
                    elif grad is None:
                        set_gradient(p, total)
                    else:
                        paddle.assign(total, grad)
                    offset += size

    def share_parameters(self, names: Iterable[str] | None = None) -> int:
        """Give every rank of the group the owners' values; returns bytes received.

        Args:
            names: of the parameters, the same on every rank; all if not given.
        """
        received = 0
        chosen = list(self.parameters if names is None else names)
        for owner in range(self.topology.sharding):
            theirs = [self.parameters[name] for name in chosen if self.owner[name] == owner]
            if theirs:
                received += broadcast(theirs, self.process_of(owner), self.group)
        return received

    def rest(self, names: Iterable[str] | None = None) -> None:
        """Keep only what this rank owns, of the named parameters or of all."""
        for name in self.parameters if names is None else names:
            if name not in self._resting:
                self._resting.add(name)
                if self.owner[name] != self.topology.sharding_rank:
                    self.parameters[name]._clear_data()

    @paddle.no_grad()
    def wake(self, names: Iterable[str] | None = None) -> None:
        """Have the named parameters, or all, again; every rank of the group calls it for the same ones."""
        missing = [name for name in (self.parameters if names is None else names) if name in self._resting]
        for name in missing:
            self._resting.discard(name)
            if self.owner[name] != self.topology.sharding_rank:
                parameter = self.parameters[name]
                paddle.zeros(self._shapes[name], parameter.dtype)._share_buffer_to(parameter)
        self.share_parameters(missing)
