"""A model's forward and backward by the CPU kernels against the same model on paddlenlp's layers."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from alignment.errors import ModelError
from alignment.ppo.models import LoRASettings, Rows, hidden_states
from alignment.ppo.models.fused import FusedDecoder, Packed
from alignment.ppo.models.lora import add_lora

LENGTHS = np.array([4, 11, 1, 7])


def rows_of(kit, lengths=LENGTHS, width=13):
    return Rows(kit.ids(len(lengths), width).numpy(), lengths=lengths)


def packed_rows(kit):
    segments = np.array([[1] * 4 + [2] * 1 + [3] * 6 + [0] * 2, [1] * 3 + [2] * 10])
    positions = np.array([[*range(4), 0, *range(6), 0, 0], [*range(3), *range(10)]])
    return Rows(kit.ids(2, 13).numpy(), segments, positions, np.array([11, 13]))


def real_of(rows):
    return np.arange(rows.input_ids.shape[1]) < np.asarray(rows.lengths)[:, None]


def gradients(model, compute, rows):
    """Hidden states of the real tokens, and the gradients of all weights of a loss over them."""
    hidden = compute(rows)
    real = real_of(rows)
    weights = np.random.default_rng(0).standard_normal(hidden.shape) * real[..., None]
    (hidden * paddle.to_tensor(weights.astype(np.float32))).sum().backward()
    found = {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return hidden.numpy()[real], found


def assert_same(mine, theirs):
    np.testing.assert_allclose(mine[0], theirs[0], atol=2e-5)
    assert mine[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        np.testing.assert_allclose(mine[1][name], gradient, atol=3e-5 * max(1, np.abs(gradient).max()), err_msg=name)


@pytest.mark.parametrize("make_rows", [rows_of, packed_rows], ids=["padded", "packed"])
@pytest.mark.parametrize("recompute", [False, True])
def test_training_equals_paddlenlp(kit, model_type, make_rows, recompute):
    window = {"sliding_window": 3} if model_type == "mistral" else {}
    model, rows = kit.causal(model_type, **window), make_rows(kit)
    model.train()
    fused = FusedDecoder.of(model, recompute=recompute)
    assert fused is not None
    assert fused.trains
    theirs = gradients(model, lambda rows: hidden_states(model, rows), rows)
    assert_same(gradients(model, fused.hidden_states, rows), theirs)


def test_scaled_positions_equal_paddlenlp(kit):
    model, rows = kit.causal("llama", rope_scaling_type="linear", rope_scaling_factor=2.0), rows_of(kit)
    theirs = gradients(model, lambda rows: hidden_states(model, rows), rows)
    assert_same(gradients(model, FusedDecoder.of(model).hidden_states, rows), theirs)


def test_without_gradient_equals_training_bit_by_bit_and_pads_are_zero(kit, model_type):
    model, rows = kit.causal(model_type), rows_of(kit)
    fused = FusedDecoder.of(model)
    with paddle.no_grad():
        plain = fused.hidden_states(rows)
    trained = fused.hidden_states(rows)
    assert plain.stop_gradient
    assert not trained.stop_gradient
    np.testing.assert_array_equal(plain.numpy(), trained.numpy())
    assert not plain.numpy()[~real_of(rows)].any()


def test_what_stands_behind_the_end_changes_nothing(kit):
    model, rows = kit.causal("qwen2"), rows_of(kit)
    fused = FusedDecoder.of(model)
    other = np.where(real_of(rows), rows.input_ids, 5)
    with paddle.no_grad():
        expected = fused.hidden_states(rows).numpy()
        np.testing.assert_array_equal(fused.hidden_states(Rows(other, lengths=LENGTHS)).numpy(), expected)
        narrow = fused.hidden_states(Rows(other[:, :11], lengths=LENGTHS)).numpy()
    np.testing.assert_array_equal(narrow, expected[:, :11])


def test_recompute_gives_the_same_bits(kit):
    model, rows = kit.causal("gemma"), rows_of(kit)
    first, second = (gradients(model, FusedDecoder.of(model, recompute=on).hidden_states, rows) for on in (False, True))
    for name, gradient in first[1].items():
        np.testing.assert_array_equal(gradient, second[1][name], err_msg=name)


def test_packing(kit):
    packed = Packed.of(packed_rows(kit))
    np.testing.assert_array_equal(packed.starts, [0, 4, 5, 11, 14, 24])
    np.testing.assert_array_equal(packed.positions[:11], [*range(4), 0, *range(6)])
    np.testing.assert_array_equal(packed.slots[:14], [*range(11), 24, 24, 11])


def test_limits_are_those_of_the_other_path(kit):
    fused = FusedDecoder.of(kit.causal("llama"))
    with pytest.raises(ModelError, match=r"rows of 65 tokens.* reach 64"):
        fused.hidden_states(Rows(kit.ids(1, 65).numpy()))
    with pytest.raises(ModelError, match="row 1 has length 14"):
        fused.hidden_states(rows_of(kit, np.array([3, 14])))


def test_models_that_it_cannot_stand_for(kit, monkeypatch):
    frozen = kit.causal("qwen2")
    fused = FusedDecoder.of(frozen)
    next(iter(frozen.qwen2.parameters())).stop_gradient = True
    assert not fused.applies  # partly trained
    with paddle.no_grad():
        assert fused.applies
    for parameter in frozen.parameters():
        parameter.stop_gradient = True
    assert fused.applies
    assert not fused.trains
    assert FusedDecoder.of(add_lora(kit.causal("llama"), LoRASettings(rank=2))) is None
    assert FusedDecoder.of(kit.causal("llama", attention_dropout=0.1)) is None
    assert FusedDecoder.of(paddle.nn.Linear(3, 3)) is None
