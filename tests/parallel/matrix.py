"""The equivalence of all layouts, as tables: ``make parallel``, and with every cell of every method ``make layouts``.

Every layout runs the same model, seed and global batches; the tables give the largest difference from one process over
all figures (losses, KL, rewards, gradient norms, evaluations) of all optimizer steps, relative to ``max(1, |figure|)``.
The stages and PPO are run on all layouts, the other methods on :data:`METHOD_LAYOUTS`.

    python -m tests.parallel.matrix [--every-cell] [--write docs/layouts.md] [--arch qwen2] [--method grpo]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.parallel.forked import RankError
from tests.parallel.layouts import (
    LAYOUTS,
    ROLLOUT_LAYOUTS,
    TOLERANCE,
    Difference,
    Layout,
    Trace,
    compare,
    make_files,
    one_batch,
    remove,
    run,
)
from tests.small_methods import METHODS

MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "llama": {"tie_word_embeddings": True, "layers": 5, "intermediate_size": 512},
}
STAGES = {"sft": "SFT", "rm": "reward model", "cost": "cost model", "ppo": "PPO"}
HEAD = f"| model | layout | processes | {' | '.join(STAGES.values())} | answers the same |\n|{'---|' * 8}\n"
#: Where the methods besides PPO are compared; without ``--every-cell`` only on a tensor and a pipeline layout.
METHOD_LAYOUTS = ("DP2", "sharding stage 3 x2", "TP2", "PP2", "TP2 x PP2")
FEW = ("TP2", "PP2")


def main(argv: list[str]) -> int:
    """Run the matrix and print it; returns 1 if a layout differs or fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="a Markdown file for the tables")
    parser.add_argument("--every-cell", action="store_true", help="all of the methods' layouts, not only two")
    parser.add_argument("--arch", choices=list(MODELS), action="append", help="only this one, and no methods")
    parser.add_argument("--method", choices=[*METHODS], action="append", help="only this one, and no stages")
    options = parser.parse_args(argv)
    began, table, failures = time.monotonic(), Table(), 0
    archs = options.arch or ([] if options.method else list(MODELS))
    others = [] if options.arch else options.method or [name for name in METHODS if name != "ppo"]
    layouts = METHOD_LAYOUTS if options.every_cell else FEW
    with tempfile.TemporaryDirectory() as folder:
        for arch in archs:
            failures += _stages(make_files(Path(folder) / arch, arch, **MODELS[arch]), arch, table)
        files = make_files(Path(folder) / "methods") if others else Path()
        for name in others:
            failures += _method(files, name, layouts, table)
    seconds = time.monotonic() - began
    print(f"\n{table.text()}\n{failures} cells differ by more than {TOLERANCE:g} or failed; {seconds:.0f} s")
    if options.write:
        options.write.write_text(_page(table), encoding="utf-8")
    print(json.dumps({"benchmark": "layouts", "cells": table.cells, "failures": failures, "seconds": round(seconds)}))
    return 1 if failures else 0


@dataclass
class Table:
    """What was found.

    Attributes:
        stages, methods: lines of the two tables.
        cells: runs that were compared.
    """

    stages: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    cells: int = 0

    def text(self) -> str:
        """Both tables."""
        heads = (HEAD, f"| method | {' | '.join(METHOD_LAYOUTS)} | answers the same | seconds |\n|{'---|' * 8}\n")
        parts = zip(heads, (self.stages, self.methods), strict=True)
        return "\n".join(head + "\n".join(lines) + "\n" for head, lines in parts if lines)


def _stages(files: Path, arch: str, table: Table) -> int:
    """All stages and PPO on all layouts."""
    failures = 0
    single = {stage: run(files, stage, Layout()) for stage in STAGES}
    wanted = [(name, layout, tuple(STAGES)) for name, layout in LAYOUTS.items() if layout.processes > 1]
    wanted += [(name, layout, ("ppo",)) for name, layout in ROLLOUT_LAYOUTS.items()]
    for name, layout, stages in wanted:
        cells, same = dict.fromkeys(STAGES, ""), ""
        for stage in stages:
            difference = _measured(single[stage], files, stage, layout)
            cells[stage] = _cell(difference)
            failures += difference is None or not difference.agrees
            if stage == "ppo" and difference is not None:
                same = f"{difference.answers} of {difference.answers}" if difference.same_answers else "no"
        table.cells += len(stages)
        table.stages.append(f"| {arch} | {name} | {layout.processes} | {' | '.join(cells.values())} | {same} |")
        print(table.stages[-1], flush=True)
    padded = run(files, "sft", Layout(), one_batch(files))
    for name in ("1 process", "TP2 x PP2"):
        difference = _measured(padded, files, "sft", LAYOUTS[name], one_batch(files, packed=True))
        failures += difference is None or not difference.agrees
        table.cells += 1
        processes = LAYOUTS[name].processes
        table.stages.append(f"| {arch} | {name}, zero_padding | {processes} | {_cell(difference)} | | | | |")
        print(table.stages[-1], flush=True)
    return failures


def _method(files: Path, method: str, layouts: Sequence[str], table: Table) -> int:
    """A method on some layouts: a line."""
    failures, cells, same, began = 0, dict.fromkeys(METHOD_LAYOUTS, ""), [], time.monotonic()
    single = run(files, method, Layout())
    for name in layouts:
        difference = _measured(single, files, method, LAYOUTS[name])
        cells[name] = _cell(difference)
        failures += difference is None or not difference.agrees
        same.append(difference is not None and difference.same_answers)
        table.cells += 1
    answers = f"{len(single.answers)} of {len(single.answers)}" if all(same) else "no"
    seconds = (time.monotonic() - began) / (1 + len(layouts))
    table.methods.append(f"| {method} | {' | '.join(cells.values())} | {answers} | {seconds:.1f} |")
    print(table.methods[-1], flush=True)
    return failures


def _measured(single: Trace, files: Path, stage: str, layout: Layout, extra: Sequence[str] = ()) -> Difference | None:
    try:
        trace = run(files, stage, layout, extra, timeout=240.0)
    except RankError as error:
        print(f"{stage} on {layout} failed:\n{error}", file=sys.stderr)
        return None
    difference = compare(single, trace)
    remove(trace)
    return difference


def _cell(difference: Difference | None) -> str:
    if difference is None:
        return "FAILED"
    return f"{difference.worst[0]:.1e}" + ("" if difference.agrees else f" ({difference.worst[1]})")


def _page(table: Table) -> str:
    return (
        "# The same run on every layout\n\n"
        "Written by `make layouts`. Each line is one layout on CPU processes against one process: the same random "
        "model (qwen2: four layers; llama: five, its embedding tied), seed and global batches of eight rows, six "
        "optimizer steps; the last batch has one row. The figures are the largest difference of any loss, KL, reward, "
        "gradient norm or evaluation at any step, divided by max(1, |figure|). The last column counts the sampled and "
        "greedy answers of all rollouts and evaluations that were compared word for word. Below, the methods besides "
        "PPO on the qwen2 model, with the seconds of a run; `make parallel` runs their tensor and their pipeline "
        "cell.\n\n" + table.text()
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
