"""The equivalence of all layouts, as a table: ``make parallel``.

Every layout runs the same model, seed and global batches; the table gives the largest difference from one process over
all figures (losses, KL, rewards, gradient norms, evaluations) of all optimizer steps, relative to ``max(1, |figure|)``.

    python -m tests.parallel.matrix [--write docs/layouts.md] [--arch qwen2]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
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

MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "llama": {"tie_word_embeddings": True, "layers": 5, "intermediate_size": 512},
}
HEAD = "| model | layout | processes | SFT | reward model | PPO | answers the same |\n|---|---|---|---|---|---|---|\n"


def main(argv: list[str]) -> int:
    """Run the matrix and print it; returns 1 if a layout differs or fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="a Markdown file for the table")
    parser.add_argument("--arch", choices=list(MODELS), action="append", help="only this one")
    options = parser.parse_args(argv)
    began, lines, failures = time.monotonic(), [], 0
    with tempfile.TemporaryDirectory() as folder:
        for arch in options.arch or MODELS:
            files = make_files(Path(folder) / arch, arch, **MODELS[arch])
            failures += _one_model(files, arch, lines)
    table = HEAD + "\n".join(lines) + "\n"
    print(f"\n{table}\n{failures} of {len(lines)} lines differ by more than {TOLERANCE:g} or failed; "
          f"{time.monotonic() - began:.0f} s")  # fmt: skip
    if options.write:
        options.write.write_text(_page(table), encoding="utf-8")
    print(json.dumps({"benchmark": "layouts", "lines": len(lines), "failures": failures}))
    return 1 if failures else 0


def _one_model(files: Path, arch: str, lines: list[str]) -> int:
    failures = 0
    single = {stage: run(files, stage, Layout()) for stage in ("sft", "rm", "ppo")}
    wanted = [(name, layout, ("sft", "rm", "ppo")) for name, layout in LAYOUTS.items() if layout.processes > 1]
    wanted += [(name, layout, ("ppo",)) for name, layout in ROLLOUT_LAYOUTS.items()]
    for name, layout, stages in wanted:
        cells, same = dict.fromkeys(("sft", "rm", "ppo"), ""), ""
        for stage in stages:
            difference = _measured(single[stage], files, stage, layout)
            cells[stage] = _cell(difference)
            failures += difference is None or not difference.agrees
            if stage == "ppo" and difference is not None:
                same = f"{difference.answers} of {difference.answers}" if difference.same_answers else "no"
        lines.append(f"| {arch} | {name} | {layout.processes} | {' | '.join(cells.values())} | {same} |")
        print(lines[-1], flush=True)
    padded = run(files, "sft", Layout(), one_batch(files))
    for name in ("1 process", "TP2 x PP2"):
        difference = _measured(padded, files, "sft", LAYOUTS[name], one_batch(files, packed=True))
        failures += difference is None or not difference.agrees
        lines.append(f"| {arch} | {name}, zero_padding | {LAYOUTS[name].processes} | {_cell(difference)} | | | |")
        print(lines[-1], flush=True)
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


def _page(table: str) -> str:
    return (
        "# The same run on every layout\n\n"
        "Written by `make parallel`. Each line is one layout on CPU processes against one process: the same random "
        "model (qwen2: four layers; llama: five, its embedding tied), seed and global batches of eight rows, six "
        "optimizer steps; the last batch has one row. The figures are the largest difference of any loss, KL, reward, "
        "gradient norm or evaluation at any step, divided by max(1, |figure|). The last column counts the sampled and "
        "greedy answers of all rollouts and evaluations that were compared word for word.\n\n" + table
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
