"""What the three CPU settings of ``alignment.runtime`` bring, each by itself, in one run.

Child processes take turns (so that a busy machine slows all of them alike): Paddle as it comes, all settings, and all
settings but one. Prints a table to standard error and one JSON line to standard output; about a minute and a half.

    python benchmarks/runtime.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["ALIGNMENT_RUNTIME"] = "0"  # the children make the settings themselves, one by one

from alignment import runtime

SETTINGS = ("threads", "math library", "allocator")
VARIANTS = {
    "as it comes": (),
    "all": SETTINGS,
    **{f"without {setting}": tuple(other for other in SETTINGS if other != setting) for setting in SETTINGS},
}
GEMMS = ((1024, 512, 32000), (1024, 512, 1408), (8, 512, 1408))
SECONDS_PER_OP = 0.2
LEAST_REPEATS = 5


def measure() -> dict[str, float]:
    """Time the operations in this process; the best of several runs each, in milliseconds."""
    with runtime.quiet_import():
        import paddle
    import paddle.nn.functional as F

    paddle.set_device("cpu")
    x, y = paddle.rand([2048, 1024]), paddle.rand([2048, 1024])  # 8 MiB each
    ops: dict[str, Callable[[], object]] = {}
    for m, k, n in GEMMS:
        a, b = paddle.rand([m, k]), paddle.rand([k, n])
        ops[f"gemm {m}x{k}x{n}"] = lambda a=a, b=b: paddle.matmul(a, b)
    ops["add"] = lambda: x + y
    ops["exp"] = lambda: paddle.exp(x)
    ops["silu"] = lambda: F.silu(x)
    ops["softmax"] = lambda: F.softmax(x, axis=-1)
    ops["concat"] = lambda: paddle.concat([x, y], axis=0)
    return {name: best_milliseconds(op) for name, op in ops.items()}


def best_milliseconds(op: Callable[[], object]) -> float:
    """The best time of at least ``LEAST_REPEATS`` runs after a first one that is not counted."""
    op()
    times: list[float] = []
    while len(times) < LEAST_REPEATS or sum(times) < SECONDS_PER_OP:
        began = time.perf_counter()
        op()
        times.append(time.perf_counter() - began)
    return 1e3 * min(times)


def run_child(settings: tuple[str, ...]) -> dict[str, float]:
    """Measure in a fresh process that has these settings."""
    environ = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_DEBUG_CPU_TYPE")}
    # These would tune the allocator in the variants that are to go without.
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        environ.pop(name, None)
    if "threads" in settings:
        environ["OMP_NUM_THREADS"] = str(runtime.physical_cores())
    if "math library" in settings and runtime.wants_mkl_switch():
        environ["MKL_DEBUG_CPU_TYPE"] = "5"
    allocator = ["--allocator"] if "allocator" in settings else []
    command = [sys.executable, "-W", "ignore::UserWarning", __file__, "--child", *allocator]
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="how often each variant has its turn (default 3)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--allocator", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        if args.allocator:
            runtime.set_allocator(os.environ)
        print(json.dumps(measure()))
        return 0

    best: dict[str, dict[str, float]] = {name: {} for name in VARIANTS}
    for _ in range(args.rounds):
        for variant, settings in VARIANTS.items():
            for op, milliseconds in run_child(settings).items():
                best[variant][op] = min(milliseconds, best[variant].get(op, milliseconds))

    ops = list(best["all"])
    factors = {op: best["as it comes"][op] / best["all"][op] for op in ops}
    each = {s: {op: best[f"without {s}"][op] / best["all"][op] for op in ops} for s in SETTINGS}
    print(table(best, factors, each), file=sys.stderr)
    result = {
        "benchmark": "runtime",
        "physical_cores": runtime.physical_cores(),
        "mkl_switch": runtime.wants_mkl_switch(),
        "rounds": args.rounds,
        "milliseconds": rounded(best),
        "factor": {op: round(value, 2) for op, value in factors.items()},
        "factor_of_each": rounded(each),
    }
    print(json.dumps(result))
    return 0


def rounded(figures: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The same with three decimals."""
    return {name: {op: round(value, 3) for op, value in row.items()} for name, row in figures.items()}


def table(best: dict[str, dict[str, float]], factors: dict[str, float], each: dict[str, dict[str, float]]) -> str:
    """Times before and after, and by how much each setting by itself shortens them."""
    lines = [f"{'milliseconds':<22}{'as it comes':>12}{'all':>10}{'factor':>9}" + "".join(f"{s:>14}" for s in SETTINGS)]
    for op, factor in factors.items():
        row = f"{op:<22}{best['as it comes'][op]:>12.3f}{best['all'][op]:>10.3f}{factor:>8.1f}x"
        lines.append(row + "".join(f"{each[setting][op]:>13.1f}x" for setting in SETTINGS))
    lines.append("The last three columns: how much longer it takes when only that setting is missing.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
