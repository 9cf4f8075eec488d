"""A real model through every stage: ``make real``.

SmolLM2-135M-Instruct, as the GGUF file that a package on the registry carries, with the ordinary runners and the JSON
files of ``config/smollm2``:

    greedy   its greedy answers to 20 prompts, compared token for token with those that transformers gave
    sft      fine-tuning on GSM8K rows: loss and perplexity of held-out rows, before and after
    rm       a reward model on HH pairs: accuracy and calibration on held-out pairs
    ppo      PPO from a verifiable reward: sums of two numbers, held-out sums before and after, for every seed
    grpo     GRPO on the same task: eight answers to a prompt, no critic, no reference, for every seed

Each stage is a process of its own, so that its time and its highest memory are its own. A stage that is done is not
done again (``--again``); an interrupted one goes on from its last checkpoint. At the end: tables, ``results.json`` and
``curves.png`` in the output folder.

    python -m benchmarks.real.run [--quick] [--only ppo] [--seeds 1,2] [--gsm8k FILE] [--hh FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from alignment.cli import CommandParser, run_main
from alignment.errors import AlignmentError, ArgumentsError
from benchmarks.real import data, report
from benchmarks.real.fetch import model_file

REPO = Path(__file__).resolve().parents[2]
CONFIG = REPO / "config" / "smollm2"
WRITTEN_IN = "checkpoints/smollm2"  # the folder that the JSON files name
STAGES = ("greedy", "sft", "rm", *report.METHODS)
REAL_DATA = {"gsm8k": "gsm8k_train.jsonl.gz", "hh": "hh_harmless.jsonl.gz"}
QUICK = {
    "sft": ["max_steps=2", "per_device_train_batch_size=4"],
    "rm": ["max_steps=2", "per_device_train_batch_size=4"],
    "ppo": ["max_steps=2", "per_device_prompt_batch_size=8", "per_device_train_batch_size=4", "critic_warmup_steps=0"],
    "grpo": ["max_steps=2", "per_device_prompt_batch_size=2", "per_device_train_batch_size=8"],
}
#: Rows of every evaluation file with --quick.
QUICK_ROWS = 8


def main(argv: list[str]) -> int:
    """Run what was asked for; returns the status of the first stage that fails, or 0.

    Raises:
        AlignmentError: an option, a file or the registry cannot be used.
    """
    options = parse(argv)
    out = Path(options.output_dir)
    prepare(out, options)
    for name in stages(options):
        if status := run_stage(name, out, options):
            print(f"\n== {name} ended with status {status}; the same command goes on from here", flush=True)
            return status
    report.show(out, options.seeds)
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog="make real", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output_dir", default=WRITTEN_IN, metavar="DIR", help=f"where all files go ({WRITTEN_IN})")
    parser.add_argument("--model", type=Path, metavar="FILE", help="a copy of the GGUF file, in place of fetching it")
    for name, file in REAL_DATA.items():
        parser.add_argument(
            f"--{name}", type=Path, metavar="FILE", help=f"real rows ({file} of ../shared/data, if there)"
        )
    parser.add_argument("--seeds", default="1,2", help="of PPO and GRPO, separated by commas (1,2)")
    parser.add_argument("--only", default=",".join(STAGES), help=f"some of {','.join(STAGES)} (all)")
    parser.add_argument("--quick", action="store_true", help="two steps of each stage, to see that everything runs")
    parser.add_argument("--again", action="store_true", help="do stages again that are done")
    options = parser.parse_args(argv)
    options.only = options.only.split(",")
    if unknown := [name for name in options.only if name not in STAGES]:
        raise ArgumentsError(f"--only: {', '.join(unknown)} is no stage; the stages are {', '.join(STAGES)}")
    try:
        options.seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError:
        raise ArgumentsError(f"--seeds must be numbers separated by commas, not {options.seeds!r}") from None
    for name, file in REAL_DATA.items():
        given, usual = getattr(options, name), REPO.parent / "shared" / "data" / file
        setattr(options, name, given or (usual if usual.is_file() else None))
    return options


def stages(options: argparse.Namespace) -> list[str]:
    """The stages to run by their folders' names, PPO and GRPO once for every seed."""
    return [
        name
        for stage in STAGES
        if stage in options.only
        for name in ([f"{stage}-{seed}" for seed in options.seeds] if stage in report.METHODS else [stage])
    ]


