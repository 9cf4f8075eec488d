"""What the repository may hold."""

from __future__ import annotations

import subprocess

from tests.conftest import REPO

LARGEST = 200_000  # bytes


def test_no_large_files() -> None:
    """D33: traces of a profiler were once twice the code. The lock alone is large."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    files = [REPO / name for name in listed.split("\0") if name and name != "requirements/lock.txt"]
    assert len(files) > 100
    large = {str(file): file.stat().st_size for file in files if file.is_file() and file.stat().st_size > LARGEST}
    assert not large


def test_profiles_are_ignored() -> None:
    for name in ("profiler_log/trace.json", "anywhere/host.paddle_trace.json"):
        assert subprocess.run(["git", "check-ignore", "-q", name], cwd=REPO).returncode == 0, name
