"""The package in figures: ``python -m tests.setup.count [CHECKOUT ...]``, folders with ``alignment`` in them."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from tests.setup.rooms import Tree

RUNNERS = {"SFT": "alignment.sft.run_sft", "reward model": "alignment.rm.run_reward", "PPO": "alignment.ppo.run_ppo"}


def figures(repo: Path) -> dict[str, int]:
    """Files that each runner reaches by imports of ours, public names, and lines by room, in order."""
    tree = Tree.of(repo)
    lines: Counter[str] = Counter()
    for module, file in tree.files.items():
        lines[tree.room(module)] += len(file.read_text(encoding="utf-8").splitlines())
    found = {f"files that {name} reaches": len(tree.reachable(start)) for name, start in RUNNERS.items()}
    found["files"] = len(tree.files)
    found["public names"] = sum(len(tree.public_names(module)) for module in tree.files)
    found["lines"] = lines.total()
    return found | {f"lines of {room}": lines[room] for room in sorted(lines)}


def main(folders: list[str]) -> None:
    """Print a table with a column for each checkout."""
    columns = [figures(Path(folder)) for folder in folders or ["."]]
    for name in dict.fromkeys(name for column in columns for name in column):
        print(f"{name:<34}", *(f"{column.get(name, 0):>8,}" for column in columns))


if __name__ == "__main__":
    main(sys.argv[1:])
