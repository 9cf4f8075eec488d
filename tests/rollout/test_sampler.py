"""The random numbers and the sampler against known answers and exact probabilities."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.kernels.ops import kernels
from alignment.rollout.random_numbers import philox4x32, token_uniforms
from alignment.rollout.sampler import SamplingSettings, choose_tokens, truncated_probabilities
from tests.rollout.conftest import sampled_from


def by_kernel(
    logits: np.ndarray,
    how: SamplingSettings,
    uniforms: np.ndarray,
    early: np.ndarray,
    eos_ids: tuple[int, ...] = (),
    seen: np.ndarray | None = None,
    allowed: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The C++ sampler behind the interface of :func:`choose_tokens`."""
    operators = kernels()
    assert operators is not None, "this machine has no C++ compiler, which the tests need"
    marks = paddle.empty([0], dtype="uint8") if seen is None else paddle.to_tensor(seen.astype(np.uint8))
    chosen = operators.choose(
        paddle.to_tensor(logits),
        paddle.to_tensor(uniforms),
        marks,
        paddle.to_tensor(early.astype(np.uint8)),
        None if allowed is None else paddle.to_tensor(allowed.astype(np.uint8)),
        temperature=how.temperature,
        top_k=how.top_k,
        top_p=how.top_p,
        penalty=how.repetition_penalty,
        greedy=how.greedy,
        banned_ids=eos_ids,
    )
    return tuple(part.numpy() for part in chosen)


both_samplers = pytest.mark.parametrize("choose", [choose_tokens, by_kernel])


def never(rows: int) -> np.ndarray:
    return np.zeros(rows, dtype=bool)


def test_philox_known_answers() -> None:
    """The known-answer vectors published with the Random123 library."""
    full = 0xFFFFFFFF
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    counters = np.array([[0, 0, 0, 0]], dtype=np.uint64)
    assert philox4x32(counters, (0, 0))[0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    counters = np.array([[full] * 4], dtype=np.uint64)
    assert philox4x32(counters, (full, full))[0].tolist() == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    counters = np.array([pi], dtype=np.uint64)
    assert philox4x32(counters, (0xA4093822, 0x299F31D0))[0].tolist() == [
        0xD16CFE09,
        0x94FDCCEB,
        0x5001E420,
        0x24126EA1,
    ]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(0, 1000), st.integers(0, 5000))
def test_a_number_depends_on_its_counter_alone(seed: int, prompt: int, sample: int, position: int) -> None:
    alone = token_uniforms(seed, np.array([prompt]), np.array([sample]), position)
    together = token_uniforms(seed, np.array([7, prompt, 9]), np.array([1, sample, 0]), position)
    assert alone[0] == together[1]
    assert 0.0 <= alone[0] < 1.0


def test_numbers_are_uniform_and_uncorrelated() -> None:
    numbers = np.stack([token_uniforms(3, np.arange(2000), np.zeros(2000), position) for position in range(50)])
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    expected = numbers.size / 100
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 160  # 99 degrees of freedom: p = 1e-4
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.02


@both_samplers
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.7}, {"top_k": 6, "top_p": 0.8, "temperature": 1.5}],
    ids=str,
)
def test_draws_follow_the_exact_probabilities(choose: Callable, options: dict) -> None:
    """A chi-square test at p = 1e-4 over 20,000 draws; tokens that a filter struck never come."""
    rng = np.random.default_rng(0)
    logits, draws = rng.normal(size=10).astype(np.float32) * 1.5, 20_000
    how = SamplingSettings(max_new_tokens=1, seed=11, **options)
    exact = truncated_probabilities(logits[None], how)[0]
    uniforms = token_uniforms(how.seed, np.arange(draws), np.zeros(draws), 0)
    tokens, *_ = choose(np.tile(logits, (draws, 1)), how, uniforms, never(draws))
    counts = np.bincount(tokens, minlength=10)
    assert not counts[exact == 0].any()
    kept = exact > 0
    chi_square = ((counts[kept] - draws * exact[kept]) ** 2 / (draws * exact[kept])).sum()
    assert (
        chi_square < {1: 15.2, 2: 18.5, 3: 21.2, 4: 23.6, 5: 25.8, 6: 27.9, 7: 29.9, 8: 31.9, 9: 33.8}[kept.sum() - 1]
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 40), st.floats(0.01, 0.999))
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(seed: int, vocab: int, top_p: float) -> None:
    logits = np.random.default_rng(seed).normal(size=(1, vocab)).astype(np.float32) * 3
    probs = truncated_probabilities(logits, SamplingSettings(1))[0]
    nucleus = truncated_probabilities(logits, SamplingSettings(1, top_p=top_p))[0] > 0
    assert probs[nucleus].sum() >= top_p - 1e-9
    assert probs[nucleus].sum() - probs[nucleus].min() < top_p
    assert nucleus[probs.argmax()]
    if not nucleus.all():
        assert probs[nucleus].min() >= probs[~nucleus].max()


def test_top_k_keeps_k_tokens() -> None:
    logits = np.array([[0.0, 3.0, 1.0, 2.0]], dtype=np.float32)
    assert (truncated_probabilities(logits, SamplingSettings(1, top_k=2))[0] > 0).tolist() == [False, True, False, True]


@both_samplers
def test_greedy_takes_the_best(choose: Callable) -> None:
    logits = np.array([[0.0, 3.0, 1.0, 2.0]], dtype=np.float32)
    tokens, logprobs, _ = choose(logits, SamplingSettings(1, greedy=True), np.zeros(1), never(1))
    assert tokens.tolist() == [1]
    assert logprobs[0] == pytest.approx(3.0 - np.log(np.exp([0, 3, 1, 2]).sum()), abs=1e-6)


