"""What holds for any estimator: spans the policy did not write, prompts with one answer, scores that do not apply."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from alignment.errors import ArgumentsError
from alignment.losses.advantages import RunningMoments, discounted_returns, gae, whiten
from alignment.losses.correction import CORRECTIONS, CorrectionOptions, correct_rollout
from alignment.losses.estimators import ADVANTAGES, AdvantageInputs, AdvantageOptions
from alignment.losses.groups import (
    group_advantages,
    groups_with_spread,
    leave_one_out_advantages,
    several_rewards_advantages,
    standardize,
)
from alignment.losses.kl import last_tokens, response_mask, shape_rewards
from alignment.losses.lagrange import LagrangeMultiplier
from alignment.losses.selection import select_answers
from alignment.losses.shaping import overlong_filter, overlong_penalty
from alignment.losses.vocabulary_mask import vocabulary_mask

GROUPS = np.array([7, 7, 7, 2, 2, 2])
# tools' replies in the middle and at the end of answers
MASK = np.array(
    [[1, 1, 0, 0, 1], [1, 0, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 1], [1, 1, 0, 0, 0]], np.float64
)


def made(seed: int = 0, mask: np.ndarray = MASK, **options: Any) -> AdvantageInputs:
    rng = np.random.default_rng(seed)
    rows, width = mask.shape
    return AdvantageInputs(
        scores=rng.normal(size=rows),
        mask=mask,
        groups=GROUPS[:rows],
        token_rewards=-0.1 * rng.normal(size=(rows, width)),
        values=rng.normal(size=(rows, width)),
        greedy_scores=rng.normal(size=rows),
        rewards=rng.normal(size=(rows, 3)),
        options=AdvantageOptions(**options),
    )


def squeezed(array: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The entries with mask 1, moved to the front of their rows."""
    out = np.zeros((len(mask), int(mask.sum(axis=1).max())))
    for row in range(len(mask)):
        kept = array[row][mask[row] > 0]
        out[row, : len(kept)] = kept
    return out


@pytest.mark.parametrize("token_rewards", ["score", "tokens"])
@pytest.mark.parametrize("name", list(ADVANTAGES))
def test_spans_of_others_are_stepped_over(name: str, token_rewards: str) -> None:
    """An answer with a tool's reply inside has the numbers of the same answer without it, whatever stands there."""
    given = made(gamma=0.9, token_rewards=token_rewards)
    for garbage in (0.0, 1e6):
        fields = {key: np.where(MASK > 0, getattr(given, key), garbage) for key in ("token_rewards", "values")}
        got = ADVANTAGES[name](AdvantageInputs(**{**vars(given), **fields}))
        without = AdvantageInputs(
            **{
                **vars(given),
                **{key: squeezed(getattr(given, key), MASK) for key in ("token_rewards", "values", "mask")},
            }
        )
        wanted = ADVANTAGES[name](without)
        for key in ("advantages", "returns"):
            np.testing.assert_allclose(squeezed(getattr(got, key), MASK), getattr(wanted, key), atol=1e-12)
            assert not getattr(got, key)[MASK == 0].any()


@pytest.mark.parametrize("name", list(ADVANTAGES))
def test_row_order_and_group_numbers_do_not_matter(name: str) -> None:
    given = made(1)
    got = ADVANTAGES[name](given)
    order = np.random.default_rng(3).permutation(len(MASK))
    columns = ("scores", "mask", "groups", "token_rewards", "values", "greedy_scores", "rewards")
    moved = {key: getattr(given, key)[order] for key in columns}
    moved["groups"] = 1000 - moved["groups"]
    other = ADVANTAGES[name](AdvantageInputs(**moved, options=given.options))
    np.testing.assert_allclose(other.advantages, got.advantages[order], atol=1e-12)


