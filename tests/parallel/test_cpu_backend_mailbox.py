"""The mailbox below the CPU backend, with threads as ranks."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from alignment.parallel import RankFailure
from alignment.parallel.cpu_backend import mailbox as rooms
from alignment.parallel.cpu_backend.collectives import SLICED_FROM, Group
from alignment.parallel.cpu_backend.mailbox import POINT_TO_POINT, Mailbox, connect


class DictStore:
    """A store within one process; ``get`` waits for the key, as Paddle's does."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        with self._changed:
            assert self._changed.wait_for(lambda: key in self._values, timeout=10), key
            return self._values[key].encode()


def run(size: int, body: Callable[[Mailbox], Any], patience: float = 20.0) -> list[Any]:
    """Run ``body(mailbox)`` on ``size`` connected threads; exceptions are returned, not raised."""
    store, results = DictStore(), [None] * size

    def rank_main(rank: int) -> None:
        try:
            box = connect(rank, size, store, "127.0.0.1", patience)
            try:
                results[rank] = body(box)
            finally:
                box.leave(linger=2)
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a rank hangs"
    return results


def test_both_send_much_before_they_receive() -> None:
    size = 30_000_000  # far more than the kernel buffers

    def body(box: Mailbox) -> bool:
        other = 1 - box.rank
        box.send(other, POINT_TO_POINT, 5, "big", np.full(size, box.rank, np.uint8))
        message = box.receive(other, POINT_TO_POINT, 5, "big")
        return message.sender == other and message.payload.size == size and bool((message.payload == other).all())

    assert run(2, body) == [True, True]


def test_channels_and_senders_do_not_mix() -> None:
    def body(box: Mailbox) -> list[int]:
        if box.rank:
            for channel in (7, 8):
                for value in range(2):
                    label = f"{channel}.{value}"
                    box.send(0, POINT_TO_POINT, channel, label, np.array([box.rank * 100 + channel + value], np.uint8))
            return []
        got = []
        for source in (2, 1):
            for channel in (8, 7):
                for value in range(2):
                    message = box.receive(source, POINT_TO_POINT, channel, "x")
                    assert message.label == f"{channel}.{value}"
                    got.append(int(message.payload[0]))
        return got

    assert run(3, body)[0] == [208, 209, 207, 208, 108, 109, 107, 108]


@pytest.mark.parametrize("elements", [1, 3, SLICED_FROM // 4 - 1, SLICED_FROM // 4 + 1, 3 * SLICED_FROM])
def test_sums_have_the_same_bits_on_all_ranks(elements: int) -> None:
    values = np.random.default_rng(0).standard_normal((3, elements)).astype(np.float32)

    def body(box: Mailbox) -> bytes:
        group = Group(box, 1, (0, 1, 2), box.rank)
        return group.all_reduce(values[box.rank].view(np.uint8), "float32", "SUM", "sum").tobytes()

    expected = ((values[0] + values[1]) + values[2]).tobytes()
    assert run(3, body) == [expected] * 3


def test_a_stranger_is_turned_away() -> None:
    store = DictStore()
    boxes: list[Mailbox] = []
    first = threading.Thread(target=lambda: boxes.append(connect(0, 2, store, "127.0.0.1", 20)))
    first.start()
    host, port = store.get("alignment/mailbox/0").decode().split()
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(b"x" * 32 + (1).to_bytes(4, "big"))
        stranger.settimeout(5)
        assert stranger.recv(1) == b""
    with socket.create_connection((host, int(port))) as short:
        short.sendall(b"hello")
    second = connect(1, 2, store, "127.0.0.1", 20)
    first.join(10)
    second.send(0, POINT_TO_POINT, 0, "hello", np.ones(1, np.uint8))
    assert boxes[0].receive(1, POINT_TO_POINT, 0, "hello").payload[0] == 1
    leaving = threading.Thread(target=boxes[0].leave)
    leaving.start()
    second.leave()
    leaving.join(5)
    assert not leaving.is_alive()


def test_a_rank_that_never_comes_is_named() -> None:
    with pytest.raises(RankFailure, match=r"rank 0 waited 0 s for rank 1, 2 to join the run"):
        connect(0, 3, DictStore(), "127.0.0.1", 0.2)


def test_what_was_sent_before_leaving_arrives() -> None:
    def body(box: Mailbox) -> Any:
        if box.rank == 1:
            box.send(0, POINT_TO_POINT, 0, "last", np.full(5_000_000, 7, np.uint8))
            return None
        time.sleep(0.3)
        assert (box.receive(1, POINT_TO_POINT, 0, "last").payload == 7).all()
        with pytest.raises(RankFailure, match="rank 1 has finished while other ranks still work"):
            box.receive(1, POINT_TO_POINT, 0, "more")
        with pytest.raises(RankFailure, match="rank 1 has finished"):
            box.send(1, POINT_TO_POINT, 0, "more", np.ones(1, np.uint8))
        return "all"

    assert run(2, body)[0] == "all"


def test_after_leaving_nothing_can_be_sent() -> None:
    def body(box: Mailbox) -> str:
        box.leave(linger=1)
        with pytest.raises(RankFailure, match="it has already left the run"):
            box.send(1 - box.rank, POINT_TO_POINT, 0, "more", np.ones(1, np.uint8))
        box.leave()
        return "left"

    assert run(2, body) == ["left", "left"]


def test_a_failure_reaches_ranks_that_wait_for_others() -> None:
    def body(box: Mailbox) -> None:
        if box.rank == 2:
            time.sleep(0.2)
            box.leave("MemoryError: full")
        else:
            box.receive(1 - box.rank, POINT_TO_POINT, 0, "a long wait")

    first, second, _ = run(3, body)
    for rank, error in enumerate((first, second)):
        assert str(error) == f"rank {rank} stops in a long wait because rank 2 failed: MemoryError: full"


def test_a_long_wait_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(rooms, "_NOTICE_AFTER", 0.1)

    def body(box: Mailbox) -> None:
        if box.rank:
            time.sleep(0.3)
            box.send(0, POINT_TO_POINT, 0, "x", np.ones(1, np.uint8))
        else:
            box.receive(1, POINT_TO_POINT, 0, "a slow step")

    assert run(2, body) == [None, None]
    assert "has waited 0 s for rank 1 in a slow step" in capsys.readouterr().err
