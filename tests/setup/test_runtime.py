"""Threads, math library and allocator: what is set, what is kept, and what the launcher does to it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignment import runtime

AMD = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu sse2 avx avx2 fma\n\nvendor_id\t: AuthenticAMD\n"
CPUINFO = {
    "amd": (AMD, True),
    "amd without avx2": (AMD.replace("avx2 ", ""), False),
    "intel": (AMD.replace("AuthenticAMD", "GenuineIntel"), False),
    "arm": ("processor\t: 0\nBogoMIPS\t: 50.00\n", False),
}
OWN_VARIABLES = ("OMP_NUM_THREADS", "MKL_DEBUG_CPU_TYPE", "GLOG_minloglevel", "ALIGNMENT_RUNTIME", runtime.OWN_THREADS)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 4 AMD cores with 2 threads each and no limits: ``proc`` and ``sys`` in a folder."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/cpuinfo").write_text(AMD)
    (tmp_path / "proc/self/cgroup").write_text("0::/user/job\n")
    for cpu in range(8):
        topology = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    (tmp_path / "sys/fs/cgroup/user/job").mkdir(parents=True)
    return tmp_path


def cores(machine: Path) -> int:
    return runtime.physical_cores(proc=machine / "proc", sys_root=machine / "sys")


def set_environment(environ: dict[str, str], machine: Path) -> list[str]:
    return runtime.set_environment(environ, proc=machine / "proc", sys_root=machine / "sys")


def in_fresh_process(repo: Path, code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in OWN_VARIABLES and not k.startswith("PADDLE_")}
    return subprocess.run(
        [sys.executable, "-c", code], env={**clean, "PYTHONPATH": str(repo), **environ}, capture_output=True, text=True
    )


# ---- cores --------


def test_two_threads_of_a_core_count_once(machine: Path) -> None:
    assert cores(machine) == 4


def test_affinity_limits_the_cores(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 2})
    assert cores(machine) == 2


def test_without_topology_every_cpu_is_a_core(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {100, 101, 102})
    assert cores(machine) == 3


@pytest.mark.parametrize(("quota", "expected"), [("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1)])
def test_quota_of_cgroup_version_2(machine: Path, quota: str, expected: int) -> None:
    (machine / "sys/fs/cgroup/user/job/cpu.max").write_text(quota + "\n")
    assert cores(machine) == expected


def test_quota_of_a_group_above(machine: Path) -> None:
    (machine / "sys/fs/cgroup/user/job/cpu.max").write_text("max 100000\n")
    (machine / "sys/fs/cgroup/user/cpu.max").write_text("300000 100000\n")
    assert cores(machine) == 3


@pytest.mark.parametrize(("quota", "expected"), [("-1", 4), ("200000", 2)])
def test_quota_of_cgroup_version_1(machine: Path, quota: str, expected: int) -> None:
    (machine / "proc/self/cgroup").write_text("4:memory:/m\n3:cpu,cpuacct:/job\n0::/\n")
    group = machine / "sys/fs/cgroup/cpu/job"
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text(quota)
    (group / "cpu.cfs_period_us").write_text("100000")
    assert cores(machine) == expected


def test_no_cgroups(machine: Path) -> None:
    (machine / "proc/self/cgroup").unlink()
    assert cores(machine) == 4


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, 1),
        ({"PADDLE_LOCAL_SIZE": "2", "PADDLE_TRAINERS_NUM": "8"}, 2),
        ({"PADDLE_CURRENT_ENDPOINT": "a:1", "PADDLE_TRAINER_ENDPOINTS": "a:1,a:2,b:1", "PADDLE_TRAINERS_NUM": "3"}, 2),
        ({"PADDLE_TRAINERS_NUM": "4"}, 4),
        ({"PADDLE_LOCAL_SIZE": "0"}, 1),
    ],
)
def test_local_processes(environ: dict[str, str], expected: int) -> None:
    assert runtime.local_processes(environ) == expected


# ---- environment --------


@pytest.mark.parametrize("kind", CPUINFO)
def test_math_library_switch_only_on_amd_with_avx2(machine: Path, kind: str) -> None:
    text, expected = CPUINFO[kind]
    (machine / "proc/cpuinfo").write_text(text)
    environ: dict[str, str] = {}
    set_environment(environ, machine)
    assert (environ.get("MKL_DEBUG_CPU_TYPE") == "5") is expected


def test_no_cpuinfo_no_switch(tmp_path: Path) -> None:
    assert runtime.wants_mkl_switch(tmp_path / "cpuinfo") is False


def test_threads_are_shared_by_the_processes_of_the_host(machine: Path) -> None:
    environ = {"PADDLE_LOCAL_SIZE": "2"}
    said = set_environment(environ, machine)
    assert environ["OMP_NUM_THREADS"] == "2"
    assert said[0] == "OMP_NUM_THREADS=2 (4 physical cores / 2 processes)"


def test_more_processes_than_cores_get_one_thread(machine: Path) -> None:
    environ = {"PADDLE_LOCAL_SIZE": "16"}
    set_environment(environ, machine)
    assert environ["OMP_NUM_THREADS"] == "1"


def test_what_the_user_set_is_kept_and_said(machine: Path) -> None:
    environ = {"OMP_NUM_THREADS": "7", "MKL_DEBUG_CPU_TYPE": "4", "GLOG_minloglevel": "0"}
    said = set_environment(environ, machine)
    assert environ == {"OMP_NUM_THREADS": "7", "MKL_DEBUG_CPU_TYPE": "4", "GLOG_minloglevel": "0"}
    assert said == ["OMP_NUM_THREADS=7 (yours)", "MKL_DEBUG_CPU_TYPE=4 (from the environment)"]


def test_a_child_process_divides_what_its_parent_set(machine: Path) -> None:
    environ: dict[str, str] = {}
    set_environment(environ, machine)
    assert environ["OMP_NUM_THREADS"] == "4"
    environ["PADDLE_LOCAL_SIZE"] = "4"
    set_environment(environ, machine)
    assert environ["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("cmdline", "first_environ", "threads"),
    [
        ("python\0-m\0paddle.distributed.launch\0run.py\0", "PATH=/bin\0", "2"),
        ("python\0-m\0paddle.distributed.launch\0run.py\0", "PATH=/bin\0OMP_NUM_THREADS=1\0", "1"),
        ("bash\0job.sh\0", "PATH=/bin\0", "1"),
    ],
)
def test_the_launchers_leftover_is_told_from_the_users_choice(
    machine: Path, cmdline: str, first_environ: str, threads: str
) -> None:
    # The launcher imports paddle, which writes OMP_NUM_THREADS=1 into the environment that the workers inherit.
    parent = machine / "proc" / str(os.getppid())
    parent.mkdir()
    (parent / "cmdline").write_text(cmdline)
    (parent / "environ").write_text(first_environ)
    environ = {"OMP_NUM_THREADS": "1", "PADDLE_LOCAL_SIZE": "2"}
    set_environment(environ, machine)
    assert environ["OMP_NUM_THREADS"] == threads


# ---- whole processes --------

SHOW = "import os, alignment; print(os.environ.get('OMP_NUM_THREADS'), alignment.runtime.describe(), sep='|')"


def test_import_prepares_and_describes(repo: Path) -> None:
    done = in_fresh_process(repo, SHOW)
    threads, line = done.stdout.strip().split("|")
    assert threads == str(runtime.physical_cores())
    assert line.startswith(f"CPU runtime: OMP_NUM_THREADS={threads} (")
    assert "allocator" in line


def test_the_users_threads_survive_the_import(repo: Path) -> None:
    done = in_fresh_process(repo, SHOW, OMP_NUM_THREADS="3")
    assert done.stdout.startswith("3|CPU runtime: OMP_NUM_THREADS=3 (yours)")


def test_opt_out(repo: Path) -> None:
    done = in_fresh_process(repo, SHOW, ALIGNMENT_RUNTIME="0")
    assert done.stdout.strip() == "None|CPU runtime: left as it is (ALIGNMENT_RUNTIME=0)"


def test_paddle_first_is_said(repo: Path) -> None:
    done = in_fresh_process(repo, "import sys, types; sys.modules['paddle'] = types.ModuleType('paddle')\n" + SHOW)
    assert done.stdout.startswith("None|")
    assert "paddle was imported before alignment" in done.stdout


def test_prepare_does_its_work_once() -> None:
    assert runtime.prepare() is runtime.prepare()


@pytest.fixture
def gpu_build(tmp_path: Path, repo: Path) -> dict[str, str]:
    """The environment of a process that finds a GPU build of Paddle with one GPU, made of a few lines."""
    package = tmp_path / "paddle"
    (package / "version").mkdir(parents=True)
    (package / "version" / "__init__.py").write_text("cuda_version     = '12.6'\n")
    (package / "__init__.py").write_text(
        "import os\n"
        "class cuda:\n"
        "    device_count = staticmethod(lambda: int(os.environ.get('CUDA_VISIBLE_DEVICES', '0') != ''))\n"
        "    get_device_name = staticmethod(lambda: 'A card')\n"
        "class device:\n"
        "    cuda = cuda\n"
        "    is_compiled_with_cuda = staticmethod(lambda: True)\n"
        "taken = os.environ.get('TAKES', 'gpu:0') if cuda.device_count() else 'cpu'\n"
        "get_device = lambda: taken\n"
        "def set_device(name):\n    global taken\n    taken = name\n"
    )
    return {"PYTHONPATH": f"{tmp_path}:{repo}", "CUDA_VISIBLE_DEVICES": "0"}


USE = """
import os
from pathlib import Path
from alignment import runtime
runtime._gpu_device = lambda folder: {found}
runtime.prepare.cache_clear()
from alignment.arguments import parse_sft
from alignment.flow.runner import use_device
words = ["model_name_or_path=m", "train_datasets=a", "output_dir=o", {words}]
args = parse_sft(words)
use_device(args)
import paddle
seen = [os.environ.get(n) for n in ("CUDA_VISIBLE_DEVICES", "PADDLE_DISTRI_BACKEND", "FLAGS_selected_gpus")]
print(args.on_cpu, paddle.get_device(), *seen, sep="|")
"""
LAUNCHED = {
    "PADDLE_TRAINER_ID": "1",
    "PADDLE_TRAINERS_NUM": "2",
    "FLAGS_selected_gpus": "1",
    "PADDLE_RANK_IN_NODE": "1",
}


def test_a_gpu_host_keeps_its_memory_free_and_says_what_it_takes(repo: Path, gpu_build: dict[str, str]) -> None:
    """A21, B17: the allocator's setting is for CPUs alone, and the device is named."""
    code = USE.format(found="folder == Path('/dev')", words="")
    done = in_fresh_process(repo, code, **gpu_build)
    assert done.stdout.strip() == "False|gpu:0|0|None|None"
    assert "allocator as it is (a GPU computes)" in done.stderr and "device: gpu:0 (A card)" in done.stderr


