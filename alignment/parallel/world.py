"""`World`: the processes of a run and what they do together. Data parallelism only.

A run of one process never touches ``paddle.distributed``. With several (``python -m paddle.distributed.launch
--nproc_per_node N``) Paddle's process group (gloo on CPUs, nccl on GPUs) carries the gradients; everything small goes
through :class:`~alignment.parallel.control.ControlChannel`.

    world = init_world()
    with world.guard():            # an exception here reaches the other ranks by name instead of leaving them waiting
        ...
        total = world.sum(count)   # float, int or numpy array
        parts = world.all_gather_object(anything)
    world.close()
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from alignment.errors import AlignmentError
from alignment.parallel.control import ControlChannel, RankFailure

if TYPE_CHECKING:
    import paddle

    from alignment.parallel.monitor import Monitor

T = TypeVar("T")
BUCKET_ELEMENTS = 16 * 1024 * 1024  # float32 elements of one gradient bucket: 64 MiB


@dataclass(eq=False)
class World:
    """The processes of this run, seen from one of them.

    Attributes:
        rank: this process, 0-based.
        size: number of processes.
        local_rank: this process among those of its host.
        channel: the meeting place; None in a run of one process.
        monitor: the heartbeat of this process, told of each :meth:`phase`; None without one.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    channel: ControlChannel | None = None
    monitor: Monitor | None = None

    def phase(self, name: str, step: int | None = None) -> None:
        """Note what this rank does from now on (cheap), for the message that the others print should it fail here."""
        if self.monitor is not None:
            self.monitor.phase(name, step)

    @property
    def is_main(self) -> bool:
        """Whether this process speaks, writes and saves for the run."""
        return self.rank == 0

    def all_gather_object(self, value: T, label: str = "all_gather_object") -> list[T]:
        """Return every rank's ``value`` (any picklable object) in rank order. Waits for late ranks without limit.

        Raises:
            RankFailure: when another rank failed or ended.
        """
        if self.channel is None:
            return [value]
        return self.channel.exchange(label, value)

    def broadcast_object(self, value: T, src: int = 0) -> T:
        """Return rank ``src``'s ``value`` on every rank."""
        return self.all_gather_object(value if self.rank == src else None, f"broadcast_object from {src}")[src]  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait until every rank is here, however late it is."""
        self.all_gather_object(None, "barrier")

    def sum(self, value: T) -> T:
        """Sum a number or a numpy array over all ranks, in rank order (the same bits on every rank), in float64 where
        it is floating.

        Args:
            value: ``float``, ``int`` or ``np.ndarray`` of the same shape and dtype on every rank.

        Returns:
            The sum, of ``value``'s own type and dtype.
        """
        if self.channel is None:
            return value
        parts = self.all_gather_object(value, "sum")
        if isinstance(value, np.ndarray):
            wide = np.float64 if np.issubdtype(value.dtype, np.floating) else value.dtype
            return np.sum(np.stack(parts), axis=0, dtype=wide).astype(value.dtype)  # type: ignore[return-value]
        total = parts[0]
        for part in parts[1:]:
            total = total + part  # type: ignore[operator]
        return total

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on any rank."""
        return any(self.all_gather_object(bool(flag), "any"))

    def sum_gradients(self, parameters: Sequence[paddle.Tensor]) -> None:
        """Replace each parameter's gradient by its sum over all ranks.

        Gradients travel in flat float32 buckets and come back in their own dtype. A gradient that is missing here but
        present on another rank counts as zero; one that is missing everywhere stays missing.

        Args:
            parameters: the same parameters in the same order on every rank.

        Raises:
            RankFailure: when another rank failed before, or Paddle's process group fails.
        """
        if self.channel is None:
            return
        import paddle

        has = np.array([p.grad is not None for p in parameters], dtype=np.int64)
        # The exchange is the meeting too: gloo's 30 seconds start when everyone is here.
        anywhere = np.sum(self.all_gather_object(has, "sum_gradients"), axis=0) > 0
        with paddle.no_grad():
            self._sum_buckets([p for p, some in zip(parameters, anywhere, strict=True) if some])

    def _sum_buckets(self, todo: list[paddle.Tensor]) -> None:
        import paddle
        import paddle.distributed as dist

        start = 0
        while start < len(todo):
            stop, elements = start, 0
            while stop < len(todo) and (stop == start or elements + todo[stop].size <= BUCKET_ELEMENTS):
                elements += int(todo[stop].size)
                stop += 1
            bucket = todo[start:stop]
            flat = paddle.concat(
                [
                    p.grad.astype("float32").flatten() if p.grad is not None else paddle.zeros([int(p.size)], "float32")
                    for p in bucket
                ]
            )
            if start:
                self.barrier()
            try:
                dist.all_reduce(flat)
            except (RuntimeError, OSError) as error:
                raise RankFailure(
                    f"rank {self.rank}: summing gradients over {self.size} ranks failed: {error}"
                ) from error
            offset = 0
            for p in bucket:
                size = int(p.size)
                piece = flat[offset : offset + size].reshape(p.shape).astype(p.dtype)
                if p.grad is None:
                    p.grad = piece
                else:
                    paddle.assign(piece, p.grad)
                offset += size
            start = stop

    @contextlib.contextmanager
    def guard(self) -> Iterator[World]:
        """Tell the other ranks when the body fails, so that they stop with this rank's name and error instead of
        waiting for it.
        """
        try:
            yield self
        except RankFailure:
            self.close()
            raise
        except BaseException as error:
            self.close(f"rank {self.rank} failed: {type(error).__name__}: {error}")
            raise

    def close(self, failure: str | None = None) -> None:
        """Leave the run. Without ``failure`` all ranks meet once more first, because rank 0 hosts the others'
        connections.
        """
        if self.channel is None:
            return
        if failure is None and not sys.exc_info()[0]:
            with contextlib.suppress(RankFailure):
                self.channel.exchange("close", None)
        self.channel.close(failure)
        self.channel = None


