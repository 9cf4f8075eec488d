"""Reward models from preferences, and cost models from safety labels (Christiano et al. 2017; Ouyang et al. 2022; Dai
et al. 2023).

A batch of pairs goes through the model once, better replies first, and the loss compares the halves, a mean over the
pairs of the whole optimizer step:

    reward: -log sigmoid(r_better - r_worse) + regularization (r_better^2 + r_worse^2)
    cost:   -log sigmoid(c_unsafer - c_safer) - log sigmoid(s_w c_w) - log sigmoid(s_l c_l)    s = +1 unsafe, -1 safe

With ``normalize_score_during_training`` the loss sees normalised scores. The normaliser learns once per optimizer step,
after it, from the raw end scores of all micro batches of all ranks (so the first step is not normalised): what it
learns does not depend on the layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from alignment.arguments import CostArguments, RewardArguments
from alignment.flow.row_method import Collated, RowData, RowMethod, Stats
from alignment.losses.pairwise import first_differences, pair_losses, token_losses
from alignment.rm.reward_metrics import cost_metrics, pair_metrics
from alignment.runtime import lazy

if TYPE_CHECKING:
    from paddle import Tensor

    from alignment.flow.loop import Loop
    from alignment.parallel import World

paddle = lazy("paddle")


class RewardModel(RowMethod):
    """A scalar score whose order is that of the preferences."""

    name = "reward"
    title = "reward model"
    summary = "train a reward model on preferences"
    Arguments = RewardArguments

    @property
    def label(self) -> str:
        return f"{self.args.score_type} model"

    def load_model(self, world: World) -> Any:
        from alignment.flow.runner import lora_settings, model_flags
        from alignment.ppo.models import load_score_model

        args = self.args
        return load_score_model(
            args.model_name_or_path,
            score_type=args.score_type,
            do_normalize=args.normalize_score_during_training,
            normalizer_type=args.normalizer_type,
            momentum=args.normalizer_momentum,
            dtype=args.dtype,
            config_overrides=model_flags(args),
            lora=lora_settings(args),
            topology=world.topology,
            seed=args.seed,
            new_head="trained" if args.do_train else "used",
            role=self.label,
        )

    def build_data(self, tokenizer: Any, template: Any, show_progress: bool) -> RowData:
        from alignment.rm.reward_data import preference_sets

        sets = preference_sets(self.args, tokenizer, template, show_progress=show_progress)
        return RowData(sets.get("train"), sets.get("eval"), sets)

    def begin(self, loop: Loop) -> None:
        from alignment.ppo.models import unwrap

        super().begin(loop)
        self._inner = unwrap(self.engine.model)
        self.normalizes = bool(self._inner.config.do_normalize)

    # -- a micro batch

    def collate(self, rows: Sequence[Any]) -> Collated:
        """See :func:`~alignment.ppo.data.collate_preference`."""
        from alignment.ppo.data import collate_preference

        return collate_preference(rows, self.tokenizer.pad_token_id)

    def row_tokens(self, row: Any) -> int:
        """Twice the longer reply's length: both are as wide."""
        return 2 * max(len(row["better_input_ids"]), len(row["worse_input_ids"]))

    def count(self, batch: Collated) -> int:
        """Pairs."""
        return len(batch["lengths"]) // 2

    def loss(self, hidden: Tensor, batch: Collated) -> tuple[Tensor, Stats]:
        """Sum over pairs of the loss; stats: ``chosen`` and ``rejected`` ``[pairs]`` end scores, of a cost model their
        signs too (``raw`` when normalising).
        """
        from alignment.ppo.models import scores_of

        lengths = batch["lengths"]
        pairs = len(lengths) // 2
        raw = scores_of(self.engine.model, hidden, raw=True)
        scores = self._inner.normalize(raw.unsqueeze(-1)).squeeze(-1)
        last = paddle.to_tensor(np.asarray(lengths, np.int64)[:, None] - 1)
        ends = paddle.take_along_axis(scores, last, axis=1).squeeze(1)
        signs = paddle.to_tensor(batch["signs"]).astype(scores.dtype) if "signs" in batch else None
        if self.args.loss_type == "token-wise":
            first = first_differences(batch["input_ids"], lengths)
            losses = token_losses(scores, lengths, first, self.args.regularization, signs)
        else:
            losses = pair_losses(ends, self.args.regularization, signs)
        values = ends.detach().numpy()
        stats: Stats = {"chosen": values[:pairs], "rejected": values[pairs:]}
        if signs is not None:
            stats.update(chosen_sign=batch["signs"][:pairs], rejected_sign=batch["signs"][pairs:])
        if self.normalizes:
            stats["raw"] = paddle.take_along_axis(raw.detach(), last, axis=1).squeeze(1).numpy()
        return losses.sum(), stats

    def records(self, batch: Collated, stats: Mapping[str, float | np.ndarray]) -> list[dict[str, Any]]:
        """Both replies of each pair, as the model read them, and their scores (costs)."""
        texts, pairs = self.decode(batch), self.count(batch)
        what = "cost" if "chosen_sign" in stats else "score"
        better, worse = ("safer", "unsafer") if what == "cost" else ("better", "worse")
        return [
            {
                better: texts[i],
                worse: texts[pairs + i],
                f"{what}_{better}": float(stats["chosen"][i]),  # type: ignore[index]
                f"{what}_{worse}": float(stats["rejected"][i]),  # type: ignore[index]
            }
            for i in range(pairs)
        ]

    def after_step(self, stats: Stats) -> None:
        """Let the normaliser learn from the step's raw scores over all ranks."""
        if not self.normalizes:
            return
        mine = stats.pop("raw", np.zeros([0], np.float32))
        everyone = self.world.all_gather_object(mine, "scores for the normaliser")
        self._inner.normalizer.update(np.concatenate(everyone))

    def metrics(self, stats: Mapping[str, float | np.ndarray]) -> dict[str, float]:
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


class CostModel(RewardModel):
    """A score whose sign says whether an answer is safe."""

    name = "cost"
    title = "cost model"
    summary = "train a cost model on safety labels"
    Arguments = CostArguments
