"""Each policy loss: its gradient, that its split does not matter, that padding does not reach it; aggregations."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest

from alignment.errors import ArgumentsError
from alignment.losses.aggregation import AGGREGATIONS, row_weights
from alignment.losses.kl import KL_ESTIMATORS, kl_terms
from alignment.losses.logprobs import score_labels
from alignment.losses.policy import (
    LOSS_DEFAULTS,
    POLICY_LOSSES,
    PolicyInputs,
    PolicyOptions,
    entropy_loss,
    kl_loss,
    policy_loss,
)
from tests.losses.test_properties import check_gradient, finite_difference, gradient_of

# a gap in an answer (a tool's reply), an empty answer
MASK = np.array([[1, 1, 1, 1], [1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0]], np.float64)
GROUPS = np.array([0, 0, 1, 1])


class Made:
    """Random inputs, away from the corners of the clips."""

    def __init__(self, name: str = "ppo", seed: int = 0, **options: Any) -> None:
        rng = np.random.default_rng(seed)
        self.old = rng.normal(size=MASK.shape)
        self.advantages = rng.normal(size=MASK.shape)
        self.new = self.old + rng.choice([-0.9, -0.55, -0.11, 0.13, 0.6, 1.1], size=MASK.shape)
        self.ref, self.targets = rng.normal(size=MASK.shape), rng.normal(size=len(MASK))
        self.weights = rng.uniform(0.5, 1.5, MASK.shape)
        defaults = {key: value for key, value in LOSS_DEFAULTS[name].items() if key != "aggregation"}
        self.options = PolicyOptions(**{**defaults, "apo_beta": 0.3, **options})
        self.mode = LOSS_DEFAULTS[name]["aggregation"]

    def inputs(self, new: paddle.Tensor, rows: slice = slice(None)) -> PolicyInputs:
        whole = row_weights(self.mode, MASK.sum(axis=1), GROUPS, 7.0)
        arrays = (self.old, self.advantages, MASK, whole.weights, self.weights, self.ref, self.targets)
        old, advantages, mask_, weights, token_weights, ref, targets = (paddle.to_tensor(a[rows]) for a in arrays)
        return PolicyInputs(
            new, old, advantages, mask_, denominator=whole.denominator, row_weights=weights,
            token_weights=token_weights, ref_logprobs=ref, targets=targets, options=self.options,
        )  # fmt: skip


# where the weight of a log-prob has no gradient, finite differences see the weight's too
DETACHED = ("cispo", "vespo")


@pytest.mark.parametrize("name", [name for name in POLICY_LOSSES if name not in DETACHED])
def test_gradient_is_that_of_finite_differences(name: str) -> None:
    made = Made(name)
    check_gradient(lambda x: POLICY_LOSSES[name](made.inputs(x)).loss, made.new)
    for more in ({"dual_clip": 1.2}, {"ratio_cap": 1.5}, {"clip_range_low": 0.2, "clip_range_high": 0.3}):
        other = Made(name, seed=1, **more)
        check_gradient(lambda x, other=other: POLICY_LOSSES[name](other.inputs(x)).loss, other.new)


@pytest.mark.parametrize("name", DETACHED)
def test_gradient_of_detached_weights(name: str) -> None:
    """It is that of ``-A logprob`` with the weights as they are at the point."""
    made = Made(name)
    log_ratio = (made.new - made.old) * MASK
    if name == "cispo":
        weights = np.exp(log_ratio).clip(0.0, 5.0)
    else:
        log_w = log_ratio.sum(axis=1, keepdims=True)
        k, decay = np.where(made.advantages >= 0, 2.0, 3.0), np.where(made.advantages >= 0, 3.0, 2.0)
        weights = np.exp(decay + k * log_w - decay * np.exp(log_w))
    gradient = gradient_of(lambda x: POLICY_LOSSES[name](made.inputs(x)).loss, made.new)
    made.weights = made.weights * weights
    numeric = finite_difference(
        lambda point: POLICY_LOSSES["reinforce"](made.inputs(paddle.to_tensor(point))).loss.item(), made.new
    )
    np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-9)


def test_gradients_of_the_kl_and_entropy_terms() -> None:
    made = Made()
    old, ref, mask = (paddle.to_tensor(a) for a in (made.old, made.ref, MASK))
    for kind in KL_ESTIMATORS:
        if kind.endswith("+"):
            continue
        for more in ({}, {"old_logprobs": old}):
            check_gradient(
                lambda x, kind=kind, more=more: kl_loss(kl_terms(x, ref, mask, kind, **more), made.inputs(x)), made.new
            )
    k2 = gradient_of(lambda x: kl_loss(kl_terms(x, ref, mask, "k2"), made.inputs(x)), made.new)
    for kind in ("k1+", "k3+"):  # the value of one, the gradient of k2
        straight = gradient_of(lambda x, kind=kind: kl_loss(kl_terms(x, ref, mask, kind), made.inputs(x)), made.new)
        np.testing.assert_allclose(straight, k2, rtol=1e-12)
        value = kl_terms(paddle.to_tensor(made.new), ref, mask, kind).numpy()
        np.testing.assert_allclose(
            value, kl_terms(paddle.to_tensor(made.new), ref, mask, kind[:-1]).numpy(), rtol=1e-12
        )
    spread = np.random.default_rng(0).uniform(size=MASK.shape)
    check_gradient(lambda x: entropy_loss(x, made.inputs(paddle.to_tensor(made.new))), spread)


def test_kl_terms_are_cut_where_asked() -> None:
    new, ref = paddle.to_tensor([[-1.0, -1.0]]), paddle.to_tensor([[-60.0, 59.0]])
    mask = paddle.ones([1, 2])
    assert kl_terms(new, ref, mask, "k1", log_ratio_clamp=20.0).tolist() == [[20.0, -20.0]]
    assert kl_terms(new, ref, mask, "k3", clamp=10.0).tolist() == [[10.0, 10.0]]
    far = paddle.to_tensor([[-1.0, 200.0]])
    assert np.isfinite(kl_terms(new, far, mask, "k3", old_logprobs=-far).numpy()).all()


@pytest.mark.parametrize("name", list(POLICY_LOSSES))
def test_the_split_and_the_padding_do_not_matter(name: str) -> None:
    made = Made(name)
    whole = POLICY_LOSSES[name](made.inputs(paddle.to_tensor(made.new)))
    for cut in (1, 2, 3):
        parts = [
            POLICY_LOSSES[name](made.inputs(paddle.to_tensor(made.new[rows]), rows))
            for rows in (slice(0, cut), slice(cut, None))
        ]
        assert sum(part.loss.item() for part in parts) == pytest.approx(whole.loss.item(), rel=1e-12)
        assert sum(part.clip_fraction.item() for part in parts) == whole.clip_fraction.item()
    expected = gradient_of(lambda x: POLICY_LOSSES[name](made.inputs(x)).loss, made.new)
    made.new = np.where(MASK > 0, made.new, -1e30)
    made.ref = np.where(MASK > 0, made.ref, 77.0)
    got = gradient_of(lambda x: POLICY_LOSSES[name](made.inputs(x)).loss, made.new)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", list(POLICY_LOSSES))
def test_float32_is_close_and_finite_at_any_ratio(name: str) -> None:
    """Ratios of e^200 (a policy that has forgotten a token) give a finite loss and gradient."""
    made = Made(name)
    wide = gradient_of(lambda x: POLICY_LOSSES[name](made.inputs(x)).loss, made.new)
    for key in ("new", "old", "advantages", "weights", "ref", "targets"):
        setattr(made, key, getattr(made, key).astype(np.float32))
    narrow = gradient_of(lambda x: POLICY_LOSSES[name](made.inputs(x)).loss, made.new)
    assert narrow.dtype == np.float32
    np.testing.assert_allclose(narrow, wide, rtol=2e-4, atol=2e-5)
    for shift in (-200.0, 200.0):
        made.old = made.new + np.float32(shift)
        far = POLICY_LOSSES[name](made.inputs(paddle.to_tensor(made.new)))
        gradient = gradient_of(lambda x: POLICY_LOSSES[name](made.inputs(x)).loss, made.new)
        assert np.isfinite(gradient).all() and np.isfinite(far.loss.item()) and np.isfinite(far.max_ratio.item())


def test_ppo_by_name_is_policy_loss_to_the_bit() -> None:
    made = Made()
    arrays = [paddle.to_tensor(a.astype(np.float32)) for a in (made.new, made.old, made.advantages, MASK)]
    for mean in ("token", "sequence"):
        for options in (PolicyOptions(), PolicyOptions(0.2, 0.28, 1.5)):
            one = policy_loss(*arrays, options.clip_range_low, options.clip_range_high, options.dual_clip, mean, 5.0)
            two = POLICY_LOSSES["ppo"](PolicyInputs(*arrays, mean, 5.0, options=options))
            assert all(getattr(one, key).item() == getattr(two, key).item() for key in one.__dataclass_fields__)
    weights = row_weights("token", MASK.sum(axis=1))
    three = POLICY_LOSSES["ppo"](
        PolicyInputs(*arrays, denominator=weights.denominator, row_weights=paddle.to_tensor(weights.weights))
    )
    assert three.loss.item() == policy_loss(*arrays).loss.item()


def test_all_losses_start_alike() -> None:
    """At ratio 1 every clipped loss has the gradient of ``-A logprob`` (per token, one advantage an answer)."""
    made = Made()
    made.new, made.weights = made.old.copy(), np.ones_like(MASK)
    made.advantages = made.advantages[:, :1] * np.ones_like(MASK)
    made.mode = "token"
    expected = gradient_of(lambda x: POLICY_LOSSES["reinforce"](made.inputs(x)).loss, made.new)
    for name in ("ppo", "gspo", "gmpo", "cispo", "sapo", "vespo"):
        got = gradient_of(lambda x, name=name: POLICY_LOSSES[name](made.inputs(x)).loss, made.new)
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-15)


def test_regression_needs_its_inputs() -> None:
    zeros = paddle.zeros([1, 1])
    with pytest.raises(ValueError, match="needs ref_logprobs and targets"):
        POLICY_LOSSES["apo"](PolicyInputs(zeros, zeros, zeros, zeros))


def test_aggregations_by_hand() -> None:
    losses = np.arange(16.0).reshape(4, 4) * MASK
    sums = losses.sum(axis=1)
    wanted = {
        "token": sums.sum() / 8,
        "sequence": (sums[0] / 4 + sums[1] / 2 + sums[2] / 2) / 3,
        "sequence_sum": sums.sum() / 3,
        "constant": sums.sum() / (4 * 7),
        "prompt": ((sums[0] + sums[1]) / 6 + sums[2] / 2) / 2,
    }
    assert set(wanted) == set(AGGREGATIONS)
    for mode, value in wanted.items():
        rows = row_weights(mode, MASK.sum(axis=1), GROUPS, 7)
        assert (rows.weights * sums).sum() / rows.denominator == pytest.approx(value)
        nothing = row_weights(mode, np.zeros(2), np.zeros(2), 7)
        assert not nothing.weights.any() and nothing.denominator >= 1
    with pytest.raises(ArgumentsError, match="the limit on new tokens; it is given None"):
        row_weights("constant", MASK.sum(axis=1))
    with pytest.raises(ArgumentsError, match="belong to the same prompt"):
        row_weights("prompt", MASK.sum(axis=1))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_masked_logprobs_are_renormalised_and_their_gradient_stays_inside(dtype: str) -> None:
    rng = np.random.default_rng(2)
    logits, keep = rng.normal(size=(5, 9)) * 3, rng.uniform(size=(5, 9)) > 0.4
    labels = np.array([0, 3, 5, 7, 8])
    keep[np.arange(5), labels] = True
    tensor, labels_, keep_ = paddle.to_tensor(logits.astype(dtype)), paddle.to_tensor(labels), paddle.to_tensor(keep)
    tensor.stop_gradient = False
    scores = score_labels(tensor, labels_, entropy_grad=True, keep=keep_)
    wide = np.where(keep, tensor.numpy().astype(np.float64), -np.inf)
    expected = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(scores.logprobs.numpy(), expected[np.arange(5), labels], rtol=1e-4, atol=1e-5)
    (scores.logprobs.sum() + scores.entropy.sum()).backward()
    gradient = tensor.grad.numpy()
    assert np.isfinite(gradient).all() and not gradient[~keep].any()
    if dtype == "float32":
        check_gradient(
            lambda x: (lambda s: s.logprobs.sum() + s.entropy.sum())(
                score_labels(x, labels_, 0.7, entropy_grad=True, keep=keep_)
            ),
            logits,
        )
