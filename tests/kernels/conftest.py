"""The compiled kernels, and decoder layers of paddlenlp to hold them against."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

#: By family: sizes that are multiples of nothing the kernels are built around.
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5},  # head_dim 8
    "qwen2": {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2},  # head_dim 6, biases
    "mistral": {"hidden_size": 72, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 5},
    "gemma": {"hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8},
}


@pytest.fixture(scope="session")
def operators() -> Any:
    """The operators; the test environment has a compiler."""
    from alignment.kernels.ops import kernels

    found = kernels()
    assert found is not None, "the CPU kernels cannot be had here"
    return found


def make_model(family: str, *, layers: int = 1, seed: int = 0, **overrides: Any) -> Any:
    """A causal model of one family with every tensor drawn at random, norms and biases too."""
    from alignment.ppo.models.loading import CAUSAL_MODELS, CONFIGS

    settings = {"vocab_size": 37, "intermediate_size": 20, "num_hidden_layers": layers, "max_position_embeddings": 128}
    if family == "qwen2":
        settings["tie_word_embeddings"] = False
    model = CAUSAL_MODELS[family](CONFIGS[family](**{**settings, **SIZES[family], **overrides}))
    draw = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        values = draw.standard_normal(parameter.shape) * (0.3 if "norm" in name else 0.2)
        parameter.set_value((values + (1.0 if "norm" in name else 0.0)).astype(np.float32))
    model.train()
    return model
