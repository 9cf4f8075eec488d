"""Messages between the processes of a run over TCP: buffered, any size, however late the other side is.

Every pair of ranks shares one connection. A thread per connection reads all the time and sorts what arrives into boxes,
one for each (kind, channel, sender), first in first out. So sending never waits for the receiver's program, two ranks
may both send before they receive, and messages of different groups never mix.

A rank that ends without saying goodbye, or says goodbye with an error, fails everybody's next wait with its name.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import socket
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from alignment.log import get_logger
from alignment.parallel.control import RankFailure

# Kinds of messages. Announcements of one channel share a box, whoever sends them.
COLLECTIVE, POINT_TO_POINT, ANNOUNCEMENT, _GOODBYE = range(4)
_ANYONE = -1

# kind, channel, bytes of the label, bytes of the payload
_HEADER = struct.Struct("!BiHQ")
_WAKE = object()
_NOTICE_AFTER = 60.0  # seconds of waiting after which a line says for whom
_GREETING = 5.0  # seconds for whoever connects to say who it is
_HELLO = struct.Struct("!32sI")


class Store(Protocol):
    """The run's key-value store (Paddle's ``TCPStore``)."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...


@dataclass(frozen=True)
class Message:
    """What arrived: who sent it, what for (``"all_reduce float32 64 SUM"``), and its bytes (uint8 ``[size]``)."""

    sender: int
    label: str
    payload: np.ndarray


@dataclass(eq=False)
class _Peer:
    """The connection to another rank."""

    rank: int
    connection: socket.socket
    lock: threading.Lock = field(default_factory=threading.Lock)
    reader: threading.Thread | None = None


