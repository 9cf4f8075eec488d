"""The engine against paddlenlp's own ``generate``, and what must not depend on batching."""

from __future__ import annotations

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

from alignment.errors import ModelError
from alignment.ppo.generation.engine import GenerationEngine, GenerationPrompt
from alignment.ppo.generation.sampler import SamplingSettings
from alignment.ppo.models import causal_logits
from alignment.ppo.rollout import Rollout

VOCAB, EOS, PAD = 64, 1, 0
ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "gemma": (GemmaConfig, GemmaForCausalLM),
}


class IdTokenizer:
    """Decodes to the ids themselves, so that texts show exactly which tokens were kept."""

    pad_token_id = PAD

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(str(i) for i in ids)


def make_model(architecture: str) -> paddle.nn.Layer:
    config_class, model_class = ARCHITECTURES[architecture]
    paddle.seed(7)
    extra = {"head_dim": 8} if architecture == "gemma" else {}
    config = config_class(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=2,
        eos_token_id=EOS,
        pad_token_id=PAD,
        initializer_range=0.3,
        **extra,
    )
    model = model_class(config)
    model.eval()
    return model


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def model(request: pytest.FixtureRequest) -> paddle.nn.Layer:
    return make_model(request.param)


@pytest.fixture(scope="module")
def llama() -> paddle.nn.Layer:
    return make_model("llama")


def make_prompts(lengths: list[int], seed: int = 0) -> list[GenerationPrompt]:
    rng = np.random.default_rng(seed)
    return [
        GenerationPrompt(rng.integers(3, VOCAB, length).astype(np.int64), 100 + i, f"prompt {i}", {"i": i})
        for i, length in enumerate(lengths)
    ]


def engine_for(model: paddle.nn.Layer, batch_size: int = 8, context: int | None = 64) -> GenerationEngine:
    return GenerationEngine(model, IdTokenizer(), [EOS], context, batch_size)


def responses(rollout: Rollout) -> list[list[int]]:
    return [rollout.tokens[i, rollout.prompt_len[i] : rollout.lengths[i]].tolist() for i in range(len(rollout))]


def test_greedy_equals_paddlenlps_generate(model: paddle.nn.Layer) -> None:
    prompts = make_prompts([3, 9, 5, 1])
    rollout = engine_for(model).generate(prompts, SamplingSettings(12, greedy=True))
    for prompt, got in zip(prompts, responses(rollout), strict=True):
        ids = paddle.to_tensor(prompt.input_ids[None])
        wanted = model.generate(
            ids,
            attention_mask=paddle.ones_like(ids),
            max_new_tokens=12,
            decode_strategy="greedy_search",
            eos_token_id=EOS,
            pad_token_id=PAD,
        )[0][0].tolist()
        if EOS in wanted:
            wanted = wanted[: wanted.index(EOS) + 1]
        assert got == wanted


def test_logprobs_equal_the_full_forward(model: paddle.nn.Layer) -> None:
    rollout = engine_for(model).generate(make_prompts([4, 2]), SamplingSettings(8, temperature=0.7, seed=3), 3)
    assert len(rollout) == 6
    for i in range(6):
        start, length = int(rollout.prompt_len[i]), int(rollout.lengths[i])
        with paddle.no_grad():
            output = model(paddle.to_tensor(rollout.tokens[i : i + 1, :length]), return_dict=True)
        logits = output.logits.numpy()[0].astype(np.float64) / 0.7
        logits -= logits.max(-1, keepdims=True)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        wanted = logprobs[np.arange(start - 1, length - 1), rollout.tokens[i, start:length]]
        np.testing.assert_allclose(rollout.logprobs[i, : length - start], wanted, atol=1e-4)


def test_a_sliding_window_is_kept_in_prefill_and_decoding() -> None:
    windowed = make_model("mistral")
    windowed.config.sliding_window = 5
    rollout = engine_for(windowed).generate(make_prompts([9, 3, 6]), SamplingSettings(10, seed=2, min_new_tokens=10))
    with paddle.no_grad():
        logits = causal_logits(windowed, paddle.to_tensor(rollout.tokens), rollout.lengths).numpy().astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for i in range(3):
        start, length = int(rollout.prompt_len[i]), int(rollout.lengths[i])
        wanted = logprobs[i, np.arange(start - 1, length - 1), rollout.tokens[i, start:length]]
        np.testing.assert_allclose(rollout.logprobs[i, : length - start], wanted, atol=1e-4)


