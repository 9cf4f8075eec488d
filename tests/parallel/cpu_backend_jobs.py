"""Jobs that forked ranks run to test the CPU backend: tensor-parallel operators and layers, failures."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.parallel.cpu_backend_cases import given, start, tensor, world


def kernels(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray, x: np.ndarray) -> dict[str, np.ndarray]:
    """Forward and backward of the tensor-parallel operators; this rank has its part of ``logits`` and ``x``.

    Args:
        logits: float32 ``[rows, vocabulary]``.
        labels: int64 ``[rows, 1]``; -100 is ignored.
        weights: float32 ``[rows, 1]``: the gradients that the losses get.
        x: float32 ``[rows, width]``.
    """
    import paddle
    import paddle.distributed as dist

    start()
    rank, size = dist.get_rank(), dist.get_world_size()
    ops = paddle._C_ops
    results: dict[str, np.ndarray] = {}

    def record(name: str, op: Callable[[Any], Any], value: np.ndarray) -> None:
        leaf = tensor(value)
        leaf.stop_gradient = False
        out = op(leaf)
        # The gradient differs by place and by rank, so that a wrong axis or a missing sum shows.
        ((rank + 1) * out * paddle.arange(out.size, dtype="float32").reshape(out.shape)).sum().backward()
        results[name], results[f"{name} gradient"] = out.numpy(), leaf.grad.numpy()

    part = np.split(x, size, axis=-1)[rank]
    record("identity", lambda leaf: ops.c_identity(leaf, 0, True, True), x)
    record(
        "legacy identity",
        lambda leaf: paddle._legacy_C_ops.c_identity(
            leaf, "use_calc_stream", True, "ring_id", 0, "use_model_parallel", True
        ),
        x,
    )
    record("split", lambda leaf: ops.c_split(leaf, rank, size, 0, True), x)
    record("concat", lambda leaf: ops.c_concat(leaf, rank, size, 0, True, True), part)

    leaf = tensor(np.split(logits, size, axis=-1)[rank])
    leaf.stop_gradient = False
    softmax, loss = ops.c_softmax_with_cross_entropy(leaf, tensor(labels), -100, 0, rank, size)
    assert softmax.stop_gradient and not loss.stop_gradient
    (loss * tensor(weights)).sum().backward()
    results |= {"softmax": softmax.numpy(), "loss": loss.numpy(), "loss gradient": leaf.grad.numpy()}
    with paddle.no_grad():
        again = ops.c_softmax_with_cross_entropy(leaf, tensor(labels, "int32"), -100, 0, rank, size)[1]
    results["loss of int32 labels"] = again.numpy()
    return results


def layers() -> dict[str, float]:
    """The largest differences between fleet's tensor-parallel layers and ordinary ones with the same weights."""
    import paddle.distributed as dist
    from paddle.distributed import fleet
    from paddle.nn import functional as F

    from alignment.parallel import cpu_backend

    assert cpu_backend.apply()
    size = int(os.environ["PADDLE_TRAINERS_NUM"])
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {"dp_degree": 1, "mp_degree": size, "pp_degree": 1, "sharding_degree": 1}
    fleet.init(is_collective=True, strategy=strategy)
    rank = dist.get_rank()
    rng = np.random.default_rng(0)
    vocab, width = 8 * size, 4 * size
    full = {
        "table": rng.standard_normal((vocab, width)),
        "column": rng.standard_normal((width, 2 * width)),
        "row": rng.standard_normal((2 * width, width)),
        "head": rng.standard_normal((width, vocab)),
    }
    # Small enough for the reference: Paddle's own cross entropy stops at 64 on CPUs.
    full = {name: tensor((0.3 * value).astype("float32")) for name, value in full.items()}
    for weight in full.values():
        weight.stop_gradient = False
    axes = {"table": 0, "column": 1, "row": 0, "head": 1}

    def own(weight: Any, axis: int) -> Any:
        return weight.detach().split(size, axis=axis)[rank]

    mpu = fleet.meta_parallel
    parallel = {
        "table": mpu.VocabParallelEmbedding(vocab, width),
        "column": mpu.ColumnParallelLinear(width, 2 * width, has_bias=False, gather_output=False),
        "row": mpu.RowParallelLinear(2 * width, width, has_bias=False, input_is_parallel=True),
        "head": mpu.ColumnParallelLinear(width, vocab, has_bias=False, gather_output=False),
    }
    for name, layer in parallel.items():
        layer.weight.set_value(own(full[name], axes[name]))
    ids = tensor(rng.integers(0, vocab, (3, 5)))
    labels = rng.integers(0, vocab, (3, 5, 1))
    labels[1, 2] = -100
    labels = tensor(labels)

    hidden = parallel["row"](F.gelu(parallel["column"](parallel["table"](ids))))
    loss = mpu.ParallelCrossEntropy(ignore_index=-100)(parallel["head"](hidden), labels).sum()
    loss.backward()
    hidden = F.gelu(F.embedding(ids, full["table"]) @ full["column"]) @ full["row"]
    reference = F.cross_entropy(hidden @ full["head"], labels, reduction="none", ignore_index=-100).sum()
    reference.backward()

    def difference(ours: Any, theirs: Any) -> float:
        return float((ours - theirs).abs().max() / theirs.abs().max())

    differences = {"loss": difference(loss, reference)}
    for name, layer in parallel.items():
        differences[f"{name} gradient"] = difference(layer.weight.grad, own(full[name].grad, axes[name]))

    # The two forms with whole inputs and outputs.
    for name, whole in (
        ("column", mpu.ColumnParallelLinear(width, 2 * width, has_bias=True, gather_output=True)),
        ("row", mpu.RowParallelLinear(2 * width, width, has_bias=True, input_is_parallel=False)),
    ):
        whole.weight.set_value(own(full[name], axes[name]))
        inputs = [tensor(rng.standard_normal((3, 5, full[name].shape[0])).astype("float32")) for _ in range(2)]
        inputs[1] = inputs[0].clone().detach()
        for each in inputs:
            each.stop_gradient = False
        scale = tensor(rng.standard_normal((3, 5, full[name].shape[1])).astype("float32"))
        (whole(inputs[0]) * scale).sum().backward()
        (inputs[1] @ full[name].detach() * scale).sum().backward()
        differences[f"whole {name}, input gradient"] = difference(inputs[0].grad, inputs[1].grad)
    return differences


