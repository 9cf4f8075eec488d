"""What ``make real`` shows at its end: tables, answers before and after, curves, and all figures as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.run import cpu_name

#: The stages that train on the sums, once for every seed.
METHODS = ("ppo", "grpo")
CURVES = (
    ("eval/reward_greedy", "right sums of held-out ones, greedy"),
    ("eval/reward", "right sums of held-out ones, sampled"),
    ("train/reward", "right sums in training, sampled"),
    ("train/mean_generated_length", "answer length, tokens"),
    ("train/entropy", "entropy, nats per token"),
    ("train/kl_divergence", "KL to the model as it came, nats per answer"),
    ("train/explained_variance", "explained variance of the critic"),
    ("train/groups_without_spread", "prompts whose answers all score alike"),
)


def collect(out: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """All figures of the stages that are done.

    Args:
        out: the folder with one folder per stage.
        seeds: of PPO and GRPO.
    """
    results: dict[str, Any] = {}
    for name in ("greedy", "sft", "rm", *(f"{method}-{seed}" for method in METHODS for seed in seeds)):
        folder = out / name
        if not (folder / "done.json").is_file():
            continue
        facts = json.loads((folder / "done.json").read_text(encoding="utf-8"))
        if name == "greedy":
            results[name] = facts | json.loads((folder / "answers.json").read_text(encoding="utf-8"))
        else:
            read = {"sft": _sft, "rm": _reward_model}.get(name, _online)
            results[name] = facts | read(_rows(folder))
    return results


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _evaluations(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """The ``eval/`` metrics of the first and of the last evaluation."""
    found = [{k[len("eval/") :]: v for k, v in row.items() if k.startswith("eval/")} for row in rows]
    found = [metrics for metrics in found if metrics]
    return found[0], found[-1]


def _sft(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    before, after = _evaluations(rows)
    return {key: {"before": before[key], "after": after[key]} for key in ("loss", "perplexity")}


def _reward_model(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    before, after = _evaluations(rows)
    both = {key: {"before": before[key], "after": after[key]} for key in ("accuracy", "loss", "calibration_error")}
    return both | {"calibration": {key: after[key] for key in sorted(after) if key.startswith("calibration/")}}


def _online(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    before, after = _evaluations(rows)
    names = {"greedy": "reward_greedy", "sampled": "reward", "tokens": "mean_generated_length"}
    figures: dict[str, Any] = {
        name: {"before": before[key], "after": after[key]} for name, key in names.items() if key in before
    }
    trained = [row for row in rows if "train/reward" in row]
    last = [row["train/kl_divergence"] for row in trained[-3:] if "train/kl_divergence" in row]
    if last:  # GRPO has no reference here
        figures["kl"] = sum(last) / len(last)
    figures["optimizer_steps"] = trained[-1]["step"]
    phases = {key[len("time/") : -len("_seconds")] for row in trained for key in row if key.startswith("time/")}
    seconds = {name: sum(row.get(f"time/{name}_seconds", 0.0) for row in trained) for name in sorted(phases)}
    figures["seconds_of_phases"] = {name: round(value, 1) for name, value in seconds.items()}
    return figures


def answers(folder: Path, count: int = 6) -> list[tuple[str, str, str, float, float]]:
    """Held-out prompts with the greedy answers and rewards before and after a run."""
    lines = (folder / "eval_samples.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if record["mode"] == "greedy"]
    first, last = min(r["step"] for r in records), max(r["step"] for r in records)
    after = {r["index"]: r for r in records if r["step"] == last}
    return [
        (r["prompt"], r["response"], after[r["index"]]["response"], r["score"], after[r["index"]]["score"])
        for r in records
        if r["step"] == first
    ][:count]


def draw_curves(methods: Mapping[str, Sequence[Path]], target: Path) -> None:
    """Draw the curves of each method's runs into a PNG, a colour a method: the mean over the seeds, and a band from the
    lowest to the highest of them. A curve that no method has is left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = {method: [_rows(folder) for folder in folders] for method, folders in methods.items()}
    colours = {method: f"C{i}" for i, method in enumerate(METHODS)}
    shown = [c for c in CURVES if any(c[0] in row for each in runs.values() for rows in each for row in rows)]
    figure, axes = pyplot.subplots(2, (len(shown) + 1) // 2, figsize=(16, 6.5), constrained_layout=True)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, (name, title) in zip(axes.flat, shown, strict=False):
        for method, seeds in runs.items():
            points = [{row["step"]: row[name] for row in rows if row.get(name) is not None} for rows in seeds]
            steps = sorted(set.intersection(*map(set, points)))
            if not steps:
                continue
            values = [[run[step] for run in points] for step in steps]
            means = [sum(each) / len(each) for each in values]
            axis.plot(steps, means, linewidth=1.5, color=colours[method], label=method.upper())
            lowest, highest = [min(each) for each in values], [max(each) for each in values]
            axis.fill_between(steps, lowest, highest, alpha=0.25, color=colours[method])
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimizer step", fontsize=9)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    counts = ", ".join(f"{method.upper()}: {len(each)} seed{'s' * (len(each) > 1)}" for method, each in runs.items())
    figure.suptitle(f"sums, SmolLM2-135M-Instruct ({counts})", fontsize=11)
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


def figures_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """What each stage gained, its time and its memory, as text."""
    from rich.table import Table

    table = Table(title="SmolLM2-135M-Instruct", title_justify="left")
    for name in ("stage", "figure", "before", "after", "time", "CPU time", "peak memory"):
        table.add_column(name, justify="left" if name in ("stage", "figure") else "right")
    for stage, facts in results.items():
        cpu = f"{facts['cpu_seconds']:.0f} s" if "cpu_seconds" in facts else ""  # earlier releases did not note it
        cost = (f"{facts['seconds']:.0f} s", cpu, f"{facts['peak_mib'] / 1024:.1f} GiB")
        for i, (figure, before, after) in enumerate(_figures(stage, facts)):
            table.add_row(stage if i == 0 else "", figure, before, after, *(cost if i == 0 else ("", "", "")))
    return _text(table)


def _figures(stage: str, facts: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Lines of one stage: what, before, after."""
    if stage == "greedy":
        equal = f"{facts['equal'] + facts['ties']} of {facts['prompts']}"
        return [(f"answers equal to transformers', {facts['tokens']} tokens", "", equal)]
    kind = {"sft": "gsm8k", "rm": "hh"}.get(stage)
    source = f" ({facts['data'][kind]})" if kind else ""
    shown = {
        "loss": f"held-out loss{source}",
        "perplexity": "held-out perplexity",
        "accuracy": f"held-out pairs right{source}",
        "calibration_error": "calibration error",
        "greedy": "held-out sums right, greedy",
        "sampled": "held-out sums right, sampled",
        "tokens": "tokens of a sampled answer",
    }
    lines = [
        (title, f"{facts[key]['before']:.3f}", f"{facts[key]['after']:.3f}")
        for key, title in shown.items()
        if key in facts and not (stage == "rm" and key == "loss")
    ]
    if "kl" in facts:
        lines.append(("KL to the model as it came, nats per answer", "0", f"{facts['kl']:.2f}"))
    return lines


def answers_table(name: str, rows: Sequence[tuple[str, str, str, float, float]]) -> str:
    """Greedy answers to held-out prompts before and after a run, as text."""
    from rich.table import Table

    table = Table(title=f"{name}: greedy answers to held-out sums", title_justify="left")
    for name in ("prompt", "before", "after"):
        table.add_column(name, overflow="fold")
    for prompt, before, after, *scores in rows:
        marks = ["right" if score == 1 else "wrong" for score in scores]
        cells = [f"{' '.join(text.split())} [{mark}]" for text, mark in zip((before, after), marks, strict=True)]
        table.add_row(prompt, *cells)
    return _text(table)


def show(out: Path, seeds: Sequence[int]) -> None:
    """Print the tables and write ``results.json`` and, where PPO or GRPO has run, ``curves.png``."""
    results = collect(out, seeds)
    seconds = sum(facts["seconds"] for facts in results.values())
    peak = max((facts["peak_mib"] for facts in results.values()), default=0)
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS", "all cores")}
    figures = {"machine": machine, "seconds": seconds, "peak_mib": peak, "stages": results}
    (out / "results.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    runs = {method: [out / name for name in results if name.startswith(f"{method}-")] for method in METHODS}
    runs = {method: folders for method, folders in runs.items() if folders}
    if runs:
        draw_curves(runs, out / "curves.png")
    for first, *_ in runs.values():
        print(f"\n{answers_table(first.name, answers(first))}")
    print(f"\n{figures_table(results)}")
    print(
        f"{seconds / 60:.0f} minutes and {peak / 1024:.1f} GiB at the peak, {machine['cores']} cores, {machine['cpu']}"
    )
    for stage, facts in results.items():
        for difference in facts.get("different", []):
            print(f"{stage}: differs from transformers': {difference}")
        if facts["resumed"]:
            print(f"{stage}: was interrupted, so time and memory are those of its last part")
        if facts["quick"]:
            print(f"{stage}: a quick run of a few steps, so its figures say nothing")
    print(f"figures: {out / 'results.json'}" + (f"; curves: {out / 'curves.png'}" if runs else ""))


def _text(table: Any) -> str:
    from rich.console import Console

    console = Console(width=130, no_color=True, highlight=False, markup=False)
    with console.capture() as capture:
        console.print(table, markup=False)
    return capture.get()
