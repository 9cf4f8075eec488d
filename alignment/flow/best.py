"""Which evaluation is the best one so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from alignment.errors import ArgumentsError, nearest


def best_metric(args: Any, metrics: Mapping[str, float]) -> tuple[str, float]:
    """Name and value of ``metric_for_best_model`` ("accuracy", "eval_accuracy" and "eval/accuracy" mean the same).

    Args:
        args: has ``metric_for_best_model``.
        metrics: an evaluation's, names without prefix.

    Raises:
        ArgumentsError: the stage has no such metric.
    """
    wanted = args.metric_for_best_model
    name = wanted.removeprefix("eval_").removeprefix("eval/")
    if name not in metrics:
        raise ArgumentsError(
            f"metric_for_best_model={wanted!r}: no such metric (there are {', '.join(metrics)}){nearest(name, metrics)}"
        )
    return name, metrics[name]


def is_better(args: Any, value: float, best: float | None) -> bool:
    """Whether ``value`` beats ``best`` (anything finite beats ``None``) in the direction of ``greater_is_better``."""
    return math.isfinite(value) and (best is None or (value > best if args.greater_is_better else value < best))
