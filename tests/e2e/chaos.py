"""Kill a run at random moments, resume it each time, and compare it with an uninterrupted run, bit by bit.

``python -m tests.e2e.chaos`` (``make chaos``) does it with PPO on one process and on TP2 x PP2 (four processes; there
either one of them dies, and the others have to stop by themselves, or all die at once), and with every other method on
one process. The moments are drawn in each phase of the run in turn: rollout, scoring, update, while a checkpoint is
half-written, evaluation, and the very end. It prints a line for each kill and a JSON line for each method and layout;
the exit status is 1 when anything differs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.e2e import chaos_job
from tests.e2e.chaos_job import Shot
from tests.parallel.forked import try_ranks
from tests.parallel.layouts import LAYOUTS, Layout
from tests.small_methods import METHODS

CHAOS_LAYOUTS = ("1 process", "TP2 x PP2")
#: (method, layout) -> kills.
PLAN = {("ppo", layout): 30 for layout in CHAOS_LAYOUTS} | {
    (name, "1 process"): 10 for name in METHODS if name != "ppo"
}
# One kill in each of these in turn, in a fresh random order each time round; `finish` ends a run, so it is rarer.
PHASES = ("rollout", "scoring", "update", "saving", "evaluation", "update", "saving")
FINISHES = 10  # one in so many kills is in the last phase
LONGEST = {"rollout": 0.03, "scoring": 0.01, "update": 0.05, "saving": 0.05, "evaluation": 0.08, "finish": 0.004}
KILLED, HANGS = "ended without a result", "still running"
TIMEOUT = 180.0


class ChaosError(AssertionError):
    """A run did not end as it should; the message has its output."""


@dataclass
class Tally:
    """What happened on one layout.

    Attributes:
        phases: kills by phase.
        everyone: how many of them killed all processes.
        stop_seconds: how long it took at most until all had stopped after one was killed.
        differing: what was not equal to the uninterrupted run.
        runs: killed runs that came to their end.
        rows: of ``metrics.jsonl`` that were compared in each.
    """

    phases: Counter[str] = field(default_factory=Counter)
    everyone: int = 0
    stop_seconds: float = 0.0
    differing: list[str] = field(default_factory=list)
    runs: int = 0
    rows: int = 0


def write_files(folder: Path) -> Path:
    """Tiny models, prompts, supervised rows and a reward; returns ``folder``."""
    from tests.tiny import tiny_model_dir, write_jsonl

    tiny_model_dir(folder / "base", "qwen2")
    tiny_model_dir(folder / "cost", "qwen2", seed=1)
    for answers in {method.answers for method in METHODS.values()}:
        prompts = [{"prompt": f"say the word {i}"} for i in range(48 // answers)]
        write_jsonl(folder / f"prompts_{answers}.jsonl", prompts)
    write_jsonl(folder / "prompts_dev.jsonl", [{"prompt": f"say the letter {i}"} for i in range(8)])
    write_jsonl(folder / "sft.jsonl", [{"src": f"say {i}", "tgt": "one two three"} for i in range(16)])
    (folder / "chaos_rewards.py").write_text(
        "def letters(prompts, responses, **row):\n    return [r.count('e') - 0.05 * len(r) for r in responses]\n"
    )
    return folder


def arguments(files: Path, method: str, output: Path, layout: Layout, epochs: int) -> list[str]:
    """Three rollouts an epoch, of four optimizer steps (A2C: two). Rows, saves and evaluations are at other distances,
    so that checkpoints lie at every place of an update.
    """
    values: dict[str, Any] = {
        "actor_model_name_or_path": files / "base",
        "train_datasets": f"jsonl::{files}/prompts_{METHODS[method].answers}.jsonl",
        "eval_datasets": f"jsonl::{files / 'prompts_dev.jsonl'}", "ptx_datasets": f"jsonl::{files / 'sft.jsonl'}",
        "ptx_coeff": 0.5, "reward": f"{files / 'chaos_rewards.py'}:letters", "output_dir": output, "max_src_len": 48,
        "max_dec_len": 16, "per_device_train_batch_size": 8, "num_train_epochs": epochs, "learning_rate": 1e-3,
        "normalize_reward": "true", "adaptive_kl": "true", "kl_target": 0.5, "kl_horizon": 500, "top_p": 1.0,
        "lr_scheduler_type": "cosine", "evaluation_strategy": "steps", "eval_steps": 8, "save_strategy": "steps",
        "save_steps": 3, "save_total_limit": 2, "logging_steps": 2, "report_to": "none", "disable_tqdm": "true",
        "sample_table_rows": 2, "device": "cpu", "seed": 5,
    }  # fmt: skip
    words = [f"{key}={value}" for key, value in values.items()]
    return [*words, *METHODS[method].words(files, prompts=16), *layout.arguments]


def comparable(output: Path) -> dict[str, Any]:
    """What must be equal: metrics without times, samples, and the bytes of all final weights."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    timeless = [{key: value for key, value in row.items() if key != "time" and "second" not in key} for row in rows]
    weights = {file.parent.name: file.read_bytes() for file in sorted(output.glob("*/model.safetensors"))}
    assert "policy" in weights
    return {"metrics": timeless, "samples": (output / "eval_samples.jsonl").read_text(), **weights}


