"""Gradients against finite differences, exactness far from zero, and properties that hold for any input."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.losses.advantages import RunningMoments, explained_variance, gae, whiten
from alignment.losses.kl import apply_missing_eos_rule, kl_estimate, response_mask, shape_rewards
from alignment.losses.logprobs import score_labels
from alignment.losses.policy import policy_loss, value_loss


def finite_difference(function, point: np.ndarray, step: float = 1e-6) -> np.ndarray:
    gradient = np.zeros_like(point)
    for index in np.ndindex(*point.shape):
        up, down = point.copy(), point.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient


def gradient_of(function, point: np.ndarray) -> np.ndarray:
    tensor = paddle.to_tensor(point, stop_gradient=False)
    function(tensor).backward()
    return tensor.grad.numpy()


def check_gradient(function, point: np.ndarray) -> None:
    numeric = finite_difference(lambda array: float(function(paddle.to_tensor(array))), point)
    np.testing.assert_allclose(gradient_of(function, point), numeric, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprob_and_entropy_gradients(temperature: float) -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(2, 3, 7)) * 3, paddle.to_tensor(rng.integers(0, 7, (2, 3)))
    weights = paddle.to_tensor(rng.normal(size=(2, 3)))
    check_gradient(lambda x: (score_labels(x, labels, temperature).logprobs * weights).sum(), logits)

    def both(x: paddle.Tensor) -> paddle.Tensor:
        scores = score_labels(x, labels, temperature, entropy_grad=True)
        return (scores.logprobs * weights).sum() + (scores.entropy * weights * 0.3).sum()

    check_gradient(both, logits)


def test_logprobs_are_exact_far_below_minus_64() -> None:
    """Paddle's own CPU functions return -64 here, and lose the gradient."""
    logits = paddle.to_tensor([[0.0, 300.0, 0.0], [0.0, 100.0, -900.0]], dtype="float32", stop_gradient=False)
    logprobs = score_labels(logits, paddle.to_tensor([0, 2])).logprobs
    np.testing.assert_allclose(logprobs.numpy(), [-300.0, -1000.0], rtol=1e-6)
    logprobs.sum().backward()
    np.testing.assert_allclose(logits.grad.numpy(), [[1, -1, 0], [0, -1, 1]], atol=1e-6)


def test_entropy_of_known_distributions() -> None:
    logits = paddle.to_tensor([[0.0, 0.0, 0.0, 0.0], [1000.0, 0.0, 0.0, 0.0]])
    entropy = score_labels(logits, paddle.to_tensor([0, 0]), entropy=True).entropy
    np.testing.assert_allclose(entropy.numpy(), [np.log(4), 0.0], atol=1e-6)
    assert entropy.stop_gradient


def test_policy_and_value_loss_gradients() -> None:
    rng = np.random.default_rng(1)
    old, advantages = rng.normal(size=(3, 4)), rng.normal(size=(3, 4))
    mask = response_mask(np.array([4, 2, 1]), 4, np.float64)
    # offsets are kept away from the corners of the clip, where the derivative jumps
    new = old + rng.choice([-0.5, -0.1, 0.1, 0.5], size=old.shape)
    old_t, advantages_t, mask_t = (paddle.to_tensor(array) for array in (old, advantages, mask))
    for mean in ("token", "sequence"):
        for dual in (None, 1.2):
            check_gradient(
                lambda x, mean=mean, dual=dual: policy_loss(x, old_t, advantages_t, mask_t, 0.2, 0.3, dual, mean).loss,
                new,
            )
    check_gradient(lambda x: value_loss(x, old_t, advantages_t, mask_t, 0.2)[0], new)


lengths = st.lists(st.integers(0, 5), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(0, 4), st.integers(0, 2**31), st.floats(0.5, 1.0), st.floats(0.0, 1.0))
def test_padding_and_row_order_do_not_change_advantages(
    response_len: list[int], extra: int, seed: int, gamma: float, lam: float
) -> None:
    rng = np.random.default_rng(seed)
    lens, width = np.array(response_len), 5
    mask = response_mask(lens, width, np.float64)
    rewards, values = rng.normal(size=(2, len(lens), width))
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    padded_rewards, padded_values = (
        np.concatenate([array, rng.normal(size=(len(lens), extra))], 1) for array in (rewards, values)
    )
    wide, wide_returns = gae(padded_rewards, padded_values, response_mask(lens, width + extra, np.float64), gamma, lam)
    np.testing.assert_array_equal(wide[:, :width], advantages)
    np.testing.assert_array_equal(wide_returns[:, :width], returns)
    assert not wide[:, width:].any()
    order = rng.permutation(len(lens))
    np.testing.assert_array_equal(gae(rewards[order], values[order], mask[order], gamma, lam)[0], advantages[order])
    # with lambda 1 the return is the discounted sum of what is to come
    _, monte_carlo = gae(rewards, values, mask, gamma, 1.0)
    expected = np.array([[sum(rewards[b, t:n] * gamma ** np.arange(n - t)) if t < n else 0.0 for t in range(width)]
                         for b, n in enumerate(lens)])  # fmt: skip
    np.testing.assert_allclose(monte_carlo, expected, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(0, 2**31), st.floats(0, 1))
