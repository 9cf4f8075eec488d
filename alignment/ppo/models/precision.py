"""bfloat16 on a CPU, where Paddle has no kernels for it: storage and outputs are rounded, products are float32.

A model *stored in bfloat16* here has float32 tensors whose values are all bfloat16 numbers; the optimizer keeps float32
masters of them, as it does of real bfloat16 tensors (Micikevicius et al. 2018, "Mixed Precision Training", section 3).
What its layers hand on is rounded to bfloat16 too:

- the residual stream, where a layer or the final norm reads it (so the scaled embedding of Gemma is rounded);
- what each norm, each linear layer of attention and MLP gives, biases included, and what the attention's output layer
  and the MLP's last one read.

Inside these steps, in the sum between the halves of a layer, in the scores of the attention and in the LM head, numbers
are float32; gradients pass through the rounding unchanged and are float32 everywhere. Memory is that of float32.
The kernels (:attr:`alignment.kernels.ops.LayerShape.rounded`) and the hooks that :func:`store_in_bfloat16` puts on
paddlenlp's layers round in the same places.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import paddle
from paddle import Tensor, nn
from paddle.autograd import PyLayer

from .forward import backbone_of, unwrap

# paddlenlp's names, the same in all four architectures (the fused ones where a config asks for them)
_NORMS = ("input_layernorm", "post_attention_layernorm")
_LINEAR = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "gate_up_fused_proj", "down_proj"),
}
_READ_ROUNDED = ("o_proj", "down_proj")
_MARK = "stored_in_bfloat16"


def rounded(x: Tensor) -> Tensor:
    """The nearest bfloat16 numbers (halves to even) as float32; the gradient passes unchanged."""
    return _Rounded.apply(x) if paddle.is_grad_enabled() and not x.stop_gradient else _nearest(x)


def is_rounded(model: nn.Layer) -> bool:
    """Whether a model is stored in bfloat16 by rounding (see above), wrapped by LoRA or not."""
    return bool(getattr(unwrap(model), _MARK, False))


def stored_dtype(model: nn.Layer) -> str:
    """What the weights are stored in: ``"float32"``, ``"bfloat16"`` (rounded or real), ``"float16"``."""
    return "bfloat16" if is_rounded(model) else str(model.parameters()[0].dtype).split(".")[-1]


def store_in_bfloat16(model: nn.Layer) -> nn.Layer:
    """Round a float32 model's weights and, from now on, the outputs of its layers; returns the model."""
    inner = unwrap(model)
    setattr(inner, _MARK, True)
    round_weights(model.parameters())
    backbone = backbone_of(model)
    for layer in backbone.layers:
        layer.register_forward_pre_hook(_round_input)
        for name in _NORMS:
            getattr(layer, name).register_forward_post_hook(_round_output)
        for part, names in _LINEAR.items():
            for name in names:
                linear = getattr(getattr(layer, part), name, None)
                if linear is None:
                    continue
                linear.register_forward_post_hook(_round_output)
                if name in _READ_ROUNDED:
                    linear.register_forward_pre_hook(_round_input)
    # on an earlier stage of a pipeline the norm is the identity, and what is handed on is rounded
    backbone.norm.register_forward_pre_hook(_round_input)
    backbone.norm.register_forward_post_hook(_round_output)
    return model


@paddle.no_grad()
def round_weights(parameters: Iterable[Tensor]) -> None:
    """Round float32 parameters in place."""
    for parameter in parameters:
        paddle.assign(_nearest(parameter), parameter)


def _nearest(x: Tensor) -> Tensor:
    return x.astype("bfloat16").astype("float32")


def _round_input(layer: nn.Layer, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (rounded(inputs[0]), *inputs[1:])


def _round_output(layer: nn.Layer, inputs: Any, output: Any) -> Any:
    return rounded(output)


class _Rounded(PyLayer):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return _nearest(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad
