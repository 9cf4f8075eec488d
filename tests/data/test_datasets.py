"""The three tokenised data sets: mixing, the account of every row, the cache, real files."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import numpy as np
import pytest
import rich

from alignment.errors import DataError
from alignment.ppo.data import (
    PreferenceDataset,
    PromptOnlyDataset,
    RawDataset,
    SupervisedDataset,
    TokenizedDataset,
    split_train_eval,
    workers,
)

from .conftest import CHATML, load, make_bpe

KINDS = (SupervisedDataset, PreferenceDataset, PromptOnlyDataset)


def pair(number: int) -> dict:
    return {"prompt": f"question {number}", "chosen": f"good {number}", "rejected": f"bad {number}", "level": number}


def make(kind: type[TokenizedDataset], spec, tokenizer, **kwargs) -> TokenizedDataset:
    return kind(spec, tokenizer, show_progress=False, **({"max_length": 256} | kwargs))


def texts(dataset: TokenizedDataset, tokenizer) -> list[str]:
    key = "better_input_ids" if isinstance(dataset, PreferenceDataset) else "input_ids"
    return [tokenizer.decode(row[key]) for row in dataset]


@pytest.fixture
def pairs(write_rows) -> Path:
    return write_rows("pairs.jsonl", *(pair(number) for number in range(10)))


@pytest.fixture
def warnings_said(caplog):
    """The package's logger does not hand its records on; listen to it directly."""
    logger = logging.getLogger("alignment")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


# -------------------------------------------------------------------- items


def test_supervised_items(tokenizer, pairs):
    dataset = make(SupervisedDataset, f"jsonl::{pairs}", tokenizer)
    row = dataset[3]
    assert set(row) == {"input_ids", "labels"} and {array.dtype for array in row.values()} == {np.dtype(np.int64)}
    assert tokenizer.decode(row["labels"][row["labels"] >= 0]) == "good 3<|endoftext|>"
    learned = row["labels"] != -100
    assert (row["labels"][learned] == row["input_ids"][learned]).all() and not learned[0] and learned[-1]


def test_preference_items(tokenizer, pairs):
    row = make(PreferenceDataset, f"jsonl::{pairs}", tokenizer)[3]
    prompt = row["prompt_len"]
    assert tokenizer.decode(row["better_input_ids"][prompt:]) == "good 3<|endoftext|>"
    assert tokenizer.decode(row["worse_input_ids"][prompt:]) == "bad 3<|endoftext|>"
    assert row["better_input_ids"].dtype == np.int64 and isinstance(prompt, int)
    assert (row["better_input_ids"][:prompt] == row["worse_input_ids"][:prompt]).all()


def test_prompt_items(tokenizer, pairs):
    dataset = make(PromptOnlyDataset, f"jsonl::{pairs}", tokenizer)
    row = dataset[3]
    assert row["prompt"] == "question 3" and row["source"] == "jsonl" and row["index"] == 3
    assert row["row"] == {**pair(3), "input": "question 3", "answer": "good 3", "other_answer": "bad 3", "better": True}
    assert tokenizer.decode(row["input_ids"]) == "BEGINNING OF CONVERSATION: USER: question 3 ASSISTANT:"
    supervised = make(SupervisedDataset, f"jsonl::{pairs}", tokenizer)[3]["input_ids"]
    assert supervised[: len(row["input_ids"])].tolist() == row["input_ids"].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_data_set_is_a_sequence(tokenizer, pairs, kind):
    dataset = make(kind, f"jsonl::{pairs}", tokenizer)
    assert len(dataset) == len(list(dataset)) == 10
    assert texts(dataset, tokenizer)[-1] == texts(dataset.select([9]), tokenizer)[0]
    assert str(dataset[-1]) == str(dataset[9]) == str(dataset[np.int64(9)])
    with pytest.raises(IndexError):
        dataset[10]


