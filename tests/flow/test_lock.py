"""One run at a time in a folder, and no lock outlives its run for long."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from alignment.arguments import parse_sft
from alignment.errors import ArgumentsError, CheckpointError
from alignment.flow.lock import RunLock
from alignment.flow.output import claimed
from alignment.parallel import World
from alignment.paths import LOCK
from tests.parallel.test_control import run_ranks

REPO = Path(__file__).resolve().parents[2]
HOLDER = """import sys, time
from alignment.flow.lock import RunLock
with RunLock(sys.argv[1], beat=0.1):
    print("held", flush=True)
    time.sleep(60)
"""


def held_by_another_process(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], cwd=REPO, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    return process


def write_lock(folder: Path, **changes: Any) -> None:
    """A lock as another process would have left it."""
    with RunLock(folder) as lock:
        fields = json.loads(lock.path.read_text())
    (folder / LOCK).write_text(json.dumps({**fields, "id": "other", **changes}) + "\n")


def test_a_second_run_is_told_who_has_the_folder(tmp_path: Path) -> None:
    """A4: it is refused with host, process and time, and the first one's files stay."""
    process = held_by_another_process(tmp_path / "run")
    try:
        with pytest.raises(ArgumentsError) as caught, RunLock(tmp_path / "run"):
            pass
    finally:
        process.kill()
        process.wait()
    text = str(caught.value)
    assert f"output_dir {tmp_path / 'run'} is in use by process {process.pid} on host " in text
    assert time.strftime("since %Y-%m-%d %H:") in text and f"`kill {process.pid}` ends it" in text
    assert "choose another output_dir" in text
    began = time.monotonic()
    with RunLock(tmp_path / "run"):
        assert time.monotonic() - began < 2, "a killed run's lock blocks nobody on its own host"
        assert [entry.name for entry in (tmp_path / "run").iterdir()] == [LOCK]
    assert list((tmp_path / "run").iterdir()) == []


def test_a_process_id_used_again_is_no_holder(tmp_path: Path) -> None:
    write_lock(tmp_path, started=1)
    with RunLock(tmp_path):
        pass


def test_another_host_counts_as_long_as_it_gives_signs_of_life(tmp_path: Path) -> None:
    """A4: its process cannot be looked up from here."""
    write_lock(tmp_path, machine="another", host="elsewhere")
    path, done = tmp_path / LOCK, threading.Event()

    def touch() -> None:
        while not done.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(ArgumentsError, match=r"on host elsewhere, since .*end it there"), RunLock(tmp_path):
            pass
    finally:
        done.set()
        thread.join()
    began = time.monotonic()
    with RunLock(tmp_path, beat=0.1, stale=0.5):
        assert time.monotonic() - began > 0.3
    write_lock(tmp_path, machine="another")
    os.utime(path, (1e9, 1e9))
    began = time.monotonic()
    with RunLock(tmp_path):
        assert time.monotonic() - began < 2, "it has given no sign of life for long"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id": "x"}'])
def test_a_lock_that_was_cut_short_blocks_nobody_for_long(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_text(text)
    with RunLock(tmp_path, beat=0.1, stale=0.3):
        pass
    assert not (tmp_path / LOCK).exists()


def test_of_many_starts_one_has_the_folder(tmp_path: Path) -> None:
    """A4: also where all find the lock of a run that has ended."""
    write_lock(tmp_path, started=1)
    inside, most, refused, everybody = [0], [0], [0], threading.Barrier(8)
    guard = threading.Lock()

    def start() -> None:
        everybody.wait()
        try:
            with RunLock(tmp_path):
                with guard:
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                time.sleep(0.3)
                with guard:
                    inside[0] -= 1
        except ArgumentsError:
            refused[0] += 1

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most[0], refused[0]) == (1, 7)


def test_a_run_whose_folder_was_taken_over_ends(tmp_path: Path) -> None:
    """A4: one that was stopped for so long that another host has started writes nothing any more."""
    ended: list[int] = []
    with RunLock(tmp_path, beat=0.05, end=ended.append) as lock:
        lock.path.unlink()
        time.sleep(0.3)
        assert lock.path.exists() and not ended, "a deleted lock is made again"
        write = json.loads(lock.path.read_text())
        lock.path.write_text(json.dumps({**write, "id": "other"}))
        time.sleep(0.3)
        assert ended == [2]
    assert json.loads(lock.path.read_text())["id"] == "other", "what is another's stays"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="choose another output_dir"), RunLock(tmp_path / "file" / "run"):
        pass


def arguments(folder: Path, *words: str) -> Any:
    return parse_sft([
        "model_name_or_path=m", "train_datasets=jsonl::x.jsonl", f"output_dir={folder}", "device=cpu", *words,
    ])  # fmt: skip


def test_a_dry_run_leaves_nothing(tmp_path: Path) -> None:
    with claimed(arguments(tmp_path / "run", "dry_run=true"), World()):
        assert not (tmp_path / "run").exists()


def test_hosts_without_a_shared_disk_are_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A15: and not at the resume, when it is too late."""
    monkeypatch.setattr("alignment.flow.output.SHARED_WITHIN", 0.3)
    monkeypatch.chdir(tmp_path)
    args = arguments(Path("run"))

    def start(world: World) -> str:
        with claimed(args, world):
            world.barrier()
            return "together"

    assert run_ranks(3, start) == ["together"] * 3

    def start_elsewhere(world: World) -> str:
        class Blind(World):
            """A rank on whose host the path leads to another folder."""

            def broadcast_object(self, value: Any, src: int = 0) -> Any:
                path, text = super().broadcast_object(value, src)
                return (tmp_path / "private" / path.name, text) if self.process == 2 else (path, text)

        return start(Blind(world.topology, channel=world.channel))

    for error in run_ranks(3, start_elsewhere):
        assert isinstance(error, ArgumentsError)
        assert "is not the same folder for all processes" in str(error)
        assert "is not seen by rank 2 on host" in str(error) and "a disk that all hosts share" in str(error)


def test_a_killed_run_is_resumed_at_once(tmp_path: Path) -> None:
    """A4: through the command: SIGKILL, then the same command again, which must not find its own old lock."""
    from tests.flow.disk_jobs import write_arguments

    file = write_arguments("sft", tmp_path)
    command = [sys.executable, "-m", "alignment", "sft", str(file), "save_steps=1"]
    process = subprocess.Popen([*command, "max_steps=100000"], cwd=REPO, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "checkpoint-2").is_dir():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        second = subprocess.run([*command, "overwrite_output_dir=true"], cwd=REPO, capture_output=True, text=True)
        assert second.returncode == 2 and f"is in use by process {process.pid} on host" in second.stderr
        assert process.poll() is None and (tmp_path / "run" / "checkpoint-2" / "manifest.json").exists()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / "run" / LOCK).exists()
    last = max(int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*"))
    shutil.rmtree(tmp_path / "run" / "heartbeat", ignore_errors=True)
    again = subprocess.run(
        [*command, f"max_steps={last + 1}", "resume_from_checkpoint=true"], cwd=REPO, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr[-2000:]
    assert not (tmp_path / "run" / LOCK).exists()