def test_the_rollout_does_not_depend_on_the_batch_size_or_the_order(llama: paddle.nn.Layer) -> None:
    prompts, how = make_prompts([3, 9, 5, 1, 7]), SamplingSettings(10, seed=5)
    reference = responses(engine_for(llama, 64).generate(prompts, how, 2))
    for batch_size in (1, 2, 3, 7):
        assert responses(engine_for(llama, batch_size).generate(prompts, how, 2)) == reference
    backwards = responses(engine_for(llama, 4).generate(prompts[::-1], how, 2))
    pairs = [backwards[i : i + 2] for i in range(0, 10, 2)][::-1]
    assert [row for pair in pairs for row in pair] == reference


def test_samples_of_one_prompt_differ_and_another_seed_gives_others(llama: paddle.nn.Layer) -> None:
    prompts = make_prompts([4])
    first = responses(engine_for(llama).generate(prompts, SamplingSettings(12, seed=1), 4))
    assert len({tuple(row) for row in first}) > 1
    assert responses(engine_for(llama).generate(prompts, SamplingSettings(12, seed=2), 4)) != first


def test_lengths_and_finished_say_what_happened(llama: paddle.nn.Layer) -> None:
    rollout = engine_for(llama).generate(make_prompts([3, 6, 2, 5]), SamplingSettings(20, seed=8, temperature=2.0), 8)
    ended = 0
    for i, tokens in enumerate(responses(rollout)):
        assert len(tokens) == rollout.response_len[i] >= 1
        assert (tokens[-1] == EOS) == rollout.finished[i]
        assert EOS not in tokens[:-1]
        shown = tokens[:-1] if rollout.finished[i] else tokens
        assert rollout.responses[i] == " ".join(str(token) for token in shown)
        assert rollout.finished[i] or len(tokens) == 20
        ended += int(rollout.finished[i])
        assert (rollout.tokens[i, rollout.lengths[i] :] == PAD).all()
        assert rollout.rows[i] == {"i": i // 8}
    assert 0 < ended < 32
    assert rollout.sample_index.tolist() == list(range(8)) * 4


def test_pad_equal_to_eos_changes_nothing(llama: paddle.nn.Layer) -> None:
    prompts, how = make_prompts([3, 9, 5]), SamplingSettings(15, seed=4, temperature=1.5)
    plain = engine_for(llama).generate(prompts, how, 3)
    engine = engine_for(llama)
    engine.tokenizer = type("PadIsEos", (IdTokenizer,), {"pad_token_id": EOS})()
    same = engine.generate(prompts, how, 3)
    assert responses(same) == responses(plain)
    assert same.response_len.tolist() == plain.response_len.tolist()
    assert same.finished.tolist() == plain.finished.tolist()


def test_the_context_bounds_answers_and_refuses_prompts_that_fill_it(llama: paddle.nn.Layer) -> None:
    rollout = engine_for(llama, context=12).generate(make_prompts([9, 2]), SamplingSettings(30, min_new_tokens=30))
    assert rollout.lengths.tolist() == [12, 12]
    assert not rollout.finished.any()
    with pytest.raises(ModelError, match=r"prompt 100 has 12 tokens, and the model's context is 12"):
        engine_for(llama, context=12).generate(make_prompts([12]), SamplingSettings(3))
    with pytest.raises(ModelError, match="has no token"):
        engine_for(llama).generate(make_prompts([0]), SamplingSettings(3))


def test_a_broken_model_is_named(llama: paddle.nn.Layer) -> None:
    broken = make_model("llama")
    broken.lm_head.weight.set_value(paddle.full_like(broken.lm_head.weight, float("nan")))
    with pytest.raises(ModelError, match="NaN or infinite logits"):
        engine_for(broken).generate(make_prompts([3]), SamplingSettings(3))
    assert not llama.training
