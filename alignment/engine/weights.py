"""Weights from a saved folder into a model that already exists (and keeps its optimizer)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import paddle
from paddle import Tensor

from alignment.errors import AlignmentError, CheckpointError, some_of
from alignment.parallel.topology import Topology
from alignment.ppo.models import Piece, pieces_of
from alignment.ppo.models.parts import belongs_elsewhere
from alignment.ppo.models.pickle_files import PaddleFile
from alignment.ppo.models.safetensors_file import SafetensorsFile


def load_weights_into(
    model: Any, folder: Path, name: str, topology: Topology, masters: Mapping[str, Tensor] | None = None
) -> None:
    """Read ``folder``'s weight files and put every tensor into ``model``, of a divided model this process's part.

    Args:
        masters: float32 masters by Paddle's names of their parameters; they get the file's values before these are
            rounded to the parameters' dtype.

    Raises:
        CheckpointError: see :meth:`alignment.engine.engine.Engine.load_weights`.
    """
    loaded = _read_weights(folder, name)
    # LoRA's wrapper saves names without its own prefix.
    inner = model.model if type(model).__module__.startswith("paddlenlp.peft") else model
    # A tied head has a name in the state, but is no parameter of its own.
    own = dict(inner.named_parameters()) | dict(inner.named_buffers()) | inner.state_dict()
    tied = {"lm_head.weight"} if getattr(getattr(inner, "config", None), "tie_word_embeddings", False) else set()
    is_adapter = (folder / "lora_config.json").exists()
    # An adapter's folder holds the adapter alone; what is frozen came with the base model.
    wanted = {key for key, tensor in own.items() if not tensor.stop_gradient} if is_adapter else set(inner.state_dict())
    pieces = pieces_of(model, topology) if topology.splits_model else {}
    piece_of = {key: pieces.get(key, Piece(key)) for key in own}
    missing = sorted({piece_of[key].name for key in wanted if key in own} - set(loaded) - tied)
    if missing:
        raise CheckpointError(f"{name}: the weights in {folder} lack {some_of(missing)}")
    has = {piece.name for piece in piece_of.values()}
    for key in loaded:
        elsewhere = topology.splits_model and belongs_elsewhere(key, inner, topology)
        if key not in has and key not in tied and not elsewhere:
            raise CheckpointError(f"{name}: {folder} holds {key!r}, which this model has not")
    for local, tensor in own.items():
        piece = piece_of[local]
        if piece.name not in loaded:
            continue
        value = loaded[piece.name]
        expected = piece.whole_shape(tensor.shape, topology)
        if list(value.shape) != expected:
            raise CheckpointError(
                f"{name}: {piece.name} in {folder} has shape {list(value.shape)}, the model's is {expected}"
            )
        mine = paddle.to_tensor(piece.cut(value, topology))
        tensor.set_value(mine.astype(tensor.dtype))
        if masters and tensor.name in masters:
            masters[tensor.name].set_value(mine.astype("float32"))
    if is_adapter and hasattr(inner, "set_normalizer"):
        # A score model's statistics are no trained weights; the adapter's folder keeps them in its config.
        config = json.loads((folder / "config.json").read_text())
        inner.set_normalizer(config.get("mean"), config.get("var"), config.get("normalizer_count"))


def _read_weights(folder: Path, name: str) -> dict[str, Any]:
    # Not the libraries' own readers: safetensors' has no bfloat16 for NumPy, paddle.load runs what a file tells it to.
    files = [(SafetensorsFile, file) for file in sorted(folder.glob("*model*.safetensors"))]
    files = files or [(PaddleFile, file) for file in sorted(folder.glob("*model_state*.pdparams"))]
    if not files:
        raise CheckpointError(f"{name}: no weight file (model_state.pdparams or *.safetensors) in {folder}")
    result: dict[str, Any] = {}
    for reader, file in files:
        try:
            opened = reader(file)
            result.update({key: opened.read(key) for key in opened.shapes()})
        except (OSError, ValueError, KeyError, AlignmentError) as error:
            raise CheckpointError(f"{name}: cannot read the weights {file}: {error}") from error
    return result
