"""What must be set before Paddle loads, seeds, and the name of the device.

On a CPU, Paddle as it comes uses one thread, a slow path of its math library on AMD's processors, and an allocator that
gives every large block back to the kernel. Three settings, made inside this process before ``import paddle``, cure that
(``benchmarks/runtime.py`` measures each):

1. ``OMP_NUM_THREADS`` = physical cores this process may use / processes of the run on this host.
2. ``MKL_DEBUG_CPU_TYPE=5`` on AMD: Paddle ships an MKL that takes its AVX2 path on other makers' processors only when
   told to.
3. glibc's ``mallopt``: ``M_MMAP_THRESHOLD`` 1 GiB and ``M_TRIM_THRESHOLD`` at its maximum, so that freed blocks are
   used again. Not where Paddle computes on a GPU: there it would only hold the host's memory.

What the user has set is never changed. ``ALIGNMENT_RUNTIME=0`` turns all of it off.

This module imports the standard library only; Paddle and NumPy are imported inside the functions that need them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import os
import platform
import random
import re
import sys
import warnings
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from alignment import frontpage

OPT_OUT = "ALIGNMENT_RUNTIME"
# Remembers, for child processes, the thread count that we (and not the user) put into the environment.
OWN_THREADS = "ALIGNMENT_OMP_NUM_THREADS"

GPU_ALLOCATOR = "allocator as it is (a GPU computes)"
# Parameter numbers of mallopt(3), from glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
GIB = 1 << 30
# Before 2.35, glibc refuses an mmap threshold above HEAP_MAX_SIZE / 2, which is 32 MiB on 64-bit systems.
OLD_GLIBC_MMAP_LIMIT = 32 << 20
INT_MAX = (1 << 31) - 1

# Said by Paddle while it is imported; harmless, because its CPU wheels are built with MKL and not with OpenBLAS.
_IMPORT_NOISE = ("WARNING: OMP_NUM_THREADS set to", "PLEASE USE OMP_NUM_THREADS WISELY")
# Warnings between Paddle and paddlenlp, about which a user can do nothing (regular expressions).
_WARNING_NOISE = (
    "No ccache found",
    "Setuptools is replacing distutils",
    r"(?s).*paddle\.incubate\.nn\.functional\.swiglu.* is deprecated",
)


@dataclass
class RuntimeReport:
    """What :func:`prepare` did.

    Attributes:
        settings: one entry per setting, in words: ``"OMP_NUM_THREADS=2 (2 physical cores / 1 process)"``.
        warning: what came too late, or an empty string.
        active: False when ``ALIGNMENT_RUNTIME=0``.
    """

    settings: list[str] = field(default_factory=list)
    warning: str = ""
    active: bool = True

    def __str__(self) -> str:
        if not self.active:
            return f"CPU runtime: left as it is ({OPT_OUT}=0)"
        line = "CPU runtime: " + ", ".join(self.settings)
        return f"{line}; {self.warning}" if self.warning else line


@functools.cache
def prepare() -> RuntimeReport:
    """Make the settings for this process, once; later calls return the first call's report.

    Called by ``import alignment``. Logs nothing: runners log :func:`describe`.
    """
    if os.environ.get(OPT_OUT, "") == "0":
        return RuntimeReport(active=False)
    report = RuntimeReport()
    if "paddle" in sys.modules:
        report.warning = "paddle was imported before alignment, so threads and math library keep Paddle's defaults"
    else:
        report.settings += set_environment(os.environ)
    report.settings.append(GPU_ALLOCATOR if gpu_found() else set_allocator(os.environ))
    frontpage.defer()
    for text in _WARNING_NOISE:
        warnings.filterwarnings("ignore", message=text, category=UserWarning)
    return report


def stay_on_cpu() -> None:
    """Compute on the CPU although there is a GPU; call it before Paddle loads.

    Paddle must not see the GPU: when several processes meet, it would take that again, whatever device was set.
    """
    report = prepare()
    if not gpu_found():
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.pop("FLAGS_selected_gpus", None)  # the launcher's
    if "PADDLE_TRAINER_ID" in os.environ:
        os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"
    if report.active:
        report.settings = [set_allocator(os.environ) if said == GPU_ALLOCATOR else said for said in report.settings]


def describe() -> str:
    """Return one line that says what was set, what the user's own settings were, and what came too late."""
    return str(prepare())


