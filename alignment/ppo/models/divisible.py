"""Whether a model can be divided as a layout asks; judged from its ``config.json``, before anything is loaded."""

from __future__ import annotations

from typing import Any

from alignment.errors import ModelError
from alignment.parallel.topology import Topology

#: Architectures whose modeling code can be divided.
DIVISIBLE = ("llama", "qwen2")


def check_layout(config: dict[str, Any], topology: Topology, where: str) -> None:
    """Refuse a layout that a model cannot be divided into, from its ``config.json`` alone.

    Args:
        config: the content of ``config.json``.
        topology: the layout.
        where: names the model in the message.

    Raises:
        ModelError: the architecture, heads, layers or sizes do not allow it.
    """
    if not topology.splits_model:
        return
    kind = config.get("model_type")
    if kind not in DIVISIBLE:
        raise ModelError(
            f"{where} is a {kind} model; tensor and pipeline parallelism are there for {' and '.join(DIVISIBLE)} only: "
            "set tensor_parallel_degree and pipeline_parallel_degree to 1 (data parallelism and sharding work)"
        )
    layers, tensor, pipeline = config.get("num_hidden_layers"), topology.tensor, topology.pipeline
    if isinstance(layers, int) and layers < pipeline:
        raise ModelError(
            f"{where} has {layers} layers, but pipeline_parallel_degree is {pipeline}: every stage needs at least one"
        )
    heads = config.get("num_attention_heads")
    for name, value in (
        ("num_attention_heads", heads),
        ("num_key_value_heads", config.get("num_key_value_heads") or heads),
        ("intermediate_size", config.get("intermediate_size")),
    ):
        if isinstance(value, int) and value % tensor:
            raise ModelError(
                f"{where}: {name} is {value}, which tensor_parallel_degree {tensor} does not divide; choose a degree "
                "that divides it"
            )