def draw_shots(count: int, layout: Layout, draw: random.Random) -> list[Shot]:
    """Moments to kill at, each phase in turn."""
    phases: list[str] = []
    while len(phases) < count:
        phases += draw.sample(PHASES, len(PHASES))
        if len(phases) % FINISHES < len(PHASES):
            phases.append("finish")
    return [
        Shot(
            phase=phase,
            entry=1 if phase in ("finish", "evaluation") else draw.randint(1, 3),
            delay=draw.uniform(0.0, LONGEST[phase]),
            rank=draw.randrange(layout.processes),
            everyone=layout.processes > 1 and draw.random() < 0.5,
        )
        for phase in phases[:count]
    ]


def attempt(files: Path, method: str, output: Path, layout: Layout, epochs: int, shot: Shot | None) -> bool:
    """Run, or go on running, until the end or the kill; returns whether it came to the end.

    Raises:
        ChaosError: it failed otherwise, or processes went on after one was killed.
    """
    words = [*arguments(files, method, output, layout, epochs), "resume_from_checkpoint=true"]
    result = try_ranks(layout.processes, chaos_job.run, method, words, str(output), shot, timeout=TIMEOUT)
    if not result.errors:
        return True
    told = "\n".join(f"rank {rank}: {text}\n{result.output.get(rank, '')}" for rank, text in result.errors.items())
    if shot is None or KILLED not in result.errors.get(shot.rank, ""):
        raise ChaosError(told)
    if len(result.errors) < layout.processes or any(HANGS in text for text in result.errors.values()):
        raise ChaosError(f"not all processes have stopped after {shot}:\n{told}")
    return False


def torment(method: str, layout_name: str, kills: int, epochs: int, seed: int = 0) -> Tally:
    """Kill runs of a method on one layout ``kills`` times, as many runs as that takes, and compare each with an
    uninterrupted one.

    Raises:
        ChaosError: a run failed by itself.
    """
    layout, tally = LAYOUTS[layout_name], Tally()
    draw = random.Random(f"{seed} {layout_name}" if method == "ppo" else f"{seed} {method} {layout_name}")
    shots = draw_shots(kills, layout, draw)
    with tempfile.TemporaryDirectory() as temporary:
        files = write_files(Path(temporary))
        if not attempt(files, method, files / "whole", layout, epochs, None):
            raise ChaosError("the uninterrupted run was interrupted")
        expected = comparable(files / "whole")
        tally.rows = len(expected["metrics"])
        while shots or tally.runs == 0:
            if tally.runs > kills + 1:
                raise ChaosError(f"the runs end before this moment comes: {shots[0]}")
            output = files / f"killed-{tally.runs}"
            while not attempt(files, method, output, layout, epochs, shots[0] if shots else None):
                shot = shots.pop(0)
                tally.phases[shot.phase] += 1
                tally.everyone += shot.everyone
                record = json.loads((files / chaos_job.KILLS_FILE).read_text().splitlines()[-1])
                if layout.processes > 1 and not shot.everyone:
                    tally.stop_seconds = max(tally.stop_seconds, time.time() - record["time"])
                whom = "all processes" if shot.everyone else f"rank {shot.rank}"
                what = f"{method} on {layout_name}, kill {tally.phases.total()}"
                print(f"{what}: {whom} in {shot.phase}, {record['line']}", flush=True)
            tally.runs += 1
            found = comparable(output)
            tally.differing += [f"{output.name}: {name}" for name in expected if expected[name] != found.get(name)]
    return tally


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, help="of each method on each layout (default: PPO 30, others 10)")
    parser.add_argument("--method", action="append", choices=list(METHODS), help="default: each of them")
    parser.add_argument(
        "--layout", action="append", choices=CHAOS_LAYOUTS, help="default: PPO both, others one process"
    )
    parser.add_argument("--epochs", type=int, default=6, help="of 3 rollouts each")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    plan = {
        (name, layout): options.kills or kills
        for (name, layout), kills in PLAN.items()
        if (not options.method or name in options.method) and (not options.layout or layout in options.layout)
    }
    wrong = 0
    for (method, layout), kills in plan.items():
        began = time.monotonic()
        tally = torment(method, layout, kills, options.epochs, options.seed)
        seconds = round(time.monotonic() - began, 1)
        row = {"method": method, "layout": layout, "kills": tally.phases.total(), "phases": dict(tally.phases)}
        row |= {"all_killed": tally.everyone, "longest_stop_seconds": round(tally.stop_seconds, 1)}
        row |= {"runs": tally.runs, "rows": tally.rows, "seconds": seconds, "differing": tally.differing}
        print(json.dumps(row), flush=True)
        wrong += bool(tally.differing) or tally.phases.total() < kills
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
