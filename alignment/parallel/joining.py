"""`Joining`: nobody waits for ever for a rank that does not come, or that failed while it joined the run.

Before there are process groups and a control channel, ranks wait for each other inside Paddle, rank 0 for fifteen
minutes and without a word about whom. So, first, rank 0 calls the roll, at the address at which Paddle's store opens
afterwards: whoever is missing after ``timeout`` is named to everybody. Then a thread beside the one that joins looks at
the store twice a second: when a rank publishes that it failed, or the time is up, the process ends and says why.

    with Joining(rank, size, timeout=300):
        ...                                   # process groups, control channel
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from alignment.parallel.control import RankFailure
from alignment.parallel.cpu_backend.rendezvous import master_endpoint
from alignment.parallel.monitor import EXIT_FAILURE, say
from alignment.parallel.world import FOR_EVER

POLL = 0.5  # seconds between two looks
_HELLO = struct.Struct("!14sI")  # a word of this toolkit's, the rank
_WORD = b"alignment/join"
_ANSWER = struct.Struct("!I")  # bytes of the text that follows: why not; 0 for "all are here"
_GREETING = 5.0  # seconds for whoever connects to say who it is
_STORE_TIMEOUT = 30  # seconds for an answer of the store, which is up
_LINGER = 2.0  # seconds for the others to hear why rank 0, whose process is the store, gives up
_LAST_RESORT = 5.0  # seconds after which a process ends that cannot even run the thread


class Joining:
    """Watches this process while it joins, for as long as it is entered. Every rank enters it.

    Args:
        rank, size: this process and the number of processes.
        timeout: seconds for all ranks to join; 0 for ever.
        end: ends the process with a status.
    """

    def __init__(self, rank: int, size: int, timeout: float, *, end: Callable[[int], object] = os._exit) -> None:
        self._rank, self._size, self._timeout, self._end = rank, size, timeout or FOR_EVER, end
        self._deadline = time.monotonic() + self._timeout
        self._closed = threading.Event()
        self._error: str | None = None
        self._thread = threading.Thread(target=self._watch, name="alignment-joining", daemon=True)

    def __enter__(self) -> Joining:
        """Wait until all ranks are here.

        Raises:
            RankFailure: some are not after ``timeout``; the text names them.
        """
        if self._rank == 0:
            call_the_roll(self._size, self._timeout)
        else:
            answer_the_roll(self._rank, self._timeout)
        self._thread.start()
        if self._timeout < FOR_EVER and sys.__stderr__ is not None:
            # Some calls of Paddle's let no other thread of Python's run.
            left = max(0.0, self._deadline - time.monotonic()) + _LAST_RESORT
            faulthandler.dump_traceback_later(left, exit=True, file=sys.__stderr__)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._error = f"{address_of(self._rank)} failed while it joined the run: {error}"
        self._closed.set()
        self._thread.join(POLL + _LINGER)
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        try:
            host, port = master_endpoint()
            while not self._closed.is_set() and not _is_open(host, port):
                self._closed.wait(0.1)  # asked for too early, Paddle's client would sleep for seconds
            if self._closed.is_set() and self._error is None:
                return
            from paddle.base import core

            store = core.TCPStore(host, port, False, 0, _STORE_TIMEOUT)
            reason = None
            while reason is None and not self._closed.wait(POLL):
                # A counter can be read without waiting for somebody to set it.
                if store.add("alignment/join/failures", 0):
                    reason = bytes(store.get("alignment/join/failure")).decode()
                elif time.monotonic() > self._deadline:
                    reason = (
                        f"the processes have found rank 0, but not each other within {self._timeout:.0f} s "
                        "(join_timeout): can all hosts reach each other on all ports, and does each one's name lead to "
                        "an address that the others can reach?"
                    )
            if reason is not None:
                say(self._rank, f"rank {self._rank} stops because {reason}")
            if reason or self._error:
                store.set("alignment/join/failure", reason or self._error)
                store.add("alignment/join/failures", 1)
                time.sleep(_LINGER if self._rank == 0 else 0.0)
            if reason is not None:
                self._end(EXIT_FAILURE)
        except Exception as error:
            # The store is a part of rank 0's process.
            if not self._closed.is_set():
                say(self._rank, f"{address_of(0)} has ended while the others joined the run, see its log ({error})")
                self._end(EXIT_FAILURE)


def call_the_roll(size: int, timeout: float) -> None:
    """Wait, on rank 0, until every other rank has said that it is here, then tell them all.

    Args:
        size: number of processes.
        timeout: seconds.

    Raises:
        RankFailure: some are missing; those that are here hear it, too.
    """
    deadline, here = time.monotonic() + timeout, {}
    port = master_endpoint()[1]
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        try:
            listener = stack.enter_context(socket.create_server(("", port), backlog=size))
        except OSError as error:
            raise RankFailure(f"rank 0 cannot open port {port} for the others to join the run: {error}") from error
        selector.register(listener, selectors.EVENT_READ)
        while len(here) < size - 1 and time.monotonic() < deadline:
            for key, _ in selector.select(min(POLL, max(0.0, deadline - time.monotonic()))):
                if key.fileobj is not listener:
                    # Nobody speaks twice: it has gone again.
                    selector.unregister(key.fileobj)
                    here.pop(key.data).close()
                    continue
                connection, _ = listener.accept()
                stack.callback(connection.close)
                rank = _greeting(connection)
                if 0 < rank < size and rank not in here:
                    here[rank] = connection
                    selector.register(connection, selectors.EVENT_READ, rank)
                else:
                    connection.close()
        missing = [rank for rank in range(1, size) if rank not in here]
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        reason = (
            f"{', '.join(map(address_of, missing[:8]))}{more} did not join the run within {timeout:.0f} s "
            "(join_timeout): the logs of these processes say why, or their hosts cannot reach rank 0"
        )
        text = reason.encode() if missing else b""
        listener.close()  # before the others look for the store here
        for connection in here.values():
            with contextlib.suppress(OSError):
                connection.sendall(_ANSWER.pack(len(text)) + text)
                connection.recv(1)  # it closes first, so that the port is free at once
    if missing:
        raise RankFailure(f"rank 0 stops because {reason}")


def answer_the_roll(rank: int, timeout: float) -> None:
    """Tell rank 0 that this rank is here, and wait until all are.

    Args:
        rank: this process, not 0.
        timeout: seconds.

    Raises:
        RankFailure: rank 0 does not come, or says that others did not.
    """
    host, port = master_endpoint()
    deadline, problem = time.monotonic() + timeout, "nobody listens"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=_GREETING) as connection:
                connection.sendall(_HELLO.pack(_WORD, rank))
                # Rank 0 began to wait at another time, and is the one to say who is missing.
                connection.settimeout(max(0.0, deadline - time.monotonic()) + timeout + _GREETING)
                text = _exactly(connection, _ANSWER.unpack(_exactly(connection, _ANSWER.size))[0]).decode()
        except OSError as error:
            problem = str(error)
            time.sleep(0.1)
            continue
        if text:
            raise RankFailure(f"rank {rank} stops because {text}")
        return
    raise RankFailure(
        f"rank {rank} stops because {address_of(0)} has not called the roll at {host}:{port} within {timeout:.0f} s "
        f"(join_timeout; {problem}): it has not started, and its log says why, or this host cannot reach it"
    )


def address_of(rank: int) -> str:
    """``"rank 3 (10.0.0.2:6071)"``, by the address that the launcher gave it."""
    endpoints = os.environ.get("PADDLE_TRAINER_ENDPOINTS", "").split(",")
    return f"rank {rank} ({endpoints[rank]})" if rank < len(endpoints) and endpoints[rank] else f"rank {rank}"


def _greeting(connection: socket.socket) -> int:
    """The rank that has connected; -1 for a stranger."""
    connection.settimeout(_GREETING)
    try:
        word, rank = _HELLO.unpack(_exactly(connection, _HELLO.size))
    except OSError:
        return -1
    return rank if word == _WORD else -1


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionError("closed")
        data += part
    return data


def _is_open(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True
