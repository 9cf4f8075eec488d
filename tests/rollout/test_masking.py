"""NLPO's masks: a lagging policy reads in lock step and says which tokens may be sampled."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle
import pytest

from alignment.engine.engine import Engine
from alignment.errors import ModelError
from alignment.losses.vocabulary_mask import vocabulary_mask
from alignment.parallel import World
from alignment.rollout.generate import GenerationEngine
from alignment.rollout.layers import LayerOps
from alignment.rollout.masking import MaskingPolicy
from alignment.rollout.roles import PolicyRole
from alignment.rollout.rollout import Rollout
from alignment.rollout.sampler import SamplingSettings, choose_tokens
from tests.precision import same_answers, within
from tests.rollout.conftest import EOS, VOCAB, IdTokenizer, engine_for, make_model, make_prompts, sampled_from
from tests.rollout.test_engine import exact_logits, responses
from tests.rollout.test_sampler import by_kernel

PROMPTS = make_prompts([4, 2, 33, 11])


@pytest.fixture(scope="module")
def lagging() -> paddle.nn.Layer:
    """A model whose distributions overlap with the policy's."""
    model = make_model("llama")
    rng = np.random.default_rng(3)
    for parameter in model.parameters():
        noise = rng.normal(0, 0.05, parameter.shape).astype(np.float32)
        parameter.set_value(parameter.astype("float32") + paddle.to_tensor(noise))
    return model


def masked_engine(model: paddle.nn.Layer, way: str, masking: MaskingPolicy, **more: object) -> GenerationEngine:
    engine = engine_for(model, way, masking=masking, **more)
    if way == "paddle" and engine._masking_ops is not None:
        engine._masking_ops = LayerOps(masking.model, engine._masking_ops.decoder)
    return engine


def sets_of(rollout: Rollout) -> list[np.ndarray]:
    """``[response_len, V]`` bool of each row."""
    assert rollout.allowed is not None
    return np.split(rollout.allowed.mask(VOCAB), np.cumsum(rollout.response_len)[:-1])


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.2, "min_new_tokens": 5}], ids=str
)
def test_every_token_is_drawn_from_what_the_lagging_policy_allows(
    llama: paddle.nn.Layer, lagging: paddle.nn.Layer, way: str, options: dict
) -> None:
    """The sets are those of its own logits at the same position, rows come and go, and log q is over them."""
    how = SamplingSettings(**{"max_new_tokens": 16, "seed": 3, **options})
    rollout = masked_engine(llama, way, MaskingPolicy(lagging, top_mask=0.6), token_budget=160).generate(
        PROMPTS, how, 3
    )
    own, theirs = exact_logits(llama, rollout.tokens), exact_logits(lagging, rollout.tokens)
    differing, gaps = 0, []
    for i, sets in enumerate(sets_of(rollout)):
        start, length = int(rollout.prompt_len[i]), int(rollout.response_len[i])
        assert len(sets) == length and sets[np.arange(length), rollout.tokens[i, start : start + length]].all()
        assert sets[:, EOS].all() and (sets.sum(axis=1) < VOCAB).any()
        for position in range(length):
            at, early = start + position - 1, position < how.min_new_tokens
            scaled = theirs[i, at] / how.temperature
            if early:
                scaled[EOS] = -np.inf
            wanted = vocabulary_mask("learned_top_p", scaled, 0.6, 1, [EOS])
            differing += (wanted != sets[position]).any()
            seen = np.isin(np.arange(VOCAB), rollout.tokens[i, : start + position])
            banned = [*np.flatnonzero(~sets[position]), *([EOS] if early else [])]
            chance = sampled_from(own[i, at], how, banned, seen)[rollout.tokens[i, start + position]]
            gaps.append(abs(rollout.sampler_logprobs[i, position] - np.log(max(chance, 1e-30))))
    # rounding may put a token at the border of a nucleus on its other side
    assert len(gaps) > 60 and differing <= len(gaps) * (1 - within(0.98, "learnt accuracy"))
    assert np.mean(np.array(gaps) < within(1e-4, "logprob")) > within(0.98, "learnt accuracy")


def test_a_policy_that_allows_everything_changes_no_bit(
    llama: paddle.nn.Layer, lagging: paddle.nn.Layer, way: str
) -> None:
    how = SamplingSettings(12, seed=5, min_new_tokens=3)
    plain = engine_for(llama, way).generate(PROMPTS, how, 2)
    masked = masked_engine(llama, way, MaskingPolicy(lagging, top_mask=-1)).generate(PROMPTS, how, 2)
    np.testing.assert_array_equal(masked.tokens, plain.tokens)
    np.testing.assert_array_equal(masked.logprobs, plain.logprobs)
    np.testing.assert_array_equal(masked.sampler_logprobs, plain.sampler_logprobs)
    assert plain.allowed is None and masked.allowed.mask(VOCAB).all()


