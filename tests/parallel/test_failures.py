"""What happens to the other ranks when one dies, hangs, fails or gets out of step."""

from __future__ import annotations

import json
import os
import re
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment.flow.checkpoint import CheckpointStore
from alignment.parallel.heartbeat import Beat, Member, write_beat
from alignment.parallel.last_seen import LastSeen
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


@pytest.mark.parametrize("backend", [False, True], ids=["gloo", "mailbox"])
def test_a_killed_rank_is_named_with_host_and_phase(tmp_path: Path, backend: bool) -> None:
    result = run(3, "die", tmp_path, "collective", backend=backend)
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
    result = run(3, "hang", tmp_path, "collective", backend=backend, hang_timeout=1.0)
    for rank in (0, 2):
        message, seconds = stopped(result, tmp_path, rank)
        assert 1 < seconds < 11
        assert f"rank 1 on host {socket.gethostname()} (process {pid_of(tmp_path, 1)})" in message
        assert "in phase 'generate'" in message and "optimizer step 3" in message
        assert "hang_timeout is 1 s" in message
    message, seconds = stopped(result, tmp_path, 1)
    assert seconds < 14, "the one that hangs ends too"
    assert "hang_timeout is 1 s" in message


def test_a_stopped_process_counts_as_hanging(tmp_path: Path) -> None:
    result = run(2, "hang", tmp_path, "exchange", "stop", hang_timeout=1.0)
    message, seconds = stopped(result, tmp_path, 0)
    assert seconds < 12
    assert "rank 1 on host" in message and "in phase 'generate'" in message


def test_a_run_that_stands_still_ends(tmp_path: Path) -> None:
    result = run(2, "stand_still", tmp_path, hang_timeout=1.0)
    for rank in (0, 1):
        message, seconds = stopped(result, tmp_path, rank)
        assert seconds < 12
        assert "no rank has moved for 1 s" in message
        assert "rank 0 on host" in message and "rank 1 on host" in message
        assert "in phase 'update'" in message


def test_a_slow_rank_that_works_is_waited_for(tmp_path: Path) -> None:
    assert [value["message"] for value in run(2, "be_slow", tmp_path, hang_timeout=1.0).check()] == [None, None]


def test_a_long_save_is_waited_for(tmp_path: Path) -> None:
    """A5: as long as it writes."""
    assert [value["message"] for value in run(2, "save", tmp_path, "works", hang_timeout=1.0).check()] == [None, None]


def test_a_save_that_hangs_ends_the_run(tmp_path: Path) -> None:
    """A5: a save that neither computes nor writes is one."""
    result = run(2, "save", tmp_path, "hangs", hang_timeout=1.0)
    message, seconds = stopped(result, tmp_path, 1)
    assert 1 < seconds < 12
    assert "rank 0 on host" in message and "in phase 'save'" in message and "hang_timeout is 1 s" in message


def test_ranks_that_wait_for_a_gpu_name_the_one_that_computes(tmp_path: Path) -> None:
    """A12: a rank that does not move while another one does waits for it, wherever it stands."""
    result = run(3, "one_computes_while_others_are_blocked", tmp_path, hang_timeout=1.0)
    for rank in (0, 2):
        message, seconds = stopped(result, tmp_path, rank)
        assert 1 < seconds < 14
        assert f"rank 1 on host {socket.gethostname()} (process {pid_of(tmp_path, 1)})" in message
        assert re.search(r"; rank [02] has waited \d+ s in a call at \S*tests/parallel/failure_jobs.py:\d+", message)
        assert not re.search(r"rank [02] on host", message), "those that wait are not to blame"
    stopped(result, tmp_path, 1)


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
    result = run(2, "hang", tmp_path, "exchange", shared=False, hang_timeout=1.0)
    message, seconds = stopped(result, tmp_path, 0)
    assert seconds < 12
    assert "one of these does not come: rank 1 on host" in message and "last phase unknown" in message


def test_a_rank_that_computes_stops_and_the_checkpoints_stay_whole(tmp_path: Path) -> None:
    result = run(2, "die_while_another_saves", tmp_path)
    message, seconds = stopped(result, tmp_path, 0)
    assert KILLED in result.errors[0] and seconds < 10
    assert "rank 1 ended without a word" in message and "in phase 'save'" in message
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


def test_a_reward_function_that_hangs_is_named_in_a_whole_run(tmp_path: Path) -> None:
    result = try_ranks(2, failure_jobs.ppo_with_a_reward_that_hangs, str(tmp_path), timeout=60)
    for rank, text in ((0, result.errors[0]), (1, result.output[1])):
        assert f"rank {rank} stops because rank 1 on host {socket.gethostname()}" in text, text
        assert "in phase 'reward_scores'" in text and "optimizer step 0" in text
        assert f"at {tmp_path / 'hanging_reward.py'}:7 (wait_for_a_service)" in text
        assert "rank 0 has waited" in text and "(hang_timeout is 3 s) for it" in text
    assert KILLED in result.errors[1] and "RankFailure" in result.errors[0]


@pytest.mark.parametrize(
    ("text", "blamed"),
    [
        ("rank 0 stops because rank 2 failed: ValueError: no data in shard 7", [2]),
        ("rank 0 stops in all_reduce float32 64 SUM because rank 1 ended without a word (killed, or ...?)", [1]),
        ("rank 0 stops because rank 1 has finished while other ranks still work", [1]),
        ("the ranks lost step with each other: rank 0 at 'sum', rank 1 at 'barrier', rank 2 at 'sum'", [1, 2]),
        ("rank 0 stops in recv because rank 3 did not get there within 60 s", [3]),
        ("rank 0 stops in send because its connection to rank 2 broke ([Errno 32] Broken pipe)", [2]),
        ("rank 0: summing gradients over 4 ranks failed: timeout", []),
        ("rank 0 stops because rank 7 failed: of another run", []),
    ],
)
def test_whom_a_message_blames(text: str, blamed: list[int]) -> None:
    members = [Member(rank, "host", 10 + rank, "machine", 1, 0.0) for rank in range(4)]
    seen = LastSeen(None, members, 0)
    assert seen.blamed(text) == blamed
    explained = seen.explain(text)
    assert explained.splitlines()[1:] == [
        f"  rank {rank} on host host (process {10 + rank}): its last phase is unknown, no heartbeats are written"
        for rank in blamed
    ]
    assert seen.explain(explained) == explained


def test_why_a_rank_has_ended(tmp_path: Path) -> None:
    members = [Member(rank, "host", 10 + rank, "machine", 1, 0.0) for rank in range(2)]
    seen = LastSeen(tmp_path, members, 0)
    beat = Beat(1, "host", 11, "update", 3, 1.5, None, "a.py:1 (f)", 0.5, "running", "", 4, 100.0)
    assert seen.ended(members[1]) == "rank 1 ended without a word (killed, or out of memory?)"
    for state, error, expected in [
        ("running", "", "rank 1 ended without a word (killed, or out of memory?)"),
        ("failed", "ValueError: no", "rank 1 failed: ValueError: no"),
        ("stopped", "rank 0 failed: ValueError: no", "rank 0 failed: ValueError: no"),
        ("finished", "", "rank 1 has finished while other ranks still work"),
    ]:
        write_beat(tmp_path, replace(beat, state=state, error=error))
        assert seen.ended(members[1]) == expected
    write_beat(tmp_path, replace(beat, pid=99))  # left by an earlier run
    assert seen.read(members[1]) is None
