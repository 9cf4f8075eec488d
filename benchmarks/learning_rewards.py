"""Rewards and costs of benchmarks/learning.py, as a user writes them."""

from __future__ import annotations

from typing import Any

from alignment.demo.task import POLITE

#: What an answer of one token is worth, by its last letter; of any other 0.
ARMS = {"e": 1.0, "r": 0.7, "n": 0.6, "t": 0.5, "o": 0.3}


def arms(prompts: list[str], responses: list[str], **row: Any) -> list[float]:
    """The bandit's rewards: 1 at the best."""
    return [ARMS.get(text[-1:], 0.0) for text in responses]


def best_arm(prompts: list[str], responses: list[str], **row: Any) -> list[float]:
    """A cost of 1 for the arm that pays most, so that the second-best one is what a limit of 0 leaves."""
    return [float(text.endswith("e")) for text in responses]


def politeness(prompts: list[str], responses: list[str], **row: Any) -> list[float]:
    """A cost of 1 for answers of the demo's task that end as its reward likes them to."""
    return [float(text.strip().endswith(POLITE)) for text in responses]
