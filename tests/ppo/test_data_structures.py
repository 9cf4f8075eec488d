"""Rollouts, experiences, the dataflow, streams and statistics."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.flow.flow import Call, Flow, PhaseTimer
from alignment.flow.order import micro_batches
from alignment.flow.statistics import Statistics
from alignment.flow.streams import IndexStream
from alignment.parallel import World
from alignment.rollout.rollout import Rollout, join_micro_batches

from .conftest import PPO_ITERATION, make_rollout

row_lengths = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=8)


def same(a: Rollout, b: Rollout) -> bool:
    """Equal in everything that counts: what stands behind a row's end does not."""
    if len(a) != len(b) or not (a.prompt_len == b.prompt_len).all() or not (a.response_len == b.response_len).all():
        return False
    rows = range(len(a))
    return (
        all((a.tokens[i, : a.lengths[i]] == b.tokens[i, : b.lengths[i]]).all() for i in rows)
        and a.prompts == b.prompts
        and a.responses == b.responses
        and a.rows == b.rows
    )


@settings(max_examples=50, deadline=None)
@given(row_lengths, st.integers(1, 5), st.integers(0, 99))
def test_splitting_and_joining_gives_the_same_rollout(lengths: list, size: int, seed: int) -> None:
    rollout = make_rollout(lengths, seed=seed)
    parts = [rollout.select(range(i, min(i + size, len(rollout)))) for i in range(0, len(rollout), size)]
    assert same(Rollout.join(parts), rollout)
    for part in parts:
        assert part.tokens.shape[1] == max(1, part.lengths.max())
        assert part.mask.sum() == part.response_len.sum()
    order = np.random.default_rng(seed).permutation(len(rollout))
    back = np.argsort(order)
    assert same(rollout.select(order).select(back), rollout)


def test_an_empty_selection_is_an_empty_rollout() -> None:
    empty = make_rollout([(3, 2)]).select([])
    assert len(empty) == 0
    assert empty.mask.shape == (0, 1)
    assert micro_batches(empty.lengths, 4) == []
    assert join_micro_batches([], [], 5).shape == (0, 5)
    with pytest.raises(ValueError, match="no batch to join"):
        Rollout.join([])


@settings(max_examples=30, deadline=None)
@given(row_lengths, st.integers(1, 5), st.sampled_from([0, 1, 7, 30]))
def test_micro_batches_are_joined_to_the_whole_width_in_order(lengths: list, size: int, max_tokens: int) -> None:
    rollout = make_rollout(lengths)
    groups = micro_batches(rollout.lengths, size, max_tokens)
    parts = [rollout.select(group) for group in groups]
    pieces = [part.mask * part.prompt_len[:, None] for part in parts]
    result = join_micro_batches(pieces, groups, rollout.width)
    np.testing.assert_array_equal(result, rollout.mask * rollout.prompt_len[:, None])
    lengths = join_micro_batches([part.prompt_len for part in parts], groups, rollout.width)
    np.testing.assert_array_equal(lengths, rollout.prompt_len)


def test_ppos_dataflow_says_what_each_phase_needs() -> None:
    assert [name for name, _ in PPO_ITERATION.residency()] == [
        "generate", "actor_logprobs", "reference_logprobs", "reward_scores", "critic_values", "advantages", "update"
    ]  # fmt: skip
    needed = dict(PPO_ITERATION.residency())
    assert needed["update"] == {"actor", "critic", "actor_optimizer", "critic_optimizer"}
    assert needed["reward_scores"] == {"reward"}
    assert needed["advantages"] == {"critic"}, "a host phase moves nothing that the next one wants"


def test_a_dataflow_is_sorted_by_what_is_needed_and_hands_values_on() -> None:
    flow = Flow(
        [
            Call("second", "host", (), ("a", "x"), "b", lambda a, x: a * x),
            Call("first", "infer", ("actor",), ("x",), "a", lambda role, x: x + 1),
        ],
        inputs=["x"],
    )
    seen, timer = [], PhaseTimer()
    values = flow.run({"x": np.array([3])}, {}, World(), timer, on_call=lambda call: seen.append(call.name))
    assert values == {"x": 3, "a": 4, "b": 12}
    assert seen == ["first", "second"]
    timer.count_tokens("first", 10)
    drained = timer.drain()
    assert set(drained) == {"time/first_seconds", "time/second_seconds", "tokens_per_second/first"}
    assert timer.drain() == {}


def test_a_dataflow_that_cannot_run_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="train needs scores"):
        Flow([Call("train", "train", ("actor",), ("scores",), "stats")], inputs=["rollout"])
    twice = [Call(name, "host", (), (), "x") for name in ("a", "b")]
    with pytest.raises(ValueError, match="more than one call gives x"):
        Flow(twice, inputs=[])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=12), st.integers(0, 9))
def test_a_stream_visits_every_row_once_an_epoch_and_resumes(rows: int, takes: list[int], seed: int) -> None:
    stream, taken = IndexStream(rows, seed), []
    for count in takes:
        position = stream.position
        piece = stream.take(count)
        assert IndexStream(rows, seed, position).take(count) == piece
        taken += piece
    for start in range(0, len(taken) - rows + 1, rows):
        assert sorted(taken[start : start + rows]) == list(range(rows))
    stream.skip_epoch_rest()
    assert stream.position % rows == 0


def test_statistics_are_means_over_everything() -> None:
    one, two = Statistics(), Statistics()
    one.add("loss", 6.0, 3)
    two.add("loss", 1.0, 1)
    one.add("unused", 0.0, 0)
    one.maximum("peak", 2.0)
    two.maximum("peak", 5.0)
    two.set("rate", 0.1)
    one.merge(two)
    assert one.result() == {"loss": 7 / 4, "peak": 5.0, "rate": 0.1}
    assert one.over_ranks(World()).result() == one.result()


def test_a_maximum_keeps_nan() -> None:
    """rl 23: a check of a maximum must see that something was no number, whenever it came."""
    for values in ((float("nan"), 1.0), (1.0, float("nan"))):
        stats = Statistics()
        for value in values:
            stats.maximum("x", value)
        assert np.isnan(stats.result()["x"])
