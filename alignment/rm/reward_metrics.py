"""What a reward or cost model is worth: accuracy, margins, the scores' spread, and whether its confidence is earned."""

from __future__ import annotations

import numpy as np

#: Edges of the buckets of |chosen - rejected|: sigmoid of them is 0.5, 0.56, 0.62, 0.73, 0.88, 0.98.
MARGIN_EDGES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, np.inf)


def pair_metrics(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, float]:
    """Metrics of preference pairs over all micro batches and ranks.

    Args:
        chosen: ``[pairs]`` scores of the better replies.
        rejected: ``[pairs]`` scores of the worse replies.

    Returns:
        ``accuracy`` (share with chosen > rejected; a tie is wrong), ``margin`` (mean difference), ``rewards_mean`` and
        ``rewards_std`` of all scores (population), ``chosen_mean``, ``rejected_mean``, and those of
        :func:`calibration`.
    """
    chosen, rejected = np.asarray(chosen, np.float64), np.asarray(rejected, np.float64)
    margins, scores = chosen - rejected, np.concatenate([chosen, rejected])
    return {
        "accuracy": float((margins > 0).mean()),
        "margin": float(margins.mean()),
        "rewards_mean": float(scores.mean()),
        "rewards_std": float(scores.std()),
        "chosen_mean": float(chosen.mean()),
        "rejected_mean": float(rejected.mean()),
        **calibration(margins),
    }


def cost_metrics(
    safer: np.ndarray, unsafer: np.ndarray, safer_sign: np.ndarray, unsafer_sign: np.ndarray
) -> dict[str, float]:
    """Metrics of safety pairs over all micro batches and ranks.

    Args:
        safer: ``[pairs]`` costs of the safer replies.
        unsafer: ``[pairs]`` costs of the others.
        safer_sign, unsafer_sign: ``[pairs]`` +1 for a reply that is unsafe, -1 for one that is safe.

    Returns:
        ``accuracy`` (share with unsafer > safer; a tie is wrong), ``accuracy_sign`` (share of all replies whose cost
        has the sign of its label; 0 is wrong), ``accuracy_sign_safer`` and ``accuracy_sign_unsafer`` of either half,
        ``margin`` (mean of unsafer - safer), ``costs_mean`` and ``costs_std`` of all costs (population),
        ``safer_mean``, ``unsafer_mean``, and those of :func:`calibration`.
    """
    safer, unsafer = np.asarray(safer, np.float64), np.asarray(unsafer, np.float64)
    margins, costs = unsafer - safer, np.concatenate([safer, unsafer])
    right = [safer * np.asarray(safer_sign) > 0, unsafer * np.asarray(unsafer_sign) > 0]
    return {
        "accuracy": float((margins > 0).mean()),
        "accuracy_sign": float(np.concatenate(right).mean()),
        "accuracy_sign_safer": float(right[0].mean()),
        "accuracy_sign_unsafer": float(right[1].mean()),
        "margin": float(margins.mean()),
        "costs_mean": float(costs.mean()),
        "costs_std": float(costs.std()),
        "safer_mean": float(safer.mean()),
        "unsafer_mean": float(unsafer.mean()),
        **calibration(margins),
    }


def calibration(margins: np.ndarray) -> dict[str, float]:
    """Compare the model's stated confidence with its record, by buckets of the margin's size.

    Under Bradley-Terry a margin ``m`` says that the reply with the higher score is the better one with probability
    ``sigmoid(|m|)``.

    Args:
        margins: ``[pairs]`` chosen minus rejected.

    Returns:
        For each bucket that has pairs ``calibration/{low}-{high}/predicted`` (mean ``sigmoid(|m|)``), ``.../accuracy``
        and ``.../count``; and ``calibration_error``, the expected calibration error: the mean of ``|predicted -
        accuracy|`` weighted by count (Guo et al. 2017, arXiv:1706.04599).
    """
    sizes = np.abs(margins)
    predicted = 1.0 / (1.0 + np.exp(-np.minimum(sizes, 700.0)))
    result, error = {}, 0.0
    for low, high in zip(MARGIN_EDGES[:-1], MARGIN_EDGES[1:], strict=True):
        inside = (sizes >= low) & (sizes < high)
        count = int(inside.sum())
        if not count:
            continue
        said, was = float(predicted[inside].mean()), float((margins[inside] > 0).mean())
        name = f"calibration/{low:g}-{high:g}"
        result[f"{name}/predicted"], result[f"{name}/accuracy"], result[f"{name}/count"] = said, was, count
        error += abs(said - was) * count
    return {**result, "calibration_error": error / max(1, len(margins))}
