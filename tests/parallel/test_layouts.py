"""One run on several layouts: the same losses, rewards, gradient norms, evaluations, and the same answers.

The whole matrix is ``make parallel``; here are the layouts of two processes and the one of four.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from tests.parallel.layouts import LAYOUTS, ROLLOUT_LAYOUTS, Layout, Trace, compare, make_files, run


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data."""
    return make_files(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def llama_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a Llama whose embedding is tied."""
    return make_files(tmp_path_factory.mktemp("layouts"), "llama", tie_word_embeddings=True)


@cache
def single(files: Path, stage: str) -> Trace:
    """The run of one process."""
    return run(files, stage, Layout())


@pytest.mark.parametrize("name", ["TP2, sequence parallel", "PP2", "sharding stage 2 x2"])
@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_sft_and_rm(stage: str, name: str, files: Path) -> None:
    difference = compare(single(files, stage), run(files, stage, LAYOUTS[name]))
    assert difference.steps >= 6
    assert difference.worst[0] <= 1e-4, difference.worst


@pytest.mark.parametrize("name", ["DP2", "sharding stage 3 x2", "TP2", "PP2", "TP2 x PP2"])
def test_ppo(name: str, files: Path) -> None:
    difference = compare(single(files, "ppo"), run(files, "ppo", LAYOUTS[name]))
    assert difference.steps >= 6 and difference.answers >= 24
    assert difference.same_answers
    assert difference.worst[0] <= 1e-4, difference.worst


@pytest.mark.parametrize("name", ["TP2, eval_mode single", "PP2, eval_mode tensor_parallel"])
def test_ppo_with_a_rollout_layout(name: str, files: Path) -> None:
    trace = run(files, "ppo", ROLLOUT_LAYOUTS[name])
    difference = compare(single(files, "ppo"), trace)
    assert difference.same_answers
    assert difference.worst[0] <= 1e-4, difference.worst
    moved = [row["reshard/bytes"] for row in trace.rows if "reshard/bytes" in row]
    assert len(moved) == 3 and sum(moved) > 0


def test_a_tied_llama(llama_files: Path) -> None:
    for stage in ("sft", "ppo"):
        difference = compare(single(llama_files, stage), run(llama_files, stage, LAYOUTS["TP2 x PP2"]))
        assert difference.same_answers
        assert difference.worst[0] <= 1e-4, (stage, difference.worst)
