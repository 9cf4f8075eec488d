"""What the training loop asks of a stage, and what it remembers about a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from alignment.flow.stats import Stats

if TYPE_CHECKING:
    from paddle import Tensor

    from alignment.engine.engine import Engine
    from alignment.ppo.models import Rows

Batch = dict[str, np.ndarray]


class Stage(Protocol):
    """What the loop asks of a stage (SFT, reward model).

    Attributes:
        name: for messages.
        engine: the trained model.
    """

    name: str
    engine: Engine

    def collate(self, rows: Sequence[Any]) -> Batch:
        """Rows of the data set -> one micro batch of numpy arrays."""

    def row_tokens(self, row: Any) -> int:
        """Tokens that a row takes in a micro batch of its like, pads included."""

    def count(self, batch: Batch) -> int:
        """What the loss is a mean over: valid tokens or pairs in this batch."""

    def tokens(self, batch: Batch) -> int:
        """Real tokens that the model reads, for the rates."""

    def rows(self, batch: Batch) -> Rows:
        """What the model reads of a batch."""

    def loss(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
        """From final hidden states ``[rows, seq, hidden]``: the **sum** of the loss over the batch's :meth:`count`, and
        stats for metrics.
        """

    def after_step(self, stats: Stats) -> None:
        """Called on every rank after each optimizer step with this rank's stats of the step."""

    def metrics(self, stats: Stats) -> dict[str, float]:
        """Metrics from merged stats; names without prefix."""

    def decode(self, batch: Batch) -> list[str]:
        """One readable text per row."""

    def save(self, folder: Path) -> None:
        """Write the model, its tokenizer and its prompt template into ``folder``; every process calls it."""


@dataclass
class Progress:
    """Where the run stands; all that a resumed run needs besides weights and optimizer.

    Attributes:
        step: optimizer steps taken.
        window: merged stats since the last logged row.
        window_steps: steps since the last logged row.
        loss_sum: sum of the steps' losses of the whole run.
        best_step, best_value, best_metrics: of ``metric_for_best_model``.
        last_eval_step: step of the last evaluation, -1 before the first.
        eval_metrics: its metrics.
    """

    step: int = 0
    window: Stats = field(default_factory=dict)
    window_steps: int = 0
    loss_sum: float = 0.0
    best_step: int = -1
    best_value: float | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    last_eval_step: int = -1
    eval_metrics: dict[str, float] = field(default_factory=dict)
