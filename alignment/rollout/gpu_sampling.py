"""The choice of a token on the device, without a look from the host: :func:`choose_tokens` in Paddle's operators.

Paddle's own ``top_p_sampling`` draws its own random numbers, so it cannot give the tokens that the counter-based
sampler gives. Here the uniform numbers come from the host, for a whole burst at once.
"""

from __future__ import annotations

import paddle
from paddle import Tensor

from alignment.rollout.sampler import SamplingSettings


def choose_on_device(
    logits: Tensor,
    settings: SamplingSettings,
    uniforms: Tensor,
    early: Tensor,
    eos: Tensor | None,
    seen: Tensor | None,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose one token for each row, as :func:`~alignment.rollout.sampler.choose_tokens` does.

    Args:
        logits: ``[B, V]`` float32.
        settings: how.
        uniforms: ``[B]`` float64 in ``[0, 1)``; not looked at when greedy.
        early: ``[B]`` bool, rows in which ``eos`` has no chance yet.
        eos: ``[V]`` bool, tokens that end an answer; None for none.
        seen: ``[B, V]`` uint8, tokens in the row so far; None without a repetition penalty.
        allowed: ``[B, V]`` bool, tokens that have a chance; None for all.

    Returns:
        ``(tokens [B] int64, logprobs [B] float32, sampler_logprobs [B] float32)``; a token is -1 where a logit is NaN
        or infinite, or none is allowed.
    """
    sound = paddle.isfinite(logits).all(axis=-1)
    if allowed is not None:
        sound = paddle.logical_and(sound, allowed.any(axis=-1))
        allowed = paddle.logical_or(allowed, paddle.logical_not(sound).unsqueeze(-1))
    logits = paddle.where(sound.unsqueeze(-1), logits, paddle.zeros_like(logits))
    plain = logits.astype("float64") / settings.temperature
    adjusted = logits
    penalised = settings.repetition_penalty != 1.0 and seen is not None
    if penalised:
        penalty = settings.repetition_penalty
        pushed = paddle.where(logits > 0, logits / penalty, logits * penalty)
        adjusted = paddle.where(seen.astype("bool"), pushed, logits)
    if eos is not None:
        banned = paddle.logical_and(early.unsqueeze(-1), eos.unsqueeze(0))
        adjusted = paddle.where(banned, paddle.full_like(adjusted, -float("inf")), adjusted)
    if allowed is not None:
        adjusted = paddle.where(allowed, adjusted, paddle.full_like(adjusted, -float("inf")))
    if settings.greedy:
        tokens = adjusted.argmax(axis=-1)
    else:
        probs = truncated_probabilities(adjusted, settings)
        tokens = draw(probs, uniforms)
    logprobs = (_picked(plain, tokens) - paddle.logsumexp(plain, axis=-1)).astype("float32")
    if settings.greedy:
        sampler_logprobs = paddle.zeros_like(logprobs)
    elif penalised or settings.narrows(int(logits.shape[-1])):
        sampler_logprobs = _picked(probs, tokens).log().astype("float32")
    elif eos is not None or allowed is not None:
        changed = early if eos is not None else paddle.zeros_like(sound)
        if allowed is not None:
            changed = paddle.logical_or(changed, paddle.logical_not(allowed.all(axis=-1)))
        sampler_logprobs = paddle.where(changed, _picked(probs, tokens).log().astype("float32"), logprobs)
    else:
        sampler_logprobs = logprobs
    return paddle.where(sound, tokens, paddle.full_like(tokens, -1)), logprobs, sampler_logprobs


def _picked(values: Tensor, tokens: Tensor) -> Tensor:
    return paddle.take_along_axis(values, tokens.unsqueeze(-1), axis=-1).squeeze(-1)


def truncated_probabilities(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """The distribution that is sampled from, ``[B, V]`` float64, zero where a filter struck.

    In float64 as on the host, so that rounding all but never makes another token of the same uniform number.
    """
    scaled = logits.astype("float64") / settings.temperature
    probs = paddle.exp(scaled - scaled.max(axis=-1, keepdim=True))
    # what has no chance is exactly 0; Paddle's exp of minus infinity is 5e-309 on a CPU
    probs = paddle.where(paddle.isinf(scaled), paddle.zeros_like(probs), probs)
    vocab = int(probs.shape[-1])
    if 0 < settings.top_k < vocab:
        threshold = paddle.topk(probs, settings.top_k, axis=-1)[0][:, -1:]
        probs = paddle.where(probs < threshold, paddle.zeros_like(probs), probs)
    probs = probs / probs.sum(axis=-1, keepdim=True)
    if settings.top_p < 1.0:
        order = paddle.argsort(probs, axis=-1, descending=True, stable=True)
        ordered = paddle.take_along_axis(probs, order, axis=-1)
        # the first rank whose sum reaches top_p is the last that stays
        last = (ordered.cumsum(axis=-1) < settings.top_p - 1e-12).astype("int64").sum(axis=-1, keepdim=True)
        kept = paddle.where(paddle.arange(vocab).unsqueeze(0) <= last, ordered, paddle.zeros_like(ordered))
        probs = paddle.put_along_axis(paddle.zeros_like(probs), order, kept, axis=-1)
        probs = probs / probs.sum(axis=-1, keepdim=True)
    return probs


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The first token, by number, at which the distribution function exceeds the uniform number.

    Args:
        probs: ``[B, V]`` float64.
        uniforms: ``[B]`` float64 in ``[0, 1)``.

    Returns:
        ``[B]`` int64, always a token with a chance.
    """
    vocab = int(probs.shape[-1])
    cumulative = probs.cumsum(axis=-1)
    number = paddle.arange(vocab).unsqueeze(0).expand_as(probs)
    possible = probs > 0
    beyond = paddle.logical_and(cumulative > (uniforms * cumulative[:, -1]).unsqueeze(-1), possible)
    first = paddle.where(beyond, number, paddle.full_like(number, vocab)).min(axis=-1)
    # a device adds up in parallel, so rounding may put the draw at the very end, behind the last possible token
    last = paddle.where(possible, number, paddle.zeros_like(number)).max(axis=-1)
    return paddle.minimum(first, last)
