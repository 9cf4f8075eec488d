"""Arguments of training reward and cost models."""

from __future__ import annotations

from dataclasses import dataclass

from alignment.arguments import foreign
from alignment.arguments.row_arguments import RowArguments
from alignment.arguments.spec import argument


@dataclass
class RewardFields:
    """Loss and scores of a reward model."""

    GROUP = "Reward model"

    score_type: str = argument(
        "reward",
        "What the model learns: rewards from preferences, or costs from safety labels (`alignment cost`).",
        choices=("reward", "cost"),
    )
    loss_type: str = argument(
        "sequence-wise",
        "Compare the scores at the end, or at every differing token.",
        choices=("sequence-wise", "token-wise"),
    )
    regularization: float = argument(0.001, "Weight of the mean squared score in the loss.", ge=0)
    normalize_score_during_training: bool = argument(
        False, "Normalise scores in training by their running mean and deviation."
    )
    normalizer_type: str = argument(
        "ExponentialMovingAverage",
        "How mean and variance of the scores are estimated.",
        choices=("ExponentialMovingAverage", "RunningMeanStd"),
    )
    normalizer_momentum: float = argument(
        0.9, "Weight of the past in ExponentialMovingAverage: mean = m * mean + (1 - m) * batch mean.", ge=0, lt=1
    )


@dataclass
class RewardArguments(RewardFields, RowArguments):
    """Arguments of ``run_reward.py``; see :class:`~alignment.arguments.stage_arguments.Arguments`."""

    STAGE = "reward"
    TITLE = "Reward model"
    FOREIGN = foreign.REWARD
    METRICS = ("accuracy", "loss", "margin", "calibration_error")
    ROWS_EACH = 2


@dataclass
class CostArguments(RewardArguments):
    """Arguments of ``alignment cost``: those of a reward model whose scores are costs."""

    TITLE = "Cost model"

    score_type: str = argument("cost", "What the model learns.", choices=("cost",))