def test_a_gpu_that_only_paddle_can_see_is_used(repo: Path, gpu_build: dict[str, str]) -> None:
    """B17: it is asked once it is loaded."""
    done = in_fresh_process(repo, USE.format(found="False", words=""), **gpu_build)
    assert done.stdout.strip() == "False|gpu:0|0|None|None" and "device: gpu:0 (A card)" in done.stderr


def test_other_accelerators_are_named(repo: Path, gpu_build: dict[str, str]) -> None:
    """B17: they are not used without a word about it."""
    without = {**gpu_build, "CUDA_VISIBLE_DEVICES": "-1", "TAKES": "npu:0"}
    done = in_fresh_process(repo, USE.format(found="False", words=""), **without)
    assert done.stdout.startswith("True|cpu|")
    assert "npu:0 is no CPU and no GPU of NVIDIA's: it is left alone, and the CPU is used" in done.stderr
    assert "device: cpu" in done.stderr


def test_on_a_cpu_by_choice_paddle_sees_no_gpu(repo: Path, gpu_build: dict[str, str]) -> None:
    """B18: otherwise several processes would meet on it, whatever device was set."""
    done = in_fresh_process(repo, USE.format(found="True", words="'device=cpu'"), **gpu_build, **LAUNCHED)
    assert done.stdout.strip() == "True|cpu||gloo|None"
    done = in_fresh_process(repo, USE.format(found="True", words="'device=cpu'"), **gpu_build)
    assert done.stdout.strip() == "True|cpu||None|None"
    assert "device: cpu" in done.stderr and "allocator keeps blocks" in done.stderr


