"""Supervised fine-tuning: ``-sum log p(token)`` over the answers' tokens, divided by their number in the whole
optimizer step.

Rows are padded, or packed several to a row (``zero_padding``), where no token sees another sample's. Perplexity is
``exp`` of the mean over all evaluated tokens of all ranks, never a mean of perplexities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alignment.arguments import SFTArguments
from alignment.flow.row_method import Collated, RowData, RowMethod, Stats
from alignment.log import get_logger
from alignment.runtime import lazy

if TYPE_CHECKING:
    from paddle import Tensor

    from alignment.parallel import World
    from alignment.ppo.models import Rows

paddle = lazy("paddle")


class SFT(RowMethod):
    """Next-token loss on answers."""

    name = "sft"
    title = "SFT"
    summary = "supervised fine-tuning on dialogues and answers"
    Arguments = SFTArguments

    def load_model(self, world: World) -> Any:
        from alignment.flow.runner import lora_settings, model_flags
        from alignment.ppo.models import load_causal_lm

        args = self.args
        return load_causal_lm(
            args.model_name_or_path,
            dtype=args.dtype,
            config_overrides=model_flags(args),
            lora=lora_settings(args),
            topology=world.topology,
            role=self.label,
        )

    def build_data(self, tokenizer: Any, template: Any, show_progress: bool) -> RowData:
        from alignment.ppo.data import SupervisedDataset, load_train_and_eval, pack_supervised

        args = self.args

        def load(mixture: Any, name: str, evaluation: bool = False) -> SupervisedDataset:
            return SupervisedDataset(
                mixture,
                tokenizer,
                template=template,
                max_length=args.max_length,
                max_src_len=args.src_length,
                name=name,
                evaluation=evaluation,
                **args.data_options(show_progress),
            )

        sets = load_train_and_eval(
            load,
            *mixtures(args),
            ratio=args.eval_split_ratio,
            seed=args.seed,
            do_train=args.do_train,
            do_eval=args.do_eval,
        )
        if not args.zero_padding:
            return RowData(sets.get("train"), sets.get("eval"), sets)
        packs = {
            name: pack_supervised(list(rows), args.max_length, greedy=args.greedy_zero_padding)
            for name, rows in sets.items()
        }
        for name, packed in packs.items():
            if show_progress:
                get_logger().info("zero_padding: %d %s rows in %d packs", len(sets[name]), name, len(packed))
        return RowData(packs.get("train"), packs.get("eval"), sets)

    # -- a micro batch

    def collate(self, rows: Sequence[Any]) -> Collated:
        """Padded: ``input_ids, labels [rows, seq]``, ``lengths [rows]``; packed: ``segment_ids, position_ids [rows,
        seq]`` too.
        """
        from alignment.ppo.data import IGNORE_INDEX, collate_packed, collate_supervised

        pad_id = self.tokenizer.pad_token_id
        batch = (collate_packed if self.args.zero_padding else collate_supervised)(rows, pad_id)
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
        fixed = self.args.max_length if self.args.pad_to_max_length else 0
        multiple = self.args.pad_to_multiple_of or 1
        return math.ceil(max(width, fixed) / multiple) * multiple

    def count(self, batch: Collated) -> int:
        """Answer tokens that are predicted."""
        from alignment.ppo.data import IGNORE_INDEX

        return int((shifted_labels(batch) != IGNORE_INDEX).sum())

    def rows(self, batch: Collated) -> Rows:
        """The tokens; of packed rows also which sample each belongs to."""
        from alignment.ppo.models import Rows

        if "segment_ids" not in batch:
            return Rows(batch["input_ids"], lengths=batch["lengths"])
        return Rows(batch["input_ids"], batch["segment_ids"], batch["position_ids"], batch["lengths"])

    def loss(self, hidden: Tensor, batch: Collated) -> tuple[Tensor, Stats]:
        """Sum of ``-log p`` over answer tokens; stats: ``nll``, ``answer_tokens``, ``correct`` (greedy token right)."""
        from alignment.ppo.data import IGNORE_INDEX

        labels = shifted_labels(batch).reshape(-1)
        where = np.flatnonzero(labels != IGNORE_INDEX)
        index, targets = paddle.to_tensor(where), paddle.to_tensor(labels[where])
        # The vocabulary-wide head runs on answer positions only.
        scores = self.engine.score_labels(paddle.gather(hidden.reshape([-1, hidden.shape[-1]]), index), targets)
        loss_sum, correct = -scores.logprobs.sum(), float(scores.greedy.sum())
        self._newest = where // batch["labels"].shape[1], scores.logprobs.detach()
        return loss_sum, {"nll": float(loss_sum), "answer_tokens": float(len(where)), "correct": correct}

    def records(self, batch: Collated, stats: Mapping[str, float | np.ndarray]) -> list[dict[str, Any]]:
        """Each row (or pack) as the model read it, and the mean ``-log p`` of its answer tokens."""
        row, logprobs = self._newest
        count = np.bincount(row, minlength=len(batch["labels"]))
        total = np.bincount(row, -logprobs.numpy().astype(np.float64), len(batch["labels"]))
        return [
            {"text": text, "answer_tokens": int(tokens), "loss": float(nll) / max(1, int(tokens))}
            for text, tokens, nll in zip(self.decode(batch), count, total, strict=True)
        ]

    def metrics(self, stats: Mapping[str, float | np.ndarray]) -> dict[str, float]:
        """``perplexity`` and token ``accuracy`` over answer tokens."""
        tokens = max(1.0, float(stats["answer_tokens"]))
        mean = float(stats["nll"]) / tokens
        return {
            "perplexity": math.exp(mean) if mean < 700 else math.inf,
            "accuracy": float(stats["correct"]) / tokens,
        }


def mixtures(args: SFTArguments) -> tuple[Any, Any]:
    """The training and evaluation mixtures that the arguments mean: of a folder with ``train.json`` and ``dev.json``,
    or of registered data sets; the latter None where split off or missing.
    """
    name = args.dataset_name_or_path
    if not isinstance(name, str) or not Path(name).expanduser().exists():
        return name or args.train_datasets, args.eval_datasets
    mixture = {"jsonl": {"path": str(Path(name).expanduser())}}
    holds_both = Path(name).expanduser().is_dir() and args.eval_split_ratio is None
    return mixture, args.eval_datasets or (mixture if holds_both else None)


def shifted_labels(batch: Collated) -> np.ndarray:
    """``labels[t + 1]`` at position ``t``: what each position has to predict; ``[rows, seq]`` int64, the last column
    ignored.

    In packed rows the first token of a segment is never a target (its label is ignored), so no position predicts across
    a border.
    """
    from alignment.ppo.data import IGNORE_INDEX

    labels = batch["labels"]
    last = np.full([labels.shape[0], 1], IGNORE_INDEX, dtype=np.int64)
    shifted = np.concatenate([labels[:, 1:], last], axis=1)
    if "segment_ids" in batch:
        segments = batch["segment_ids"]
        border = np.concatenate([segments[:, 1:] != segments[:, :-1], np.ones([len(segments), 1], bool)], axis=1)
        shifted = np.where(border, IGNORE_INDEX, shifted)
    return shifted
