"""Log-probs and entropy of labels from hidden states, forward and backward, against float64."""

from __future__ import annotations

import os

import numpy as np
import paddle
import pytest

from alignment.losses.token_sets import TokenSets


def exact(x, weight, labels, temperature, of_logprobs, of_entropy, mask=None):
    """Log-probs, entropy, and the gradients of x and of the weight ``[hidden, vocab]``, in float64; over what a mask
    ``[rows, vocab]`` shows, if there is one.
    """
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    logits = x @ weight / temperature
    if mask is not None:
        logits = np.where(mask, logits, -1e30)
    shifted = logits - logits.max(-1, keepdims=True)
    logp = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    p = np.exp(logp)
    entropy = -(p * logp).sum(-1)
    onehot = np.eye(weight.shape[1])[labels]
    dlogits = of_logprobs[:, None] * (onehot - p) - of_entropy[:, None] * p * (logp + entropy[:, None])
    dlogits /= temperature
    return logp[np.arange(len(labels)), labels], entropy, dlogits @ weight.T, x.T @ dlogits


@pytest.mark.parametrize(
    ("rows", "hidden", "vocab"), [(1, 36, 37), (5, 8, 3), (19, 36, 37), (70, 24, 1031), (2100, 12, 45), (9, 600, 2049)]
)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equal_float64(operators, rows, hidden, vocab, tied, temperature):
    draw = np.random.default_rng(rows)
    x = draw.standard_normal([rows, hidden]).astype(np.float32)
    weight = (draw.standard_normal([hidden, vocab]) / np.sqrt(hidden) * 2).astype(np.float32)
    labels = draw.integers(0, vocab, rows)
    of_logprobs, of_entropy = draw.standard_normal([2, rows]).astype(np.float32)
    held = paddle.to_tensor(np.ascontiguousarray(weight.T) if tied else weight)
    inputs = (paddle.to_tensor(x), held, paddle.to_tensor(labels))
    for with_entropy in (False, True):
        expected = exact(x, weight, labels, temperature, of_logprobs, of_entropy * with_entropy)
        logprobs, entropy, log_norm, greedy = operators.label_logprobs(
            *inputs, temperature, tied=tied, entropy=with_entropy
        )
        grads = (paddle.to_tensor(of_logprobs), paddle.to_tensor(of_entropy) if with_entropy else None)
        dx, dweight = operators.label_logprobs_backward(*inputs, log_norm, entropy, grads, temperature, tied=tied)
        np.testing.assert_allclose(logprobs.numpy(), expected[0], atol=2e-5)
        np.testing.assert_allclose(entropy.numpy(), expected[1] * with_entropy, atol=2e-5)
        np.testing.assert_allclose(dx.numpy(), expected[2], atol=2e-5)
        of_weight = dweight.numpy().T if tied else dweight.numpy()
        np.testing.assert_allclose(of_weight, expected[3], atol=2e-5 * max(1.0, np.abs(expected[3]).max()))
        logits = x.astype(np.float64) @ weight
        np.testing.assert_array_equal(greedy.numpy(), (logits.argmax(-1) == labels).astype(np.float32))


@pytest.mark.parametrize(
    ("rows", "hidden", "vocab"), [(5, 8, 3), (19, 36, 37), (70, 24, 1031), (2100, 12, 45), (9, 60, 3000)]
)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("share", [0.005, 0.4])
def test_over_sets_equal_float64(operators, rows, hidden, vocab, tied, share):
    """NLPO: sets of every size, some with nothing in a block of the vocabulary, some of one token."""
    draw = np.random.default_rng(rows)
    x = draw.standard_normal([rows, hidden]).astype(np.float32)
    weight = (draw.standard_normal([hidden, vocab]) / np.sqrt(hidden) * 2).astype(np.float32)
    labels = draw.integers(0, vocab, rows)
    mask = draw.random((rows, vocab)) < share
    mask[0], mask[1] = True, False
    mask[np.arange(rows), labels] = True
    sets = TokenSets.of(mask)
    starts = np.concatenate([[0], np.cumsum(sets.counts)])
    ragged = paddle.to_tensor(sets.ids.astype(np.int64)), paddle.to_tensor(starts)
    of_logprobs, of_entropy = draw.standard_normal([2, rows]).astype(np.float32)
    held = paddle.to_tensor(np.ascontiguousarray(weight.T) if tied else weight)
    inputs = (paddle.to_tensor(x), held, paddle.to_tensor(labels))
    expected = exact(x, weight, labels, 0.7, of_logprobs, of_entropy, mask)
    logprobs, entropy, log_norm, greedy = operators.label_logprobs(*inputs, 0.7, tied=tied, entropy=True, sets=ragged)
    grads = (paddle.to_tensor(of_logprobs), paddle.to_tensor(of_entropy))
    dx, dweight = operators.label_logprobs_backward(*inputs, log_norm, entropy, grads, 0.7, tied=tied, sets=ragged)
    np.testing.assert_allclose(logprobs.numpy(), expected[0], atol=2e-5)
    np.testing.assert_allclose(entropy.numpy(), expected[1], atol=2e-5)
    np.testing.assert_allclose(dx.numpy(), expected[2], atol=2e-5)
    of_weight = dweight.numpy().T if tied else dweight.numpy()
    np.testing.assert_allclose(of_weight, expected[3], atol=2e-5 * max(1.0, np.abs(expected[3]).max()))
    best = np.where(mask, x.astype(np.float64) @ weight, -np.inf).argmax(-1)
    np.testing.assert_array_equal(greedy.numpy(), (best == labels).astype(np.float32))


