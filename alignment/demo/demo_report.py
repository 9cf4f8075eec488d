"""What the demo shows at its end: a table before and after, sample answers, curves, and all figures as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignment.demo.measure import Answers

STAGES = ("base", "sft", "ppo")
TITLES = {"base": "untrained", "sft": "after SFT", "ppo": "after PPO"}
CURVES = (
    ("train/reward/model", "reward (reward model)"),
    ("train/reward/gold", "gold score (no model sees it)"),
    ("train/kl_divergence", "KL to the SFT model, nats per answer"),
    ("train/mean_generated_length", "answer length, tokens"),
)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def last_value(folder: Path, name: str) -> float | None:
    """The newest value of a metric, or None where the run never had it."""
    values = [row[name] for row in read_rows(folder) if row.get(name) is not None]
    return float(values[-1]) if values else None


def draw_curves(ppo: Path, target: Path) -> None:
    """Draw reward, gold score, KL and length over PPO's optimizer steps into a PNG.

    Args:
        ppo: the PPO run's folder.
        target: the file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_rows(ppo)
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6.5), constrained_layout=True)
    for axis, (name, title) in zip(axes.flat, CURVES, strict=True):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        axis.plot([step for step, _ in points], [value for _, value in points], linewidth=1.5)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimizer step", fontsize=9)
        axis.grid(alpha=0.3)
    figure.suptitle("PPO on the demo task, sampled answers to training prompts", fontsize=11)
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


def figures_table(judged: Mapping[str, Mapping[str, Answers]]) -> str:
    """Each stage's means over the held-out prompts, as text."""
    from rich.table import Table

    table = Table(title="answers to held-out prompts", title_justify="left")
    for name in ("model", "answers", "gold score", "perfect", "reward", "KL to SFT", "tokens"):
        table.add_column(name, justify="left" if name in ("model", "answers") else "right")
    for stage in STAGES:
        for mode, answers in judged.get(stage, {}).items():
            means = answers.summary()
            cells = [
                f"{means[name]:{form}}" if name in means else "-"
                for name, form in (
                    ("gold", ".3f"),
                    ("perfect", ".0%"),
                    ("reward", ".2f"),
                    ("kl", ".2f"),
                    ("tokens", ".1f"),
                )
            ]
            table.add_row(TITLES[stage], mode, *cells)
    return _text(table)


def samples_table(
    rows: Sequence[Mapping[str, Any]], judged: Mapping[str, Mapping[str, Answers]], count: int = 3
) -> str:
    """The first prompts with each stage's greedy answer and its gold score, as text."""
    from rich.table import Table

    table = Table(title="greedy answers", title_justify="left", show_lines=True)
    table.add_column("prompt", ratio=4)
    stages = [stage for stage in STAGES if stage in judged]
    for stage in stages:
        table.add_column(TITLES[stage], ratio=3, overflow="fold")
    for i, row in enumerate(rows[:count]):
        cells = []
        for stage in stages:
            answers = judged[stage]["greedy"]
            text = answers.texts[i].strip()
            cells.append(f"{text if len(text) <= 120 else text[:117] + '...'}\n[{answers.gold[i]:.2f}]")
        table.add_row(str(row["prompt"]), *cells)
    return _text(table)


def _text(table: Any) -> str:
    from rich.console import Console

    console = Console(width=140, no_color=True, highlight=False, markup=False)
    with console.capture() as capture:
        console.print(table, markup=False)
    return capture.get()
