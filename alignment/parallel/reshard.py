"""Training layout -> rollout layout: the weights of a divided model, copied into one that is divided less.

``eval_mode`` "tensor_parallel" puts the stages of a pipeline together, "single" the tensor ranks' slices too. Every
process of a data rank then holds a rollout model and can answer prompts of its own.

Weights move stage by stage in flat buckets: a broadcast over the pipeline, then for "single" an all-gather over the
tensor ranks. A tied tensor moves once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import Tensor

from alignment.errors import InvariantError
from alignment.parallel.group_collectives import all_gather
from alignment.parallel.topology import BUCKET_ELEMENTS
from alignment.parallel.world import World


@dataclass(frozen=True)
class _Entry:
    """A tensor of the whole model as one stage holds it."""

    name: str
    axis: int | None
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass
class Moved:
    """What one refresh cost.

    Attributes:
        nbytes: received by this process.
        seconds: from begin to end.
    """

    nbytes: int
    seconds: float


class Resharder:
    """Keeps a rollout model's weights in step with a training model's; every process of the data rank calls together.

    Args:
        world: the processes.
        source: this process's part of the training model: ``(axis, tensor)`` by whole name, without duplicates of tied
            tensors.
        target: the rollout model's tensors by whole name.
        merge_tensor: whether the rollout model has no tensor parallelism.

    Raises:
        InvariantError: the rollout model has a tensor that no process of the training model holds.
    """

    def __init__(
        self,
        world: World,
        source: Mapping[str, tuple[int | None, Tensor]],
        target: Mapping[str, Tensor],
        merge_tensor: bool,
    ) -> None:
        self.world, self.source, self.target = world, dict(source), dict(target)
        self.merge_tensor = merge_tensor and world.topology.tensor > 1
        self.version = -1
        mine = [
            _Entry(name, axis, tuple(tensor.shape), str(tensor.dtype).split(".")[-1])
            for name, (axis, tensor) in source.items()
        ]
        peers = world.model_peers(mine, "tensors of the training model")
        tensor = world.topology.tensor
        self.stages: list[list[_Entry]] = [peers[stage * tensor] for stage in range(world.topology.pipeline)]
        known = {entry.name for stage in self.stages for entry in stage}
        missing = sorted(set(self.target) - known)
        if missing:
            raise InvariantError(f"the rollout model has tensors that nothing would fill: {missing[:5]}")

    @paddle.no_grad()
    def refresh(self, version: int) -> Moved:
        """Copy the training model's weights as they are now.

        Args:
            version: optimizer steps that these weights have seen; :attr:`version` from now on.

        Returns:
            What it cost. The first time every bucket is compared with its sender by checksum.

        Raises:
            InvariantError: the bytes that arrived are not those that were sent.
        """
        began, received = time.perf_counter(), 0
        for stage, entries in enumerate(self.stages):
            for bucket in _buckets([entry for entry in entries if entry.name in self.target]):
                received += self._move(stage, bucket)
        self.version = version
        return Moved(received, time.perf_counter() - began)

    def _move(self, stage: int, bucket: list[_Entry]) -> int:
        topology, groups = self.world.topology, self.world.groups
        assert groups is not None
        size = sum(entry.size for entry in bucket)
        if topology.stage == stage:
            flat = paddle.concat([self.source[entry.name][1].detach().flatten() for entry in bucket])
        else:
            flat = paddle.zeros([size], dtype=bucket[0].dtype)
        received = 0
        if groups.pipeline is not None:
            sender = topology.process_at(topology.data_rank, stage, topology.tensor_rank)
            if self.version < 0:
                self._check(flat, sender, groups.pipeline)
            else:
                dist.broadcast(flat, src=sender, group=groups.pipeline)
            received += 0 if topology.stage == stage else size * flat.element_size()
        parts = [flat]
        if self.merge_tensor:
            parts = all_gather(flat, groups.tensor)
            received += size * flat.element_size() * (topology.tensor - 1)
        offset = 0
        for entry in bucket:
            pieces = [part[offset : offset + entry.size].reshape(list(entry.shape)) for part in parts]
            joined = pieces[0]
            if len(pieces) > 1 and entry.axis is not None:
                joined = paddle.concat(pieces, axis=entry.axis)
            target = self.target[entry.name]
            paddle.assign(joined.astype(target.dtype), target)
            offset += entry.size
        return received

    def _check(self, flat: Tensor, sender: int, group: Any) -> None:
        """Broadcast with a checksum behind the numbers."""
        sums = paddle.stack([flat.astype("float64").sum(), flat.astype("float64").abs().sum()])
        dist.broadcast(flat, src=sender, group=group)
        dist.broadcast(sums, src=sender, group=group)
        here = paddle.stack([flat.astype("float64").sum(), flat.astype("float64").abs().sum()])
        if not bool((here == sums).all()):
            raise InvariantError(
                f"process {self.world.process}: weights of process {sender} arrived with checksum {here.tolist()} in "
                f"place of {sums.tolist()}; the rollout would sample from wrong weights"
            )


def _buckets(entries: list[_Entry]) -> Iterator[list[_Entry]]:
    """Runs of entries of one dtype and at most ``BUCKET_ELEMENTS`` elements (a larger tensor is alone)."""
    bucket: list[_Entry] = []
    size = 0
    for entry in entries:
        if bucket and (size + entry.size > BUCKET_ELEMENTS or entry.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(entry)
        size += entry.size
    if bucket:
        yield bucket
