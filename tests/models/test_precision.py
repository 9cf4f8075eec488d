"""bfloat16 on a CPU: what is rounded where, by the layers' hooks and by the kernels alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from alignment.engine.optimizer import OptimizerSettings, adamw_step, global_norm
from alignment.parallel.gradients import add_up_in_float32, gradient, set_gradient
from alignment.ppo.models import (
    LoRASettings,
    Rows,
    backbone_of,
    hidden_states,
    lm_logits,
    load_causal_lm,
    merge_lora,
    save_model,
)
from alignment.ppo.models.fused import FusedDecoder
from alignment.ppo.models.precision import rounded, store_in_bfloat16
from alignment.ppo.models.safetensors_file import bfloat16_to_float32, to_bfloat16
from tests.precision import read_weights, stored_codes

Folder = Callable[[str], Path]


def nearest(array: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 numbers, by NumPy."""
    return bfloat16_to_float32(to_bfloat16(array))


def test_rounding_is_to_nearest_and_halves_to_even() -> None:
    draw = np.random.default_rng(0)
    numbers = (draw.standard_normal(4099) * np.exp(draw.uniform(-80, 80, 4099))).astype(np.float32)
    numbers[:6] = [1.00390625, 1.01171875, -0.0, np.inf, -np.inf, 3.4e38]  # two halves: down and up to even
    np.testing.assert_array_equal(rounded(paddle.to_tensor(numbers)).numpy(), nearest(numbers))
    assert rounded(paddle.to_tensor(numbers[:2])).tolist() == [1.0, 1.015625]
    assert np.isnan(rounded(paddle.to_tensor([float("nan")])).numpy()).all()


def test_the_gradient_passes_through() -> None:
    x = paddle.to_tensor([1.001, 2.003], stop_gradient=False)
    (rounded(x) * paddle.to_tensor([3.001, 5.003])).sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), np.array([3.001, 5.003], np.float32))


