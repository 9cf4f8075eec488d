"""The data of reward and cost models: mixtures of preference data sets."""

from __future__ import annotations

from typing import Any

from alignment.arguments import RewardArguments
from alignment.flow.runner import Data
from alignment.ppo.data import PreferenceDataset, PromptTemplate, SafetyPreferenceDataset, load_train_and_eval


def build_data(args: RewardArguments, tokenizer: Any, template: PromptTemplate, *, show_progress: bool) -> Data:
    """Tokenise (or read from the cache) what the arguments ask for.

    Raises:
        DataError: see :class:`alignment.ppo.data.TokenizedDataset`.
    """

    kind = SafetyPreferenceDataset if args.score_type == "cost" else PreferenceDataset

    def load(mixture: Any, name: str, evaluation: bool = False) -> PreferenceDataset:
        return kind(
            mixture,
            tokenizer,
            template=template,
            max_length=args.max_length,
            max_src_len=args.max_src_len,
            name=name,
            evaluation=evaluation,
            **args.data_options(show_progress),
        )

    sets = load_train_and_eval(
        load,
        args.train_datasets,
        args.eval_datasets,
        ratio=args.eval_split_ratio,
        seed=args.seed,
        do_train=args.do_train,
        do_eval=args.do_eval,
    )
    return Data(sets.get("train"), sets.get("eval"), sets)
