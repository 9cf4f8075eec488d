"""The rooms of the package: who may import whom, and which room may touch what lies outside."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict

import pytest

from tests.conftest import REPO
from tests.setup.rooms import Tree

#: What the modules of a room may import besides their own room, low rooms first. ``base`` is errors, log, tally, paths,
#: runtime and frontpage; every room may import it.
PERMITTED: dict[str, str] = {
    "base": "",
    "cli": "ppo.models",
    "parallel": "",
    "kernels": "",
    "losses": "",
    "ppo.models": "parallel kernels",
    "ppo.data": "ppo.models",
    "plugins": "ppo.data",
    "arguments": "parallel losses ppo.data",
    "engine": "parallel kernels losses ppo.models",
    "rollout": "cli parallel kernels losses engine ppo.models ppo.data",
    "rollout.rewards": "plugins arguments ppo.models ppo.data rollout",
    "flow": "plugins arguments parallel losses engine ppo.models ppo.data rollout rollout.rewards",
    "rm.pairs": "arguments ppo.data",
    "methods": "rm.pairs cli plugins arguments parallel losses engine ppo.models ppo.data rollout rollout.rewards flow",
    "api": "arguments losses ppo.data rollout rollout.rewards flow methods",
    "sft": "cli arguments parallel losses engine ppo.models ppo.data flow methods",
    "rm": "rm.pairs cli arguments parallel losses engine ppo.models ppo.data flow methods",
    "ppo": "cli arguments parallel losses engine ppo.models ppo.data rollout rollout.rewards flow methods",
    "export": "cli ppo.models ppo.data flow",
    "plan": "cli arguments parallel ppo.models rollout flow methods",
    "demo": "cli parallel engine ppo.models ppo.data rollout",
}
#: Imports that the table does not want and that are still there. This list only shrinks: an entry that is no longer
#: needed fails the test.
DEBT: dict[str, str] = {}
#: The rooms that may import a library.
FOREIGN = {"paddlenlp": ("ppo.models", "engine"), "paddle.distributed": ("parallel", "engine")}


@pytest.fixture(scope="module")
def tree() -> Tree:
    return Tree.of(REPO)


def test_every_room_has_its_line(tree: Tree) -> None:
    assert {tree.room(module) for module in tree.files} <= set(PERMITTED)
    for room, others in PERMITTED.items():
        assert not set(others.split()) - set(PERMITTED), room


def test_rooms_import_what_the_table_permits(tree: Tree) -> None:
    wrong, needed = [], set()
    for module in tree.files:
        room = tree.room(module)
        for entry in tree.imports(module):
            if entry.target.split(".")[0] != "alignment" or tree.room(entry.target) in (room, "base"):
                continue
            if tree.room(entry.target) in PERMITTED[room].split():
                continue
            if DEBT.get(module) == entry.target:
                needed.add(module)
                continue
            wrong.append(f"{tree.files[module].relative_to(REPO)}:{entry.line} imports {entry.target}")
    assert not wrong, "a room imports one that PERMITTED does not name"
    assert needed == set(DEBT), "these are no debts any more: take them out of the list"


def test_the_table_has_no_circle() -> None:
    """Its lines can be put in an order in which each room imports earlier ones only."""
    done: set[str] = set()
    while len(done) < len(PERMITTED):
        ready = {room for room, others in PERMITTED.items() if room not in done and set(others.split()) <= done}
        assert ready, f"a circle among {sorted(set(PERMITTED) - done)}"
        done |= ready


def test_no_base_name_twice(tree: Tree) -> None:
    files = defaultdict(list)
    for file in tree.files.values():
        if not file.stem.startswith("__"):
            files[file.name].append(str(file.relative_to(REPO)))
    assert not [places for places in files.values() if len(places) > 1]


@pytest.mark.parametrize("library", FOREIGN)
def test_few_rooms_know_a_library(tree: Tree, library: str) -> None:
    found: Counter[str] = Counter()
    for module in tree.files:
        if tree.room(module) not in FOREIGN[library]:
            found[module] = sum(_within(entry.target, library) for entry in tree.imports(module))
            found[module] += sum(
                _within(ast.unparse(node), library)
                for node in ast.walk(tree.sources[module])
                if isinstance(node, ast.Attribute)
            )
    assert not +found, f"only {FOREIGN[library]} may use {library}"


def _within(name: str, library: str) -> bool:
    return name == library or name.startswith(f"{library}.")