def test_masked_answers_do_not_depend_on_batching(llama: paddle.nn.Layer, lagging: paddle.nn.Layer, way: str) -> None:
    how, masking = SamplingSettings(10, seed=5), MaskingPolicy(lagging, top_mask=0.5)
    whole = masked_engine(llama, way, masking, batch_size=64).generate(PROMPTS, how, 2)
    cut = masked_engine(llama, way, masking, batch_size=3, token_budget=64).generate(PROMPTS, how, 2)
    assert same_answers(responses(cut), responses(whole))
    for one, other in zip(sets_of(cut), sets_of(whole), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_refreshed_copy_masks_the_next_rollout(llama: paddle.nn.Layer, way: str) -> None:
    """The peer's generation kept the first copy for ever."""
    copy = make_model("llama")
    engine = masked_engine(llama, way, MaskingPolicy(copy, top_mask=0.3))
    how = SamplingSettings(8, seed=5)
    before = sets_of(engine.generate(PROMPTS, how))
    head = copy.lm_head.weight
    head.set_value(head.astype("float32") * -1.0)
    after = sets_of(engine.generate(PROMPTS, how))
    assert all((one[0] != other[0]).any() for one, other in zip(before, after, strict=True))


def test_the_policys_own_best_tokens_need_no_copy(llama: paddle.nn.Layer, way: str) -> None:
    how = SamplingSettings(8, seed=5, min_new_tokens=8)
    masked = masked_engine(llama, way, MaskingPolicy(None, "topk", 5)).generate(PROMPTS, how)
    assert (masked.allowed.counts == 6).all(), "five and eos, which is too early to be one of the five"
    if way == "kernels":
        cut = engine_for(llama, way).generate(PROMPTS, SamplingSettings(8, seed=5, min_new_tokens=8, top_k=5))
        np.testing.assert_array_equal(masked.tokens, cut.tokens)


def test_what_top_k_leaves_is_measured_of_the_masked_policy(llama: paddle.nn.Layer, way: str) -> None:
    """Of six allowed tokens top_k 6 leaves everything, however little of the whole policy that is."""
    engine = masked_engine(llama, way, MaskingPolicy(None, "topk", 5))
    engine.generate(PROMPTS, SamplingSettings(8, seed=5, top_k=6))
    assert engine.kept.mean == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("choose", [choose_tokens, by_kernel])
@pytest.mark.parametrize("greedy", [False, True])
def test_a_row_without_an_allowed_token_is_reported(choose: Callable, greedy: bool) -> None:
    rng = np.random.default_rng(0)
    logits, allowed = rng.normal(size=(400, 30)).astype(np.float32), rng.random((400, 30)) < 0.2
    allowed[:, 2], allowed[7] = True, False
    early = np.arange(400) % 2 == 0
    allowed[8] = np.arange(30) == 2
    how = SamplingSettings(9, greedy=greedy)
    tokens, _, _ = choose(logits, how, rng.random(400), early, (1,), None, allowed)
    assert tokens[7] == -1 and tokens[8] == 2
    others = np.delete(np.arange(400), 7)
    assert allowed[others, tokens[others]].all() and not (tokens[early] == 1).any()


def test_a_masking_policy_that_gives_nan_is_told(llama: paddle.nn.Layer, way: str) -> None:
    broken = make_model("llama")
    broken.lm_head.weight.set_value(broken.lm_head.weight * float("nan"))
    with pytest.raises(ModelError, match="NaN"):
        masked_engine(llama, way, MaskingPolicy(broken)).generate(PROMPTS, SamplingSettings(8))


def test_a_copy_of_another_model_is_refused(llama: paddle.nn.Layer) -> None:
    with pytest.raises(ModelError, match=f"the policy predicts {VOCAB} tokens and the masking policy 32"):
        GenerationEngine(llama, IdTokenizer(), [EOS], 64, 8, masking=MaskingPolicy(make_model("llama", vocab_size=32)))


def test_the_update_sees_the_distribution_that_was_sampled_from(
    llama: paddle.nn.Layer, lagging: paddle.nn.Layer, way: str
) -> None:
    """Renormalised over the kept sets, the training network's log-probs are log q; without them they are log p."""
    how = SamplingSettings(12, seed=5, temperature=0.8)
    rollout = masked_engine(llama, way, MaskingPolicy(lagging, top_mask=0.5)).generate(PROMPTS, how, 2)
    role = PolicyRole(Engine("actor", make_model("llama"), World()), 0.8, 3)
    tolerance = within(1e-4, "logprob")
    np.testing.assert_allclose(role.logprobs(rollout, masked=True), rollout.sampler_logprobs, atol=tolerance)
    np.testing.assert_allclose(role.logprobs(rollout), rollout.logprobs, atol=tolerance)
    gap = (rollout.sampler_logprobs - rollout.logprobs)[rollout.mask > 0]
    assert (gap > -1e-5).all() and gap.mean() > 0.1
