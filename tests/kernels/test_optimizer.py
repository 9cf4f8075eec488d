"""AdamW by the kernel against Paddle's, with Paddle's own state."""

from __future__ import annotations

import os

import numpy as np
import paddle
import pytest

from alignment.engine import optimizer as module
from alignment.engine.optimizer import OptimizerSettings, adamw_step, decays, global_norm, slots_of

SHAPES = [[7], [33, 5], [1], [260, 257], [16]]
SETTINGS = OptimizerSettings(learning_rate=1e-2, weight_decay=0.1, adam_epsilon=1e-6)


def make(seed=0):
    draw = np.random.default_rng(seed)
    parameters = []
    for shape in SHAPES:
        parameter = paddle.create_parameter(shape, "float32")
        parameter.set_value(draw.standard_normal(shape).astype(np.float32))
        parameters.append(parameter)
    decayed = {p.name for p in parameters if decays(p)}
    optimizer = paddle.optimizer.AdamW(
        learning_rate=1e-2,
        epsilon=1e-6,
        parameters=parameters,
        weight_decay=0.1,
        apply_decay_param_fun=decayed.__contains__,
    )
    return parameters, optimizer


def run(monkeypatch, way, steps=6, threads=1):
    """Weights and state after some steps; the third tensor has no gradient in the first two."""
    if way == "paddle":
        monkeypatch.setattr(module, "kernels", lambda: None)
    parameters, optimizer = make()
    norms = []
    try:
        paddle.base.core.set_num_threads(threads)
        for step in range(steps):
            draw = np.random.default_rng(step)
            for number, parameter in enumerate(parameters):
                values = paddle.to_tensor(draw.standard_normal(parameter.shape).astype(np.float32))
                parameter.grad = None if number == 2 and step < 2 else values
            norms.append(global_norm(parameters))
            with paddle.no_grad():
                adamw_step(optimizer, parameters, SETTINGS, 1e-2 / (1 + step), 0.5 if step % 2 else 1.0)
    finally:
        paddle.base.core.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        monkeypatch.undo()
    names = {str(number): parameter for number, parameter in enumerate(parameters)}
    state = {(name, slot): tensor.numpy() for name, slot, tensor in slots_of(optimizer, names)}
    return [p.numpy() for p in parameters], state, norms


def test_it_is_paddles_adamw(monkeypatch):
    mine, theirs = run(monkeypatch, "kernel"), run(monkeypatch, "paddle")
    for a, b in zip(mine[0], theirs[0], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    assert mine[1].keys() == theirs[1].keys()
    for key, value in theirs[1].items():
        np.testing.assert_allclose(mine[1][key], value, rtol=2e-5, atol=1e-7, err_msg=str(key))
    assert mine[2] == pytest.approx(theirs[2], rel=1e-6)


def test_threads_do_not_change_a_bit(monkeypatch):
    one, two = run(monkeypatch, "kernel"), run(monkeypatch, "kernel", threads=2)
    for a, b in zip(one[0], two[0], strict=True):
        np.testing.assert_array_equal(a, b)
    for key, value in one[1].items():
        np.testing.assert_array_equal(value, two[1][key])
    assert one[2] == two[2]


def test_not_a_number_shows_in_the_norm():
    parameters, _ = make()
    for parameter in parameters:
        parameter.grad = paddle.ones_like(parameter)
    parameters[3].grad[100, 100] = float("nan")
    assert np.isnan(global_norm(parameters))
