"""Rollouts: which of a response's tokens the policy chose."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from alignment.rollout.rollout import Rollout
from alignment.rollout.sampler import SamplingSettings
from tests.ppo.conftest import make_rollout
from tests.rollout.conftest import engine_for, make_model, make_prompts


def with_tool(lengths: list[tuple[int, int]], put_in: list[tuple[int, int]]) -> Rollout:
    """A rollout in which an environment put in the given ``(row, position)`` tokens."""
    rollout = make_rollout(lengths)
    chosen = np.ones(rollout.mask.shape, dtype=bool)
    for row, position in put_in:
        chosen[row, position] = False
    return rollout.add("response", action_mask=chosen)


def test_what_is_generated_today_is_all_the_policys() -> None:
    rollout = engine_for(make_model("llama")).generate(make_prompts([3, 9]), SamplingSettings(6, seed=1), 2)
    np.testing.assert_array_equal(rollout.actions, rollout.mask)
    assert rollout.actions.dtype == np.float32


def test_tokens_that_the_policy_did_not_choose_are_of_the_response_and_no_actions() -> None:
    rollout = with_tool([(3, 2), (2, 5)], [(1, 1), (1, 2)])
    np.testing.assert_array_equal(rollout.mask, [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(rollout.actions, [[1, 1, 0, 0, 0], [1, 0, 0, 1, 1]])
    assert rollout.actions.dtype == np.float32


def test_selected_rows_keep_their_actions() -> None:
    rollout = with_tool([(3, 2), (2, 5), (1, 3)], [(1, 1), (2, 0)])
    chosen = rollout.select([2, 0])
    np.testing.assert_array_equal(chosen.actions, [[0, 1, 1], [1, 1, 0]])


def test_rows_of_a_rollout_without_tools_join_one_with_them() -> None:
    """In either order: what has no mask is the policy's."""
    plain, mixed = make_rollout([(3, 2)]), with_tool([(2, 5)], [(0, 4)])
    for parts in ([plain, mixed], [mixed, plain]):
        joined = Rollout.join(parts)
        for row, part in enumerate(parts):
            length = int(part.response_len[0])
            np.testing.assert_array_equal(joined.actions[row, :length], part.actions[0])
            assert not joined.actions[row, length:].any()


def test_the_samplers_logprobs_are_selected_and_joined_as_the_policys_are() -> None:
    parts = []
    for rollout in (make_rollout([(3, 2), (1, 4)]), make_rollout([(2, 1)])):
        logprobs = -1 - np.arange(rollout.mask.size, dtype=np.float32).reshape(rollout.mask.shape)
        parts.append(rollout.add("response", rollout_logprobs=logprobs, sampler_logprobs=logprobs / 2))
    joined = Rollout.join(parts)
    np.testing.assert_array_equal(joined.sampler_logprobs, joined.logprobs / 2)
    chosen = joined.select([2, 0])
    assert chosen.sampler_logprobs.shape == (2, 2)
    np.testing.assert_array_equal(chosen.sampler_logprobs, chosen.logprobs / 2)


def test_every_tokens_set_goes_with_its_row(tmp_path: Path) -> None:
    """NLPO: through selecting, joining and the disk; rows without an answer have none."""
    rollout = make_rollout([(3, 2), (1, 0), (2, 5), (1, 4)], masked=True)
    assert rollout.allowed is not None
    masks = np.split(rollout.allowed.mask(300), np.cumsum(rollout.response_len)[:-1])
    order = [2, 0, 1]
    chosen = rollout.select(order)
    np.testing.assert_array_equal(chosen.allowed.mask(300), np.concatenate([masks[i] for i in order]))
    joined = Rollout.join([chosen, rollout.select([3])])
    np.testing.assert_array_equal(joined.allowed.mask(300), np.concatenate([masks[i] for i in [*order, 3]]))
    joined.save(tmp_path / "rollout")
    back, _ = Rollout.load(tmp_path / "rollout")
    np.testing.assert_array_equal(back.allowed.mask(300), joined.allowed.mask(300))
    assert back.allowed.ids.dtype == np.int32
    assert rollout.select([]).allowed.mask(300).shape == (0, 300)
    assert make_rollout([(3, 2)]).allowed is None