@both_samplers
def test_no_eos_where_it_is_too_early(choose: Callable) -> None:
    logits = np.array([[0.0, 9.0, 1.0, 8.0]] * 2, dtype=np.float32)
    how = SamplingSettings(9, greedy=True)
    assert choose(logits, how, np.zeros(2), np.array([True, False]), (1, 3))[0].tolist() == [2, 1]


@both_samplers
def test_repetition_penalty_pushes_seen_tokens_down(choose: Callable) -> None:
    logits = np.array([[2.0, 1.9, -1.0]], dtype=np.float32)
    seen = np.array([[True, False, True]])
    how = SamplingSettings(9, repetition_penalty=1.2, greedy=True)
    tokens, logprobs, _ = choose(logits, how, np.zeros(1), never(1), (), seen)
    assert tokens[0] == 1
    assert logprobs[0] == pytest.approx(1.9 - np.log(np.exp([2.0, 1.9, -1.0]).sum()), abs=1e-5)


@both_samplers
def test_a_row_without_numbers_is_reported_and_the_others_are_not_hurt(choose: Callable) -> None:
    logits = np.array([[0.0, 3.0, 1.0], [0.0, np.nan, 1.0], [0.0, np.inf, 1.0]], dtype=np.float32)
    assert choose(logits, SamplingSettings(1, greedy=True), np.zeros(3), never(3))[0].tolist() == [1, -1, -1]


@both_samplers
@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2**-53])
def test_the_ends_of_the_distribution_are_tokens_that_have_a_chance(choose: Callable, uniform: float) -> None:
    logits = np.array([[-200.0, 1.0, 2.0, -200.0]], dtype=np.float32)
    token = choose(logits, SamplingSettings(1, top_k=2), np.array([uniform]), never(1))[0][0]
    assert token == (1 if uniform == 0.0 else 2)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(2, 700),
    st.sampled_from([0, 1, 5, 50]),
    st.sampled_from([1.0, 0.9, 0.3]),
    st.sampled_from([1.0, 1.3, 0.8]),
    st.sampled_from([0.3, 1.0, 2.0]),
)
def test_the_kernel_draws_what_the_reference_draws(
    seed: int, vocab: int, top_k: int, top_p: float, penalty: float, temperature: float
) -> None:
    """But for draws that fall within rounding of the border between two tokens."""
    rng, rows = np.random.default_rng(seed), 16
    logits = (rng.normal(size=(rows, vocab)) * 3).astype(np.float32)
    seen, early, uniforms = rng.random((rows, vocab)) < 0.2, rng.random(rows) < 0.5, rng.random(rows)
    how = SamplingSettings(1, top_k=top_k, top_p=top_p, repetition_penalty=penalty, temperature=temperature)
    marks = seen if penalty != 1.0 else None
    wanted, wanted_logprobs, _ = choose_tokens(logits, how, uniforms, early, (0,), marks)
    got, logprobs, _ = by_kernel(logits, how, uniforms, early, (0,), marks)
    same = got == wanted
    assert same.mean() >= 15 / 16
    np.testing.assert_allclose(logprobs[same], wanted_logprobs[same], atol=2e-5, rtol=1e-5)


narrowings = pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.6},
        {"top_k": 7},
        {"top_p": 0.8},
        {"top_k": 20, "top_p": 0.6, "temperature": 1.7},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7, "top_k": 9, "top_p": 0.9, "temperature": 0.8},
    ],
    ids=str,
)


@both_samplers
@narrowings
def test_the_samplers_logprob_is_of_the_distribution_that_was_drawn_from(choose: Callable, options: dict) -> None:
    """Behaviour policy: ratios to log p of a truncated sampler are biased; log q is what they need."""
    rng, rows, vocab = np.random.default_rng(5), 200, 300
    logits = (rng.normal(size=(rows, vocab)) * 2).astype(np.float32)
    seen, early, how = rng.random((rows, vocab)) < 0.2, rng.random(rows) < 0.5, SamplingSettings(1, **options)
    marks = seen if how.repetition_penalty != 1.0 else None
    tokens, logprobs, found = choose(logits, how, rng.random(rows), early, (0, 5), marks)
    chances = [sampled_from(logits[i], how, (0, 5) if early[i] else (), seen[i])[tokens[i]] for i in range(rows)]
    np.testing.assert_allclose(found, np.log(chances), atol=2e-5)
    assert found.dtype == np.float32 and (found <= 0).all()
    if how.repetition_penalty == 1.0:  # what is cut off can only make the others likelier
        assert (found >= logprobs - 1e-6).all()


@both_samplers
@pytest.mark.parametrize("options", [{}, {"temperature": 0.3}, {"top_k": 300}, {"top_k": 999}], ids=str)
def test_where_nothing_changes_the_distribution_both_are_the_same_bits(choose: Callable, options: dict) -> None:
    rng = np.random.default_rng(6)
    logits, early = (rng.normal(size=(64, 300)) * 3).astype(np.float32), np.arange(64) < 8
    logits[:, 1] = logits.max(axis=1)  # eos
    _, logprobs, found = choose(logits, SamplingSettings(9, **options), rng.random(64), early, (1,), None)
    assert (found[8:] == logprobs[8:]).all()
    assert (found[:8] > logprobs[:8]).all(), "without eos the others are likelier"


@both_samplers
def test_a_greedy_choice_is_certain(choose: Callable) -> None:
    logits = np.random.default_rng(7).normal(size=(9, 40)).astype(np.float32)
    how = SamplingSettings(9, greedy=True, top_p=0.5, repetition_penalty=1.2)
    found = choose(logits, how, np.zeros(9), never(9), (1,), logits > 0)
    assert (found[2] == 0).all() and (found[1] < 0).all()
