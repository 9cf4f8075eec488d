"""What is done to scores because of an answer's length (NumPy; no gradient)."""

from __future__ import annotations

import numpy as np


def overlong_penalty(lengths: np.ndarray, longest: int, buffer: int, factor: float = 1.0) -> np.ndarray:
    """``-factor * clip((length - (longest - buffer)) / buffer, 0, 1)``, to be added to the scores.

    Source: DAPO (Yu et al. 2025), eq. 13, "soft overlong punishment"; capped at ``-factor`` beyond the limit (TRL,
    OpenRLHF).

    Args:
        lengths: ``[B]`` tokens of each answer.
        longest: the limit on new tokens.
        buffer: over how many tokens in front of it the penalty grows.
        factor: the penalty at the limit.

    Returns:
        ``[B]`` float64, from ``-factor`` to 0.

    Raises:
        ValueError: the buffer is not within 1 and ``longest``.
    """
    if not 0 < buffer <= longest:
        raise ValueError(f"the overlong buffer has {buffer} tokens; it must have 1 to {longest}, the longest answer's")
    beyond = (np.asarray(lengths, np.float64) - (longest - buffer)) / buffer
    return 0.0 - factor * beyond.clip(0.0, 1.0)


def overlong_filter(mask: np.ndarray, finished: np.ndarray) -> np.ndarray:
    """The mask for the loss in which answers that the length limit cut have no token (DAPO, section 3.4).

    Their scores stay in the means of their groups: the mask goes into the loss, and its lengths into
    :func:`~alignment.losses.aggregation.row_weights`, not into the advantages.

    Args:
        mask: ``[B, R]``.
        finished: ``[B]`` bool, whether the answer ended by itself.

    Returns:
        ``[B, R]`` in the dtype of ``mask``.
    """
    return mask * np.asarray(finished, bool)[:, None].astype(mask.dtype)
