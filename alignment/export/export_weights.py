"""The tensors of an exported model, in paddlenlp's or torch's names and orientation.

Tensors are read, turned and written one at a time: exporting a model needs memory for its largest tensor only.
"""

from __future__ import annotations

import re
from typing import Any

from alignment.errors import ArgumentsError, ModelError, some_of
from alignment.ppo.models.folders import CONFIG_FILE
from alignment.ppo.models.hf_layout import Weights
from alignment.ppo.models.safetensors_file import DTYPE_CODES, StoredTensor

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_NORMALIZER = ("normalizer.mean", "normalizer.var", "normalizer.count")


def export_tensors(weights: Weights, config: Any, prefix: str, *, style: str, dtype: str | None) -> list[StoredTensor]:
    """List the tensors of a model as they are to be written.

    Args:
        weights: of the folder.
        config: its paddlenlp config.
        prefix: paddlenlp's name of the backbone inside the causal model (``"llama"``, ...).
        style: ``"paddle"`` (names and orientation of paddlenlp) or ``"huggingface"`` (those of torch: the backbone is
            called ``model``, linear weights are ``[out, in]``, a tied head is left out).
        dtype: a key of :data:`~alignment.ppo.models.safetensors_file.DTYPE_CODES`; None keeps every tensor's own.

    Raises:
        ModelError: a tensor that the config asks for is missing or has another shape, or one has no place in it.
    """
    is_score = "score_head.weight" in weights
    plain = _decoder_shapes(config, prefix)
    if is_score:
        plain |= _score_shapes(weights, config)
    elif not config.tie_word_embeddings:
        plain["lm_head.weight"] = (config.hidden_size, config.vocab_size)
    _check(weights, plain)
    if style == "paddle":
        tensors = [
            StoredTensor(name, shape, _code(weights, name, dtype), lambda name=name: weights.read(name))
            for name, shape in plain.items()
        ]
        if config.tie_word_embeddings and not is_score:
            tensors.append(_tied_head(tensors[0], config))
        return tensors
    tensors = []
    for name, shape in plain.items():
        turn = len(shape) == 2 and not name.endswith("embed_tokens.weight")
        target = "model" + name[len(prefix) :] if name.startswith(f"{prefix}.") else name
        tensors.append(
            StoredTensor(
                target,
                shape[::-1] if turn else shape,
                _code(weights, name, dtype),
                lambda name=name, turn=turn: weights.read(name).T if turn else weights.read(name),
            )
        )
    return tensors


def parse_size(text: str | int) -> int:
    """Return the bytes that ``"5GB"``, ``"200MB"``, ``"1GiB"`` or a plain number mean.

    Raises:
        ArgumentsError: it is no such thing, or not above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B)?\s*", str(text).upper())
    unit = (match.group(2) or "") if match else ""
    size = int(float(match.group(1)) * _UNITS[unit]) if match and unit in _UNITS else 0
    if size < 1:
        raise ArgumentsError(f"max_shard_size {text!r} is no size; write it as 5GB, 200MB or 2GiB")
    return size


def _tied_head(embedding: StoredTensor, config: Any) -> StoredTensor:
    """The LM head that paddlenlp saves beside the embedding it is tied to; without it, it warns of a random one.

    paddlenlp's Mistral cannot tie: its head is an ordinary linear weight, ``[hidden, vocab]``, as when it is trained.
    """
    turn = config.model_type == "mistral"
    return StoredTensor(
        "lm_head.weight",
        embedding.shape[::-1] if turn else embedding.shape,
        embedding.code,
        (lambda: embedding.read().T) if turn else embedding.read,
    )


def _decoder_shapes(config: Any, prefix: str) -> dict[str, tuple[int, ...]]:
    """The backbone's tensors, as paddlenlp names and shapes them."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head_dim = head_size(config)
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}.embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_hidden_layers):
        layer = f"{prefix}.layers.{index}"
        for name, width in (("q", queries), ("k", keys), ("v", keys)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (hidden, width)
            if config.model_type == "qwen2":
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (width,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (queries, hidden)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (hidden, inner)
        shapes[f"{layer}.mlp.up_proj.weight"] = (hidden, inner)
        shapes[f"{layer}.mlp.down_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    shapes[f"{prefix}.norm.weight"] = (hidden,)
    return shapes


def head_size(config: Any) -> int:
    """Width of an attention head; only Gemma's need not make up the hidden size."""
    own = config.head_dim if config.model_type == "gemma" else None
    return own or config.hidden_size // config.num_attention_heads


def _score_shapes(weights: Weights, config: Any) -> dict[str, tuple[int, ...]]:
    width = weights.shape("score_head.weight")[-1]
    shapes: dict[str, tuple[int, ...]] = {"score_head.weight": (config.hidden_size, width)}
    if "score_head.bias" in weights:
        shapes["score_head.bias"] = (width,)
    return shapes | {name: weights.shape(name) for name in _NORMALIZER if name in weights}


def _check(weights: Weights, wanted: dict[str, tuple[int, ...]]) -> None:
    folder = weights.folder.path
    missing = [name for name in wanted if name not in weights]
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of the {len(wanted)} tensors that its {CONFIG_FILE} asks for: "
            f"{some_of(sorted(missing))}; the config belongs to another model, or the weights are incomplete"
        )
    extra = [n for n in weights if n not in wanted and not n.endswith("rotary_emb.inv_freq") and not _is_lm_head(n)]
    if extra:
        raise ModelError(
            f"{folder} has {len(extra)} tensors that its {CONFIG_FILE} has no place for: "
            f"{some_of(sorted(weights.stored_name(name) for name in extra))}"
        )
    for name, shape in wanted.items():
        if weights.shape(name) != shape:
            raise ModelError(
                f"{weights.file_of(name)}: tensor {weights.stored_name(name)} has shape {list(weights.shape(name))} "
                f"(as [in, out]); {CONFIG_FILE} asks for {list(shape)}"
            )


def _is_lm_head(name: str) -> bool:
    return name.startswith("lm_head.")


def _code(weights: Weights, name: str, dtype: str | None) -> str:
    """Return the dtype to write a tensor in."""
    own = weights.code(name)
    if own in ("I64", "I32"):  # a normaliser's count
        return "I64"
    if name in _NORMALIZER:
        return "F32"  # statistics decide on rewards; they are a few bytes
    return DTYPE_CODES[dtype] if dtype else ("F32" if own == "F64" else own)
