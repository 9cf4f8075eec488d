"""NLPO: which tokens the policy may choose, from a lagging copy of it (NumPy; the differentiable log-probs are
:func:`~alignment.losses.logprobs.score_labels` with ``keep``).

Source: Ramamurthy et al. 2023 (RL4LMs, NLPO), section 4.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from alignment.named import Named

# From logits [..., V], the threshold and the least number of tokens to keep [..., V] bool.
VOCABULARY_MASKS: Named[Callable[[np.ndarray, float, int], np.ndarray]] = Named("mask_type")


def vocabulary_mask(
    kind: str, mask_logits: np.ndarray, top_mask: float, keep_at_least: int = 1, always: Iterable[int] = ()
) -> np.ndarray:
    """The tokens that may be chosen.

    Args:
        kind: a name of :data:`VOCABULARY_MASKS`.
        mask_logits: ``[..., V]`` of the lagging policy (of the policy itself for RL4LMs' ``topk``).
        top_mask: p or k; -1 keeps all tokens.
        keep_at_least: tokens kept in any case, the most probable ones; ``learned_top_p`` only.
        always: token ids that may always be chosen (the tokenizer's special ids).

    Returns:
        ``[..., V]`` bool.

    Raises:
        ArgumentsError: ``kind`` is unknown.
    """
    choose, logits = VOCABULARY_MASKS[kind], np.asarray(mask_logits, np.float64)
    keep = np.ones(logits.shape, bool) if top_mask == -1 else choose(logits, top_mask, keep_at_least)
    keep[..., list(always)] = True
    return keep


@VOCABULARY_MASKS.register("learned_top_p")
def nucleus_mask(logits: np.ndarray, top_p: float, keep_at_least: int) -> np.ndarray:
    """The most probable tokens in front of which a mass of at most p lies: the one that crosses p stays."""
    probs, vocabulary = masked_softmax(logits)[0], logits.shape[-1]
    least = min(max(1, keep_at_least), vocabulary)
    # Tokens below (1 - p) / V weigh less than 1 - p together, so each has more than p in front of it: sort the others.
    bounds = np.partition(probs, vocabulary - least, axis=-1)[..., vocabulary - least].clip(
        max=(1 - top_p) / vocabulary
    )
    keep = np.zeros(logits.shape, bool)
    for place in np.ndindex(logits.shape[:-1]):
        likely = np.flatnonzero(probs[place] >= bounds[place])
        order = likely[np.argsort(-logits[place][likely], kind="stable")]
        before = np.cumsum(probs[place][order]) - probs[place][order]
        inside = before <= top_p
        inside[:least] = True
        keep[place][order[inside]] = True
    return keep


@VOCABULARY_MASKS.register("learned_top_k", "topk")
def largest_mask(logits: np.ndarray, top_k: float, keep_at_least: int) -> np.ndarray:
    """The k most probable tokens; equal ones by their number."""
    vocabulary = logits.shape[-1]
    count = min(int(top_k), vocabulary)
    bounds = np.partition(logits, vocabulary - count, axis=-1)[..., vocabulary - count]
    keep = np.zeros(logits.shape, bool)
    for place in np.ndindex(logits.shape[:-1]):
        likely = np.flatnonzero(logits[place] >= bounds[place])  # more than k where several are equal to the last
        order = np.argsort(-logits[place][likely], kind="stable")[:count]
        keep[place][likely[order]] = True
    return keep


def masked_softmax(logits: np.ndarray, keep: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distribution over the tokens that may be chosen, renormalised.

    Args:
        logits: ``[..., V]``.
        keep: ``[..., V]`` bool; ``None`` for all.

    Returns:
        ``(probs, logprobs, entropy)``, ``[..., V]``, ``[..., V]`` (minus infinity where a token may not be chosen) and
        ``[...]``, float64.
    """
    wide = np.asarray(logits, np.float64)
    wide = wide if keep is None else np.where(keep, wide, -np.inf)
    shifted = wide - wide.max(axis=-1, keepdims=True)
    probs = np.exp(shifted)
    total = probs.sum(axis=-1, keepdims=True)
    logprobs, probs = shifted - np.log(total), probs / total
    return probs, logprobs, -(probs * np.where(probs > 0, logprobs, 0.0)).sum(axis=-1)
