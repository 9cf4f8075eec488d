"""What the repository may hold."""

from __future__ import annotations

import re
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


def test_files_that_the_docs_name_are_there() -> None:
    """Names move; a page that says where something is must follow. What users write is called mine, file or my_..."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    endings = {"/" + name for name in listed.split("\0")}
    missing = []
    for page in (REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))):
        for name in re.findall(r"[\w./-]*\w\.(?:py|h|cc)\b", page.read_text(encoding="utf-8")):
            users = re.match(r"(my_|mine|file)", name.rpartition("/")[2])
            if not users and not any(known.endswith("/" + name.lstrip("./")) for known in endings):
                missing.append(f"{page.name}: {name}")
    assert not missing