def set_environment(
    environ: MutableMapping[str, str], *, proc: Path = Path("/proc"), sys_root: Path = Path("/sys")
) -> list[str]:
    """Set the variables that Paddle and its math library read when they load.

    Args:
        environ: the environment to change (``os.environ``).
        proc: where ``cpuinfo`` and ``self/cgroup`` are read.
        sys_root: where CPU topology and cgroup limits are read.

    Returns:
        one description per variable.
    """
    said = []
    if _threads_are_the_users(environ, proc):
        said.append(f"OMP_NUM_THREADS={environ['OMP_NUM_THREADS']} (yours)")
    else:
        cores, processes = physical_cores(proc=proc, sys_root=sys_root), local_processes(environ)
        environ["OMP_NUM_THREADS"] = environ[OWN_THREADS] = str(max(1, cores // processes))
        said.append(
            f"OMP_NUM_THREADS={environ['OMP_NUM_THREADS']} "
            f"({cores} physical core{'s' * (cores != 1)} / {processes} process{'es' * (processes != 1)})"
        )
    if "MKL_DEBUG_CPU_TYPE" in environ:
        said.append(f"MKL_DEBUG_CPU_TYPE={environ['MKL_DEBUG_CPU_TYPE']} (from the environment)")
    elif wants_mkl_switch(proc / "cpuinfo"):
        environ["MKL_DEBUG_CPU_TYPE"] = "5"
        said.append("MKL_DEBUG_CPU_TYPE=5 (AMD)")
    # 1 hides glog's INFO lines ("The server starts to listen ..."); warnings and errors are still shown.
    environ.setdefault("GLOG_minloglevel", "1")
    return said


def _threads_are_the_users(environ: MutableMapping[str, str], proc: Path) -> bool:
    """Say whether ``OMP_NUM_THREADS`` was chosen by the user.

    It was not when a parent process of ours set it, nor when it is the ``1`` that ``import paddle`` leaves in the
    environment of ``paddle.distributed.launch``, from which the workers inherit it: the launcher's own first
    environment does not have it then.
    """
    value = environ.get("OMP_NUM_THREADS", "")
    if not value or value == environ.get(OWN_THREADS):
        return False
    if value == "1" and "PADDLE_LOCAL_SIZE" in environ:
        parent = proc / str(os.getppid())
        try:
            from_launcher = b"paddle.distributed.launch" in (parent / "cmdline").read_bytes()
            names = {entry.split(b"=", 1)[0] for entry in (parent / "environ").read_bytes().split(b"\0")}
        except OSError:
            return True  # another user's process, or no /proc: then what is there counts as chosen
        return not from_launcher or b"OMP_NUM_THREADS" in names
    return True


def physical_cores(*, proc: Path = Path("/proc"), sys_root: Path = Path("/sys")) -> int:
    """Return how many physical cores this process may use: by its CPU affinity and its cgroup's quota, at least 1."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in cpus:
        siblings = sys_root / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(f"cpu {cpu}")
    quota = cpu_quota(proc=proc, sys_root=sys_root)
    return max(1, len(cores) if quota is None else min(len(cores), int(quota)))


def cpu_quota(*, proc: Path = Path("/proc"), sys_root: Path = Path("/sys")) -> float | None:
    """Return the CPUs that the process's cgroup (version 1 or 2) or one above it allows, or None without a limit."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        hierarchy, controllers, group = line.split(":", 2)
        if hierarchy == "0":
            root, read = sys_root / "fs/cgroup", _quota_v2
        elif "cpu" in controllers.split(","):
            root, read = sys_root / "fs/cgroup" / "cpu", _quota_v1
        else:
            continue
        parts = [part for part in group.split("/") if part and part != ".."]
        for depth in range(len(parts) + 1):
            # A container may see the host's group names without having those folders; what cannot be read sets no
            # limit.
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                limits.append(read(root.joinpath(*parts[:depth])))
    limits = [limit for limit in limits if limit is not None]
    return min(limits, default=None)


def _quota_v2(folder: Path) -> float | None:
    quota, period = (folder / "cpu.max").read_text().split()
    return None if quota == "max" else int(quota) / int(period)


def _quota_v1(folder: Path) -> float | None:
    quota = int((folder / "cpu.cfs_quota_us").read_text())
    return None if quota < 0 else quota / int((folder / "cpu.cfs_period_us").read_text())


def local_processes(environ: MutableMapping[str, str]) -> int:
    """Return how many processes of this run share the host.

    ``paddle.distributed.launch`` says so in ``PADDLE_LOCAL_SIZE``; ``paddle.distributed.spawn`` and older launchers
    give the list of all endpoints, of which those with this process's address are counted.
    """
    local = environ.get("PADDLE_LOCAL_SIZE", "")
    if local.isdigit():
        return max(1, int(local))
    here = environ.get("PADDLE_CURRENT_ENDPOINT", "").rsplit(":", 1)[0]
    endpoints = environ.get("PADDLE_TRAINER_ENDPOINTS", "").split(",")
    if here:
        return max(1, sum(endpoint.rsplit(":", 1)[0] == here for endpoint in endpoints))
    world = environ.get("PADDLE_TRAINERS_NUM", "")
    return max(1, int(world)) if world.isdigit() else 1


def wants_mkl_switch(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Say whether the processor is an AMD with AVX2 (the path that the switch selects would crash without AVX2)."""
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        return False
    first = text.split("\n\n", 1)[0]
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    return fields.get("vendor_id") == "AuthenticAMD" and "avx2" in fields.get("flags", "").split()


def set_allocator(environ: MutableMapping[str, str]) -> str:
    """Tell glibc's allocator to keep freed blocks, and return in words what happened.

    Nothing is done outside Linux with glibc, nor when the user tunes the allocator by ``MALLOC_*`` or
    ``GLIBC_TUNABLES``.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return "allocator as it is (not glibc)"
    tunables = environ.get("GLIBC_TUNABLES", "")
    own = [name for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_") if name in environ]
    own += [name for name in ("glibc.malloc.mmap_threshold", "glibc.malloc.trim_threshold") if name in tunables]
    if own:
        return f"allocator as you set it ({', '.join(own)})"
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    threshold = GIB if mallopt(M_MMAP_THRESHOLD, GIB) else OLD_GLIBC_MMAP_LIMIT
    if threshold == OLD_GLIBC_MMAP_LIMIT and not mallopt(M_MMAP_THRESHOLD, threshold):
        return "allocator as it is (mallopt refused)"
    if not mallopt(M_TRIM_THRESHOLD, INT_MAX):
        return "allocator as it is (mallopt refused)"
    return f"allocator keeps blocks up to {threshold >> 20} MiB"


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Drop Paddle's two lines about ``OMP_NUM_THREADS`` from standard error while it is imported; all else passes
    through.

    Example::

        with runtime.quiet_import():
            import paddle
    """
    with contextlib.redirect_stderr(_WithoutNoise(sys.stderr)):
        yield


class _Lazy(ModuleType):
    """A module that is imported, quietly, when something of it is first used."""

    def __getattr__(self, name: str) -> Any:
        # Not importlib's LazyLoader: that one puts its stand-in into sys.modules, where others look whether Paddle is
        # loaded.
        module = self.__dict__.get("_module")
        if module is None:
            with quiet_import():
                module = self.__dict__["_module"] = importlib.import_module(self.__name__)
        return getattr(module, name)


def lazy(name: str) -> Any:
    """A stand-in for the module ``name`` that loads it at the first look at one of its names.

    For what should be importable without loading Paddle (which takes seconds)::

        paddle = lazy("paddle")
    """
    return _Lazy(name)


class _WithoutNoise:
    """A text stream that forwards everything except the lines which start with one of ``_IMPORT_NOISE``."""

    def __init__(self, stream) -> None:
        self._stream = stream
        self._skip_newline = False

    def write(self, text: str) -> int:
        # print() writes the text and its line end separately.
        if text == "\n" and self._skip_newline:
            self._skip_newline = False
            return len(text)
        self._skip_newline = text.startswith(_IMPORT_NOISE) and not text.endswith("\n")
        if not text.startswith(_IMPORT_NOISE):
            self._stream.write(text)
        return len(text)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and Paddle's global generators (sampling has its own counter-based numbers)."""
    import numpy as np
    import paddle

    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    paddle.seed(seed)


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Inside, a GPU multiplies float32 matrices in float32; Paddle's default there is TF32, which keeps 10 bits."""
    from paddle.base import core

    former = core.get_cublas_switch()
    core.set_cublas_switch(False)
    try:
        yield
    finally:
        core.set_cublas_switch(former)


def gpu_found() -> bool:
    """Say whether Paddle computes on a GPU: its own answer once it is loaded; before that, whether the installed Paddle
    is a GPU build and a GPU of NVIDIA's (WSL's included) is visible to this process.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1", "NoDevFiles"):
        return False
    device = getattr(sys.modules.get("paddle"), "device", None)
    if hasattr(device, "is_compiled_with_cuda") and hasattr(device, "cuda"):
        return bool(device.is_compiled_with_cuda() and device.cuda.device_count() > 0)
    return _gpu_build() and _gpu_device(Path("/dev"))


def _gpu_device(folder: Path) -> bool:
    return any(re.fullmatch(r"nvidia\d+|dxg", entry.name) for entry in folder.iterdir())


@functools.cache
def _gpu_build() -> bool:
    found = PathFinder.find_spec("paddle")
    if found is None or not found.submodule_search_locations:
        return False
    version = Path(next(iter(found.submodule_search_locations))) / "version" / "__init__.py"
    if not version.is_file():
        return False
    match = re.search(r"^cuda_version\s*=\s*'([^']*)'", version.read_text(encoding="utf-8"), re.MULTILINE)
    return match is not None and match.group(1) not in ("False", "0", "")


def device_name() -> str:
    """Return Paddle's name of the current device: ``"cpu"``, ``"gpu:0"``, ..."""
    import paddle

    return paddle.get_device()


def is_cpu() -> bool:
    """Say whether Paddle computes on the CPU."""
    return device_name().partition(":")[0] == "cpu"
