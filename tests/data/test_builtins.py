"""The built-in data sets from local copies."""

from __future__ import annotations

import json
import time

import pytest

from alignment.errors import DataError
from alignment.ppo.data import RawDataset, hub

from .test_files import parquet

PKU = {
    "prompt": "Is it possible?",
    "response_0": "Yes.",
    "response_1": "Yes, it is.",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "better_response_id": 1,
    "safer_response_id": 0,
}
ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "..."}
GSM = {"question": "How much?", "answer": "So 1000 + 234.\n#### 1,234"}


@pytest.mark.parametrize("size", ["", "-30K", "-10K"])
@pytest.mark.parametrize("organisation", ["", "PKU-Alignment/"])
def test_safe_rlhf_from_a_folder_and_from_a_file(tmp_path, size, organisation):
    parquet(tmp_path / "data" / "train-00000-of-00001.parquet", [PKU] * 3)
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [PKU] * 2)
    train = RawDataset.load(f"{organisation}PKU-SafeRLHF{size}/train", path=tmp_path)
    assert len(train) == 3
    sample = dict(train[0])
    assert sample.pop("extra") == PKU
    assert sample == {
        "input": "Is it possible?",
        "answer": "Yes.",
        "other_answer": "Yes, it is.",
        "better": False,
        "safer": True,
        "is_safe": True,
        "is_other_safe": False,
        "unread": ["is_response_0_safe", "is_response_1_safe", "safer_response_id"],  # for rewards, not for training
    }
    if size != "-10K":
        name = f"{organisation}PKU-SafeRLHF{size}/test"
        assert len(RawDataset.load(name, path=tmp_path)) == 2
        assert len(RawDataset.load(name, path=tmp_path / "data" / "train-00000-of-00001.parquet")) == 3


@pytest.mark.parametrize("name", ["alpaca", "tatsu-lab/alpaca", "stanford-alpaca"])
def test_alpaca(write_rows, name):
    data = RawDataset.load(name, path=write_rows("alpaca.json.gz", ALPACA, ALPACA | {"input": ""}))
    assert [(row["input"], row["answer"]) for row in data] == [("Add. 1 and 2", "3"), ("Add.", "3")]


def test_gsm8k_gives_the_final_answer_to_rewards(write_rows):
    data = RawDataset.load("gsm8k", path=write_rows("train.jsonl", GSM, GSM | {"answer": "none"}))
    assert data[0]["input"] == GSM["question"] and data[0]["answer"] == GSM["answer"]
    assert data[0]["extra"] == GSM | {"final_answer": "1234"}
    assert data[1]["extra"]["final_answer"] == ""


def test_a_row_that_is_another_data_sets_tells_what_it_has(write_rows):
    with pytest.raises(
        DataError, match=r"the column 'prompt' is missing; the row has 'question', 'answer'. The row: {"
    ):
        RawDataset.load("PKU-SafeRLHF/train", path=write_rows("a.jsonl", GSM))[0]


def test_without_network_the_message_tells_how_to_give_a_path(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    start = time.perf_counter()
    with pytest.raises(DataError, match=r"hub cannot be reached.*alpaca::/path/to/alpaca"):
        RawDataset.load("alpaca")
    assert time.perf_counter() - start < 5


def test_what_the_hub_library_raises_becomes_one_message(monkeypatch):
    import datasets

    def fail(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(hub, "_reachable", lambda: True)
    with pytest.raises(
        DataError, match=r"could not be fetched from PKU-Alignment/PKU-SafeRLHF: ConnectionError: no route"
    ):
        RawDataset.load("PKU-SafeRLHF/train")


def test_rows_from_the_hub(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([GSM])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "_reachable", lambda: True)
    data = RawDataset.load("gsm8k/test")
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]
    assert data[0]["extra"]["final_answer"] == "1234" and data.where(0) == "row 1"
    assert json.dumps(data[0])


def test_real_gsm8k(shared_data):
    data = RawDataset.load("gsm8k", path=shared_data / "gsm8k_train.jsonl.gz")
    assert len(data) == 7473
    assert data[0]["extra"]["final_answer"] == "72"
    assert all(row["extra"]["final_answer"] for row in data)


def test_real_hh_with_its_oddities(shared_data):
    data = RawDataset.load("jsonl", path=shared_data / "hh_harmless.jsonl.gz")
    rows = list(data)  # none raises: not even those where one speaker has two turns in a row
    assert len(rows) == 1800
    assert all(isinstance(row["input"], str) or len(row["input"]) % 2 == 1 for row in rows)
    assert all(row["better"] for row in rows)
    assert sum(not row["answer"] for row in rows) == 4
