"""KL estimators, KL-shaped token rewards, the missing-EOS rule and the KL controllers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from alignment.losses.policy import LARGEST_LOG_RATIO
from alignment.named import Named
from alignment.runtime import lazy

if TYPE_CHECKING:
    from paddle import Tensor

paddle = lazy("paddle")

# Per token, from ``d = log policy - log reference`` (NumPy array or Paddle tensor) of tokens that the policy sampled.
KL_ESTIMATORS: Named[Callable[[Any], Any]] = Named("KL estimator")


@KL_ESTIMATORS.register("k1")
def k1(difference: Any) -> Any:
    """``d``: unbiased, may be negative. As a loss its gradient is 0 on average: use it in the reward."""
    return difference


@KL_ESTIMATORS.register("k2")
def k2(difference: Any) -> Any:
    """``d^2 / 2``: biased, at least 0; as a loss it has the gradient of the KL."""
    return 0.5 * difference * difference


@KL_ESTIMATORS.register("k3")
def k3(difference: Any) -> Any:
    """``exp(-d) - 1 + d``: unbiased and at least 0; its gradient is that of the KL the other way round."""
    if _is_tensor(difference):
        return paddle.expm1(-difference) + difference
    return np.expm1(-difference) + difference


@KL_ESTIMATORS.register("abs")
def absolute(difference: Any) -> Any:
    """``|d|`` (verl, TRL 0.11): no estimate of a KL, a distance."""
    return abs(difference)


@KL_ESTIMATORS.register("k3_offpolicy")
def k3_offpolicy(difference: Any) -> Any:
    """``1 - exp(-d)``, the first part of k3 with its sign turned (Compose-RL): 0 on average, not a KL."""
    return -paddle.expm1(-difference) if _is_tensor(difference) else -np.expm1(-difference)


@KL_ESTIMATORS.register("k1+")
def k1_straight(difference: Any) -> Any:
    """Value of k1, gradient of k2 (verl)."""
    return _straight_through(k1, difference)


@KL_ESTIMATORS.register("k3+")
def k3_straight(difference: Any) -> Any:
    """Value of k3, gradient of k2 (verl): a good figure and the right gradient."""
    return _straight_through(k3, difference)


def _straight_through(value: Callable[[Any], Any], difference: Any) -> Any:
    if not _is_tensor(difference):
        return value(difference)
    slope = k2(difference)
    return slope + (value(difference) - slope).detach()


def _is_tensor(values: Any) -> bool:
    return not isinstance(values, (np.ndarray, np.generic, float, int))


def kl_estimate(
    logprobs: np.ndarray,
    ref_logprobs: np.ndarray,
    kind: str = "k1",
    log_ratio_clamp: float | None = None,
    clamp: float | None = None,
) -> np.ndarray:
    """Per-token estimate of KL(policy || reference) from samples of the policy (no gradient).

    With ``d = logprobs - ref_logprobs``: k1 = d (unbiased, may be negative), k2 = d^2 / 2, k3 = exp(-d) - 1 + d (both
    >= 0).
    Source: J. Schulman, "Approximating KL divergence", 2020; names as in verl and OpenRLHF.

    Args:
        logprobs: ``[B, R]`` of the sampling policy.
        ref_logprobs: ``[B, R]`` of the frozen reference, at the same temperature.
        kind: a name of :data:`KL_ESTIMATORS`.
        log_ratio_clamp: d is cut to +- this first; ``None`` for no cut.
        clamp: the estimate is cut to +- this; ``None`` for no cut.

    Returns:
        ``[B, R]``, the dtype of ``logprobs``.

    Raises:
        ArgumentsError: ``kind`` is unknown.
    """
    difference = logprobs - ref_logprobs
    if log_ratio_clamp is not None:
        difference = difference.clip(-log_ratio_clamp, log_ratio_clamp)
    terms = KL_ESTIMATORS[kind](difference)
    return terms if clamp is None else terms.clip(-clamp, clamp)


def kl_terms(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    kind: str = "k3",
    log_ratio_clamp: float | None = LARGEST_LOG_RATIO,
    clamp: float | None = None,
    old_logprobs: Tensor | None = None,
) -> Tensor:
    """Per-token KL terms for a loss: differentiable in ``logprobs``.

    Args:
        logprobs: ``[B, R]`` of the network in training.
        ref_logprobs: ``[B, R]`` of the reference.
        mask: ``[B, R]``.
        kind: a name of :data:`KL_ESTIMATORS`.
        log_ratio_clamp: as for :func:`kl_estimate`; beyond it there is no gradient. 20 is verl's and NeMo's, and keeps
            k3 finite.
        clamp: as for :func:`kl_estimate`; beyond it there is no gradient.
        old_logprobs: ``[B, R]``; given, the terms are multiplied by the ratio ``exp(logprobs - old_logprobs)``, which
            makes them an estimate under the policy in training (DeepSeek-V3.2; TRL's ``use_bias_correction_kl``).

    Returns:
        ``[B, R]``, 0 outside the mask.

    Raises:
        ArgumentsError: ``kind`` is unknown.
    """
    mask = mask.astype(logprobs.dtype)
    difference = (logprobs - ref_logprobs) * mask
    if log_ratio_clamp is not None:
        difference = difference.clip(-log_ratio_clamp, log_ratio_clamp)
    terms = KL_ESTIMATORS[kind](difference)
    if clamp is not None:
        terms = terms.clip(-clamp, clamp)
    if old_logprobs is not None:
        log_ratio = ((logprobs - old_logprobs) * mask).clip(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
        terms = terms * log_ratio.exp()
    return terms * mask


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
    token_scores: np.ndarray | None = None,
    action_mask: np.ndarray | None = None,
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
        token_scores: ``[B, R]`` rewards of single tokens, added as they are; ``None`` for none.
        action_mask: ``[B, R]``, 1 for the tokens that the policy chose: the others earn nothing, and the score goes to
            the last one chosen. ``None`` where it chose the whole response.

    Returns:
        ``[B, R]`` with zeros behind each response.
    """
    mask = response_mask(response_len, kl.shape[1], kl.dtype)
    if action_mask is not None:
        mask = mask * action_mask.astype(kl.dtype)
    rewards = -kl_coeff * kl * mask
    if token_scores is not None:
        rewards = rewards + token_scores * mask
    clipped = scores if clip_range_score is None else np.clip(scores, -clip_range_score, clip_range_score)
    rows, columns = last_tokens(mask)
    rewards[rows, columns] += clipped[rows]
    return rewards


def last_tokens(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``(rows, columns)`` of each row's last slot with mask 1; a row without any has no entry.

    Args:
        mask: ``[B, R]``.
    """
    rows = np.nonzero((mask > 0).any(axis=1))[0]
    return rows, mask.shape[1] - 1 - (mask[rows, ::-1] > 0).argmax(axis=1)


def response_mask(response_len: np.ndarray, width: int, dtype: type | np.dtype = np.float32) -> np.ndarray:
    """``[B, width]`` ones for the first ``response_len[b]`` slots of each row. Masks come from lengths, never from
    token ids.
    """
    return (np.arange(width)[None, :] < np.asarray(response_len)[:, None]).astype(dtype)


# Classes by name: each has ``kl_coeff``, ``update(current_kl, num_samples)``, ``state_dict`` and ``load_state_dict``.
KL_CONTROLLERS: Named[type[FixedKLController]] = Named("KL controller")


@KL_CONTROLLERS.register("fixed")
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


@KL_CONTROLLERS.register("adaptive")
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


@KL_CONTROLLERS.register("rl4lms")
@dataclass
class RelativeKLController(FixedKLController):
    """``beta *= 1 + rate * clip(KL / target - 1, -0.2, 0.2)`` at each rollout, whatever its size (RL4LMs; NLPO).

    Attributes:
        kl_coeff: beta, changed in place.
        target: wanted KL.
        rate: share of the error that one rollout corrects.
    """

    target: float = 6.0
    rate: float = 0.1

    def update(self, current_kl: float, num_samples: int) -> None:
        """Adapt after a rollout; see :class:`AdaptiveKLController`."""
        self.kl_coeff *= 1.0 + self.rate * min(max(current_kl / self.target - 1.0, -0.2), 0.2)


@KL_CONTROLLERS.register("pid")
@dataclass
class AscendingKLController(FixedKLController):
    """Adam's ascent on beta with the gradient ``(KL - target) * num_samples / horizon`` (Compose-RL's ``pid``).

    Beta may become negative; :class:`BallKLController` keeps it at 0 or above. Adam as in Kingma and Ba 2015, with
    their defaults.

    Attributes:
        kl_coeff: beta, changed in place.
        target: wanted KL.
        horizon: samples that make a gradient of the whole error.
        learning_rate: of Adam.
        lowest: beta is not let below it; ``None`` for no limit.
    """

    target: float = 6.0
    horizon: float = 10_000.0
    learning_rate: float = 0.01
    lowest: float | None = None
    first: float = 0.0
    second: float = 0.0
    steps: int = 0

    def update(self, current_kl: float, num_samples: int) -> None:
        """Adapt after a rollout; see :class:`AdaptiveKLController`."""
        gradient = (current_kl - self.target) * num_samples / self.horizon
        self.steps += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        first, second = self.first / (1.0 - 0.9**self.steps), self.second / (1.0 - 0.999**self.steps)
        self.kl_coeff += self.learning_rate * first / (second**0.5 + 1e-8)
        if self.lowest is not None:
            self.kl_coeff = max(self.lowest, self.kl_coeff)

    def state_dict(self) -> dict[str, float]:
        """The state to save with a checkpoint."""
        return {"kl_coeff": self.kl_coeff, "first": self.first, "second": self.second, "steps": float(self.steps)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what :meth:`state_dict` gave."""
        super().load_state_dict(state)
        self.first, self.second, self.steps = float(state["first"]), float(state["second"]), int(state["steps"])


@KL_CONTROLLERS.register("ball")
@dataclass
class BallKLController(AscendingKLController):
    """:class:`AscendingKLController` whose beta is never below 0 (Compose-RL's ``ball``)."""

    lowest: float | None = 0.0