def init_world() -> World:
    """Join the run that ``paddle.distributed.launch`` started, or be a run of one.

    Reads ``PADDLE_TRAINERS_NUM``, ``PADDLE_TRAINER_ID`` and ``PADDLE_RANK_IN_NODE``. Call it before models load.

    Raises:
        AlignmentError: when the variables are inconsistent or the process group cannot be made.
    """
    size = _env_int("PADDLE_TRAINERS_NUM", 1)
    rank = _env_int("PADDLE_TRAINER_ID", 0)
    if size <= 1:
        return World()
    if not 0 <= rank < size:
        raise AlignmentError(
            f"PADDLE_TRAINER_ID={rank} does not fit PADDLE_TRAINERS_NUM={size}; use paddle.distributed.launch"
        )

    import paddle.distributed as dist
    from paddle.base import core

    if not dist.is_initialized():
        try:
            dist.init_parallel_env()
        except (RuntimeError, OSError, ValueError, AssertionError) as error:
            raise AlignmentError(f"rank {rank} of {size} could not join the process group: {error}") from error
    store = core.create_or_get_global_tcp_store()
    if rank == 0:
        host, token = _own_address(), secrets.token_hex(16)
        channel = ControlChannel(0, size, host, token)
        store.set("alignment/control", f"{host} {channel.port} {token}")
    else:
        host, port, token = bytes(store.get("alignment/control")).decode().split()
        channel = ControlChannel(rank, size, host, token, int(port))
    world = World(rank, size, _env_int("PADDLE_RANK_IN_NODE", _env_int("PADDLE_LOCAL_RANK", rank)), channel)
    world.barrier()
    return world


def _env_int(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise AlignmentError(f"the environment variable {name} must be a whole number, not {text!r}") from None


def _own_address() -> str:
    """The address of this host as the job's other hosts know it (rank 0's endpoint as the launcher published it)."""
    endpoint = os.environ.get("PADDLE_CURRENT_ENDPOINT") or os.environ.get("PADDLE_MASTER") or ""
    host = endpoint.rsplit(":", 1)[0]
    return socket.gethostbyname(host) if host else "127.0.0.1"
