"""The stage of reward and cost models: a batch of pairs goes through the model once, better replies first, and the loss
compares the halves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from alignment.engine.engine import Engine
from alignment.flow.stage import Batch
from alignment.flow.stats import Stats
from alignment.losses.reward import first_differences, pair_losses, token_losses
from alignment.parallel import World
from alignment.ppo.data import collate_preference
from alignment.ppo.models import Rows, scores_of, unwrap
from alignment.rm.reward_metrics import cost_metrics, pair_metrics


class RewardStage:
    """What :class:`~alignment.flow.stage_trainer.StageTrainer` asks of reward modelling.

    Rows with ``signs`` (of a :class:`~alignment.ppo.data.SafetyPreferenceDataset`) train a cost model; the better reply
    is then the safer one.

    With ``normalize_score_during_training`` the loss sees normalised scores. The normaliser learns once per optimizer
    step, after it, from the raw end scores of all micro batches of all ranks (so the first step is not normalised):
    what it learns does not depend on the layout.

    Args:
        engine: the score model, to be trained.
        tokenizer: for pads and readable dumps.
        loss_type: "sequence-wise" or "token-wise".
        name: of the model, for messages.
        regularization: weight of the squared scores.
        save: writes model, tokenizer and template into a folder.
    """

    def __init__(
        self,
        engine: Engine,
        world: World,
        tokenizer: Any,
        *,
        loss_type: str = "sequence-wise",
        regularization: float = 0.001,
        name: str = "reward model",
        save: Callable[[Path], None],
    ) -> None:
        self.engine, self.world, self.tokenizer, self.name = engine, world, tokenizer, name
        self.loss_type, self.regularization = loss_type, regularization
        self._save = save
        self._inner = unwrap(engine.model)
        self.normalizes = bool(self._inner.config.do_normalize)

    def collate(self, rows: Sequence[Any]) -> Batch:
        """See :func:`~alignment.ppo.data.collate_preference`."""
        return collate_preference(rows, self.tokenizer.pad_token_id)

    def row_tokens(self, row: Any) -> int:
        """Twice the longer reply's length: both are as wide."""
        return 2 * max(len(row["better_input_ids"]), len(row["worse_input_ids"]))

    def count(self, batch: Batch) -> int:
        """Pairs."""
        return len(batch["lengths"]) // 2

    def tokens(self, batch: Batch) -> int:
        """Real tokens of both replies."""
        return int(batch["lengths"].sum())

    def rows(self, batch: Batch) -> Rows:
        """Both replies' tokens."""
        return Rows(batch["input_ids"], lengths=batch["lengths"])

    def loss(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
        """Sum over pairs of the loss; stats: ``chosen`` and ``rejected`` ``[pairs]`` end scores, of a cost model their
        signs too (``raw`` when normalising).
        """
        lengths = batch["lengths"]
        pairs = len(lengths) // 2
        raw = scores_of(self.engine.model, hidden, raw=True)
        scores = self._inner.normalize(raw.unsqueeze(-1)).squeeze(-1)
        last = paddle.to_tensor(np.asarray(lengths, np.int64)[:, None] - 1)
        ends = paddle.take_along_axis(scores, last, axis=1).squeeze(1)
        signs = paddle.to_tensor(batch["signs"]).astype(scores.dtype) if "signs" in batch else None
        if self.loss_type == "token-wise":
            first = first_differences(batch["input_ids"], lengths)
            losses = token_losses(scores, lengths, first, self.regularization, signs)
        else:
            losses = pair_losses(ends, self.regularization, signs)
        values = ends.detach().numpy()
        stats: Stats = {"chosen": values[:pairs], "rejected": values[pairs:]}
        if signs is not None:
            stats.update(chosen_sign=batch["signs"][:pairs], rejected_sign=batch["signs"][pairs:])
        if self.normalizes:
            stats["raw"] = paddle.take_along_axis(raw.detach(), last, axis=1).squeeze(1).numpy()
        return losses.sum(), stats

    def after_step(self, stats: Stats) -> None:
        """Let the normaliser learn from the step's raw scores over all ranks."""
        if not self.normalizes:
            return
        mine = stats.pop("raw", np.zeros([0], np.float32))
        everyone = self.world.all_gather_object(mine, "scores for the normaliser")
        self._inner.normalizer.update(np.concatenate(everyone))

    def metrics(self, stats: Stats) -> dict[str, float]:
        """See :func:`~alignment.rm.reward_metrics.pair_metrics` and :func:`~alignment.rm.reward_metrics.cost_metrics`;
        with a normaliser its mean and spread too.
        """
        both = (stats["chosen"], stats["rejected"])
        if "chosen_sign" in stats:
            result = cost_metrics(*both, stats["chosen_sign"], stats["rejected_sign"])  # type: ignore[arg-type]
        else:
            result = pair_metrics(*both)  # type: ignore[arg-type]
        if self.normalizes:
            result["normalizer_mean"] = float(self._inner.normalizer.mean.numpy()[0])
            result["normalizer_std"] = float(np.sqrt(self._inner.normalizer.var.numpy()[0]))
        return result

    def decode(self, batch: Batch) -> list[str]:
        """The rows' texts, better replies first."""
        rows = zip(batch["input_ids"], batch["lengths"], strict=True)
        return [self.tokenizer.decode(ids[:length].tolist()) for ids, length in rows]

    def save(self, folder: Path) -> None:
        """Write the model, its tokenizer and its prompt template."""
        self._save(folder)
