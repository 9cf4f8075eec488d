"""GGUF files as model folders: each is written once as an ordinary folder in Hugging Face's layout, into a cache.

Everything behind it (loading, tokenizers, chat templates, export) then sees a folder like any other. Weights that are
stored in F32, F16 or BF16 stay as they are; every quantised type becomes float32, as the ``gguf`` package dequantises
it: training needs numbers that can be changed a little.

Nothing here imports Paddle. The format: ``ggml-org/ggml``, ``docs/gguf.md``.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from alignment.errors import ModelError, nearest
from alignment.log import get_logger

from .safetensors_file import StoredTensor, write_weights

SUFFIX = ".gguf"
#: The file that makes a folder without other weights a GGUF folder.
GGUF_FILE = "model.gguf"
#: ``general.architecture`` -> the class that ``transformers`` names in config.json.
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
#: Changed whenever the same file would be written otherwise, so that old copies in the cache are not used.
_VERSION = 1

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
#: Divisors of the rotary frequencies, by which files of Llama 3.1 and later say how they are scaled.
_ROPE_FACTORS = "rope_freqs.weight"

# Kinds of tokens in tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_GPT2 = [{**_BYTE_LEVEL, "use_regex": True}]
_DIGIT_BY_DIGIT = [{"type": "Digits", "individual_digits": True}, *_GPT2]


def _split(digits: str) -> list[dict[str, Any]]:
    pattern = {"Regex": _WORDS.format(digits=digits)}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return [split, {**_BYTE_LEVEL, "use_regex": False}]


#: ``tokenizer.ggml.pre`` -> the steps that cut a text before byte pairs are merged, as tokenizer.json lists them.
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": _GPT2,
    "smollm": _DIGIT_BY_DIGIT,
    "starcoder": _DIGIT_BY_DIGIT,
    "llama-bpe": _split(r"\p{N}{1,3}"),
    "qwen2": _split(r"\p{N}"),
}


def gguf_file(path: str | os.PathLike) -> Path | None:
    """Return the GGUF file that a path means: the file itself, or ``model.gguf`` of a folder without other weights;
    None if it means something else.
    """
    from .folders import WEIGHT_FILES

    path = Path(path).expanduser()
    if path.suffix == SUFFIX and path.is_file():
        return path
    if (path / GGUF_FILE).is_file() and not any((path / name).is_file() for name, _ in WEIGHT_FILES):
        return path / GGUF_FILE
    return None


def ordinary_folder(path: str | os.PathLike, *, role: str = "model") -> Path:
    """Return a path's folder in Hugging Face's layout: the path itself, or, of a GGUF file, the cached copy (made now
    if there is none).

    Raises:
        ModelError: the file is cut short or damaged; its architecture, a tensor's type or its tokenizer is not
            supported; the cache cannot be written.
    """
    file = gguf_file(path)
    if file is None:
        return Path(path).expanduser()
    from filelock import FileLock

    from alignment.paths import CACHE, cache_folder

    state = file.stat()
    cache = cache_folder() / "models"
    target = cache / f"gguf-{_sha256(file.resolve(), state.st_size, state.st_mtime_ns)[:16]}-{_VERSION}"
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):  # the processes of a run start together
            if target.is_dir():
                return target
            with tempfile.TemporaryDirectory(dir=cache, prefix=".making-") as made:
                kinds = write_folder(file, Path(made) / "model", role=role)
                os.rename(Path(made) / "model", target)
    except OSError as error:
        raise ModelError(
            f"{role}: {file} is unpacked into the cache {cache}, which cannot be written: {error} (set {CACHE} to "
            f"another folder)"
        ) from error
    get_logger().info("%s: %s (%s) was unpacked into %s", role, file, kinds, target)
    return target


@functools.lru_cache(maxsize=32)
def _sha256(file: Path, size: int, changed: int) -> str:
    """Hash of a file's content; size and time are there to hash it again when it has changed."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(stream)


