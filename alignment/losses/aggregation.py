"""How the losses of an optimizer step's tokens become one number (NumPy; from lengths and groups alone).

Every mode is a weight for each row and one denominator: ``loss = sum_b w_b sum_t mask_bt l_bt / denominator``. Both are
taken from ALL rows of the optimizer step (every micro batch, every data rank), so the loss is a plain sum over the
parts and does not depend on how they were cut. No mode looks at the width to which a batch happens to be padded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from alignment.errors import ArgumentsError
from alignment.named import Named


@dataclass(frozen=True)
class RowWeights:
    """What :func:`row_weights` returns.

    Attributes:
        weights: ``[B]`` float64, what each of a row's token losses is multiplied by; 0 for a row without tokens.
        denominator: what the sum is divided by, at least 1.
    """

    weights: np.ndarray
    denominator: float


Mode = Callable[[np.ndarray, "np.ndarray | None", "float | None"], RowWeights]
AGGREGATIONS: Named[Mode] = Named("loss aggregation")


def row_weights(
    mode: str, lengths: np.ndarray, groups: np.ndarray | None = None, length_constant: float | None = None
) -> RowWeights:
    """Weights and denominator of one optimizer step.

    Args:
        mode: a name of :data:`AGGREGATIONS`.
        lengths: ``[B]`` tokens of each row that are trained on (its mask's sum), of all rows of the step.
        groups: ``[B]`` int, which rows answer the same prompt; for ``"prompt"``.
        length_constant: the L of ``"constant"``, e.g. the limit on new tokens.

    Raises:
        ArgumentsError: the mode is unknown, or what it needs is missing.
    """
    return AGGREGATIONS[mode](np.asarray(lengths), groups, length_constant)


@AGGREGATIONS.register("token")
def token_mean(lengths: np.ndarray, groups: np.ndarray | None, length_constant: float | None) -> RowWeights:
    """``sum l / tokens of the step``: each token counts alike (DAPO; verl ``token-mean``, TRL ``dapo``, OpenRLHF)."""
    return RowWeights(_filled(lengths), max(1.0, float(lengths.sum())))


@AGGREGATIONS.register("sequence")
def sequence_mean(lengths: np.ndarray, groups: np.ndarray | None, length_constant: float | None) -> RowWeights:
    """``mean_b (sum_t l / T_b)`` over rows with tokens: each answer counts alike (GRPO, Shao et al. 2024; TRL ``grpo``,
    verl ``seq-mean-token-mean``).
    """
    filled = _filled(lengths)
    return RowWeights(filled / np.maximum(lengths, 1), max(1.0, float(filled.sum())))


@AGGREGATIONS.register("sequence_sum")
def sequence_sum(lengths: np.ndarray, groups: np.ndarray | None, length_constant: float | None) -> RowWeights:
    """``mean_b sum_t l`` over rows with tokens (verl ``seq-mean-token-sum``; LUSPO)."""
    filled = _filled(lengths)
    return RowWeights(filled, max(1.0, float(filled.sum())))


@AGGREGATIONS.register("constant")
def constant_length(lengths: np.ndarray, groups: np.ndarray | None, length_constant: float | None) -> RowWeights:
    """``sum l / (B L)`` with a constant L and all rows of the step (Dr.GRPO, Liu et al. 2025; TRL ``dr_grpo``)."""
    if length_constant is None or length_constant <= 0:
        raise ArgumentsError(
            f'the loss aggregation "constant" divides by a fixed length, e.g. the limit on new tokens; it is given '
            f"{length_constant!r}"
        )
    return RowWeights(_filled(lengths), max(1.0, float(len(lengths)) * float(length_constant)))


@AGGREGATIONS.register("prompt")
def prompt_mean(lengths: np.ndarray, groups: np.ndarray | None, length_constant: float | None) -> RowWeights:
    """``mean over prompts of (sum over their answers' tokens l / tokens of these answers)`` (SkyRL ``prompt_mean``)."""
    if groups is None:
        raise ArgumentsError('the loss aggregation "prompt" needs to know which answers belong to the same prompt')
    _, inverse = np.unique(np.asarray(groups), return_inverse=True)
    tokens = np.bincount(inverse, weights=lengths)
    return RowWeights(_filled(lengths) / np.maximum(tokens[inverse], 1.0), max(1.0, float((tokens > 0).sum())))


def _filled(lengths: np.ndarray) -> np.ndarray:
    return (np.asarray(lengths) > 0).astype(np.float64)
