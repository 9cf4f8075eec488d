"""Saving causal and score models in paddlenlp's layout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn

from alignment.errors import ModelError

from .folders import GENERATION_CONFIG_FILE
from .forward import unwrap
from .parts import whole_config
from .precision import is_rounded, stored_dtype
from .safetensors_file import StoredTensor, code_of, write_weights
from .score_model import ScoreModelMixin
from .upstream import quiet_paddlenlp

MAX_SHARD_BYTES = 10 * 10**9


def save_model(
    model: nn.Layer, folder: str | os.PathLike, *, state_dict: dict[str, paddle.Tensor] | None = None
) -> None:
    """Save a model as safetensors with its config, or the adapter alone if the model is wrapped by LoRA.

    Folders of causal models open with paddlenlp's ``AutoModelForCausalLM.from_pretrained``, those of score models with
    :class:`~alignment.ppo.models.score_model.AutoModelForScore`.

    Args:
        model: what :func:`load_causal_lm` or :func:`load_score_model` returned.
        folder: made if it does not exist.
        state_dict: the tensors to save in place of the model's own.

    Raises:
        ModelError: the folder cannot be written.
    """
    quiet_paddlenlp()
    inner = unwrap(model)
    if inner is model:
        tensors = inner.state_dict() if state_dict is None else state_dict
        stored = [StoredTensor(n, tuple(t.shape), _code(inner, n, t.dtype), t.numpy) for n, t in tensors.items()]
        _write_folder(inner, Path(folder), stored)
        return
    if isinstance(inner, ScoreModelMixin):
        inner.write_normalizer_to_config()
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        model.save_pretrained(str(folder))  # LoRA's wrapper: the adapter alone
    except OSError as error:
        raise ModelError(f"cannot save the model in {folder}: {error}") from error


def save_whole_model(model: nn.Layer, folder: str | os.PathLike, tensors: dict[str, np.ndarray]) -> None:
    """Save a divided model as :func:`save_model` saves an undivided one.

    Args:
        model: this process's part, for its config.
        folder: made if it does not exist.
        tensors: all of the whole model, by name; bfloat16 as Paddle gives it to NumPy, its bits as uint16.

    Raises:
        ModelError: the folder cannot be written.
    """
    stored = [
        StoredTensor(name, tuple(array.shape), _code(unwrap(model), name, array.dtype), lambda array=array: array)
        for name, array in tensors.items()
    ]
    _write_folder(unwrap(model), Path(folder), stored)


def _code(model: nn.Layer, name: str, dtype: Any) -> str:
    """What a tensor is written as: bfloat16 where float32 holds bfloat16 numbers; statistics are as they are."""
    code = code_of(dtype)
    return "BF16" if code == "F32" and is_rounded(model) and not name.startswith("normalizer.") else code


def _write_folder(inner: nn.Layer, folder: Path, tensors: list[StoredTensor]) -> None:
    """Write config and weights; not through paddlenlp's ``save_pretrained``, which stores bfloat16 as ``U16``, needs
    memory for the whole model once more, and makes files that only their owner may read.
    """
    if isinstance(inner, ScoreModelMixin):
        inner.write_normalizer_to_config()
    config = whole_config(inner.config)
    config.architectures = [type(inner).__name__]
    config.dtype = stored_dtype(inner)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(folder))
        write_weights(folder, tensors, metadata_format="np", max_shard_bytes=MAX_SHARD_BYTES)
        # paddlenlp's own way writes none if sampling values stand beside do_sample=False, as in many published models.
        if getattr(inner, "generation_config", None) is not None:
            inner.generation_config.to_json_file(str(folder / GENERATION_CONFIG_FILE), use_diff=True)
    except OSError as error:
        raise ModelError(f"cannot save the model in {folder}: {error}") from error
