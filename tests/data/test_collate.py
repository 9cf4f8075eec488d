"""Batches and packed rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.errors import DataError
from alignment.ppo.data import (
    IGNORE_INDEX,
    collate_packed,
    collate_preference,
    collate_prompts,
    collate_supervised,
    pack_supervised,
)

ids = st.lists(st.integers(0, 9), min_size=1, max_size=12)


@st.composite
def supervised_rows(draw) -> list[dict[str, np.ndarray]]:
    rows = []
    for tokens in draw(st.lists(ids, min_size=1, max_size=9)):
        prompt = draw(st.integers(0, len(tokens)))
        labels = [IGNORE_INDEX] * prompt + tokens[prompt:]
        rows.append({"input_ids": np.array(tokens), "labels": np.array(labels)})
    return rows


@given(supervised_rows(), st.integers(0, 9))
def test_supervised_batches_hold_the_rows_and_pads(rows, pad_id):
    batch = collate_supervised(rows, pad_id)
    width = max(len(row["input_ids"]) for row in rows)
    assert batch["input_ids"].shape == batch["labels"].shape == (len(rows), width)
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}
    for row, tokens, labels, length in zip(rows, batch["input_ids"], batch["labels"], batch["lengths"], strict=True):
        assert tokens[:length].tolist() == row["input_ids"].tolist() and (tokens[length:] == pad_id).all()
        assert labels[:length].tolist() == row["labels"].tolist() and (labels[length:] == IGNORE_INDEX).all()


@given(st.lists(st.tuples(ids, ids, ids), min_size=1, max_size=6), st.integers(0, 9))
def test_preference_batches_have_the_better_rows_first(pairs, pad_id):
    rows = [
        {"better_input_ids": np.array(p + b), "worse_input_ids": np.array(p + w), "prompt_len": len(p)}
        for p, b, w in pairs
    ]
    batch = collate_preference(rows, pad_id)
    assert batch["input_ids"].shape[0] == batch["lengths"].shape[0] == 2 * len(rows)
    assert batch["prompt_lens"].tolist() == [len(p) for p, _, _ in pairs]
    expected = [p + b for p, b, _ in pairs] + [p + w for p, _, w in pairs]
    for tokens, length, row in zip(batch["input_ids"], batch["lengths"], expected, strict=True):
        assert tokens[:length].tolist() == row and (tokens[length:] == pad_id).all()


def test_prompt_batches_carry_their_rows():
    rows = [
        {"input_ids": np.arange(n), "prompt": f"p{n}", "row": {"n": n}, "source": "s", "index": 10 + n} for n in (1, 3)
    ]
    batch = collate_prompts(rows, 7)
    assert batch["input_ids"].tolist() == [[0, 7, 7], [0, 1, 2]] and batch["lengths"].tolist() == [1, 3]
    assert batch["index"].tolist() == [11, 13] and batch["prompt"] == ["p1", "p3"] and batch["row"][1] == {"n": 3}


@pytest.mark.parametrize("collate", [collate_supervised, collate_preference, collate_prompts])
def test_empty_batches(collate):
    with pytest.raises(DataError, match="empty batch"):
        collate([], 0)


@given(supervised_rows(), st.integers(12, 30), st.booleans())
def test_packing_loses_nothing_and_keeps_samples_apart(rows, max_length, greedy):
    packed = pack_supervised(rows, max_length, greedy)
    found = []
    for row in packed:
        assert len(row["input_ids"]) <= max_length
        assert {len(array) for array in row.values()} == {len(row["input_ids"])}
        segments = row["segment_ids"]
        assert segments[0] == 1 and set(np.diff(segments)) <= {0, 1}
        for segment in range(1, segments[-1] + 1):
            inside = segments == segment
            assert row["position_ids"][inside].tolist() == list(range(inside.sum()))
            assert row["labels"][inside][0] == IGNORE_INDEX  # not predicted from the sample before
            found.append((row["input_ids"][inside].tolist(), row["labels"][inside][1:].tolist()))
    expected = [(row["input_ids"].tolist(), row["labels"][1:].tolist()) for row in rows]
    assert sorted(found) == sorted(expected)
    assert greedy or found == expected  # in order, where the order is kept


@given(supervised_rows(), st.integers(12, 30))
def test_greedy_packing_is_deterministic_and_tight(rows, max_length):
    packed = pack_supervised(rows, max_length, greedy=True)
    again = pack_supervised(rows, max_length, greedy=True)
    assert [row["input_ids"].tolist() for row in packed] == [row["input_ids"].tolist() for row in again]
    lengths = sorted(len(row["input_ids"]) for row in packed)
    assert len(lengths) < 2 or lengths[0] + lengths[1] > max_length  # no two rows would fit into one


def test_packing_leaves_its_input_alone():
    rows = [{"input_ids": np.arange(3), "labels": np.arange(3)}]
    pack_supervised(rows, 8)
    assert rows[0]["labels"].tolist() == [0, 1, 2]


def test_packed_batches():
    rows = [{"input_ids": np.arange(n), "labels": np.arange(n)} for n in (3, 2, 4)]
    batch = collate_packed(pack_supervised(rows, 5), pad_id=9)
    assert batch["input_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 9]]
    assert batch["labels"].tolist() == [[-100, 1, 2, -100, 1], [-100, 1, 2, 3, -100]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 2], [1, 1, 1, 1, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch["lengths"].tolist() == [5, 4]


@pytest.mark.parametrize("greedy", [True, False])
def test_rows_that_cannot_be_packed(greedy):
    for length in (0, 9):
        with pytest.raises(DataError, match=f"row 0 has {length} tokens"):
            pack_supervised([{"input_ids": np.arange(length), "labels": np.arange(length)}], 8, greedy)
