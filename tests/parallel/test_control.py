"""The meeting place of the processes, here with threads as ranks."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from alignment.parallel import ControlChannel, RankFailure, Topology, World


def run_ranks(
    size: int, body: Callable[[World], Any], channel_class: type[ControlChannel] = ControlChannel
) -> list[Any]:
    """Run ``body(world)`` on ``size`` threads that meet through a real channel; exceptions are returned, not raised."""
    results: list[Any] = [None] * size
    ports: list[int] = []
    ready = threading.Event()

    def rank_main(rank: int) -> None:
        if rank == 0:
            channel = channel_class(0, size, "127.0.0.1", "token")
            ports.append(channel.port)
            ready.set()
        else:
            ready.wait(10)
            channel = channel_class(rank, size, "127.0.0.1", "token", ports[0])
        world = World(Topology(size, rank), rank, channel)
        try:
            with world.guard():
                results[rank] = body(world)
            world.close()
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "a rank hangs"
    return results


@pytest.mark.parametrize("size", [2, 4])
def test_collectives(size: int) -> None:
    def body(world: World) -> Any:
        world.barrier()
        array = world.sum(np.array([world.rank, 1], dtype=np.int64))
        wide = world.sum(np.full(3, 0.1, np.float32))
        return (
            world.all_gather_object({"rank": world.rank}),
            world.broadcast_object("hello" if world.rank == 1 else None, src=1),
            world.sum(world.rank + 0.5),
            world.sum(world.rank),
            array.tolist(),
            wide.dtype == np.float32 and np.allclose(wide, 0.1 * size),
            world.any(world.rank == 1),
            world.any(False),
        )

    total = size * (size - 1) // 2
    expected = (
        [{"rank": r} for r in range(size)], "hello", total + size / 2, total, [total, size], True, True, False,
    )  # fmt: skip
    assert run_ranks(size, body) == [expected] * size


def test_a_late_rank_is_waited_for() -> None:
    def body(world: World) -> int:
        if world.rank == 1:
            time.sleep(0.5)
        return world.sum(1)

    assert run_ranks(2, body) == [2, 2]


def test_a_failing_rank_is_named_with_its_error() -> None:
    def body(world: World) -> None:
        if world.rank == 2:
            raise ValueError("no data in shard 7")
        world.barrier()

    first, second, third = run_ranks(3, body)
    assert isinstance(third, ValueError)
    for rank, error in enumerate((first, second)):
        assert isinstance(error, RankFailure)
        assert str(error) == f"rank {rank} stops because rank 2 failed: ValueError: no data in shard 7"


def test_a_failure_of_rank_0_reaches_the_others() -> None:
    def body(world: World) -> None:
        if world.rank == 0:
            raise MemoryError("full")
        time.sleep(0.2)
        world.barrier()

    _, other = run_ranks(2, body)
    assert isinstance(other, RankFailure)
    assert "rank 0 failed: MemoryError: full" in str(other)


def test_a_vanished_rank_is_noticed() -> None:
    def body(world: World) -> None:
        if world.rank == 1:
            world.channel._connection.close()  # as the kernel does for a killed process
            world.channel._open = False
            world.channel = None
            return
        world.barrier()

    first, _ = run_ranks(2, body)
    assert isinstance(first, RankFailure)
    assert "rank 1 ended without a word" in str(first)


def test_ranks_that_lost_step_are_told_where_they_are() -> None:
    def body(world: World) -> None:
        world.barrier() if world.rank else world.sum(1)

    for error in run_ranks(2, body):
        assert isinstance(error, RankFailure)
        assert "lost step" in str(error) and "rank 0 at 'sum', rank 1 at 'barrier'" in str(error)


def test_a_rank_that_finished_early_is_named() -> None:
    def body(world: World) -> None:
        if world.rank == 1:
            world.channel.close()
            world.channel = None
            return
        world.barrier()

    first, _ = run_ranks(2, body)
    assert isinstance(first, RankFailure)
    assert "rank 1 has finished while other ranks still work" in str(first)


def test_a_stranger_is_dropped() -> None:
    channel: list[ControlChannel] = []
    thread = threading.Thread(target=lambda: channel.append(ControlChannel(0, 2, "127.0.0.1", "secret")))
    thread.start()
    thread.join(5)
    stranger = socket.create_connection(("127.0.0.1", channel[0].port))
    stranger.sendall(b"wrong!" + (1).to_bytes(8, "big"))
    assert stranger.recv(1) == b""
    other = ControlChannel(1, 2, "127.0.0.1", "secret", channel[0].port)
    results: list[Any] = []
    meet = threading.Thread(target=lambda: results.append(channel[0].exchange("x", 1)))
    meet.start()
    assert other.exchange("x", 2) == [1, 2]
    meet.join(5)
    assert results == [[1, 2]]
    other.close()
    channel[0].close()


def test_a_stranger_that_says_nothing_does_not_stop_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A16: port scanners and health checks connect and wait."""
    monkeypatch.setattr("alignment.parallel.control._GREETING", 0.3)
    strangers: list[socket.socket] = []

    class Watched(ControlChannel):
        def __init__(self, rank: int, size: int, host: str, token: str, port: int | None = None) -> None:
            if rank == 1:
                assert port is not None
                strangers.append(socket.create_connection((host, port)))
                time.sleep(0.1)
            super().__init__(rank, size, host, token, port)

    began = time.monotonic()
    assert run_ranks(2, lambda world: world.sum(1), Watched) == [2, 2]
    assert time.monotonic() - began < 5
    for stranger in strangers:
        stranger.close()


class Unreadable:
    """Fails while it is unpickled, as an object of another version's class does."""

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, ("text", "what_is_not_there")


def test_what_cannot_be_read_fails_the_run() -> None:
    """A17: nobody waits for a server thread that has died."""

    def body(world: World) -> None:
        world.all_processes(Unreadable() if world.rank == 1 else None, "news")

    for rank, error in enumerate(run_ranks(2, body)):
        assert isinstance(error, RankFailure), error
        assert f"rank {rank} stops because what rank 1 sent cannot be read here (AttributeError:" in str(error)
        assert "do all hosts run the same code?" in str(error)


class TooLarge:
    """Can be read once; what is made of it cannot be sent again."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _reading, ()


class _Full:
    def __reduce__(self) -> tuple[Any, ...]:
        raise MemoryError("no room for what was gathered")


def _reading() -> _Full:
    return _Full()


def test_a_server_that_fails_answers_everybody() -> None:
    """A17: for example for want of memory, when it hands out what it has gathered."""

    def body(world: World) -> None:
        world.all_processes(TooLarge(), "news")

    for error in run_ranks(2, body):
        assert isinstance(error, RankFailure), error
        assert "rank 0's control server failed: MemoryError: no room for what was gathered" in str(error)


def test_one_process_needs_no_channel() -> None:
    world = World()
    world.barrier()
    assert world.is_main and world.sum(3) == 3 and world.all_gather_object("x") == ["x"]
    world.close()
