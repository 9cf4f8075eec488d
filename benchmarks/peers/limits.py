"""The machine's limits as each side's library reaches them: matrix products and memory bandwidth. Prints one JSON line.

Task: ``library`` (``"paddle"`` or ``"torch"``), ``workloads``. With ``paddle`` also the bandwidth of as many NumPy
threads as there are cores, which belongs to neither library.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.peers import measure
from benchmarks.peers.workloads import WORKLOADS, gemm_shapes

SQUARE = (2048, 2048, 2048)
# Numbers of one array of the bandwidth tests: 128 MiB of float32, far beyond any cache.
LENGTH = 32 << 20


def run(task: dict[str, Any]) -> dict[str, Any]:
    """GFLOP/s by shape, and GB/s."""
    library = torch_library() if task["library"] == "torch" else paddle_library()
    random, multiply, copy, triad, packages = library
    shapes = [SQUARE, *(shape for name in task["workloads"] for shape in gemm_shapes(WORKLOADS[name]))]
    gemm = {}
    for m, k, n in dict.fromkeys(shapes):
        a, b = random([m, k]), random([k, n])
        seconds = measure.best_of(lambda a=a, b=b: multiply(a, b))
        gemm[f"{m}x{k}x{n}"] = 2e-9 * m * k * n / seconds
    x, y = random([LENGTH]), random([LENGTH])
    gigabytes = 4e-9 * LENGTH
    bandwidth = {
        "copy": 2 * gigabytes / measure.best_of(lambda: copy(x)),
        "triad": 3 * gigabytes / measure.best_of(lambda: triad(x, y)),
    }
    result = {"gflops": gemm, "bandwidth_gb_s": bandwidth, "versions": measure.versions(*packages)}
    if task["library"] == "paddle":
        result["threads_gb_s"] = numpy_bandwidth(int(os.environ["OMP_NUM_THREADS"]))
    return result


Library = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any], Callable[..., Any], tuple[str, ...]]


def paddle_library() -> Library:
    """Paddle with the toolkit's CPU settings."""
    from alignment import runtime

    with runtime.quiet_import():
        import paddle
    paddle.set_device("cpu")
    return paddle.rand, paddle.matmul, lambda x: x.clone(), lambda x, y: x + y, ("paddlepaddle",)


def torch_library() -> Library:
    """torch as it comes, writing into memory that is there already."""
    import torch

    torch.set_grad_enabled(False)
    out = torch.zeros(LENGTH)
    return (
        torch.rand,
        torch.matmul,
        lambda x: out.copy_(x),
        lambda x, y: torch.add(x, y, alpha=3.0, out=out),
        ("torch",),
    )


def numpy_bandwidth(threads: int) -> dict[str, float]:
    """Bytes read and written per second, in GB, by ``threads`` threads that copy, and that only read (sum)."""
    import numpy as np

    source, target = np.ones(LENGTH, np.float32), np.zeros(LENGTH, np.float32)
    parts = np.array_split(np.arange(LENGTH), threads)
    slices = [slice(int(part[0]), int(part[-1]) + 1) for part in parts]
    gigabytes = 4e-9 * LENGTH
    with ThreadPoolExecutor(threads) as pool:
        copy = measure.best_of(lambda: list(pool.map(lambda s: np.copyto(target[s], source[s]), slices)))
        read = measure.best_of(lambda: list(pool.map(lambda s: float(source[s].max()), slices)))
    return {"copy": 2 * gigabytes / copy, "read": gigabytes / read}


if __name__ == "__main__":
    measure.answer(run)