def test_gpus_are_looked_for_where_drivers_put_them(tmp_path: Path) -> None:
    for name, found in [("nvidiactl", False), ("nvidia0", True), ("dxg", True), ("kfd", False)]:
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
        assert runtime._gpu_device(tmp_path / name) is found


# mallinfo's fourth field counts the blocks that were taken from the kernel one by one.
COUNT_MAPPED = """
import ctypes, os, sys
os.environ["ALIGNMENT_RUNTIME"] = "0"
from alignment import runtime
said = runtime.set_allocator(os.environ) if sys.argv[1:] == ["set"] else ""
libc = ctypes.CDLL(None)
class Info(ctypes.Structure):
    _fields_ = [(f"f{i}", ctypes.c_int) for i in range(10)]
libc.mallinfo.restype, libc.malloc.restype, libc.malloc.argtypes = Info, ctypes.c_void_p, [ctypes.c_size_t]
before = libc.mallinfo().f3
assert libc.malloc(64 << 20)
print(libc.mallinfo().f3 - before, said, sep="|")
"""


def test_large_blocks_are_no_longer_mapped_one_by_one(repo: Path) -> None:
    if sys.platform != "linux":
        assert runtime.set_allocator({}) == "allocator as it is (not glibc)"
        return
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    environ["PYTHONPATH"] = str(repo)
    results = {}
    for arguments in ((), ("set",)):
        done = subprocess.run(
            [sys.executable, "-c", COUNT_MAPPED, *arguments], env=environ, capture_output=True, text=True, check=True
        )
        results[arguments] = done.stdout.strip()
    assert results[()] == "1|"
    mapped, said = results[("set",)].split("|")
    limit = int(said.removeprefix("allocator keeps blocks up to ").removesuffix(" MiB"))
    assert int(mapped) == (0 if limit > 64 else 1)


