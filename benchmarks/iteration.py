"""Where the time of a PPO iteration goes: by phase, by kernel, and how far from what the machine can do.

The runner's own trainer runs in this process on a workload of ``benchmarks/peers``; a clock around every call of a CPU
kernel gives its seconds and, from its arguments, its floating-point operations. What is left of a phase is Paddle's own
operators, NumPy and Python. The limits are measured in the same process: the kernels' matrix product on large matrices,
and reading memory.

    python benchmarks/iteration.py [--workloads W1,W2,W3] [--iterations 4] [--write docs/profile.md]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from alignment import runtime
from benchmarks.peers import measure
from benchmarks.peers.models import write_models
from benchmarks.peers.ours_ppo import arguments
from benchmarks.peers.workloads import WORKLOADS, Workload

PHASES = (
    "generate", "actor_logprobs", "reference_logprobs", "reward_scores", "critic_values", "advantages", "update"
)  # fmt: skip
OTHER = "the rest"


def layer_flops(shape: list[int], tokens: int) -> int:
    """Multiply-adds of a layer's matrix products, twice; ``shape`` is :attr:`LayerShape.numbers`. The attention over
    the context is left out, which is a few percent at these lengths.
    """
    hidden, wide, query, key, dim = shape[:5]
    return 2 * tokens * (2 * hidden * query * dim + 2 * hidden * key * dim + 3 * hidden * wide)


def flops_of(name: str, inputs: tuple[Any, ...]) -> int:
    """Floating-point operations of one call of an operator of ``csrc/ops.cc``."""
    if name == "alignment_stack":
        each = 12 if inputs[6][7] else 9
        return layer_flops(inputs[6], inputs[0].shape[0]) * len(inputs[1]) // each
    if name == "alignment_layer_forward":
        return layer_flops(inputs[5], inputs[0].shape[0])
    if name == "alignment_layer_backward":
        return 2 * layer_flops(inputs[8], inputs[0].shape[0])
    if name in ("alignment_project", "alignment_label_logprobs"):
        return 2 * inputs[0].shape[0] * int(inputs[1].size)
    if name == "alignment_label_logprobs_backward":
        return 3 * 2 * inputs[0].shape[0] * int(inputs[1].size)  # the logits once more, and two gradients
    return 0


class Clock:
    """Seconds, calls and operations by phase and kernel.

    Attributes:
        phase: the one that runs now.
        seconds, calls, flops: by ``(phase, kernel)``; the kernel :data:`OTHER` has a phase's whole seconds.
    """

    def __init__(self) -> None:
        self.phase = ""
        self.clear()

    def clear(self) -> None:
        """Forget the warm-up."""
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.calls: dict[tuple[str, str], int] = defaultdict(int)
        self.flops: dict[tuple[str, str], int] = defaultdict(int)

    def of_kernels(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """The function through which all kernels are called, with the clock around it."""

        def timed(name: str, *inputs: Any) -> Any:
            began = time.perf_counter()
            found = run(name, *inputs)
            key = self.phase, name.removeprefix("alignment_")
            self.seconds[key] += time.perf_counter() - began
            self.calls[key] += 1
            self.flops[key] += flops_of(name, inputs)
            return found

        return timed

    def of_phase(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A phase's function with the clock around it."""

        @functools.wraps(function)
        def timed(*values: Any) -> Any:
            self.phase = name
            began = time.perf_counter()
            found = function(*values)
            self.seconds[name, OTHER] += time.perf_counter() - began
            return found

        return timed


def profile(w: Workload, iterations: int) -> dict[str, Any]:
    """Run a workload; the first iteration is not counted.

    Returns:
        ``iteration``: seconds; ``peak_bytes``; ``rows``: one for each phase and kernel, with seconds, calls and
        GFLOP/s of one iteration.
    """
    from alignment.arguments import parse_ppo
    from alignment.flow.runner import use_device
    from alignment.kernels import ops
    from alignment.parallel import init_world
    from alignment.ppo import ppo_trainer

    clock = Clock()
    original = ops._run
    ops._run = clock.of_kernels(original)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder, output = Path(name) / "models", Path(name) / "output"
            write_models(folder, w)
            output.mkdir()
            file = Path(name) / "arguments.json"
            file.write_text(json.dumps(arguments(w, folder, output, iterations)))
            args = parse_ppo([str(file)])
            use_device(args)
            data = ppo_trainer.load_data(args, show_progress=False)
            trainer = ppo_trainer.build_trainer(args, init_world(), data, args.derive_sizes(len(data.train)), [])
            measure.wrap_calls(trainer, clock.of_phase)
            seconds: list[float] = []
            iterate = trainer.iterate

            def timed() -> None:
                if len(seconds) == 1:
                    clock.clear()
                began = time.perf_counter()
                iterate()
                seconds.append(time.perf_counter() - began)

            trainer.iterate = timed
            measure.require(trainer.train() == 0, "the run failed")
    finally:
        ops._run = original
    counted = iterations - 1
    rows = []
    for phase in PHASES:
        whole = clock.seconds[phase, OTHER]
        names = sorted(
            (n for p, n in clock.seconds if p == phase and n != OTHER), key=lambda n: -clock.seconds[phase, n]
        )
        inside = sum(clock.seconds[phase, n] for n in names)
        for n in names:
            key = phase, n
            row = {
                "phase": phase,
                "part": n,
                "seconds": clock.seconds[key] / counted,
                "calls": clock.calls[key] / counted,
            }
            rows.append({**row, "gflops": clock.flops[key] / clock.seconds[key] / 1e9})
        rows.append({"phase": phase, "part": OTHER, "seconds": (whole - inside) / counted, "calls": 0, "gflops": 0.0})
    return {"iteration": sum(seconds[1:]) / counted, "peak_bytes": measure.peak_memory(), "rows": rows}


