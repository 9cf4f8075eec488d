"""What a reward source gets and gives, and the check that turns what it gave into float32 scores."""

from __future__ import annotations

import abc
import numbers
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from alignment.errors import RewardError

if TYPE_CHECKING:
    from alignment.rollout.rollout import Rollout

SHOWN_CHARACTERS = 300


@dataclass(frozen=True)
class RewardBatch:
    """Answers to be scored.

    Attributes:
        prompts: ``B`` texts as the data set gave them.
        responses: ``B`` texts; special tokens are in them only where ``reward_sees_special_tokens`` asks for them.
        rows: ``B`` mappings, the further columns of each prompt's row in the data set.
        rollout: the same rows as tokens with their lengths, for sources that need them (the reward model does).
    """

    prompts: list[str]
    responses: list[str]
    rows: list[dict[str, Any]]
    rollout: Rollout | None = None

    def __post_init__(self) -> None:
        if not len(self.prompts) == len(self.responses) == len(self.rows):
            raise ValueError(
                f"a batch of {len(self.prompts)} prompts, {len(self.responses)} responses and {len(self.rows)} rows"
            )

    def __len__(self) -> int:
        return len(self.responses)

    def show(self, index: int) -> str:
        """One sample in two lines, cut to a readable length."""
        return f"  prompt   [{index}]: {_cut(self.prompts[index])}\n  response [{index}]: {_cut(self.responses[index])}"

    @classmethod
    def from_rollout(cls, rollout: Rollout, responses: list[str] | None = None) -> RewardBatch:
        """The batch of a rollout's texts (or of other texts of the same answers), rows and tokens."""
        texts = rollout.responses if responses is None else responses
        return cls(prompts=rollout.prompts, responses=texts, rows=rollout.rows, rollout=rollout)

    def response_ids(self) -> list[list[int]]:
        """Each answer's tokens as they were sampled, what ended it included.

        Raises:
            RewardError: the batch has only texts.
        """
        rollout = self.rollout
        if rollout is None:
            raise RewardError("a reward asks for `response_ids`, and this batch has only texts")
        ends = zip(rollout.tokens, rollout.prompt_len, rollout.lengths, strict=True)
        return [row[int(start) : int(end)].tolist() for row, start, end in ends]


class RewardSource(abc.ABC):
    """Something that scores answers.

    Attributes:
        NAME: how the JSON, the logs and the metrics call it.
        figures: ``[B]`` each, of the newest batch, for the metrics alone: ``"truncated"`` becomes the mean
            ``reward/truncated_fraction``.
        partial: whether it may say ``None`` of an answer that it does not apply to.
    """

    NAME: str
    figures: Mapping[str, np.ndarray] = MappingProxyType({})
    partial: bool = False

    @abc.abstractmethod
    def score(self, batch: RewardBatch) -> list[float] | np.ndarray:
        """Return one finite number per answer, in the batch's order."""

    def settle_columns(self, columns: Collection[str]) -> None:  # noqa: B027  (most need none)
        """Get to know which columns the run's rows have, before models load; a row may lack some of them.

        Raises:
            RewardError: it needs another one.
        """


@dataclass(frozen=True)
class RewardResult:
    """Scores of a batch.

    Attributes:
        total: ``[B]`` float32, the weighted sum.
        parts: ``[B]`` float32 each, by the source's name and before weighting.
        figures: see :attr:`RewardSource.figures`.
    """

    total: np.ndarray
    parts: dict[str, np.ndarray]
    figures: dict[str, np.ndarray] = field(default_factory=dict)

    def select(self, index: np.ndarray) -> RewardResult:
        """Those of the given rows, in the given order."""
        return RewardResult(
            self.total[index],
            {name: part[index] for name, part in self.parts.items()},
            {name: figure[index] for name, figure in self.figures.items()},
        )

    @classmethod
    def join(cls, results: Sequence[RewardResult]) -> RewardResult:
        """Those of several batches (at least one) as one."""
        first = results[0]
        return cls(
            np.concatenate([result.total for result in results]),
            {name: np.concatenate([result.parts[name] for result in results]) for name in first.parts},
            {name: np.concatenate([result.figures[name] for result in results]) for name in first.figures},
        )


def check_scores(name: str, values: object, batch: RewardBatch, partial: bool = False) -> np.ndarray:
    """Return ``values`` as ``[B]`` float32.

    Args:
        name: the reward's name, for messages.
        values: what the source returned: a list, tuple, array or tensor of ``B`` numbers (truth values count as 0 and
            1).
        batch: what it was given.
        partial: whether it may say ``None`` or NaN of an answer that it does not apply to, which is NaN in the result.

    Raises:
        RewardError: another type, another count, something that is no number, NaN or infinite (also only in float32).
    """
    if hasattr(values, "numpy") and callable(values.numpy):  # a Paddle (or other framework's) tensor
        values = values.numpy()
    if isinstance(values, np.ndarray):
        if values.ndim != 1:
            raise RewardError(f"reward {name!r} returned an array of shape {list(values.shape)}; {_wanted(batch)}")
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise RewardError(f"reward {name!r} returned {_describe(values)}; {_wanted(batch)}")
    if len(values) != len(batch):
        sample = f". The first sample:\n{batch.show(0)}" if len(batch) else "."
        raise RewardError(
            f"reward {name!r} returned {len(values)} numbers for {len(batch)} responses; {_wanted(batch)}{sample}"
        )
    scores = np.empty(len(batch), dtype=np.float32)
    for i, value in enumerate(values):
        if hasattr(value, "item") and getattr(value, "size", 1) == 1:  # a NumPy scalar or a tensor of one number
            value = value.item()
        if partial and (value is None or value != value):
            scores[i] = np.nan
            continue
        if not isinstance(value, numbers.Real):
            raise RewardError(
                f"reward {name!r} gave {_describe(value)} instead of a number for sample {i}:\n{batch.show(i)}"
            )
        with np.errstate(over="ignore"):
            scores[i] = float(value)
        if not np.isfinite(scores[i]):
            raise RewardError(
                f"reward {name!r} gave {value!r}, which is not a finite float32, for sample {i}:\n{batch.show(i)}"
            )
    return scores


def _wanted(batch: RewardBatch) -> str:
    return f"it must return a list of {len(batch)} numbers, one per response, in the order of the responses"


def _describe(value: object) -> str:
    return "None" if value is None else f"{_cut(repr(value), 60)} ({type(value).__name__})"


def _cut(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """``text`` on one line, its middle left out where it is too long."""
    line = text.replace("\n", "\\n")
    return line if len(line) <= limit else f"{line[: limit // 2]} ... {line[-limit // 2 :]}"
