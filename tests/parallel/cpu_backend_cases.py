"""Every communication that the CPU backend offers, as a job for forked ranks, with what NumPy says must come out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

LARGE = 20011  # elements; more than the size from which all_reduce works in slices, and no multiple of anything


def given(rank: int, *shape: int, dtype: str = "float32") -> np.ndarray:
    """What rank ``rank`` has: small whole numbers for integers, normal numbers for floats."""
    rng = np.random.default_rng([rank, *shape])
    if dtype == "bool":
        return rng.random(shape) < 0.5
    if "int" in dtype:
        return rng.integers(1, 5, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def everyone(size: int, *shape: int, dtype: str = "float32") -> np.ndarray:
    """What all ranks have: ``[size, *shape]``."""
    return np.stack([given(rank, *shape, dtype=dtype) for rank in range(size)])


@dataclass(frozen=True)
class Case:
    """One communication: what a rank does, and what it must get (both from rank and size)."""

    run: Callable[[int, int], np.ndarray]
    expected: Callable[[int, int], np.ndarray]


CASES: dict[str, Case] = {}


def case(name: str, expected: Callable[[int, int], np.ndarray]) -> Callable[[Callable], Callable]:
    """Register a case under ``name``."""

    def register(run: Callable[[int, int], np.ndarray]) -> Callable[[int, int], np.ndarray]:
        CASES[name] = Case(run, expected)
        return run

    return register


def communicate() -> dict[str, np.ndarray]:
    """Run all cases; return what this rank got."""
    import paddle.distributed as dist

    start()
    return {name: each.run(dist.get_rank(), dist.get_world_size()) for name, each in CASES.items()}


def start(**options: Any) -> None:
    """Apply the backend and join the run."""
    import paddle.distributed as dist

    from alignment.parallel import cpu_backend

    assert cpu_backend.apply(**options)
    dist.init_parallel_env()


def tensor(values: Any, dtype: str | None = None) -> Any:
    import paddle

    return paddle.to_tensor(values, dtype=dtype)


def world() -> Any:
    """Paddle's process group of all ranks."""
    import paddle.distributed as dist

    return dist.get_group(0).process_group


