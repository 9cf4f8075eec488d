"""Log-probabilities and entropy of chosen tokens, exact at any size, with their own backward.

Paddle 3.3.1's CPU ``log_softmax`` and ``cross_entropy`` clip at -64 (value and gradient are lost below) and
``log_softmax`` takes time quadratic in the vocabulary; this one does neither, on any device.
"""

from __future__ import annotations

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer


class _TokenLogProbs(PyLayer):
    """``(logits [N, V], labels [N]) -> (logprobs [N], entropy [N])``.

    Keeps the probabilities ``[N, V]`` for the backward, and the log-probabilities too where the entropy is to be
    differentiated.
    """

    @staticmethod
    def forward(ctx, logits, labels, temperature, want_entropy, entropy_grad):  # type: ignore[no-untyped-def]
        dtype = paddle.float64 if logits.dtype == paddle.float64 else paddle.float32
        scaled = logits.astype(dtype)
        if temperature != 1.0:
            scaled = scaled / temperature
        shifted = scaled - scaled.max(axis=-1, keepdim=True)
        probs = shifted.exp()
        total = probs.sum(axis=-1, keepdim=True)
        log_total = total.log()
        picked = paddle.take_along_axis(shifted, labels.unsqueeze(-1), axis=-1)
        logprobs = (picked - log_total).squeeze(-1)
        probs.divide_(total)
        if want_entropy:
            # H = log Z - sum p z with z the shifted logits: no logarithm of a vanishing probability
            entropy = log_total.squeeze(-1) - (probs * shifted).sum(axis=-1)
        else:
            entropy = paddle.zeros_like(logprobs)
        ctx.temperature, ctx.input_dtype, ctx.entropy_grad = temperature, logits.dtype, entropy_grad
        if entropy_grad:
            ctx.save_for_backward(probs, labels, shifted - log_total, entropy)
        else:
            ctx.save_for_backward(probs, labels)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):  # type: ignore[no-untyped-def]
        saved = ctx.saved_tensor()
        probs, labels = saved[0], saved[1]
        # d logp(label) / d z = onehot - p
        grad = paddle.put_along_axis(
            probs * -grad_logprobs.unsqueeze(-1),
            labels.unsqueeze(-1),
            grad_logprobs.unsqueeze(-1),
            axis=-1,
            reduce="add",
        )
        if ctx.entropy_grad:
            # d H / d z = -p (log p + H)
            log_probs, entropy = saved[2], saved[3]
            grad = grad - grad_entropy.unsqueeze(-1) * probs * (log_probs + entropy.unsqueeze(-1))
        if ctx.temperature != 1.0:
            grad = grad / ctx.temperature
        return grad.astype(ctx.input_dtype), None


def token_logprobs_and_entropy(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, entropy_grad: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy of each distribution ``softmax(logits / temperature)``.

    Args:
        logits: ``[..., V]``, any floating dtype.
        labels: ``[...]`` int64, each in ``[0, V)``.
        temperature: the sampling temperature; the same one belongs into old, new and reference log-probs.
        entropy_grad: whether the entropy is to be differentiated (keeps one more ``[..., V]`` tensor).

    Returns:
        ``(logprobs, entropy)``, both ``[...]`` float32 (float64 for float64 logits), in nats. Without ``entropy_grad``
        the entropy carries no gradient.
    """
    shape, vocab = labels.shape, logits.shape[-1]
    logprobs, entropy = _TokenLogProbs.apply(
        logits.reshape([-1, vocab]), labels.reshape([-1]), float(temperature), True, entropy_grad
    )
    if not entropy_grad:
        entropy = entropy.detach()
    return logprobs.reshape(shape), entropy.reshape(shape)


def token_logprobs(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each label under ``softmax(logits / temperature)``.

    Args:
        logits: ``[..., V]``, any floating dtype.
        labels: ``[...]`` int64, each in ``[0, V)``.
        temperature: the sampling temperature.

    Returns:
        ``[...]`` float32 (float64 for float64 logits), exact far below -64, differentiable in the logits.
    """
    shape, vocab = labels.shape, logits.shape[-1]
    logprobs, _ = _TokenLogProbs.apply(
        logits.reshape([-1, vocab]), labels.reshape([-1]), float(temperature), False, False
    )
    return logprobs.reshape(shape)
