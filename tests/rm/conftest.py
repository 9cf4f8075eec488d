"""A tiny model and preference pairs whose truth is one word."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import preference_rows, tiny_model_dir, write_jsonl


@pytest.fixture(scope="session")
def vectors() -> dict:
    """Values that other projects' code gave (``losses.json``)."""
    import json
    import os

    from tests.conftest import REPO

    folder = Path(os.environ.get("ALIGNMENT_SHARED_DATA", REPO.parent / "shared" / "data"))
    file = folder.parent / "vectors" / "losses.json"
    if not file.is_file():
        pytest.skip(f"the vectors of other projects are not here: {file}")
    return json.loads(file.read_text())


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random causal model with tokenizer."""
    return tiny_model_dir(tmp_path_factory.mktemp("rm") / "model")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train.jsonl`` (96 pairs) and ``dev.jsonl`` (40 pairs)."""
    folder = tmp_path_factory.mktemp("rm") / "data"
    write_jsonl(folder / "train.jsonl", preference_rows(96))
    write_jsonl(folder / "dev.jsonl", preference_rows(40, seed=1))
    return folder