class Mailbox:
    """One rank's end of all its connections.

    Args:
        rank: this process.
        connections: an open TCP connection to every other rank.
        patience: seconds that :meth:`receive` waits for a rank that lives but does not send.
    """

    def __init__(self, rank: int, connections: dict[int, socket.socket], patience: float) -> None:
        self.rank = rank
        self.size = len(connections) + 1
        self._patience = patience
        self._boxes: dict[tuple[int, int, int], queue.SimpleQueue[Any]] = {}
        self._state = threading.Lock()
        self._failure: str | None = None
        self._left: set[int] = set()
        self._closed = False
        self._peers: dict[int, _Peer] = {}
        for other, connection in connections.items():
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            peer = _Peer(other, connection)
            peer.reader = threading.Thread(target=self._read, args=(peer,), name=f"mailbox-{other}", daemon=True)
            self._peers[other] = peer
        for peer in self._peers.values():
            peer.reader.start()
        # A forked child (a data worker) must not keep the connections open after this process has ended.
        os.register_at_fork(after_in_child=self._abandon)

    def send(self, target: int, kind: int, channel: int, label: str, payload: np.ndarray) -> None:
        """Send ``payload`` (uint8 ``[size]``) to rank ``target``; it may be changed as soon as this returns.

        Raises:
            RankFailure: when the run has failed or ``target`` has ended.
        """
        if target == self.rank:
            self._box(kind, channel, target).put(Message(target, label, payload.copy()))
            return
        trouble = self._trouble(target)
        if trouble:
            raise RankFailure(f"rank {self.rank} stops in {label} because {trouble}")
        peer = self._peers[target]
        try:
            with peer.lock:
                _send_frame(peer.connection, kind, channel, label, payload)
        except OSError as error:
            # The reader learns why: the peer's last words may still lie unread.
            peer.reader.join(2)
            reason = self._trouble(target) or f"its connection to rank {target} broke ({error})"
            raise RankFailure(f"rank {self.rank} stops in {label} because {reason}") from error

    def broadcast(self, kind: int, channel: int, label: str, payload: np.ndarray) -> None:
        """Send ``payload`` to every other rank of the run that has not left."""
        for target in self._peers:
            try:
                self.send(target, kind, channel, label, payload)
            except RankFailure:
                if self._failure is not None or target not in self._left:
                    raise

    def receive(self, source: int, kind: int, channel: int, label: str) -> Message:
        """Return the next message of rank ``source`` on this channel, waiting for it.

        Args:
            source: the sending rank.
            kind, channel: the box.
            label: what this rank is doing, for error messages.

        Raises:
            RankFailure: when a rank failed or vanished, ``source`` has left, or ``patience`` has run out.
        """
        who = "the other ranks of the group" if source == _ANYONE else f"rank {source}"
        box = self._box(kind, channel, source)
        began = time.monotonic()
        notice = _NOTICE_AFTER
        while True:
            if box.empty():
                trouble = self._trouble(source)
                if trouble:
                    raise RankFailure(f"rank {self.rank} stops in {label} because {trouble}")
            waited = time.monotonic() - began
            if waited >= self._patience:
                raise RankFailure(
                    f"rank {self.rank} stops in {label} because {who} did not get there within {self._patience:.0f} s"
                )
            if waited >= notice:
                get_logger().log(logging.WARNING, f"has waited {waited:.0f} s for {who} in {label}")
                notice *= 5
            try:
                item = box.get(timeout=max(0.001, min(notice, self._patience) - waited))
            except queue.Empty:
                continue
            if item is not _WAKE:
                return item

    def receive_announcement(self, channel: int, label: str) -> Message:
        """Return the next announcement on ``channel``, whoever sends it; raises as :meth:`receive`."""
        return self.receive(_ANYONE, ANNOUNCEMENT, channel, label)

    def fail(self, reason: str) -> None:
        """Make every present and later :meth:`receive` and :meth:`send` raise ``RankFailure`` with ``reason``."""
        with self._state:
            if self._failure is None:
                self._failure = reason
        self._wake()

    def leave(self, failure: str | None = None, linger: float | None = None) -> None:
        """Say goodbye and close; further calls do nothing.

        Args:
            failure: why this rank gives up; the others then stop with that text.
            linger: seconds to wait for the others to leave too, so that nothing sent to them is lost when this process
                ends (default 10, or 2 after a failure).
        """
        with self._state:
            if self._closed:
                return
            self._closed = True
            # A rank that stops because of another one passes that one's failure on, not its own.
            last_words = self._failure or (f"rank {self.rank} failed: {failure}" if failure else "")
        for peer in self._peers.values():
            try:
                with peer.lock:
                    _send_frame(peer.connection, _GOODBYE, 0, last_words[:10000], np.empty(0, np.uint8))
                    peer.connection.shutdown(socket.SHUT_WR)
            except OSError:
                continue  # that rank has ended already; there is nobody to tell
        deadline = time.monotonic() + (linger if linger is not None else 2 if last_words else 10)
        for peer in self._peers.values():
            peer.reader.join(max(0.0, deadline - time.monotonic()))
        for peer in self._peers.values():
            if peer.reader.is_alive():
                try:
                    peer.connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # closed by the other side in the meantime
        for peer in self._peers.values():
            peer.reader.join(1)
            peer.connection.close()

    def _abandon(self) -> None:
        # Not connection.close(): the reader's stream, whose thread is not in the child, holds it open.
        nothing = os.open(os.devnull, os.O_RDWR)
        for peer in self._peers.values():
            if peer.connection.fileno() >= 0:
                os.dup2(nothing, peer.connection.fileno())
        os.close(nothing)

    def _box(self, kind: int, channel: int, source: int) -> queue.SimpleQueue[Any]:
        key = (kind, channel, source)
        box = self._boxes.get(key)
        if box is None:
            with self._state:
                box = self._boxes.setdefault(key, queue.SimpleQueue())
        return box

    def _trouble(self, other: int) -> str | None:
        if self._closed:
            return "it has already left the run"
        if self._failure is not None:
            return self._failure
        if other in self._left:
            return f"rank {other} has finished while other ranks still work"
        return None

    def _read(self, peer: _Peer) -> None:
        broken = ""
        try:
            with peer.connection.makefile("rb", buffering=1 << 16) as stream:
                while self._read_frame(peer, stream):
                    pass
        except OSError as error:
            broken = f": {error}"
        with self._state:
            if self._closed or peer.rank in self._left:
                return
            if self._failure is None:
                self._failure = f"rank {peer.rank} ended without a word (killed, or out of memory?){broken}"
        self._wake()

    def _read_frame(self, peer: _Peer, stream: Any) -> bool:
        """Sort one message into its box; False at the end of the stream."""
        header = stream.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return False
        kind, channel, label_size, size = _HEADER.unpack(header)
        label = stream.read(label_size).decode(errors="replace")
        payload = np.empty(size, np.uint8)
        if size and stream.readinto(payload) < size:
            return False
        if kind == _GOODBYE:
            with self._state:
                self._left.add(peer.rank)
                if label and self._failure is None:
                    self._failure = label
            self._wake()
        else:
            sender = _ANYONE if kind == ANNOUNCEMENT else peer.rank
            self._box(kind, channel, sender).put(Message(peer.rank, label, payload))
        return True

    def _wake(self) -> None:
        with self._state:
            boxes = list(self._boxes.values())
        for box in boxes:
            box.put(_WAKE)