def prepare(out: Path, options: argparse.Namespace) -> None:
    """Make ``base/model.gguf`` (a link into the cache) and the data files.

    Raises:
        AlignmentError: the model cannot be fetched, or a file cannot be read or written.
    """
    file = (options.model or model_file()).resolve()
    if not file.is_file():
        raise ArgumentsError(f"--model: there is no file {options.model}")
    data.write(out / "data", options.gsm8k, options.hh)
    if options.quick:
        for path in (out / "data").glob("*_dev.jsonl"):
            path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:QUICK_ROWS]))
    try:
        link = out / "base" / "model.gguf"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(file)
    except OSError as error:
        raise AlignmentError(f"--output_dir: cannot write {out}: {error.strerror or error}") from error


def run_stage(name: str, out: Path, options: argparse.Namespace) -> int:
    """Run one stage in a process of its own, unless it is done, and note its times and memory in ``done.json``."""
    folder, stage = out / name, name.partition("-")[0]
    done = folder / "done.json"
    if done.is_file() and not options.again and json.loads(done.read_text())["quick"] == options.quick:
        print(f"\n== {name}: done before (--again does it again)", flush=True)
        return 0
    done.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    if stage == "greedy":
        command = ["-m", "benchmarks.real.greedy", str(out / "base"), str(folder / "answers.json")]
    else:
        command = ["-m", "alignment", stage, str(CONFIG / f"{stage}_argument.json"), *overrides(name, out, options)]
    print(f"\n== {name}: python {' '.join(command)}", flush=True)
    resumes = interrupted(folder, options)
    began = time.monotonic()
    status, usage = watched([sys.executable, *command])
    seconds = time.monotonic() - began
    if status:
        return status
    for checkpoint in folder.glob("checkpoint-*"):  # several GB that a finished run has no more use for
        shutil.rmtree(checkpoint)
    sources = {key: path.name if (path := getattr(options, key)) else "generated rows" for key in REAL_DATA}
    facts = {"seconds": round(seconds, 1), "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1)}
    facts |= {"peak_mib": round(usage.ru_maxrss / 1024), "quick": options.quick, "data": sources}
    facts["resumed"] = resumes  # then times and memory are those of the last part
    done.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return 0


def watched(command: list[str]) -> tuple[int, Any]:
    """Run a command to its end; returns its status and what it used (``resource.struct_rusage``)."""
    process = subprocess.Popen(command, cwd=REPO)
    while True:
        try:
            _, state, usage = os.wait4(process.pid, 0)
            break
        except KeyboardInterrupt:  # the child has it too; it saves and ends
            continue
    process.returncode = os.waitstatus_to_exitcode(state)
    return abs(process.returncode), usage


def interrupted(folder: Path, options: argparse.Namespace) -> bool:
    """Whether a stage's folder holds a run to go on with."""
    return not options.again and any(folder.glob("checkpoint-*"))


def overrides(name: str, out: Path, options: argparse.Namespace) -> list[str]:
    """What changes in a stage's JSON file: the folder, the seed, and whether an interrupted run goes on."""
    stage, _, seed = name.partition("-")
    values = json.loads((CONFIG / f"{stage}_argument.json").read_text(encoding="utf-8"))
    folder = out.resolve()
    changed = {
        key: value.replace(WRITTEN_IN, str(folder))
        for key, value in values.items()
        if isinstance(value, str) and WRITTEN_IN in value and out != Path(WRITTEN_IN)
    }
    if seed:
        changed |= {"output_dir": str(out / name), "seed": seed}
    resumes = interrupted(out / name, options)
    changed |= {"resume_from_checkpoint": "true"} if resumes else {"overwrite_output_dir": "true"}
    return [*(f"{key}={value}" for key, value in changed.items()), *(QUICK[stage] if options.quick else [])]


if __name__ == "__main__":
    sys.exit(run_main(main))