def test_gae_and_returns_over_a_span() -> None:
    rewards, values = np.array([[0.5, 99.0, 1.0]]), np.array([[0.2, 99.0, 0.4]])
    mask = np.array([[1.0, 0.0, 1.0]])
    advantages, returns = gae(rewards, values, mask, 0.9, 0.5)
    last = 1.0 - 0.4
    first = 0.5 + 0.9 * 0.4 - 0.2 + 0.9 * 0.5 * last
    np.testing.assert_allclose(advantages, [[first, 0.0, last]])
    np.testing.assert_allclose(returns, [[first + 0.2, 0.0, 1.0]])
    np.testing.assert_allclose(discounted_returns(rewards, mask, 0.9), [[1.4, 0.0, 1.0]])


def test_the_score_is_paid_at_the_last_token_that_the_policy_chose() -> None:
    kl, lengths = np.ones((2, 4)), np.array([4, 0])
    chosen = np.array([[1, 0, 1, 0], [1, 1, 1, 1]])
    got = shape_rewards(np.array([5.0, 7.0]), kl, lengths, 0.1, action_mask=chosen)
    np.testing.assert_allclose(got, [[-0.1, 0, 4.9, 0], [0, 0, 0, 0]])
    whole = shape_rewards(np.array([5.0, 7.0]), kl, lengths, 0.1)
    np.testing.assert_array_equal(whole, shape_rewards(np.array([5.0, 7.0]), kl, lengths, 0.1, action_mask=kl))
    rows, columns = last_tokens(response_mask(np.array([2, 0, 4]), 4))
    assert rows.tolist() == [0, 2] and columns.tolist() == [1, 3]


@pytest.mark.parametrize("name", ["grpo", "rloo", "opo", "gpg", "gdpo", "reinforce_plus_plus_baseline", "grpo_passk"])
def test_a_prompt_with_one_answer_is_refused(name: str) -> None:
    given = made()
    alone = AdvantageInputs(**{**vars(given), "groups": np.array([0, 0, 0, 1, 1, 2])})
    with pytest.raises(ArgumentsError, match=r"1 prompt has only one answer.*Set num_return_sequences to 2"):
        ADVANTAGES[name](alone)


def test_singletons_by_request() -> None:
    scores, groups = np.array([1.0, 2.0, 5.0]), np.array([0, 0, 1])
    assert group_advantages(scores, groups, singletons="zero")[2] == 0.0
    assert group_advantages(scores, groups, singletons="raw")[2] == pytest.approx(5.0, rel=1e-5)
    assert leave_one_out_advantages(scores, groups, singletons="raw").tolist() == [-1.0, 1.0, 5.0]
    with pytest.raises(ArgumentsError, match="known: refuse, zero, raw"):
        group_advantages(scores, groups, singletons="drop")  # type: ignore[arg-type]
    with pytest.raises(ArgumentsError, match="known: group, batch, none"):
        group_advantages(scores, groups, "std")  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["scale", "std", "singletons", "token_rewards", "normalize", "whiten_std"])
def test_an_unknown_option_is_told_with_the_known_ones(key: str) -> None:
    with pytest.raises(ArgumentsError, match=f"advantages: {key} is 'other'; it can be .*, "):
        AdvantageOptions(**{key: "other"})


def test_an_estimator_says_what_it_lacks() -> None:
    inputs = AdvantageInputs(scores=np.zeros(2), mask=np.ones((2, 1)))
    for name, lacks in {"gae": "values", "remax": "greedy_scores", "gdpo": "rewards", "grpo": "groups"}.items():
        with pytest.raises(ArgumentsError, match=f"needs {lacks}"):
            ADVANTAGES[name](inputs)


