"""The data of reward and cost models: mixtures of preference data sets."""

from __future__ import annotations

import logging
from typing import Any

from alignment.arguments import RewardArguments
from alignment.log import say_once
from alignment.ppo.data import PreferenceDataset, PromptTemplate, SafetyPreferenceDataset, load_train_and_eval


def preference_sets(
    args: RewardArguments, tokenizer: Any, template: PromptTemplate, *, show_progress: bool
) -> dict[str, PreferenceDataset]:
    """Tokenise (or read from the cache) what the arguments ask for: ``"train"`` and ``"eval"``, where there are any.

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
    _warn_of_one_side(sets.get("train"))
    return sets


def _warn_of_one_side(train: PreferenceDataset | None) -> None:
    """Say it where all answers have the same safety label: then only one side of zero is learnt."""
    labels = train.summary.labels if train is not None else {}
    for kind, side in (("both safe", "below"), ("both unsafe", "above")):
        if labels and labels[kind] == sum(labels.values()):
            say_once(
                f"train: of every pair {kind.replace('both', 'both answers are')}, so all costs are pushed {side} 0, "
                "and their sign will not tell safe answers from unsafe ones",
                logging.WARNING,
            )
