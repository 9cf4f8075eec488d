"""Training rows and evaluation rows are kept apart."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignment.errors import DataError
from alignment.ppo.data import (
    PreferenceDataset,
    PromptOnlyDataset,
    RawDataset,
    SupervisedDataset,
    load_train_and_eval,
    split_train_eval,
)
from alignment.ppo.data.read_mixture import Samples
from alignment.ppo.data.splits import warn_of_shared_prompts

KINDS = (SupervisedDataset, PreferenceDataset, PromptOnlyDataset)
Loader = Callable[..., Any]


def pair(prompt: str, number: int = 0, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": f"good {number}", "rejected": f"bad {number}", **more}


@pytest.fixture
def said() -> Iterator[list[str]]:
    texts: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    from alignment import log

    log._SAID.clear()
    handler = Keep()
    log.get_logger().addHandler(handler)
    yield texts
    log.get_logger().removeHandler(handler)


@pytest.fixture(params=KINDS)
def load(request: pytest.FixtureRequest, tokenizer: Any) -> Loader:
    """``load(mixture, name, evaluation=False)`` for each kind of data set."""

    def build(mixture: Any, name: str = "train", evaluation: bool = False, **more: Any) -> Any:
        how = {"max_length": 64, "show_progress": False, "name": name, "evaluation": evaluation, **more}
        return request.param(mixture, tokenizer, **how)

    return build


def prompts(dataset: Any) -> set[int]:
    return set(dataset.prompt_ids().tolist())


# -------------------------------------------------------------------- a held-out part


def test_a_held_out_part_shares_no_prompt_with_training(load: Loader, write_rows: Callable[..., Path]) -> None:
    """P14: rows of six annotators to each prompt were split row by row: held-out accuracy 0.94 for labels that nothing
    but memory can tell.
    """
    rows = [
        pair(f"question {number}", annotator, annotator=annotator) for annotator in range(6) for number in range(40)
    ]
    dataset = load(f"jsonl::{write_rows('a.jsonl', *rows)}")
    train, evaluation = split_train_eval(dataset, 0.2, seed=1)
    assert not prompts(train) & prompts(evaluation)
    assert (len(prompts(train)), len(prompts(evaluation))) == (32, 8)
    assert len(train) + len(evaluation) == len(dataset)


def test_a_split_follows_from_the_prompts_and_not_from_their_order(
    load: Loader, write_rows: Callable[..., Path]
) -> None:
    rows = [pair(f"question {number}") for number in range(20)]
    parts = [
        prompts(split_train_eval(load(f"jsonl::{write_rows(name, *order)}"), 0.25, seed=3)[1])
        for name, order in (("a.jsonl", rows), ("b.jsonl", rows[::-1]))
    ]
    assert parts[0] == parts[1] and len(parts[0]) == 5
    other = split_train_eval(load(f"jsonl::{write_rows('c.jsonl', *rows)}"), 0.25, seed=4)[1]
    assert prompts(other) != parts[0]


def test_conversations_with_the_same_first_question_stay_together(
    tokenizer: Any, write_rows: Callable[..., Path]
) -> None:
    """Every answer of a conversation is trained, so that a row with more turns shows the answer of a shorter one."""

    def turns(count: int, first: str) -> dict[str, Any]:
        ask = lambda n: {"role": "user", "content": first if n == 0 else f"{first} more {n}"}  # noqa: E731
        return {"messages": [m for n in range(count) for m in (ask(n), {"role": "assistant", "content": f"a {n}"})]}

    rows = [turns(count, f"first {number}") for number in range(6) for count in (1, 2, 3)]
    path = write_rows("a.jsonl", *rows)
    dataset = SupervisedDataset(f"jsonl::{path}", tokenizer, max_length=128, show_progress=False)
    train, evaluation = split_train_eval(dataset, 0.5)
    assert (len(train), len(evaluation)) == (9, 9) and not prompts(train) & prompts(evaluation)


def test_held_out_rows_do_not_depend_on_whether_a_run_evaluates(load: Loader, write_rows: Callable[..., Path]) -> None:
    path = write_rows("a.jsonl", *(pair(f"question {number}") for number in range(20)))
    how = {"train": f"jsonl::{path}", "evaluation": None, "ratio": 0.25, "seed": 0}
    both, train = load_train_and_eval(load, **how), load_train_and_eval(load, **how, do_eval=False)
    assert set(both) == {"train", "eval"} and set(train) == {"train"}
    assert both["train"].rows_hash == train["train"].rows_hash
    only = load_train_and_eval(load, **how, do_train=False)
    assert set(only) == {"eval"} and only["eval"].rows_hash == both["eval"].rows_hash


# -------------------------------------------------------------------- evaluation data of one's own


@pytest.mark.parametrize("names", [("train", "test"), ("train", "validation", "test")])
def test_one_folder_for_both_reads_two_splits(load: Loader, write_rows: Callable[..., Path], names: tuple[str]) -> None:
    """D4: evaluation read the training rows."""
    for name in names:
        path = write_rows(f"d/{name}.jsonl", *(pair(f"{name} {number}") for number in range(4)))
    sets = load_train_and_eval(load, f"jsonl::{path.parent}", f"jsonl::{path.parent}", ratio=None, seed=0)
    (read,) = sets["eval"].reads
    assert Path(read).stem == names[1] and not prompts(sets["train"]) & prompts(sets["eval"])


@pytest.mark.parametrize(
    "written", ["jsonl:0.5:{0}/train.jsonl", "jsonl::{0}/*.jsonl", "{0}", "Jsonfile::{0}/../d/train.jsonl"]
)
def test_evaluation_on_the_training_rows_is_refused(
    load: Loader, write_rows: Callable[..., Path], written: str
) -> None:
    """D4: however they are named."""
    name = "d/rows.jsonl" if written == "{0}" else "d/train.jsonl"  # a folder is read whole if it has no splits
    path = write_rows(name, *(pair(f"q {number}") for number in range(4)))
    with pytest.raises(DataError, match=r"trained on: .*\(eval\) and .*\(train\) are both .*\.jsonl.*eval_split_ratio"):
        load_train_and_eval(load, f"jsonl::{path}", written.format(path.parent), ratio=None, seed=0)


def test_a_data_set_of_ones_own_is_refused_by_its_name(load: Loader, registry: None) -> None:
    class Mine(RawDataset):
        NAME = "mine"

        def __init__(self, half: int = 0) -> None:
            self.half = half

        def __getitem__(self, index: int) -> Any:
            return {"input": f"{self.half} {index}", "answer": "a", "other_answer": "b", "better": True}

        def __len__(self) -> int:
            return 3

    with pytest.raises(DataError, match=r"'mine' \(eval\) and 'mine' \(train\)"):
        load_train_and_eval(load, "mine", "mine:0.5", ratio=None, seed=0)
    load_train_and_eval(load, {"mine": {"half": 0}}, {"mine": {"half": 1}}, ratio=None, seed=0)


def test_prompts_that_both_have_are_counted_and_said(
    load: Loader, write_rows: Callable[..., Path], said: list[str]
) -> None:
    """P14: of evaluation data that the user gives."""
    train = write_rows("train.jsonl", *(pair(f"q {number}") for number in range(10)))
    other = write_rows("other.jsonl", *(pair(f"q {number}", 7) for number in range(8, 14)))
    load_train_and_eval(load, f"jsonl::{train}", f"jsonl::{other}", ratio=None, seed=0)
    assert [text for text in said if text.startswith("2 of 6 rows of 'eval' have a prompt that is in 'train' too")]


def test_prompts_are_compared_across_kinds(tokenizer: Any, write_rows: Callable[..., Path], said: list[str]) -> None:
    """The supervised rows of PPO's ptx loss are trained on, too."""
    how = {"max_length": 64, "show_progress": False}
    ptx = SupervisedDataset(f"jsonl::{write_rows('s.jsonl', {'src': 'q 1', 'tgt': 'a'})}", tokenizer, name="ptx", **how)
    path = write_rows("p.jsonl", {"prompt": "q 0"}, {"prompt": "q 1"})
    warn_of_shared_prompts(ptx, PromptOnlyDataset(f"jsonl::{path}", tokenizer, name="eval", **how))
    assert "1 of 2 rows of 'eval' have a prompt that is in 'ptx' too" in said[-1]


