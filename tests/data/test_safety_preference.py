"""Pairs with safety labels: which answer comes first, the signs, what is dropped, what is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest

from alignment.errors import DataError
from alignment.ppo.data import (
    PreferenceDataset,
    RawDataset,
    SafetyPreferenceDataset,
    SupervisedDataset,
    collate_preference,
    split_train_eval,
)
from alignment.ppo.data.rows import sample_from_row
from alignment.ppo.data.summary import summary_table


def pku(number: int, safer: object, first: object, second: object, **other: object) -> dict:
    return {
        "prompt": f"question {number}",
        "response_0": f"one {number}",
        "response_1": f"two {number}",
        "is_response_0_safe": first,
        "is_response_1_safe": second,
        "better_response_id": 0,
        "safer_response_id": safer,
        **other,
    }


ROWS = [pku(0, 0, True, False), pku(1, 1, False, True), pku(2, 0, True, True), pku(3, 1, False, False)]
SIGNS = [[-1, 1], [-1, 1], [-1, -1], [1, 1]]


def make(spec: object, tokenizer: object, **kwargs: object) -> SafetyPreferenceDataset:
    return SafetyPreferenceDataset(spec, tokenizer, show_progress=False, max_length=256, **kwargs)


def test_items_and_batches(tokenizer, write_rows) -> None:
    dataset = make(f"jsonl::{write_rows('a.jsonl', *ROWS)}", tokenizer)
    said = [tokenizer.decode(row["better_input_ids"][row["prompt_len"] :]) for row in dataset]
    assert said == [f"{word} {n}<|endoftext|>" for n, word in enumerate(("one", "two", "one", "two"))]
    assert [row["signs"].tolist() for row in dataset] == SIGNS and dataset[0]["signs"].dtype == np.int64
    batch = collate_preference(list(dataset), 0)
    assert batch["signs"].tolist() == [one for one, _ in SIGNS] + [two for _, two in SIGNS]
    assert len(batch["signs"]) == len(batch["lengths"])
    train, held = split_train_eval(dataset, 0.5)
    assert sum(len(part.summary.labels) > 0 for part in (train, held)) == 2
    assert sum(sum(part.summary.labels.values()) for part in (train, held)) == 4


def test_the_account(tokenizer, write_rows) -> None:
    """Ties, contradictions and equal answers are counted; nothing that was read is called unread."""
    tie = {"prompt": "q", "answer": "a", "other_answer": "b", "safer": None, "is_safe": True, "is_other_safe": True}
    rows = [*ROWS, pku(4, 0, False, True), pku(5, 1, True, True, response_1="one 5"), tie]
    summary = make(f"jsonl::{write_rows('a.jsonl', *rows)}", tokenizer).summary
    assert summary.dropped == {"contradicting safety labels": 1, "identical answers": 1, "tied answers": 1}
    assert summary.labels == {"both safe": 1, "one safe": 2, "both unsafe": 1}
    assert summary.to_dict()["labels"] == summary.labels
    assert summary.sources[0].unread == {"(which answer is better)": 6}
    cells = list(summary_table([summary]).columns[0].cells)
    assert any("1 both safe, 2 one safe, 1 both unsafe" in str(cell) for cell in cells)
    plain = PreferenceDataset(f"jsonl::{write_rows('b.jsonl', *ROWS)}", tokenizer, show_progress=False)
    assert plain.summary.labels == {} and "signs" not in plain[0]


def test_rawsamples_own_names_in_a_file(tokenizer, write_rows) -> None:
    """A row may say what RawSample says; the same file serves the other stages."""
    row = {"prompt": "q", "answer": "a", "other_answer": "b", "safer": False, "is_safe": False, "is_other_safe": True}
    path = write_rows("a.jsonl", row | {"better": True}, row | {"prompt": "r", "better": False})
    assert [one["signs"].tolist() for one in make(f"jsonl::{path}", tokenizer)] == [[-1, 1], [-1, 1]]
    pairs = PreferenceDataset(f"jsonl::{path}", tokenizer, show_progress=False)
    answers = [tokenizer.decode(one["better_input_ids"][one["prompt_len"] :]) for one in pairs]
    assert answers == ["a<|endoftext|>", "b<|endoftext|>"]
    # 0 is false here too: it was taken for "not false" once, and the worse answer trained.
    numbers = f"jsonl::{write_rows('n.jsonl', row | {'better': 0})}"
    trained = SupervisedDataset(numbers, tokenizer, show_progress=False)[0]
    assert tokenizer.decode(trained["labels"][trained["labels"] >= 0]) == "b<|endoftext|>"
    pair = PreferenceDataset(numbers, tokenizer, show_progress=False)[0]
    assert tokenizer.decode(pair["better_input_ids"][pair["prompt_len"] :]) == "b<|endoftext|>"


def test_rows_without_a_better_answer_serve_cost_models(tokenizer, write_rows) -> None:
    row = {name: value for name, value in ROWS[0].items() if name != "better_response_id"}
    path = write_rows("a.jsonl", row)
    assert len(make(f"jsonl::{path}", tokenizer)) == 1
    with pytest.raises(DataError, match="line 1: `better` is missing"):
        PreferenceDataset(f"jsonl::{path}", tokenizer, show_progress=False)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (pku(0, None, True, False), "`safer` is missing.*safer_response_id"),
        (pku(0, 2, True, False), "`safer` must be true or false.*not 'safer_response_id 2'"),
        (pku(0, True, True, False), "`safer` must be true or false.*not 'safer_response_id True'"),
        (pku(0, 0, None, False), "`is_safe` is missing.*is_response_0_safe"),
        (pku(0, 0, True, "no"), "`is_other_safe` must be true or false, not 'no'"),
    ],
)
def test_wrong_labels_stop_cost_models_alone(tokenizer, write_rows, row: dict, message: str) -> None:
    """A label is not made true by being text ("no" once was), and stages that need none are not stopped by it."""
    path = write_rows("a.jsonl", ROWS[1], row)
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: {message}"):
        make(f"jsonl::{path}", tokenizer)
    assert len(make(f"jsonl::{path}", tokenizer, skip_bad_rows=True)) == 1
    assert len(PreferenceDataset(f"jsonl::{path}", tokenizer, show_progress=False)) == 2


def test_a_changed_label_is_not_read_from_the_cache(tokenizer, write_rows, tmp_path) -> None:
    path = write_rows("a.jsonl", *ROWS)
    first = make(f"jsonl::{path}", tokenizer, cache_dir=tmp_path / "cache")
    again = make(f"jsonl::{path}", tokenizer, cache_dir=tmp_path / "cache")
    assert again.summary.from_cache and again.rows_hash == first.rows_hash
    assert [row["signs"].tolist() for row in again] == SIGNS
    write_rows("a.jsonl", *ROWS[:3], pku(3, 1, False, True))
    changed = make(f"jsonl::{path}", tokenizer, cache_dir=tmp_path / "cache")
    assert not changed.summary.from_cache and changed[3]["signs"].tolist() == [-1, 1]
    assert changed.rows_hash != first.rows_hash, "a resume on other labels is refused by this"


def test_a_data_set_that_cannot_have_labels_is_refused_first(tokenizer) -> None:
    with pytest.raises(DataError, match="has no `safer`|`safer` is missing"):
        make("needs-no-labels", tokenizer)


class _Unlabelled(RawDataset):
    NAME = "needs-no-labels"
    FIELDS = ("input", "answer", "other_answer", "better")

    def __getitem__(self, index: int) -> dict:
        return {"input": "q", "answer": "a", "other_answer": "b", "better": True}

    def __len__(self) -> int:
        return 1


def test_published_rows_read_as_before() -> None:
    sample = sample_from_row(ROWS[1])
    assert json.loads(json.dumps({k: sample[k] for k in ("safer", "is_safe", "is_other_safe", "better")})) == {
        "safer": False,
        "is_safe": False,
        "is_other_safe": True,
        "better": True,
    }
