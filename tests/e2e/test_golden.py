"""PPO's numbers stay what they were: golden runs against stored figures (tests/e2e/golden.py makes both)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e import golden
from tests.e2e.golden import Record


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Record]:
    """Makes a run, once."""
    folder: Path = tmp_path_factory.mktemp("golden")
    files, kept = golden.make_files(folder / "files"), {}

    def make(name: str) -> Record:
        if name not in kept:
            kept[name] = golden.run(name, files, folder / name)
        return kept[name]

    return make


@pytest.mark.parametrize("name", ["one", pytest.param("tp2pp2", marks=pytest.mark.slow)])
def test_figures_are_the_stored_ones(name: str, made: Callable[[str], Record]) -> None:
    stored = golden.stored_rows()[name]
    assert golden.first_difference(stored, made(name).rows, golden.TOLERANCE) is None


@pytest.mark.parametrize("name", ["resumed", "offloaded"])
def test_resumed_and_offloaded_runs_have_the_same_bits(name: str, made: Callable[[str], Record]) -> None:
    """Resumed in the middle of an update, or offloaded: figures are the stored ones too, and bits those of ``one``."""
    one, other = made("one"), made(name)
    rows, stored = one.rows, golden.stored_rows()["one"]
    if name == "resumed":
        rows, stored = golden.behind(rows), golden.behind(stored)
    assert golden.first_difference(stored, other.rows, golden.TOLERANCE) is None
    assert golden.first_difference(rows, other.rows) is None
    assert golden.first_other_tensor(one.weights, other.weights) is None


def test_the_runs_are_worth_comparing() -> None:
    """Every part of PPO that they are meant to cover moves some figure."""
    for name in golden.STORED:
        rows = golden.stored_rows()[name]
        steps = [row for row in rows if "train/actor_loss" in row]
        assert [row["step"] for row in steps] == list(range(1, 9))
        assert len({row["train/reward"] for row in steps}) == 3, "three rollouts"
        assert len({row["train/kl_coeff"] for row in steps}) > 1, "the adaptive KL controller"
        assert all(row["train/ptx_loss"] > 0 and row["train/reward_critic_loss"] > 0 for row in steps)
        assert all(0 < row["train/truncation_rate"] < 1 for row in steps), "some answers end, others are cut"
        assert any(row["train/kl_divergence"] for row in steps) and any(row["train/clip_fraction"] for row in steps)
        assert [row["step"] for row in rows if "eval/reward" in row] == [0, 4, 8]


def test_a_difference_is_told_by_step_and_key() -> None:
    one = [{"step": 1, "a": 1.0, "b": float("nan")}, {"step": 2, "a": 3.0}]
    assert golden.first_difference(one, [{**row, "new": 1} for row in one]) is None
    assert golden.first_difference(one, [one[0], {"step": 2, "a": 3.000001}], golden.TOLERANCE) is None
    assert golden.first_difference(one, [one[0], {"step": 2, "a": 3.000001}]) == (2, "a", 3.0, 3.000001)
    assert golden.first_difference(one, [one[0], {"step": 2}], golden.TOLERANCE) == (2, "a", 3.0, "missing")
    assert golden.first_difference(one, one[:1]) == (2, "rows", 2, 1)
    assert golden.first_other_tensor({"policy/w": "x"}, {"policy/w": "y"}) == (-1, "policy/w", "x", "y")
