"""The table of all that is exchanged in Paddle, and the few lines that do it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_GLOO = "paddle.base.core.ProcessGroupGloo"
_FLEET = "paddle.distributed.fleet"
_SHARDING = f"{_FLEET}.meta_parallel.sharding"


@dataclass(frozen=True)
class Patch:
    """One thing that Paddle lacks, or does wrongly, on CPU processes, and what takes its place.

    Attributes:
        name: what it is about, in a few words.
        reason: what happens without it.
        seen_in: the version of PaddlePaddle in which that was seen.
        exchanges: dotted name in Paddle -> ``module:name`` in this package.
        how: ``"function"``: the name is set to it; ``"wrapper"``: it is called with the original before the arguments;
            ``"value"``: the name is set to what it returns for the original; ``"new"``: the same, for a name that
            Paddle has only on other devices.
    """

    name: str
    reason: str
    seen_in: str
    exchanges: Mapping[str, str]
    how: str = "function"


def _methods(**sources: str) -> dict[str, str]:
    return {f"{_GLOO}.{name}": f"process_group:{source}" for name, source in sources.items()}


PATCHES: tuple[Patch, ...] = (
    Patch(
        "collectives that gloo has",
        "a rank that is 30 s late ends the run (TIMEOUT, no setting); float16 sums are inf; AVG is unknown; tensors "
        "must be contiguous",
        "3.3.1",
        _methods(
            all_reduce="all_reduce",
            allreduce="all_reduce",
            reduce="reduce",
            broadcast="broadcast",
            all_gather="all_gather",
            all_gather_into_tensor="all_gather_into_tensor",
            scatter="scatter",
            scatter_tensor="scatter_tensor",
            gather="gather",
            barrier="barrier",
        ),
    ),
    Patch(
        "collectives that gloo lacks",
        "'ProcessGroupGLOO does not support reduce_scatter / all_to_all'; all_gather_partial fails",
        "3.3.1",
        _methods(
            reduce_scatter="reduce_scatter",
            reduce_scatter_tensor="reduce_scatter",
            all_to_all="all_to_all",
            all_to_all_tensor="all_to_all",
            all_to_all_single="all_to_all_single",
            alltoall="alltoall",
            alltoall_single="alltoall_single",
            all_gather_partial="all_gather_partial",
        ),
    ),
    Patch(
        "point to point",
        "in groups of three or more the tags of a pair get out of step (TIMEOUT); two ranks that both send first wait "
        "for each other for ever; partial send and recv are missing",
        "3.3.1",
        _methods(
            send="send",
            recv="recv",
            send_partial="send_partial",
            recv_partial="recv_partial",
            _start_coalescing="start_coalescing",
            _end_coalescing="end_coalescing",
        ),
    ),
    Patch(
        "operations on the calculation stream",
        "'ProcessGroupGLOO does not support X with sync_op and use_calc_stream flag', for every X",
        "3.3.1",
        _methods(
            all_reduce_on_calc_stream="all_reduce",
            reduce_on_calc_stream="reduce",
            broadcast_on_calc_stream="broadcast",
            all_gather_on_calc_stream="all_gather_on_calc_stream",
            all_gather_into_tensor_on_calc_stream="all_gather_into_tensor",
            all_gather_partial_on_calc_stream="all_gather_partial",
            reduce_scatter_on_calc_stream="reduce_scatter",
            reduce_scatter_tensor_on_calc_stream="reduce_scatter",
            scatter_on_calc_stream="scatter_on_calc_stream",
            scatter_tensor_on_calc_stream="scatter_tensor",
            all_to_all_on_calc_stream="all_to_all",
            all_to_all_tensor_on_calc_stream="all_to_all",
            all_to_all_single_on_calc_stream="all_to_all_single",
            send_on_calc_stream="send",
            send_partial_on_calc_stream="send_partial",
            recv_on_calc_stream="recv",
            recv_partial_on_calc_stream="recv_partial",
        ),
    ),
    Patch(
        "a store for each group",
        "fleet.init of 4 ranks fails (Connection refused or TIMEOUT in ProcessGroupGloo.create): all groups publish "
        "their addresses under the same keys of the one store",
        "3.3.1",
        {f"{_GLOO}.create": "rendezvous:create_group"},
        "wrapper",
    ),
    Patch(
        "the run's store",
        "each request waits 44 to 88 ms (no TCP_NODELAY: fleet.init of 8 ranks takes 8 s); a client that comes before "
        "the server sleeps 3 s",
        "3.3.1",
        {"paddle.base.core.create_or_get_global_tcp_store": "rendezvous:job_store"},
        "wrapper",
    ),
    Patch(
        "tensor-parallel operators",
        "'Do not support c_identity / c_concat / c_split / c_softmax_with_cross_entropy for cpu kernel now'",
        "3.3.1",
        {
            "paddle._C_ops.c_identity": "tensor_parallel_ops:c_identity",
            "paddle._C_ops.c_split": "tensor_parallel_ops:c_split",
            "paddle._C_ops.c_concat": "tensor_parallel_ops:c_concat",
            "paddle._C_ops.c_softmax_with_cross_entropy": "tensor_parallel_ops:c_softmax_with_cross_entropy",
            "paddle._legacy_C_ops.c_identity": "tensor_parallel_ops:legacy_c_identity",
        },
    ),
    Patch(
        "gradient of c_split",
        "RowParallelLinear(input_is_parallel=False) has a wrong input gradient, on every device: it is gathered along "
        "the first axis, but was split along the last",
        "3.3.1",
        {f"{_FLEET}.layers.mpu.mp_ops.c_split_eager.backward": "tensor_parallel_ops:c_split_backward"},
    ),
    Patch(
        "number of the device",
        "'ParallelEnv' object has no attribute '_device_id' (PipelineLayer)",
        "3.3.1",
        {"paddle.distributed.parallel.ParallelEnv._device_id": "device_names:first_device"},
        "new",
    ),
    Patch(
        "averages",
        "all_reduce and reduce_scatter with AVG ask for NCCL's version: module has no attribute 'nccl_version'",
        "3.3.1",
        {"paddle.base.core.nccl_version": "device_names:averaging_nccl"},
        "new",
    ),
    Patch(
        "tensor-parallel inputs",
        "'Only support xpu, gpu and custom_device now, but this is cpu' (TensorParallel's broadcast of its inputs)",
        "3.3.1",
        {f"{_FLEET}.utils.hybrid_parallel_util.paddle": "device_names:cpu_named_paddle"},
        "value",
    ),
    Patch(
        "sharding stages 2 and 3",
        "'group_sharded_parallel only support gpu, xpu and custom_device now', and .cuda() below it",
        "3.3.1",
        {
            "paddle.distributed.sharding.group_sharded.paddle": "device_names:cpu_named_paddle",
            f"{_SHARDING}.group_sharded_utils.paddle": "device_names:cpu_named_paddle",
            f"{_SHARDING}.group_sharded_storage.paddle": "device_names:cpu_named_paddle",
            f"{_SHARDING}.group_sharded_optimizer_stage2.paddle": "device_names:cpu_named_paddle",
            f"{_SHARDING}.group_sharded_optimizer_stage2.core": "device_names:cpu_named_core",
            f"{_SHARDING}.group_sharded_stage2.paddle": "device_names:cpu_named_paddle",
            f"{_SHARDING}.group_sharded_stage3.paddle": "device_names:cpu_named_paddle",
            f"{_SHARDING}.group_sharded_stage3.core": "device_names:cpu_named_core",
        },
        "value",
    ),
    Patch(
        "parameters moved into a buffer",
        "'Tensor not initialized yet' (stage 2, fused parameters): what .cpu() returns is the parameter itself, whose "
        "memory is freed before it is copied",
        "3.3.1",
        {f"{_SHARDING}.group_sharded_storage.ParamStorage.add_rank_params": "device_names:add_rank_params"},
        "wrapper",
    ),
    Patch(
        "fused buffers",
        "'tensor fusion helper now only support gpu, npu, xpu' (sharding stage 1 with split_param or fused buffers)",
        "3.3.1",
        {
            f"{_FLEET}.utils.tensor_fusion_helper.alignment": "device_names:aligned_cpu",
            f"{_FLEET}.utils.tensor_fusion_helper.__current_device_type__": "device_names:cpu_type",
        },
        "value",
    ),
)


def install(patch: Patch) -> list[str]:
    """Make the exchanges of ``patch``; return the names that this version of Paddle does not have."""
    missing = []
    for target, source in patch.exchanges.items():
        try:
            owner, name = _find(target)
            original = getattr(owner, name, None) if patch.how == "new" else getattr(owner, name)
        except (ImportError, AttributeError):
            missing.append(target)
            continue
        module, _, function = source.partition(":")
        own = getattr(importlib.import_module(f"{__package__}.{module}"), function)
        if patch.how in ("value", "new"):
            own = own(original)
        elif patch.how == "wrapper":
            own = _with_original(own, original)
        if inspect.isclass(owner) and isinstance(inspect.getattr_static(owner, name, None), staticmethod):
            own = staticmethod(own)
        setattr(owner, name, own)
    return missing


def _with_original(own: Callable[..., Any], original: Any) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return own(original, *args, **kwargs)

    return wrapper


def _find(target: str) -> tuple[Any, str]:
    """Return (owner, name) of a dotted name; the owner is a module or a class in one."""
    path, _, name = target.rpartition(".")
    owner_path, rest = path, []
    while True:
        try:
            owner = importlib.import_module(owner_path)
            break
        except ModuleNotFoundError:
            owner_path, _, last = owner_path.rpartition(".")
            if not owner_path:
                raise
            rest.insert(0, last)
    for part in rest:
        owner = getattr(owner, part)
    return owner, name
