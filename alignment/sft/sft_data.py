"""The data of SFT: a folder with ``train.json`` and ``dev.json``, or mixtures of registered data sets; padded or
packed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignment.arguments import SFTArguments
from alignment.flow.runner import Data
from alignment.log import get_logger
from alignment.ppo.data import PromptTemplate, SupervisedDataset, load_train_and_eval, pack_supervised


def mixtures(args: SFTArguments) -> tuple[Any, Any]:
    """The training and evaluation mixtures that the arguments mean; the latter None where split off or missing."""
    name = args.dataset_name_or_path
    if not isinstance(name, str) or not Path(name).expanduser().exists():
        return name or args.train_datasets, args.eval_datasets
    mixture = {"jsonl": {"path": str(Path(name).expanduser())}}
    holds_both = Path(name).expanduser().is_dir() and args.eval_split_ratio is None
    return mixture, args.eval_datasets or (mixture if holds_both else None)


def build_data(args: SFTArguments, tokenizer: Any, template: PromptTemplate, *, show_progress: bool) -> Data:
    """Tokenise (or read from the cache) what the arguments ask for.

    Raises:
        DataError: see :class:`alignment.ppo.data.TokenizedDataset`.
    """

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
    train, evaluation = sets.get("train"), sets.get("eval")
    if not args.zero_padding:
        return Data(train, evaluation, sets)
    packs = {
        name: pack_supervised(list(rows), args.max_length, greedy=args.greedy_zero_padding)
        for name, rows in sets.items()
    }
    for name, packed in packs.items():
        if show_progress:
            get_logger().info("zero_padding: %d %s rows in %d packs", len(sets[name]), name, len(packed))
    return Data(packs.get("train"), packs.get("eval"), sets)