def world_of_the_toolkit() -> list[float]:
    """Gradients summed by :class:`alignment.parallel.World` over the CPU backend."""
    import paddle

    from alignment.parallel import cpu_backend, init_world

    cpu_backend.apply()
    run = init_world()
    parameter = paddle.create_parameter([3], "float32")
    (parameter.sum() * (run.rank + 1)).backward()
    run.sum_gradients([parameter])
    run.close()
    return parameter.grad.numpy().tolist()


# --- what can go wrong ---


def apply_twice() -> tuple[bool, bool, bool, str]:
    """(active before, after the first call, after the second; what is said after the group exists)."""
    import paddle
    import paddle.distributed as dist

    from alignment.parallel import cpu_backend

    before = cpu_backend.is_active()
    first = cpu_backend.apply()
    method = paddle.base.core.ProcessGroupGloo.all_reduce
    assert cpu_backend.apply() and paddle.base.core.ProcessGroupGloo.all_reduce is method
    dist.init_parallel_env()
    return before, first, cpu_backend.apply(), ""


def apply_late() -> str:
    """What is said when the process group exists already."""
    from paddle.distributed.communication.group import Group, _add_new_group

    from alignment.errors import AlignmentError
    from alignment.parallel import cpu_backend

    _add_new_group(Group(0, 0, [0, 1]))  # as init_parallel_env does
    try:
        cpu_backend.apply()
    except AlignmentError as error:
        return str(error)
    return ""


