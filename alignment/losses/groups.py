"""Statistics of the answers to one prompt (NumPy, float64; no gradient).

A group is the answers of all ranks to one prompt; its id is the prompt's global number. A score of NaN means "not
applicable": it is left out of every mean and deviation, and its advantage is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from alignment.errors import ArgumentsError

Scale = Literal["group", "batch", "none"]
Std = Literal["unbiased", "biased"]
Singletons = Literal["refuse", "zero", "raw"]
SCALES = ("group", "batch", "none")
SINGLETONS = ("refuse", "zero", "raw")


@dataclass(frozen=True)
class GroupMoments:
    """What :func:`group_moments` returns, each ``[B]``: every row has its group's figure.

    Attributes:
        size: rows of the group, applicable or not.
        count: rows with a score.
        mean: of the scores; 0 without any.
        variance: divided by ``count - 1``, or by ``count`` for ``"biased"``; 0 where that is 0.
        equal: bool, whether all scores are the same number.
    """

    size: np.ndarray
    count: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    equal: np.ndarray


def group_moments(scores: np.ndarray, groups: np.ndarray, std: Std = "unbiased") -> GroupMoments:
    """Mean and variance of each group.

    Args:
        scores: ``[B]`` float, NaN for not applicable.
        groups: ``[B]`` int, any numbers, in any order.
        std: what the variance is divided by.
    """
    scores, applies = np.asarray(scores, np.float64), ~np.isnan(scores)
    _, inverse = np.unique(np.asarray(groups), return_inverse=True)
    filled = np.where(applies, scores, 0.0)
    size, count = np.bincount(inverse), np.bincount(inverse, weights=applies)
    mean = np.bincount(inverse, weights=filled) / np.maximum(count, 1.0)
    # Two passes: E[r^2] - E[r]^2 may be negative for equal scores.
    squares = np.bincount(inverse, weights=np.where(applies, np.square(filled - mean[inverse]), 0.0))
    variance = squares / np.maximum(count - (1.0 if std == "unbiased" else 0.0), 1.0)
    low, high = np.full(len(size), np.inf), np.full(len(size), -np.inf)
    np.minimum.at(low, inverse[applies], scores[applies])
    np.maximum.at(high, inverse[applies], scores[applies])
    return GroupMoments(size[inverse], count[inverse], mean[inverse], variance[inverse], (low >= high)[inverse])


def group_advantages(
    scores: np.ndarray,
    groups: np.ndarray,
    scale: Scale = "group",
    std: Std = "unbiased",
    eps: float = 1e-6,
    singletons: Singletons = "refuse",
    leave_one_out: bool = False,
) -> np.ndarray:
    """``(r - mean_g) / (std + eps)``.

    Source: Shao et al. 2024 (GRPO), section 4.1.2; ``scale="none"`` is Dr.GRPO (Liu et al. 2025). Peers differ in every
    option: docs/compat.md.

    Args:
        scores: ``[B]`` float, NaN for not applicable.
        groups: ``[B]`` int.
        scale: ``"group"`` divides by the group's deviation, ``"batch"`` by that of all scores, ``"none"`` by nothing.
        std: divided by n - 1, or by n.
        eps: added to the deviation.
        singletons: of a group of one row: refuse it, give it ``"zero"``, or its ``"raw"`` score, as if the mean were 0
            and the deviation 1 (verl, SkyRL, PaddleNLP).
        leave_one_out: mean and deviation of the OTHER rows, no division where that deviation is 0 (NeMo's ``grpo``).

    Returns:
        ``[B]`` float64. Groups of equal scores have exactly 0.

    Raises:
        ArgumentsError: an option is unknown, or a group of one is refused.
    """
    if scale not in SCALES:
        raise ArgumentsError(f"unknown scale {scale!r} of the advantages; known: {', '.join(SCALES)}")
    scores, moments = (
        np.asarray(scores, np.float64),
        group_moments(scores, groups, "unbiased" if leave_one_out else std),
    )
    if leave_one_out:
        mean, variance = _others(scores, moments)
        centred = np.where(moments.equal, 0.0, scores - mean)
        if scale == "group":
            deviation = np.sqrt(variance)
            centred = np.where(deviation > 0, centred / np.where(deviation > 0, deviation + eps, 1.0), centred)
    else:
        centred = np.where(moments.equal, 0.0, scores - moments.mean)
        if scale == "group":
            centred = _divided(centred, np.sqrt(moments.variance) + eps)
    if scale == "batch":
        centred = _divided(centred, deviation_of(scores, std) + eps)
    raw = scores / (1.0 + eps) if scale == "group" else scores
    return _with_singletons(centred, raw, moments, singletons)


def leave_one_out_advantages(scores: np.ndarray, groups: np.ndarray, singletons: Singletons = "refuse") -> np.ndarray:
    """``r_i - mean_{j != i} r_j`` (RLOO: Ahmadian et al. 2024, eq. 8).

    Args:
        scores: ``[B]`` float, NaN for not applicable.
        groups: ``[B]`` int.
        singletons: see :func:`group_advantages`.

    Returns:
        ``[B]`` float64.
    """
    scores, moments = np.asarray(scores, np.float64), group_moments(scores, groups)
    centred = np.where(moments.equal, 0.0, scores - moments.mean)
    factor = moments.count / np.maximum(moments.count - 1.0, 1.0)
    return _with_singletons(centred * factor, scores, moments, singletons)


def length_weighted_advantages(
    scores: np.ndarray, groups: np.ndarray, lengths: np.ndarray, singletons: Singletons = "refuse"
) -> np.ndarray:
    """``r - sum_g(len r) / sum_g(len)``: the baseline of least variance if gradients grow with length (OPO: Hao et al.
    2025, eq. 8).

    Args:
        scores: ``[B]`` float, NaN for not applicable.
        groups: ``[B]`` int.
        lengths: ``[B]`` tokens of each answer.
        singletons: see :func:`group_advantages`.

    Returns:
        ``[B]`` float64.
    """
    scores, moments = np.asarray(scores, np.float64), group_moments(scores, groups)
    _, inverse = np.unique(np.asarray(groups), return_inverse=True)
    weights = np.where(np.isnan(scores), 0.0, lengths)
    total = np.bincount(inverse, weights=weights * np.nan_to_num(scores))
    baseline = (total / np.maximum(np.bincount(inverse, weights=weights), 1.0))[inverse]
    return _with_singletons(np.where(moments.equal, 0.0, scores - baseline), scores, moments, singletons)


def best_of_group_advantages(
    scores: np.ndarray, groups: np.ndarray, std: Std = "unbiased", eps: float = 1e-6, scaled: bool = True
) -> np.ndarray:
    """``(max - second largest) / (std + eps)`` for a group's best answer (the first of equal ones), 0 for the others.

    Source: pass@k training (Chen et al. 2025) as verl's ``grpo_passk``.

    Args:
        scores: ``[B]`` float, NaN for not applicable.
        groups: ``[B]`` int.
        std: see :func:`group_advantages`.
        eps: see :func:`group_advantages`.
        scaled: whether to divide.

    Returns:
        ``[B]`` float64.

    Raises:
        ArgumentsError: a group has one row.
    """
    scores, moments = np.asarray(scores, np.float64), group_moments(scores, groups, std)
    _refuse_singletons(moments)
    advantages = np.zeros_like(scores)
    for group in np.unique(groups):
        rows = np.nonzero((np.asarray(groups) == group) & ~np.isnan(scores))[0]
        if len(rows) > 1 and not moments.equal[rows[0]]:
            second, best = np.sort(scores[rows])[-2:]
            divisor = np.sqrt(moments.variance[rows[0]]) + eps if scaled else 1.0
            advantages[rows[scores[rows].argmax()]] = (best - second) / divisor
    return advantages


def several_rewards_advantages(
    rewards: np.ndarray,
    groups: np.ndarray,
    weights: np.ndarray,
    std: Std = "unbiased",
    eps: float = 1e-6,
    singletons: Singletons = "refuse",
) -> np.ndarray:
    """Each reward normalised in its group, their weighted sum, normalised over all sequences (GDPO: Liu et al. 2026).

    Over sequences, not tokens (as verl does), so that long answers do not weigh more.

    Args:
        rewards: ``[B, K]`` float; NaN where a reward does not apply to a row: it adds nothing there.
        groups: ``[B]`` int.
        weights: ``[K]``.
        std: see :func:`group_advantages`, in both normalisations.
        eps: see :func:`group_advantages`, in both normalisations.
        singletons: see :func:`group_advantages`.

    Returns:
        ``[B]`` float64; 0 for a row to which no reward applies.
    """
    parts = [
        group_advantages(column, groups, "group", std, eps, singletons) for column in np.asarray(rewards, np.float64).T
    ]
    total = np.stack(parts, axis=1) @ np.asarray(weights, np.float64)
    return standardize(np.where(np.isnan(rewards).all(axis=1), np.nan, total), std, eps)


def standardize(values: np.ndarray, std: Std = "unbiased", eps: float = 1e-6) -> np.ndarray:
    """``(x - mean) / (std + eps)`` over all rows ``[B]``; NaN is left out and becomes 0."""
    values = np.asarray(values, np.float64)
    applies = ~np.isnan(values)
    if not applies.any():
        return np.zeros_like(values)
    centred = np.where(applies, values - values[applies].mean(), 0.0)
    return _divided(centred, deviation_of(values, std) + eps)


def deviation_of(values: np.ndarray, std: Std = "unbiased") -> float:
    """Standard deviation of the entries that are not NaN; 0 with fewer than two."""
    inside = np.asarray(values, np.float64)[~np.isnan(values)]
    return float(inside.std(ddof=1 if std == "unbiased" else 0)) if inside.size > 1 else 0.0


def groups_with_spread(
    scores: np.ndarray,
    groups: np.ndarray,
    smallest: float = 1e-6,
    mean_range: tuple[float, float] | None = None,
) -> np.ndarray:
    """Which rows belong to a group that teaches something (DAPO's dynamic sampling, Yu et al. 2025, section 3.2).

    Args:
        scores: ``[B]`` before any shaping (no length penalty, no KL), NaN for not applicable.
        groups: ``[B]`` int.
        smallest: a group whose standard deviation is below it teaches nothing.
        mean_range: ``(low, high)``; given, the group's mean must also lie strictly between (OpenRLHF).

    Returns:
        ``[B]`` bool.
    """
    moments = group_moments(scores, groups, "biased")
    keep = ~moments.equal & (np.sqrt(moments.variance) >= smallest)
    if mean_range is not None:
        keep &= (moments.mean > mean_range[0]) & (moments.mean < mean_range[1])
    return keep


def _others(scores: np.ndarray, moments: GroupMoments) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance (by n - 2) of the other rows of each row's group."""
    others = np.maximum(moments.count - 1.0, 1.0)
    mean = moments.mean - (scores - moments.mean) / others
    squares = moments.variance * others  # of the whole group, whose variance is the unbiased one
    left = squares - (scores - moments.mean) * (scores - mean)
    variance = np.where(moments.count > 2, left / np.maximum(moments.count - 2.0, 1.0), 0.0)
    # What is left of equal scores after the subtraction is rounding.
    return mean, np.where(left > 1e-12 * np.maximum(squares, 1e-300), np.maximum(variance, 0.0), 0.0)


def _with_singletons(
    advantages: np.ndarray, raw: np.ndarray, moments: GroupMoments, singletons: Singletons
) -> np.ndarray:
    if singletons not in SINGLETONS:
        raise ArgumentsError(f"unknown treatment {singletons!r} of groups of one; known: {', '.join(SINGLETONS)}")
    if singletons == "refuse":
        _refuse_singletons(moments)
    alone = raw if singletons == "raw" else np.zeros_like(raw)
    return np.nan_to_num(np.where(moments.size == 1, alone, advantages), nan=0.0, posinf=np.inf, neginf=-np.inf)


def _refuse_singletons(moments: GroupMoments) -> None:
    alone = int((moments.size == 1).sum())
    if alone:
        raise ArgumentsError(
            f"{alone} prompt{'s have' if alone > 1 else ' has'} only one answer: an advantage within a group needs at "
            "least two. Set num_return_sequences to 2 or more (8 is usual)."
        )


def _divided(values: np.ndarray, divisor: np.ndarray | float) -> np.ndarray:
    """0 stays 0, also where the divisor is."""
    return np.where(values == 0, 0.0, values / np.where(np.asarray(divisor) == 0, 1.0, divisor))
