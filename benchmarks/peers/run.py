"""This toolkit against its peers (transformers and trl on torch), side by side in one run.

Every measurement is a child process, ours and the peer's by turns (in every other round the other way round), so that
a busy machine slows both alike. Both sides get the same number of threads. Each child checks that it did the work that
is compared: tokens, rows, optimizer steps, which weights moved. Prints a table to standard error and one JSON line to
standard output.

    python benchmarks/peers/run.py --peer-python .venv-bench/bin/python
        [--workloads W1,W2,W3] [--rounds 3] [--only rollout,growth,ppo,grpo,sft,rm,start,limits]

The figures mean: ``rollout`` response tokens per second (``varying``: lengths by a schedule, only the scheduled tokens
count); ``growth`` the same by batch and length on the first workload; ``ppo`` and ``grpo`` (8 answers to a prompt)
seconds of an iteration after the first, and the highest resident memory of the process; ``sft`` and ``rm`` seconds of
an optimizer step, the mean over an epoch; ``start`` seconds; ``limits`` GFLOP/s and GB/s.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from benchmarks.peers.table import MIB, Comparison, best_of_both, render
from benchmarks.peers.workloads import GROWTH_BATCHES, GROWTH_LENGTHS, WORKLOADS

TASKS = ("rollout", "growth", "ppo", "grpo", "sft", "rm", "start", "limits")
TRAINING_BATCH = 16
SIDES = ("ours", "peer")
# Cores that others may keep busy before the figures come with a warning.
QUIET = 0.1

Results = dict[tuple[str, ...], list[dict[str, Any]]]


def main() -> int:
    """Measure, print the table and the JSON line."""
    args = parse_arguments()
    results: Results = defaultdict(list)
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        driver = Driver(args, Path(temporary))
        driver.write_models()
        for number in range(args.rounds):
            sides = SIDES if number % 2 == 0 else SIDES[::-1]
            for key, spec in driver.tasks(number):
                for side in sides:
                    try:
                        result = driver.child(side, key, spec)
                    except ChildError as error:  # what has been measured is worth showing all the same
                        print(error, file=sys.stderr, flush=True)
                        failures.append(f"{' '.join(filter(None, key))}: {side}, round {number + 1}")
                        continue
                    if result is not None:
                        results[(*key, side)].append(result)
    comparisons = compare(results)
    print(render(comparisons), file=sys.stderr)
    if driver.others > QUIET:
        print(
            f"NOT A QUIET MACHINE: other processes kept up to {driver.others:.1f} cores busy beside a measurement; "
            "both libraries wait actively for their threads, so no figure here is worth much",
            file=sys.stderr,
        )
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    limits = {side: results[("limits", "", side)] for side in SIDES if results.get(("limits", "", side))}
    print(
        json.dumps(
            {
                "benchmark": "peers",
                "machine": {"cpu": cpu_name(), "threads": args.threads, "others_busy_cores": round(driver.others, 2)},
                "rounds": args.rounds,
                "failures": failures,
                "versions": versions(results),
                "figures": {comparison.name: rounded(comparison.figures()) for comparison in comparisons},
                "phases": phases(results),
                "limits": rounded(limits),
            }
        )
    )
    return 1 if failures else 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", default=".venv-bench/bin/python", help="Python that has torch and trl")
    parser.add_argument("--workloads", default="W1,W2,W3", help=f"some of {', '.join(WORKLOADS)} (W1,W2,W3)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side has its turn (3)")
    parser.add_argument("--only", default=",".join(TASKS), help=f"some of {', '.join(TASKS)} (all)")
    parser.add_argument(
        "--iterations", type=int, default=3, help="PPO and GRPO iterations of a round, the first not counted (3)"
    )
    parser.add_argument("--threads", type=int, default=None, help="of both sides (the physical cores)")
    parser.add_argument("--sides", default="ours,peer", help="leave one out to look at the other alone")
    parser.add_argument("--engine-arguments", type=json.loads, default={}, help="JSON: further ones of our engine")
    parser.add_argument("--ppo-arguments", type=json.loads, default={}, help="JSON: further ones of our PPO runs")
    parser.add_argument("--grpo-arguments", type=json.loads, default={}, help="JSON: further ones of our GRPO runs")
    parser.add_argument("--sft-arguments", type=json.loads, default={}, help="JSON: further ones of our SFT runs")
    parser.add_argument(
        "--rm-arguments", type=json.loads, default={}, help="JSON: further ones of our reward model runs"
    )
    parser.add_argument(
        "--peer-environment", type=json.loads, default={}, help="JSON: variables of the peer's processes"
    )
    args = parser.parse_args()
    for name, known in (("workloads", tuple(WORKLOADS)), ("only", TASKS), ("sides", SIDES)):
        values = [value for value in getattr(args, name).split(",") if value]
        unknown = sorted(set(values) - set(known))
        if unknown or not values:
            parser.error(f"--{name}: {', '.join(unknown) or 'nothing given'}; known are {', '.join(known)}")
        setattr(args, name, values)
    if args.rounds < 1 or args.iterations < 2:
        parser.error("--rounds must be at least 1 and --iterations at least 2 (the first is not counted)")
    if "peer" in args.sides and not Path(args.peer_python).exists():
        parser.error(f"--peer-python: there is no {args.peer_python}; `make bench-env` makes it")
    if args.threads is None:
        from alignment import runtime

        args.threads = runtime.physical_cores()
    return args


class ChildError(Exception):
    """A child failed, or did not do the work that is compared; the text says which and why."""


class Driver:
    """Starts the children.

    Args:
        args: the command line.
        folder: for models and runs; removed at the end.

    Attributes:
        others: the most cores that other processes kept busy while a child ran, on the average of its time.
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.runs, self.others = args, folder, 0, 0.0

    def write_models(self) -> None:
        """Our side's model folders, one for workloads of the same shape."""
        if "ours" not in self.args.sides:
            return
        for w in {WORKLOADS[name].model: WORKLOADS[name] for name in self.args.workloads}.values():
            code = (
                "import sys; from pathlib import Path; from benchmarks.peers import models, workloads;"
                "models.write_models(Path(sys.argv[1]), workloads.WORKLOADS[sys.argv[2]])"
            )
            self._run("ours", ["-c", code, str(self.folder / w.model), w.name])

    def tasks(self, number: int) -> list[tuple[tuple[str, str], dict[str, Any]]]:
        """What is measured in a round: ``((task, variant), specification)``. Growth, start and limits come once."""
        args, found = self.args, []
        for name in args.workloads:
            w = WORKLOADS[name]
            common = {"workload": name, "folder": str(self.folder / w.model)}
            if "rollout" in args.only:
                batches = (w.micro_batch, w.prompts)
                runs = [{"batch": b, "lengths": kind} for kind in ("fixed", "varying") for b in batches]
                found.append((("rollout", name), {**common, "runs": runs, "arguments": args.engine_arguments}))
            for task, more in (("ppo", args.ppo_arguments), ("grpo", args.grpo_arguments)):
                if task in args.only:
                    found.append(((task, name), {**common, "iterations": args.iterations, "arguments": more}))
        first = {"workload": args.workloads[0], "folder": str(self.folder / WORKLOADS[args.workloads[0]].model)}
        for stage, more in (("sft", args.sft_arguments), ("rm", args.rm_arguments)):
            for lengths in ("equal", "gsm8k") if stage in args.only else ():
                spec = {"stage": stage, "lengths": lengths, "batch": TRAINING_BATCH, "arguments": more}
                found.append(((stage, lengths), {**first, **spec}))
        if number == 0 and "growth" in args.only:
            runs = [{"batch": b, "new_tokens": n} for n in GROWTH_LENGTHS for b in GROWTH_BATCHES]
            found.append((("growth", args.workloads[0]), {**first, "runs": runs, "arguments": args.engine_arguments}))
        if number == 0 and "limits" in args.only:
            found.append((("limits", ""), {"workloads": args.workloads}))
        if number == 0 and "start" in args.only:
            found.append((("start", ""), {"repeats": 5}))
        return found

    def child(self, side: str, key: tuple[str, str], spec: dict[str, Any]) -> dict[str, Any] | None:
        """Run one side of a task; None where that side has no part in it."""
        task = key[0]
        if side not in self.args.sides or (task == "start" and side == "peer"):
            return None
        module = {"growth": "rollout", "sft": "training", "rm": "training"}.get(task, task)
        module = module if task in ("start", "limits") else f"{side}_{module}"
        self.runs += 1
        spec = {**spec, "output": str(self.folder / f"run-{self.runs}")}
        spec |= {"library": "paddle" if side == "ours" else "torch"} if task == "limits" else {}
        print(f"{' '.join(filter(None, key))}: {side}", file=sys.stderr, flush=True)
        began, busy = time.perf_counter(), busy_seconds()
        done = self._run(side, ["-m", f"benchmarks.peers.{module}", json.dumps(spec)])
        self.others = max(self.others, (busy_seconds() - busy) / (time.perf_counter() - began))
        return json.loads(done.splitlines()[-1])

    def _run(self, side: str, arguments: list[str]) -> str:
        threads = {name: str(self.args.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        environ = {**os.environ, **threads, "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if side == "peer":
            environ |= self.args.peer_environment
        python = sys.executable if side == "ours" else self.args.peer_python
        command = [python, "-W", "ignore", *arguments]
        done = subprocess.run(command, env=environ, cwd=REPO, capture_output=True, text=True)
        if done.returncode:
            raise ChildError(f"{' '.join(command)}\nfailed with status {done.returncode}:\n{done.stderr[-6000:]}")
        return done.stdout


def busy_seconds(proc: Path = Path("/proc")) -> float:
    """CPU seconds of this machine so far that did not go to children of this process; 0 where there is no /proc."""
    try:
        fields = (proc / "stat").read_text().splitlines()[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, softirq, *_ = map(int, fields)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    everyone = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    return everyone - children.ru_utime - children.ru_stime


def compare(results: Results) -> list[Comparison]:
    """The table's lines, in the order in which the tasks ran first."""
    lines: list[Comparison] = []
    for task, variant in dict.fromkeys(key[:2] for key in results):
        ours, peer = (results.get((task, variant, side), []) for side in SIDES)
        if task in ("rollout", "growth"):
            lines += compare_rollouts(f"{task} {variant}", ours, peer)
        elif task in ("ppo", "grpo"):
            check_equal(ours, peer, ("optimizer_steps", "rows", "trained_parameters"))
            seconds = [tuple(s for result in side for s in result["seconds"]) for side in (ours, peer)]
            lines.append(Comparison(f"{task.upper()} iteration {variant}", "s", False, *seconds))
            for what, key in (("peak memory", "peak_bytes"), ("of it before the models", "imported_bytes")):
                peaks = [tuple(result[key] / MIB for result in side) for side in (ours, peer)]
                lines.append(Comparison(f"{task.upper()} {variant}, {what}", "MiB", False, *peaks))
        elif task in ("sft", "rm"):
            check_equal(ours, peer, ("optimizer_steps", "rows", "tokens", "trained_parameters"))
            steps = [tuple(result["seconds_per_step"] for result in side) for side in (ours, peer)]
            lines.append(Comparison(f"{task} step, {variant} lengths", "s", False, *steps))
            peaks = [tuple(result["peak_bytes"] / MIB for result in side) for side in (ours, peer)]
            lines.append(Comparison(f"{task}, {variant} lengths, peak memory", "MiB", False, *peaks))
        elif task == "start":
            lines.append(Comparison("import alignment", "s", False, tuple(ours[0]["import_seconds"]), ()))
            first = (ours[0]["demo_first_step_seconds"],)
            lines.append(Comparison("the demo's first optimizer step", "s", False, first, ()))
        elif task == "limits":
            lines += compare_limits(ours, peer)
    return lines


def compare_rollouts(name: str, ours: list[dict[str, Any]], peer: list[dict[str, Any]]) -> list[Comparison]:
    """Tokens per second of each run, and of each side's best batch."""
    check_equal(ours, peer, ("parameters",))
    lines: list[Comparison] = []
    for i, wanted in enumerate((ours or peer)[0]["runs"]):
        rates, why = [], ""
        for side in (ours, peer):
            done = [result["runs"][i] for result in side]
            rates.append(tuple(run["tokens"] / run["seconds"] for run in done if run["seconds"] is not None))
            why = why or next((run["why"] for run in done if run["seconds"] is None), "")
        if ours and peer and not why:
            check_equal([r["runs"][i] for r in ours], [r["runs"][i] for r in peer], ("tokens",))
        what = f"{wanted['new_tokens']} new tokens" if "new_tokens" in wanted else f"{wanted['lengths']} lengths"
        lines.append(Comparison(f"{name}, {what}, batch {wanted['batch']}", "tokens/s", True, *rates, why=why))
    if name.startswith("rollout"):
        for kind in ("fixed", "varying"):
            best = best_of_both(
                f"{name}, {kind} lengths, best batch of each", [c for c in lines if f", {kind}" in c.name]
            )
            lines += [best] if best is not None else []
    return lines


def compare_limits(ours: list[dict[str, Any]], peer: list[dict[str, Any]]) -> list[Comparison]:
    """GEMM rates and bandwidths; ``ours`` is Paddle, ``peer`` torch."""
    lines = []
    for kind, unit in (("gflops", "GFLOP/s"), ("bandwidth_gb_s", "GB/s")):
        for name in (ours or peer)[0][kind]:
            rates = [tuple(result[kind][name] for result in side) for side in (ours, peer)]
            lines.append(Comparison(f"{'GEMM ' if kind == 'gflops' else 'memory, '}{name}", unit, True, *rates))
    if ours:
        for name, rate in ours[0]["threads_gb_s"].items():
            lines.append(Comparison(f"memory, {name} in threads of NumPy", "GB/s", True, (rate,), ()))
    return lines


def check_equal(ours: list[dict[str, Any]], peer: list[dict[str, Any]], keys: tuple[str, ...]) -> None:
    """Stop where the two sides did not do the same work.

    Raises:
        AssertionError: naming what differs.
    """
    for key in keys:
        values = {json.dumps(result[key]) for result in (*ours, *peer)}
        if len(values) > 1:
            raise AssertionError(f"the sides did not do the same work: {key} is {' and '.join(sorted(values))}")


def phases(results: Results) -> dict[str, dict[str, float]]:
    """Our iterations by phase: the shortest seconds of each, by task and workload."""
    found: dict[str, dict[str, float]] = {}
    for (task, variant, side), rounds in results.items():
        if task in ("ppo", "grpo") and side == "ours":
            names = rounds[0]["phases"]
            found[f"{task} {variant}"] = {n: round(min(s for r in rounds for s in r["phases"][n]), 4) for n in names}
    return found


def versions(results: Results) -> dict[str, dict[str, str]]:
    """Versions of everything that took part, by side."""
    found: dict[str, dict[str, str]] = {side: {} for side in SIDES}
    for key, rounds in results.items():
        found[key[-1]].update(rounds[0].get("versions", {}))
    from alignment import __version__

    found["ours"]["alignment"] = __version__
    return {side: dict(sorted(values.items())) for side, values in found.items() if values}


def rounded(value: Any) -> Any:
    """The same with four significant digits in every float."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def cpu_name() -> str:
    """The processor as /proc names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
