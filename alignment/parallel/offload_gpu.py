"""Offloading on a GPU: groups lie in pinned host memory, copied in buckets on a stream of their own.

**Not run on a GPU by this project yet.** What does not need one (fusing tensors into buckets, giving their memory up,
sharing it out again) is tested on the CPU with plain copies; the copies themselves, :class:`SideStream`, follow
Paddle's own use of ``AsyncLoad`` (paddle.optimizer.fusion_utils, 3.3.1) and have not been run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import paddle
from paddle import Tensor

#: Bytes of one copy.
BUCKET = 256 << 20
# Slices of a bucket begin where an allocation of their own might: kernels load up to 16 bytes at a time.
_ALIGNMENT = 256


class Copier(Protocol):
    """Copies whole buckets between the device and the host."""

    def moves(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in the memory of the device that is to be freed."""

    def to_host(self, source: Tensor, target: Tensor | None) -> Tensor:
        """Begin to copy a bucket into host memory (``target``, or new memory) and return that."""

    def to_device(self, source: Tensor) -> Tensor:
        """Begin to copy a bucket into new device memory and return that."""

    def wait(self) -> None:
        """Return when all copies that were begun have ended."""


class SideStream:
    """Pinned host memory and Paddle's copy stream. Not run on a GPU by this project yet."""

    def __init__(self) -> None:
        from paddle.incubate.tensor.manipulation import create_async_load

        self._loader: Any = create_async_load()
        self._tasks: list[Any] = []

    def moves(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the GPU; AdamW's beta powers, for one, are on the CPU and stay there."""
        return bool(tensor.place.is_gpu_place())

    def to_host(self, source: Tensor, target: Tensor | None) -> Tensor:
        """Begin to copy a bucket into pinned memory."""
        from paddle.incubate.tensor.manipulation import async_offload, async_offload_with_offset

        if target is None:
            target, task = async_offload(source, self._loader)
        else:
            task = async_offload_with_offset(source, target, 0, 0, int(source.size), self._loader)
        self._tasks.append(task)
        return target

    def to_device(self, source: Tensor) -> Tensor:
        """Begin to copy a bucket from pinned memory."""
        from paddle.incubate.tensor.manipulation import async_reload

        target, task = async_reload(source, self._loader)
        self._tasks.append(task)
        return target

    def wait(self) -> None:
        """Wait on the host for the copies."""
        for task in self._tasks:
            task.cpu_wait()
        self._tasks = []


@dataclass
class _Bucket:
    """Tensors of one type that lie behind each other in one block: ``places[i]`` elements from its beginning."""

    tensors: list[Tensor]
    places: list[int]
    device: Tensor | None
    host: Tensor | None = None

    def share(self) -> None:
        """Let every tensor have its slice of the block."""
        assert self.device is not None
        for tensor, place in zip(self.tensors, self.places, strict=True):
            self.device._slice(place, place + int(tensor.size))._share_buffer_to(tensor)

    def give_up(self) -> None:
        """Take the block from every tensor. An operator that is given one of them now raises."""
        for tensor in self.tensors:
            tensor._clear_data()
        self.device = None


class PinnedMemory:
    """Keeps groups in host memory. See the module's note on what was run.

    The first time a group leaves, its tensors are fused into buckets, which stay as they are from then on: each
    bucket is one copy. A group that is prefetched takes device memory one phase early.

    Args:
        copier: how buckets are copied.
    """

    def __init__(self, copier: Copier | None = None) -> None:
        self.copier = copier or SideStream()
        self._buckets: dict[str, list[_Bucket]] = {}
        self._coming: set[str] = set()

    @paddle.no_grad()
    def move_out(self, group: str, tensors: Sequence[Tensor], frozen: bool) -> int:
        """Copy the group to the host (a frozen one the first time only) and free its device memory; returns the bytes
        copied.
        """
        buckets, copied = self._buckets.setdefault(group, []), 0
        known = {id(tensor) for bucket in buckets for tensor in bucket.tensors}
        new = [tensor for tensor in tensors if id(tensor) not in known and tensor._is_initialized()]
        buckets += fuse([tensor for tensor in new if self.copier.moves(tensor)])
        for bucket in buckets:
            if bucket.host is None or not frozen:
                assert bucket.device is not None
                bucket.host = self.copier.to_host(bucket.device, bucket.host)
                copied += int(bucket.device.size) * bucket.device.element_size()
        self.copier.wait()
        for bucket in buckets:
            bucket.give_up()
        return copied

    def prefetch(self, group: str) -> None:
        """Begin to copy the group to the device."""
        if group in self._coming:
            return
        for bucket in self._buckets.get(group, []):
            assert bucket.host is not None
            bucket.device = self.copier.to_device(bucket.host)
        self._coming.add(group)

    def move_in(self, group: str, tensors: Sequence[Tensor]) -> int:
        """Wait for the group to be on the device and give every tensor its memory back; returns its bytes."""
        self.prefetch(group)
        self._coming.discard(group)
        self.copier.wait()
        total = 0
        for bucket in self._buckets.get(group, []):
            bucket.share()
            assert bucket.device is not None
            total += int(bucket.device.size) * bucket.device.element_size()
        return total

    def close(self) -> None:
        """Bring every group back, since nothing else would keep its values, and free the host memory."""
        for group, buckets in self._buckets.items():
            if any(bucket.device is None or group in self._coming for bucket in buckets):
                self.move_in(group, ())
        self._buckets = {}


def fuse(tensors: Sequence[Tensor], most: int = BUCKET) -> list[_Bucket]:
    """Move tensors into shared blocks of at most ``most`` bytes each (a larger tensor has a block of its own).

    Values, shapes and the tensor objects stay as they are. Tensors that share memory already (tied weights) are moved
    once and share it still.
    """
    first: dict[int, Tensor] = {}
    for tensor in tensors:
        if tensor._is_initialized():
            first.setdefault(tensor.data_ptr(), tensor)
    by_type: dict[Any, list[list[Tensor]]] = {}
    for tensor in first.values():
        rows = by_type.setdefault(tensor.dtype, [[]])
        size = sum(_room(other) for other in rows[-1])
        if rows[-1] and (size + _room(tensor)) * tensor.element_size() > most:
            rows.append([])
        rows[-1].append(tensor)
    twins = {pointer: [t for t in tensors if t._is_initialized() and t.data_ptr() == pointer] for pointer in first}
    return [_fused(row, twins) for rows in by_type.values() for row in rows]


def _room(tensor: Tensor) -> int:
    """Elements that a tensor takes in a bucket."""
    unit = max(1, _ALIGNMENT // tensor.element_size())
    return -(-int(tensor.size) // unit) * unit


def _fused(row: list[Tensor], twins: dict[int, list[Tensor]]) -> _Bucket:
    block = paddle.zeros([sum(_room(tensor) for tensor in row)], dtype=row[0].dtype)
    bucket, place = _Bucket([], [], block), 0
    for tensor in row:
        flat = tensor.detach().reshape([-1])
        paddle.assign(flat, block._slice(place, place + int(tensor.size)))
        for twin in twins[tensor.data_ptr()]:
            bucket.tensors.append(twin)
            bucket.places.append(place)
        place += _room(tensor)
    bucket.share()
    return bucket
