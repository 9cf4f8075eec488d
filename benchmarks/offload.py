"""What each ``offload_level`` saves and costs, in one run: resident memory per phase, and the time of a step.

Each level has a fresh process that runs PPO with four models of the same size (random weights, made here). Prints a
table to standard error and one JSON line to standard output; about four minutes on one core. The levels take turns
and the best time of each counts, so that a busy machine slows all of them alike.

    python benchmarks/offload.py [--hidden 1024] [--layers 2] [--iterations 3] [--rounds 2]

With all levels on it asserts that what is resident of parameters and optimizer states in each phase is what the
dataflow says is needed, within 10 %, by three measures:

- accounting: the bytes of the groups that are in memory;
- pages: the kernel's own word for every page of every parameter and optimizer state (``/proc/self/pagemap``);
- RSS: the resident memory of the process at the beginning of the phase, less that of the same process before it loaded
  any model.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers.measure import wrap_calls

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

LEVELS = ("", "freeze_model", "optimizer", "train_model", "freeze_model optimizer train_model")
ALL = LEVELS[-1]
TOLERANCE = 0.1
MIB = 1 << 20


def rss() -> int:
    """Resident bytes of this process, now."""
    return status("VmRSS")


def status(name: str) -> int:
    """A figure of ``/proc/self/status`` in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise KeyError(name)


def reset_peak() -> None:
    """Let the peak of the resident memory (VmHWM) begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def settle() -> None:
    """Give what is free back to the system, so that it does not count as resident."""
    import ctypes

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


class Meter:
    """Wraps the calls of a trainer's flow and notes memory and time of each.

    Args:
        trainer: a loop that has not run yet.
        groups: gives each group's tensors that exist now.
        before: resident bytes of the process without any model.
    """

    def __init__(self, trainer: Any, groups: Callable[[], dict[str, list[Any]]], before: int) -> None:
        self.trainer, self.groups, self.before = trainer, groups, before
        self.rows: list[dict[str, Any]] = []
        wrap_calls(trainer, self._wrapped)

    def _wrapped(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*values: Any) -> Any:
            row = {"phase": phase, **self._measured()}
            reset_peak()
            began = time.perf_counter()
            result = function(*values)
            row["seconds"] = time.perf_counter() - began
            row["peak_rss"] = status("VmHWM") - self.before
            self.rows.append(row)
            return result

        return run

    def _measured(self) -> dict[str, Any]:
        from alignment.parallel.offload_cpu import resident_bytes

        groups, residency = self.groups(), self.trainer.residency
        sizes = {name: sum(int(t.size) * t.element_size() for t in tensors) for name, tensors in groups.items()}
        inside = residency.resident() if residency is not None else set(groups)
        pages = {name: resident_bytes(tensors) for name, tensors in groups.items()}
        settle()
        return {
            "rss": rss() - self.before,
            "accounting": sum(sizes[name] for name in inside),
            "pages": sum(pages.values()),
            "sizes": sizes,
        }


def child(folder: Path, level: str) -> dict[str, Any]:
    """Run PPO at one level in this process and return its figures."""
    # A small run first: what Python, Paddle and its math library load with their first use is no model's memory.
    begin(folder / "small" / "ppo.json", level).train()
    settle()
    before = rss()
    reset_peak()
    trainer = begin(folder / "large" / "ppo.json", level)
    loading = status("VmHWM") - before
    roles, iterate = trainer.roles, trainer.iterate
    times: list[tuple[float, float]] = []

    def groups() -> dict[str, list[Any]]:
        engines = [roles[name].engine for name in ("actor", "critic", "reference", "reward")]
        found = {engine.name: list(engine.model.parameters()) for engine in engines}
        return {**found, **{f"{e.name}_optimizer": e.optimizer_tensors() for e in engines if e.trainable}}

    def timed() -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        iterate()
        times.append((time.perf_counter() - wall, time.process_time() - cpu))

    trainer.iterate = timed
    meter = Meter(trainer, groups, before)
    trainer.train()
    lines = (Path(trainer.args.output_dir) / "metrics.jsonl").read_text().splitlines()
    moves = {key: value for key, value in json.loads(lines[-1]).items() if key.startswith("offload/")}
    return {"rows": meter.rows, "times": times, "moves": moves, "loading": loading}


def begin(file: Path, level: str) -> Any:
    """The trainer of an argument file, with its models."""
    from alignment.arguments import parse_ppo
    from alignment.flow.runner import use_device
    from alignment.parallel import init_world
    from alignment.ppo import ppo_trainer

    args = parse_ppo([str(file), f"offload_level={level}", f"output_dir={tempfile.mkdtemp(dir=file.parent)}"])
    use_device(args)
    data = ppo_trainer.load_data(args, show_progress=False)
    return ppo_trainer.build_trainer(args, init_world(), data, args.derive_sizes(len(data.train)), [])


def make_run(folder: Path, hidden: int, layers: int, iterations: int) -> None:
    """Write models of one size, prompts and ``ppo.json`` into a folder."""
    from alignment import runtime

    with runtime.quiet_import():
        import paddle  # noqa: F401
    from alignment.ppo.models import load_score_model, load_tokenizer, save_model, save_tokenizer
    from tests.tiny import tiny_model_dir, write_jsonl

    # Tables of positions are no parameters and stay; a real model has few of them for its size.
    actor = tiny_model_dir(folder / "actor", hidden_size=hidden, layers=layers, max_position_embeddings=128)
    save_model(load_score_model(str(actor), score_type="reward"), folder / "reward")
    save_tokenizer(load_tokenizer(actor), folder / "reward")
    prompts = write_jsonl(folder / "prompts.jsonl", [{"prompt": f"what is {i}"} for i in range(4 * iterations)])
    values = {
        "train_datasets": f"jsonl::{prompts}",
        "actor_model_name_or_path": str(actor),
        "reward_model_name_or_path": str(folder / "reward"),
        "output_dir": str(folder / "run"),
        "max_src_len": 48,
        "max_dec_len": 8,
        "per_device_prompt_batch_size": 4,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }
    (folder / "ppo.json").write_text(json.dumps(values))


def run_child(folder: Path, level: str) -> dict[str, Any]:
    """The figures of one level, from a fresh process."""
    command = [sys.executable, "-W", "ignore::UserWarning", __file__, "--child", str(folder), "--level", level]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def summarise(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Per phase the largest figures of the iterations after each round's first, and the shortest times of these."""
    phases: dict[str, dict[str, float]] = {}
    count = len({row["phase"] for row in rounds[0]["rows"]})
    # the first iteration has no optimizer states at its beginning
    for row in (row for result in rounds for row in result["rows"][count:]):
        entry = phases.setdefault(row["phase"], {})
        for key in ("rss", "peak_rss", "accounting", "pages"):
            entry[key] = max(entry.get(key, 0.0), row[key])
    walls, cpus = zip(*(pair for result in rounds for pair in result["times"][1:]), strict=True)
    moves = min((result["moves"] for result in rounds), key=moving_seconds)
    loading = max(result["loading"] for result in rounds)
    return {
        "iteration_seconds": min(walls),
        "iteration_cpu_seconds": min(cpus),
        "moving_seconds": moving_seconds(moves),
        "bytes_in": sum(value for key, value in moves.items() if key.endswith("_bytes_in")),
        "bytes_out": sum(value for key, value in moves.items() if key.endswith("_bytes_out")),
        "loading": loading,
        "peak_rss": max(loading, *(entry["peak_rss"] for entry in phases.values())),
        "phases": phases,
    }


