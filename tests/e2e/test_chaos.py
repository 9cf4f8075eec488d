"""A run that is killed and resumed again and again ends with the same bits; `make chaos` does it thirty times with PPO
on each layout and ten times with every other method.
"""

from __future__ import annotations

import pytest

from tests.e2e import chaos


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "layout", "kills"), [("ppo", "1 process", 4), ("ppo", "TP2 x PP2", 3), ("grpo", "1 process", 3)]
)
def test_killed_runs_end_like_uninterrupted_ones(method: str, layout: str, kills: int) -> None:
    tally = chaos.torment(method, layout, kills, epochs=2)
    assert tally.differing == []
    assert tally.phases.total() == kills
    assert tally.rows >= 12 and tally.runs >= 1


def test_every_phase_is_a_function_of_the_loop() -> None:
    """A phase is known by its function's name: renamed, no kill would ever hit it."""
    from alignment.flow.flow import Flow
    from alignment.flow.loop import Loop
    from alignment.flow.online import OnlineMethod
    from tests.e2e.chaos_job import PHASES

    classes = {"online.py": OnlineMethod, "flow.py": Flow, "loop.py": Loop}
    assert [name for file, name in PHASES if not hasattr(classes[file], name)] == []
    assert set(chaos.PHASES) | {"finish"} == set(PHASES.values()) == set(chaos.LONGEST)
