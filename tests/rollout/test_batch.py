"""The batch that travels between calls."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.rollout.batch import Batch

row_sizes = st.lists(st.integers(0, 5), min_size=1, max_size=8)


def make(sizes: list[int], seed: int = 0) -> Batch:
    """A ragged column, a number, a vector and a list of each row."""
    sizes = np.array(sizes, dtype=np.int64)
    draw = np.random.default_rng(seed)
    batch = Batch({"score": draw.normal(size=len(sizes)), "vector": draw.normal(size=(len(sizes), 3)),
                   "text": [f"row {i}" for i in range(len(sizes))]}, {"token": sizes})  # fmt: skip
    return batch.add("token", ids=draw.integers(1, 9, (len(sizes), max(1, sizes.max()) + 2)))


def equal(one: Batch, other: Batch) -> bool:
    """Equal in every column, kind and value."""
    return one.columns.keys() == other.columns.keys() and all(
        c.kind == other.columns[n].kind
        and (c.values == other.columns[n].values if c.kind == "list" else np.array_equal(one[n], other[n]))
        for n, c in one.columns.items()
    )


@settings(max_examples=50, deadline=None)
@given(row_sizes, st.integers(1, 4), st.integers(0, 99))
def test_rows_split_and_joined_are_the_same(sizes: list[int], size: int, seed: int) -> None:
    batch = make(sizes, seed)
    groups = [range(i, min(i + size, len(batch))) for i in range(0, len(batch), size)]
    assert equal(Batch.join(batch.split(groups)), batch)
    order = np.random.default_rng(seed).permutation(len(batch))
    mixed = batch.select(order)
    for row, old in enumerate(order):
        assert mixed["ids"][row, : sizes[old]].tolist() == batch["ids"][old, : sizes[old]].tolist()
    assert equal(mixed.select(np.argsort(order)), batch)


def test_nothing_is_kept_or_shown_behind_the_end_of_a_row() -> None:
    batch = make([2, 0, 3])
    assert batch.flat("ids").shape == (5,)
    assert batch["ids"].shape == (3, 3)
    assert batch["ids"][0, 2] == batch["ids"][1].sum() == 0
    assert batch.select([1])["ids"].tolist() == [[0]]
    assert len(batch.select([])) == 0 and batch.select([])["ids"].shape == (0, 1)


def test_groups_are_in_the_order_of_their_first_row() -> None:
    batch = Batch({"prompt": np.array([7, 3, 7, 5, 3])})
    assert [rows.tolist() for rows in batch.groups("prompt")] == [[0, 2], [1, 4], [3]]


def test_it_goes_to_disk_and_through_pickle_unchanged(tmp_path: Path) -> None:
    batch = make([2, 0, 3]).add(rows=[{"a": 1}, {"b": [2]}, {}])
    batch.save(tmp_path / "rows", step=3)
    back, more = Batch.load(tmp_path / "rows")
    assert equal(back, batch) and more == {"step": 3}
    assert equal(pickle.loads(pickle.dumps(batch)), batch)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.json", "rows.safetensors"]


def test_mistakes_are_told_in_words() -> None:
    batch = make([2, 1])
    with pytest.raises(KeyError, match="no column 'scores'; did you mean 'score'"):
        batch["scores"]
    with pytest.raises(AttributeError, match="no column 'missing'"):
        _ = batch.missing
    with pytest.raises(AttributeError, match=r"a batch does not change: `batch.add\(score=...\)`"):
        batch.score = np.zeros(2)
    with pytest.raises(ValueError, match="read-only"):
        batch["ids"][0, 0] = 1
    with pytest.raises(ValueError, match="column extra: 3 rows in a batch of 2"):
        batch.add(extra=np.zeros(3))
    with pytest.raises(ValueError, match=r"column extra: \(2, 1\) for 2 rows of up to 2 values \(token\)"):
        batch.add("token", extra=np.zeros((2, 1)))
    with pytest.raises(ValueError, match="cannot be joined: extra"):
        Batch.join([batch, batch.add(extra=np.zeros(2))])
    assert "score" not in batch.drop("score") and "mark" in batch.rename({"score": "mark"})
