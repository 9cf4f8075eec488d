"""Arguments of training reward and cost models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alignment.arguments.sft_arguments import LoRAFields
from alignment.arguments.spec import argument
from alignment.arguments.stage_arguments import Arguments
from alignment.arguments.training import dataset_argument


@dataclass
class RewardFields:
    """Model, data and loss of a reward model."""

    GROUP = "Reward model"

    model_name_or_path: str = argument(
        "", "Folder (or name) of the model to start from, usually the SFT model.", required=True
    )
    train_datasets: str | dict[str, Any] | None = dataset_argument("Training mixture of preference data.")
    eval_datasets: str | dict[str, Any] | None = dataset_argument("Evaluation mixture.")
    max_length: int = argument(2048, "Longest row: prompt and answer.", ge=2, unit="tokens")
    max_src_len: int | None = argument(
        None, "Longest prompt.", ge=1, unit="tokens", aliases=("max_prompt_len",), derived="only max_length limits"
    )
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
class RewardArguments(LoRAFields, RewardFields, Arguments):
    """Arguments of ``run_reward.py``; see :class:`~alignment.arguments.stage_arguments.Arguments`."""

    STAGE = "reward"
    TITLE = "Reward model"


@dataclass
class CostArguments(RewardArguments):
    """Arguments of ``alignment cost``: those of a reward model whose scores are costs."""

    TITLE = "Cost model"

    score_type: str = argument("cost", "What the model learns.", choices=("cost",))
