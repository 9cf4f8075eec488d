"""The tensors of an exported model, in paddlenlp's or torch's names and orientation, and the files they go to.

Tensors are read, turned and written one at a time: exporting a model needs memory for its largest tensor only.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from alignment.errors import ArgumentsError, ModelError

from .folders import CONFIG_FILE, read_safetensors_header
from .hf_layout import Weights

#: ``--dtype`` -> safetensors' name of it.
DTYPE_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_FLOATS = ("F64", *DTYPE_CODES.values())
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_NORMALIZER = ("normalizer.mean", "normalizer.var", "normalizer.count")


@dataclass(frozen=True)
class ExportTensor:
    """One tensor to write.

    Attributes:
        name: in the file.
        shape: as written.
        code: safetensors' dtype name.
        read: returns it as an array of ``shape``; floats as any float dtype.
    """

    name: str
    shape: tuple[int, ...]
    code: str
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return int(np.prod(self.shape, dtype=np.int64)) * _ITEM_BYTES[self.code]


def export_tensors(weights: Weights, config: Any, prefix: str, *, style: str, dtype: str | None) -> list[ExportTensor]:
    """List the tensors of a model as they are to be written.

    Args:
        weights: of the folder.
        config: its paddlenlp config.
        prefix: paddlenlp's name of the backbone inside the causal model (``"llama"``, ...).
        style: ``"paddle"`` (names and orientation of paddlenlp) or ``"huggingface"`` (those of torch: the backbone is
            called ``model``, linear weights are ``[out, in]``, a tied head is left out).
        dtype: a key of :data:`DTYPE_CODES`; None keeps every tensor's own.

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
            ExportTensor(name, shape, _code(weights, name, dtype), lambda name=name: weights.read(name))
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
            ExportTensor(
                target,
                shape[::-1] if turn else shape,
                _code(weights, name, dtype),
                lambda name=name, turn=turn: weights.read(name).T if turn else weights.read(name),
            )
        )
    return tensors


def write_weights(
    folder: Path, tensors: list[ExportTensor], *, metadata_format: str, max_shard_bytes: int
) -> list[str]:
    """Write ``model.safetensors``, or shards with ``model.safetensors.index.json``; returns the weight files' names.

    Args:
        folder: exists.
        tensors: filled into shards in this order.
        metadata_format: ``"np"`` (paddlenlp's) or ``"pt"`` (torch's), written as the files' ``format``.
        max_shard_bytes: of tensors in a file; a larger tensor gets a file of its own.

    Raises:
        ModelError: a number does not fit the dtype.
        OSError: the disk refuses.
    """
    shards: list[list[ExportTensor]] = [[]]
    room = max_shard_bytes
    for tensor in tensors:
        if shards[-1] and tensor.size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.size
    many = len(shards) > 1
    files = [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" if many else "model.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    for file, shard in zip(files, shards, strict=True):
        _write_file(folder / file, shard, metadata_format)
    if many:
        weight_map = {t.name: file for file, shard in zip(files, shards, strict=True) for t in shard}
        index = {
            "metadata": {"total_size": sum(t.size for t in tensors)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


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


def to_bfloat16(array: np.ndarray) -> np.ndarray:
    """Round to bfloat16, to nearest and halves to even, and return its bits as uint16."""
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    # A NaN's fraction may round to zero, which would make it an infinity.
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded)


def _tied_head(embedding: ExportTensor, config: Any) -> ExportTensor:
    """The LM head that paddlenlp saves beside the embedding it is tied to; without it, it warns of a random one.

    paddlenlp's Mistral cannot tie: its head is an ordinary linear weight, ``[hidden, vocab]``, as when it is trained.
    """
    turn = config.model_type == "mistral"
    return ExportTensor(
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
            f"{_some(missing)}; the config belongs to another model, or the weights are incomplete"
        )
    extra = [n for n in weights if n not in wanted and not n.endswith("rotary_emb.inv_freq") and not _is_lm_head(n)]
    if extra:
        raise ModelError(
            f"{folder} has {len(extra)} tensors that its {CONFIG_FILE} has no place for: "
            f"{_some([weights.stored_name(name) for name in extra])}"
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
    own = _stored_code(weights, name)
    if own not in _FLOATS:
        return "I64"
    if name in _NORMALIZER:
        return "F32"  # statistics decide on rewards; they are a few bytes
    return DTYPE_CODES[dtype] if dtype else ("F32" if own == "F64" else own)


def _stored_code(weights: Weights, name: str) -> str:
    file = weights.file_of(name)
    if weights.folder.kind == "safetensors":
        return read_safetensors_header(file)[1][weights.stored_name(name)]["dtype"]
    array = weights.read(name)
    if not np.issubdtype(array.dtype, np.floating):
        return "I64"
    declared = weights.folder.config.get("dtype") or weights.folder.config.get("torch_dtype")
    # These readers widen bfloat16 without saying so; the config does say it.
    return "BF16" if declared == "bfloat16" else {2: "F16"}.get(array.itemsize, "F32")


def _write_file(path: Path, tensors: list[ExportTensor], metadata_format: str) -> None:
    # Wide numbers first, so that every tensor starts at a multiple of its item's size, as safetensors' own writer does.
    ordered = sorted(tensors, key=lambda tensor: (-_ITEM_BYTES[tensor.code], tensor.name))
    header: dict[str, Any] = {"__metadata__": {"format": metadata_format}}
    offset = 0
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": tensor.code,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in ordered:
            _write_tensor(stream, tensor)
        stream.flush()
        os.fsync(stream.fileno())


def _write_tensor(stream: BinaryIO, tensor: ExportTensor) -> None:
    array = tensor.read()
    if tensor.code == "I64":
        out = array.astype(np.int64)
    elif tensor.code == "BF16":
        out = to_bfloat16(array)
    else:
        with np.errstate(over="ignore"):
            out = array.astype(np.float16 if tensor.code == "F16" else np.float32)
        if tensor.code == "F16" and not np.isfinite(out[np.isfinite(array)]).all():
            raise ModelError(
                f"tensor {tensor.name} holds numbers beyond float16's range (largest: "
                f"{np.abs(array[np.isfinite(array)]).max():.4g}); export as bfloat16 or float32"
            )
    stream.write(np.ascontiguousarray(out).data if out.size else b"")


def _some(names: Iterable[str], limit: int = 4) -> str:
    listed = sorted(names)
    return ", ".join(listed[:limit]) + (", ..." if len(listed) > limit else "")
