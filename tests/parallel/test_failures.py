"""What happens to the other ranks when one dies, hangs, fails or gets out of step."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from alignment.training.checkpoint import CheckpointStore
from tests.parallel import failure_jobs
from tests.parallel.forked import JobResult, try_ranks

KILLED = "ended without a result"


def run(size: int, body: str, folder: Path, *words: Any, **options: Any) -> JobResult:
    return try_ranks(size, failure_jobs.watched, body, str(folder), *words, timeout=40, **options)


def stopped(result: JobResult, folder: Path, rank: int) -> tuple[str, float]:
    """The one message of a rank that has stopped, and how long after the trouble began."""
    began = float((folder / "began").read_text())
    ended = folder / f"ended-{rank}"
    if ended.exists():
        when, status = ended.read_text().split()
        assert int(status) == 2
        output = result.output[rank]
        assert output.count(f"[rank {rank}] error: ") == 1, output
        return output.split(f"[rank {rank}] error: ")[1], float(when) - began
    assert rank not in result.errors, result.errors
    return result.values[rank]["message"], result.values[rank]["time"] - began


def pid_of(folder: Path, rank: int) -> int:
    return json.loads((folder / "heartbeat" / f"rank-{rank}.json").read_text())["pid"]


@pytest.mark.parametrize(
    ("how", "backend"),
    [("collective", False), ("collective", True), ("compute", False)],
    ids=["gloo", "mailbox", "compute"],
)
def test_a_killed_rank_is_named_with_host_and_phase(tmp_path: Path, how: str, backend: bool) -> None:
    result = run(3, "die", tmp_path, how, backend=backend)
    assert KILLED in result.errors[1]
    for rank in (0, 2):
        message, seconds = stopped(result, tmp_path, rank)
        assert seconds < 10
        assert "rank 1 ended without a word" in message
        assert f"rank 1 on host {socket.gethostname()} (process {pid_of(tmp_path, 1)}) was last seen" in message
        assert re.search(r"in phase 'update' \(for \d+ s, optimizer step 7\)", message), message
        assert re.search(r", at \S*tests/parallel/failure_jobs.py:\d+ \(<lambda>\)", message), message


@pytest.mark.parametrize("backend", [False, True], ids=["gloo", "mailbox"])
def test_a_hanging_rank_ends_the_run(tmp_path: Path, backend: bool) -> None:
    result = run(3, "hang", tmp_path, "collective", backend=backend, hang_timeout=1.5)
    for rank in (0, 2):
        message, seconds = stopped(result, tmp_path, rank)
        assert 1.5 < seconds < 11.5
        assert f"rank 1 on host {socket.gethostname()} (process {pid_of(tmp_path, 1)})" in message
        assert "in phase 'generate'" in message and "optimizer step 3" in message
        assert "hang_timeout is 1.5 s" in message
    message, seconds = stopped(result, tmp_path, 1)
    assert seconds < 14, "the one that hangs ends too"
    assert "hang_timeout is 1.5 s" in message


def test_a_stopped_process_counts_as_hanging(tmp_path: Path) -> None:
    result = run(2, "hang", tmp_path, "exchange", "stop", hang_timeout=1.5)
    message, seconds = stopped(result, tmp_path, 0)
    assert seconds < 12
    assert "rank 1 on host" in message and "in phase 'generate'" in message


def test_a_run_that_stands_still_ends(tmp_path: Path) -> None:
    result = run(2, "stand_still", tmp_path, hang_timeout=1.5)
    for rank in (0, 1):
        message, seconds = stopped(result, tmp_path, rank)
        assert seconds < 12
        assert "no rank has moved for 1.5 s" in message
        assert "rank 0 on host" in message and "rank 1 on host" in message
        assert "in phase 'update'" in message


def test_a_slow_rank_that_works_is_waited_for(tmp_path: Path) -> None:
    assert [value["message"] for value in run(2, "be_slow", tmp_path, hang_timeout=1.0).check()] == [None, None]


def test_an_error_reaches_a_rank_that_computes(tmp_path: Path) -> None:
    result = run(2, "raise_error", tmp_path, "compute")
    assert "DataError: shard 7 has no rows" in result.errors[1]
    message, seconds = stopped(result, tmp_path, 0)
    assert seconds < 10
    assert "rank 1 failed: DataError: shard 7 has no rows" in message
    assert "rank 1 on host" in message and "in phase 'data'" in message


def test_ranks_out_of_step_are_told_where_the_others_are(tmp_path: Path) -> None:
    values = run(2, "lose_step", tmp_path).check()
    for rank, value in enumerate(values):
        assert "lost step" in value["message"] and "rank 0 at 'sum', rank 1 at 'barrier'" in value["message"]
        phase = ("evaluate", "train")[rank]
        assert f"rank {1 - rank} on host" in value["message"] and f"in phase '{phase}'" in value["message"]


def test_without_a_shared_file_system_the_phase_is_said_to_be_unknown(tmp_path: Path) -> None:
    result = run(2, "die", tmp_path, "exchange", shared=False)
    message = result.values[0]["message"]
    assert f"rank 1 on host {socket.gethostname()} (process " in message
    assert "its last phase is unknown" in message


def test_without_a_shared_file_system_a_hang_names_the_hosts(tmp_path: Path) -> None:
    result = run(2, "hang", tmp_path, "exchange", shared=False, hang_timeout=1.5)
    message, seconds = stopped(result, tmp_path, 0)
    assert seconds < 12
    assert "one of these does not come: rank 1 on host" in message and "last phase unknown" in message


def test_the_checkpoints_stay_whole(tmp_path: Path) -> None:
    result = run(2, "die_while_another_saves", tmp_path)
    assert KILLED in result.errors[0] and "phase 'save'" in result.output[0]
    latest = CheckpointStore(tmp_path / "run").latest()
    assert latest is not None and latest.name == "checkpoint-1"
    assert (latest / "weights").read_text() == "whole"


def test_a_run_that_ends_well_leaves_its_last_heartbeats(tmp_path: Path) -> None:
    folder = tmp_path / "heartbeat"
    folder.mkdir()
    (folder / "rank-5.json").write_text("{}")  # an earlier run had more ranks
    assert [value["message"] for value in run(2, "work", tmp_path).check()] == [None, None]
    assert sorted(os.listdir(folder)) == ["rank-0.json", "rank-1.json"]
    for rank in (0, 1):
        beat = json.loads((folder / f"rank-{rank}.json").read_text())
        assert (beat["rank"], beat["state"], beat["phase"], beat["host"]) == (
            rank, "finished", "end", socket.gethostname(),
        )  # fmt: skip
        assert beat["beats"] >= 2 and beat["error"] == ""


def test_heartbeats_that_cannot_be_written_do_not_stop_a_run(tmp_path: Path) -> None:
    (tmp_path / "heartbeat").write_text("a file in the way")
    assert [value["message"] for value in run(2, "work", tmp_path).check()] == [None, None]
