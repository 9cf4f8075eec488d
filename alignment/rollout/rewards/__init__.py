"""Where scores come from: the reward model, Python functions and rules, behind one interface and registered by NAME.

The JSON's ``reward`` names one source, a list of sources, or a mapping NAME -> weight; :func:`resolve_rewards` makes
the weighted sum of it. A NAME is ``"model"``, a registered name, ``"file.py:function"`` or
``"package.module:function"``.
"""

from alignment.rollout.rewards import builtin as builtin
from alignment.rollout.rewards.registry import known_rewards, register_reward
from alignment.rollout.rewards.reward_source import RewardBatch, RewardResult, RewardSource
from alignment.rollout.rewards.weighted import WeightedRewards, resolve_rewards, uses_model

__all__ = [
    "RewardBatch",
    "RewardResult",
    "RewardSource",
    "WeightedRewards",
    "known_rewards",
    "register_reward",
    "resolve_rewards",
    "uses_model",
]