def test_other_templates(chat_tokenizer, pairs):
    for spec in ("chat", CHATML):
        dataset = make(PromptOnlyDataset, f"jsonl::{pairs}", chat_tokenizer, template=spec)
        assert texts(dataset, chat_tokenizer)[0] == "<|im_start|>user\nquestion 0<|im_end|>\n<|im_start|>assistant\n"


# -------------------------------------------------------------------- mixing


def test_proportions_copies_and_exact_counts(tokenizer, pairs, write_rows):
    other = write_rows("other.jsonl.gz", *({"prompt": f"other {number}"} for number in range(4)))
    dataset = make(PromptOnlyDataset, f"jsonl:0.5:{pairs},jsonl:2.5:{other}", tokenizer)
    assert len(dataset) == 5 + 10
    prompts = [row["prompt"] for row in dataset]
    assert len(set(prompts[:5])) == 5 and prompts[:5] == sorted(prompts[:5])
    assert prompts[5:13] == [f"other {number}" for number in range(4)] * 2
    assert [row["index"] for row in dataset] == list(range(15))  # copies are samples of their own
    assert len(make(PreferenceDataset, f"jsonl:3/-1:{pairs}", tokenizer)) == 3
    assert len(make(PreferenceDataset, f"jsonl:23/-1:{pairs}", tokenizer)) == 23


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides(tokenizer, pairs, kind):
    found = [texts(make(kind, f"jsonl:0.5:{pairs}", tokenizer, seed=seed), tokenizer) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


def test_aliases_and_dicts(tokenizer, pairs):
    expected = texts(make(PreferenceDataset, f"jsonl:0.5:{pairs}", tokenizer), tokenizer)
    for spec in (
        {"Jsonfile": {"proportion": 0.5, "path": pairs}},
        [("json", {"proportion": "1/2", "path": str(pairs)})],
        [f"json:0.5:{pairs}"],
    ):
        assert texts(make(PreferenceDataset, spec, tokenizer), tokenizer) == expected


def test_prompts_are_made_distinct_before_mixing(tokenizer, write_rows):
    first = write_rows("a.jsonl", *({"prompt": text, "n": n} for n, text in enumerate(["x", "y", "x", "z", "y"])))
    second = write_rows("b.jsonl", *({"prompt": text, "n": 9} for text in ["z", "w"]))
    dataset = make(PromptOnlyDataset, f"jsonl:2:{first},jsonl::{second}", tokenizer)
    assert [row["prompt"] for row in dataset] == ["x", "y", "z", "x", "y", "z", "w"]
    assert [row["row"]["n"] for row in dataset] == [0, 1, 3, 0, 1, 3, 9]  # the first occurrence is kept
    sources = dataset.summary.sources
    assert [(s.available, s.duplicates, s.taken, s.kept) for s in sources] == [(5, 2, 6, 6), (2, 1, 1, 1)]
    supervised = make(
        SupervisedDataset, {"jsonl": {"path": write_rows("c.jsonl", *[{"src": "x", "tgt": "y"}] * 3)}}, tokenizer
    )
    assert len(supervised) == 3  # duplicates are left in where answers count


def test_the_mixture_is_recorded(tokenizer, pairs, write_rows):
    bad = write_rows("other.jsonl", {"prompt": "a", "chosen": "b", "rejected": "b"}, pair(1), "{")
    dataset = make(
        PreferenceDataset, f"jsonl:1/2:{pairs},json::{bad}", tokenizer, seed=7, skip_bad_rows=True, name="train"
    )
    record = json.loads(json.dumps(dataset.mixture_record()))
    assert record["seed"] == 7 and record["template"]["kind"] == "beaver" and record["name"] == "train"
    overlong = {"overlong_prompts": "truncate", "overlong_answers": "truncate"}
    assert record["limits"] == {"max_length": 256, "max_src_len": None, **overlong}
    assert record["sources"] == [
        {
            "name": "jsonl",
            "path": str(pairs),
            "proportion": "1/2",
            "available": 10,
            "duplicates": 0,
            "taken": 5,
            "kept": 5,
            "dropped": {},
            "unread": {"level": 5},
        },
        {
            "name": "jsonl",
            "path": str(bad),
            "proportion": "1.0",
            "available": 3,
            "duplicates": 1,
            "taken": 3,
            "kept": 1,
            "dropped": {"identical answers": 1, "malformed": 1},
            "unread": {"level": 1},
        },
    ]


# -------------------------------------------------------------------- the account


def test_every_row_is_accounted_for(tokenizer, write_rows):
    rows = [
        pair(0),
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        {"prompt": "q", "chosen": "w " * 200 + "a", "rejected": "w " * 200 + "b"},
        {"prompt": "q", "chosen": "", "rejected": "a"},
        {"prompt": " ", "chosen": "a", "rejected": "b"},
        {"prompt": "long " * 300, "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "w " * 200, "rejected": "b"},
        {"prompt": "q", "chosen": "a"},
    ]
    spec = {"jsonl": {"path": write_rows("a.jsonl", *rows)}}
    dataset = make(PreferenceDataset, spec, tokenizer, max_length=120, skip_bad_rows=True, overlong_prompts="drop")
    summary = dataset.summary
    assert summary.dropped == {
        "empty answer": 1,
        "empty prompt": 1,
        "identical after truncation": 1,
        "identical answers": 1,
        "malformed": 1,
        "prompt too long": 1,
    }
    assert summary.rows == 8 and summary.kept == 2 == summary.rows - sum(summary.dropped.values())
    assert summary.truncated == {"answer cut on the right": 1}
    assert summary.lengths["max"] == 120
    kept = list(dataset)
    tokens = sum(len(row[key]) for row in kept for key in ("better_input_ids", "worse_input_ids"))
    answers = tokens - sum(2 * row["prompt_len"] for row in kept)
    assert summary.tokens == tokens and summary.trained_fraction == pytest.approx(answers / tokens)
    cut = make(PreferenceDataset, spec, tokenizer, max_length=120, skip_bad_rows=True)
    assert cut.summary.truncated == {"prompt cut on the left": 1, "answer cut on the right": 1}


def test_trained_fraction_of_supervised_and_prompt_rows(tokenizer, pairs):
    dataset = make(SupervisedDataset, f"jsonl:2:{pairs}", tokenizer)
    learned = sum(int((row["labels"] != -100).sum()) for row in dataset)
    assert dataset.summary.trained_fraction == pytest.approx(learned / sum(len(row["labels"]) for row in dataset))
    assert make(PromptOnlyDataset, f"jsonl::{pairs}", tokenizer).summary.trained_fraction is None


def test_the_summary_is_a_table(tokenizer, pairs):
    summary = make(SupervisedDataset, f"jsonl:0.5:{pairs}", tokenizer, max_length=60, name="train").summary
    console = rich.console.Console(width=220, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary.render())
    text = console.export_text()
    for word in ("train (supervised)", str(pairs), "0.5", "tokens p50/p90/p99/max", f"{summary.trained_fraction:.1%}"):
        assert word in text
    assert "5 rows, 5 kept" in str(summary)


def test_nothing_left(tokenizer, write_rows):
    path = write_rows(
        "a.jsonl", {"prompt": "q", "chosen": "a", "rejected": "a"}, {"prompt": " ", "chosen": "a", "rejected": "b"}
    )
    with pytest.raises(
        DataError, match=r"no data is left of 'jsonl'.*2 rows taken.*1 identical answers, 1 empty prompt"
    ):
        make(PreferenceDataset, f"jsonl::{path}", tokenizer)


# -------------------------------------------------------------------- bad rows


@pytest.mark.parametrize(
    ("kind", "line", "message"),
    [
        (SupervisedDataset, "{not json", r"a\.jsonl, line 3: not valid JSON .*\{not json"),
        (SupervisedDataset, "[]", r"a\.jsonl, line 3: a row must be an object with named fields"),
        (SupervisedDataset, {"prompt": "q"}, r"line 3: `answer` is missing; SupervisedDataset needs \(input, answer\)"),
        (
            PreferenceDataset,
            {"src": "a", "tgt": "b"},
            r"line 3: `other_answer` is missing.*fits supervised data and prompt only data",
        ),
        (PreferenceDataset, {"prompt": "a", "chosen": "b"}, r"line 3: the column 'rejected' is missing"),
        (PromptOnlyDataset, {"prompt": ["a", "b"]}, r"line 3: `input` must end with the user's turn"),
        (PromptOnlyDataset, {"text": "a"}, r"line 3: a row of plain `text` has no prompt; call the column `prompt`"),
    ],
)
def test_a_malformed_row_is_named_with_file_and_line_or_skipped(
    tokenizer, write_rows, kind, line, message, warnings_said
):
    path = write_rows("a.jsonl", pair(0), pair(1), line)
    with pytest.raises(DataError, match=message):
        make(kind, f"jsonl::{path}", tokenizer)
    dataset = make(kind, f"jsonl::{path}", tokenizer, skip_bad_rows=True)
    assert len(dataset) == 2 and dataset.summary.dropped == {"malformed": 1}
    assert "line 3" in warnings_said.text


def test_a_source_of_malformed_rows_alone_is_an_error_even_when_they_are_skipped(tokenizer, pairs, write_rows):
    path = write_rows("prompts.jsonl", {"prompt": "q"}, {"prompt": "r"})
    with pytest.raises(
        DataError, match=r"every row of data set 'jsonl \(.*prompts.jsonl\)' that was taken \(2\) is malformed"
    ):
        make(PreferenceDataset, f"jsonl::{pairs},jsonl::{path}", tokenizer, skip_bad_rows=True)


def test_readme_mixture_with_alpaca_names_the_missing_fields_before_loading(tokenizer):
    with pytest.raises(
        DataError, match=r"data set 'alpaca' has no `other_answer` and `better`. Its samples have"
    ) as err:
        PreferenceDataset({"alpaca": 0.75, "PKU-SafeRLHF/train": 0.5}, tokenizer)
    assert "fits supervised data and prompt only data" in str(err.value)
    assert "preference data are for example PKU-SafeRLHF/train" in str(err.value)


def test_errors_in_a_users_data_set_are_told_with_row_and_line(tokenizer, registry):
    class Broken(RawDataset):
        NAME = "broken"

        def __init__(self) -> None: ...

        def __getitem__(self, index):
            return {"input": "x"} if index < 2 else {}["col1"] if index < 3 else "text"

        def __len__(self) -> int:
            return 4

    with pytest.raises(
        DataError, match=r"'broken', sample 2: reading it failed: KeyError: 'col1' \(.*test_datasets.py, line"
    ):
        make(PromptOnlyDataset, "broken", tokenizer)
    dataset = make(PromptOnlyDataset, "broken", tokenizer, skip_bad_rows=True)
    assert len(dataset) == 1 and dataset.summary.dropped == {"malformed": 2}  # and one duplicate


@pytest.mark.parametrize(("length", "message"), [(0, "is empty"), ("three", "length cannot be had: TypeError")])
def test_data_sets_without_rows(tokenizer, registry, length, message):
    class Odd(RawDataset):
        NAME = "odd"

        def __init__(self) -> None: ...

        def __getitem__(self, index):
            raise IndexError(index)

        def __len__(self) -> int:
            return length

    with pytest.raises(DataError, match=f"'odd'.* {message}"):
        make(PromptOnlyDataset, "odd", tokenizer)


# -------------------------------------------------------------------- splitting


def test_split_for_evaluation(tokenizer, pairs):
    dataset = make(SupervisedDataset, f"jsonl:2:{pairs}", tokenizer)
    train, evaluation = split_train_eval(dataset, 0.2, seed=1)
    assert (len(train), len(evaluation)) == (16, 4)
    found = [set(texts(part, tokenizer)) for part in (train, evaluation)]
    assert not found[0] & found[1]  # copies stay together
    assert found[0] | found[1] == set(texts(dataset, tokenizer))
    again = split_train_eval(dataset, 0.2, seed=1)[1]
    assert texts(again, tokenizer) == texts(evaluation, tokenizer)
    assert evaluation.summary.rows == evaluation.summary.kept == 4 and "split off" in evaluation.summary.name
    assert sum(source.kept for source in train.summary.sources) == 16
    assert len(split_train_eval(dataset, 0.999)[0]) == 2 and len(split_train_eval(dataset, 0.001)[1]) == 2


def test_split_that_cannot_be(tokenizer, write_rows, pairs):
    one = make(SupervisedDataset, {"jsonl": {"path": write_rows("one.jsonl", pair(1)), "proportion": 3}}, tokenizer)
    with pytest.raises(DataError, match="has 1 distinct prompt, and no prompt may be on both sides"):
        split_train_eval(one, 0.5)
    with pytest.raises(DataError, match="between 0 and 1"):
        split_train_eval(make(SupervisedDataset, f"jsonl::{pairs}", tokenizer), 1.5)


# -------------------------------------------------------------------- cache and processes


@pytest.mark.parametrize("kind", KINDS)
def test_cache_gives_the_same_rows(tokenizer, pairs, tmp_path, kind):
    def build() -> TokenizedDataset:
        return make(kind, f"jsonl:1.5:{pairs}", tokenizer, cache_dir=tmp_path / "cache")

    first, second = build(), build()
    assert (first.summary.from_cache, second.summary.from_cache) == (False, True)
    assert str(list(first)) == str(list(second))
    assert {**first.summary.to_dict(), "from_cache": True} == second.summary.to_dict()
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".npz"]  # no temporary file is left


def test_everything_that_tokens_depend_on_changes_the_key(
    tokenizer, bos_tokenizer, pairs, tmp_path, monkeypatch, write_rows
):
    def build(one=tokenizer, path=pairs, **kwargs) -> bool:
        kind = kwargs.pop("kind", SupervisedDataset)
        return make(kind, f"jsonl::{path}", one, cache_dir=tmp_path / "cache", **kwargs).summary.from_cache

    assert not build() and build()
    assert not build(kind=PromptOnlyDataset)
    assert not build(max_length=100)
    assert not build(max_src_len=50)
    assert not build(overlong_prompts="drop")
    assert not build(overlong_answers="drop")
    assert not build(template=CHATML)
    assert not build(one=bos_tokenizer)
    assert not build(path=write_rows("changed.jsonl", *(pair(number) for number in range(11))))
    assert build(
        path=write_rows("same.jsonl", *(pair(number) | {"level": "x"} for number in range(10)))
    )  # an unused column
    monkeypatch.setattr("alignment.ppo.data.tokenized.source_fingerprint", lambda *modules: "another version of us")
    assert not build()


def test_another_vocabulary_of_the_same_class_changes_the_key(tmp_path, pairs):
    folders = [make_bpe(tmp_path / name) for name in ("one", "two")]
    merges = folders[1] / "merges.txt"
    merges.write_text("".join(line + "\n" for line in merges.read_text().splitlines()[:-20]))
    for folder in folders:
        dataset = make(SupervisedDataset, f"jsonl::{pairs}", load(folder), cache_dir=tmp_path / "cache")
        assert not dataset.summary.from_cache


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * len(data), "flip"]
)
def test_a_damaged_cache_is_built_again_and_said(tokenizer, pairs, tmp_path, damage, warnings_said):
    def build() -> TokenizedDataset:
        return make(SupervisedDataset, f"jsonl::{pairs}", tokenizer, cache_dir=tmp_path / "cache")

    expected = texts(build(), tokenizer)
    (file,) = (tmp_path / "cache").iterdir()
    data = file.read_bytes()
    if damage == "flip":
        at = data.index(build()._table.ids[0].tobytes()) + 9
        damaged = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    else:
        damaged = damage(data)
    file.write_bytes(damaged)
    again = build()
    assert not again.summary.from_cache and texts(again, tokenizer) == expected
    assert f"the token cache {file} is damaged" in warnings_said.text
    assert build().summary.from_cache


