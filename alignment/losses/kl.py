"""KL estimators, KL-shaped token rewards, the missing-EOS rule and the KL controllers (NumPy; no gradient)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

KL_ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(logprobs: np.ndarray, ref_logprobs: np.ndarray, kind: str = "k1") -> np.ndarray:
    """Per-token estimate of KL(policy || reference) from samples of the policy.

    With ``d = logprobs - ref_logprobs``: k1 = d (unbiased, may be negative), k2 = d^2 / 2, k3 = exp(-d) - 1 + d (both
    >= 0).
    Source: J. Schulman, "Approximating KL divergence", 2020; names as in verl and OpenRLHF.

    Args:
        logprobs: ``[B, R]`` of the sampling policy.
        ref_logprobs: ``[B, R]`` of the frozen reference, at the same temperature.
        kind: ``"k1"``, ``"k2"`` or ``"k3"``.

    Returns:
        ``[B, R]``, the dtype of ``logprobs``.

    Raises:
        ValueError: ``kind`` is unknown.
    """
    difference = logprobs - ref_logprobs
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * np.square(difference)
    if kind == "k3":
        return np.expm1(-difference) + difference
    raise ValueError(f"unknown KL estimator {kind!r}; known: {', '.join(KL_ESTIMATORS)}")


def apply_missing_eos_rule(
    scores: np.ndarray,
    finished: np.ndarray,
    rule: Literal["none", "score", "penalty"] = "none",
    missing_eos_score: float = -1.0,
    missing_eos_penalty: float = 1.0,
) -> np.ndarray:
    """Treat answers that ran into the length limit without an EOS.

    Args:
        scores: ``[B]`` from the reward sources.
        finished: ``[B]`` bool, whether the answer ended with an EOS.
        rule: ``"none"`` leaves the scores (PaddleNLP, safe-rlhf); ``"score"`` puts ``missing_eos_score`` in their place
            (Ziegler et al. 2019; Huang et al. 2024, "N+ details"); ``"penalty"`` subtracts ``missing_eos_penalty``
            (TRL).
        missing_eos_score: see ``rule``.
        missing_eos_penalty: see ``rule``.

    Returns:
        ``[B]``, a new array.

    Raises:
        ValueError: ``rule`` is unknown.
    """
    finished = finished.astype(bool)
    if rule == "none":
        return scores.copy()
    if rule == "score":
        return np.where(finished, scores, np.asarray(missing_eos_score, dtype=scores.dtype))
    if rule == "penalty":
        return np.where(finished, scores, scores - np.asarray(missing_eos_penalty, dtype=scores.dtype))
    raise ValueError(f"unknown missing-EOS rule {rule!r}; known: none, score, penalty")


def shape_rewards(
    scores: np.ndarray,
    kl: np.ndarray,
    response_len: np.ndarray,
    kl_coeff: float,
    clip_range_score: float | None = None,
) -> np.ndarray:
    """Token rewards: ``-kl_coeff * kl`` at every token of the response, plus the clipped score at its last one (as TRL
    v1, OpenRLHF and safe-rlhf do).

    Source: Ouyang et al. 2022 (InstructGPT), section 3.5; the clip is safe-rlhf's ``clip_range_score``.

    Args:
        scores: ``[B]``, one per answer.
        kl: ``[B, R]`` per-token estimates.
        response_len: ``[B]`` tokens of each response, EOS included; 0 allowed (such a row earns nothing).
        kl_coeff: beta.
        clip_range_score: the score is clipped to ``[-x, x]``; ``None`` for no clip.

    Returns:
        ``[B, R]`` with zeros behind each response.
    """
    mask = response_mask(response_len, kl.shape[1], kl.dtype)
    rewards = -kl_coeff * kl * mask
    clipped = scores if clip_range_score is None else np.clip(scores, -clip_range_score, clip_range_score)
    filled = np.nonzero(response_len > 0)[0]
    rewards[filled, response_len[filled] - 1] += clipped[filled]
    return rewards


def response_mask(response_len: np.ndarray, width: int, dtype: type | np.dtype = np.float32) -> np.ndarray:
    """``[B, width]`` ones for the first ``response_len[b]`` slots of each row. Masks come from lengths, never from
    token ids.
    """
    return (np.arange(width)[None, :] < np.asarray(response_len)[:, None]).astype(dtype)


@dataclass
class FixedKLController:
    """A constant KL coefficient."""

    kl_coeff: float

    def update(self, current_kl: float, num_samples: int) -> None:
        """Nothing to adapt."""

    def state_dict(self) -> dict[str, float]:
        """The state to save with a checkpoint."""
        return {"kl_coeff": self.kl_coeff}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.kl_coeff = float(state["kl_coeff"])


@dataclass
class AdaptiveKLController(FixedKLController):
    """A KL coefficient that drives the observed KL towards a target.

    ``beta *= 1 + clip(KL / target - 1, -0.2, 0.2) * num_samples / horizon``. Source: Ziegler et al. 2019, section 2.2.

    Attributes:
        kl_coeff: beta, changed in place.
        target: wanted KL per sample, the sum over its tokens, in nats.
        horizon: samples over which a full error would be corrected.
    """

    target: float = 6.0
    horizon: float = 10_000.0

    def update(self, current_kl: float, num_samples: int) -> None:
        """Adapt after a rollout.

        Args:
            current_kl: mean over the samples of the summed per-token k1 estimate.
            num_samples: how many samples it was measured on.
        """
        error = min(max(current_kl / self.target - 1.0, -0.2), 0.2)
        self.kl_coeff *= 1.0 + error * num_samples / self.horizon