def rows(count: int = 3, width: int = 24) -> Rows:
    draw = np.random.default_rng(1)
    return Rows(draw.integers(2, 60, (count, width)), lengths=np.array([width, width // 2, 3][:count]))


def test_layers_hand_on_bfloat16_numbers(model_type: str, causal_folder: Folder) -> None:
    model = load_causal_lm(causal_folder(model_type), dtype="bfloat16")
    model.eval()
    seen: dict[str, np.ndarray] = {}

    def keep(name: str) -> Any:
        def hook(layer: Any, inputs: Any, output: Any) -> None:
            seen[name + " in"] = inputs[0].numpy()
            if not isinstance(output, tuple | list):
                seen[name] = output.numpy()

        return hook

    backbone = backbone_of(model)
    for number, layer in enumerate(backbone.layers):
        layer.register_forward_post_hook(keep(f"layer {number}"))
        for name, inner in layer.named_sublayers():
            if name.endswith(("_proj", "layernorm")):
                inner.register_forward_post_hook(keep(f"{number} {name}"))
    backbone.norm.register_forward_post_hook(keep("norm"))
    hidden_states(model, rows())
    wanted = [name for name in seen if not name.endswith(" in") and not name.startswith("layer")]
    wanted += [
        name for name in seen if name.endswith(("o_proj in", "down_proj in", "norm in")) and "layernorm" not in name
    ]
    wanted += [name for name in seen if name.startswith("layer") and name.endswith(" in")]
    assert len(wanted) == 2 * 9 + 1 + 2 * 2 + 1 + 2
    for name in wanted:
        np.testing.assert_array_equal(seen[name], nearest(seen[name]), err_msg=name)


def both_ways(model: Any, given: Rows) -> list[np.ndarray]:
    """Final hidden states of the real tokens by paddlenlp's layers and by the kernels."""
    operators = FusedDecoder.of(model)
    assert operators is not None
    mask = np.arange(given.input_ids.shape[1]) < given.lengths[:, None]  # type: ignore[index]
    return [hidden_states(model, given).numpy()[mask], operators.hidden_states(given).numpy()[mask]]


def test_kernels_and_layers_round_in_the_same_places(kit: Any, model_type: str) -> None:
    """All but a few numbers have the same bits (float32 sums in another order may round to the neighbour); without
    rounding in one of the places a large share would differ.
    """
    model = kit.causal(model_type, num_hidden_layers=1)
    model.eval()
    with paddle.no_grad():
        exact, _ = both_ways(model, rows())
        layers, kernels = both_ways(store_in_bfloat16(model), rows())
    assert (layers != kernels).mean() < 0.02
    np.testing.assert_allclose(layers, kernels, rtol=2**-7, atol=2**-7)
    assert 1e-3 < np.abs(layers - exact).max() < 0.5, "rounding shows, and is small"


def test_gradients_of_kernels_and_layers_agree(model_type: str, causal_folder: Folder) -> None:
    found = []
    for kind in ("layers", "kernels"):
        model = load_causal_lm(causal_folder(model_type), dtype="bfloat16")
        model.train()
        given = rows(1)
        hidden = hidden_states(model, given) if kind == "layers" else FusedDecoder.of(model).hidden_states(given)  # type: ignore[union-attr]
        weights = np.random.default_rng(2).standard_normal(hidden.shape).astype(np.float32)
        (hidden * paddle.to_tensor(weights)).sum().backward()
        found.append({name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, one in found[0].items():
        assert np.linalg.norm(one - found[1][name]) <= 2e-2 * np.linalg.norm(one) + 1e-5, name


def test_training_and_scoring_see_the_same_numbers(causal_folder: Folder) -> None:
    model = load_causal_lm(causal_folder("qwen2"), dtype="bfloat16")
    operators = FusedDecoder.of(model)
    assert operators is not None
    trained = operators.hidden_states(rows()).numpy()
    with paddle.no_grad():
        np.testing.assert_array_equal(operators.hidden_states(rows()).numpy(), trained)


def test_gradients_of_bfloat16_tensors_add_up_in_float32() -> None:
    """B2: in bfloat16 a sum of 1 and 256 small numbers stays 1."""
    parameter = paddle.create_parameter([2], "float32").astype("bfloat16")
    parameter.stop_gradient = False
    parameter = paddle.base.framework.EagerParamBase.from_tensor(parameter, trainable=True)
    add_up_in_float32([parameter])
    for size in [1.0, *[2**-9] * 256]:
        (parameter.astype("float32") * size).sum().backward()
    assert parameter.grad is None or not parameter.grad._is_initialized()
    assert gradient(parameter).dtype == paddle.float32
    assert gradient(parameter).tolist() == [1.5, 1.5]
    set_gradient(parameter, None)
    assert gradient(parameter) is None


def test_adamw_gets_the_main_gradients() -> None:
    """B2: clipped in float32, and handed to Paddle's AdamW in place of the bfloat16 ones."""

    class Optimizer:
        _master_weights: dict[str, Any] = {}

        def set_lr(self, rate: float) -> None:
            self.rate = rate

        def _apply_optimize(self, loss: Any, startup_program: Any, params_grads: list[tuple[Any, Any]]) -> None:
            self.pairs = params_grads

    one, untouched = (
        paddle.base.framework.EagerParamBase.from_tensor(paddle.ones([2]).astype("bfloat16")) for _ in range(2)
    )
    add_up_in_float32([one, untouched])
    set_gradient(one, paddle.to_tensor([3.0, 4.0]))
    assert global_norm([one, untouched]) == 5.0
    optimizer = Optimizer()
    adamw_step(optimizer, [one, untouched], OptimizerSettings(1e-3), 1e-3, 0.001)
    [(parameter, grad)] = optimizer.pairs
    assert parameter is one and optimizer.rate == 1e-3
    np.testing.assert_array_equal(grad.numpy(), np.array([3.0, 4.0], np.float32) * np.float32(0.001))


def test_merged_adapters_of_a_bfloat16_run_are_rounded_once(kit: Any, causal_folder: Folder, tmp_path: Path) -> None:
    """Merged in float32 and stored in bfloat16; an adapter of a GPU's bfloat16 run could not be merged on a CPU."""
    base = causal_folder("qwen2")
    model = load_causal_lm(base, dtype="bfloat16", lora=LoRASettings(rank=4))
    draw = np.random.default_rng(0)
    tensors = dict(model.model.named_parameters())
    for name, tensor in tensors.items():
        if "lora_" in name:
            tensor.set_value(nearest(draw.standard_normal(tensor.shape).astype(np.float32) * 0.05))
    save_model(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "lora_config.json").read_text())["dtype"] == "bfloat16"
    kit.tokenizer_folder(tmp_path / "adapter")
    merge_lora(tmp_path / "adapter", tmp_path / "merged")
    assert stored_codes(tmp_path / "merged") == {"BF16"}
    layer = "qwen2.layers.0.self_attn.q_proj"
    plain = load_causal_lm(base).state_dict()[f"{layer}.weight"].numpy()
    update = tensors[f"{layer}.lora_A"].numpy() @ tensors[f"{layer}.lora_B"].numpy() * 2.0  # alpha / rank
    merged = read_weights(tmp_path / "merged")[f"{layer}.weight"]
    np.testing.assert_array_equal(merged, nearest(merged))
    np.testing.assert_allclose(merged, plain + update, rtol=2**-8, atol=1e-5)


class Head(paddle.nn.Layer):
    """An LM head whose weight is real bfloat16 (which a CPU can hold and cast, not multiply)."""

    def __init__(self, weight: np.ndarray, tied: bool) -> None:
        super().__init__()
        self.weight = paddle.to_tensor(weight).astype("bfloat16")
        self.transpose_y = tied


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_of_a_bfloat16_model_computes_in_float32(tied: bool) -> None:
    """B4: bfloat16 logits at 16 to 32 are eighths apart."""
    draw = np.random.default_rng(0)
    weight, states = (
        nearest(draw.standard_normal((64, 50)).astype(np.float32)),
        nearest(3 * draw.standard_normal((5, 64)).astype(np.float32)),
    )
    model = paddle.nn.Layer()
    model.lm_head = Head(weight.T if tied else weight, tied)
    logits = lm_logits(model, paddle.to_tensor(states).astype("bfloat16"))
    assert logits.dtype == paddle.float32
    np.testing.assert_allclose(logits.numpy(), states @ weight, rtol=1e-5, atol=1e-4)
