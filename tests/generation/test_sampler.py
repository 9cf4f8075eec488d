"""The random numbers and the sampler against known answers and exact probabilities."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.ppo.generation.random_numbers import philox4x32, token_uniforms
from alignment.ppo.generation.sampler import SamplingSettings, choose_tokens, truncated_probabilities


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


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.7}, {"top_k": 6, "top_p": 0.8, "temperature": 1.5}],
    ids=str,
)
def test_draws_follow_the_exact_probabilities(options: dict) -> None:
    """A chi-square test at p = 1e-4 over 20,000 draws; tokens that a filter struck never come."""
    rng = np.random.default_rng(0)
    logits, draws = rng.normal(size=10).astype(np.float32) * 1.5, 20_000
    how = SamplingSettings(max_new_tokens=1, seed=11, **options)
    exact = truncated_probabilities(logits[None], how)[0]
    tokens, _ = choose_tokens(np.tile(logits, (draws, 1)), how, np.arange(draws), np.zeros(draws), 0)
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


def test_top_k_keeps_k_tokens_and_greedy_takes_the_best() -> None:
    logits = np.array([[0.0, 3.0, 1.0, 2.0]], dtype=np.float32)
    assert (truncated_probabilities(logits, SamplingSettings(1, top_k=2))[0] > 0).tolist() == [False, True, False, True]
    tokens, logprobs = choose_tokens(logits, SamplingSettings(1, greedy=True), np.array([0]), np.array([0]), 0)
    assert tokens.tolist() == [1]
    assert logprobs[0] == pytest.approx(3.0 - np.log(np.exp([0, 3, 1, 2]).sum()), abs=1e-6)


def test_no_eos_before_the_minimum_length() -> None:
    logits = np.array([[0.0, 9.0, 1.0]], dtype=np.float32)
    how = SamplingSettings(9, min_new_tokens=2, greedy=True)
    chosen = [choose_tokens(logits, how, np.array([0]), np.array([0]), t, (1,))[0][0] for t in range(4)]
    assert chosen == [2, 2, 1, 1]


def test_repetition_penalty_pushes_seen_tokens_down() -> None:
    logits = np.array([[2.0, 1.9, -1.0]], dtype=np.float32)
    seen = np.array([[True, False, True]])
    how = SamplingSettings(9, repetition_penalty=1.2, greedy=True)
    tokens, logprobs = choose_tokens(logits, how, np.array([0]), np.array([0]), 0, (), seen)
    assert tokens[0] == 1
    assert logprobs[0] == pytest.approx(1.9 - np.log(np.exp([2.0, 1.9, -1.0]).sum()), abs=1e-5)
