"""A run that is killed and resumed again and again ends with the same bits; `make chaos` does it thirty times."""

from __future__ import annotations

import pytest

from tests.e2e import chaos


@pytest.mark.slow
def test_killed_runs_end_like_uninterrupted_ones() -> None:
    assert chaos.main(["--kills", "4"]) == 0
