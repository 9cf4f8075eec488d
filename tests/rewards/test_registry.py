"""Rewards by NAME."""

from __future__ import annotations

import pytest

from alignment.errors import RewardError
from alignment.rollout.rewards import known_rewards, register_reward, registry, resolve_rewards
from alignment.rollout.rewards.reward_source import RewardBatch, RewardSource


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REWARDS", dict(registry._REWARDS))


def batch(*responses: str) -> RewardBatch:
    return RewardBatch(["p"] * len(responses), list(responses), [{} for _ in responses])


def test_a_registered_function_is_found() -> None:
    @register_reward("polite")
    def polite(prompts, responses, **row):
        return [float("please" in response) for response in responses]

    assert "polite" in known_rewards()
    assert resolve_rewards("polite").score(batch("yes please", "no")).total.tolist() == [1.0, 0.0]
    assert polite([], []) == []  # still an ordinary function


def test_a_registered_source_class_is_made() -> None:
    @register_reward("constant")
    class Constant(RewardSource):
        NAME = "constant"

        def score(self, batch: RewardBatch) -> list[float]:
            return [2.0] * len(batch)

    assert resolve_rewards("constant").score(batch("a")).total.tolist() == [2.0]


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(RewardError) as failure:
        resolve_rewards("gsm8")
    text = str(failure.value)
    assert "unknown reward 'gsm8'; did you mean 'gsm8k'?" in text
    assert "Known: model, exact_match, gsm8k, regex, words" in text
    assert "file.py:function" in text


@pytest.mark.parametrize("name", ["", "model", "a:b", "a,b", " a"])
def test_names_that_mean_something_else(name: str) -> None:
    with pytest.raises(RewardError, match="cannot be registered"):
        register_reward(name)


def test_a_name_belongs_to_one_function() -> None:
    def other(prompts, responses):
        return [0.0 for _ in responses]

    with pytest.raises(RewardError, match="registered twice"):
        register_reward("words")(other)


def test_loading_the_same_file_again_replaces_it() -> None:
    source = "def again(prompts, responses):\n    return [{value} for _ in responses]\n"
    for value in (1.0, 2.0):
        namespace: dict = {}
        exec(compile(source.format(value=value), "my_rewards.py", "exec"), namespace)
        register_reward("again")(namespace["again"])
    assert resolve_rewards("again").score(batch("a")).total.tolist() == [2.0]