@pytest.mark.parametrize("name", list(ADVANTAGES))
def test_a_score_that_does_not_apply_is_left_out(name: str) -> None:
    given = made(2, np.ones((6, 5)), normalize="sequences")
    scores, rewards = given.scores.copy(), given.rewards.copy()
    scores[4] = np.nan
    rewards[4] = np.nan
    got = ADVANTAGES[name](AdvantageInputs(**{**vars(given), "scores": scores, "rewards": rewards}))
    assert np.isfinite(got.advantages).all() and not got.advantages[4].any()
    keep = np.array([0, 1, 2, 3, 5])
    columns = ("mask", "groups", "token_rewards", "values", "greedy_scores")
    without = AdvantageInputs(
        scores=scores[keep], rewards=rewards[keep], options=given.options,
        **{key: getattr(given, key)[keep] for key in columns},
    )  # fmt: skip
    np.testing.assert_allclose(got.advantages[keep], ADVANTAGES[name](without).advantages, atol=1e-6)


def test_equal_scores_have_no_advantage_at_all() -> None:
    """Even ``E[r^2] - E[r]^2 < 0`` and an epsilon of 0 give no NaN and no noise."""
    for value in (0.1, 0.2, 1.0):
        scores, groups = np.full(16, value), np.repeat([0, 1], 8)
        for options in ({}, {"scale": "batch"}, {"std": "biased"}, {"leave_one_out": True}, {"eps": 0.0}):
            assert not group_advantages(scores, groups, **options).any()
        assert not leave_one_out_advantages(scores, groups).any()
        assert not several_rewards_advantages(np.stack([scores, scores], 1), groups, np.ones(2)).any()


def test_leave_one_out_mean_and_deviation() -> None:
    scores = np.array([1.0, 2.0, 4.0, 9.0])
    got = group_advantages(scores, np.zeros(4, int), leave_one_out=True)
    for row in range(4):
        others = np.delete(scores, row)
        assert got[row] == pytest.approx((scores[row] - others.mean()) / (others.std(ddof=1) + 1e-6), rel=1e-9)
    # where the others are equal it does not divide
    np.testing.assert_allclose(
        group_advantages(np.array([0.0, 0.0, 1.0]), np.zeros(3, int), leave_one_out=True)[2], 1.0
    )


def test_dynamic_sampling_keeps_groups_with_spread() -> None:
    scores = np.array([0.1, 0.1, 0.1, 0.0, 1.0, np.nan, 1.0, 1.0 + 1e-8, 3.0, np.nan])
    groups = np.array([0, 0, 0, 1, 1, 1, 2, 2, 3, 3])
    assert groups_with_spread(scores, groups).tolist() == [False] * 3 + [True] * 3 + [False] * 4
    assert not groups_with_spread(scores, groups, mean_range=(0.6, 1.0)).any()
    assert groups_with_spread(scores, groups, mean_range=(0.0, 1.0))[3:6].all()


def test_overlong_answers() -> None:
    assert overlong_penalty(np.array([0, 80, 90, 100, 500]), 100, 20, 0.5).tolist() == [0.0, 0.0, -0.25, -0.5, -0.5]
    with pytest.raises(ValueError, match="0 tokens; it must have 1 to 100"):
        overlong_penalty(np.array([1]), 100, 0)
    mask = np.ones((2, 3), np.float32)
    kept = overlong_filter(mask, np.array([True, False]))
    assert kept.tolist() == [[1, 1, 1], [0, 0, 0]] and kept.dtype == np.float32


def test_whitening_biased_and_standardize() -> None:
    values, mask = np.random.default_rng(0).normal(2, 3, (3, 5)), np.ones((3, 5))
    assert whiten(values, mask, std="biased").var() == pytest.approx(1.0, abs=1e-6)
    assert whiten(values, mask).var(ddof=1) == pytest.approx(1.0, abs=1e-6)
    got = standardize(np.array([1.0, np.nan, 3.0]))
    assert got[1] == 0.0 and got[0] == -got[2] == pytest.approx(-1 / np.sqrt(2), rel=1e-5)
    assert standardize(np.full(3, np.nan)).tolist() == [0.0] * 3


def test_moments_without_two_values_do_not_scale() -> None:
    moments = RunningMoments()
    moments.update(np.array([3.0]))
    assert moments.unbiased_std == 1.0
    moments.update(np.array([3.0]))
    assert moments.scale(np.array([3.0])).tolist() == [3.0]


