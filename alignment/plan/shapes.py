"""Shapes of models and how many numbers a process holds of them, by the rules that the models are divided by.

The tensors of a process are listed by their whole names (those of the undivided model), because sharding gives whole
parameters to owners and breaks ties by name. ``tests/plan`` compares the lists with paddlenlp's models, cut as
:mod:`alignment.ppo.models.parts` cuts them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.errors import ModelError, nearest
from alignment.parallel.topology import Topology, layers_of_stage
from alignment.ppo.models.folders import model_type_of, read_json
from alignment.ppo.models.gguf import ordinary_folder

#: Architectures whose feed-forward keeps the activated gate besides its factors (no fused SwiGLU in paddlenlp).
UNFUSED_GATE = ("mistral", "gemma")
#: Architectures that keep a table of rotary angles for every position in each layer.
ROTARY_TABLES = ("llama", "qwen2", "mistral")


@dataclass(frozen=True)
class ModelShape:
    """What of a ``config.json`` decides about sizes.

    Attributes:
        model_type: ``"llama"``, ``"qwen2"``, ``"mistral"`` or ``"gemma"``.
        vocab, hidden, intermediate, layers, heads, kv_heads, head_dim: the usual sizes, in elements.
        tied: whether the LM head is the embedding.
        positions: ``max_position_embeddings``.
    """

    model_type: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool = False
    positions: int = 2048

    @property
    def query(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Width of all key (or value) heads."""
        return self.kv_heads * self.head_dim

    @property
    def biases(self) -> bool:
        """Whether the projections to queries, keys and values have biases."""
        return self.model_type == "qwen2"

    @property
    def layer_matrices(self) -> int:
        """Elements of the matrices of one layer: what a token is multiplied with there."""
        return self.hidden * (2 * self.query + 2 * self.key + 3 * self.intermediate)

    @property
    def parameters(self) -> int:
        """Elements of the whole causal model, a tied head counted once."""
        return sum(tensor.elements for tensor in part_tensors(self, "lm").values())


