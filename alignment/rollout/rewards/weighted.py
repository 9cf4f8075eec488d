"""The weighted sum of reward sources that the JSON's ``reward`` asks for."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from alignment.arguments.values import short_names
from alignment.errors import RewardError
from alignment.rollout.rewards.patience import patience
from alignment.rollout.rewards.python_callable import PythonReward, load_function
from alignment.rollout.rewards.registry import MODEL, registered_reward
from alignment.rollout.rewards.reward_source import RewardBatch, RewardResult, RewardSource, check_scores

ModelScorer = Callable[[RewardBatch], np.ndarray]


class WeightedRewards:
    """Scores with several sources and adds them up.

    Args:
        sources: ``(name, weight, source)`` each; a source with weight 0 is logged and does not count.
        timeout: seconds that a source other than the reward model may take; 0 for any number.
    """

    def __init__(self, sources: list[tuple[str, float, RewardSource]], timeout: float = 0.0) -> None:
        self.sources, self.timeout = sources, timeout

    @property
    def names(self) -> list[str]:
        """The names of the sources, which are the keys of :attr:`RewardResult.parts`."""
        return [name for name, _, _ in self.sources]

    def __str__(self) -> str:
        return " + ".join(name if weight == 1 else f"{weight:g} * {name}" for name, weight, _ in self.sources)

    def score(self, batch: RewardBatch) -> RewardResult:
        """Score a batch.

        Returns:
            ``total`` ``[B]`` float32 and each source's own ``[B]`` float32.

        Raises:
            RewardError: a source failed, took too long, or did not return ``B`` finite numbers.
        """
        parts, figures = {}, {}
        for name, _, source in self.sources:
            watched = contextlib.nullcontext() if isinstance(source, ModelReward) else patience(name, self.timeout)
            with watched:
                parts[name] = check_scores(name, source.score(batch), batch, source.partial)
            figures.update(source.figures)
        total = np.zeros(len(batch), dtype=np.float64)
        for name, weight, _ in self.sources:
            total += weight * np.nan_to_num(parts[name].astype(np.float64))
        return RewardResult(total=check_scores(str(self), total, batch), parts=parts, figures=figures)

    def allow_partial(self) -> None:
        """Let every source say ``None`` of an answer that it does not apply to: NaN among the parts, and nothing in the
        sum.
        """
        for _, _, source in self.sources:
            source.partial = True

    def use_model(self, scorer: ModelScorer) -> None:
        """Give the reward model, where it was not loaded yet when the sources were made."""
        for _, _, source in self.sources:
            if isinstance(source, ModelReward):
                source.scorer = scorer

    def settle_columns(self, columns: Collection[str]) -> None:
        """Tell every source which columns the run's rows have; some rows may lack one.

        Raises:
            RewardError: a source needs a column that there is not.
        """
        for _, _, source in self.sources:
            source.settle_columns(columns)


class ModelReward(RewardSource):
    """The reward model, through the function with which the trainer runs it."""

    NAME = MODEL

    def __init__(self, scorer: ModelScorer) -> None:
        self.scorer = scorer

    def score(self, batch: RewardBatch) -> np.ndarray:
        scores = self.scorer(batch)
        self.figures = dict(getattr(self.scorer, "figures", {}))
        return scores


def uses_model(spec: Any) -> bool:
    """Say whether ``reward`` includes the reward model, so that it must be loaded."""
    return MODEL in _weights(spec)


def resolve_rewards(
    spec: Any,
    model_scorer: ModelScorer | None = None,
    timeout: float = 0.0,
    key: str = "reward",
) -> WeightedRewards:
    """Make the sources that ``reward`` (or another key) names.

    Args:
        spec: ``None`` (the reward model alone), a NAME, a list of NAMEs (weight 1 each) or a mapping NAME -> weight. A
            NAME is ``"model"``, a registered name, ``"file.py:function"`` or ``"package.module:function"``.
        model_scorer: scores a batch with the reward model: ``[B]`` float32. Needed only for ``"model"``.
        timeout: see :class:`WeightedRewards`.
        key: the argument that names them, for messages.

    Raises:
        RewardError: an unknown name, a wrong weight, a function that cannot be called, or no reward model for
            ``"model"``.
    """
    weights = _weights(spec, key)
    made = [(name, weight, _make(name, model_scorer, key)) for name, weight in weights.items()]
    short = short_names(list(weights))
    return WeightedRewards(
        [(name, weight, source) for name, (_, weight, source) in zip(short, made, strict=True)], timeout
    )


def _weights(spec: Any, key: str = "reward") -> dict[str, float]:
    if spec is None:
        return {MODEL: 1.0}
    if isinstance(spec, str):
        spec = [spec]
    if isinstance(spec, (list, tuple)):
        if len(set(map(str, spec))) != len(spec):
            raise RewardError(f"`{key}` names a source twice: {list(spec)}; give it a weight instead: {{NAME: 2.0}}")
        spec = dict.fromkeys(spec, 1.0)
    if not isinstance(spec, Mapping) or not spec:
        raise RewardError(f"`{key}` must be a NAME, a list of NAMEs or an object NAME -> weight, not {spec!r}")
    for name, weight in spec.items():
        if not isinstance(name, str) or not name:
            raise RewardError(f"`{key}`: {name!r} is not the NAME of a reward")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise RewardError(f"`{key}`: the weight of {name!r} must be a finite number, not {weight!r}")
    return {name: float(weight) for name, weight in spec.items()}


def _make(name: str, model_scorer: ModelScorer | None, key: str) -> RewardSource:
    if name == MODEL:
        if model_scorer is None:
            raise RewardError(
                f"`{key}` asks for the {key} model, but none is given: "
                f"set {key}_model_name_or_path, or name other sources"
            )
        return ModelReward(model_scorer)
    from_file = ":" in name or name.endswith(".py")
    reward = load_function(name) if from_file else registered_reward(name)
    if isinstance(reward, RewardSource):
        return reward
    if inspect.isclass(reward) and issubclass(reward, RewardSource):
        return reward()
    return PythonReward(name, reward)