def exchanged() -> dict[str, bool]:
    """For every name in the table: whether it is there before, and another thing after."""
    from alignment.parallel import cpu_backend
    from alignment.parallel.cpu_backend import patches

    def look(name: str) -> Any:
        owner, last = patches._find(name)
        return getattr(owner, last, None)

    rows = [(name, patch.how) for patch in cpu_backend.PATCHES for name in patch.exchanges]
    before = {name: look(name) for name, _ in rows}
    assert cpu_backend.apply()
    return {
        name: look(name) is not before[name] and (before[name] is not None or how == "new" or name.endswith("type__"))
        for name, how in rows
    }


def other_version() -> str:
    """What is logged for a version of Paddle that was not tested and lacks a name."""
    import contextlib
    import io

    import paddle

    from alignment.parallel import cpu_backend

    paddle.__version__ = "9.9.9"
    del paddle._C_ops.c_concat
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert cpu_backend.apply()
    return said.getvalue()


def on_one_process() -> bool:
    """Whether the backend is active in a run of one process."""
    from alignment.parallel import cpu_backend

    return cpu_backend.apply() or cpu_backend.is_active()


def late(at_group: float, at_sum: float) -> float:
    """Rank 1 comes late by so many seconds to a new group and to a sum; returns the sum."""
    import paddle.distributed as dist

    start()
    rank = dist.get_rank()
    x = tensor([rank + 1.0])
    time.sleep(at_group * rank)
    group = dist.new_group([0, 1])
    time.sleep(at_sum * rank)
    dist.all_reduce(x, group=group)
    return float(x)


def failing(how: str) -> None:
    """Ranks 0 and 2 sum numbers for ever; rank 1 does something else at the third."""
    import paddle.distributed as dist

    from alignment.parallel import cpu_backend

    start(patience=1 if how == "hangs" else 60)
    for step in range(5):
        x = tensor(given(0, 4))
        if step == 2 and dist.get_rank() == 1:
            if how == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "raises":
                raise ValueError("no data in shard 7")
            if how == "prints a traceback":
                # As Python ends after an exception that nobody caught, less what other packages do at exit.
                sys.last_value = ValueError("no data in shard 8")
                cpu_backend._leave_at_exit()
                os._exit(1)
            if how == "hangs":
                time.sleep(2.5)
            if how == "leaves":
                cpu_backend.leave()
                return
            if how == "is at another step":
                dist.broadcast(x, src=1)
            if how == "has another shape":
                x = tensor(given(0, 5))
        dist.all_reduce(x)


def wrong(what: str) -> str:
    """The message for a call that cannot be."""
    import paddle
    import paddle.distributed as dist

    from alignment.errors import AlignmentError

    start()
    rank = dist.get_rank()
    try:
        if what == "average of integers":
            dist.all_reduce(tensor([1, 2]), op=dist.ReduceOp.AVG)
        elif what == "complex sum":
            dist.all_reduce(paddle.ones([2], dtype="complex64"))
        elif what == "label":
            paddle._C_ops.c_softmax_with_cross_entropy(paddle.ones([1, 4]), tensor([[8]]), -100, 0, rank, 2)
        elif what == "split":
            paddle._C_ops.c_split(paddle.ones([2, 5]), rank, 2, 0, True)
        elif what == "list":
            world().all_to_all([paddle.ones([1])], [paddle.ones([1])], True)
        elif what == "rows":
            world().all_to_all_single(paddle.ones([2]), paddle.ones([2]), [1, 2], [1, 1], True)
        elif what == "output":
            world().all_gather_into_tensor(paddle.ones([3]), paddle.ones([2]), True)
        elif what == "message":
            if rank == 0:
                dist.send(paddle.ones([3]), dst=1)
                return ""
            dist.recv(paddle.ones([2]), src=0)
    except AlignmentError as error:
        return str(error)
    return "nothing was said"


def fork_and_die() -> tuple[float, str]:
    """Rank 1 leaves a child that outlives it; return after how many seconds rank 0 learnt what."""
    import paddle.distributed as dist

    from alignment.parallel import RankFailure

    start()
    if dist.get_rank() == 1:
        if os.fork() == 0:
            time.sleep(2.5)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        dist.barrier()
    except RankFailure as error:
        return time.monotonic() - began, str(error)
    return time.monotonic() - began, "nothing was said"
