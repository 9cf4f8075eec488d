"""A tiny model and a task that it can learn."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import copy_rows, tiny_model_dir, write_jsonl


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random causal model with tokenizer."""
    return tiny_model_dir(tmp_path_factory.mktemp("sft") / "model")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train.json`` (96 rows) and ``dev.json`` (24 rows)."""
    folder = tmp_path_factory.mktemp("sft") / "data"
    write_jsonl(folder / "train.json", copy_rows(96))
    write_jsonl(folder / "dev.json", copy_rows(24, seed=1))
    return folder
