"""The data of reward modelling: mixtures of preference data sets."""

from __future__ import annotations

from typing import Any

from alignment.arguments import RewardArguments
from alignment.ppo.data import PreferenceDataset, PromptTemplate, split_train_eval
from alignment.training.runner import Data


def build_data(args: RewardArguments, tokenizer: Any, template: PromptTemplate, *, show_progress: bool) -> Data:
    """Tokenise (or read from the cache) what the arguments ask for.

    Raises:
        DataError: see :class:`alignment.ppo.data.TokenizedDataset`.
    """

    def load(mixture: Any, name: str) -> PreferenceDataset:
        return PreferenceDataset(
            mixture,
            tokenizer,
            template=template,
            max_length=args.max_length,
            max_src_len=args.max_src_len,
            overlong_prompts=args.overlong_prompts,
            overlong_answers=args.overlong_answers,
            skip_bad_rows=args.skip_bad_rows,
            seed=args.seed,
            cache_dir=args.data_cache_dir,
            num_proc=args.dataset_num_proc,
            show_progress=show_progress,
            name=name,
        )

    sets: dict[str, PreferenceDataset] = {}
    splits = args.do_eval and not args.eval_datasets and args.eval_split_ratio is not None
    if args.do_train or splits:
        sets["train"] = load(args.train_datasets, "train")
    if splits:
        sets["train"], sets["eval"] = split_train_eval(sets["train"], args.eval_split_ratio, args.seed)
        if not args.do_train:
            del sets["train"]
    elif args.do_eval and args.eval_datasets:
        sets["eval"] = load(args.eval_datasets, "eval")
    return Data(sets.get("train"), sets.get("eval"), sets)
