"""The part of a model that one process holds: some layers (pipeline), a slice of each matrix (tensor parallelism).

A part is an ordinary paddlenlp model with fewer layers, built for one stage: the first has the token embedding, the
last the final norm and the head, and hidden states go in and out between them. Its tensors keep their **whole names**,
those of the undivided model, everywhere outside this room: in checkpoints, optimizer states and messages.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, replace

import numpy as np
from paddle import nn
from paddlenlp.transformers import PretrainedConfig, PretrainedModel
from paddlenlp.transformers.model_utils import dtype_guard, no_init_weights

from alignment.parallel.topology import Topology, layers_of_stage

from .forward import backbone_of, unwrap
from .precision import is_rounded, store_in_bfloat16

_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")


@dataclass(frozen=True)
class Piece:
    """Where a tensor of this process lies in the whole model.

    Attributes:
        name: in the whole model.
        axis: along which tensor parallelism has cut it; None for a tensor that every tensor rank holds whole.
        duplicate: a tied weight that an earlier stage holds too (and counts).
    """

    name: str
    axis: int | None = None
    duplicate: bool = False

    def cut(self, whole: np.ndarray, topology: Topology) -> np.ndarray:
        """This process's slice of the whole array, contiguous."""
        if self.axis is None or topology.tensor == 1:
            return whole
        width = whole.shape[self.axis] // topology.tensor
        index = [slice(None)] * whole.ndim
        index[self.axis] = slice(width * topology.tensor_rank, width * (topology.tensor_rank + 1))
        return np.ascontiguousarray(whole[tuple(index)])

    def whole_shape(self, shape: list[int], topology: Topology) -> list[int]:
        """The undivided tensor's shape."""
        if self.axis is None:
            return list(shape)
        return [size * topology.tensor if axis == self.axis else size for axis, size in enumerate(shape)]


def divide_config(config: PretrainedConfig, topology: Topology) -> PretrainedConfig:
    """A copy of the config from which paddlenlp builds this process's part; :func:`trim` completes it."""
    config = copy.deepcopy(config)
    config.tensor_parallel_degree = topology.tensor
    config.tensor_parallel_rank = topology.tensor_rank
    config.tensor_parallel_output = False
    config.sequence_parallel = topology.sequence_parallel
    config.num_hidden_layers = len(layers_of_stage(config.num_hidden_layers, topology.pipeline, topology.stage))
    return config


def whole_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the undivided model, from a part's."""
    config = copy.deepcopy(config)
    config.tensor_parallel_degree, config.tensor_parallel_rank = 1, 0
    config.sequence_parallel = False
    return config


def trim(model: PretrainedModel, layers: int, topology: Topology) -> None:
    """Take away what other stages have, and give the config the whole model's number of layers again.

    Args:
        model: built from :func:`divide_config`'s config.
        layers: of the whole model.
        topology: the layout.
    """
    backbone = backbone_of(model)
    model.config.num_hidden_layers = layers
    head = getattr(model, "lm_head", None)
    if topology.sequence_parallel and head is not None:
        # final_hidden_states has gathered the sequence already when the head sees it.
        head.config = copy.copy(head.config)
        head.config.sequence_parallel = False
    if not topology.first_stage:
        del backbone.embed_tokens
    if not topology.last_stage:
        backbone.norm = nn.Identity()
        # The normaliser stays: it learns on every stage alike from scores that all of them know.
        for name in ("lm_head", "score_head"):
            if hasattr(model, name):
                delattr(model, name)


def pieces_of(model: nn.Layer, topology: Topology) -> dict[str, Piece]:
    """Where each tensor of a model's ``state_dict`` (by its local name) lies in the whole model."""
    inner = unwrap(model)
    state = inner.state_dict()
    config = getattr(inner, "config", None)
    if config is None or not topology.splits_model:
        return {name: Piece(name) for name in state}
    first = layers_of_stage(config.num_hidden_layers, topology.pipeline, topology.stage).start
    embedding = f"{inner.base_model_prefix}.embed_tokens.weight"
    result = {}
    for name, tensor in state.items():
        axis = tensor.split_axis if getattr(tensor, "is_distributed", False) else None
        whole = _LAYER.sub(lambda found: str(int(found[0]) + first), name)
        duplicate = False
        if config.tie_word_embeddings and name == "lm_head.weight":
            whole, duplicate = embedding, not topology.first_stage
        result[name] = Piece(whole, axis, duplicate)
    return result


def belongs_elsewhere(name: str, model: PretrainedModel, topology: Topology) -> bool:
    """Whether a tensor of the whole model lies on another pipeline stage."""
    if topology.pipeline == 1:
        return False
    prefix, layers = model.base_model_prefix, model.config.num_hidden_layers
    found = _LAYER.search(name)
    if found is not None:
        return int(found[0]) < layers and int(found[0]) not in layers_of_stage(
            layers, topology.pipeline, topology.stage
        )
    ends = {f"{prefix}.embed_tokens.weight", f"{prefix}.norm.weight", "lm_head.weight"}
    return name in ends or name.startswith("score_head.")


def build_model(model_class: type[PretrainedModel], config: PretrainedConfig, topology: Topology) -> PretrainedModel:
    """Build a model, or this process's part of it, without drawing its weights, which whoever asked for it sets all."""
    layers = config.num_hidden_layers
    if topology.splits_model:
        config = divide_config(config, topology)
    with dtype_guard(config.dtype), no_init_weights():
        model = model_class(config)
    if topology.splits_model:
        trim(model, layers, topology)
    return model


def empty_like(model: nn.Layer, topology: Topology) -> nn.Layer:
    """A frozen model of the same architecture for another layout, its weights yet to be set.

    Args:
        model: this process's part of a divided model.
        topology: the layout of the new one.
    """
    inner = unwrap(model)
    new = build_model(type(inner), whole_config(inner.config), topology)
    new.generation_config = getattr(inner, "generation_config", None)
    for parameter in new.parameters():
        parameter.stop_gradient = True
    new.eval()
    return store_in_bfloat16(new) if is_rounded(model) else new


def without_sequence_parallel(model: nn.Layer, topology: Topology) -> nn.Layer:
    """A model that has the *same* parameter tensors and does not split the sequence, for generation."""
    inner = unwrap(model)
    new = build_model(type(inner), whole_config(inner.config), replace(topology, sequence_parallel=False))
    new.generation_config = getattr(inner, "generation_config", None)
    own = dict(inner.named_sublayers(include_self=True))
    for path, layer in new.named_sublayers(include_self=True):
        for name in list(layer._parameters):
            if own[path]._parameters[name] is not None:
                layer._parameters[name] = own[path]._parameters[name]
    new.eval()
    return store_in_bfloat16(new) if is_rounded(model) else new