def test_rewards_sum_to_score_minus_kl(response_len: list[int], seed: int, kl_coeff: float) -> None:
    rng = np.random.default_rng(seed)
    lens = np.array(response_len)
    scores, kl = rng.normal(size=len(lens)), rng.normal(size=(len(lens), 6))
    rewards = shape_rewards(scores, kl, lens, kl_coeff, clip_range_score=1.0)
    inside = response_mask(lens, 6, np.float64)
    expected = np.where(lens > 0, np.clip(scores, -1, 1), 0) - kl_coeff * (kl * inside).sum(1)
    np.testing.assert_allclose(rewards.sum(1), expected, atol=1e-12)
    assert not (rewards * (1 - inside)).any()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=6), st.integers(0, 2**31), st.integers(1, 5))
def test_splitting_into_micro_batches_does_not_change_the_loss(response_len: list[int], seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    lens = np.array(response_len)
    mask = response_mask(lens, 5, np.float64)
    new, old, advantages = rng.normal(size=(3, len(lens), 5))
    arrays = [paddle.to_tensor(array) for array in (new, old, advantages, mask)]
    for mean, count in (("token", float(mask.sum())), ("sequence", float(len(lens)))):
        whole = float(policy_loss(*arrays, mean=mean).loss)
        parts = sum(
            float(policy_loss(*(a[i : i + size] for a in arrays), mean=mean, denominator=count).loss)
            for i in range(0, len(lens), size)
        )
        assert parts == pytest.approx(whole, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.floats(-1e3, 1e3), max_size=7), min_size=1, max_size=6))
def test_running_moments_equal_the_moments_of_everything(batches: list[list[float]]) -> None:
    moments = RunningMoments()
    for batch in batches:
        moments.update(np.array(batch))
    everything = np.array([value for batch in batches for value in batch])
    if everything.size:
        assert moments.mean == pytest.approx(everything.mean(), abs=1e-6)
        assert moments.variance == pytest.approx(everything.var(), rel=1e-6, abs=1e-6)
        assert np.isfinite(moments.normalize(everything)).all()
    copy = RunningMoments()
    copy.load_state_dict(moments.state_dict())
    assert copy == moments


def test_whitening_has_mean_zero_and_variance_one_inside_the_mask() -> None:
    rng = np.random.default_rng(3)
    mask = response_mask(np.array([3, 0, 5]), 5)
    whitened = whiten(rng.normal(3, 7, size=(3, 5)), mask)
    inside = whitened[mask.astype(bool)]
    assert inside.mean() == pytest.approx(0, abs=1e-9)
    assert inside.var(ddof=1) == pytest.approx(1, abs=1e-6)
    assert not whitened[~mask.astype(bool)].any()
    one = whiten(np.array([[5.0, 9.0]]), np.array([[1.0, 0.0]]))
    assert one.tolist() == [[0.0, 0.0]]


def test_missing_eos_rules() -> None:
    scores, finished = np.array([2.0, 3.0], np.float32), np.array([True, False])
    assert apply_missing_eos_rule(scores, finished, "none").tolist() == [2.0, 3.0]
    assert apply_missing_eos_rule(scores, finished, "score", missing_eos_score=-1.0).tolist() == [2.0, -1.0]
    assert apply_missing_eos_rule(scores, finished, "penalty", missing_eos_penalty=0.5).tolist() == [2.0, 2.5]
    with pytest.raises(ValueError, match="known: none, score, penalty"):
        apply_missing_eos_rule(scores, finished, "drop")  # type: ignore[arg-type]


def test_kl_estimators_are_zero_for_equal_policies_and_k2_k3_never_negative() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(2, 4, 6))
    for kind in ("k1", "k2", "k3"):
        assert not kl_estimate(a, a, kind).any()
    assert (kl_estimate(a, b, "k2") >= 0).all()
    assert (kl_estimate(a, b, "k3") >= 0).all()


def test_explained_variance() -> None:
    returns, mask = np.array([[1.0, 2.0, 3.0]]), np.ones((1, 3))
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(np.full((1, 3), 2.0), returns, mask) == pytest.approx(0.0)
    assert explained_variance(returns, np.ones((1, 3)), mask) == 0.0
