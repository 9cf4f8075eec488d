"""The layout of a run's processes from its arguments."""

from __future__ import annotations

from typing import Any

from alignment.arguments import device
from alignment.parallel.topology import Topology


def topology_of(args: Any, processes: int | None = None) -> Topology:
    """How the processes that ``paddle.distributed.launch`` started share models and data.

    One process is one process, whatever the degrees say. With ``sharding`` and no ``sharding_parallel_degree`` all
    processes that tensor and pipeline parallelism leave share the optimizer (as in paddlenlp).

    Args:
        args: resolved arguments.
        processes: of the run, seen from process 0, where it has not been started (a plan); those of this run if not
            given.

    Raises:
        ArgumentsError: the degrees do not fit the number of processes.
    """
    process = device.rank() if processes is None else 0
    processes = device.world_size() if processes is None else processes
    if processes == 1:
        return Topology()
    tensor, pipeline = max(1, args.tensor_parallel_degree), max(1, args.pipeline_parallel_degree)
    stage = next((int(word[-1]) for word in args.sharding.split() if word.startswith("stage")), 0)
    sharding = args.sharding_parallel_degree if stage else 1
    if sharding < 1:
        sharding = max(1, processes // (tensor * pipeline))
    return Topology(
        processes=processes,
        process=process,
        tensor=tensor,
        pipeline=pipeline,
        sharding=sharding,
        sharding_stage=stage if sharding > 1 else 0,
        sequence_parallel=bool(args.sequence_parallel) and tensor > 1,
    )
