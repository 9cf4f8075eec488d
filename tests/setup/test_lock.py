"""The lock is complete, has hashes, and names no registry."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENTRY = re.compile(
    r"^(?P<requirement>[^\s#-][^\\]*?)\s*(?P<hashes>(?:\\\n\s+--hash=sha256:[0-9a-f]{64}\s*)+)", re.MULTILINE
)


def locked(file: Path) -> dict[str, list[Requirement]]:
    """The requirements of a lock file by name (several where versions of Python differ)."""
    found: dict[str, list[Requirement]] = {}
    for match in ENTRY.finditer(file.read_text()):
        requirement = Requirement(match["requirement"])
        found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def names_in(file: Path) -> set[str]:
    lines = (line.split("#")[0].strip() for line in file.read_text().splitlines())
    return {canonicalize_name(Requirement(line).name) for line in lines if line}


@pytest.fixture(scope="module")
def project(repo: Path) -> dict:
    return tomllib.loads((repo / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("name", ["build.txt", "lock.txt"])
def test_every_line_is_pinned_with_hashes(repo: Path, name: str) -> None:
    text = (repo / "requirements" / name).read_text()
    entries = locked(repo / "requirements" / name)
    assert ENTRY.sub("", text).strip() == ""  # nothing besides pinned requirements with their hashes
    for requirements in entries.values():
        for requirement in requirements:
            assert [spec.operator for spec in requirement.specifier] == ["=="], str(requirement)


@pytest.mark.parametrize("name", ["build.txt", "lock.txt"])
def test_no_registry_is_named(repo: Path, name: str) -> None:
    text = (repo / "requirements" / name).read_text()
    assert "://" not in text
    assert "index-url" not in text
    assert "find-links" not in text


def test_the_projects_dependencies_are_locked_within_their_ranges(repo: Path, project: dict) -> None:
    lock = locked(repo / "requirements/lock.txt")
    extras = project["optional-dependencies"]
    assert set(extras) == {"cpu", "gpu", "dev", "bench"}
    for text in [*project["dependencies"], *extras["cpu"], *extras["dev"]]:
        wanted = Requirement(text)
        assert canonicalize_name(wanted.name) in lock, text
        for pinned in lock[canonicalize_name(wanted.name)]:
            version = next(iter(pinned.specifier)).version
            assert wanted.specifier.contains(version, prereleases=True), f"{text}: the lock has {version}"


def test_the_inputs_of_the_lock_say_what_pyproject_says(repo: Path, project: dict) -> None:
    folder = repo / "requirements"
    runtime = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    overridden = names_in(folder / "overrides.txt")
    assert names_in(folder / "base.in") - overridden == runtime | {"paddlepaddle"}
    assert names_in(folder / "dev.in") == {
        canonicalize_name(Requirement(text).name) for text in project["optional-dependencies"]["dev"]
    }


def test_the_peers_of_the_benchmarks_are_pinned_within_their_ranges(repo: Path, project: dict) -> None:
    text = (repo / "requirements/bench.txt").read_text()
    assert "://" not in text and "index-url" not in text
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    pinned = {canonicalize_name(r.name): r for r in map(Requirement, filter(None, lines))}
    wanted = [Requirement(text) for text in project["optional-dependencies"]["bench"]]
    assert set(pinned) == {canonicalize_name(requirement.name) for requirement in wanted}
    for requirement in wanted:
        (exact,) = pinned[canonicalize_name(requirement.name)].specifier
        assert exact.operator == "=="
        assert requirement.specifier.contains(exact.version)


def test_what_locked_packages_need_is_locked_too(repo: Path) -> None:
    lock = locked(repo / "requirements/lock.txt")
    overridden = names_in(repo / "requirements/overrides.txt")
    checked = set()
    for name, requirements in lock.items():
        if not any(r.marker is None or r.marker.evaluate() for r in requirements):
            continue
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        checked.add(name)
        for text in needs:
            need = Requirement(text)
            if need.marker is not None and not need.marker.evaluate({"extra": ""}):
                continue
            needed = canonicalize_name(need.name)
            if needed in overridden:
                continue
            assert needed in lock, f"{name} needs {text}, which is not in the lock"
    assert {"paddlepaddle", "paddlenlp", "visualdl", "pytest"} <= checked


def test_build_tools_are_the_same_in_both_locks(repo: Path) -> None:
    build, lock = (locked(repo / "requirements" / name) for name in ("build.txt", "lock.txt"))
    assert {"pip", "setuptools", "wheel"} <= set(build)
    for name, requirements in build.items():
        assert {str(r.specifier) for r in lock[name]} == {str(r.specifier) for r in requirements}
