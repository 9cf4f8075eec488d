"""A13: nobody waits for ever for a rank that does not come into the run, or fails on its way."""

from __future__ import annotations

import re
import socket
import threading
import time

import pytest

from alignment.parallel.joining import answer_the_roll, call_the_roll
from tests.parallel import joining_jobs
from tests.parallel.forked import run_ranks, try_ranks


def test_all_come() -> None:
    assert run_ranks(2, joining_jobs.come_or_not, "comes", 30.0) == ["met 2", "met 2"]


def test_a_rank_that_stays_away_is_named() -> None:
    """A13: with the address that the launcher gave it."""
    result = try_ranks(3, joining_jobs.come_or_not, "stays away", 2.0, timeout=30)
    assert 2 < result.seconds < 25 and set(result.errors) == {0, 2}
    for rank in (0, 2):
        assert re.search(
            rf"RankFailure: rank {rank} stops because rank 1 \(127\.0\.0\.1:\d+\) did not join the run within 2 s "
            r"\(join_timeout\)", result.errors[rank],
        ), result.errors[rank]  # fmt: skip


def test_ranks_that_do_not_reach_each_other_are_told() -> None:
    """A13: all are there, but one goes no further."""
    result = try_ranks(3, joining_jobs.come_or_not, "is silent", 2.0, timeout=40)
    assert set(result.errors) == {0, 1, 2} and result.seconds < 25
    told = [rank for rank in range(3) if "found rank 0, but not each other within 2 s" in result.output[rank]]
    assert {1, 2} & set(told), result.output


def test_a_failure_while_joining_ends_the_others() -> None:
    """A13: at once, with the error, long before the deadline."""
    result = try_ranks(2, joining_jobs.come_or_not, "fails", 60.0, timeout=30)
    assert result.seconds < 15
    assert "could not join the process group" in result.errors[1] and "Connection refused" in result.errors[1]
    assert re.search(
        r"\[rank 0\] error: rank 0 stops because rank 1 \(127\.0\.0\.1:\d+\) failed while it joined the run: rank 1 "
        r"of 2 could not join the process group: .*Connection refused", result.output[0],
    ), result.output[0]  # fmt: skip


def test_a_rank_0_that_never_comes_is_named() -> None:
    result = try_ranks(2, joining_jobs.without_rank_0, 2.0, timeout=30)
    assert re.search(
        r"rank 1 stops because rank 0 \(127\.0\.0\.1:\d+\) has not called the roll at 127\.0\.0\.1:\d+ within 2 s",
        result.errors[1],
    ), result.errors[1]


def test_strangers_and_ranks_that_go_again_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A13, A16: only who stays is here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("PADDLE_MASTER", f"127.0.0.1:{port}")
    monkeypatch.setattr("alignment.parallel.joining._GREETING", 0.3)
    ended: list[str] = []
    thread = threading.Thread(target=lambda: (call_the_roll(3, 20.0), ended.append("all here")))
    thread.start()
    silent, gone = (connect(port) for _ in range(2))
    gone.sendall(b"alignment/join" + (1).to_bytes(4, "big"))
    gone.close()
    silent.sendall(b"GET / HTTP/1.1\r\n\r\n")
    second = threading.Thread(target=answer_the_roll, args=(2, 20.0))
    second.start()
    time.sleep(0.7)
    assert not ended
    answer_the_roll(1, 20.0)
    for each in (thread, second):
        each.join(5)
    assert ended == ["all here"]
    silent.close()
    socket.create_server(("", port)).close()  # free for the store


def connect(port: int) -> socket.socket:
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except OSError:
            time.sleep(0.01)
