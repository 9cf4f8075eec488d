"""Compiling the CPU kernels: once for a kind of processor and a version of Paddle; loaded from a cache afterwards.

``make setup`` compiles them at installation; where that did not happen, the first run does (some ten seconds). Without
a C++ compiler everything works on Paddle's own operators, slower.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from alignment.paths import CACHE, cache_folder

SOURCES = Path(__file__).parent / "csrc"
OPT_OUT = "ALIGNMENT_KERNELS"
FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fPIC",
    "-fopenmp",
    # Errors and traps of floating-point functions are nobody's concern; the order of additions is, so no -ffast-math.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-DPADDLE_WITH_CUSTOM_KERNEL",
)


class BuildError(Exception):
    """The kernels cannot be had; the message says why, for a log line."""


def compilers() -> list[list[str]]:
    """The C++ compilers to try, each as the words of a command: ``$CXX`` (which may have several, ``ccache g++``), then
    g++, c++ and clang++.

    Raises:
        BuildError: there is none.
    """
    named = os.environ.get("CXX", "").split()
    wanted = [named] if named else []
    wanted += [[name] for name in ("g++", "c++", "clang++") if [name] != named]
    found = [[path, *words[1:]] for words in wanted if (path := shutil.which(words[0]))]
    if not found:
        raise BuildError(f"no C++ compiler ({', '.join(' '.join(words) for words in wanted)}) is installed")
    return found


def library() -> Path:
    """The compiled library, made now if the cache does not have it.

    Raises:
        BuildError: it cannot be compiled here.
    """
    if platform.system() != "Linux":
        raise BuildError(f"the CPU kernels are built on Linux only, this is {platform.system()}")
    folder = cache_folder()
    target = folder / f"alignment-kernels-{_fingerprint()}.so"
    if target.exists():  # also where the compiler is gone by now
        return target
    programs = compilers()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        from filelock import FileLock

        with FileLock(str(target) + ".lock"):  # the processes of a run start together
            if not target.exists():
                _compile_with_one(programs, target)
    except OSError as error:
        raise BuildError(f"cannot write to the cache {folder}: {error} (set {CACHE} to another folder)") from error
    return target


def _compile_with_one(programs: list[list[str]], target: Path) -> None:
    problems = []
    for program in programs:
        try:
            return _compile(program, target)
        except BuildError as error:
            problems.append(str(error))
    raise BuildError("; ".join(problems))


def _fingerprint() -> str:
    import paddle

    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    digest.update("\0".join([paddle.__version__, *FLAGS, platform.machine(), _instructions()]).encode())
    return digest.hexdigest()[:16]


def _instructions() -> str:
    """What the processor can: a cache on a shared disk may be read by machines that differ."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return " ".join(sorted(line.partition(":")[2].split()))
    return platform.processor()


def _compile(program: list[str], target: Path) -> None:
    import paddle

    root = Path(paddle.__file__).parent
    includes = [root / "include", root / "include/third_party", Path(sysconfig.get_paths()["include"])]
    # Paddle's own OpenMP library where it ships one: two thread pools would fight over the cores.
    openmp = "-lomp" if "clang" in Path(program[-1]).name else "-lgomp"
    if (root / "libs/libiomp5.so").exists():
        openmp = "-l:libiomp5.so"
    shown = " ".join([Path(program[0]).name, *program[1:]])
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        unit = Path(folder) / "ops.o"
        headers = [f"-I{path}" for path in includes]
        libraries = [f"-L{root / 'base'}", f"-L{root / 'libs'}", "-l:libpaddle.so", "-l:libphi_core.so", openmp]
        commands = [
            [*program, *FLAGS, *headers, "-c", str(SOURCES / "ops.cc"), "-o", str(unit)],
            [*program, "-shared", str(unit), "-o", str(made), *libraries],
        ]
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
                raise BuildError(f"{shown} failed: {lines[0] if lines else 'no message'}")
        os.replace(made, target)  # complete or not there