def moving_seconds(moves: dict[str, float]) -> float:
    """Time of an iteration's moves."""
    return sum(value for key, value in moves.items() if key.endswith("_seconds"))


def needed_bytes(sizes: dict[str, int]) -> dict[str, int]:
    """What the dataflow says is needed in each phase."""
    from alignment.methods.ppo import PPO

    return {phase: sum(sizes[group] for group in groups) for phase, groups in PPO(None).flow().residency()}


def check(phases: dict[str, dict[str, float]], needed: dict[str, int]) -> list[str]:
    """Everything that is further than ``TOLERANCE`` from what is needed, in words."""
    wrong = []
    for phase, entry in phases.items():
        for measure in ("accounting", "pages", "rss"):
            if abs(entry[measure] - needed[phase]) > TOLERANCE * needed[phase]:
                wrong.append(
                    f"{phase}: {measure} says {entry[measure] / MIB:.1f} MiB, needed are {needed[phase] / MIB:.1f}"
                )
    return wrong


def table(results: dict[str, dict[str, Any]], needed: dict[str, int]) -> str:
    """Peak of each phase and time of an iteration, a level per line."""
    head = ["level", "loading", *needed, "highest", "s/iteration", "CPU s", "s moving", "MiB in", "MiB out"]
    lines = []
    for level, result in results.items():
        peaks = [f"{result['phases'][phase]['peak_rss'] / MIB:.0f}" for phase in needed]
        peaks.insert(0, f"{result['loading'] / MIB:.0f}")
        moved = [f"{result[key] / MIB:.0f}" for key in ("bytes_in", "bytes_out")]
        times = [f"{result[f'{what}_seconds']:.2f}" for what in ("iteration", "iteration_cpu", "moving")]
        lines.append([level or "(none)", *peaks, f"{result['peak_rss'] / MIB:.0f}", *times, *moved])
    begin = [f"{results[ALL]['phases'][phase]['rss'] / MIB:.0f}" for phase in needed]
    lines.append(["all, at the beginning", "", *begin])
    lines.append(["needed (dataflow)", "", *(f"{value / MIB:.0f}" for value in needed.values())])
    lines = [head, *lines]
    widths = [max(len(row[i]) for row in lines if i < len(row)) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(widths[i]) for i, cell in enumerate(row)) for row in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024, help="width of the models (default 1024)")
    parser.add_argument("--layers", type=int, default=2, help="layers of the models (default 2)")
    parser.add_argument("--iterations", type=int, default=3, help="PPO iterations of a round, the first not counted")
    parser.add_argument("--rounds", type=int, default=2, help="how often each level has its turn")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--level", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(Path(args.child), args.level)))
        return 0

    with tempfile.TemporaryDirectory() as temporary:
        make_run(Path(temporary) / "small", args.hidden, 1, 1)
        make_run(Path(temporary) / "large", args.hidden, args.layers, args.iterations)
        raw: dict[str, list[dict[str, Any]]] = {level: [] for level in LEVELS}
        for level in LEVELS * args.rounds:
            raw[level].append(run_child(Path(temporary), level))
    sizes = raw[ALL][0]["rows"][-1]["sizes"]
    needed = needed_bytes(sizes)
    results = {level: summarise(rounds) for level, rounds in raw.items()}
    wrong = check(results[ALL]["phases"], needed)
    print("peak resident MiB in each phase, less the process without models", file=sys.stderr)
    print(table(results, needed), file=sys.stderr)
    for line in wrong:
        print(f"NOT WITHIN {TOLERANCE:.0%}: {line}", file=sys.stderr)
    print(json.dumps({"benchmark": "offload", "ok": not wrong, "sizes": sizes, "needed": needed, "levels": results}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
