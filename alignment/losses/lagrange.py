"""PPO under a constraint on a cost: the Lagrange multiplier and the advantages it mixes (NumPy; no gradient).

Source: Dai et al. 2023 (Safe RLHF), eq. 31-32 and their code. Costs are positive for harm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass
class LagrangeMultiplier:
    """lambda >= 0, which grows while the mean cost of an episode is above its limit.

    ``log lambda += learning_rate * lambda * (mean cost - limit)``, then ``lambda <= largest``: gradient ascent on
    ``lambda (cost - limit)`` in log lambda.

    Attributes:
        value: lambda, changed in place.
        learning_rate: of log lambda.
        limit: mean cost of an episode that is allowed.
        largest: lambda is not let above it; ``None`` for no limit.
    """

    value: float = 1.0
    learning_rate: float = 0.1
    limit: float = 0.0
    largest: float | None = 5.0

    def __post_init__(self) -> None:
        if self.value <= 0:
            raise ValueError(f"the Lagrange multiplier starts at {self.value}; it must be above 0")

    def update(self, mean_cost: float) -> None:
        """Take in the mean cost of the latest episodes (over all ranks, without any KL)."""
        self.value = math.exp(math.log(self.value) + self.learning_rate * self.value * (mean_cost - self.limit))
        if self.largest is not None:
            self.value = min(self.value, self.largest)

    def state_dict(self) -> dict[str, float]:
        """The state to save with a checkpoint."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.value = float(state["value"])


def safe_advantages(reward_advantages: np.ndarray, cost_advantages: np.ndarray, multiplier: float) -> np.ndarray:
    """``(A_r - lambda A_c) / (1 + lambda)``: divided so that the step's size does not grow with lambda.

    Args:
        reward_advantages: ``[B, R]``.
        cost_advantages: ``[B, R]``, of the cost's own critic; a KL penalty is part of both (added to costs, taken off
            rewards, see :func:`~alignment.losses.kl.shape_rewards` with ``-kl_coeff``).
        multiplier: lambda.

    Returns:
        ``[B, R]``.
    """
    return (reward_advantages - multiplier * cost_advantages) / (1.0 + multiplier)
