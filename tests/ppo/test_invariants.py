"""What sampled the answers is what learns from them, within rounding."""

from __future__ import annotations

import math

import pytest

from alignment.errors import InvariantError
from alignment.ppo.invariants import check_rollout_gap


@pytest.mark.parametrize(
    ("gap", "dtype", "temperature"), [(9e-4, "float32", 1.0), (4e-3, "float32", 0.2), (0.9, "bfloat16", 1.5)]
)
def test_rounding_passes(gap: float, dtype: str, temperature: float) -> None:
    check_rollout_gap(gap, dtype, temperature)


@pytest.mark.parametrize(
    ("gap", "dtype", "temperature"),
    [(1.1e-3, "float32", 1.0), (1.1e-3, "float32", 2.0), (6e-3, "float32", 0.2), (1.1, "bfloat16", 1.0)],
)
def test_another_policy_does_not(gap: float, dtype: str, temperature: float) -> None:
    with pytest.raises(InvariantError, match="the answers were not sampled from the policy that is trained"):
        check_rollout_gap(gap, dtype, temperature)


def test_no_number_does_not_pass() -> None:
    with pytest.raises(InvariantError, match="by up to nan nats"):
        check_rollout_gap(math.nan, "float32", 1.0)