@pytest.mark.parametrize(
    "environ",
    [
        {"MALLOC_TRIM_THRESHOLD_": "1"},
        {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mmap_threshold=4096"},
    ],
)
def test_the_users_allocator_is_kept(environ: dict[str, str]) -> None:
    assert runtime.set_allocator(environ).startswith("allocator as ")


def test_only_known_noise_is_filtered(repo: Path) -> None:
    code = (
        "import warnings, alignment\n"
        "warnings.warn('No ccache found. Please be aware')\n"
        "api = 'paddle.incubate.nn.functional.swiglu.swiglu'\n"
        "warnings.warn(f'\\033[93m\\nWarning:\\nAPI \"{api}\" is deprecated since 3.3.0, and will be removed')\n"
        "warnings.warn('the disk is full')\n"
    )
    lines = in_fresh_process(repo, code).stderr.splitlines()
    assert [line for line in lines if "Warning" in line] == ["<string>:5: UserWarning: the disk is full"]


def test_paddles_import_is_quiet_and_errors_still_show(repo: Path) -> None:
    code = (
        "import sys, alignment\n"
        "with alignment.runtime.quiet_import():\n"
        "    import paddle\n"
        "    print('still here', file=sys.stderr)\n"
        "print(alignment.runtime.device_name(), alignment.runtime.is_cpu())\n"
        "print('and here', file=sys.stderr)\n"
    )
    done = in_fresh_process(repo, code, OMP_NUM_THREADS="2", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0
    assert done.stdout == "cpu True\n"
    assert done.stderr == "still here\nand here\n"


WORKER = """
import alignment, os
open("threads." + os.environ["PADDLE_TRAINER_ID"], "w").write(alignment.runtime.describe())
"""


def test_under_the_real_launcher(repo: Path, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    clean = {k: v for k, v in os.environ.items() if k not in OWN_VARIABLES and not k.startswith("PADDLE_")}
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2", "worker.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**clean, "PYTHONPATH": str(repo)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    physical = runtime.physical_cores()
    for rank in range(2):
        line = (tmp_path / f"threads.{rank}").read_text()
        assert f"OMP_NUM_THREADS={max(1, physical // 2)} ({physical} physical core" in line
        assert "/ 2 processes)" in line


def test_seeds_repeat() -> None:
    import random

    import numpy as np
    import paddle

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), paddle.rand([1]).item()

    runtime.seed_everything(3)
    first = draw()
    runtime.seed_everything(3)
    assert draw() == first
    runtime.seed_everything(4)
    assert draw() != first