# -------------------------------------------------------------------- rows that say the same


@pytest.mark.parametrize("kind", [SupervisedDataset, PreferenceDataset])
def test_equal_prompt_and_answers_are_duplicates_whatever_stands_beside(
    tokenizer: Any, write_rows: Callable[..., Path], said: list[str], kind: type
) -> None:
    """P14: the table said "duplicates 0", though only the annotator (and the label) differed."""
    rows = [{**pair(f"q {number}"), "annotator": who} for who in range(3) for number in range(4)]
    swapped = {"prompt": "q 0", "chosen": "bad 0", "rejected": "good 0"}
    path = write_rows("a.jsonl", *rows, swapped, pair("q 0", 5))
    dataset = kind(f"jsonl::{path}", tokenizer, max_length=64, show_progress=False, name="train")
    assert dataset.summary.sources[0].duplicates == 9 and len(dataset) == 14
    assert "train: 9 of 14 rows have the prompt and the answers of an earlier row; they stay in" in said


# -------------------------------------------------------------------- the hash of the token rows


def test_the_hash_is_of_the_rows_that_are_trained(load: Loader, write_rows: Callable[..., Path]) -> None:
    """D11"""
    rows = [pair(f"question {number}") for number in range(6)]
    first = load(f"jsonl::{write_rows('a.jsonl', *rows)}")
    assert load(f"jsonl::{write_rows('b.jsonl', *rows)}").rows_hash == first.rows_hash
    assert load(f"jsonl::{write_rows('c.jsonl', *rows[::-1])}").rows_hash != first.rows_hash
    changed = [*rows[:5], pair("question 6")]
    assert load(f"jsonl::{write_rows('d.jsonl', *changed)}").rows_hash != first.rows_hash
    bad = load(f"jsonl::{write_rows('e.jsonl', *rows, '{')}", skip_bad_rows=True)
    assert bad.rows_hash == first.rows_hash  # what was dropped was not trained
    assert first.select(range(5)).rows_hash != first.rows_hash
    assert first.mixture_record()["hash"] == first.rows_hash