def shape_of_config(config: Mapping[str, Any], where: str) -> ModelShape:
    """Read a shape from the content of a ``config.json``.

    Args:
        config: the JSON object.
        where: names the file in messages.

    Raises:
        ModelError: a size is missing, or the architecture is none that can be trained.
    """
    kind = model_type_of(dict(config), where, role="plan")
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [name for name in needed if not isinstance(config.get(name), int)]
    if missing:
        raise ModelError(f"{where}: {', '.join(missing)} missing: a plan needs the sizes of the model")
    heads = config["num_attention_heads"]
    return ModelShape(
        model_type=kind,
        vocab=config["vocab_size"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=(config.get("head_dim") if kind == "gemma" else None) or config["hidden_size"] // heads,
        tied=bool(config.get("tie_word_embeddings", kind == "gemma")),
        positions=config.get("max_position_embeddings") or 2048,
    )


@dataclass(frozen=True)
class PartTensor:
    """A parameter of one process.

    Attributes:
        elements: that this process holds.
        split: whether tensor parallelism has cut it.
        duplicate: a tied weight that an earlier pipeline stage holds too.
    """

    elements: int
    split: bool = False
    duplicate: bool = False


def part_tensors(shape: ModelShape, head: str, topology: Topology | None = None) -> dict[str, PartTensor]:
    """The parameters of one process's part of a model, by whole name.

    Matrices of attention and feed-forward are cut along heads or the inner width (Shoeybi et al. 2019,
    arXiv:1909.08053, section 3); embedding and LM head along the vocabulary where the degree divides it; norms and
    the score head are whole on every tensor rank. Pipeline stages have whole layers, the first also the embedding, the
    last the final norm and the head.

    Args:
        shape: of the whole model.
        head: ``"lm"`` or ``"score"``.
        topology: the layout and the process; one process if not given.
    """
    topology = topology or Topology()
    tensor, prefix = topology.tensor, shape.model_type
    found: dict[str, PartTensor] = {}

    def add(name: str, elements: int, cut: bool = False, duplicate: bool = False) -> None:
        cut = cut and tensor > 1
        found[name] = PartTensor(elements // tensor if cut else elements, cut, duplicate)

    h, q, kv, inner = shape.hidden, shape.query, shape.key, shape.intermediate
    vocabulary_cut = shape.vocab % tensor == 0
    embedding = f"{prefix}.embed_tokens.weight"
    if topology.first_stage:
        add(embedding, shape.vocab * h, vocabulary_cut)
    for layer in layers_of_stage(shape.layers, topology.pipeline, topology.stage):
        name = f"{prefix}.layers.{layer}"
        for projection, width in (("q", q), ("k", kv), ("v", kv)):
            add(f"{name}.self_attn.{projection}_proj.weight", h * width, True)
            if shape.biases:
                add(f"{name}.self_attn.{projection}_proj.bias", width, True)
        add(f"{name}.self_attn.o_proj.weight", q * h, True)
        for projection in ("gate", "up", "down"):
            add(f"{name}.mlp.{projection}_proj.weight", h * inner, True)
        add(f"{name}.input_layernorm.weight", h)
        add(f"{name}.post_attention_layernorm.weight", h)
    if topology.last_stage:
        add(f"{prefix}.norm.weight", h)
        if head == "score":
            add("score_head.weight", h)
        elif not shape.tied:
            add("lm_head.weight", h * shape.vocab, vocabulary_cut)
        elif not topology.first_stage:
            add(embedding, shape.vocab * h, vocabulary_cut, duplicate=True)
    return found


def lora_tensors(shape: ModelShape, rank: int) -> dict[str, PartTensor]:
    """The adapters of low rank on all linear layers of attention and feed-forward (Hu et al. 2021): ``A [in, rank]``
    and ``B [rank, out]`` each.
    """
    h, q, kv, inner = shape.hidden, shape.query, shape.key, shape.intermediate
    sizes = {
        "self_attn.q_proj": h + q,
        "self_attn.k_proj": h + kv,
        "self_attn.v_proj": h + kv,
        "self_attn.o_proj": q + h,
        "mlp.gate_proj": h + inner,
        "mlp.up_proj": h + inner,
        "mlp.down_proj": inner + h,
    }
    return {
        f"{shape.model_type}.layers.{layer}.{name}.lora": PartTensor(rank * width)
        for layer in range(shape.layers)
        for name, width in sizes.items()
    }


def layer_of(name: str) -> int | None:
    """The number of the layer that a parameter belongs to; None for embedding, final norm and heads."""
    words = name.split(".")
    return int(words[2]) if len(words) > 2 and words[1] == "layers" else None


def buffer_bytes(shape: ModelShape, topology: Topology) -> int:
    """Bytes of a part's tensors that are no parameters: float32 sines and cosines for every position, in each layer
    (paddlenlp's models keep them per layer), and the inverse frequencies.
    """
    layers = len(layers_of_stage(shape.layers, topology.pipeline, topology.stage))
    table = 2 * shape.positions * shape.head_dim if shape.model_type in ROTARY_TABLES else 0
    return layers * 4 * (table + shape.head_dim // 2)


def _llama(hidden: int, inner: int, layers: int, heads: int, kv: int = 0, vocab: int = 32000, positions: int = 4096):
    return ModelShape("llama", vocab, hidden, inner, layers, heads, kv or heads, hidden // heads, positions=positions)


def _qwen2(hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int = 152064, tied: bool = False):
    return ModelShape("qwen2", vocab, hidden, inner, layers, heads, kv, hidden // heads, tied, 131072)


#: From the models' published ``config.json``.
MODELS: dict[str, ModelShape] = {
    "Llama-7b": _llama(4096, 11008, 32, 32, positions=2048),
    "Llama-2-7b": _llama(4096, 11008, 32, 32),
    "Llama-2-13b": _llama(5120, 13824, 40, 40),
    "Llama-2-70b": _llama(8192, 28672, 80, 64, 8),
    "Meta-Llama-3-8B": _llama(4096, 14336, 32, 32, 8, 128256, 8192),
    "Meta-Llama-3-70B": _llama(8192, 28672, 80, 64, 8, 128256, 8192),
    "TinyLlama-1.1B": _llama(2048, 5632, 22, 32, 4, positions=2048),
    "alpaca-7b-reproduced": _llama(4096, 11008, 32, 32, vocab=32001, positions=2048),
    "beaver-7b": _llama(4096, 11008, 32, 32, vocab=32001, positions=2048),
    "Qwen2-0.5B": _qwen2(896, 4864, 24, 14, 2, 151936, True),
    "Qwen2-1.5B": _qwen2(1536, 8960, 28, 12, 2, 151936, True),
    "Qwen2-7B": _qwen2(3584, 18944, 28, 28, 4),
    "Qwen2-72B": _qwen2(8192, 29568, 80, 64, 8),
    "Qwen2.5-0.5B": _qwen2(896, 4864, 24, 14, 2, 151936, True),
    "Qwen2.5-1.5B": _qwen2(1536, 8960, 28, 12, 2, 151936, True),
    "Qwen2.5-7B": _qwen2(3584, 18944, 28, 28, 4),
    "Qwen2.5-72B": _qwen2(8192, 29568, 80, 64, 8),
    "Mistral-7B": ModelShape("mistral", 32000, 4096, 14336, 32, 32, 8, 128, positions=32768),
    "gemma-2b": ModelShape("gemma", 256000, 2048, 16384, 18, 8, 1, 256, True, 8192),
    "gemma-7b": ModelShape("gemma", 256000, 3072, 24576, 28, 16, 16, 256, True, 8192),
}

# What may follow a model's name without changing its shape: releases, tunings, formats.
_SUFFIX = re.compile(
    r"([-_.](hf|chat|instruct|it|base|reward|cost|v\d+(\.\d+)*|\d+k|intermediate.*|reproduced|unified|sft|rm|ppo|dpo))*"
)


def known_shape(name: str) -> ModelShape | None:
    """The shape of a well-known model: ``"meta-llama/Llama-2-7b-chat-hf"`` is ``Llama-2-7b``; None for others."""
    last = name.rstrip("/").rsplit("/", 1)[-1].lower()
    for known in sorted(MODELS, key=len, reverse=True):
        if last.startswith(known.lower()) and _SUFFIX.fullmatch(last[len(known) :]):
            return MODELS[known]
    return None


def find_shape(path: str, role: str, config_file: str | None = None) -> ModelShape:
    """The shape of a role's model: a file that was named, else the folder's ``config.json``, else the table.

    Args:
        path: what the argument file says: a folder, a GGUF file or a name.
        role: the key in the argument file, for messages.
        config_file: a ``config.json`` (or a folder with one, or a name of the table) to use instead.

    Raises:
        ModelError: there is none of these.
    """
    if config_file is not None:
        known = known_shape(config_file) if not Path(config_file).expanduser().exists() else None
        return known or _shape_of_file(Path(config_file).expanduser(), role)
    folder = ordinary_folder(path, role=role)
    if (folder / "config.json").is_file():
        return _shape_of_file(folder, role)
    known = known_shape(path)
    if known is None:
        raise ModelError(
            f"{role}: {path} is not on this disk, and its name is none of a well-known model{nearest(path, MODELS)}: "
            "say what its sizes are with --model_config FILE (its config.json) or --model_config NAME (one of "
            f"{', '.join(MODELS)})"
        )
    return known


def _shape_of_file(file: Path, role: str) -> ModelShape:
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise ModelError(
            f"{role}: there is no {file}; give a config.json, a folder with one, or one of {', '.join(MODELS)}"
        )
    content = read_json(file, role=role)
    if not isinstance(content, dict):
        raise ModelError(f"{role}: {file} is no JSON object")
    return shape_of_config(content, str(file))
