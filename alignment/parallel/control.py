"""A small meeting place for the processes of one run, beside Paddle's own process group.

Why it exists: gloo gives up for ever when one rank reaches a collective more than 30 seconds after another, and a rank
that dies leaves the others hanging. Here a rank may be hours late, small Python objects travel without gloo, and a rank
that fails (or is killed) tells all others at once, by name and with its error.

Rank 0 runs a server thread; every rank, rank 0 too, holds one TCP connection to it. All ranks must make the same calls
in the same order; each call carries a label, so that ranks at different places of the program are reported instead of
mixing their data.
"""

from __future__ import annotations

import contextlib
import pickle
import selectors
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import Any

from alignment.errors import AlignmentError

_HEADER = struct.Struct("!Q")
_DATA, _FAILURE, _GOODBYE = "data", "failure", "goodbye"
_PEEK_BYTES = 1 << 16
_GREETING = 5.0  # seconds for whoever connects to say who it is: port scanners and health checks never do


class RankFailure(AlignmentError):
    """Another process of the run failed or vanished; the message names its rank and its error."""


def _send(connection: socket.socket, message: object) -> None:
    payload = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    connection.sendall(_HEADER.pack(len(payload)) + payload)


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    parts, missing = [], size
    while missing:
        part = connection.recv(min(missing, 1 << 20))
        if not part:
            raise ConnectionError("closed")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _receive(connection: socket.socket) -> Any:
    (size,) = _HEADER.unpack(_receive_exactly(connection, _HEADER.size))
    return pickle.loads(_receive_exactly(connection, size))


@dataclass
class _Round:
    """One collective that is being gathered: each rank's label and value."""

    labels: dict[int, str] = field(default_factory=dict)
    values: dict[int, Any] = field(default_factory=dict)
    only_first: bool = False


class _Server(threading.Thread):
    """Gathers one value from every rank and sends the list of all to every rank; passes on failures."""

    def __init__(self, host: str, size: int, token: str) -> None:
        super().__init__(name="alignment-control", daemon=True)
        self._listener = socket.create_server((host, 0), backlog=size)
        self.port: int = self._listener.getsockname()[1]
        self._size = size
        self._token = token

    def run(self) -> None:
        connections: dict[int, socket.socket] = {}
        while len(connections) < self._size:
            connection, _ = self._listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(_GREETING)
            # The first bytes are the job's token as plain bytes: nothing of a stranger is unpickled.
            try:
                hello = _receive_exactly(connection, len(self._token) + 8)
            except OSError:
                connection.close()
                continue
            rank = int.from_bytes(hello[-8:], "big")
            if hello[:-8].decode(errors="replace") != self._token or rank in connections or rank >= self._size:
                connection.close()
                continue
            connection.settimeout(None)
            connections[rank] = connection
        self._listener.close()
        try:
            self._serve(connections)
        except Exception as error:
            # Whatever it is (no memory for what it gathers, say), nobody must wait for a thread that is no more.
            failure = f"rank 0's control server failed: {type(error).__name__}: {error}"
            for connection in connections.values():
                _try_send(connection, (_FAILURE, failure))
                connection.close()

    def _serve(self, connections: dict[int, socket.socket]) -> None:
        selector = selectors.DefaultSelector()
        for rank, connection in connections.items():
            selector.register(connection, selectors.EVENT_READ, rank)
        current = _Round()
        failure: str | None = None
        left: set[int] = set()
        while connections:
            for key, _ in selector.select():
                rank = key.data
                try:
                    kind, label, value, *options = _receive(connections[rank])
                except (OSError, EOFError):
                    kind, label, value = _GOODBYE, "", f"rank {rank} ended without a word (killed, or out of memory?)"
                except Exception as error:  # unpickling runs whatever the objects' classes do
                    kind, label, value = _GOODBYE, "", (
                        f"what rank {rank} sent cannot be read here ({type(error).__name__}: {error}); do all hosts "
                        "run the same code?"
                    )  # fmt: skip
                if kind == _DATA:
                    current.labels[rank], current.values[rank] = label, value
                    current.only_first = bool(options and options[0])
                else:
                    if value is not None:
                        _try_send(connections[rank], (_FAILURE, value))  # it may not know yet
                    selector.unregister(connections[rank])
                    connections.pop(rank).close()
                    left.add(rank)
                    if value is not None and failure is None:
                        failure = str(value)
            if failure is None and current.values and left:
                failure = f"rank {min(left)} has finished while other ranks still work"
            if failure is None and len(current.values) == self._size and len(set(current.labels.values())) > 1:
                places = ", ".join(f"rank {r} at {label!r}" for r, label in sorted(current.labels.items()))
                failure = f"the ranks lost step with each other: {places}"
            if failure is not None:
                for connection in connections.values():
                    _try_send(connection, (_FAILURE, failure))
                current = _Round()
            elif len(current.values) == self._size:
                values = [current.values[rank] for rank in range(self._size)]
                only_first = current.only_first
                current = _Round()
                for rank, connection in connections.items():
                    _try_send(connection, (_DATA, None if only_first and rank else values))
        selector.close()


