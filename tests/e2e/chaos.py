"""Kill a run at random moments, resume it each time, and compare it with an uninterrupted run, bit by bit.

``python -m tests.e2e.chaos --kills 30`` (``make chaos``) prints a line for each kill and one JSON line at the end; the
exit status is 1 when anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]


def write_run(folder: Path, name: str, base: Path) -> Path:
    """A PPO argument file that saves after every rollout and evaluates often; returns its path."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say the word {i}"}) + "\n" for i in range(48)))
    supervised = folder / "sft.jsonl"
    supervised.write_text("".join(json.dumps({"src": f"say {i}", "tgt": "one two three"}) + "\n" for i in range(16)))
    rewards = folder / "chaos_rewards.py"
    rewards.write_text(
        "def letters(prompts, responses, **row):\n    return [r.count('e') - 0.05 * len(r) for r in responses]\n"
    )
    values: dict[str, Any] = {
        "actor_model_name_or_path": str(base), "train_datasets": f"jsonl::{prompts}",
        "eval_datasets": f"jsonl:8/-1:{prompts}", "ptx_datasets": f"jsonl::{supervised}", "ptx_coeff": 0.5,
        "reward": f"{rewards}:letters", "output_dir": str(folder / name), "max_src_len": 48, "max_dec_len": 24,
        "per_device_prompt_batch_size": 16, "per_device_train_batch_size": 8, "update_iters": 2, "num_train_epochs": 12,
        "learning_rate": 1e-3, "critic_learning_rate": 1e-3, "normalize_reward": True, "normalize_advantage": True,
        "adaptive_kl": True, "kl_target": 0.5, "kl_horizon": 500, "top_p": 1.0, "evaluation_strategy": "steps",
        "eval_steps": 12, "save_strategy": "steps", "save_steps": 4, "save_total_limit": 2, "logging_steps": 1,
        "report_to": "none", "disable_tqdm": True, "sample_table_rows": 2,
    }  # fmt: skip
    file = folder / f"{name}.json"
    file.write_text(json.dumps(values))
    return file


def start(file: Path) -> subprocess.Popen:
    """The run in a process group of its own, resuming where it can."""
    log = open(file.with_suffix(".log"), "ab")  # noqa: SIM115  (the child keeps it)
    command = [sys.executable, "-m", "alignment", "ppo", str(file), "resume_from_checkpoint=true"]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return subprocess.Popen(command, cwd=REPO, env=environment, stdout=log, stderr=log, start_new_session=True)


def lines(path: Path) -> int:
    """Rows of a growing file."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def written(path: Path) -> int:
    """When the file was last changed, in nanoseconds; 0 where there is none."""
    return path.stat().st_mtime_ns if path.exists() else 0


def comparable(folder: Path) -> dict[str, Any]:
    """What must be equal: metrics without times, samples, and the bytes of the final weights."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timeless = [{key: value for key, value in row.items() if key != "time" and "second" not in key} for row in rows]
    weights = {name: (folder / name / "model.safetensors").read_bytes() for name in ("policy", "value")}
    return {"metrics": timeless, "samples": (folder / "eval_samples.jsonl").read_text(), **weights}


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    from tests.tiny import tiny_model_dir

    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = tiny_model_dir(folder / "base", "qwen2")
        whole = write_run(folder, "whole", base)
        began = time.monotonic()
        if start(whole).wait() != 0:
            print(whole.with_suffix(".log").read_text()[-3000:])
            return 1
        seconds = time.monotonic() - began
        killed = write_run(folder, "killed", base)
        metrics, done, kills = folder / "killed" / "metrics.jsonl", False, 0
        while not done:
            before = written(metrics)
            process = start(killed)
            if kills < options.kills:
                # once the process works on its file, any moment: rollout, scoring, update, saving, evaluation
                while process.poll() is None and written(metrics) == before:
                    time.sleep(0.005)
                time.sleep(draw.uniform(0.0, 2.5))
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    kills += 1
                    print(f"kill {kills}: {lines(metrics)} rows written", flush=True)
            status = process.wait()
            done = status == 0
            if status not in (0, -signal.SIGKILL):
                print(killed.with_suffix(".log").read_text()[-3000:])
                return 1
        first, second = comparable(folder / "whole"), comparable(folder / "killed")
        differing = [name for name in first if first[name] != second[name]]
        rows = len(first["metrics"])
    print(
        json.dumps({"kills": kills, "rows": rows, "uninterrupted_seconds": round(seconds, 1), "differing": differing})
    )
    return 1 if differing or kills == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