def test_a_cache_that_cannot_be_written_is_done_without(tokenizer, pairs, tmp_path, warnings_said):
    (tmp_path / "file").write_text("in the way")
    assert len(make(SupervisedDataset, f"jsonl::{pairs}", tokenizer, cache_dir=tmp_path / "file" / "cache")) == 10
    assert "could not be cached" in warnings_said.text


@pytest.mark.parametrize("kind", KINDS)
def test_several_processes_give_the_same_rows_in_the_same_order(tokenizer, write_rows, kind):
    rows = [pair(number) for number in range(600)]
    rows[400] = {"nothing": 1}
    path = write_rows("many.jsonl", *rows)
    one, two = (make(kind, f"jsonl::{path}", tokenizer, num_proc=num_proc, skip_bad_rows=True) for num_proc in (1, 2))
    assert str(list(one)) == str(list(two)) and one.summary.to_dict() == two.summary.to_dict()
    assert not workers._JOB


def test_a_worker_that_dies_is_replaced_by_this_process(warnings_said):
    import os

    parent = os.getpid()

    def deadly(number: int) -> int:
        if number == 300 and os.getpid() != parent:
            os._exit(9)
        return number * 2

    assert workers.encode_all(deadly, range(600), num_proc=2, show_progress=False) == [
        2 * number for number in range(600)
    ]
    assert "tokenising process died" in warnings_said.text