def test_corrections_by_hand() -> None:
    ratio = np.array([[3.0, 1.0, 0.4, 7.0], [1.0, 1.005, 0.5, 1.0]])
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], np.float64)
    sampler = np.full((2, 4), -1.0)
    logprobs = sampler + np.log(ratio)
    sampler[mask == 0] = np.nan  # what stands there has no influence
    wanted = {
        "tis": [[2, 1, 0.4, 0], [1, 1.005, 0, 0]],
        "icepop": [[3, 1, 0, 0], [1, 1.005, 0, 0]],
        "mask": [[0, 0, 0, 0], [1, 1, 0, 0]],
    }
    assert set(wanted) | {"none"} == set(CORRECTIONS)
    for kind, weights in wanted.items():
        got = correct_rollout(logprobs, sampler, mask, kind)
        np.testing.assert_allclose(got.weights, weights, rtol=1e-12)
        assert got.figures["weight_mean"] == pytest.approx(np.sum(weights) / 5)
        assert got.figures["dropped"] == pytest.approx(((np.array(weights) == 0) & (mask > 0)).sum() / 5)
    plain = correct_rollout(logprobs, sampler, mask)
    assert plain.weights is None
    inside = ratio[mask > 0]
    assert plain.figures == pytest.approx(
        {
            "gap_mean": np.abs(np.log(inside)).mean(),
            "k3": (inside - 1 - np.log(inside)).mean(),
            "effective_sample_size": inside.sum() ** 2 / 5 / (inside**2).sum(),
            "ratio_max": 3.0,
        }
    )
    assert correct_rollout(logprobs, sampler, mask * 0).figures["effective_sample_size"] == 1.0
    assert correct_rollout(logprobs, sampler, mask, "tis", CorrectionOptions(tis_cap=2.5)).weights.max() == 2.5
    with pytest.raises(ArgumentsError, match="unknown rollout_correction 'icepopp'; did you mean 'icepop'"):
        correct_rollout(logprobs, sampler, mask, "icepopp")


def test_selection_is_in_the_order_of_the_pools() -> None:
    pools = {
        "q": [("b", 2.0), ("a", 2.0), ("b", 2.0), ("c", 0.0), ("d", 0.5)],
        "p": [("z", 1.0), ("y", 5.0)],
        "none": [],
    }
    got = select_answers(pools, 0.4)
    assert got.chosen == [("q", "b"), ("q", "a"), ("p", "y")] and len(got.thresholds) == 2
    assert select_answers({"only": [("a", 1.0), ("b", 2.0)]}, 1.0).chosen == [("only", "b")]
    assert select_answers({}, 0.5).chosen == []


def test_masks_keep_what_must_be_kept() -> None:
    logits = np.log(np.array([[0.6, 0.3, 0.06, 0.04]]))
    assert vocabulary_mask("learned_top_p", logits, 0.5).tolist() == [[True, False, False, False]]
    assert vocabulary_mask("learned_top_p", logits, 0.7, always=[3]).tolist() == [[True, True, False, True]]
    assert vocabulary_mask("learned_top_p", logits, 0.0, keep_at_least=100).all()
    assert vocabulary_mask("learned_top_k", logits, 2).tolist() == [[True, True, False, False]]
    assert vocabulary_mask("learned_top_k", logits, -1).all()
    equal = np.array([[1.0, 2.0, 2.0, 0.0, 2.0], [0.0, -np.inf, -np.inf, -np.inf, 3.0]])
    assert vocabulary_mask("topk", equal, 2).tolist() == [[False, True, True, False, False], [True, *[False] * 3, True]]
    assert vocabulary_mask("topk", equal, 3)[1].tolist() == [True, True, False, False, True]
    assert vocabulary_mask("topk", equal, 9).all()


def test_multiplier_starts_above_zero() -> None:
    with pytest.raises(ValueError, match="starts at 0"):
        LagrangeMultiplier(0.0)
