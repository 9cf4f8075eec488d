"""When the engine that sampled is not quite the policy that learns (NumPy; no gradient).

The sampler's log-prob q (of the distribution it truly drew from: temperature, top-k and top-p applied, other kernels,
older weights) and the training network's p before the update give the ratio ``p / q`` of each token. Figures say how
far the two are apart; a correction gives each token's loss a weight. Source: Yao et al. 2025 (TIS), Ling Team 2025
(IcePop), Liu et al. 2025 (geometric masks).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from alignment.losses.policy import LARGEST_LOG_RATIO
from alignment.named import Named


@dataclass(frozen=True)
class CorrectionOptions:
    """The bounds of the corrections.

    Attributes:
        tis_cap: largest weight of ``tis``.
        icepop_low: ``icepop`` drops tokens whose ratio is below it.
        icepop_high: ``icepop`` drops tokens whose ratio is above it.
        mask_low: ``mask`` drops answers whose geometric mean ratio is below it.
        mask_high: ``mask`` drops answers whose geometric mean ratio is above it.
    """

    tis_cap: float = 2.0
    icepop_low: float = 0.5
    icepop_high: float = 5.0
    mask_low: float = 0.99
    mask_high: float = 1.01


# From log-ratios [B, R] (0 outside the mask) and the mask to weights [B, R]; ``None`` for 1 everywhere.
CORRECTIONS: Named[Callable[[np.ndarray, np.ndarray, CorrectionOptions], np.ndarray | None]] = Named(
    "rollout_correction"
)


@dataclass(frozen=True)
class Correction:
    """What :func:`correct_rollout` returns.

    Attributes:
        weights: ``[B, R]`` float64, multiplies each token's loss, 0 outside the mask; ``None`` without a correction.
        figures: see :func:`mismatch`; with a correction also ``weight_mean`` and ``dropped`` (share of tokens with
            weight 0).
    """

    weights: np.ndarray | None
    figures: dict[str, float] = field(default_factory=dict)


def correct_rollout(
    logprobs: np.ndarray,
    sampler_logprobs: np.ndarray,
    mask: np.ndarray,
    kind: str = "none",
    options: CorrectionOptions | None = None,
) -> Correction:
    """Weights and figures of a rollout.

    Args:
        logprobs: ``[B, R]`` of the training network before the update.
        sampler_logprobs: ``[B, R]`` of what was drawn, by the distribution it was drawn from.
        mask: ``[B, R]``, 1 for the tokens that the policy chose.
        kind: a name of :data:`CORRECTIONS`.
        options: the bounds; ``None`` for the defaults.

    Raises:
        ArgumentsError: ``kind`` is unknown.
    """
    correct = CORRECTIONS[kind]
    inside = mask > 0
    log_ratio = np.where(inside, np.asarray(logprobs, np.float64) - sampler_logprobs, 0.0)
    log_ratio = log_ratio.clip(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    figures = mismatch(log_ratio, inside)
    weights = correct(log_ratio, inside, options or CorrectionOptions())
    if weights is not None:
        weights = weights * inside
        tokens = max(1, int(inside.sum()))
        figures["weight_mean"] = float(weights.sum() / tokens)
        figures["dropped"] = float(((weights == 0) & inside).sum() / tokens)
    return Correction(weights, figures)


def mismatch(log_ratio: np.ndarray, inside: np.ndarray) -> dict[str, float]:
    """How far sampler and training network are apart.

    Args:
        log_ratio: ``[B, R]`` ``log p - log q``.
        inside: ``[B, R]`` bool.

    Returns:
        ``gap_mean``: mean ``|log p - log q|``, in nats; ``k3``: mean of ``ratio - 1 - log ratio``, an estimate of
        KL(q || p); ``effective_sample_size``: ``(sum ratio)^2 / (n sum ratio^2)``, 1 for equal policies;
        ``ratio_max``. Without any token: 0, 0, 1, 1.
    """
    gaps = log_ratio[inside]
    if gaps.size == 0:
        return {"gap_mean": 0.0, "k3": 0.0, "effective_sample_size": 1.0, "ratio_max": 1.0}
    ratio = np.exp(gaps)
    return {
        "gap_mean": float(np.abs(gaps).mean()),
        "k3": float((np.expm1(gaps) - gaps).mean()),
        "effective_sample_size": float(ratio.sum() ** 2 / (gaps.size * np.square(ratio).sum())),
        "ratio_max": float(ratio.max()),
    }


@CORRECTIONS.register("none")
def no_correction(log_ratio: np.ndarray, inside: np.ndarray, options: CorrectionOptions) -> np.ndarray | None:
    """Figures only."""
    return None


@CORRECTIONS.register("tis")
def truncated_importance(log_ratio: np.ndarray, inside: np.ndarray, options: CorrectionOptions) -> np.ndarray | None:
    """``min(ratio, cap)`` per token (truncated importance sampling)."""
    return np.exp(log_ratio).clip(max=options.tis_cap)


@CORRECTIONS.register("icepop")
def bounded_importance(log_ratio: np.ndarray, inside: np.ndarray, options: CorrectionOptions) -> np.ndarray | None:
    """``ratio`` per token where it is within the bounds, otherwise 0 (IcePop)."""
    ratio = np.exp(log_ratio)
    return np.where((ratio >= options.icepop_low) & (ratio <= options.icepop_high), ratio, 0.0)


@CORRECTIONS.register("mask")
def geometric_mask(log_ratio: np.ndarray, inside: np.ndarray, options: CorrectionOptions) -> np.ndarray | None:
    """1 for all tokens of an answer whose geometric mean ratio is within the bounds, otherwise 0."""
    mean = log_ratio.sum(axis=1) / np.maximum(inside.sum(axis=1), 1)
    keep = (np.exp(mean) >= options.mask_low) & (np.exp(mean) <= options.mask_high)
    return np.broadcast_to(keep[:, None], log_ratio.shape).astype(np.float64)
