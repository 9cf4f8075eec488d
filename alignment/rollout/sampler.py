"""From logits to the next token, on the host: penalties, filters and the draw by the inverse of the distribution
function.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: longest response, EOS included.
        min_new_tokens: no EOS before the response has so many tokens besides it.
        temperature: logits are divided by it.
        top_k: only the k likeliest tokens; 0 for all.
        top_p: only the smallest set of likeliest tokens whose probability reaches top_p; 1 for all.
        repetition_penalty: logits of tokens that already stand in the row are divided (positive) or multiplied
            (negative) by it (Keskar et al. 2019, CTRL); 1 for none.
        greedy: take the likeliest token; everything above but the penalty and the minimum length is then ignored.
        seed: of the random numbers.
        stop: texts that end an answer, besides the eos tokens.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    greedy: bool = False
    seed: int = 42
    stop: tuple[str, ...] = ()

    def narrows(self, vocabulary: int) -> bool:
        """Whether ``top_k`` or ``top_p`` may strike a token."""
        return 0 < self.top_k < vocabulary or self.top_p < 1.0

    def as_greedy(self) -> SamplingSettings:
        """The same limits without chance."""
        return replace(self, greedy=True)


def truncated_probabilities(logits: np.ndarray, settings: SamplingSettings) -> np.ndarray:
    """The distribution that is sampled from.

    Args:
        logits: ``[N, V]`` float32, penalties applied.
        settings: temperature, top_k, top_p.

    Returns:
        ``[N, V]`` float64, each row summing to 1, zero where a filter struck.
    """
    scaled = logits.astype(np.float64) / settings.temperature
    scaled -= scaled.max(axis=-1, keepdims=True)
    probs = np.exp(scaled)
    vocab = probs.shape[-1]
    if 0 < settings.top_k < vocab:
        threshold = np.partition(probs, vocab - settings.top_k, axis=-1)[:, vocab - settings.top_k, None]
        probs[probs < threshold] = 0.0
    probs /= probs.sum(axis=-1, keepdims=True)
    if settings.top_p < 1.0:
        for row in probs:
            _keep_nucleus(row, settings.top_p)
    return probs


class KeptMass:
    """How much of the policy's probability ``top_k`` and ``top_p`` leave, looked at in some rows of some steps."""

    EVERY, ROWS, ENOUGH = 8, 8, 256

    def __init__(self) -> None:
        self.calls, self.rows, self.sum = 0, 0, 0.0

    @property
    def mean(self) -> float | None:
        """Over all that was looked at; None if nothing was."""
        return self.sum / self.rows if self.rows else None

    def wants(self, settings: SamplingSettings) -> bool:
        """Count a step; say whether to look at it."""
        narrow = not settings.greedy and (settings.top_k > 0 or settings.top_p < 1.0)
        self.calls += narrow
        return narrow and self.rows < self.ENOUGH and self.calls % self.EVERY == 1

    def look(self, logits: np.ndarray, settings: SamplingSettings, allowed: np.ndarray | None = None) -> None:
        """Take in a step's logits ``[N, V]``, before penalties; with ``allowed`` ``[N, V]`` bool (of a masking policy)
        the policy is the one over these tokens.
        """
        some = logits[: self.ROWS]
        if allowed is not None:
            some = np.where(allowed[: self.ROWS], some, -np.inf)
        whole = truncated_probabilities(some, replace(settings, top_k=0, top_p=1.0))
        self.sum += float(whole[truncated_probabilities(some, settings) > 0].sum())
        self.rows += len(some)


def _keep_nucleus(row: np.ndarray, top_p: float) -> None:
    # Tokens below (1 - top_p) / V weigh less than 1 - top_p together, so none of them is in the nucleus: sort the
    # others only.
    candidates = np.nonzero(row >= (1.0 - top_p) / row.size)[0]
    order = candidates[np.argsort(-row[candidates], kind="stable")]
    reached = np.cumsum(row[order])
    keep = order[: int(np.searchsorted(reached, top_p - 1e-12)) + 1]
    kept = row[keep]
    row[:] = 0.0
    row[keep] = kept / kept.sum()


def apply_repetition_penalty(logits: np.ndarray, seen: np.ndarray, penalty: float) -> None:
    """Push down, in place, the logits of tokens that already stand in the row.

    Args:
        logits: ``[N, V]``.
        seen: ``[N, V]`` bool.
        penalty: above 1 to discourage repetition.
    """
    logits[...] = np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)


def choose_tokens(
    logits: np.ndarray,
    settings: SamplingSettings,
    uniforms: np.ndarray,
    early: np.ndarray,
    eos_ids: tuple[int, ...] = (),
    seen: np.ndarray | None = None,
    allowed: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Choose one token for each row.

    Args:
        logits: ``[N, V]`` float32.
        settings: how.
        uniforms: ``[N]`` float64 in ``[0, 1)``, of :func:`token_uniforms`; not looked at when greedy.
        early: ``[N]`` bool, rows in which ``eos_ids`` have no chance yet.
        eos_ids: tokens that end an answer.
        seen: ``[N, V]`` bool, tokens in the row so far; needed with a repetition penalty.
        allowed: ``[N, V]`` bool, tokens that have a chance; None for all.

    Returns:
        ``(tokens [N] int64, logprobs [N] float32, sampler_logprobs [N] float32)``. ``logprobs`` are of
        ``softmax(logits / temperature)`` before any filter or penalty, as the training network will compute them;
        ``sampler_logprobs`` of the distribution that the token was drawn from, with penalty, early eos and filters:
        0 when greedy, and bit by bit ``logprobs`` in a row that nothing changed. A token is -1 where a logit is NaN or
        infinite, or none is allowed.
    """
    sound = np.isfinite(logits).all(axis=-1)
    if allowed is not None:
        sound &= allowed.any(axis=-1)
    logits = np.where(sound[:, None], logits, 0.0)
    plain = logits.astype(np.float64) / settings.temperature
    peak = plain.max(axis=-1, keepdims=True)
    normalizer = np.log(np.exp(plain - peak).sum(axis=-1)) + peak[:, 0]
    adjusted = logits.astype(np.float32, copy=True)
    penalised = settings.repetition_penalty != 1.0 and seen is not None
    changed = np.full(len(logits), settings.greedy or penalised or settings.narrows(logits.shape[-1]))
    if penalised:
        apply_repetition_penalty(adjusted, seen, settings.repetition_penalty)
    if eos_ids and early.any():
        adjusted[np.ix_(early, list(eos_ids))] = -np.inf
        changed |= early
    if allowed is not None:
        allowed = allowed | ~sound[:, None]
        adjusted[~allowed] = -np.inf
        changed |= ~allowed.all(axis=-1)
    rows = np.arange(len(logits))
    if settings.greedy:
        tokens = adjusted.argmax(axis=-1)
        drawn_from = np.zeros(len(rows))
    else:
        probs = truncated_probabilities(adjusted, settings)
        cumulative = np.cumsum(probs, axis=-1)
        total = cumulative[:, -1]
        draws = np.minimum(uniforms * total, np.nextafter(total, 0.0))  # rounding must not step over the last token
        tokens = (cumulative <= draws[:, None]).sum(axis=-1)
        drawn_from = np.log(probs[rows, tokens])
    logprobs = (plain[rows, tokens] - normalizer).astype(np.float32)
    sampler_logprobs = np.where(changed, drawn_from, logprobs).astype(np.float32)
    return np.where(sound, tokens, -1).astype(np.int64), logprobs, sampler_logprobs
