"""What must hold in a sound run, and what happens where it does not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from alignment import runtime
from alignment.errors import InvariantError
from alignment.flow.invariants import (
    BOUNDS,
    GROSS,
    Guard,
    check_first_pass,
    check_later_pass,
    check_rollout_gap,
    precision_of,
)

SOUND = [
    # rl 5: an outlier among 3,000 tokens says nothing, in any iteration
    ("float32", 1.0, [1e-5] * 3000 + [4e-3]),
    ("float32", 0.2, [4e-4] * 100),
    ("bfloat16", 1.0, [0.06] * 3000 + [24.0]),
    ("tf32", 1.0, [5e-3] * 100),
]
WRONG = [
    ("float32", 1.0, [2e-4] * 100),
    ("float32", 2.0, [2e-4] * 100),  # a higher temperature does not excuse it
    ("float32", 1.0, [0.0] * 95 + [2e-3] * 5),  # the mean is small, but too many tokens are off
    ("float32", 1.0, [0.0] * 1000 + [math.nan]),  # rl 23
    ("bfloat16", 1.0, [0.2] * 100),
]


@pytest.mark.parametrize(("precision", "temperature", "errors"), SOUND)
def test_rounding_passes(precision: str, temperature: float, errors: list[float]) -> None:
    check_rollout_gap(np.array(errors), precision, temperature, Guard(), first=True)


@pytest.mark.parametrize(("precision", "temperature", "errors"), WRONG)
def test_another_policy_does_not(precision: str, temperature: float, errors: list[float]) -> None:
    with pytest.raises(InvariantError, match="the answers were not sampled from the policy that is trained"):
        check_rollout_gap(np.array(errors), precision, temperature, Guard(), first=True)


def test_a_later_iteration_warns_once_unless_the_error_is_gross(capsys: pytest.CaptureFixture[str]) -> None:
    """rl 5: one bad rollout must not end a week's run; another policy must."""
    guard = Guard()
    for _ in range(2):
        check_rollout_gap(np.full(9, 2e-4), "float32", 1.0, guard, first=False)
        check_later_pass(1e-4, "float32", 1.0, guard)
    assert capsys.readouterr().err.count("(said once)") == 2
    for gross in (2 * GROSS, math.nan):
        with pytest.raises(InvariantError):
            check_rollout_gap(np.full(9, gross), "float32", 1.0, guard, first=False)
        with pytest.raises(InvariantError):
            check_later_pass(gross, "float32", 1.0, guard)


def test_modes(capsys: pytest.CaptureFixture[str]) -> None:
    for mode, said in (("warn", 1), ("off", 0)):
        guard = Guard(mode)
        for _ in range(3):
            check_rollout_gap(np.full(9, 9.0), "float32", 1.0, guard, first=True)
        assert capsys.readouterr().err.count("the answers were not sampled") == said
    with pytest.raises(ValueError, match="known: strict, warn, off"):
        Guard("loud")


def test_first_pass_bounds() -> None:
    guard = Guard()
    check_first_pass(np.array([1e-5] * 500 + [5e-3]), "float32", 1.0, guard)
    check_first_pass(np.array([0.05] * 500 + [0.7]), "bfloat16", 1.0, guard)
    for wrong in ([1e-2] * 50, [0.0] * 50 + [math.nan], [200.0] * 50):
        with pytest.raises(InvariantError, match="dropout"):
            check_first_pass(np.array(wrong), "float32", 1.0, guard)


def test_bounds_follow_device_and_precision() -> None:
    assert precision_of("float32", on_cpu=True, exact=False) == "float32"
    assert precision_of("float32", on_cpu=False, exact=True) == "float32"
    assert precision_of("float32", on_cpu=False, exact=False) == "tf32"
    assert precision_of("bfloat16", on_cpu=True, exact=True) == "bfloat16"
    assert set(BOUNDS) == {"float32", "tf32", "float16", "bfloat16"}


def test_products_are_exact_inside_and_as_before_behind() -> None:
    """B3: a GPU's default is TF32, 5e-4 of every product; the first iteration is judged in float32."""
    from paddle.base import core

    before = core.get_cublas_switch()
    with runtime.exact_products():
        assert not core.get_cublas_switch()
    assert core.get_cublas_switch() == before
