"""RFT: which of a prompt's answers are good enough to be imitated (no gradient).

Source: Yuan et al. 2023 (rejection-sampling fine-tuning) as trlX's ``AccelerateRFTTrainer`` selects.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

Prompt = TypeVar("Prompt", bound=Hashable)
Answer = TypeVar("Answer", bound=Hashable)

# A threshold is this far inside the smallest and the largest of the prompts' thresholds.
MARGIN = 1e-3


@dataclass(frozen=True)
class Selection(Generic[Prompt, Answer]):
    """What :func:`select_answers` returns.

    Attributes:
        thresholds: of each prompt, in the order of the pools.
        chosen: ``(prompt, answer)``, each once, in the order in which they entered the pools.
    """

    thresholds: list[float]
    chosen: list[tuple[Prompt, Answer]]


def selection_percentile(round_number: int, start: float = 0.7, end: float = 0.95, rounds: int = 4) -> float:
    """``start + (end - start) / rounds * (round_number mod rounds)``: stricter with every round, then anew.

    Args:
        round_number: 0-based, of all rounds of the run.
        start: percentile of the first round, 0 to 1.
        end: percentile that a round after the last would have.
        rounds: rounds between two generations.
    """
    return start + (end - start) / rounds * (round_number % rounds)


def select_answers(
    pools: Mapping[Prompt, Sequence[tuple[Answer, float]]], percentile: float
) -> Selection[Prompt, Answer]:
    """Keep the answers at or above the quantile of their own prompt's pool.

    A prompt's threshold is the linear quantile of its pool's scores, cut to at least the smallest of all prompts'
    thresholds + 0.001 and at most the largest - 0.001. Equal answers are kept once; the order is that of the pools, so
    it is the same on every machine.

    Args:
        pools: of each prompt all answers so far and their scores.
        percentile: 0 to 1.

    Returns:
        The selection; empty for empty pools.
    """
    filled = {prompt: pool for prompt, pool in pools.items() if pool}
    if not filled:
        return Selection([], [])
    raw = np.array([np.quantile([score for _, score in pool], percentile) for pool in filled.values()], np.float64)
    thresholds = np.clip(raw, raw.min() + MARGIN, raw.max() - MARGIN) if len(raw) > 1 else raw
    chosen = {
        (prompt, answer): None
        for (prompt, pool), threshold in zip(filled.items(), thresholds, strict=True)
        for answer, score in pool
        if score >= threshold
    }
    return Selection(thresholds.tolist(), list(chosen))
