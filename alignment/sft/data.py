"""The data of SFT: a folder with ``train.json`` and ``dev.json``, or mixtures of registered data sets; padded or
packed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignment.arguments import SFTArguments
from alignment.log import get_logger
from alignment.ppo.data import PromptTemplate, SupervisedDataset, pack_supervised, split_train_eval
from alignment.training.runner import Data


def mixtures(args: SFTArguments) -> tuple[Any, Any]:
    """The training and evaluation mixtures that the arguments mean; the latter None where split off or missing."""
    name = args.dataset_name_or_path
    is_folder = isinstance(name, str) and Path(name).expanduser().exists()
    if is_folder:
        train: Any = {"jsonl": {"path": str(Path(name).expanduser())}}
        holds_dev = Path(name).expanduser().is_dir() and args.eval_split_ratio is None
        evaluation: Any = args.eval_datasets or (
            {"jsonl": {"path": str(Path(name).expanduser()), "split": "dev"}} if holds_dev else None
        )
    else:
        train, evaluation = name or args.train_datasets, args.eval_datasets
    return train, evaluation if args.do_eval else None


def build_data(args: SFTArguments, tokenizer: Any, template: PromptTemplate, *, show_progress: bool) -> Data:
    """Tokenise (or read from the cache) what the arguments ask for.

    Raises:
        DataError: see :class:`alignment.ppo.data.TokenizedDataset`.
    """

    def load(mixture: Any, name: str) -> SupervisedDataset:
        return SupervisedDataset(
            mixture,
            tokenizer,
            template=template,
            max_length=args.max_length,
            max_src_len=args.src_length,
            overlong_prompts=args.overlong_prompts,
            overlong_answers=args.overlong_answers,
            skip_bad_rows=args.skip_bad_rows,
            seed=args.seed,
            cache_dir=args.data_cache_dir,
            num_proc=args.dataset_num_proc,
            show_progress=show_progress,
            name=name,
        )

    wanted_train, wanted_eval = mixtures(args)
    sets: dict[str, SupervisedDataset] = {}
    splits = args.do_eval and wanted_eval is None and args.eval_split_ratio is not None
    if args.do_train or splits:
        sets["train"] = load(wanted_train, "train")
    if splits:
        sets["train"], sets["eval"] = split_train_eval(sets["train"], args.eval_split_ratio, args.seed)
        if not args.do_train:
            del sets["train"]
    elif wanted_eval is not None:
        sets["eval"] = load(wanted_eval, "eval")
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
