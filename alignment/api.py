"""The names that a method, a loss or a reward of your own needs, in one place; docs/methods.md shows them at work.

What stands here stays. Importing it loads neither Paddle nor a model.
"""

from alignment.arguments.critic_keys import CriticKeys
from alignment.arguments.spec import argument
from alignment.flow.flow import Average, Call, Flow
from alignment.flow.method import Loss, Method, RoleSpec, Train, Window
from alignment.flow.online import ACTOR, CRITIC, REFERENCE, REWARD, OnlineMethod, logprobs, values
from alignment.flow.statistics import Statistics
from alignment.losses.advantages import discounted_returns, gae, whiten
from alignment.losses.aggregation import AGGREGATIONS, RowWeights, row_weights
from alignment.losses.correction import CORRECTIONS
from alignment.losses.estimators import ADVANTAGES, AdvantageInputs, AdvantageOptions, Advantages
from alignment.losses.kl import KL_CONTROLLERS, KL_ESTIMATORS, kl_estimate, kl_terms, shape_rewards
from alignment.losses.policy import POLICY_LOSSES, PolicyInputs, PolicyLoss, PolicyOptions, aggregate, value_loss
from alignment.methods import register_method
from alignment.rollout.batch import Batch
from alignment.rollout.rewards import RewardBatch, RewardResult, RewardSource, register_reward
from alignment.rollout.rollout import Experience, Rollout

__all__ = [
    "ACTOR",
    "ADVANTAGES",
    "AGGREGATIONS",
    "CORRECTIONS",
    "CRITIC",
    "KL_CONTROLLERS",
    "KL_ESTIMATORS",
    "POLICY_LOSSES",
    "REFERENCE",
    "REWARD",
    "AdvantageInputs",
    "AdvantageOptions",
    "Advantages",
    "Average",
    "Batch",
    "Call",
    "CriticKeys",
    "Experience",
    "Flow",
    "Loss",
    "Method",
    "OnlineMethod",
    "PolicyInputs",
    "PolicyLoss",
    "PolicyOptions",
    "RewardBatch",
    "RewardResult",
    "RewardSource",
    "RoleSpec",
    "Rollout",
    "RowWeights",
    "Statistics",
    "Train",
    "Window",
    "aggregate",
    "argument",
    "discounted_returns",
    "gae",
    "kl_estimate",
    "kl_terms",
    "logprobs",
    "register_method",
    "register_reward",
    "row_weights",
    "shape_rewards",
    "value_loss",
    "values",
    "whiten",
]
