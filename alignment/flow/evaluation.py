"""Evaluation: the same held-out prompts each time, answered greedily and by sampling with the same random numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alignment.flow.checkpoint import disk_errors
from alignment.flow.order import rank_slice
from alignment.flow.statistics import Statistics

if TYPE_CHECKING:
    from alignment.parallel import World
    from alignment.rollout.generate import GenerationPrompt
    from alignment.rollout.rewards import RewardResult
    from alignment.rollout.rollout import Rollout
    from alignment.rollout.sampler import SamplingSettings

SAMPLES_FILE = "eval_samples.jsonl"


class Evaluator:
    """Answers and scores the evaluation prompts.

    Args:
        prompts: all evaluation prompts; each rank answers its share.
        generate: answers prompts with the actor.
        modes: settings by the mode's name, ``"sampled"`` and ``"greedy"``; the seed is the evaluation's own, so that
            the draws are the same each time.
        scores: give a rollout's scores, by what they are; the first is ``"reward"``.
        world: the data ranks.
        output_dir: where ``eval_samples.jsonl`` grows.
        table_rows: how many samples the table on the screen shows.
        write: prints without tearing the progress bar.
    """

    def __init__(
        self,
        prompts: Sequence[GenerationPrompt],
        generate: Callable[[Sequence[GenerationPrompt], SamplingSettings], Rollout],
        modes: Mapping[str, SamplingSettings],
        scores: Mapping[str, Callable[[Rollout], RewardResult]],
        world: World,
        output_dir: str,
        table_rows: int,
        write: Callable[[str], None],
    ) -> None:
        self.prompts, self.generate, self.modes, self.scores = list(prompts), generate, dict(modes), dict(scores)
        self.world, self.path, self.table_rows, self.write = world, Path(output_dir) / SAMPLES_FILE, table_rows, write

    def run(self, step: int) -> dict[str, float]:
        """Evaluate.

        Args:
            step: optimizer steps so far, for the file and the table.

        Returns:
            ``eval/reward`` (sampled), ``eval/reward_greedy`` and likewise other scores, lengths and truncation rates,
            each source's score where there are several.
        """
        statistics, table = Statistics(), []
        for mode, settings in self.modes.items():
            records = self._answers(mode, settings, step)
            table.extend(records[: self.table_rows])
            self._count(mode, records, statistics)
            if self.world.is_main:
                write_samples(self.path, records)
        if self.world.is_main and table:
            self.write(sample_table(table, step, [_keys(name)[0] for name in self.scores]))
        return statistics.result()

    def drop_after(self, step: int) -> None:
        """Remove the samples of later steps than ``step`` from the file: a resumed run writes them again."""
        if self.world.is_main:
            drop_samples_after(self.path, step)

    def _answers(self, mode: str, settings: SamplingSettings, step: int) -> list[dict[str, Any]]:
        share = rank_slice(np.arange(len(self.prompts)), self.world.rank, self.world.size)
        mine: list[dict[str, Any]] = []
        if len(share):
            rollout = self.generate([self.prompts[i] for i in share], settings)
            results = {name: score(rollout) for name, score in self.scores.items()}
            for i in range(len(rollout)):
                mine.append(
                    {
                        "step": step,
                        "mode": mode,
                        "index": int(rollout.prompt_index[i]),
                        "prompt": rollout.prompts[i],
                        "response": rollout.responses[i],
                        **{key: value for name, result in results.items() for key, value in _scores(name, result, i)},
                        "response_len": int(rollout.chosen_len[i]),
                        "finished": bool(rollout.finished[i]),
                    }
                )
        return [record for part in self.world.all_gather_object(mine) for record in part]

    def _count(self, mode: str, records: list[dict[str, Any]], statistics: Statistics) -> None:
        suffix = "" if mode == "sampled" else "_greedy"
        for record in records:
            statistics.add(f"eval/mean_generated_length{suffix}", record["response_len"], 1)
            statistics.add(f"eval/truncation_rate{suffix}", not record["finished"], 1)
            for name in self.scores:
                total, parts = _keys(name)
                statistics.add(f"eval/{name}{suffix}", record[total], 1)
                if len(record[parts]) > 1:
                    for source, score in record[parts].items():
                        if score == score:  # else the source does not apply to this answer
                            statistics.add(f"eval/{name}{suffix}/{source}", score, 1)


def _keys(name: str) -> tuple[str, str]:
    """What a sample calls a score and those of its sources: a reward is its ``score``."""
    return ("score", "scores") if name == "reward" else (name, f"{name}s")


def _scores(name: str, result: RewardResult, index: int) -> list[tuple[str, Any]]:
    """The entries of a sample for a score."""
    total, parts = _keys(name)
    return [(total, float(result.total[index])), (parts, {n: float(part[index]) for n, part in result.parts.items()})]


def write_samples(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Add records of an evaluation to a file, one JSON object a line."""
    with disk_errors(path), open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def drop_samples_after(path: Path, step: int) -> None:
    """Remove the records of later steps than ``step``, and a last line that was cut."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    with disk_errors(path):
        path.write_text("".join(kept), encoding="utf-8")


def sample_table(records: Sequence[dict[str, Any]], step: int, scores: Sequence[str] = ("score",)) -> str:
    """A table of prompts, answers and scores (their keys), as text."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"evaluation samples at step {step}", box=SIMPLE, title_justify="left")
    for name, ratio in (("prompt", 4), ("answer", 5)):
        table.add_column(name, ratio=ratio, overflow="fold")
    table.add_column("mode")
    for name in scores:
        table.add_column(name, justify="right")
    for record in records:
        numbers = [f"{record[name]:.3f}" for name in scores]
        table.add_row(_short(record["prompt"], 160), _short(record["response"], 240), record["mode"], *numbers)
    console = Console(width=120, no_color=True, highlight=False, markup=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def _short(text: str, limit: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 3] + "..."
