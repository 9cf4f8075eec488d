"""The SFT stage: next-token loss on answers, padded or packed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from alignment.engine.engine import Engine
from alignment.flow.stage import Batch
from alignment.flow.stats import Stats
from alignment.ppo.data import IGNORE_INDEX, collate_packed, collate_supervised
from alignment.ppo.models import Rows


class SFTStage:
    """What :class:`~alignment.flow.stage_trainer.StageTrainer` asks of supervised fine-tuning.

    The loss is ``-sum log p(token)`` over answer tokens; the loop divides by their number in the whole optimizer step.
    Perplexity is ``exp`` of that mean over all evaluated tokens of all ranks, never a mean of perplexities.

    Args:
        engine: the causal model, to be trained.
        tokenizer: for pads and readable dumps.
        packed: rows are packs of several samples (``zero_padding``).
        pad_to: pad every row to this many tokens; None pads to the longest of the batch.
        pad_to_multiple_of: then pad to a multiple of this.
        save: writes model, tokenizer and template into a folder.
    """

    name = "SFT"

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        *,
        packed: bool = False,
        pad_to: int | None = None,
        pad_to_multiple_of: int | None = None,
        save: Callable[[Path], None],
    ) -> None:
        self.engine, self.tokenizer, self.packed, self._save = engine, tokenizer, packed, save
        self._pad_to, self._multiple = pad_to or 0, pad_to_multiple_of or 1

    def collate(self, rows: Sequence[Any]) -> Batch:
        """Padded: ``input_ids, labels [rows, seq]``, ``lengths [rows]``; packed: ``segment_ids, position_ids [rows,
        seq]`` too.
        """
        collate = collate_packed if self.packed else collate_supervised
        pad_id = self.tokenizer.pad_token_id
        batch = collate(rows, pad_id)
        width = batch["input_ids"].shape[1]
        more = self._padded(width) - width
        if more:
            fills = {"input_ids": pad_id, "labels": IGNORE_INDEX, "segment_ids": 0, "position_ids": 0}
            for name, fill in fills.items():
                if name in batch:
                    batch[name] = np.pad(batch[name], ((0, 0), (0, more)), constant_values=fill)
        return batch

    def row_tokens(self, row: Any) -> int:
        """The row's length, padded as the arguments ask."""
        return self._padded(len(row["input_ids"]))

    def _padded(self, width: int) -> int:
        return math.ceil(max(width, self._pad_to) / self._multiple) * self._multiple

    def count(self, batch: Batch) -> int:
        """Answer tokens that are predicted."""
        return int((shifted_labels(batch) != IGNORE_INDEX).sum())

    def tokens(self, batch: Batch) -> int:
        """Real tokens."""
        return int(np.sum(batch["lengths"]))

    def rows(self, batch: Batch) -> Rows:
        """The tokens; of packed rows also which sample each belongs to."""
        if not self.packed:
            return Rows(batch["input_ids"], lengths=batch["lengths"])
        return Rows(batch["input_ids"], batch["segment_ids"], batch["position_ids"], batch["lengths"])

    def loss(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
        """Sum of ``-log p`` over answer tokens; stats: ``nll``, ``answer_tokens``, ``correct`` (greedy token right)."""
        labels = shifted_labels(batch).reshape(-1)
        where = np.flatnonzero(labels != IGNORE_INDEX)
        index, targets = paddle.to_tensor(where), paddle.to_tensor(labels[where])
        # The vocabulary-wide head runs on answer positions only.
        scores = self.engine.score_labels(paddle.gather(hidden.reshape([-1, hidden.shape[-1]]), index), targets)
        loss_sum, correct = -scores.logprobs.sum(), float(scores.greedy.sum())
        return loss_sum, {"nll": float(loss_sum), "answer_tokens": float(len(where)), "correct": correct}

    def after_step(self, stats: Stats) -> None:
        """Nothing to do."""

    def metrics(self, stats: Stats) -> dict[str, float]:
        """``perplexity`` and token ``accuracy`` over answer tokens."""
        tokens = max(1.0, float(stats["answer_tokens"]))
        mean = float(stats["nll"]) / tokens
        return {
            "perplexity": math.exp(mean) if mean < 700 else math.inf,
            "accuracy": float(stats["correct"]) / tokens,
        }

    def decode(self, batch: Batch) -> list[str]:
        """The rows' texts."""
        rows = zip(batch["input_ids"], batch["lengths"], strict=True)
        return [self.tokenizer.decode(ids[: int(length)].tolist()) for ids, length in rows]

    def save(self, folder: Path) -> None:
        """Write the model, its tokenizer and its prompt template."""
        self._save(folder)


def shifted_labels(batch: Batch) -> np.ndarray:
    """``labels[t + 1]`` at position ``t``: what each position has to predict; ``[rows, seq]`` int64, the last column
    ignored.

    In packed rows the first token of a segment is never a target (its label is ignored), so no position predicts across
    a border.
    """
    labels = batch["labels"]
    last = np.full([labels.shape[0], 1], IGNORE_INDEX, dtype=np.int64)
    shifted = np.concatenate([labels[:, 1:], last], axis=1)
    if "segment_ids" in batch:
        segments = batch["segment_ids"]
        border = np.concatenate([segments[:, 1:] != segments[:, :-1], np.ones([len(segments), 1], bool)], axis=1)
        shifted = np.where(border, IGNORE_INDEX, shifted)
    return shifted
