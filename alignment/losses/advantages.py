"""Generalised advantage estimation, whitening and running moments (NumPy; no gradient)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def gae(
    rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, gamma: float = 1.0, lam: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and returns by generalised advantage estimation.

    ``delta_t = r_t + gamma V_{t+1} - V_t``, ``A_t = delta_t + gamma lam A_{t+1}``, ``Return_t = A_t + V_t``, with V = 0
    behind the last token: the end of an answer is the end of its episode, also when the length limit cut it. Tokens
    inside an answer that the policy did not choose (mask 0: a tool's reply) are stepped over: t + 1 is the next token
    with mask 1, and nothing is discounted on the way. Source: Schulman et al. 2016, eq. 16.

    Args:
        rewards: ``[B, R]``.
        values: ``[B, R]``, the old values.
        mask: ``[B, R]``, 1 for the tokens that the policy chose; what stands elsewhere has no influence.
        gamma: discount.
        lam: lambda.

    Returns:
        ``(advantages, returns)``, both ``[B, R]`` in the dtype of ``rewards``, zero outside the mask. Computed in
        float64.
    """
    mask64 = mask.astype(np.float64)
    rewards64, values64 = rewards.astype(np.float64) * mask64, values.astype(np.float64) * mask64
    advantages = np.zeros_like(rewards64)
    rows, width = rewards64.shape
    carried, next_value = np.zeros(rows), np.zeros(rows)
    for t in range(width - 1, -1, -1):
        chosen = mask64[:, t] > 0
        delta = rewards64[:, t] + gamma * next_value - values64[:, t]
        carried = np.where(chosen, delta + gamma * lam * carried, carried)
        next_value = np.where(chosen, values64[:, t], next_value)
        advantages[:, t] = carried * mask64[:, t]
    returns = (advantages + values64) * mask64
    return advantages.astype(rewards.dtype), returns.astype(rewards.dtype)


def discounted_returns(rewards: np.ndarray, mask: np.ndarray, gamma: float = 1.0) -> np.ndarray:
    """``G_t = r_t + gamma G_{t+1}`` over the tokens with mask 1; those with mask 0 are stepped over, as in :func:`gae`.

    Args:
        rewards: ``[B, R]``; what stands at mask 0 has no influence.
        mask: ``[B, R]``.
        gamma: discount.

    Returns:
        ``[B, R]`` in the dtype of ``rewards``, zero at mask 0. Computed in float64.
    """
    rewards64 = rewards.astype(np.float64)
    returns, carried = np.zeros_like(rewards64), np.zeros(len(rewards64))
    for t in range(rewards64.shape[1] - 1, -1, -1):
        chosen = mask[:, t] > 0
        carried = np.where(chosen, rewards64[:, t] + gamma * carried, carried)
        returns[:, t] = np.where(chosen, carried, 0.0)
    return returns.astype(rewards.dtype)


def whiten(values: np.ndarray, mask: np.ndarray, epsilon: float = 1e-8, std: str = "unbiased") -> np.ndarray:
    """Scale the masked entries to mean 0 and variance 1 (divided by n - 1, as TRL and verl do).

    Args:
        values: ``[B, R]``.
        mask: ``[B, R]``; statistics are taken, and results given, inside it only.
        epsilon: added to the variance, as in TRL and verl.
        std: ``"unbiased"``, or ``"biased"`` to divide by n (OpenRLHF, NeMo).

    Returns:
        ``[B, R]`` in the dtype of ``values``, zero outside the mask. With fewer than two entries the variance is not
        defined and the entries are only shifted.
    """
    weights = mask.astype(np.float64)
    count = weights.sum()
    wide = values.astype(np.float64)
    if count == 0:
        return np.zeros_like(values)
    mean = (wide * weights).sum() / count
    variance = (np.square(wide - mean) * weights).sum() / count
    if count > 1 and std == "unbiased":
        variance *= count / (count - 1)
    scale = 1.0 / np.sqrt(variance + epsilon) if count > 1 else 1.0
    return ((wide - mean) * scale * weights).astype(values.dtype)


def explained_variance(values: np.ndarray, returns: np.ndarray, mask: np.ndarray) -> float:
    """``1 - Var(returns - values) / Var(returns)`` over the mask: 1 is a perfect critic, 0 one that knows only the
    mean.

    Args:
        values: ``[B, R]``.
        returns: ``[B, R]``.
        mask: ``[B, R]``.

    Returns:
        The figure, or 0.0 where the returns do not vary.
    """
    inside = mask.astype(bool)
    target = returns[inside].astype(np.float64)
    if target.size < 2 or target.var() < 1e-12:
        return 0.0
    return float(1.0 - (target - values[inside].astype(np.float64)).var() / target.var())


@dataclass
class RunningMoments:
    """Mean and standard deviation over everything seen, merged batch by batch.

    Source: Chan, Golub, LeVeque 1979, the pairwise update. The statistics are the population's (divide by n), so one
    row is enough.
    """

    mean: float = 0.0
    variance: float = 1.0
    count: float = 0.0

    def update(self, values: np.ndarray) -> None:
        """Take in a batch of any shape; an empty one changes nothing."""
        batch = np.asarray(values, dtype=np.float64).ravel()
        if batch.size == 0:
            return
        total = self.count + batch.size
        delta = float(batch.mean()) - self.mean
        old = self.variance * self.count if self.count else 0.0
        self.variance = (old + float(batch.var()) * batch.size + delta**2 * self.count * batch.size / total) / total
        self.mean += delta * batch.size / total
        self.count = total

    def normalize(self, values: np.ndarray, epsilon: float = 1e-8) -> np.ndarray:
        """``(values - mean) / (std + epsilon)``; with a standard deviation of 0 (one row, equal rows) only the mean is
        taken off.
        """
        std = float(np.sqrt(self.variance))
        shifted = values.astype(np.float64) - self.mean
        return (shifted / (std + epsilon) if std > 0 else shifted).astype(values.dtype)

    @property
    def unbiased_std(self) -> float:
        """Standard deviation divided by n - 1, as trlX scales rewards by; 1.0 before two values were seen."""
        return float(np.sqrt(self.variance * self.count / (self.count - 1.0))) if self.count > 1 else 1.0

    def scale(self, values: np.ndarray) -> np.ndarray:
        """``values / unbiased_std``, the mean left in (trlX's ``scale_reward: running``); unchanged where it is 0."""
        std = self.unbiased_std
        return (values.astype(np.float64) / std).astype(values.dtype) if std > 0 else values.copy()

    def state_dict(self) -> dict[str, float]:
        """The state to save with a checkpoint."""
        return {"mean": self.mean, "variance": self.variance, "count": self.count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.mean, self.variance, self.count = (float(state[key]) for key in ("mean", "variance", "count"))
