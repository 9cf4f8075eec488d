"""docs/findings.md: every finding names a test that exists, so that nobody undoes what was mended."""

from __future__ import annotations

import re

from tests.conftest import REPO

PAGE = REPO / "docs" / "findings.md"
TEST = re.compile(r"(tests/[\w/]+\.py)((?:::\w+)(?:,? ::\w+)*)?")


def test_every_named_test_exists() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert len(rows) > 100
    for row in rows:
        for path, names in TEST.findall(row):
            file = REPO / path
            assert file.is_file(), f"{path} of {row[:60]}"
            for name in re.findall(r"::(\w+)", names):
                assert re.search(rf"(def|class) {name}\b", file.read_text(encoding="utf-8")), f"{path}::{name}"


def test_every_finding_is_there() -> None:
    """Those that the first contact with real models, files and precision was to mend."""
    text = PAGE.read_text(encoding="utf-8")
    asked = [f"D{n}" for n in range(1, 35)] + [f"P{n}" for n in range(1, 21)] + [f"R{n}" for n in range(1, 30)]
    asked += [f"A{n}" for n in range(1, 22)] + [f"B{n}" for n in range(1, 22)] + [f"C{n}" for n in range(1, 10)]
    first = set()
    for row in text.splitlines():
        if row.startswith("| "):
            first |= set(re.findall(r"\b[A-DPR]\d+\b", row.split("|")[1]))
    assert [name for name in asked if name not in first] == []
