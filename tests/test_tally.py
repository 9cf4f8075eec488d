"""Progress of long passes."""

from __future__ import annotations

import pytest

from alignment import tally
from alignment.tally import Tally


def test_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Without a bar a line comes every half minute, with rate and remaining time; a short pass says nothing."""
    now = [100.0]
    monkeypatch.setattr(tally.time, "monotonic", lambda: now[0])
    with Tally("evaluation", 100, bar=False) as shown:
        now[0] += 10
        shown.add(10)
        assert not capsys.readouterr().err
        now[0] += 40
        shown.add(15)
    said = capsys.readouterr().err
    assert said.endswith("evaluation: 25 of 100 rows, 0.5 rows/s, 02:30 left\n") and said.count("\n") == 1


def test_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    with Tally("scoring", 4) as shown:  # into a file: a bar there is a line for each time that it moves
        shown.add(4)
    assert not capsys.readouterr().err
    monkeypatch.setattr(tally.sys.stderr, "isatty", lambda: True)
    with Tally("scoring", 4) as shown:
        shown.add(4)
    assert "scoring" in capsys.readouterr().err
    with Tally("scoring", 4, active=False) as shown:
        shown.add(4)
    assert not capsys.readouterr().err
