"""The decoder inside a paddlenlp model, read as numbers and weights: what the rollout engine and the CPU kernels
compute with.

The weights are the model's own parameters; nothing is copied, so an optimizer step is seen at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import paddle
from paddle import Tensor, nn

from alignment.kernels.ops import LayerShape
from alignment.parallel.tensor_ranks import tensor_group
from alignment.ppo.models.forward import backbone_of, head_is_tied, unwrap
from alignment.ppo.models.precision import is_rounded, rounded

_LAYER = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass
class Decoder:
    """A Llama-like decoder.

    Attributes:
        backbone: paddlenlp's model without its head.
        shape: of a layer; with tensor parallelism of this process's share of it.
        layers: each layer's tensors in the order of :attr:`LayerShape.weights`.
        embedding_scale: what token embeddings are multiplied by (Gemma).
        tensor_group: over which partial sums are added up; None when the model is not divided.
    """

    backbone: Any
    shape: LayerShape
    layers: list[list[Tensor]]
    embedding_scale: float
    tensor_group: Any
    _angles: tuple[Tensor, Tensor] | None = None

    def embed(self, tokens: Tensor) -> Tensor:
        """``[T]`` int64 -> ``[T, hidden]``."""
        x = self.backbone.embed_tokens(tokens)
        if self.embedding_scale == 1.0:
            return x
        x = x * self.embedding_scale
        return rounded(x) if self.shape.rounded else x

    def norm(self, x: Tensor) -> Tensor:
        """The final norm, ``[..., hidden]``."""
        return self.backbone.norm(x)

    def angles(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[at least positions, head_dim / 2]`` by the model's own rotary embedding."""
        if self._angles is None or self._angles[0].shape[0] < positions:
            rotary = self.backbone.layers[0].self_attn.rotary_emb
            # a power of two: the table is not made anew for each longer row
            wanted = max(positions, min(1 << (positions - 1).bit_length(), self._reach()))
            sample = paddle.zeros([1], dtype=self.layers[0][0].dtype)
            half = self.shape.head_dim // 2
            cosine, sine = (
                table.reshape([-1, self.shape.head_dim])[:, :half].astype("float32").contiguous()
                for table in rotary(sample, seq_len=wanted)
            )
            self._angles = cosine, sine
        return self._angles

    def _reach(self) -> int:
        return int(self.backbone.config.max_position_embeddings)


def decoder_of(model: nn.Layer) -> Decoder | str:
    """Read a causal or score model.

    Args:
        model: a paddlenlp model of the four families, whole or this tensor rank's part of one.

    Returns:
        The decoder, or in words why it cannot be read so (LoRA, fused weights, another architecture, a pipeline
        stage, ...).
    """
    if unwrap(model) is not model:
        return "LoRA adapters are not merged"
    backbone, config = backbone_of(model), model.config
    kind = config.model_type
    if kind not in ("llama", "qwen2", "mistral", "gemma"):
        return f"{kind} is not among llama, qwen2, mistral and gemma"
    if config.get("rope_scaling_type", None) == "dynamic_ntk":
        return "dynamic NTK positions depend on the batch"
    if getattr(backbone, "embed_tokens", None) is None or getattr(backbone, "norm", None) is None:
        return "it is a stage of a pipeline"
    for flag in ("sequence_parallel", "fuse_attention_qkv", "fuse_attention_ffn", "alibi"):
        if getattr(config, flag, False):
            return f"{flag} is on"
    first = backbone.layers[0].self_attn
    try:
        layers = [_tensors(layer) for layer in backbone.layers]
    except AttributeError as error:
        return f"its layers are built otherwise ({error})"
    biases = first.q_proj.bias is not None
    if any(len(layer) != (12 if biases else 9) for layer in layers):
        return "its linear layers have other biases than q, k and v"
    head_dim = int(first.head_dim)
    gemma = kind == "gemma"
    shape = LayerShape(
        hidden=int(config.hidden_size),
        intermediate=int(layers[0][6].shape[1]),
        query_heads=int(layers[0][1].shape[1]) // head_dim,
        key_heads=int(layers[0][2].shape[1]) // head_dim,
        head_dim=head_dim,
        window=int(getattr(config, "sliding_window", None) or 0) if kind == "mistral" else 0,
        activation=int(gemma),
        epsilon=float(config.rms_norm_eps),
        norm_offset=float(gemma),
        biases=biases,
        rounded=is_rounded(model),
    )
    return Decoder(
        backbone=backbone,
        shape=shape,
        layers=layers,
        embedding_scale=float(config.hidden_size) ** 0.5 if gemma else 1.0,
        tensor_group=tensor_group() if config.tensor_parallel_degree > 1 else None,
    )


def _tensors(layer: Any) -> list[Tensor]:
    attention, mlp = layer.self_attn, layer.mlp
    weights = [layer.input_layernorm.weight, *(getattr(attention, name).weight for name in _LAYER)]
    weights += [layer.post_attention_layernorm.weight, *(getattr(mlp, name).weight for name in _MLP)]
    biases = [getattr(attention, name).bias for name in _LAYER] + [getattr(mlp, name).bias for name in _MLP]
    return weights + [bias for bias in biases if bias is not None]


def head_weight(model: nn.Layer) -> tuple[Tensor, bool]:
    """The LM head's weight, and whether it is ``[vocab, hidden]`` (as an embedding) rather than ``[hidden, vocab]``."""
    head = unwrap(model).lm_head
    return head.weight, head_is_tied(head)