def test_sets_of_everything_are_the_same_bits_as_none(operators):
    draw = np.random.default_rng(2)
    x, weight = (paddle.to_tensor(draw.standard_normal(s).astype(np.float32)) for s in ([7, 12], [12, 2100]))
    labels, ids = paddle.arange(7), paddle.to_tensor(np.tile(np.arange(2100), 7))
    sets = ids, paddle.to_tensor(np.arange(8) * 2100)
    results = []
    for ragged in ((None, None), sets):
        outs = operators.label_logprobs(x, weight, labels, 0.9, tied=False, entropy=True, sets=ragged)
        grads = (paddle.ones([7]), paddle.ones([7]))
        dx, dw = operators.label_logprobs_backward(
            x, weight, labels, outs[2], outs[1], grads, 0.9, tied=False, sets=ragged
        )
        results.append([part.numpy() for part in (*outs, dx, dw)])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_label_outside_its_set_has_no_chance_and_no_gradient(operators):
    x, weight = paddle.ones([2, 4]), paddle.to_tensor(np.random.default_rng(0).normal(size=[4, 9]).astype(np.float32))
    sets = paddle.to_tensor([1, 3, 2, 5]), paddle.to_tensor([0, 2, 4])
    labels = paddle.to_tensor([2, 2])
    logprobs, entropy, log_norm, greedy = operators.label_logprobs(
        x, weight, labels, 1.0, tied=False, entropy=True, sets=sets
    )
    assert float(logprobs[0]) < -1e29 and float(logprobs[1]) > -10 and float(greedy[0]) == 0
    grads = (paddle.ones([2]), None)
    _, dweight = operators.label_logprobs_backward(
        x, weight, labels, log_norm, entropy, grads, 1.0, tied=False, sets=sets
    )
    assert (dweight.numpy()[:, [0, 4, 6, 7, 8]] == 0).all() and np.isfinite(dweight.numpy()).all()


def test_no_rows(operators):
    x, weight, labels = paddle.zeros([0, 8]), paddle.ones([8, 11]), paddle.zeros([0], dtype="int64")
    logprobs, entropy, log_norm, greedy = operators.label_logprobs(x, weight, labels, 1.0, tied=False, entropy=True)
    assert [list(t.shape) for t in (logprobs, entropy, log_norm, greedy)] == [[0]] * 4
    dx, dweight = operators.label_logprobs_backward(
        x, weight, labels, log_norm, entropy, (logprobs, None), 1.0, tied=False
    )
    assert list(dx.shape) == [0, 8]
    np.testing.assert_array_equal(dweight.numpy(), np.zeros([8, 11]))


@pytest.mark.parametrize("place", [0, 1500])
def test_far_below_minus_64_value_and_gradient_are_exact(operators, place):
    """The best token's logit is 500 above the label's, in the same block of the vocabulary or in another."""
    vocab = 2050
    weight = np.zeros([2, vocab], dtype=np.float32)
    weight[0, 1501], weight[1, place] = 500.0, 1.0
    x = np.array([[1.0, 0.0]], dtype=np.float32)
    inputs = (paddle.to_tensor(x), paddle.to_tensor(weight), paddle.to_tensor([place]))
    logprobs, entropy, log_norm, _ = operators.label_logprobs(*inputs, 1.0, tied=False, entropy=True)
    assert float(logprobs) == -500.0
    assert float(entropy) == pytest.approx(0.0, abs=1e-6)
    dx, dweight = operators.label_logprobs_backward(
        *inputs, log_norm, entropy, (paddle.ones([1]), None), 1.0, tied=False
    )
    np.testing.assert_allclose(dx.numpy(), [[-500.0, 1.0]], rtol=1e-5)
    np.testing.assert_allclose(dweight.numpy()[0, [place, 1501]], [1.0, -1.0], rtol=1e-5)


def test_not_a_number_is_handed_on(operators):
    x = paddle.to_tensor([[float("nan"), 1.0], [1.0, 1.0]])
    labels = paddle.to_tensor([0, 0])
    logprobs = operators.label_logprobs(x, paddle.ones([2, 33]), labels, 1.0, tied=False, entropy=False)[0].numpy()
    assert np.isnan(logprobs[0])
    assert logprobs[1] == pytest.approx(-np.log(33))


def test_threads_and_company_do_not_change_a_bit(operators):
    draw = np.random.default_rng(0)
    x, weight = draw.standard_normal([300, 20]).astype(np.float32), draw.standard_normal([20, 1100]).astype(np.float32)
    labels = draw.integers(0, 1100, 300)
    upstream = paddle.to_tensor(draw.standard_normal(300).astype(np.float32))

    def run(rows):
        inputs = (paddle.to_tensor(x[rows]), paddle.to_tensor(weight), paddle.to_tensor(labels[rows]))
        outs = operators.label_logprobs(*inputs, 0.9, tied=False, entropy=True)
        grads = (upstream[rows], upstream[rows])
        gradients = operators.label_logprobs_backward(*inputs, outs[2], outs[1], grads, 0.9, tied=False)
        return [tensor.numpy() for tensor in [*outs, *gradients]]

    core = paddle.base.core
    try:
        core.set_num_threads(1)
        one = run(slice(0, 300))
        core.set_num_threads(2)
        two = run(slice(0, 300))
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a, b)
        for a, b in zip(run(slice(7, 8))[:5], one, strict=False):
            np.testing.assert_array_equal(a, b[7:8])
    finally:
        core.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