def test_a_reward_column_is_part_of_the_hash_of_prompts(tokenizer: Any, write_rows: Callable[..., Path]) -> None:
    """D11: the answer that a reward compares with is what the policy learns."""
    hashes = set()
    for number, answer in enumerate((41, 42)):
        path = write_rows(f"{number}.jsonl", {"prompt": "q", "answer": answer})
        hashes.add(PromptOnlyDataset(f"jsonl::{path}", tokenizer, max_length=64, show_progress=False).rows_hash)
    assert len(hashes) == 2


# -------------------------------------------------------------------- memory


def test_rows_of_files_are_not_kept(tokenizer: Any, write_rows: Callable[..., Path], monkeypatch: Any) -> None:
    """D21: a folder may be larger than memory: of its text only the block in use is there."""
    path = write_rows("a.jsonl", *(pair(f"question {number}", text="x" * 10) for number in range(20)))
    seen: list[Samples] = []
    init = Samples.__init__
    monkeypatch.setattr(Samples, "__init__", lambda self, *args: (seen.append(self), init(self, *args))[1])
    SupervisedDataset(f"jsonl::{path}", tokenizer, max_length=64, show_progress=False)
    (samples,) = seen
    assert not any(one.samples for one in samples.loaded) and samples[3]["input"] == "question 3"


def test_a_large_file_costs_its_lines_ends_alone(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "large.jsonl"
    line = json.dumps(pair("q" * 1000)) + "\n"
    path.write_text(line * 20_000)  # 21 MB
    tracemalloc.start()
    data = RawDataset.load("jsonl", path=path)
    lengths = {len(data[number]["input"]) for number in range(0, 20_000, 100)}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lengths == {1000} and peak < 4e6
    assert np.asarray(data.rows.parts[0].numbers)[-1] == 20_000
