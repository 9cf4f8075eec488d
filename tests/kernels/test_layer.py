"""A decoder layer by the kernels, forward and backward, against paddlenlp's own layer under Paddle's autograd."""

from __future__ import annotations

import os

import numpy as np
import paddle
import pytest

from alignment.kernels.ops import LayerShape
from alignment.ppo.models.decoder import Decoder, decoder_of
from alignment.ppo.models.forward import final_hidden_states
from tests.kernels.conftest import SIZES, make_model

LENGTHS = [1, 7, 53, 1, 12, 3, 100, 2]


def plan_of(lengths):
    """Positions and starts of packed sequences."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.concatenate([np.arange(length) for length in lengths])
    return paddle.to_tensor(np.concatenate([positions, starts]).astype(np.int64))


def draw(shape, seed=0, scale=1.0):
    return paddle.to_tensor((np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32))


def by_kernels(operators, decoder, x, upstream, lengths):
    """Outputs, ``dx`` and the weights' gradients of the first layer."""
    shape, weights, plan = decoder.shape, decoder.layers[0], plan_of(lengths)
    angles = decoder.angles(max(lengths))
    outputs = operators.layer_forward(x, weights, angles, plan, shape, len(lengths))
    gradients = operators.layer_backward(x, weights, angles, plan, outputs[1:], upstream, shape, len(lengths))
    return [outputs[0], *gradients]


def by_paddle(model, decoder, x, upstream, lengths):
    """The same by paddlenlp's layer, each sequence alone. The layer's output is what the final norm gets."""
    found = {}
    hook = decoder.backbone.norm.register_forward_pre_hook(lambda layer, inputs: found.update(y=inputs[0]))
    parts, begin = [], 0
    leaf = x.clone().detach()
    leaf.stop_gradient = False
    for length in lengths:
        embedded = leaf[begin : begin + length].unsqueeze(0) / decoder.embedding_scale
        # ids only give the shape
        ids = paddle.zeros([1, length], dtype="int64")
        final_hidden_states(model, ids, received=embedded)
        parts.append(found["y"].reshape([length, -1]))
        begin += length
    hook.remove()
    y = paddle.concat(parts)
    (y * upstream).sum().backward()
    gradients = [leaf.grad, *[weight.grad.clone() for weight in decoder.layers[0]]]
    for weight in decoder.layers[0]:
        weight.grad = None
    return [y, *gradients]


def assert_close(mine, theirs):
    for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        a, b = a.numpy(), b.numpy()
        assert a.shape == b.shape
        scale = np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=4e-5 * max(1.0, scale), err_msg=f"tensor {number}")


@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("lengths", [LENGTHS, [1], [97]], ids=["many", "one token", "one sequence"])
def test_layer_equals_paddlenlp_forward_and_backward(operators, family, lengths):
    model = make_model(family)
    decoder = decoder_of(model)
    assert isinstance(decoder, Decoder)
    x, upstream = draw([sum(lengths), decoder.shape.hidden]), draw([sum(lengths), decoder.shape.hidden], 1)
    assert_close(by_kernels(operators, decoder, x, upstream, lengths), by_paddle(model, decoder, x, upstream, lengths))


@pytest.mark.parametrize("family", ["qwen2", "gemma"])
def test_layer_with_products_deeper_and_taller_than_a_block(operators, family):
    """Over 512 in K (tokens for the weights' gradients, the intermediate width for down) and over 240 rows."""
    model = make_model(family, intermediate_size=530)
    decoder = decoder_of(model)
    lengths = [70] * 8 + [13]
    x, upstream = draw([sum(lengths), decoder.shape.hidden]), draw([sum(lengths), decoder.shape.hidden], 1, 0.1)
    assert_close(by_kernels(operators, decoder, x, upstream, lengths), by_paddle(model, decoder, x, upstream, lengths))


@pytest.mark.parametrize("family", SIZES)
def test_threads_do_not_change_a_bit(operators, family):
    decoder = decoder_of(make_model(family))
    x, upstream = draw([sum(LENGTHS), decoder.shape.hidden]), draw([sum(LENGTHS), decoder.shape.hidden], 1)
    results = []
    try:
        for count in (1, 2, 3):
            paddle.base.core.set_num_threads(count)
            results.append(by_kernels(operators, decoder, x, upstream, LENGTHS))
    finally:
        paddle.base.core.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a.numpy(), b.numpy())


@pytest.mark.parametrize("family", SIZES)
def test_a_sequence_does_not_depend_on_its_neighbours(operators, family):
    """Outputs and input gradients of each sequence alone are bit by bit those in company."""
    decoder = decoder_of(make_model(family))
    x, upstream = draw([sum(LENGTHS), decoder.shape.hidden]), draw([sum(LENGTHS), decoder.shape.hidden], 1)
    together = by_kernels(operators, decoder, x, upstream, LENGTHS)[:2]
    begin = 0
    for length in LENGTHS:
        some = slice(begin, begin + length)
        alone = by_kernels(operators, decoder, x[some], upstream[some], [length])[:2]
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_array_equal(a.numpy(), b[some].numpy())
        begin += length


@pytest.mark.parametrize("activation", [0, 1])
def test_gradients_are_those_of_finite_differences(operators, activation):
    shape = LayerShape(6, 5, 2, 1, 4, 3, activation, 1e-5, float(activation), True)
    sizes = [[6], [6, 8], [6, 4], [6, 4], [8, 6], [6], [6, 5], [6, 5], [5, 6], [8], [4], [4]]
    weights = [draw(size, seed, 0.5) for seed, size in enumerate(sizes)]
    angle = np.random.default_rng(3).uniform(0, 2, [8, 2]).astype(np.float32)
    angles = paddle.to_tensor(np.cos(angle)), paddle.to_tensor(np.sin(angle))
    lengths = [5, 1, 2]
    plan, upstream, x = plan_of(lengths), draw([8, 6], 21), draw([8, 6], 20)

    def loss(inputs):
        out = operators.layer_forward(inputs[0], inputs[1:], angles, plan, shape, len(lengths))[0]
        return float((out.numpy().astype(np.float64) * upstream.numpy()).sum())

    inputs = [x, *weights]
    saved = operators.layer_forward(x, weights, angles, plan, shape, len(lengths))[1:]
    gradients = operators.layer_backward(x, weights, angles, plan, saved, upstream, shape, len(lengths))
    step = 1e-2
    for number, (tensor, gradient) in enumerate(zip(inputs, gradients, strict=True)):
        direction = np.random.default_rng(number).choice([-1.0, 1.0], tensor.shape).astype(np.float32)
        values = []
        for sign in (1, -1):
            moved = list(inputs)
            moved[number] = tensor + paddle.to_tensor(direction * step * sign)
            values.append(loss(moved))
        expected = float((gradient.numpy().astype(np.float64) * direction).sum())
        found = (values[0] - values[1]) / (2 * step)
        assert found == pytest.approx(expected, rel=0.02, abs=0.02), f"tensor {number}"
