"""Saving causal and score models in paddlenlp's layout."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import paddle
from paddle import nn
from safetensors.numpy import save_file

from alignment.errors import ModelError

from .folders import GENERATION_CONFIG_FILE
from .forward import unwrap
from .parts import whole_config
from .score_model import ScoreModelMixin
from .upstream import quiet_paddlenlp


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
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if inner is not model:  # LoRA's wrapper
            if isinstance(inner, ScoreModelMixin):
                inner.write_normalizer_to_config()
            model.save_pretrained(str(folder))
        else:
            with warnings.catch_warnings():
                # paddlenlp warns and writes no generation_config.json if sampling values stand beside do_sample=False,
                # as in many published models; the file is written here whatever it says.
                warnings.filterwarnings("ignore", message="The generation config instance is invalid")
                inner.save_pretrained(str(folder), safe_serialization=True, state_dict=state_dict)
            if getattr(inner, "generation_config", None) is not None:
                inner.generation_config.to_json_file(str(Path(folder) / GENERATION_CONFIG_FILE), use_diff=True)
    except OSError as error:
        raise ModelError(f"cannot save the model in {folder}: {error}") from error


def save_whole_model(model: nn.Layer, folder: str | os.PathLike, tensors: dict[str, np.ndarray]) -> None:
    """Save a divided model as :func:`save_model` saves an undivided one.

    Args:
        model: this process's part, for its config.
        folder: made if it does not exist.
        tensors: all of the whole model, by name.

    Raises:
        ModelError: the folder cannot be written.
    """
    inner = unwrap(model)
    if isinstance(inner, ScoreModelMixin):
        inner.write_normalizer_to_config()
    config = whole_config(inner.config)
    config.architectures = [type(inner).__name__]
    config.dtype = str(next(iter(inner.parameters())).dtype).split(".")[-1]
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(folder))
        save_file(tensors, str(Path(folder) / "model.safetensors"), metadata={"format": "np"})
        if getattr(inner, "generation_config", None) is not None:
            inner.generation_config.to_json_file(str(Path(folder) / GENERATION_CONFIG_FILE), use_diff=True)
    except OSError as error:
        raise ModelError(f"cannot save the model in {folder}: {error}") from error
