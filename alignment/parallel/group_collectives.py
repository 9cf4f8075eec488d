"""Collectives on groups of processes, for what is too large for the control channel: gradients and parameters.

A thin layer over fleet's groups; tensors travel in flat buckets. On CPUs the backend of
:mod:`alignment.parallel.cpu_backend` adds in rank order, so that a sum has the same bits on every process.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from alignment.parallel.control import RankFailure
from alignment.parallel.topology import BUCKET_ELEMENTS, Topology

if TYPE_CHECKING:
    import paddle

    from alignment.parallel.pipeline import Pipeline


class Groups:
    """Fleet's process groups of one layout.

    Args:
        topology: the layout that fleet was initialised with.
        hcg: fleet's ``HybridCommunicateGroup``.

    Attributes:
        tensor, pipeline, sharding, replicas: the groups of this process; None where the axis has one process.
        schedule: of the pipeline, where there is one.
    """

    def __init__(self, topology: Topology, hcg: Any) -> None:
        self.topology = topology
        self.tensor = hcg.get_model_parallel_group() if topology.tensor > 1 else None
        self.pipeline = hcg.get_pipe_parallel_group() if topology.pipeline > 1 else None
        self.sharding = hcg.get_sharding_parallel_group() if topology.sharding > 1 else None
        replicas = topology.data_size // topology.sharding
        self.replicas = hcg.get_data_parallel_group() if replicas > 1 else None
        self.hcg = hcg
        self.schedule: Pipeline | None = None
        if self.pipeline is not None:
            from alignment.parallel.pipeline import Pipeline

            self.schedule = Pipeline(topology, hcg, self.pipeline)

    def sum_over_tensor_ranks(self, tensors: Sequence[paddle.Tensor]) -> None:
        """Replace each tensor by its sum over the tensor ranks, in place."""
        if self.tensor is not None and tensors:
            all_reduce(tensors, self.tensor)

    def sum_over_replicas(self, tensors: Sequence[paddle.Tensor]) -> None:
        """Replace each tensor by its sum over the data replicas, in place."""
        if self.replicas is not None and tensors:
            all_reduce(tensors, self.replicas)

    def sum_over_ends(self, tensor: paddle.Tensor | None) -> None:
        """Replace a tensor that the first and the last stage of a pipeline share by the sum of the two, in place; None
        on the stages between, and everywhere when nothing is shared.
        """
        if self.pipeline is None or tensor is None:
            return
        import paddle
        import paddle.distributed as dist

        topology = self.topology
        first = topology.process_at(topology.data_rank, 0, topology.tensor_rank)
        last = topology.process_at(topology.data_rank, topology.pipeline - 1, topology.tensor_rank)
        if topology.last_stage:
            _guarded(dist.send, tensor, dst=first, group=self.pipeline)
            _guarded(dist.recv, tensor, src=first, group=self.pipeline)
        else:
            other = paddle.zeros_like(tensor)
            _guarded(dist.recv, other, src=last, group=self.pipeline)
            paddle.assign(tensor + other, tensor)
            _guarded(dist.send, tensor, dst=last, group=self.pipeline)

    def sum_over_data(self, tensors: Sequence[paddle.Tensor]) -> None:
        """Replace each tensor by its sum over all data ranks, in place."""
        for group in (self.sharding, self.replicas):
            if group is not None and tensors:
                all_reduce(tensors, group)


def buckets(tensors: Sequence[paddle.Tensor]) -> Iterator[list[paddle.Tensor]]:
    """Cut a list of tensors into runs of at most ``BUCKET_ELEMENTS`` elements (a larger tensor is alone)."""
    start = 0
    while start < len(tensors):
        stop, elements = start, 0
        while stop < len(tensors) and (stop == start or elements + tensors[stop].size <= BUCKET_ELEMENTS):
            elements += int(tensors[stop].size)
            stop += 1
        yield list(tensors[start:stop])
        start = stop


def all_reduce(tensors: Sequence[paddle.Tensor], group: Any) -> None:
    """Replace each tensor by its sum over a group, in place; sums are taken in float32.

    Raises:
        RankFailure: Paddle's process group failed.
    """
    import paddle
    import paddle.distributed as dist

    with paddle.no_grad():
        for bucket in buckets(tensors):
            flat = paddle.concat([tensor.detach().astype("float32").flatten() for tensor in bucket])
            _guarded(dist.all_reduce, flat, group=group)
            _scatter_back(flat, bucket)


def broadcast(tensors: Sequence[paddle.Tensor], source: int, group: Any) -> int:
    """Give every process of a group the values that process ``source`` (its number in the run) has, in place.

    Returns:
        Bytes received by each.

    Raises:
        RankFailure: Paddle's process group failed.
    """
    import paddle
    import paddle.distributed as dist

    sent = 0
    with paddle.no_grad():
        for bucket in _by_dtype(tensors):
            for part in buckets(bucket):
                flat = paddle.concat([tensor.detach().flatten() for tensor in part])
                _guarded(dist.broadcast, flat, src=source, group=group)
                _scatter_back(flat, part)
                sent += int(flat.size) * flat.element_size()
    return sent


def all_gather(tensor: paddle.Tensor, group: Any) -> list[paddle.Tensor]:
    """Every process's tensor (all of one shape and dtype), in the group's order."""
    import paddle.distributed as dist

    parts: list[paddle.Tensor] = []
    _guarded(dist.all_gather, parts, tensor.detach().contiguous(), group=group)
    return parts


def broadcast_object(value: Any, source: int, group: Any) -> Any:
    """Give every process of a group the picklable ``value`` of process ``source`` (its number in the run)."""
    import paddle
    import paddle.distributed as dist

    mine = dist.get_rank() == source
    data = np.frombuffer(pickle.dumps(value), np.uint8) if mine else np.zeros([0], np.uint8)
    size = paddle.to_tensor([len(data)], dtype="int64")
    _guarded(dist.broadcast, size, src=source, group=group)
    payload = paddle.to_tensor(data) if mine else paddle.zeros([int(size)], dtype="uint8")
    _guarded(dist.broadcast, payload, src=source, group=group)
    return value if mine else pickle.loads(payload.numpy().tobytes())


def _guarded(function: Any, *args: Any, **kwargs: Any) -> None:
    try:
        function(*args, **kwargs)
    except (RuntimeError, OSError) as error:
        if isinstance(error, RankFailure):
            raise
        raise RankFailure(f"{function.__name__} in a group of {kwargs['group'].nranks} failed: {error}") from error


def _by_dtype(tensors: Sequence[paddle.Tensor]) -> list[list[paddle.Tensor]]:
    found: dict[Any, list[paddle.Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.dtype, []).append(tensor)
    return list(found.values())


def _scatter_back(flat: paddle.Tensor, bucket: Sequence[paddle.Tensor]) -> None:
    import paddle

    offset = 0
    for tensor in bucket:
        size = int(tensor.size)
        paddle.assign(flat[offset : offset + size].reshape(tensor.shape).astype(tensor.dtype), tensor)
        offset += size
