"""Every method finds the best arm of a bandit; `make learning` does it with three seeds, and the demo's task."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.learning import COST_LIMIT, SETTINGS, bandit
from tests.small_methods import METHODS


@pytest.mark.parametrize("method", METHODS)
def test_the_best_arm_is_found(method: str, tmp_path: Path) -> None:
    """Band: 80 % of the best mean reward after 20 rollouts, from about 10 %."""
    found = bandit(method, 1, tmp_path, num_train_epochs=20)
    assert found["first"] < 0.2
    assert found["last"] > 0.8 * SETTINGS[method].optimum, found
    assert found.get("cost", 0.0) <= COST_LIMIT + 0.05
