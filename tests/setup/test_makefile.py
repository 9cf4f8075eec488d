"""What ``make`` would do, and how it finds its Python; nothing is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = ["setup", "demo", "test", "test-slow", "test-bf16", "nightly", "golden", "lint", "format", "docs", "clean"]


def clean_environ(**more: str) -> dict[str, str]:
    """The environment without what an outer ``make`` hands down."""
    own = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "VENV", "ARGS", "PYTHON")
    return {**{k: v for k, v in os.environ.items() if k not in own}, **more}


def make(repo: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *arguments], cwd=repo, env=clean_environ(), capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def fake_environment(folder: Path) -> Path:
    """A folder that looks like a finished environment."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/python").symlink_to(sys.executable)
    for stamp in (".locked", ".ready"):
        (folder / stamp).touch()
    return folder


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_resolves_in_a_fresh_checkout(repo: Path, tmp_path: Path, target: str) -> None:
    done = make(repo, "--dry-run", target, f"VENV={tmp_path / 'venv'}")
    assert done.returncode == 0, done.stderr
    installs = "--require-hashes --no-build-isolation -r requirements/lock.txt" in done.stdout
    assert installs == (target != "clean")


def test_the_peers_get_an_environment_of_their_own(repo: Path, tmp_path: Path) -> None:
    venv, peers = fake_environment(tmp_path / "venv"), tmp_path / "peers"
    done = make(repo, "--dry-run", "bench", f"VENV={venv}", f"BENCH_VENV={peers}", "ARGS=--rounds 1")
    assert done.returncode == 0, done.stderr
    assert f"{peers}/bin/python -m pip install --quiet  -r requirements/bench.txt" in done.stdout
    assert f"{venv}/bin/python -m pip" not in done.stdout
    assert f"{venv}/bin/python benchmarks/peers/run.py --peer-python {peers}/bin/python --rounds 1" in done.stdout


def test_a_second_run_starts_at_once(repo: Path, tmp_path: Path) -> None:
    venv = fake_environment(tmp_path / "venv")
    done = make(repo, "--dry-run", "test", f"VENV={venv}", "ARGS=-k kl")
    assert done.stdout.split() == f'{venv}/bin/python -m pytest -m "not slow" -k kl'.split()


def test_a_newer_lock_makes_the_environment_again(repo: Path, tmp_path: Path) -> None:
    venv = fake_environment(tmp_path / "venv")
    os.utime(venv / ".locked", (0, 0))
    done = make(repo, "--dry-run", "setup", f"VENV={venv}")
    assert "venv --clear" in done.stdout


def test_an_environment_whose_python_is_gone_is_made_again(repo: Path, tmp_path: Path) -> None:
    venv = fake_environment(tmp_path / "venv")
    (venv / "bin/python").unlink()
    (venv / "bin/python").symlink_to(tmp_path / "gone")
    done = make(repo, "--dry-run", "setup", f"VENV={venv}")
    assert "venv --clear" in done.stdout


def find_python(repo: Path, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environ = clean_environ(**({"PATH": path} if path is not None else {}))
    script = repo / "requirements/find_python.sh"
    return subprocess.run(["/bin/sh", str(script), *arguments], env=environ, capture_output=True, text=True)


def test_a_shim_that_fails_is_passed_over(repo: Path, tmp_path: Path) -> None:
    shim = tmp_path / "python3.11"
    shim.write_text("#!/bin/sh\necho 'not installed' >&2\nexit 127\n")
    shim.chmod(0o755)
    # A wrapper and not a link, so that the interpreter still finds its own library.
    real = tmp_path / "python3.12"
    real.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    real.chmod(0o755)
    done = find_python(repo, path=str(tmp_path))
    assert (done.returncode, done.stdout.strip()) == (0, str(real)), done.stderr


def test_no_python_at_all_is_said(repo: Path, tmp_path: Path) -> None:
    done = find_python(repo, path=str(tmp_path))
    assert done.returncode == 1
    assert "No Python 3.10, 3.11 or 3.12" in done.stderr
    assert "make PYTHON=" in done.stderr


def test_an_unfit_python_is_named(repo: Path, tmp_path: Path) -> None:
    old = tmp_path / "python3.8"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.18" && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = find_python(repo, str(old))
    assert done.returncode == 1
    assert f"PYTHON={old} cannot be used (Python 3.8.18)" in done.stderr
    missing = find_python(repo, str(tmp_path / "nothing"))
    assert missing.returncode == 1
    assert "it does not run" in missing.stderr


def test_this_python_would_do(repo: Path) -> None:
    done = find_python(repo, sys.executable)
    assert (done.returncode, done.stdout.strip()) == (0, sys.executable)


def test_ci_runs_the_readmes_commands(repo: Path) -> None:
    script = repo / ".ci/run"
    assert os.access(script, os.X_OK)
    steps = [line.strip() for line in script.read_text().splitlines() if line.strip().startswith("step ")]
    commands = ["make setup", "make lint", "make test", "make test-slow", "make parallel"]
    assert [step.split('" ')[1] for step in steps] == commands
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