def _digest(stream: Any) -> str:  # Python 3.10 has no file_digest
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def write_folder(file: Path, folder: Path, *, role: str = "model") -> str:
    """Write a GGUF file as a model folder in Hugging Face's layout.

    Args:
        file: the GGUF file.
        folder: is made; must not exist.
        role: what the model is for, for messages.

    Returns:
        How many tensors the file has of each type, for a log line.

    Raises:
        ModelError: see :func:`ordinary_folder`.
        OSError: the folder cannot be written.
    """
    from .folders import write_json_file  # which imports this module

    where = f"{role}: {file}"
    reader, metadata = _read(file, where)
    _check_kind(metadata, where)
    tensors = _tensors(reader, metadata["general.architecture"], where)
    config = _config(metadata, tensors, where)
    tokenizer, settings = _tokenizer(metadata, config, where)
    folder.mkdir(parents=True)
    write_json_file(folder / "config.json", config)
    write_json_file(folder / "tokenizer.json", tokenizer)
    write_json_file(folder / "tokenizer_config.json", settings)
    ends = dict.fromkeys(metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    ids = {f"{name}_token_id": config[f"{name}_token_id"] for name in ("bos", "pad")}
    ids["eos_token_id"] = [index for index in ends if index is not None]
    write_json_file(folder / "generation_config.json", ids)
    stored = [_stored(name, tensor, config, where) for name, tensor in tensors.items()]
    write_weights(folder, stored, metadata_format="pt", max_shard_bytes=sys.maxsize)
    counts: dict[str, int] = {}
    for tensor in reader.tensors:
        counts[tensor.tensor_type.name] = counts.get(tensor.tensor_type.name, 0) + 1
    return ", ".join(f"{count} tensors {name}" for name, count in sorted(counts.items()))


def _read(file: Path, where: str) -> tuple[Any, dict[str, Any]]:
    """Return the gguf package's reader and all metadata as Python values."""
    from gguf import GGUFReader

    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ModelError(f"{where} is not a GGUF file (it does not begin with GGUF); copy it again")
    try:
        reader = GGUFReader(str(file))
        return reader, {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise ModelError(f"{where} is cut short or damaged ({type(error).__name__}: {error}); copy it again") from error


def _check_kind(metadata: dict[str, Any], where: str) -> None:
    known = ", ".join(ARCHITECTURES)
    architecture = metadata.get("general.architecture")
    if metadata.get("general.type", "model") != "model":
        raise ModelError(f"{where} holds no whole model (general.type is {metadata['general.type']!r})")
    if metadata.get("split.count", 1) > 1:
        raise ModelError(
            f"{where} is one of {metadata['split.count']} parts of a model; merge them into one file first "
            f"(llama-gguf-split --merge)"
        )
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"{where}: architecture {architecture!r} is not supported{nearest(str(architecture), ARCHITECTURES)}; "
            f"supported in GGUF files are {known}"
        )
    if metadata.get(f"{architecture}.expert_count", 0):
        raise ModelError(f"{where} is a mixture of experts, which is not supported; supported are {known}")


def _tensors(reader: Any, architecture: str, where: str) -> dict[str, Any]:
    """Return the reader's tensors by their names in Hugging Face's layout; the rotary factors keep theirs."""
    result: dict[str, Any] = {}
    for tensor in reader.tensors:
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", tensor.name)
        if tensor.name == _ROPE_FACTORS:
            name = tensor.name
        elif tensor.name in _NAMES:
            name = _NAMES[tensor.name]
        elif block and block[2] in _BLOCK_NAMES:
            name = f"model.layers.{block[1]}.{_BLOCK_NAMES[block[2]]}.{block[3]}"
        else:
            raise ModelError(f"{where}: tensor {tensor.name!r} has no place in a model of architecture {architecture}")
        result[name] = tensor
    if "model.embed_tokens.weight" not in result:
        raise ModelError(f"{where} has no token embedding (token_embd.weight), so it is no language model")
    return result


def _config(metadata: dict[str, Any], tensors: dict[str, Any], where: str) -> dict[str, Any]:
    """Return config.json's content."""
    architecture = metadata["general.architecture"]

    def value(name: str, default: Any = None) -> Any:
        found = metadata.get(f"{architecture}.{name}", default)
        if found is None:
            raise ModelError(f"{where} lacks {architecture}.{name} in its metadata; convert the model again")
        return found

    hidden, heads = int(value("embedding_length")), value("attention.head_count")
    kv_heads = value("attention.head_count_kv", heads)
    if isinstance(heads, list) or isinstance(kv_heads, list):
        raise ModelError(f"{where}: its layers have different numbers of heads, which is not supported")
    head_dim = int(value("attention.key_length", hidden // heads))
    if value("rope.dimension_count", head_dim) != head_dim:
        raise ModelError(
            f"{where}: only {value('rope.dimension_count')} of {head_dim} numbers of a head are rotated, which is not "
            f"supported"
        )
    plain = {tensor.tensor_type.name for name, tensor in tensors.items() if len(tensor.shape) == 2}
    dtype = {"F16": "float16", "BF16": "bfloat16"}.get(plain.pop(), "float32") if len(plain) == 1 else "float32"
    theta = float(value("rope.freq_base", 10000.0))
    config = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "torch_dtype": dtype,
        "vocab_size": int(tensors["model.embed_tokens.weight"].shape[1]),  # GGUF lists the inner dimension first
        "hidden_size": hidden,
        "intermediate_size": int(value("feed_forward_length")),
        "num_hidden_layers": int(value("block_count")),
        "num_attention_heads": int(heads),
        "num_key_value_heads": int(kv_heads),
        "head_dim": head_dim,
        "max_position_embeddings": int(value("context_length")),
        "rms_norm_eps": _shortest(value("attention.layer_norm_rms_epsilon")),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(metadata, architecture, tensors.pop(_ROPE_FACTORS, None), theta, head_dim, where),
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    window = metadata.get(f"{architecture}.attention.sliding_window")
    if window:
        config |= {"sliding_window": int(window), "use_sliding_window": True}
    for name in ("bos", "eos", "pad"):
        key = {"pad": "padding"}.get(name, name)
        config[f"{name}_token_id"] = metadata.get(f"tokenizer.ggml.{key}_token_id")
    return config


def _shortest(value: float) -> float:
    """The decimal number that was meant by a float32: 9.99999974e-06 is 1e-05."""
    return float(str(np.float32(value)))


def _rope_scaling(
    metadata: dict[str, Any], architecture: str, factors: Any, theta: float, head_dim: int, where: str
) -> dict[str, Any] | None:
    """Return ``rope_scaling`` for config.json, from metadata or from the factors that Llama 3.1 and later store."""
    if factors is not None:
        stored = np.asarray(factors.data, dtype=np.float64)
        scaling = {
            "rope_type": "llama3",
            "factor": float(stored.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        if stored.shape != (head_dim // 2,) or not np.allclose(stored, llama3_factors(scaling, theta, head_dim), 1e-4):
            raise ModelError(f"{where}: its rotary factors ({_ROPE_FACTORS}) are not those of Llama 3; unsupported")
        return scaling
    prefix = f"{architecture}.rope.scaling."
    kind = metadata.get(f"{prefix}type", "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": float(metadata.get(f"{prefix}factor", 1.0))}
    if f"{prefix}original_context_length" in metadata:
        scaling["original_max_position_embeddings"] = int(metadata[f"{prefix}original_context_length"])
    return scaling


def llama3_factors(scaling: dict[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """What Llama 3's scaling divides each rotary frequency by, ``[head_dim / 2]`` float64.

    Wave lengths above ``original / low_freq_factor`` positions are stretched by ``factor``, those below
    ``original / high_freq_factor`` stay, and between them the frequencies are interpolated.
    """
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    waves = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / waves - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - smooth) / factor + smooth)


# ---------------------------------------------------------------- the tokenizer


def _tokenizer(metadata: dict[str, Any], config: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the content of tokenizer.json and of tokenizer_config.json."""
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if kind in (None, "no_vocab") or not tokens:
        raise ModelError(f"{where} has no tokenizer (tokenizer.ggml.tokens); convert the model again with it")
    types = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    # Rows of the embedding that no token has are listed under made-up names; they are no part of the tokenizer.
    vocabulary = {t: i for i, t in enumerate(tokens) if not (types[i] == _UNUSED and t == f"[PAD{i}]")}
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, vocabulary, where)
    elif kind == "llama":
        tokenizer = _sentence_piece(metadata, tokens, types, vocabulary, where)
    else:
        raise ModelError(f"{where}: tokenizer {kind!r} is not supported; supported are gpt2 (byte-level BPE) and llama")
    atoms = {
        i: {"content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": types[i] != _USER_DEFINED}
        for i, t in enumerate(tokens)
        if types[i] in (_CONTROL, _USER_DEFINED, _UNKNOWN)
    }
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(i): atom for i, atom in atoms.items()},
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and index >= len(tokens):
            raise ModelError(f"{where}: the {name} token has id {index}, but the tokenizer has {len(tokens)} tokens")
        settings[f"{name}_token"] = None if index is None else tokens[index]
    if isinstance(metadata.get("tokenizer.chat_template"), str):
        settings["chat_template"] = metadata["tokenizer.chat_template"]
    writes_bos = kind == "llama" or metadata.get("tokenizer.ggml.pre") == "llama-bpe"  # unless the file says otherwise
    begin = settings["bos_token"] if metadata.get("tokenizer.ggml.add_bos_token", writes_bos) else None
    end = settings["eos_token"] if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    tokenizer["added_tokens"] = [{"id": i, **atom} for i, atom in atoms.items()]
    tokenizer["post_processor"] = _around(begin, end, vocabulary)
    return {"version": "1.0", "truncation": None, "padding": None, **tokenizer}, settings


def _byte_level(metadata: dict[str, Any], vocabulary: dict[str, int], where: str) -> dict[str, Any]:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        raise ModelError(
            f"{where}: its pre-tokenizer {name!r} (tokenizer.ggml.pre) is not known{nearest(name, PRE_TOKENIZERS)}; "
            f"known are {', '.join(PRE_TOKENIZERS)}"
        )
    if "tokenizer.ggml.merges" not in metadata:
        raise ModelError(f"{where} lists no merges of its tokenizer (tokenizer.ggml.merges); convert the model again")
    return {
        "normalizer": {"type": "NFC"} if name == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[name]},
        "decoder": {**_BYTE_LEVEL, "add_prefix_space": True, "use_regex": True},
        "model": _bpe(vocabulary, metadata["tokenizer.ggml.merges"], ignore_merges=name == "llama-bpe"),
    }


def _sentence_piece(
    metadata: dict[str, Any], tokens: list[str], types: list[int], vocabulary: dict[str, int], where: str
) -> dict[str, Any]:
    """SentencePiece's BPE: what may be merged follows from the vocabulary, the order from the scores (best first)."""
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None:
        raise ModelError(f"{where} lists no scores of its tokenizer (tokenizer.ggml.scores); convert the model again")
    merges = []
    for index in sorted((i for i, kind in enumerate(types) if kind == _NORMAL), key=lambda i: -scores[i]):
        token = tokens[index]
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        merges += [f"{a} {b}" for a, b in pairs if a in vocabulary and b in vocabulary]
    index = metadata.get("tokenizer.ggml.unknown_token_id")
    unknown = None if index is None else tokens[index]
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    begin = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*begin, spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": _bpe(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token=unknown),
    }


def _bpe(vocabulary: dict[str, int], merges: list[str], **settings: Any) -> dict[str, Any]:
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {**model, **settings, "vocab": vocabulary, "merges": merges}


def _around(begin: str | None, end: str | None, vocabulary: dict[str, int]) -> dict[str, Any] | None:
    """What the tokenizer writes around a text by itself."""
    if begin is None and end is None:
        return None

    def one(token: str | None) -> list[dict[str, Any]]:
        return [] if token is None else [{"SpecialToken": {"id": token, "type_id": 0}}]

    def text(name: str) -> list[dict[str, Any]]:
        return [*one(begin), {"Sequence": {"id": name, "type_id": 0}}, *one(end)]

    known = {t: {"id": t, "ids": [vocabulary[t]], "tokens": [t]} for t in (begin, end) if t is not None}
    pair = [*text("A"), *text("B")]
    return {"type": "TemplateProcessing", "single": text("A"), "pair": pair, "special_tokens": known}


# ---------------------------------------------------------------- the weights


def _stored(name: str, tensor: Any, config: dict[str, Any], where: str) -> StoredTensor:
    """A tensor as it is written: its numbers are made when its turn comes, so no more than one is ever in memory."""
    code = tensor.tensor_type.name if tensor.tensor_type.name in ("F16", "BF16") else "F32"
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    turned = [count for part, count in heads.items() if config["model_type"] == "llama" and f".{part}." in name]

    def read() -> np.ndarray:
        array = _numbers(tensor, where)
        return rotary_halves(array, turned[0]) if turned else array

    return StoredTensor(name, tuple(int(size) for size in reversed(tensor.shape)), code, read)


def _numbers(tensor: Any, where: str) -> np.ndarray:
    """A tensor's numbers, ``[out, in]``: float32, float16 or, as uint16, the bits of bfloat16."""
    from gguf.quants import dequantize

    name = tensor.tensor_type.name
    if name == "F16":
        return np.ascontiguousarray(tensor.data)
    if name == "BF16":
        return np.ascontiguousarray(tensor.data).view(np.uint16)
    try:
        return np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    except NotImplementedError as error:
        raise ModelError(
            f"{where}: tensor {tensor.name!r} is of type {name}, which the gguf package cannot turn into numbers; "
            f"use a file in F16, BF16, Q8_0, Q6_K, Q5_K or Q4_K"
        ) from error


def rotary_halves(array: np.ndarray, heads: int) -> np.ndarray:
    """Undo the order in which GGUF files of Llama keep the rows of queries and keys.

    Rotary embeddings turn pairs of numbers. GGUF's are neighbours ``(0, 1), (2, 3), ...``, Hugging Face's lie half a
    head apart ``(0, d/2), (1, d/2 + 1), ...``.

    Args:
        array: ``[heads * d, ...]``, a projection's weight or bias.
        heads: how many heads its rows make.
    """
    split = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(array.shape))
