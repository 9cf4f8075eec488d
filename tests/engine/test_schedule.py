"""Learning rates against their closed forms."""

from __future__ import annotations

import math

import pytest

from alignment.engine.schedule import learning_rate_at, warmup_length
from alignment.errors import ArgumentsError

PEAK, TOTAL, WARMUP, FLOOR = 2e-3, 100, 10, 1e-4


def rates(schedule: str, steps: int = TOTAL, **extra: float) -> list[float]:
    settings = {"peak": PEAK, "total_steps": TOTAL, "warmup_steps": WARMUP, **extra}
    return [learning_rate_at(step, schedule=schedule, **settings) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial", "constant_with_warmup"])
def test_warmup_rises_from_above_zero_to_the_peak(schedule: str) -> None:
    values = rates(schedule)
    assert values[:WARMUP] == pytest.approx([PEAK * (k + 1) / (WARMUP + 1) for k in range(WARMUP)])
    assert values[0] > 0
    assert values[WARMUP] == PEAK == max(values)


def test_linear() -> None:
    assert rates("linear")[WARMUP:] == pytest.approx([PEAK * (1 - k / 90) for k in range(90)])
    floored = rates("linear", steps=120, min_learning_rate=FLOOR)
    assert floored[55] == pytest.approx(FLOOR + (PEAK - FLOOR) / 2)
    assert floored[100:] == [FLOOR] * 20


def test_cosine() -> None:
    expected = [FLOOR + (PEAK - FLOOR) * (1 + math.cos(math.pi * k / 90)) / 2 for k in range(90)]
    assert rates("cosine", min_learning_rate=FLOOR)[WARMUP:] == pytest.approx(expected)


def test_polynomial_ends_at_1e_7_like_the_reference() -> None:
    assert rates("polynomial", steps=101)[100] == pytest.approx(1e-7)
    assert rates("polynomial", steps=101, min_learning_rate=0.0)[100] == 0.0


def test_constant_ignores_the_warmup() -> None:
    assert set(rates("constant")) == {PEAK}
    assert set(rates("constant_with_warmup")[WARMUP:]) == {PEAK}


def test_decay_steps_ends_the_decay_early() -> None:
    values = rates("linear", decay_steps=50, min_learning_rate=FLOOR)
    assert values[30] == pytest.approx(FLOOR + (PEAK - FLOOR) / 2)
    assert values[50:] == [FLOOR] * 50


def test_steps_win_over_ratio() -> None:
    assert warmup_length(7, 0.5, 100) == 7
    assert warmup_length(0, 0.03, 100) == 3
    assert warmup_length(0, 0.001, 100) == 1
    assert warmup_length(0, 0.0, 100) == 0


def test_unknown_schedule_names_the_nearest() -> None:
    with pytest.raises(ArgumentsError, match="did you mean 'cosine'"):
        learning_rate_at(0, schedule="cosin", peak=1.0, total_steps=1)
