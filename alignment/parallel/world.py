"""`World`: the processes of a run and what they do together.

A run of one process never touches ``paddle.distributed``. With several (``python -m paddle.distributed.launch
--nproc_per_node N``) fleet's process groups (gloo on CPUs, nccl on GPUs) carry gradients, parameters and activations;
everything small goes through :class:`~alignment.parallel.control.ControlChannel`.

    world = init_world(topology)
    with world.guard():            # an exception here reaches the other ranks by name instead of leaving them waiting
        ...
        total = world.sum(count)   # over data ranks: float, int or numpy array
        parts = world.all_gather_object(anything)
    world.close()

Algorithms think in **data ranks** (``rank``, ``size``): which rows are whose. Processes that hold parts of one model
(tensor parallelism, pipelines) share a data rank, work on the same rows and come to the same figures.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from alignment.errors import AlignmentError
from alignment.parallel.control import ControlChannel, RankFailure
from alignment.parallel.gradients import gradient, gradient_dtype, set_gradient
from alignment.parallel.topology import Topology

if TYPE_CHECKING:
    import paddle

    from alignment.parallel.group_collectives import Groups
    from alignment.parallel.monitor import Monitor

T = TypeVar("T")
JOIN_TIMEOUT = 300.0  # seconds
FOR_EVER = 1e6  # seconds; what a socket can still count


@dataclass(eq=False)
class World:
    """The processes of this run, seen from one of them.

    Attributes:
        topology: how they share models and data.
        local_rank: this process among those of its host.
        channel: the meeting place; None in a run of one process.
        groups: fleet's process groups; None in a run of one process.
        monitor: the heartbeat of this process, told of each :meth:`phase`; None without one.
    """

    topology: Topology = field(default_factory=Topology)
    local_rank: int = 0
    channel: ControlChannel | None = None
    groups: Groups | None = None
    monitor: Monitor | None = None

    @property
    def rank(self) -> int:
        """The data rank of this process: which rows it works on."""
        return self.topology.data_rank

    @property
    def size(self) -> int:
        """The number of data ranks."""
        return self.topology.data_size

    @property
    def process(self) -> int:
        """This process, 0-based."""
        return self.topology.process

    @property
    def processes(self) -> int:
        """The number of processes."""
        return self.topology.processes

    def phase(self, name: str, step: int | None = None) -> None:
        """Note what this rank does from now on (cheap), for the message that the others print should it fail here."""
        if self.monitor is not None:
            self.monitor.phase(name, step)

    @property
    def is_main(self) -> bool:
        """Whether this process speaks, writes and saves for the run."""
        return self.process == 0

    def all_processes(self, value: T, label: str = "all_processes") -> list[T]:
        """Return every process's ``value`` (any picklable object) in order. Waits for late ones without limit.

        Raises:
            RankFailure: when another process failed or ended.
        """
        if self.channel is None:
            return [value]
        return self.channel.exchange(label, value)

    def gather_to_main(self, value: T, label: str = "gather_to_main") -> list[T] | None:
        """As :meth:`all_processes`, but only process 0 gets the values, the others None."""
        if self.channel is None:
            return [value]
        return self.channel.exchange(label, value, only_first=True)

    def all_gather_object(self, value: T, label: str = "all_gather_object") -> list[T]:
        """Return every data rank's ``value`` (any picklable object) in rank order. Waits for late ranks without limit.

        Processes that share a data rank must give the same value; the first one's is taken.

        Raises:
            RankFailure: when another process failed or ended.
        """
        if self.channel is None:
            return [value]
        if not self.topology.splits_model:
            return self.channel.exchange(label, value)
        chosen = self.topology.representatives()
        values = self.channel.exchange(label, value if self.process in chosen else None)
        return [values[process] for process in chosen]

    def data_peers(self, value: T, label: str = "data_peers") -> list[T]:
        """Return the values of the processes that hold the same part of the model, in the order of data ranks."""
        values = self.all_processes(value, label)
        return [values[process] for process in self.topology.data_peers()]

    def model_peers(self, value: T, label: str = "model_peers") -> list[T]:
        """Return the values of the processes of this data rank, stage by stage, in each by tensor rank."""
        values = self.all_processes(value, label)
        return [values[process] for process in self.topology.model_peers()]

    def broadcast_object(self, value: T, src: int = 0) -> T:
        """Return process ``src``'s ``value`` on every process."""
        return self.all_processes(value if self.process == src else None, f"broadcast_object from {src}")[src]  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait until every process is here, however late it is."""
        self.all_processes(None, "barrier")

    def sum(self, value: T) -> T:
        """Sum a number or a numpy array over all data ranks, in rank order (the same bits on every rank), in float64
        where it is floating.

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
        """Whether ``flag`` is true in any process."""
        return any(self.all_processes(bool(flag), "any"))

    def sum_gradients(self, parameters: Sequence[paddle.Tensor]) -> None:
        """Replace each parameter's gradient by its sum over all data ranks.

        Gradients travel in flat float32 buckets and come back in their own dtype. A gradient that is missing here but
        present on another rank counts as zero; one that is missing everywhere stays missing.

        Args:
            parameters: the same parameters in the same order on every process that holds this part of the model.

        Raises:
            RankFailure: when another process failed before, or Paddle's process group fails.
        """
        if self.groups is None:
            return
        import paddle

        has = np.array([gradient(p) is not None for p in parameters], dtype=bool)
        # The exchange is the meeting too: a collective's patience starts when everyone is here.
        peers = self.data_peers(has, "sum_gradients")
        if self.size == 1:
            return
        anywhere = np.any(np.stack(peers), axis=0)
        todo = [p for p, some in zip(parameters, anywhere, strict=True) if some]
        for p in todo:
            if gradient(p) is None:
                set_gradient(p, paddle.zeros(p.shape, gradient_dtype(p)))
        self.groups.sum_over_data([gradient(p) for p in todo])

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
            self.close(f"rank {self.process} failed: {type(error).__name__}: {error}")
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
        from alignment.parallel import cpu_backend

        self.channel.close(failure)
        cpu_backend.leave(failure)
        self.channel = None


