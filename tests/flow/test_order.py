"""The order of rows does not depend on the number of processes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.flow.order import TrainingOrder, epoch_permutation, micro_batches, rank_slice


@given(st.integers(0, 2**31), st.integers(0, 50), st.integers(1, 500))
def test_every_epoch_is_a_permutation(seed: int, epoch: int, n: int) -> None:
    order = epoch_permutation(seed, epoch, n)
    assert sorted(order.tolist()) == list(range(n))
    assert (order == epoch_permutation(seed, epoch, n)).all()


def test_epochs_and_seeds_differ() -> None:
    first = epoch_permutation(1, 0, 100).tolist()
    assert first != epoch_permutation(1, 1, 100).tolist()
    assert first != epoch_permutation(2, 0, 100).tolist()


@given(st.integers(0, 100), st.integers(1, 9))
def test_rank_slices_cut_a_batch_into_contiguous_shares(rows: int, size: int) -> None:
    batch = np.arange(rows)
    shares = [rank_slice(batch, rank, size) for rank in range(size)]
    assert np.concatenate(shares).tolist() == batch.tolist()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(("size", "micro", "accumulation"), [(1, 12, 1), (1, 2, 6), (2, 3, 2), (3, 4, 1), (4, 1, 3)])
def test_the_same_global_batch_in_every_layout(size: int, micro: int, accumulation: int) -> None:
    order = TrainingOrder(50, size * micro * accumulation, seed=3)
    for step in range(order.steps_per_epoch):
        seen = [
            int(mine[row])
            for rank in range(size)
            for mine in [rank_slice(order.batch(step), rank, size)]
            for part in micro_batches(np.ones(len(mine)), micro)
            for row in part
        ]
        assert seen == epoch_permutation(3, 0, 50)[step * 12 : step * 12 + 12].tolist()


def test_steps() -> None:
    order = TrainingOrder(50, 12, seed=0)
    assert order.steps_per_epoch == 5
    assert TrainingOrder(50, 12, 0, drop_last=True).steps_per_epoch == 4
    assert order.total_steps(1.5) == 8
    assert order.total_steps(1.5, max_steps=3) == 3
    assert len(order.batch(4)) == 2
    assert order.batch(5).tolist() == epoch_permutation(0, 1, 50)[:12].tolist()
    assert order.epoch_at(5) == 1.0


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 100), st.integers(1, 5))
def test_a_budget_of_tokens_takes_every_row_once_and_is_kept(lengths: list[int], budget: int, size: int) -> None:
    parts = micro_batches(lengths, size, budget)
    assert sorted(int(row) for part in parts for row in part) == list(range(len(lengths)))
    widths = [max(lengths[i] for i in part) for part in parts]
    for part, width in zip(parts, widths, strict=True):
        assert len(part) == 1 or len(part) * width <= budget
    for (part, width), after in zip(zip(parts, widths, strict=True), parts[1:], strict=False):
        assert (len(part) + 1) * width > budget  # no room was left
        assert width >= max(lengths[i] for i in after)  # grouped by length
    fixed = micro_batches(lengths, size)
    assert [len(part) for part in fixed] == [min(size, len(lengths) - i) for i in range(0, len(lengths), size)]


def test_without_shuffling() -> None:
    """`shuffle: false`: the data's own order in every epoch, for SFT, reward models and PPO's prompts alike."""
    from alignment.flow.streams import IndexStream

    order = TrainingOrder(10, 4, seed=1, shuffle=False)
    assert [order.batch(step).tolist() for step in range(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3]]
    stream = IndexStream(3, 5, shuffle=False)
    assert stream.take(7) == [0, 1, 2, 0, 1, 2, 0]
