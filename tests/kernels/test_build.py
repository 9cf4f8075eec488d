"""Compiling once, loading afterwards, and doing without a compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignment.kernels import build
from alignment.ppo.generation.sampler import SamplingSettings
from tests.generation.conftest import engine_for, make_model, make_prompts

ROLLOUT = """
import json, sys
import alignment
from tests.generation.conftest import make_model, make_prompts, IdTokenizer
from alignment.ppo.generation.engine import GenerationEngine
from alignment.ppo.generation.sampler import SamplingSettings
engine = GenerationEngine(make_model("llama"), IdTokenizer(), [1], 64, 8)
rollout = engine.generate(make_prompts([3, 9, 5]), SamplingSettings(12, seed=5))
print(json.dumps([type(engine.ops).__name__, rollout.tokens.tolist()]))
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(build.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_it_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = build.library()
    assert made.parent == cache
    assert {path.suffix for path in cache.iterdir()} == {".so", ".lock"}, "nothing else is left behind"

    def never(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(build, "_compile", never)
    assert build.library() == made
    monkeypatch.setenv("PATH", "")  # nor is the compiler needed any more
    assert build.library() == made
    monkeypatch.setattr(build, "compiler", lambda: "g++")
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    with pytest.raises(AssertionError, match="compiled again"):
        build.library()


def test_no_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler \(g\+\+, c\+\+ or clang\+\+\) is installed"):
        build.library()
    monkeypatch.setenv("CXX", "/nowhere/g++ -v")
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler \(\$CXX is /nowhere/g\+\+\)"):
        build.library()


def test_sources_that_do_not_compile(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "csrc"
    broken.mkdir()
    (broken / "ops.cc").write_text("int main( {\n")
    monkeypatch.setattr(build, "SOURCES", broken)
    with pytest.raises(build.BuildError, match=r"failed: .*ops\.cc:1.*error"):
        build.library()
    assert not list(cache.glob("*.so"))


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(build.CACHE, str(tmp_path / "file" / "cache"))
    with pytest.raises(build.BuildError, match=r"cannot write to the cache .*set ALIGNMENT_CACHE to another folder"):
        build.library()


@pytest.mark.parametrize("because", ["no compiler", "the user"])
def test_without_the_kernels_the_same_engine_gives_the_same_tokens(repo: Path, tmp_path: Path, because: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1", build.CACHE: str(tmp_path)}
    environment |= {"CXX": "/nowhere/g++"} if because == "no compiler" else {build.OPT_OUT: "0"}
    command = [sys.executable, "-W", "ignore", "-c", ROLLOUT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=repo)
    assert done.returncode == 0, done.stderr
    name, tokens = json.loads(done.stdout.splitlines()[-1])
    engine = engine_for(make_model("llama"), "kernels")
    assert tokens == engine.generate(make_prompts([3, 9, 5]), SamplingSettings(12, seed=5)).tokens.tolist()
    assert name == "LayerOps"
    assert done.stderr.count("no CPU kernels: no C++ compiler") == int(because == "no compiler")
