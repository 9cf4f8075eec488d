"""However the launcher ends, it leaves no process behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alignment.flow.checkpoint import CheckpointStore
from tests.tiny import copy_rows, tiny_model_dir, write_jsonl

REPO = Path(__file__).resolve().parents[2]
SCRIPT = REPO / "tests" / "parallel" / "launch_script.py"


@contextlib.contextmanager
def launched(folder: Path, *command: str) -> Iterator[subprocess.Popen]:
    """Two ranks under a real launcher in a process group of its own, as a shell starts it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    words = ["-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", str(folder / "logs"), *command]
    with open(folder / "launcher.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield process
    finally:
        pids = pids_of(folder)
        for pid in [process.pid, *pids]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def pids_of(folder: Path) -> list[int]:
    """The ranks that have said who they are."""
    return [int(path.read_text()) for path in folder.glob("pid-*") if path.read_text()]


def wait_until(condition, seconds: float, what: str) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, what
        time.sleep(0.05)
    return time.monotonic() - began


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def log_of(folder: Path, rank: int) -> str:
    return (folder / "logs" / f"workerlog.{rank}").read_text()


@pytest.mark.parametrize(
    ("number", "to_group"),
    [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGKILL, False)],
    ids=["ctrl-c", "sigterm", "sigkill"],
)
def test_ranks_save_and_end_with_their_launcher(tmp_path: Path, number: int, to_group: bool) -> None:
    with launched(tmp_path, str(SCRIPT), str(tmp_path)) as launcher:
        wait_until(lambda: len(pids_of(tmp_path)) == 2, 60, "the ranks did not start")
        pids = pids_of(tmp_path)
        time.sleep(0.3)
        (os.killpg if to_group else os.kill)(launcher.pid, number)
        seconds = wait_until(lambda: not any(map(is_alive, pids)), 35, f"ranks are left: {log_of(tmp_path, 0)}")
        launcher.wait(35)
        assert seconds < 10, "short steps end soon"
        assert all((tmp_path / f"saved-{rank}").exists() for rank in (0, 1)), log_of(tmp_path, 0)
        if number == signal.SIGKILL:
            assert f"its launcher (process {launcher.pid}) has ended" in log_of(tmp_path, 0)
        else:
            assert launcher.returncode != 0


def test_ranks_that_never_come_to_the_end_of_a_step_end_with_their_launcher(tmp_path: Path) -> None:
    with launched(tmp_path, str(SCRIPT), str(tmp_path), "busy") as launcher:
        wait_until(lambda: len(pids_of(tmp_path)) == 2, 60, "the ranks did not start")
        pids = pids_of(tmp_path)
        time.sleep(0.3)
        launcher.kill()
        seconds = wait_until(lambda: not any(map(is_alive, pids)), 35, "ranks are left")
        assert 2 < seconds < 10
        assert not (tmp_path / "saved-0").exists()
        assert log_of(tmp_path, 1).count("rank 1 stops because its launcher") == 2, "said at once and at the end"


def test_processes_that_tokenise_end_with_a_killed_rank(tmp_path: Path) -> None:
    program = tmp_path / "tokenise.py"
    program.write_text(
        "import os, pathlib, time\n"
        "from alignment.ppo.data.workers import encode_all\n"
        "def encode(sample):\n"
        f"    pathlib.Path({str(tmp_path)!r}, f'pid-{{os.getpid()}}').write_text(str(os.getpid()))\n"
        "    time.sleep(1)\n"
        "encode_all(encode, range(20000), num_proc=2, show_progress=False)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    process = subprocess.Popen([sys.executable, str(program)], env=environment, start_new_session=True)
    try:
        wait_until(lambda: len(pids_of(tmp_path)) == 2, 60, "the workers did not start")
        process.kill()
        process.wait()
        wait_until(lambda: not any(map(is_alive, pids_of(tmp_path))), 5, "workers are left")
    finally:
        for pid in [process.pid, *pids_of(tmp_path)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_rank_of_a_real_run(tmp_path: Path) -> None:
    """SFT with two ranks; the second is killed between two checkpoints."""
    model = tiny_model_dir(tmp_path / "model")
    rows = write_jsonl(tmp_path / "rows.jsonl", copy_rows(64))
    out = tmp_path / "out"
    values = {
        "model_name_or_path": str(model), "train_datasets": f"jsonl::{rows}", "output_dir": str(out), "max_length": 32,
        "src_length": 16, "per_device_train_batch_size": 1, "max_steps": 2000, "save_steps": 5, "save_total_limit": 2,
        "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "device": "cpu",
    }  # fmt: skip
    (tmp_path / "sft.json").write_text(json.dumps(values))
    with launched(tmp_path, str(REPO / "alignment" / "sft" / "run_sft.py"), str(tmp_path / "sft.json")) as launcher:
        wait_until(lambda: (out / "checkpoint-5").exists(), 120, "no checkpoint: see launcher.log")

        def beat(rank: int) -> dict[str, Any]:
            return json.loads((out / "heartbeat" / f"rank-{rank}.json").read_text())

        # Five steps of a tiny model may lie between two looks at it: what it was last seen in is asked for below.
        wait_until(lambda: beat(1)["phase"] in ("train", "save"), 15, "rank 1 was never seen training")
        pids = [beat(rank)["pid"] for rank in (0, 1)]
        os.kill(pids[1], signal.SIGKILL)
        seconds = wait_until(lambda: not is_alive(pids[0]), 15, "the other rank goes on")
        assert launcher.wait(30) != 0
    assert seconds < 10
    message = log_of(tmp_path, 0)
    assert message.count("[rank 0] error: ") == 1
    assert "rank 1 ended without a word" in message and f"(process {pids[1]}) was last seen" in message
    assert "in phase 'train'" in message or "in phase 'save'" in message
    assert "Traceback" not in message
    assert CheckpointStore(out).latest() is not None
