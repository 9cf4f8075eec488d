"""Shapes of well-known models by name, for plans that are made before the models are on the disk."""

from __future__ import annotations

import json
import re
from pathlib import Path

from alignment.errors import ModelError, nearest
from alignment.plan.shapes import ModelShape, shape_of_config
from alignment.ppo.models.gguf import ordinary_folder


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
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{role}: cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{role}: {file} is no JSON object")
    return shape_of_config(content, str(file))