def limits() -> dict[str, float]:
    """GFLOP/s of the kernels' matrix product on large matrices, and GB/s of reading an array that no cache holds."""
    import paddle

    from alignment.kernels.ops import kernels

    operators = kernels()
    measure.require(operators is not None, "the kernels cannot be had")
    assert operators is not None
    x, weight, column = paddle.rand([2400, 1024]), paddle.rand([1024, 2048]), paddle.rand([16 << 10, 2048])
    one = paddle.rand([1, 16 << 10])
    gemm = measure.best_of(lambda: operators.project(x, weight, tied=False))
    read = measure.best_of(lambda: operators.project(one, column, tied=False))
    return {"gflops": 2e-9 * 2400 * 1024 * 2048 / gemm, "read_gb_s": 4e-9 * column.size / read}


def text(results: dict[str, dict[str, Any]], found: dict[str, float]) -> str:
    """The page ``docs/profile.md`` but for its heading."""
    lines = [
        f"Limits measured in the same run: {found['gflops']:.0f} GFLOP/s (matrix product of 2400 x 1024 x 2048), "
        f"{found['read_gb_s']:.0f} GB/s (reading 128 MiB once).",
        "",
    ]
    for name, result in results.items():
        total = result["iteration"]
        lines += [
            f"## {name}: {total:.2f} s an iteration, {result['peak_bytes'] / 2**20:.0f} MiB at the most",
            "",
            "| phase | part | calls | seconds | share | GFLOP/s | of the limit |",
            "|---|---|--:|--:|--:|--:|--:|",
        ]
        flops = 0.0
        for row in result["rows"]:
            flops += row["gflops"] * row["seconds"]
            if row["seconds"] < 0.002 * total:
                continue
            rate = f"{row['gflops']:.0f} | {row['gflops'] / found['gflops']:.0%}" if row["gflops"] else "|"
            calls = f"{row['calls']:.0f}" if row["calls"] else ""
            lines.append(
                f"| {row['phase']} | {row['part']} | {calls} | {row['seconds']:.3f} | {row['seconds'] / total:.1%} "
                f"| {rate} |"
            )
        ideal = flops / found["gflops"]
        lines += [
            "",
            f"All matrix products at the limit would take {ideal:.2f} s: an iteration is at {ideal / total:.0%} of it.",
            "",
        ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", default="W1,W2,W3", help="of benchmarks/peers (default W1,W2,W3)")
    parser.add_argument("--iterations", type=int, default=4, help="the first is not counted (default 4)")
    parser.add_argument("--write", metavar="FILE", help="write the tables as Markdown, too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with runtime.quiet_import():
        import paddle
    paddle.set_device("cpu")
    if options.child:
        with measure.chatter_to_stderr():
            found = profile(WORKLOADS[options.child], options.iterations)
        print(json.dumps(found))
        return 0
    import subprocess

    found_limits, results = limits(), {}
    for name in options.workloads.split(","):  # a process for each, so that each has its own peak
        command = [sys.executable, "-W", "ignore", __file__, "--child", name, "--iterations", str(options.iterations)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
    page = text(results, found_limits)
    print(page, file=sys.stderr)
    if options.write:
        heading = (
            "# Where the time of a PPO iteration goes\n\nWritten by `python benchmarks/iteration.py --write "
            f"{options.write}`; {os.environ['OMP_NUM_THREADS']} threads. Workloads: [benchmarks.md](benchmarks.md).\n\n"
        )
        Path(options.write).write_text(heading + page, encoding="utf-8")
    print(json.dumps({"benchmark": "profile", "limits": found_limits, "workloads": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
