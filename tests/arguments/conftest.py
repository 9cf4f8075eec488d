"""Fixtures of the arguments' tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from alignment import log


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """``(level, message)`` of all that the package logs during a test, in which nothing has been said before."""
    lines: list[tuple[str, str]] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append((record.levelname, record.getMessage()))

    monkeypatch.setattr(log, "_SAID", set())
    handler = Collect()
    log.get_logger().addHandler(handler)
    try:
        yield lines
    finally:
        log.get_logger().removeHandler(handler)
