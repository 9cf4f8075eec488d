"""Log-probs of labels from final hidden states, the LM head included, without ``[rows, vocab]`` ever being whole in
memory, in the forward or in the backward.

On the CPU a kernel goes over the vocabulary in blocks and makes the logits anew in the backward. Elsewhere, and where
tensor ranks share the vocabulary, the labels go in chunks of :data:`LABELS_AT_ONCE`, each recomputed in the backward
(activation recomputation of the head alone: Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models",
measure what the logits of a whole batch cost).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.autograd import PyLayer

from alignment.kernels.ops import kernels
from alignment.losses.logprobs import Shard, TokenScores, score_labels
from alignment.losses.token_sets import TokenSets
from alignment.ppo.models import head_is_tied, kept_tokens, lm_logits, unwrap

#: Labels whose logits exist at a time where no kernel computes them: 512 rows of a vocabulary of 152,000 are 311 MB in
#: float32. Products of 512 rows are large enough to keep a GPU busy.
LABELS_AT_ONCE = 512


def label_scores(
    model: nn.Layer,
    states: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    *,
    entropy: bool = False,
    entropy_grad: bool = False,
    shard: Shard | None = None,
    allowed: TokenSets | None = None,
) -> TokenScores:
    """Look tokens up in what a causal model predicts; see :func:`alignment.losses.logprobs.score_labels`.

    Args:
        model: a causal model, or its last pipeline stage.
        states: ``[N, hidden]`` final hidden states of the positions that predict the labels.
        labels: ``[N]`` int64.
        temperature, entropy, entropy_grad: as there.
        shard: where the other columns of the LM head are; None when this process has all of them.
        allowed: N sets of tokens, of the whole vocabulary: the softmax of each position is over its set alone.

    Returns:
        ``[N]`` each.
    """
    operators = kernels()
    head = unwrap(model).lm_head
    if operators is not None and shard is None and states.dtype == head.weight.dtype == paddle.float32:
        weight, tied, whole = head.weight, head_is_tied(head), kept_tokens(model)
        settings = (operators, float(temperature), tied, whole, entropy or entropy_grad, entropy_grad, allowed)
        parts = _LabelScores.apply(states, weight, labels, settings)
        return _scores(parts, entropy_grad)

    def compute(some: Tensor, theirs: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        logits = lm_logits(model, some, own_columns=shard is not None)
        mask = None if allowed is None else _mask(allowed, first, logits, shard)
        how = {"entropy": entropy, "entropy_grad": entropy_grad, "shard": shard, "keep": mask}
        found = score_labels(logits, theirs, temperature, **how)
        return found.logprobs, found.entropy, found.greedy

    count = int(labels.shape[0])
    if count <= LABELS_AT_ONCE:
        return TokenScores(*compute(states, labels, 0))
    pieces = []
    for start in range(0, count, LABELS_AT_ONCE):
        piece = slice(start, min(start + LABELS_AT_ONCE, count))
        pieces.append(_made_twice(compute, states[piece], labels[piece], start))
    return _scores([paddle.concat(list(part)) for part in zip(*pieces, strict=True)], entropy_grad)


def head_columns(model: nn.Layer) -> int:
    """Columns of the LM head (tokens) that this process has."""
    head = unwrap(model).lm_head
    return int(head.weight.shape[0 if head_is_tied(head) else 1])


def _scores(parts: Any, entropy_grad: bool) -> TokenScores:
    logprobs, entropy, greedy = parts
    return TokenScores(logprobs, entropy if entropy_grad else entropy.detach(), greedy.detach())


def _made_twice(compute: Any, states: Tensor, labels: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """``compute`` with nothing kept for the backward but its inputs."""
    if not paddle.is_grad_enabled():
        return compute(states, labels, first)
    from paddle.distributed.fleet.utils import recompute

    if states.stop_gradient:
        # a frozen decoder under a trained head: the recomputation hangs on a differentiable input
        states = states.detach()
        states.stop_gradient = False
    return recompute(compute, states, labels, first, preserve_rng_state=False, use_reentrant=True)


def _sets(allowed: TokenSets) -> tuple[Tensor, Tensor]:
    """As the kernel takes them: ids, and where each set begins."""
    starts = np.concatenate([[0], np.cumsum(allowed.counts, dtype=np.int64)])
    return paddle.to_tensor(allowed.ids.astype(np.int64)), paddle.to_tensor(starts)


def _mask(allowed: TokenSets, first: int, logits: Tensor, shard: Shard | None) -> Tensor:
    """``[rows, columns]`` bool, shaped as the logits of the positions from ``first`` on: which of these columns are
    allowed.
    """
    rows, columns = logits.shape
    position, token = allowed.entries(first, first + rows)
    token = token - (shard.start if shard is not None else 0)
    here = (token >= 0) & (token < columns)
    mask = paddle.zeros([rows * columns], dtype="bool")
    if here.any():
        index = paddle.to_tensor(position[here] * columns + token[here])
        mask = paddle.index_put(mask, (index,), paddle.ones([1], dtype="bool"))
    return mask.reshape([rows, columns])


def _columns(weight: Tensor, kept: int | None, tied: bool) -> Tensor:
    """The head's weight of the tokens that are kept; of a tied one without a copy."""
    if kept is None:
        return weight
    return weight._slice(0, kept) if tied else weight[:, :kept].contiguous()


class _LabelScores(PyLayer):
    """``(states [N, hidden], head, labels [N]) -> (logprobs, entropy, greedy)``, each ``[N]`` float32."""

    @staticmethod
    def forward(ctx, states, weight, labels, settings):  # type: ignore[no-untyped-def]
        operators, temperature, tied, kept, entropy, _, allowed = settings
        ctx.sets = (None, None) if allowed is None else _sets(allowed)
        ctx.wanted = not states.stop_gradient, not weight.stop_gradient
        states = states.contiguous()
        logprobs, spread, log_norm, greedy = operators.label_logprobs(
            states, _columns(weight, kept, tied), labels, temperature, tied=tied, entropy=entropy, sets=ctx.sets
        )
        ctx.settings = settings
        ctx.save_for_backward(states, weight, labels, log_norm, spread)
        return logprobs, spread, greedy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy, grad_greedy):  # type: ignore[no-untyped-def]
        operators, temperature, tied, kept, _, entropy_grad, _ = ctx.settings
        states, weight, labels, log_norm, spread = ctx.saved_tensor()
        grads = (grad_logprobs.contiguous(), grad_entropy.contiguous() if entropy_grad else None)
        columns = _columns(weight, kept, tied)
        how = {"tied": tied, "of_weight": ctx.wanted[1], "sets": ctx.sets}
        of_states, of_weight = operators.label_logprobs_backward(
            states, columns, labels, log_norm, spread, grads, temperature, **how
        )
        if of_weight is not None and kept is not None:
            axis, missing = (0, 1)[not tied], list(weight.shape)
            missing[axis] -= kept
            of_weight = paddle.concat([of_weight, paddle.zeros(missing, dtype=of_weight.dtype)], axis=axis)
        return of_states if ctx.wanted[0] else None, of_weight, None
