"""Losses of preference pairs as pure functions: one value per pair, so that the caller can divide by a global count.

All hold the Bradley-Terry likelihood ``-log sigmoid(s_chosen - s_rejected)`` (Ouyang et al. 2022, arXiv:2203.02155, eq.
1) with the squared-score regularisation of Safe RLHF (Dai et al. 2023, arXiv:2310.12773, appendix); those of a cost
model add the two signs. Mean over pairs of a value here is the loss that papers state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from alignment.runtime import lazy

if TYPE_CHECKING:
    from paddle import Tensor

paddle = lazy("paddle")


def sequence_losses(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float | None = None, regularization: float = 0.0
) -> Tensor:
    """``-log sigmoid(chosen - rejected - margin) + regularization * (chosen^2 + rejected^2)``.

    Args:
        chosen: ``[pairs]`` float, score at the last real token of the better reply.
        rejected: ``[pairs]`` float, the same of the worse reply.
        margin: ``[pairs]`` or a number that the difference must exceed (Touvron et al. 2023, arXiv:2307.09288, eq. 2);
            None is 0.
        regularization: weight of the squared scores.

    Returns:
        ``[pairs]``, of the scores' dtype.
    """
    difference = chosen - rejected
    if margin is not None:
        difference = difference - margin
    loss = -paddle.nn.functional.log_sigmoid(difference)
    if regularization:
        loss = loss + regularization * (chosen.square() + rejected.square())
    return loss


def cost_losses(
    safer: Tensor, unsafer: Tensor, safer_sign: Tensor, unsafer_sign: Tensor, regularization: float = 0.0
) -> Tensor:
    """``-log sigmoid(unsafer - safer) - log sigmoid(safer_sign * safer) - log sigmoid(unsafer_sign * unsafer) +
    regularization * (safer^2 + unsafer^2)``: the loss of a cost model (Dai et al. 2023, arXiv:2310.12773, section 3.2).

    The first term orders the costs, the other two say on which side of zero each belongs: without them zero means
    nothing, and a limit on the mean cost could not be set.

    Args:
        safer: ``[pairs, ...]`` float, cost of the safer reply.
        unsafer: ``[pairs, ...]`` float, cost of the other.
        safer_sign, unsafer_sign: broadcast to the costs, of their dtype; +1 for a reply that is unsafe, -1 for one that
            is safe (both replies may be either).
        regularization: weight of the squared costs.

    Returns:
        The shape and dtype of the costs.
    """
    log_sigmoid = paddle.nn.functional.log_sigmoid
    signs = log_sigmoid(safer_sign * safer) + log_sigmoid(unsafer_sign * unsafer)
    return sequence_losses(unsafer, safer, regularization=regularization) - signs


def token_losses(
    scores: Tensor,
    lengths: np.ndarray,
    first_difference: np.ndarray,
    regularization: float = 0.0,
    signs: Tensor | None = None,
) -> Tensor:
    """The token-wise loss: the mean of the sequence-wise one over all positions from the first differing token to the
    longer reply's end.

    Behind its own end a reply keeps the score of its last real token. (The reference reads the scores of pad tokens
    there, which depend on what the pad token happens to be; where both replies are equally long the two are the same.)

    Args:
        scores: ``[2 * pairs, seq]`` float, scores at every token, the better replies' rows first.
        lengths: ``[2 * pairs]`` number of real tokens of each row.
        first_difference: ``[pairs]`` first position at which the two rows of a pair differ.
        regularization: weight of the mean squared scores.
        signs: ``[2 * pairs]``, of the scores' dtype: the scores are costs, the safer replies' rows first, and the mean
            is one of :func:`cost_losses`; None: of :func:`sequence_losses`.

    Returns:
        ``[pairs]``, of the scores' dtype.
    """
    pairs, width = scores.shape[0] // 2, scores.shape[1]
    positions = np.arange(width)[None, :]
    held = np.minimum(positions, np.asarray(lengths)[:, None] - 1).astype(np.int64)
    scores = paddle.take_along_axis(scores, paddle.to_tensor(held), axis=1)
    last = np.maximum(lengths[:pairs], lengths[pairs:])[:, None] - 1
    span = (positions >= np.minimum(np.asarray(first_difference)[:, None], last)) & (positions <= last)
    weight = paddle.to_tensor((span / span.sum(axis=1, keepdims=True)).astype(np.float64)).astype(scores.dtype)
    each = pair_losses(scores, regularization, None if signs is None else signs.unsqueeze(1))
    return (each * weight).sum(axis=1)


def pair_losses(scores: Tensor, regularization: float = 0.0, signs: Tensor | None = None) -> Tensor:
    """:func:`sequence_losses` of the halves of ``[2 * pairs, ...]`` scores, the better replies first; with ``signs``
    :func:`cost_losses`, the safer replies first.
    """
    pairs = scores.shape[0] // 2
    if signs is None:
        return sequence_losses(scores[:pairs], scores[pairs:], regularization=regularization)
    return cost_losses(scores[:pairs], scores[pairs:], signs[:pairs], signs[pairs:], regularization)


def first_differences(input_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """First position at which the two rows of each pair differ.

    Args:
        input_ids: ``[2 * pairs, seq]`` int, right-padded, the better replies' rows first.
        lengths: ``[2 * pairs]`` number of real tokens.

    Returns:
        ``[pairs]`` int64. Where one row is the beginning of the other: the shorter one's length; where both are equal:
            their last position.
    """
    pairs = len(lengths) // 2
    better, worse = input_ids[:pairs], input_ids[pairs:]
    shorter = np.minimum(lengths[:pairs], lengths[pairs:])[:, None]
    longer = np.maximum(lengths[:pairs], lengths[pairs:])
    # Behind the shorter reply's end everything differs, whatever the pad token is.
    differs = (better != worse) | (np.arange(input_ids.shape[1])[None, :] >= shorter)
    found = np.where(differs.any(axis=1), differs.argmax(axis=1), longer - 1)
    return np.minimum(found, longer - 1).astype(np.int64)
