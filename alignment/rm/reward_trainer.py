"""Reward models by the names that their users know: the algorithm is :class:`alignment.methods.reward.RewardModel`,
what runs it is :class:`alignment.flow.loop.Loop`.
"""

from __future__ import annotations

from alignment.flow.loop import Loop as RewardTrainer
from alignment.methods.reward import RewardModel

__all__ = ["RewardModel", "RewardTrainer"]
