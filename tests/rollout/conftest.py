"""Small models of the four families, and the three ways in which the engine computes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import paddle
import pytest
from paddlenlp.transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from alignment.ppo.models.decoder import Decoder, decoder_of
from alignment.ppo.models.precision import store_in_bfloat16
from alignment.rollout.generate import GenerationEngine, GenerationPrompt
from alignment.rollout.layers import CpuKernelOps, LayerOps
from alignment.rollout.sampler import SamplingSettings
from tests.precision import BF16

VOCAB, EOS, PAD = 64, 1, 0
ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "gemma": (GemmaConfig, GemmaForCausalLM),
}
# Variants that exercise what a family may have besides.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, linear scaling": ("llama", {"rope_scaling_type": "linear", "rope_scaling_factor": 2.0}),
    "llama, multi-head": ("llama", {"num_key_value_heads": 4}),
    "llama 3": (
        "llama",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {}),
    "gemma": ("gemma", {}),
    "gemma, multi-query, wide heads": ("gemma", {"num_key_value_heads": 1, "head_dim": 20}),
}
WAYS = ("kernels", "paddle", "plain")


class IdTokenizer:
    """Decodes to the ids themselves, so that texts show exactly which tokens were kept."""

    pad_token_id = PAD

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(str(i) for i in ids)


def make_model(name: str, **more: Any) -> paddle.nn.Layer:
    """A random model; every parameter counts, biases and norms too."""
    architecture, extra = MODELS[name]
    config_class, model_class = ARCHITECTURES[architecture]
    paddle.seed(7)
    if architecture == "gemma":
        extra = {"head_dim": 8, **extra}
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 2,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "initializer_range": 0.3,
    }
    model = model_class(config_class(**{**values, **extra, **more}))
    rng = np.random.default_rng(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.set_value(parameter.numpy() + rng.normal(0, 0.1, parameter.shape).astype(np.float32))
    model.eval()
    return store_in_bfloat16(model) if BF16 else model


def make_prompts(lengths: list[int], seed: int = 0, vocab: int = VOCAB) -> list[GenerationPrompt]:
    rng = np.random.default_rng(seed)
    return [
        GenerationPrompt(rng.integers(3, vocab, length).astype(np.int64), 100 + i, f"prompt {i}", {"i": i})
        for i, length in enumerate(lengths)
    ]


def sampled_from(
    logits: np.ndarray, how: SamplingSettings, banned: Sequence[int] = (), seen: np.ndarray | None = None
) -> np.ndarray:
    """The distribution ``[V]`` float64 that a token is drawn from, step by step as the settings' docs say it.

    Args:
        logits: ``[V]``.
        how: not greedy.
        banned: tokens without a chance.
        seen: ``[V]`` bool, tokens in the row so far.
    """
    z = logits.astype(np.float64)
    if how.repetition_penalty != 1.0:
        assert seen is not None
        z[seen] = np.where(z[seen] > 0, z[seen] / how.repetition_penalty, z[seen] * how.repetition_penalty)
    z[list(banned)] = -np.inf
    order = np.argsort(-z, kind="stable")
    weights = np.exp((z[order] - z[order[0]]) / how.temperature)
    if how.top_k:
        weights[how.top_k :] = 0.0
    weights /= weights.sum()
    before = np.concatenate([[0.0], np.cumsum(weights)[:-1]])
    weights[before >= how.top_p] = 0.0
    probs = np.zeros_like(weights)
    probs[order] = weights / weights.sum()
    return probs


def engine_for(
    model: paddle.nn.Layer, way: str = "kernels", context: int | None = 64, batch_size: int = 8, **more: Any
) -> GenerationEngine:
    """An engine that computes in one of :data:`WAYS`; see there."""
    engine = GenerationEngine(model, IdTokenizer(), [EOS], context, batch_size, fused=way != "plain", **more)
    if way == "paddle":
        decoder = decoder_of(model)
        assert isinstance(decoder, Decoder)
        engine.ops = LayerOps(model, decoder)
    assert (type(engine.ops) if engine.ops else None) == {"kernels": CpuKernelOps, "paddle": LayerOps, "plain": None}[
        way
    ]
    return engine


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def model_of() -> Callable[[str], paddle.nn.Layer]:
    made: dict[str, paddle.nn.Layer] = {}

    def get(name: str) -> paddle.nn.Layer:
        if name not in made:
            made[name] = make_model(name)
        return made[name]

    return get


@pytest.fixture(scope="session")
def llama(model_of: Callable[[str], paddle.nn.Layer]) -> paddle.nn.Layer:
    return model_of("llama")
