"""Ways to compute half a decoder layer (norm, gate and up, SiLU, down) on a CPU, one token for each row: why the
kernels are C++.

Each candidate runs in a process of its own, and they take turns: the C++ kernels; Paddle's operators; Paddle's with
oneDNN switched on; NumPy (OpenBLAS); Numba, where it is installed. All compute the same numbers, which is checked.
Prints a table to standard error and one JSON line to standard output; about two minutes.

    python benchmarks/kernels.py [--rounds 3] [--rows 64,32,8,1]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from alignment import runtime

SHAPES = {"hidden 256, intermediate 704": (256, 704), "hidden 512, intermediate 1408": (512, 1408)}
CANDIDATES = ("C++ kernels", "Paddle", "Paddle, oneDNN", "NumPy", "Numba")
LAYERS = 8  # weights of as many layers take turns, so that they come from where a model's come from
SECONDS = 0.5


def arrays(hidden: int, wide: int, rows: int) -> tuple[np.ndarray, list[list[np.ndarray]]]:
    """Input ``[rows, hidden]`` and each layer's norm, gate, up and down."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * shape[0] ** -0.5).astype(np.float32)

    layers = [[draw(hidden), draw(hidden, wide), draw(hidden, wide), draw(wide, hidden)] for _ in range(LAYERS)]
    return rng.standard_normal((rows, hidden)).astype(np.float32), layers


def by_numpy(x: np.ndarray, layers: list[list[np.ndarray]]) -> Callable[[], np.ndarray]:
    def step() -> np.ndarray:
        y = x
        for norm, gate, up, down in layers:
            normed = y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-6) * norm
            gates = normed @ gate
            y = y + (gates / (1 + np.exp(-gates)) * (normed @ up)) @ down
        return y

    return step


def by_numba(x: np.ndarray, layers: list[list[np.ndarray]]) -> Callable[[], np.ndarray]:
    import numba

    @numba.njit(fastmath=True, parallel=True)
    def half(y, norm, gate, up, down):  # type: ignore[no-untyped-def]
        normed = np.empty_like(y)
        for r in numba.prange(y.shape[0]):
            scale = 1 / np.sqrt((y[r] * y[r]).sum() / y.shape[1] + np.float32(1e-6))
            normed[r] = y[r] * np.float32(scale) * norm
        gates, ups = np.dot(normed, gate), np.dot(normed, up)
        for r in numba.prange(y.shape[0]):
            gates[r] = gates[r] / (1 + np.exp(-gates[r])) * ups[r]
        return y + np.dot(gates, down)

    def step() -> np.ndarray:
        y = x
        for norm, gate, up, down in layers:
            y = half(y, norm, gate, up, down)
        return y

    return step


def by_paddle(x: np.ndarray, layers: list[list[np.ndarray]]) -> Callable[[], np.ndarray]:
    import paddle
    from paddle.nn import functional as F

    start = paddle.to_tensor(x)
    weights = [[paddle.to_tensor(array) for array in layer] for layer in layers]

    def step() -> np.ndarray:
        y = start
        for norm, gate, up, down in weights:
            normed = y * paddle.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6) * norm
            y = y + paddle.matmul(F.silu(paddle.matmul(normed, gate)) * paddle.matmul(normed, up), down)
        return y.numpy()

    return step


def by_kernels(x: np.ndarray, layers: list[list[np.ndarray]]) -> Callable[[], np.ndarray]:
    import paddle

    from alignment.kernels.ops import MLP, LayerShape, kernels

    operators = kernels()
    assert operators is not None
    hidden, wide = layers[0][1].shape
    shape = LayerShape(hidden, wide, 1, 1, hidden, 0, 0, 1e-6, 0.0, False)
    start, empty = paddle.to_tensor(x), paddle.empty([0])
    nothing = paddle.zeros([1, 1])
    weights = []
    for norm, *others in layers:
        gate, up, down = (paddle.to_tensor(array) for array in others)
        weights.append([nothing] * 5 + [paddle.to_tensor(norm), gate, up, down])
    plan = paddle.zeros([6 * len(x)], dtype="int64")

    def step() -> np.ndarray:
        y = start
        for layer in weights:
            how = {"cached": True, "part": MLP}
            y = y + operators.stack(y, layer, (nothing, nothing), empty, plan, shape, 0, **how)
        return y.numpy()

    return step


MAKERS = {"C++ kernels": by_kernels, "NumPy": by_numpy, "Numba": by_numba}


def measure(candidate: str, rows: list[int]) -> dict[str, float]:
    """Best milliseconds of a step of :data:`LAYERS` half layers, by shape and rows."""
    with runtime.quiet_import():
        import paddle

    paddle.set_device("cpu")
    found = {}
    for name, (hidden, wide) in SHAPES.items():
        for count in rows:
            x, layers = arrays(hidden, wide, count)
            step = MAKERS.get(candidate, by_paddle)(x, layers)
            with paddle.no_grad():
                error = np.abs(step() - by_numpy(x, layers)()).max()
                if error > 1e-3:
                    raise SystemExit(f"{candidate}: differs from NumPy by {error}")
                times: list[float] = []
                while sum(times) < SECONDS:
                    began = time.perf_counter()
                    step()
                    times.append(time.perf_counter() - began)
            found[f"{name}, {count} rows"] = 1e3 * min(times)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="how often each candidate has its turn (default 3)")
    parser.add_argument("--rows", default="64,32,8,1", help="rows of a step (default 64,32,8,1)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    rows = [int(part) for part in args.rows.split(",")]
    if args.child:
        print(json.dumps(measure(args.child, rows)))
        return 0
    candidates = [c for c in CANDIDATES if c != "Numba" or importlib.util.find_spec("numba")]
    best: dict[str, dict[str, float]] = {name: {} for name in candidates}
    for _ in range(args.rounds):
        for candidate in candidates:
            environ = {**os.environ, "FLAGS_use_mkldnn": str(int("oneDNN" in candidate))}
            environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]
            command = [sys.executable, "-W", "ignore", __file__, "--child", candidate, "--rows", args.rows]
            done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
            for case, milliseconds in json.loads(done.stdout.splitlines()[-1]).items():
                best[candidate][case] = min(milliseconds, best[candidate].get(case, milliseconds))
    cases = list(best[candidates[0]])
    print(f"{'milliseconds':<44}" + "".join(f"{name:>16}" for name in candidates), file=sys.stderr)
    for case in cases:
        print(f"{case:<44}" + "".join(f"{best[name][case]:>16.3f}" for name in candidates), file=sys.stderr)
    shortened = {name: {case: round(value, 4) for case, value in row.items()} for name, row in best.items()}
    threads = int(os.environ["OMP_NUM_THREADS"])
    print(json.dumps({"benchmark": "kernels", "rounds": args.rounds, "threads": threads, "milliseconds": shortened}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
