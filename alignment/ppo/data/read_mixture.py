"""Reading a mixture: its sources one after the other, duplicates out, and of each the share that was asked for."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignment.errors import DataError
from alignment.ppo.data.base import RawDataset, describe_exception
from alignment.ppo.data.encode import prompt_key
from alignment.ppo.data.files import BadRow, FileDataset
from alignment.ppo.data.mixture import Source, take_rows
from alignment.ppo.data.summary import SourceSummary

Sample = Mapping[str, Any] | BadRow


@dataclass
class Loaded:
    """A source's rows before mixing: ``indices`` are those left after deduplication."""

    source: Source
    raw: RawDataset
    available: int
    indices: list[int]
    samples: dict[int, Sample]


def load_source(source: Source, skip_bad_rows: bool) -> Loaded:
    raw = source.load()
    try:
        available = operator.index(len(raw))
    except Exception as err:
        raise DataError(f"data set {source.label!r}: its length cannot be had: {describe_exception(err)}") from err
    if not available:
        raise DataError(f"data set {source.label!r} is empty")
    return Loaded(source, raw, available, list(range(available)), {})


def place(loaded: Loaded, row: int) -> str:
    return f"data set {loaded.source.name!r}, {loaded.raw.where(row)}"


def read_sample(loaded: Loaded, row: int, skip_bad_rows: bool) -> Sample:
    """Read a sample; one that cannot be read raises, or becomes a :class:`BadRow`.

    Rows of files are read again each time, so that they may be larger than memory. Other data sets may be slow, or not
    give the same twice: their samples are kept.
    """
    if row not in loaded.samples:
        try:
            sample: Sample = loaded.raw[row]
            if not isinstance(sample, Mapping):
                raise DataError(f"a data set must give RawSample dicts, not {type(sample).__name__}")
        except DataError as err:
            sample = BadRow(f"{place(loaded, row)}: {err}")
        except Exception as err:  # code of the data set's author
            sample = BadRow(f"{place(loaded, row)}: reading it failed: {describe_exception(err)}")
            if not skip_bad_rows:
                raise DataError(sample.reason) from err
        if isinstance(sample, BadRow) and not skip_bad_rows:
            raise DataError(sample.reason)
        if isinstance(loaded.raw, FileDataset):
            return sample
        loaded.samples[row] = sample
    return loaded.samples[row]


class Samples(Sequence[Sample]):
    """The distinct samples of a mixture, each read when it is asked for.

    Args:
        loaded: the sources.
        pairs: (number of the source, row) of each.
        skip_bad_rows: see :func:`read_sample`.
    """

    def __init__(self, loaded: Sequence[Loaded], pairs: Sequence[tuple[int, int]], skip_bad_rows: bool) -> None:
        self.loaded, self.pairs, self.skip_bad_rows = loaded, pairs, skip_bad_rows

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: Any) -> Any:
        source, row = self.pairs[number]
        return read_sample(self.loaded[source], row, self.skip_bad_rows)


def identities(loaded: Sequence[Loaded]) -> dict[str, str]:
    """What is read, as file or as data set, with the source's name for messages."""
    found = {}
    for one in loaded:
        files = one.raw.files if isinstance(one.raw, FileDataset) else []
        whole = f"{one.source.name} {sorted(one.source.kwargs.items(), key=repr)}"
        found |= dict.fromkeys([str(file.resolve()) for file in files] or [whole], one.source.label)
    return found


def deduplicate(loaded: Sequence[Loaded], skip_bad_rows: bool) -> None:
    """Leave every prompt in once, at its first occurrence over all sources. Malformed rows stay, to be counted as
    such.
    """
    seen = set()
    for one in loaded:
        left = []
        for row in range(one.available):
            sample = read_sample(one, row, skip_bad_rows)
            try:
                key = None if isinstance(sample, BadRow) else prompt_key(sample)
            except DataError:
                key = None
            if key is None or key not in seen:
                left.append(row)
            if key is not None:
                seen.add(key)
        one.indices = left


def mix(loaded: Sequence[Loaded], seed: int) -> tuple[list[SourceSummary], np.ndarray, np.ndarray]:
    """Take each source's share.

    Returns:
        The sources' account; int64 [rows]: which source; int64 [rows]: which row of it. Sources follow each other in
        order.
    """
    accounts, origins, rows = [], [], []
    for number, (one, sequence) in enumerate(zip(loaded, np.random.SeedSequence(seed).spawn(len(loaded)), strict=True)):
        taken = take_rows(len(one.indices), one.source.proportion, np.random.default_rng(sequence))
        origins.append(np.full(len(taken), number, dtype=np.int64))
        rows.append(np.array(one.indices, dtype=np.int64)[taken])
        path = one.source.kwargs.get("path")
        duplicates = one.available - len(one.indices)
        accounts.append(
            SourceSummary(one.source.name, path, one.source.given, one.available, duplicates, len(taken), kept=0)
        )
    return accounts, np.concatenate(origins), np.concatenate(rows)
