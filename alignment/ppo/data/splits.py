"""Training rows and evaluation rows, kept apart."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from alignment.errors import DataError
from alignment.log import say_once
from alignment.ppo.data.base import split_indices
from alignment.ppo.data.tokenized import TokenizedDataset

_Set = TypeVar("_Set", bound=TokenizedDataset)


def load_train_and_eval(
    load: Callable[..., _Set],
    train: Any,
    evaluation: Any,
    *,
    ratio: float | None,
    seed: int,
    do_train: bool = True,
    do_eval: bool = True,
    check: bool = True,
) -> dict[str, _Set]:
    """Load the training data, and evaluation data that are not among them.

    Args:
        load: ``load(mixture, name, evaluation=False)`` tokenises a mixture.
        train: the training mixture.
        evaluation: the evaluation mixture; None or empty: ``ratio`` of the training data is held out. It is held out
            without ``do_eval`` too, so that the training rows do not depend on whether a run evaluates.
        ratio: see :func:`split_train_eval`; None holds nothing out.
        seed: of the split.
        do_train, do_eval: which of the two are wanted.
        check: compare the two, see :func:`check_held_out`; pointless where nothing is trained.

    Returns:
        "train" and "eval", where wanted.

    Raises:
        DataError: the data cannot be used, or evaluation would read the training rows.
    """
    splits = not evaluation and ratio is not None
    sets: dict[str, _Set] = {}
    if do_train or (splits and do_eval):
        sets["train"] = load(train, "train")
    if splits and sets:
        sets["train"], sets["eval"] = split_train_eval(sets["train"], ratio, seed)  # type: ignore[arg-type]
    elif evaluation and do_eval:
        sets["eval"] = load(evaluation, "eval", evaluation=True)
        if do_train and check:
            check_held_out(sets["train"], sets["eval"])
    wanted = {"train": do_train, "eval": do_eval}
    return {name: dataset for name, dataset in sets.items() if wanted[name]}


def split_train_eval(dataset: _Set, ratio: float, seed: int = 42) -> tuple[_Set, _Set]:
    """Split a tokenised data set into a train and an evaluation part (``eval_split_ratio``).

    No prompt is on both sides: all rows with the same prompt go to the same part. Which part follows from the prompt's
    text and the seed alone, not from the order of rows.

    Args:
        dataset: to split.
        ratio: the evaluation part's share of the distinct prompts, between 0 and 1, both excluded.
        seed: of the choice.

    Raises:
        DataError: the ratio is out of range or there are fewer than two distinct prompts.
    """
    prompts = dataset.prompt_ids()
    distinct = sorted(np.unique(prompts).tolist(), key=lambda one: hashlib.sha256(f"{seed} {one}".encode()).digest())
    if len(distinct) < 2:
        raise DataError(
            f"eval_split_ratio: {dataset.name!r} has {len(distinct)} distinct prompt, and no prompt may be on both "
            "sides of a split; give eval_datasets instead"
        )
    _, chosen = split_indices(len(distinct), ratio, seed=None)
    is_eval = np.isin(prompts, np.array([distinct[number] for number in chosen], dtype=np.uint64))
    train = dataset.select(np.flatnonzero(~is_eval))
    return train, dataset.select(np.flatnonzero(is_eval), f"{dataset.name} (split off)")


def check_held_out(train: TokenizedDataset, evaluation: TokenizedDataset) -> None:
    """Refuse an evaluation that reads the files (or data sets) that are trained on; count and say the prompts that both
    have.

    Raises:
        DataError: both read the same.
    """
    same = [name for name in evaluation.reads if name in train.reads]
    if same:
        raise DataError(
            f"evaluation would read the rows that are trained on: {evaluation.reads[same[0]]!r} ({evaluation.name}) "
            f"and {train.reads[same[0]]!r} ({train.name}) are both {same[0]}. Give eval_datasets other rows, or leave "
            "it out and set eval_split_ratio to hold some out"
        )
    warn_of_shared_prompts(train, evaluation)


def warn_of_shared_prompts(train: TokenizedDataset, evaluation: TokenizedDataset) -> None:
    """Say how many evaluation rows have a prompt that is trained on."""
    shared = int(np.isin(evaluation.prompt_ids(), train.prompt_ids()).sum())
    if shared:
        say_once(
            f"{shared} of {len(evaluation)} rows of {evaluation.name!r} have a prompt that is in {train.name!r} too: "
            "their figures tell what was learnt by heart, too",
            logging.WARNING,
        )
