"""Weighted sums, and the reward model among them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from alignment.errors import RewardError
from alignment.rollout.rewards import RewardBatch, resolve_rewards, uses_model

BATCH = RewardBatch(["p0", "p1"], ["one", "two words"], [{"answer": "one"}, {"answer": "two"}])


def model(batch: RewardBatch) -> np.ndarray:
    return np.arange(len(batch), dtype=np.float32) + 0.5


def test_none_is_the_reward_model_alone() -> None:
    result = resolve_rewards(None, model).score(BATCH)
    assert result.total.tolist() == [0.5, 1.5]
    assert list(result.parts) == ["model"]


def test_a_name_a_list_and_weights() -> None:
    assert resolve_rewards("words").score(BATCH).total.tolist() == [1, 2]
    assert resolve_rewards(["words", "exact_match"]).score(BATCH).total.tolist() == [2, 2]
    rewards = resolve_rewards({"model": 2, "words": -0.5, "exact_match": 0}, model)
    result = rewards.score(BATCH)
    assert result.total.dtype == np.float32
    assert result.total.tolist() == [0.5, 2.0]
    assert {name: part.tolist() for name, part in result.parts.items()} == {
        "model": [0.5, 1.5],
        "words": [1, 2],
        "exact_match": [1, 0],
    }
    assert all(part.dtype == np.float32 for part in result.parts.values())
    assert str(rewards) == "2 * model + -0.5 * words + 0 * exact_match"
    assert rewards.names == ["model", "words", "exact_match"]


def test_an_empty_batch() -> None:
    result = resolve_rewards(["words", "model"], model).score(RewardBatch([], [], []))
    assert result.total.shape == (0,)
    assert result.parts["words"].shape == (0,)


def test_uses_model() -> None:
    assert uses_model(None)
    assert uses_model(["words", "model"])
    assert uses_model({"model": 0.0})
    assert not uses_model("words")


def test_files_are_logged_by_function_unless_two_would_share_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text("def f(prompts, responses):\n    return [1.0 for _ in responses]\n")
    monkeypatch.chdir(tmp_path)
    assert resolve_rewards("a.py:f").names == ["f"]
    assert resolve_rewards(["a.py:f", "b.py:f"]).names == ["a.py:f", "b.py:f"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("model", "set reward_model_name_or_path"),
        (None, "set reward_model_name_or_path"),
        ([], "must be a NAME"),
        ({}, "must be a NAME"),
        (3, "must be a NAME"),
        ([None], "None is not the NAME"),
        ("", "'' is not the NAME"),
        (["words", "words"], "names a source twice"),
        ({"words": "2"}, "weight of 'words' must be a finite number, not '2'"),
        ({"words": True}, "weight of 'words' must be a finite number, not True"),
        ({"words": float("nan")}, "weight of 'words' must be a finite number"),
        ({"words": None}, "weight of 'words' must be a finite number, not None"),
        ("nobody", "unknown reward 'nobody'"),
    ],
)
def test_specs_that_mean_nothing(spec: object, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        resolve_rewards(spec)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.zeros((2, 1), np.float32), r"reward 'model' returned an array of shape \[2, 1\]"),
        (np.zeros(3, np.float32), "returned 3 numbers for 2 responses"),
        (np.array([0, np.nan], np.float32), "reward 'model' gave nan"),
    ],
)
def test_the_models_scores_are_checked_too(scores: np.ndarray, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        resolve_rewards(None, lambda batch: scores).score(BATCH)


def test_a_sum_that_overflows() -> None:
    rewards = resolve_rewards({"model": 1e39}, model)
    with pytest.raises(RewardError, match="not a finite float32"):
        rewards.score(BATCH)


def test_a_batch_has_as_many_prompts_as_responses() -> None:
    with pytest.raises(ValueError, match="2 prompts, 1 responses and 0 rows"):
        RewardBatch(["a", "b"], ["c"], [])