def _try_send(connection: socket.socket, message: object) -> None:
    try:
        _send(connection, message)
    except OSError:
        # The receiver is gone; the server's own reading of that connection reports it.
        return


class ControlChannel:
    """One rank's end of the meeting place.

    Args:
        rank: this process's rank; rank 0 serves.
        size: number of processes.
        host: address under which the others reach rank 0.
        token: secret of the job; connections that do not show it are dropped.
        port: port of rank 0's server; None on rank 0, which chooses a free one (``self.port``).

    Attributes:
        waiting: label of the exchange that this rank waits in, or None.
        exchanges: how many it has come through.
    """

    def __init__(self, rank: int, size: int, host: str, token: str, port: int | None = None) -> None:
        self.rank, self.size = rank, size
        self._server: _Server | None = None
        if rank == 0:
            self._server = _Server(host, size, token)
            self._server.start()
            port = self._server.port
        if port is None:
            raise ValueError("every rank but 0 needs the port of rank 0's server")
        self.port: int = port
        self._connection = socket.create_connection((host, port), timeout=60)
        self._connection.settimeout(None)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._connection.sendall(token.encode() + rank.to_bytes(8, "big"))
        self._open = True
        self.waiting: str | None = None
        self.exchanges = 0
        self._sending = threading.Lock()
        self._aborted: str | None = None

    def exchange(self, label: str, value: object, only_first: bool = False) -> Any:
        """Give ``value``, wait for every rank however late, and return all ranks' values in rank order.

        With ``only_first`` (the same on every rank) only rank 0 gets the values, the others None.

        Raises:
            RankFailure: when another rank failed, vanished, finished, or stands at a different ``label``.
        """
        if not self._open:
            raise RankFailure(f"rank {self.rank}: the control channel is closed")
        self.waiting = label
        try:
            with self._sending:
                _send(self._connection, (_DATA, label, value, only_first))
            kind, payload = _receive(self._connection)
        except (OSError, EOFError) as error:
            if self._aborted is not None:
                raise RankFailure(f"rank {self.rank} stops because {self._aborted}") from error
            # A failure message may lie unread behind a broken pipe.
            try:
                kind, payload = _receive(self._connection)
            except (OSError, EOFError):
                self._open = False
                raise RankFailure(
                    f"rank {self.rank} lost its connection to rank 0 while at {label!r} ({error}); "
                    "rank 0 has probably ended: see its log"
                ) from error
        finally:
            self.waiting = None
        if kind == _FAILURE:
            raise RankFailure(f"rank {self.rank} stops because {payload}")
        self.exchanges += 1
        return payload

    def peek_failure(self) -> str | None:
        """Say why the run has failed, without waiting and without taking the message away, or return None.

        For a thread beside the one that makes the exchanges. While that one waits in an exchange it hears of failures
        itself, and this returns None.
        """
        if not self._open or self.waiting is not None:
            return None
        try:
            head = self._connection.recv(_PEEK_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError as error:
            return f"rank 0 ended without a word ({error})" if self._open else None
        if not head:
            return "rank 0 ended without a word (killed, or out of memory?)" if self._open else None
        if len(head) < _HEADER.size:
            return None
        (size,) = _HEADER.unpack_from(head)
        if len(head) - _HEADER.size < size:
            return None if size < _PEEK_BYTES - _HEADER.size else "another rank failed: see the other ranks' logs"
        kind, payload = pickle.loads(head[_HEADER.size : _HEADER.size + size])
        return str(payload) if kind == _FAILURE else None

    def abort(self, reason: str) -> None:
        """Give up for a thread that waits in :meth:`exchange`: it raises ``RankFailure`` with ``reason`` there, and so
        do the other ranks.
        """
        self._aborted = reason
        if self._open and self._sending.acquire(timeout=1.0):
            try:
                _try_send(self._connection, (_GOODBYE, "", reason))
            finally:
                self._sending.release()
        with contextlib.suppress(OSError):  # closed in the meantime
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self, failure: str | None = None) -> None:
        """Leave. With ``failure`` the others stop at their next meeting with that text; further calls do nothing."""
        if not self._open:
            return
        self._open = False
        _try_send(self._connection, (_GOODBYE, "", failure))
        self._connection.close()
        if self._server is not None:
            # Rank 0 stays until the others have left (or have been told why), but not for ever.
            self._server.join(timeout=10 if self._aborted is None else 2)
