"""Learning rates as pure functions of the number of optimizer steps already taken: nothing to save but that number.

During warm-up the rate rises as ``(step + 1) / (warmup + 1)``: the reference (and Hugging Face) use ``step / warmup``,
whose first step has rate zero and trains nothing. From the end of the warm-up on, the curves are theirs.
"""

from __future__ import annotations

import math

from alignment.errors import ArgumentsError, nearest

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial")
POLYNOMIAL_POWER = 1.0
POLYNOMIAL_END = 1e-7  # paddlenlp's lr_end, where min_learning_rate is not given


def warmup_length(warmup_steps: int, warmup_ratio: float, total_steps: int) -> int:
    """Number of warm-up steps: ``warmup_steps`` where it is positive, else ``ceil(warmup_ratio * total_steps)``."""
    return warmup_steps if warmup_steps > 0 else math.ceil(warmup_ratio * total_steps)


def learning_rate_at(
    step: int,
    *,
    schedule: str,
    peak: float,
    total_steps: int,
    warmup_steps: int = 0,
    warmup_ratio: float = 0.0,
    min_learning_rate: float | None = None,
    decay_steps: int = 0,
) -> float:
    """Learning rate of optimizer step ``step`` (0-based: the number of steps already taken).

    Args:
        step: optimizer steps already taken.
        schedule: one of :data:`SCHEDULES`. ``constant`` has no warm-up.
        peak: the learning rate at the end of the warm-up.
        total_steps: optimizer steps of the whole run.
        warmup_steps: wins over ``warmup_ratio`` where positive.
        warmup_ratio: share of ``total_steps`` that is warm-up.
        min_learning_rate: the rate at the end of the decay and after it; default 0 (1e-7 for ``polynomial``).
        decay_steps: step at which the decay ends, warm-up included; 0 means ``total_steps``.

    Returns:
        linear: ``min + (peak - min) (1 - p)``; cosine: ``min + (peak - min) (1 + cos(pi p)) / 2``;
        polynomial: ``min + (peak - min) (1 - p)^power``, with ``p = (step - warmup) / (end - warmup)`` clipped
        to [0, 1].

    Raises:
        ArgumentsError: for an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ArgumentsError(
            f"lr_scheduler_type={schedule!r} is not known{nearest(schedule, SCHEDULES)}; "
            f"use one of {', '.join(SCHEDULES)}"
        )
    if schedule == "constant":
        return peak
    warmup = warmup_length(warmup_steps, warmup_ratio, total_steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant_with_warmup":
        return peak
    end = decay_steps if decay_steps > 0 else total_steps
    progress = min(1.0, max(0.0, (step - warmup) / max(1, end - warmup)))
    floor = min_learning_rate
    if floor is None:
        floor = min(POLYNOMIAL_END, peak) if schedule == "polynomial" else 0.0
    if schedule == "cosine":
        return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
    power = POLYNOMIAL_POWER if schedule == "polynomial" else 1.0
    return floor + (peak - floor) * (1.0 - progress) ** power
