"""``alignment demo``: make a tiny model and its data, train it through all three stages, and show what it learnt.

The stages are started as a user starts them: the runners' ``main`` with the JSON files of ``config/`` beside this file
and overrides for the folder and the seed.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignment.cli import CommandParser
from alignment.errors import AlignmentError

CONFIG = Path(__file__).resolve().parent / "config"
WRITTEN_IN = "checkpoints/demo"  # the folder that the JSON files name
RUNNERS = {
    "sft": ("alignment.sft.run_sft", "supervised fine-tuning on answers of people in a hurry"),
    "rm": ("alignment.rm.run_reward", "reward model on pairs of answers"),
    "ppo": ("alignment.ppo.run_ppo", "PPO against the reward model"),
}
QUICK = {
    "sft": ["max_steps=12", "evaluation_strategy=no", "do_eval=false"],
    "rm": ["max_steps=8"],
    "ppo": ["max_steps=2", "per_device_prompt_batch_size=16", "per_device_train_batch_size=16", "eval_num_samples=8"],
}


def main(argv: list[str]) -> int:
    """Run the demo; returns the exit status of the first stage that fails, or 0.

    Raises:
        AlignmentError: an option or the folder cannot be used.
    """
    parser = CommandParser(prog="alignment demo", description=__doc__, allow_abbrev=False)
    parser.add_argument("--output_dir", default=WRITTEN_IN, metavar="DIR", help=f"where all files go ({WRITTEN_IN})")
    parser.add_argument("--seed", type=int, default=1, help="of data, model and training (1)")
    parser.add_argument("--prepare_only", action="store_true", help="make the model and the data, then stop")
    parser.add_argument("--quick", action="store_true", help="a few steps of each stage, to see that everything runs")
    options = parser.parse_args(argv)
    out = Path(options.output_dir)
    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable[[], Any]) -> Any:
        began = time.monotonic()
        result = function()
        seconds[name] = round(time.monotonic() - began, 1)
        return result

    parameters = timed("prepare", lambda: prepare(out, options.seed, options.quick))
    _say(f"a Qwen2 of {parameters:,} parameters is in {out / 'base'}, the data in {out / 'data'}")
    if options.prepare_only:
        return 0
    for number, (stage, (module, what)) in enumerate(RUNNERS.items(), 1):
        _say(f"stage {number} of 3: {what}")
        arguments = [str(CONFIG / f"{stage}_argument.json"), *overrides(stage, out, options.seed, options.quick)]
        _say(f"alignment {stage} {' '.join(arguments)}")
        runner = importlib.import_module(module)
        status = timed(stage, lambda runner=runner, arguments=arguments: runner.main(arguments))
        if status:
            return status
    timed("measure", lambda: report(out, options.seed, seconds))
    _say(
        f"{sum(seconds.values()):.0f} s in all: "
        + ", ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items())
    )
    return 0


def prepare(out: Path, seed: int, quick: bool = False) -> int:
    """Write the model, its tokenizer and the data files; returns the model's number of parameters.

    Raises:
        AlignmentError: the folder cannot be written.
    """
    from alignment.demo.task import Sizes, make_data
    from alignment.demo.tiny_model import write_model

    sizes = Sizes(400, 40, 300, 60, 64, 20) if quick else Sizes()
    try:
        (out / "data").mkdir(parents=True, exist_ok=True)
        for name, rows in make_data(seed, sizes).items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (out / "data" / f"{name}.jsonl").write_text(text, encoding="utf-8")
        return write_model(out / "base", seed)
    except OSError as error:
        raise AlignmentError(f"--output_dir: cannot write {out}: {error.strerror or error}") from error


def overrides(stage: str, out: Path, seed: int, quick: bool = False) -> list[str]:
    """What the demo changes in a stage's JSON file: the folder, the seed, and that earlier runs are overwritten."""
    values = json.loads((CONFIG / f"{stage}_argument.json").read_text(encoding="utf-8"))
    changed = [
        f"{key}={value.replace(WRITTEN_IN, str(out))}"
        for key, value in values.items()
        if isinstance(value, str) and WRITTEN_IN in value and str(out) != WRITTEN_IN
    ]
    return [*changed, f"seed={seed}", "overwrite_output_dir=true", *(QUICK[stage] if quick else [])]


def report(out: Path, seed: int, seconds: dict[str, float]) -> None:
    """Judge every stage's model on the held-out prompts; print tables, write ``results.json`` and ``curves.png``."""
    from alignment.demo import demo_report as shown
    from alignment.demo.measure import Judges

    rows = [json.loads(line) for line in (out / "data" / "prompts_dev.jsonl").read_text(encoding="utf-8").splitlines()]
    judges = Judges(rows, seed, out / "rm", out / "sft")
    folders = {"base": out / "base", "sft": out / "sft", "ppo": out / "ppo" / "policy"}
    judged = {stage: judges.judge(folder) for stage, folder in folders.items()}
    accuracy = shown.last_value(out / "rm", "eval/accuracy")
    shown.draw_curves(out / "ppo", out / "curves.png")
    results = {
        "seed": seed,
        "reward_model_accuracy": accuracy,
        "seconds": seconds,
        **{stage: {mode: answers.summary() for mode, answers in modes.items()} for stage, modes in judged.items()},
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\n{shown.samples_table(rows, judged)}\n{shown.figures_table(judged)}")
    gain = results["ppo"]["greedy"]["gold"] - results["sft"]["greedy"]["gold"]
    if accuracy is not None:
        print(f"reward model: {accuracy:.1%} of {len(_lines(out, 'preferences_dev'))} held-out pairs right")
    print(f"gold score of greedy answers: {gain:+.3f} from SFT to PPO")
    print(f"models: {out / 'sft'}, {out / 'rm'}, {out / 'ppo' / 'policy'}; curves: {out / 'curves.png'}")
    print(f"figures: {out / 'results.json'}; try: alignment generate --model {out / 'ppo' / 'policy'} --greedy")


def _lines(out: Path, name: str) -> list[str]:
    return (out / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)
