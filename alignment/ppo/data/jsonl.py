"""Your own files: jsonl, json, csv, tsv, parquet or arrow, in any of the usual column layouts (see rows.py)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignment.ppo.data.base import RawSample
from alignment.ppo.data.files import FileDataset
from alignment.ppo.data.rows import sample_from_row


class JsonlDataset(FileDataset):
    """Rows of a file or folder; which stage they fit is seen from their columns.

    Args:
        path: a file, a pattern, or a folder (all its files of the split).
        split: of a folder: "train", "test", "dev", "train_prefs", ...
        config: of a folder that holds several data sets: which.
    """

    NAME = "jsonl"
    ALIASES = ("json", "Jsonfile")

    def __init__(self, path: str | Path, split: str = "train", config: str | None = None) -> None:
        super().__init__(path, split, config)

    def convert(self, row: Mapping[str, Any]) -> RawSample:
        return sample_from_row(row)
