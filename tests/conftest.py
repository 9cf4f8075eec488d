"""Fixtures for the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import alignment.runtime  # noqa: F401  (sets threads and allocator before any test loads paddle)

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the checkout."""
    return REPO


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real data (``gsm8k_train.jsonl.gz``, ``hh_harmless.jsonl.gz``).

    ``ALIGNMENT_SHARED_DATA`` names it; otherwise it is looked for beside the checkout.
    """
    folder = Path(os.environ.get("ALIGNMENT_SHARED_DATA", REPO.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"the real data files are not here: {folder} (set ALIGNMENT_SHARED_DATA to their folder)")
    return folder
