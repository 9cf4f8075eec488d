"""Compiling once, loading afterwards, and doing without a compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from alignment.kernels import build
from alignment.rollout.sampler import SamplingSettings
from tests.rollout.conftest import engine_for, make_model, make_prompts

ROLLOUT = """
import json, sys
import alignment
from tests.rollout.conftest import make_model, make_prompts, IdTokenizer
from alignment.rollout.generate import GenerationEngine
from alignment.rollout.sampler import SamplingSettings
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
    monkeypatch.setattr(build, "compilers", lambda: [["g++"]])
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    with pytest.raises(AssertionError, match="compiled again"):
        build.library()


def test_no_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler \(g\+\+, c\+\+, clang\+\+\) is installed"):
        build.library()
    monkeypatch.setenv("CXX", "/nowhere/g++ -v")
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler \(/nowhere/g\+\+ -v, g\+\+, c\+\+, clang\+\+\)"):
        build.library()


def fake_compiler(folder: Path, name: str, status: int) -> Path:
    """A program that notes its arguments and writes what it is told to."""
    program = folder / name
    program.write_text(
        f'#!/bin/sh\necho "$0 $*" >> {folder}/calls\n'
        f'[ {status} = 0 ] || {{ echo "error: broken" >&2; exit {status}; }}\n'
        'while [ $# -gt 1 ]; do [ "$1" = -o ] && : > "$2"; shift; done\n'
    )
    program.chmod(0o755)
    return program


def test_cxx_may_have_several_words(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """rl 26: CXX="ccache g++" ran ccache alone."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    wrapper = fake_compiler(tmp_path, "wrapper", 0)
    monkeypatch.setenv("CXX", "wrapper g++ --flag")
    assert build.library().exists()
    assert (tmp_path / "calls").read_text().startswith(f"{wrapper} g++ --flag -O3 ")


def test_a_cxx_that_fails_is_followed_by_others(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """rl 26: what the environment names may be broken where another compiler is not."""
    broken, right = fake_compiler(tmp_path, "broken", 1), fake_compiler(tmp_path, "clang++", 0)
    monkeypatch.setenv("PATH", f"{tmp_path}")
    monkeypatch.setenv("CXX", "broken -x")
    for program in (broken, right):  # PATH has no shell's tools
        program.write_text(program.read_text().replace("#!/bin/sh", "#!/bin/sh\nPATH=/bin:/usr/bin"))
    assert build.library().exists()
    assert [line.split()[0] for line in (tmp_path / "calls").read_text().splitlines()] == [
        str(broken),
        str(right),
        str(right),
    ]
    next(cache.glob("*.so")).unlink()
    right.unlink()
    with pytest.raises(build.BuildError, match="broken -x failed: error: broken"):
        build.library()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang++ is not installed")
def test_clang_compiles_them_too(repo: Path, tmp_path: Path) -> None:
    """rl 18: a builtin that only GCC has, and an OpenMP header that clang may lack."""
    environment = {**os.environ, "PYTHONPATH": str(repo), "CXX": "clang++", build.CACHE: str(tmp_path)}
    made = [sys.executable, "-m", "alignment.kernels"]
    done = subprocess.run(made, env=environment, capture_output=True, text=True, cwd=repo)
    assert str(tmp_path) in done.stdout, done.stdout + done.stderr
    tests = [f"tests/kernels/{name}" for name in ("test_layer.py", "test_label_logprobs.py", "test_optimizer.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", *tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=repo)
    assert done.returncode == 0, done.stdout[-2000:]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ROLLOUT], env=environment, capture_output=True, text=True, cwd=repo
    )
    engine = engine_for(make_model("llama"), "kernels")
    tokens = engine.generate(make_prompts([3, 9, 5]), SamplingSettings(12, seed=5)).tokens.tolist()
    assert json.loads(done.stdout.splitlines()[-1]) == ["CpuKernelOps", tokens]


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
    environment |= {"CXX": "", "PATH": ""} if because == "no compiler" else {build.OPT_OUT: "0"}
    command = [sys.executable, "-W", "ignore", "-c", ROLLOUT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=repo)
    assert done.returncode == 0, done.stderr
    name, tokens = json.loads(done.stdout.splitlines()[-1])
    engine = engine_for(make_model("llama"), "kernels")
    assert tokens == engine.generate(make_prompts([3, 9, 5]), SamplingSettings(12, seed=5)).tokens.tolist()
    assert name == "LayerOps"
    assert done.stderr.count("no CPU kernels: no C++ compiler") == int(because == "no compiler")
