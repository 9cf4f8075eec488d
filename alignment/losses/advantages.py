"""Generalised advantage estimation, whitening and running moments (NumPy; no gradient)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def gae(
    rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, gamma: float = 1.0, lam: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and returns by generalised advantage estimation.

    ``delta_t = r_t + gamma V_{t+1} - V_t``, ``A_t = delta_t + gamma lam A_{t+1}``, ``Return_t = A_t + V_t``, with V = 0
    behind the last token: the end of an answer is the end of its episode, also when the length limit cut it. Source:
    Schulman et al. 2016, eq. 16.

    Args:
        rewards: ``[B, R]``.
        values: ``[B, R]``, the old values.
        mask: ``[B, R]``, 1 inside the response; what stands outside has no influence.
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
        delta = rewards64[:, t] + gamma * next_value - values64[:, t]
        carried = (delta + gamma * lam * carried) * mask64[:, t]
        advantages[:, t] = carried
        next_value = values64[:, t]
    returns = (advantages + values64) * mask64
    return advantages.astype(rewards.dtype), returns.astype(rewards.dtype)


def whiten(values: np.ndarray, mask: np.ndarray, epsilon: float = 1e-8) -> np.ndarray:
    """Scale the masked entries to mean 0 and variance 1 (divided by n - 1, as TRL and verl do).

    Args:
        values: ``[B, R]``.
        mask: ``[B, R]``; statistics are taken, and results given, inside it only.
        epsilon: added to the variance, as in TRL and verl.

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
    if count > 1:
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

    def state_dict(self) -> dict[str, float]:
        """The state to save with a checkpoint."""
        return {"mean": self.mean, "variance": self.variance, "count": self.count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.mean, self.variance, self.count = (float(state[key]) for key in ("mean", "variance", "count"))