@pytest.mark.parametrize("num_proc", [0, -1, 1.5, True])
def test_number_of_processes(num_proc):
    with pytest.raises(DataError, match="dataset_num_proc must be a whole number of at least 1"):
        workers.encode_all(str, [1], num_proc=num_proc)


def test_progress_bar_shows_a_rate(tokenizer, pairs, capsys, monkeypatch):
    SupervisedDataset(f"jsonl::{pairs}", tokenizer, name="train")
    said = capsys.readouterr().err
    assert "tokenising train" in said and "row/s" in said
    monkeypatch.setenv("PADDLE_TRAINER_ID", "1")
    SupervisedDataset(f"jsonl::{pairs}", tokenizer)
    assert "row/s" not in capsys.readouterr().err


# -------------------------------------------------------------------- real files


def test_real_gsm8k(tokenizer, shared_data):
    path = shared_data / "gsm8k_train.jsonl.gz"
    start = time.perf_counter()
    dataset = make(SupervisedDataset, f"gsm8k:2000/-1:{path}", tokenizer, max_length=1024)
    assert time.perf_counter() - start < 20
    assert len(dataset) == 2000 and dataset.summary.dropped == {}
    prompts = make(
        PromptOnlyDataset, f"gsm8k::{path}", tokenizer, max_length=512, max_src_len=400, overlong_prompts="drop"
    )
    summary = prompts.summary
    assert summary.rows == 7473 - summary.sources[0].duplicates
    assert summary.kept == summary.rows - summary.dropped["prompt too long"] and summary.lengths["max"] <= 400
    assert prompts[0]["row"]["final_answer"] == "72"


def test_real_hh(tokenizer, shared_data):
    dataset = make(PreferenceDataset, f"jsonl::{shared_data / 'hh_harmless.jsonl.gz'}", tokenizer, max_length=256)
    summary = dataset.summary
    assert summary.rows == 1800 and summary.dropped["empty answer"] == 4
    assert summary.kept == 1800 - sum(summary.dropped.values()) > 1700
    for row in dataset:
        better, worse, prompt = row["better_input_ids"], row["worse_input_ids"], row["prompt_len"]
        assert prompt < min(len(better), len(worse)) and max(len(better), len(worse)) <= 256
        assert (better[:prompt] == worse[:prompt]).all() and better.tolist() != worse.tolist()
