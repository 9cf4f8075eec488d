"""``import alignment`` and the modules that only read arguments stay light."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignment import frontpage

HEAVY = ["paddle", "paddlenlp", "datasets", "pandas", "matplotlib", "pyarrow", "visualdl"]
LIMIT_S = 0.3

PROBE = """
import json, sys, time
began = time.perf_counter()
import {module}
seconds = time.perf_counter() - began
print(json.dumps([seconds, [name for name in {heavy!r} if name in sys.modules]]))
"""


def probe(repo: Path, module: str) -> tuple[float, list[str]]:
    code = PROBE.format(module=module, heavy=HEAVY)
    environ = {**os.environ, "PYTHONPATH": str(repo)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    seconds, loaded = json.loads(done.stdout)
    return seconds, loaded


@pytest.mark.parametrize("module", ["alignment", "alignment.cli", "alignment.arguments", "alignment.plugins"])
def test_light(repo: Path, module: str) -> None:
    results = [probe(repo, module) for _ in range(3)]  # the best of three: the machine may be busy
    assert results[0][1] == []
    assert min(seconds for seconds, _ in results) < LIMIT_S


def test_rewards_need_no_paddle(repo: Path) -> None:
    assert probe(repo, "alignment.rollout.rewards")[1] == []


def test_importing_prints_nothing(repo: Path) -> None:
    environ = {**os.environ, "PYTHONPATH": str(repo)}
    done = subprocess.run([sys.executable, "-c", "import alignment"], env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


FRONT_PAGE = """
import sys
import alignment
import paddlenlp.transformers
assert not {"sklearn", "pandas", "scipy.stats"} & set(sys.modules), "the front page was read"
import paddlenlp
assert paddlenlp.__version__ == "3.0.0b4"
if len(sys.argv) > 1:
    from paddlenlp.peft import LoRAModel  # cannot be imported by itself
    assert sys.modules["paddlenlp.peft"].LoRAModel is LoRAModel
assert paddlenlp.Taskflow.__name__ == "Taskflow"
assert type(paddlenlp) is type(sys)
assert paddlenlp.transformers is sys.modules["paddlenlp.transformers"]
assert paddlenlp.peft.LoRAModel
"""


@pytest.mark.parametrize("first", [[], ["peft"]], ids=["attribute", "part"])
def test_paddlenlps_front_page_is_read_when_it_is_needed(repo: Path, first: list[str]) -> None:
    environ = {**os.environ, "PYTHONPATH": str(repo)}
    command = [sys.executable, "-W", "ignore", "-c", FRONT_PAGE, *first]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_home_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """paddlenlp makes folders in it while it is imported; containers run with a home that is not theirs."""
    monkeypatch.setenv("PPNLP_HOME", "mine")
    frontpage.settle_home()
    assert os.environ["PPNLP_HOME"] == "mine"
    monkeypatch.delenv("PPNLP_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    frontpage.settle_home()
    assert "PPNLP_HOME" not in os.environ and (tmp_path / "home" / ".paddlenlp" / "packages").is_dir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))  # nothing can be made in it, whoever one is
    monkeypatch.setattr(frontpage.tempfile, "tempdir", str(tmp_path))
    frontpage.settle_home()
    own = tmp_path / f"paddlenlp-{os.getuid()}"
    assert os.environ.pop("PPNLP_HOME") == str(own) and own.stat().st_mode & 0o777 == 0o700
