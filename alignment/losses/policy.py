"""PPO's losses on Paddle tensors.

Each returns a loss that is already divided by ``denominator``, the count of the WHOLE optimizer step (all micro
batches, all data ranks), so that summing the micro batches' losses gives the step's loss, whatever its split. Without a
denominator the count of the given batch is used. Statistics are sums over the mask, for the same reason.
"""

from __future__ import annotations

from dataclasses import dataclass

import paddle
from paddle import Tensor

LOSS_MEANS = ("token", "sequence")

# Log-ratios are cut to +-20, as in verl: exp() of more than 88 is infinite in float32, and then the gradient of the
# clipped loss is 0 * inf. A ratio of e^20 is far beyond every clip, so nothing else changes.
LARGEST_LOG_RATIO = 20.0


@dataclass(frozen=True)
class PolicyLoss:
    """What :func:`policy_loss` returns: scalars; all but ``loss`` are sums over the mask without gradient.

    Attributes:
        loss: to be minimised, divided by the denominator.
        clip_fraction: tokens whose clipped term was the larger one.
        approx_kl: ``0.5 (log ratio)^2``, the second-order estimate of KL(old || new).
        ratio: importance ratios.
        max_ratio_error: the largest ``|ratio - 1|`` (a maximum, not a sum).
        max_ratio: the largest ratio (a maximum, not a sum).
    """

    loss: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor
    ratio: Tensor
    max_ratio_error: Tensor
    max_ratio: Tensor


def aggregate(losses: Tensor, mask: Tensor, mean: str = "token", denominator: float | None = None) -> Tensor:
    """Reduce per-token losses to one scalar.

    Args:
        losses: ``[B, R]``.
        mask: ``[B, R]``.
        mean: ``"token"``, the sum over tokens by the count of tokens (TRL, trlX, DeepSpeed-Chat, verl's default), or
            ``"sequence"``, each answer's own mean first, then the mean over answers (safe-rlhf, OpenRLHF's sample
            mode).
        denominator: tokens (or answers, for ``"sequence"``) of the whole optimizer step; ``None`` counts this batch.
            For ``"sequence"`` only answers with at least one token count.

    Returns:
        A scalar.

    Raises:
        ValueError: ``mean`` is unknown.
    """
    mask = mask.astype(losses.dtype)
    if mean == "token":
        total = (losses * mask).sum()
        count = mask.sum() if denominator is None else denominator
    elif mean == "sequence":
        lengths = mask.sum(axis=-1)
        total = ((losses * mask).sum(axis=-1) / lengths.clip(min=1.0)).sum()
        count = (lengths > 0).astype(losses.dtype).sum() if denominator is None else denominator
    else:
        raise ValueError(f"unknown loss mean {mean!r}; known: {', '.join(LOSS_MEANS)}")
    return total / count


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range_low: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    mean: str = "token",
    denominator: float | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate: ``max(-A rho, -A clip(rho, 1 - low, 1 + high))`` with
    ``rho = exp(logprobs - old_logprobs)``.

    Source: Schulman et al. 2017, eq. 7. A different upper range is DAPO's clip-higher (Yu et al. 2025). ``dual_clip``
    (c > 1) bounds the loss of negative advantages by ``-c A`` (Ye et al. 2020, eq. 5).

    Args:
        logprobs: ``[B, R]`` of the network in training, differentiable.
        old_logprobs: ``[B, R]`` of the same network before the update.
        advantages: ``[B, R]``.
        mask: ``[B, R]``.
        clip_range_low: epsilon below 1.
        clip_range_high: epsilon above 1; ``None`` for the same.
        dual_clip: c, or ``None`` for off.
        mean: see :func:`aggregate`.
        denominator: see :func:`aggregate`.

    Returns:
        A :class:`PolicyLoss`.
    """
    mask = mask.astype(logprobs.dtype)
    high = clip_range_low if clip_range_high is None else clip_range_high
    # Outside the mask the log-probs are whatever padding gave: 0 there keeps exp() finite and its gradient 0.
    log_ratio = ((logprobs - old_logprobs) * mask).clip(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clip(1.0 - clip_range_low, 1.0 + high)
    losses = paddle.maximum(unclipped, clipped)
    if dual_clip is not None:
        bounded = paddle.minimum(losses, -advantages * dual_clip)
        losses = paddle.where(advantages < 0, bounded, losses)
    loss = aggregate(losses, mask, mean, denominator)
    with paddle.no_grad():
        return PolicyLoss(
            loss=loss,
            clip_fraction=((clipped > unclipped).astype(mask.dtype) * mask).sum(),
            approx_kl=(0.5 * log_ratio.square()).sum(),
            ratio=(ratio * mask).sum(),
            max_ratio_error=((ratio - 1.0).abs() * mask).max(),
            max_ratio=(ratio * mask).max(),
        )


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip_range_value: float | None = None,
    mean: str = "token",
    denominator: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)``.

    Source: the PPO2 baseline's clipped value loss; field's checklist as in Huang et al. 2024.

    Args:
        values: ``[B, R]``, differentiable.
        old_values: ``[B, R]`` from before the update.
        returns: ``[B, R]``.
        mask: ``[B, R]``.
        clip_range_value: c; ``None`` for no clipping.
        mean: see :func:`aggregate`.
        denominator: see :func:`aggregate`.

    Returns:
        ``(loss, clip_count)``: a scalar to be minimised, and how many tokens' clipped term was the larger one.
    """
    mask = mask.astype(values.dtype)
    losses = (values - returns).square()
    clip_count = paddle.zeros([], dtype=values.dtype)
    if clip_range_value is not None:
        clipped = paddle.minimum(paddle.maximum(values, old_values - clip_range_value), old_values + clip_range_value)
        clipped_losses = (clipped - returns).square()
        with paddle.no_grad():
            clip_count = ((clipped_losses > losses).astype(mask.dtype) * mask).sum()
        losses = paddle.maximum(losses, clipped_losses)
    return aggregate(0.5 * losses, mask, mean, denominator), clip_count
