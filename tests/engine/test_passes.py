"""One optimizer step against NumPy, clipping, and state that goes to the disk and back bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle import nn

from alignment.engine.engine import Engine, OptimizerSettings
from alignment.errors import CheckpointError, NonFiniteError
from alignment.parallel import World
from tests.precision import DTYPE

SETTINGS = OptimizerSettings(
    learning_rate=1e-2,
    weight_decay=0.1,
    adam_beta1=0.9,
    adam_beta2=0.95,
    max_grad_norm=0.0,
    lr_scheduler_type="cosine",
    warmup_steps=2,
    total_steps=10,
)


class Net(nn.Layer):
    def __init__(self, seed: int) -> None:
        super().__init__()
        paddle.seed(seed)
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 1)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.last(self.norm(paddle.tanh(self.first(x)))).squeeze(-1)


@pytest.fixture
def data() -> tuple[paddle.Tensor, paddle.Tensor]:
    draw = np.random.default_rng(0)
    x = draw.standard_normal((16, 6)).astype("float32")
    return paddle.to_tensor(x), paddle.to_tensor(x.sum(axis=1) * 3)


def loss_of(engine: Engine, data: tuple[paddle.Tensor, paddle.Tensor]) -> paddle.Tensor:
    return (engine.model(data[0]) - data[1]).square().mean()


def step(engine: Engine, data: tuple[paddle.Tensor, paddle.Tensor]) -> tuple[float, float]:
    loss = loss_of(engine, data)
    loss.backward()
    return float(loss), engine.step().grad_norm


def numpy_adamw(weights: dict, gradients: dict, state: dict, settings: OptimizerSettings, t: int) -> dict:
    rate, b1, b2 = settings.learning_rate_at(t - 1), settings.adam_beta1, settings.adam_beta2
    result = {}
    for name, w in weights.items():
        if gradients[name] is None:
            result[name] = w
            continue
        m, v = state.setdefault(name, [np.zeros_like(w), np.zeros_like(w)])
        m[:] = b1 * m + (1 - b1) * gradients[name]
        v[:] = b2 * v + (1 - b2) * gradients[name] ** 2
        decay = settings.weight_decay if w.ndim >= 2 else 0.0
        update = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + settings.adam_epsilon)
        result[name] = w * (1 - rate * decay) - rate * update
    return result


def snapshot(engine: Engine) -> tuple[dict, dict]:
    weights = {n: p.numpy().astype(np.float64) for n, p in engine.parameters.items()}
    gradients = {n: None if p.grad is None else p.grad.numpy().astype(np.float64) for n, p in engine.parameters.items()}
    return weights, gradients


@pytest.mark.parametrize("limit", [0.0, 0.25])
def test_step_is_adamw_with_global_clipping(data, limit: float) -> None:
    settings = OptimizerSettings(**{**SETTINGS.__dict__, "max_grad_norm": limit})
    engine, state = Engine("net", Net(0), World(), settings), {}
    for t in range(1, 6):
        loss_of(engine, data).backward()
        weights, gradients = snapshot(engine)
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values() if g is not None))
        assert norm > 0.25
        if limit:
            gradients = {n: None if g is None else g * (limit / norm) for n, g in gradients.items()}
        assert engine.learning_rate == settings.learning_rate_at(t - 1)
        result = engine.step()
        assert result.grad_norm == pytest.approx(norm, rel=1e-5)
        assert result.learning_rate == settings.learning_rate_at(t - 1)
        expected = numpy_adamw(weights, gradients, state, settings, t)
        for name, parameter in engine.parameters.items():
            np.testing.assert_allclose(parameter.numpy(), expected[name], rtol=2e-5, atol=2e-7, err_msg=name)
        assert all(p.grad is None for p in engine.parameters.values())


def test_gradients_of_micro_batches_add_up(data) -> None:
    x, y = data
    whole, parts = Engine("a", Net(0), World(), SETTINGS), Engine("b", Net(0), World(), SETTINGS)
    ((whole.model(x) - y).square().sum() / 16).backward()
    for start, stop in ((0, 3), (3, 4), (4, 16)):
        ((parts.model(x[start:stop]) - y[start:stop]).square().sum() / 16).backward()
    assert whole.step().grad_norm == pytest.approx(parts.step().grad_norm, rel=1e-5)
    for name, parameter in whole.parameters.items():
        np.testing.assert_allclose(parameter.numpy(), parts.parameters[name].numpy(), rtol=1e-4, atol=1e-6)


def test_state_round_trip_is_bit_equal(data, tmp_path: Path) -> None:
    first = Engine("net", Net(0), World(), SETTINGS)
    for _ in range(3):
        step(first, data)
    first.save_state(tmp_path / "optimizer.safetensors")
    paddle.save(first.model.state_dict(), str(tmp_path / "model_state.pdparams"))
    expected = [step(first, data) for _ in range(3)]

    second = Engine("net", Net(1), World(), SETTINGS)
    second.load_weights(tmp_path)
    second.load_state(tmp_path / "optimizer.safetensors")
    assert second.steps == 3
    assert [step(second, data) for _ in range(3)] == expected
    assert second.parameter_fingerprints() == first.parameter_fingerprints()

    # Into an engine that has already taken steps of its own.
    first.load_weights(tmp_path)
    first.load_state(tmp_path / "optimizer.safetensors")
    assert [step(first, data) for _ in range(3)] == expected
    kept, other = first.state_dict(), second.state_dict()
    assert kept["steps"] == other["steps"] == 6
    assert set(kept["slots"]["first.weight"]) == {"moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc"}
    for name, slots in kept["slots"].items():
        for slot, value in slots.items():
            assert (value == other["slots"][name][slot]).all(), (name, slot)


def test_state_before_the_first_step(tmp_path: Path) -> None:
    engine = Engine("net", Net(0), World(), SETTINGS)
    engine.save_state(tmp_path / "s")
    engine.load_state(tmp_path / "s")
    assert engine.steps == 0


def test_state_of_another_model_is_refused(data, tmp_path: Path) -> None:
    engine = Engine("net", Net(0), World(), SETTINGS)
    step(engine, data)
    engine.save_state(tmp_path / "s")
    other = Engine("other", nn.Linear(6, 1), World(), SETTINGS)
    with pytest.raises(CheckpointError, match="belongs to another model"):
        other.load_state(tmp_path / "s")
    (tmp_path / "s").write_bytes((tmp_path / "s").read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cannot read the optimizer state"):
        engine.load_state(tmp_path / "s")
    with pytest.raises(CheckpointError, match="cannot read the optimizer state"):
        engine.load_state(tmp_path / "nowhere")


def test_load_weights_names_what_is_wrong(tmp_path: Path) -> None:
    engine = Engine("net", Net(0), World(), SETTINGS)
    with pytest.raises(CheckpointError, match="no weight file"):
        engine.load_weights(tmp_path)
    state = {name: tensor.numpy() for name, tensor in engine.model.state_dict().items()}
    del state["last.bias"]
    paddle.save(state, str(tmp_path / "model_state.pdparams"))
    with pytest.raises(CheckpointError, match=r"lack last\.bias"):
        engine.load_weights(tmp_path)
    paddle.save({**state, "last.bias": np.zeros(3, "float32")}, str(tmp_path / "model_state.pdparams"))
    with pytest.raises(CheckpointError, match=r"last\.bias in .* has shape \[3\], the model's is \[1\]"):
        engine.load_weights(tmp_path)
    (tmp_path / "model_state.pdparams").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="cannot read the weights"):
        engine.load_weights(tmp_path)


def test_a_nan_gradient_touches_no_weight(data) -> None:
    engine = Engine("net", Net(0), World(), SETTINGS)
    before = engine.parameter_fingerprints()
    (loss_of(engine, data) * float("nan")).backward()
    with pytest.raises(NonFiniteError, match="gradient norm of optimizer step 1 is nan"):
        engine.step()
    assert engine.parameter_fingerprints() == before
    assert engine.steps == 0


def test_fingerprints_see_every_moved_tensor(data) -> None:
    engine = Engine("net", Net(0), World(), SETTINGS)
    before = engine.parameter_fingerprints()
    step(engine, data)
    moved = {name for name, value in engine.parameter_fingerprints().items() if value != before[name]}
    assert moved == {name for name in before if not name.startswith("unused")}


def test_frozen_engine() -> None:
    model = Net(0)
    engine = Engine("reference", model, World())
    assert not engine.trainable and not model.training and engine.learning_rate == 0.0
    assert all(p.stop_gradient for p in model.parameters())
    with pytest.raises(RuntimeError, match="frozen"):
        engine.step()
    assert len(engine.parameter_fingerprints()) == len(model.parameters())


@pytest.mark.parametrize("arch", ["qwen2", "llama"])
def test_a_model_with_a_tied_head_loads_what_it_saved(arch: str, tmp_path: Path) -> None:
    from alignment.ppo.models import load_causal_lm
    from tests.tiny import tiny_model_dir

    folder = tiny_model_dir(tmp_path / "model", arch, tie_word_embeddings=True)
    engine = Engine("actor", load_causal_lm(folder, dtype=DTYPE), World(), SETTINGS)
    for parameter in engine.model.parameters():
        parameter.set_value(parameter * 2.0)
    engine.save_weights(tmp_path / "saved")
    other = Engine("actor", load_causal_lm(folder, dtype=DTYPE), World(), SETTINGS)
    assert other.parameter_fingerprints() != engine.parameter_fingerprints()
    other.load_weights(tmp_path / "saved")
    assert other.parameter_fingerprints() == engine.parameter_fingerprints()
