"""Log-probabilities and entropy of chosen tokens, exact at any size, with their own backward.

Paddle 3.3.1's CPU ``log_softmax`` and ``cross_entropy`` clip at -64 (value and gradient are lost below) and
``log_softmax`` takes time quadratic in the vocabulary; this one does neither, on any device. With tensor parallelism
each rank gives its own columns of the logits, and three numbers per token travel in place of the vocabulary
(Shoeybi et al., "Megatron-LM", 2019, section 3).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from alignment.runtime import lazy

if TYPE_CHECKING:
    from paddle import Tensor

paddle = lazy("paddle")

# Stands for minus infinity where a token may not be chosen: its probability is exactly 0, and 0 times it is 0.
FORBIDDEN = -1e30


class Shard(Protocol):
    """What a softmax needs to know of the other columns; see :class:`alignment.parallel.tensor_ranks.VocabularyShard`.

    Attributes:
        start: number of the first column that is here.
        size: columns that are here.
    """

    start: int
    size: int

    def largest(self, values: Tensor) -> Tensor:
        """Elementwise maximum over all columns' holders."""

    def total(self, values: Tensor) -> Tensor:
        """Elementwise sum over all columns' holders."""


@dataclass(frozen=True)
class _Whole:
    """All columns are here."""

    size: int
    start: int = 0

    def largest(self, values: Tensor) -> Tensor:
        return values

    def total(self, values: Tensor) -> Tensor:
        return values


@functools.cache
def _token_logprobs() -> Any:
    """The layer; a function, because its base class is Paddle's."""

    class TokenLogProbs(paddle.autograd.PyLayer):
        """``(logits [N, V], labels [N]) -> (logprobs [N], entropy [N], greedy [N])``.

        Keeps the probabilities ``[N, V]`` for the backward, and the log-probabilities too where the entropy is to be
        differentiated. ``greedy`` is 1 where no logit is larger than the label's.
        """

        @staticmethod
        def forward(ctx, logits, labels, temperature, want_entropy, entropy_grad, shard):  # type: ignore[no-untyped-def]
            dtype = paddle.float64 if logits.dtype == paddle.float64 else paddle.float32
            scaled = logits.astype(dtype)
            if temperature != 1.0:
                scaled = scaled / temperature
            shifted = scaled - shard.largest(scaled.max(axis=-1, keepdim=True))
            probs = shifted.exp()
            total = shard.total(probs.sum(axis=-1, keepdim=True))
            log_total = total.log()
            column = labels - shard.start
            here = paddle.logical_and(column >= 0, column < shard.size).astype(dtype).unsqueeze(-1)
            column = column.clip(0, shard.size - 1).unsqueeze(-1)
            picked = shard.total(paddle.take_along_axis(shifted, column, axis=-1) * here)
            logprobs = (picked - log_total).squeeze(-1)
            probs.divide_(total)
            if want_entropy:
                # H = log Z - sum p z with z the shifted logits: no logarithm of a vanishing probability
                entropy = (log_total - shard.total((probs * shifted).sum(axis=-1, keepdim=True))).squeeze(-1)
            else:
                entropy = paddle.zeros_like(logprobs)
            ctx.temperature, ctx.input_dtype, ctx.entropy_grad = temperature, logits.dtype, entropy_grad
            if entropy_grad:
                ctx.save_for_backward(probs, column, here, shifted - log_total, entropy)
            else:
                ctx.save_for_backward(probs, column, here)
            return logprobs, entropy, (picked >= 0).astype(dtype).squeeze(-1)

        @staticmethod
        def backward(ctx, grad_logprobs, grad_entropy, grad_greedy):  # type: ignore[no-untyped-def]
            saved = ctx.saved_tensor()
            probs, column, here = saved[0], saved[1], saved[2]
            # d logp(label) / d z = onehot - p
            grad = paddle.put_along_axis(
                probs * -grad_logprobs.unsqueeze(-1), column, grad_logprobs.unsqueeze(-1) * here, axis=-1, reduce="add"
            )
            if ctx.entropy_grad:
                # d H / d z = -p (log p + H)
                log_probs, entropy = saved[3], saved[4]
                grad = grad - grad_entropy.unsqueeze(-1) * probs * (log_probs + entropy.unsqueeze(-1))
            if ctx.temperature != 1.0:
                grad = grad / ctx.temperature
            return grad.astype(ctx.input_dtype), None

    return TokenLogProbs


@dataclass(frozen=True)
class TokenScores:
    """What a model says of chosen tokens.

    Attributes:
        logprobs: ``[...]`` float32 (float64 for float64 logits), in nats, differentiable in the logits.
        entropy: ``[...]``, of each distribution, in nats; zero where it was not asked for.
        greedy: ``[...]``, 1 where no token has a larger logit.
    """

    logprobs: Tensor
    entropy: Tensor
    greedy: Tensor


def score_labels(
    logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    *,
    entropy: bool = False,
    entropy_grad: bool = False,
    shard: Shard | None = None,
    keep: Tensor | None = None,
) -> TokenScores:
    """Look chosen tokens up in ``softmax(logits / temperature)``.

    Args:
        logits: ``[..., V]``, any floating dtype; with ``shard`` this process's columns of them.
        labels: ``[...]`` int64, each in ``[0, V)``, of the whole vocabulary.
        temperature: the sampling temperature; the same one belongs into old, new and reference log-probs.
        entropy: whether to compute the entropy.
        entropy_grad: whether the entropy is to be differentiated (keeps one more ``[..., V]`` tensor).
        shard: where the other columns are; every holder calls with the same labels.
        keep: ``[..., V]`` bool, the tokens that could be chosen (with ``shard`` its columns); the probabilities are
            renormalised over them (NLPO, Ramamurthy et al. 2023). A label outside has the log-prob
            :data:`FORBIDDEN`, nearly. ``None`` for all.
    """
    if keep is not None:
        # in float32 at least: float16 does not hold FORBIDDEN
        logits = logits.astype(paddle.float64 if logits.dtype == paddle.float64 else paddle.float32)
        logits = paddle.where(keep, logits, paddle.full_like(logits, FORBIDDEN))
    shape, columns = labels.shape, logits.shape[-1]
    parts = _token_logprobs().apply(
        logits.reshape([-1, columns]),
        labels.reshape([-1]),
        float(temperature),
        entropy or entropy_grad,
        entropy_grad,
        shard or _Whole(columns),
    )
    logprobs, spread, greedy = (part.reshape(shape) for part in parts)
    return TokenScores(logprobs, spread if entropy_grad else spread.detach(), greedy.detach())
