"""Whether an iteration of PPO takes longer than it did: this checkout against a commit before it, in pairs.

Both run the public command on a workload of ``benchmarks/peers``, side by side, and take turns: a reward of weight 0,
which is asked once in every iteration, waits until it is its side's turn. So the two iterations of a pair are seconds
apart, the same prompts and the same weights, and whatever else the machine does hits both alike. The seconds of an
iteration are those between two rewards: update, metrics, prompts, rollout, log-probs, reference, scores, values.

    python -m benchmarks.against COMMIT [--workload W1] [--pairs 12] [--threads 1]

Prints the mean ratio (now / then) with its 95 % interval as a JSON line; the exit status is 1 where the whole interval
lies above ``--bound``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.peers.models import write_models
from benchmarks.peers.ours_ppo import arguments
from benchmarks.peers.workloads import WORKLOADS
from tests.e2e.golden import REPO, checked_out

#: Iterations of each side that are not counted.
WARM_UP = 1
#: Two-sided 95 % quantiles of Student's t by degrees of freedom; behind the last one the normal's 1.96 is close.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
       2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip
_GATE = """
import os, time
turn, said, began = open(os.environ["GATE_TURN"]), open(os.environ["GATE_SAID"], "w", buffering=1), time.perf_counter()
def wait(prompts, responses, **row):
    global began
    print(time.perf_counter() - began, file=said)
    turn.readline()
    began = time.perf_counter()
    return [0.0] * len(responses)
"""


@dataclass
class Side:
    """A run that waits for its turn in every iteration.

    Attributes:
        process: the public command.
        turn, said: the ends of its pipes: a line to go on, its seconds.
        log: what it wrote.
    """

    process: subprocess.Popen
    turn: IO[str]
    said: IO[str]
    log: Path

    def seconds(self) -> float:
        """Wait for the end of its iteration."""
        line = self.said.readline()
        if not line:
            raise RuntimeError(f"a run has ended early:\n{self.log.read_text()[-3000:]}")
        return float(line)

    def go(self) -> None:
        """Let it do the next iteration."""
        print(file=self.turn, flush=True)


def start(root: Path, folder: Path, models: Path, workload: str, iterations: int, threads: int) -> Side:
    """Start the command of the package in ``root``; its files go to ``folder``."""
    folder.mkdir()
    gate = folder / "gate.py"
    gate.write_text(_GATE)
    pipes = {"GATE_TURN": folder / "turn", "GATE_SAID": folder / "said"}
    for pipe in pipes.values():
        os.mkfifo(pipe)
    values = arguments(WORKLOADS[workload], models, folder / "run", iterations)
    values["reward"] = {"model": 1.0, f"{gate}:wait": 0.0}
    (folder / "arguments.json").write_text(json.dumps(values))
    environ = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": str(threads)}
    environ |= {name: str(pipe) for name, pipe in pipes.items()}
    log = folder / "log"
    with open(log, "w") as file:
        command = [sys.executable, "-m", "alignment", "ppo", str(folder / "arguments.json")]
        process = subprocess.Popen(command, cwd=folder, env=environ, stdout=file, stderr=file)
    # Opened for both directions, so that opening waits for nobody; the end of the run is seen by its process.
    turn = os.fdopen(os.open(pipes["GATE_TURN"], os.O_RDWR), "w")
    said = open(pipes["GATE_SAID"])  # noqa: SIM115  (closed with the run)
    return Side(process, turn, said, log)


def measure(commit: str, workload: str, pairs: int, threads: int, folder: Path) -> list[tuple[float, float]]:
    """Seconds of ``(then, now)`` in each pair.

    Raises:
        RuntimeError: a run failed, or the two did not do the same.
    """
    write_models(folder / "models", WORKLOADS[workload])
    iterations, found = WARM_UP + pairs + 1, []
    with checked_out(commit, folder / "base") as base:
        roots = (base, REPO)
        sides = [start(root, folder / name, folder / "models", workload, iterations, threads)
                 for root, name in zip(roots, ("then", "now"), strict=True)]  # fmt: skip
        for side in sides:
            side.seconds()
        for number in range(iterations - 1):
            seconds = [0.0, 0.0]
            for i in (0, 1) if number % 2 else (1, 0):
                sides[i].go()
                seconds[i] = sides[i].seconds()
            if number >= WARM_UP:
                found.append((seconds[0], seconds[1]))
                print(f"pair {len(found)}: {seconds[0]:.3f} s then, {seconds[1]:.3f} s now", file=sys.stderr)
        for side in sides:
            side.go()
            if side.process.wait(300):
                raise RuntimeError(f"a run failed:\n{side.log.read_text()[-3000:]}")
    then, now = (rows_of(folder / name / "run") for name in ("then", "now"))
    other = [key for a, b in zip(then, now, strict=True) for key in a if a[key] != b.get(key)]
    if other:
        raise RuntimeError(f"the two runs did not do the same: {', '.join(sorted(set(other)))} differ")
    return found


def rows_of(output: Path) -> list[dict[str, float]]:
    """The losses, scores and norms of each step."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key.startswith("train/")} for row in rows]


def interval(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """The geometric mean of ``now / then`` over the pairs, and the ends of its 95 % interval (Student's t)."""
    logs = [math.log(now / then) for then, now in pairs]
    mean = sum(logs) / len(logs)
    spread = math.sqrt(sum((value - mean) ** 2 for value in logs) / (len(logs) - 1) / len(logs))
    wide = T95[min(len(logs) - 1, len(T95)) - 1] * spread
    return math.exp(mean), math.exp(mean - wide), math.exp(mean + wide)


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="the commit to compare with")
    parser.add_argument("--workload", choices=list(WORKLOADS), default="W1", help="of benchmarks/peers (default W1)")
    parser.add_argument("--pairs", type=int, default=12, help="of iterations (default 12)")
    parser.add_argument("--threads", type=int, default=1, help="of each run (default 1)")
    parser.add_argument("--bound", type=float, default=1.02, help="of now / then (default 1.02)")
    options = parser.parse_args(argv)
    if options.pairs < 2:
        parser.error("--pairs: an interval needs 2 of them")
    with tempfile.TemporaryDirectory(prefix="against-") as name:
        found = measure(options.commit, options.workload, options.pairs, options.threads, Path(name).resolve())
    ratio, low, high = interval(found)
    row = {"benchmark": "against", "commit": options.commit, "workload": options.workload, "pairs": options.pairs}
    row |= {"threads": options.threads, "ratio": round(ratio, 4), "interval": [round(low, 4), round(high, 4)]}
    row |= {name: round(sum(pair[i] for pair in found) / len(found), 3) for i, name in enumerate(("then", "now"))}
    print(json.dumps(row))
    return 1 if low > options.bound else 0


if __name__ == "__main__":
    sys.exit(main())
