"""Weights from a saved folder into a model that already exists (and keeps its optimizer)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import paddle

from alignment.errors import AlignmentError, CheckpointError


def load_weights_into(model: Any, folder: Path, name: str) -> None:
    """Read ``folder``'s weight files and put every tensor into ``model``.

    Raises:
        CheckpointError: see :meth:`alignment.ppo.engine.Engine.load_weights`.
    """
    loaded = _read_weights(folder, name)
    # LoRA's wrapper saves names without its own prefix.
    inner = model.model if type(model).__module__.startswith("paddlenlp.peft") else model
    own = dict(inner.named_parameters()) | dict(inner.named_buffers())
    is_adapter = (folder / "lora_config.json").exists()
    # An adapter's folder holds the adapter alone; what is frozen came with the base model.
    wanted = {key for key, tensor in own.items() if not tensor.stop_gradient} if is_adapter else set(inner.state_dict())
    missing = sorted(key for key in wanted if key in own and key not in loaded)
    if missing:
        raise CheckpointError(f"{name}: the weights in {folder} lack {some_names(missing)}")
    for key, value in loaded.items():
        if key not in own:
            raise CheckpointError(f"{name}: {folder} holds {key!r}, which this model has not")
        if list(value.shape) != list(own[key].shape):
            raise CheckpointError(
                f"{name}: {key} in {folder} has shape {list(value.shape)}, the model's is {list(own[key].shape)}"
            )
        own[key].set_value(paddle.to_tensor(value).astype(own[key].dtype))
    if is_adapter and hasattr(inner, "set_normalizer"):
        # A score model's statistics are no trained weights; the adapter's folder keeps them in its config.
        config = json.loads((folder / "config.json").read_text())
        inner.set_normalizer(config.get("mean"), config.get("var"), config.get("normalizer_count"))


def _read_weights(folder: Path, name: str) -> dict[str, Any]:
    files = sorted(folder.glob("*model*.safetensors"))
    if files:
        # Not safetensors' own reader: it has no bfloat16 for NumPy.
        from alignment.ppo.models.hf_layout import SafetensorsFile

        result: dict[str, Any] = {}
        for file in files:
            try:
                opened = SafetensorsFile(file)
                result.update({key: opened.read(key) for key in opened.shapes()})
            except (OSError, ValueError, KeyError, AlignmentError) as error:
                raise CheckpointError(f"{name}: cannot read the weights {file}: {error}") from error
        return result
    files = sorted(folder.glob("*model_state*.pdparams"))
    if not files:
        raise CheckpointError(f"{name}: no weight file (model_state.pdparams or *.safetensors) in {folder}")
    result = {}
    for file in files:
        try:
            result.update(paddle.load(str(file), return_numpy=True))
        except Exception as error:  # paddle.load raises whatever the cut byte leads to
            raise CheckpointError(f"{name}: cannot read the weights {file}: {type(error).__name__}: {error}") from error
    return result


def some_names(names: list[str]) -> str:
    """At most three names, and how many more there are."""
    if not names:
        return "nothing"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