def _sum_of(dtype: str, *shape: int) -> tuple[Callable, Callable]:
    def run(rank: int, size: int) -> np.ndarray:
        import paddle.distributed as dist

        x = tensor(given(rank, *shape, dtype="float32" if dtype == "bfloat16" else dtype), dtype)
        dist.all_reduce(x)
        return x.astype("float32").numpy() if dtype == "bfloat16" else x.numpy()

    def expected(rank: int, size: int) -> np.ndarray:
        if dtype == "bfloat16":
            total = np.add.reduce([to_bfloat16(given(r, *shape)) for r in range(size)])
            return to_bfloat16(total)
        if dtype == "float16":
            return np.add.reduce(everyone(size, *shape, dtype=dtype).astype(np.float32)).astype(np.float16)
        total = given(0, *shape, dtype=dtype).copy()  # in rank order, as a sum of float32 depends on it
        for other in range(1, size):
            total = total + given(other, *shape, dtype=dtype)
        return total

    return run, expected


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bfloat16 (ties to even), kept in float32: by frexp, 8 bits of mantissa."""
    mantissa, exponent = np.frexp(values.astype(np.float64))
    return np.ldexp(np.round(mantissa * 256) / 256, exponent).astype(np.float32)


for _dtype in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"):
    for _name, _shape in (("small", (3, 5)), ("large", (LARGE,))):
        CASES[f"all_reduce {_dtype} {_name}"] = Case(*_sum_of(_dtype, *_shape))


def _reduction(op: str) -> Callable[[int, int], np.ndarray]:
    def run(rank: int, size: int) -> np.ndarray:
        import paddle.distributed as dist

        x = tensor(given(rank, 4, 3))
        dist.all_reduce(x, op=getattr(dist.ReduceOp, op))
        return x.numpy()

    return run


for _op, _combine in (("MAX", np.max), ("MIN", np.min), ("PROD", np.prod), ("AVG", np.mean)):
    CASES[f"all_reduce {_op}"] = Case(_reduction(_op), lambda rank, size, f=_combine: f(everyone(size, 4, 3), axis=0))


@case("all_reduce of a transposed view", lambda rank, size: everyone(size, 4, 3).sum(0))
def _(rank: int, size: int) -> np.ndarray:
    import paddle.distributed as dist

    x = tensor(given(rank, 4, 3))
    view = x.transpose([1, 0])
    assert not view.is_contiguous()
    dist.all_reduce(view)
    return x.numpy()


@case(
    "all_reduce of a slice of a buffer",
    lambda rank, size: np.concatenate([given(rank, 12)[:4], everyone(size, 12).sum(0)[4:8], given(rank, 12)[8:]]),
)
def _(rank: int, size: int) -> np.ndarray:
    import paddle.distributed as dist

    x = tensor(given(rank, 12))
    dist.all_reduce(x._slice(4, 8))
    return x.numpy()


@case("all_reduce of a trainable parameter", lambda rank, size: everyone(size, 6).sum(0))
def _(rank: int, size: int) -> np.ndarray:
    import paddle
    import paddle.distributed as dist

    parameter = paddle.create_parameter([6], "float32")
    parameter.set_value(tensor(given(rank, 6)))
    dist.all_reduce(parameter)
    return parameter.numpy()


@case("all_reduce of no elements", lambda rank, size: np.zeros((0, 3), np.float32))
def _(rank: int, size: int) -> np.ndarray:
    import paddle
    import paddle.distributed as dist

    x = paddle.empty([0, 3])
    dist.all_reduce(x)
    return x.numpy()


@case("all_reduce asynchronous, of a number", lambda rank, size: everyone(size).sum(0))
def _(rank: int, size: int) -> np.ndarray:
    import paddle.distributed as dist

    x = tensor(given(rank))
    task = dist.all_reduce(x, sync_op=False)
    task.wait()
    assert task.is_completed()
    return x.numpy()


@case("all_reduce on the calculation stream", lambda rank, size: everyone(size, 7).sum(0))
def _(rank: int, size: int) -> np.ndarray:
    import paddle.distributed as dist

    x = tensor(given(rank, 7))
    dist.stream.all_reduce(x, sync_op=True, use_calc_stream=True)
    return x.numpy()


@case("allreduce, the older name", lambda rank, size: everyone(size, 7).sum(0))
def _(rank: int, size: int) -> np.ndarray:
    x = tensor(given(rank, 7))
    world().allreduce(x).wait()
    return x.numpy()


@case("reduce", lambda rank, size: everyone(size, 5).sum(0) if rank == 1 else given(rank, 5))
def _(rank: int, size: int) -> np.ndarray:
    import paddle.distributed as dist

    x = tensor(given(rank, 5))
    dist.reduce(x, dst=1)
    return x.numpy()


@case("reduce on the calculation stream", lambda rank, size: everyone(size, 5).max(0) if rank == 1 else given(rank, 5))
def _(rank: int, size: int) -> np.ndarray:
    import paddle.distributed as dist

    x = tensor(given(rank, 5))
    dist.stream.reduce(x, dst=1, op=dist.ReduceOp.MAX, sync_op=True, use_calc_stream=True)
    return x.numpy()


@case("broadcast", lambda rank, size: given(1, 2, 5))
def _(rank: int, size: int) -> np.ndarray:
    import paddle.distributed as dist

    x = tensor(given(rank, 2, 5))
    dist.broadcast(x, src=1)
    return x.numpy()


@case("broadcast on the calculation stream", lambda rank, size: given(1, 2, 5, dtype="int64"))
def _(rank: int, size: int) -> np.ndarray:
    import paddle.distributed as dist

    x = tensor(given(rank, 2, 5, dtype="int64"))
    dist.stream.broadcast(x, src=1, sync_op=True, use_calc_stream=True)
    return x.numpy()


@case("all_gather into a list", lambda rank, size: everyone(size, 2, 3))
def _(rank: int, size: int) -> np.ndarray:
    import paddle.distributed as dist

    parts: list[Any] = []
    dist.all_gather(parts, tensor(given(rank, 2, 3)))
    return np.stack([part.numpy() for part in parts])


@case("all_gather on the calculation stream", lambda rank, size: everyone(size, 2, 3))
def _(rank: int, size: int) -> np.ndarray:
    import paddle.distributed as dist

    parts: list[Any] = []
    dist.stream.all_gather(parts, tensor(given(rank, 2, 3)), sync_op=True, use_calc_stream=True)
    return np.stack([part.numpy() for part in parts])


@case("all_gather into a tensor", lambda rank, size: everyone(size, 2, 3).reshape(-1, 3))
def _(rank: int, size: int) -> np.ndarray:
    import paddle
    import paddle.distributed as dist

    out = paddle.empty([2 * size, 3])
    dist.stream.all_gather(out, tensor(given(rank, 2, 3)), sync_op=True, use_calc_stream=rank % 2 == 0)
    return out.numpy()


@case("all_gather, the older form", lambda rank, size: everyone(size, 2, 3).reshape(-1, 3))
def _(rank: int, size: int) -> np.ndarray:
    import paddle

    out = paddle.empty([2 * size, 3])
    world().all_gather(tensor(given(rank, 2, 3)), out).wait()
    return out.numpy()


@case(
    "all_gather_partial",
    lambda rank, size: np.concatenate([np.split(given(r, size * 3), size)[r] for r in range(size)]),
)
def _(rank: int, size: int) -> np.ndarray:
    x = tensor(given(rank, size * 3))
    world().all_gather_partial_on_calc_stream(x, x, size, rank)
    return x.numpy()


@case("all_gather_object", lambda rank, size: np.arange(size) + 0.5)
def _(rank: int, size: int) -> np.ndarray:
    import paddle.distributed as dist

    parts: list[Any] = []
    dist.all_gather_object(parts, {"rank": rank, "text": "x" * rank})
    assert [len(part["text"]) for part in parts] == list(range(size))
    return np.array([part["rank"] + 0.5 for part in parts])


@case("broadcast_object_list", lambda rank, size: np.array([7, 1]))
def _(rank: int, size: int) -> np.ndarray:
    import paddle.distributed as dist

    values = [7, rank] if rank == 1 else [0, 0]
    dist.broadcast_object_list(values, src=1)
    return np.array(values)


def _shared(size: int, to: int) -> np.ndarray:
    """Column ``to`` of what every rank has for each other: ``[size, 3]``."""
    return np.stack([given(source, size, 3)[to] for source in range(size)])


@case("reduce_scatter of a list", lambda rank, size: _shared(size, rank).sum(0))
def _(rank: int, size: int) -> np.ndarray:
    import paddle
    import paddle.distributed as dist

    out = paddle.empty([3])
    dist.reduce_scatter(out, [tensor(row) for row in given(rank, size, 3)])
    return out.numpy()


@case("reduce_scatter of a tensor", lambda rank, size: _shared(size, rank).mean(0))
def _(rank: int, size: int) -> np.ndarray:
    import paddle
    import paddle.distributed as dist

    out = paddle.empty([3])
    x = tensor(given(rank, size, 3).reshape(-1))
    dist.stream.reduce_scatter(out, x, op=dist.ReduceOp.AVG, sync_op=True, use_calc_stream=True)
    return out.numpy()


@case("all_to_all of lists", lambda rank, size: _shared(size, rank))
def _(rank: int, size: int) -> np.ndarray:
    import paddle.distributed as dist

    out: list[Any] = []
    dist.alltoall(out, [tensor(row) for row in given(rank, size, 3)])
    return np.stack([part.numpy() for part in out])


@case("all_to_all of tensors", lambda rank, size: _shared(size, rank))
def _(rank: int, size: int) -> np.ndarray:
    import paddle
    import paddle.distributed as dist

    out = paddle.empty([size, 3])
    dist.stream.alltoall(out, tensor(given(rank, size, 3)), sync_op=True, use_calc_stream=True)
    return out.numpy()


def _uneven(rank: int, size: int) -> list[np.ndarray]:
    """What ``rank`` has for each rank: ``to + 1`` rows."""
    stops = np.cumsum(range(1, size))
    return np.split(given(rank, size * (size + 1) // 2, 2), stops)


@case("all_to_all of unequal parts", lambda rank, size: np.concatenate([_uneven(r, size)[rank] for r in range(size)]))
def _(rank: int, size: int) -> np.ndarray:
    import paddle
    import paddle.distributed as dist

    out = paddle.empty([size * (rank + 1), 2])
    x = tensor(np.concatenate(_uneven(rank, size)))
    dist.alltoall_single(out, x, in_split_sizes=list(range(1, size + 1)), out_split_sizes=[rank + 1] * size)
    return out.numpy()


@case("scatter", lambda rank, size: given(1, size, 3)[rank])
def _(rank: int, size: int) -> np.ndarray:
    import paddle
    import paddle.distributed as dist

    out = paddle.empty([3])
    dist.scatter(out, [tensor(row) for row in given(1, size, 3)] if rank == 1 else None, src=1)
    return out.numpy()


@case("scatter on the calculation stream", lambda rank, size: given(1, size, 3)[rank])
def _(rank: int, size: int) -> np.ndarray:
    import paddle
    import paddle.distributed as dist

    out = paddle.empty([3])
    parts = [tensor(row) for row in given(1, size, 3)] if rank == 1 else None
    dist.stream.scatter(out, parts, src=1, sync_op=True, use_calc_stream=True)
    return out.numpy()


@case("gather", lambda rank, size: everyone(size, 3) if rank == 1 else np.zeros(0))
def _(rank: int, size: int) -> np.ndarray:
    import paddle.distributed as dist

    parts: list[Any] = []
    dist.gather(tensor(given(rank, 3)), parts if rank == 1 else None, dst=1)
    return np.stack([part.numpy() for part in parts]) if parts else np.zeros(0)


@case("barrier", lambda rank, size: np.ones(1))
def _(rank: int, size: int) -> np.ndarray:
    import paddle.distributed as dist

    dist.barrier()
    return np.ones(1)


@case("ring: all send, then receive", lambda rank, size: given((rank - 1) % size, 300_000))
def _(rank: int, size: int) -> np.ndarray:
    import paddle
    import paddle.distributed as dist

    out = paddle.empty([300_000])
    dist.send(tensor(given(rank, 300_000)), dst=(rank + 1) % size)
    dist.recv(out, src=(rank - 1) % size)
    return out.numpy()


@case("ring: receive asked for first", lambda rank, size: given((rank - 1) % size, 5))
def _(rank: int, size: int) -> np.ndarray:
    import paddle
    import paddle.distributed as dist

    out = paddle.empty([5])
    task = dist.irecv(out, src=(rank - 1) % size)
    assert not task.is_completed()
    dist.isend(tensor(given(rank, 5)), dst=(rank + 1) % size)
    task.wait()
    assert task.is_completed()
    return out.numpy()


@case("ring: a batch that receives first", lambda rank, size: given((rank - 1) % size, 5, dtype="int8"))
def _(rank: int, size: int) -> np.ndarray:
    import paddle
    import paddle.distributed as dist

    out = paddle.empty([5], dtype="int8")
    tasks = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.irecv, out, (rank - 1) % size),
            dist.P2POp(dist.isend, tensor(given(rank, 5, dtype="int8")), (rank + 1) % size),
        ]
    )
    for task in tasks:
        task.wait()
    return out.numpy()


@case("messages of one pair stay in order", lambda rank, size: np.arange(4) * (rank == 1))
def _(rank: int, size: int) -> np.ndarray:
    import paddle
    import paddle.distributed as dist

    out = [paddle.zeros([1], dtype="int64") for _ in range(4)]
    if rank == 0:
        for value in range(4):
            dist.send(tensor([value]), dst=1)
    elif rank == 1:
        tasks = [dist.irecv(each, src=0) for each in out]
        tasks[3].wait()  # the last completes the ones before
        assert all(task.is_completed() for task in tasks)
    return np.concatenate([each.numpy() for each in out])


@case(
    "pieces of a tensor",
    lambda rank, size: np.concatenate(
        [np.zeros(3, np.float32), given((rank - 1) % size, 12)[3:6], np.zeros(6, np.float32)]
    ),
)
def _(rank: int, size: int) -> np.ndarray:
    import paddle

    out = paddle.zeros([12])
    world().send_partial_on_calc_stream(tensor(given(rank, 12)), (rank + 1) % size, 4, 1)
    world().recv_partial_on_calc_stream(out, (rank - 1) % size, 4, 1)
    return out.numpy()


@case("a message to oneself", lambda rank, size: given(rank, 4))
def _(rank: int, size: int) -> np.ndarray:
    import paddle

    out = paddle.empty([4])
    x = tensor(given(rank, 4))
    world().send(x, rank, True)
    x.zero_()  # the message is what it was when it was sent
    world().recv(out, rank, True)
    return out.numpy()


@case(
    "a group of some ranks",
    lambda rank, size: given(0, 3) + given(size - 1, 3) if rank in (0, size - 1) else given(rank, 3),
)
def _(rank: int, size: int) -> np.ndarray:
    import paddle.distributed as dist

    group = dist.new_group([0, size - 1])
    x = tensor(given(rank, 3))
    if rank in (0, size - 1):
        dist.all_reduce(x, group=group)
    return x.numpy()