def connect(rank: int, size: int, store: Store, host: str, patience: float) -> Mailbox:
    """Connect this process with all others and return its mailbox. Every rank of the run calls it once.

    Args:
        rank, size: this process and the number of processes.
        store: the run's store, through which the addresses travel.
        host: the address under which the other ranks reach this one.
        patience: seconds to wait for late ranks, here and in :meth:`Mailbox.receive`.

    Raises:
        RankFailure: when a rank does not come in time.
    """
    listener = socket.create_server((host, 0), backlog=size)
    if rank == 0:
        store.set("alignment/mailbox/token", secrets.token_hex(16))
    store.set(f"alignment/mailbox/{rank}", f"{host} {listener.getsockname()[1]}")
    token = bytes(store.get("alignment/mailbox/token"))
    connections: dict[int, socket.socket] = {}
    with listener:
        for other in range(rank):
            address, port = bytes(store.get(f"alignment/mailbox/{other}")).decode().split()
            connections[other] = socket.create_connection((address, int(port)), timeout=60)
            connections[other].sendall(_HELLO.pack(token, rank))
        listener.settimeout(patience)
        while len(connections) < size - 1:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                missing = [str(other) for other in range(rank + 1, size) if other not in connections]
                raise RankFailure(
                    f"rank {rank} waited {patience:.0f} s for rank {', '.join(missing)} to join the run"
                ) from None
            shown, other = _greeting(connection)
            if shown != token or not rank < other < size or other in connections:
                connection.close()  # a stranger
                continue
            connections[other] = connection
    return Mailbox(rank, connections, patience)


def _greeting(connection: socket.socket) -> tuple[bytes, int]:
    connection.settimeout(_GREETING)
    data = b""
    try:
        while len(data) < _HELLO.size:
            part = connection.recv(_HELLO.size - len(data))
            if not part:
                break
            data += part
    except OSError:
        data = b""
    return _HELLO.unpack(data) if len(data) == _HELLO.size else (b"", -1)


def _send_frame(connection: socket.socket, kind: int, channel: int, label: str, payload: np.ndarray) -> None:
    text = label.encode()[:65535]
    parts: list[Any] = [_HEADER.pack(kind, channel, len(text), payload.size) + text]
    if payload.size:
        parts.append(memoryview(payload))
    _send_all(connection, parts)


def _send_all(connection: socket.socket, parts: Sequence[Any]) -> None:
    left = [memoryview(part) for part in parts]
    while left:
        sent = connection.sendmsg(left)
        while left and sent >= len(left[0]):
            sent -= len(left.pop(0))
        if sent:
            left[0] = left[0][sent:]