def init_world(topology: Topology | None = None, patience: float = 1800.0, join_timeout: float = JOIN_TIMEOUT) -> World:
    """Join the run that ``paddle.distributed.launch`` started, or be a run of one.

    Reads ``PADDLE_TRAINERS_NUM``, ``PADDLE_TRAINER_ID`` and ``PADDLE_RANK_IN_NODE``. Call it before models load.

    Args:
        topology: the layout; plain data parallelism over all processes if not given.
        patience: seconds that a CPU process waits in a collective for one that lives but is late.
        join_timeout: seconds for all processes to join; 0 for ever. Whoever waits for longer ends (status 2) with the
            names of those that are missing.

    Raises:
        AlignmentError: when the variables are inconsistent or the process groups cannot be made; the other processes
            end with this one's error.
    """
    size = _env_int("PADDLE_TRAINERS_NUM", 1)
    rank = _env_int("PADDLE_TRAINER_ID", 0)
    if size <= 1:
        return World()
    if not 0 <= rank < size:
        raise AlignmentError(
            f"PADDLE_TRAINER_ID={rank} does not fit PADDLE_TRAINERS_NUM={size}; use paddle.distributed.launch"
        )
    topology = topology or Topology(size, rank)

    from paddle.base import core

    from alignment.parallel.group_collectives import Groups
    from alignment.parallel.joining import Joining

    with Joining(rank, size, join_timeout):
        try:
            hcg = _init_fleet(topology, patience)
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
        channel.exchange("joined", None)
    local_rank = _env_int("PADDLE_RANK_IN_NODE", _env_int("PADDLE_LOCAL_RANK", rank))
    return World(topology, local_rank, channel, Groups(topology, hcg))


def _init_fleet(topology: Topology, patience: float) -> Any:
    """Start fleet with the topology's degrees and return its groups."""
    from paddle.distributed import fleet
    from paddle.distributed.fleet.utils.log_util import set_log_level

    from alignment.parallel import cpu_backend

    set_log_level("WARNING")  # every group and every layer would be a line
    cpu_backend.apply(patience=patience)
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {
        "dp_degree": topology.data_size // topology.sharding,
        "mp_degree": topology.tensor,
        "pp_degree": topology.pipeline,
        "sharding_degree": topology.sharding,
        "sep_degree": 1,
        "order": ["dp", "pp", "sharding", "sep", "mp"],
    }
    strategy.pipeline_configs = {
        "accumulate_steps": 1,
        "micro_batch_size": 1,
        # parts of one tensor are sent by each tensor rank and gathered behind the border
        "enable_partial_send_recv": False,
    }
    # Micro batches differ in shape.
    strategy.hybrid_configs["pp_configs"].enable_dynamic_shape = True
    fleet.init(is_collective=True, strategy=strategy, log_level="WARNING")
    return fleet.get_hybrid_communicate_group()


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
