"""How the ranks of a run and of its groups find each other."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from alignment.errors import AlignmentError
from alignment.parallel.control import RankFailure
from alignment.parallel.cpu_backend.collectives import Group
from alignment.parallel.cpu_backend.mailbox import ANNOUNCEMENT, Mailbox, connect

_STORE_TIMEOUT = 900  # seconds; Paddle's own default


@dataclass(frozen=True)
class _Member:
    """What a rank says when it joins a group; ``host`` and ``port`` are those of its store (group rank 0 only)."""

    group_rank: int
    global_rank: int
    size: int
    host: str
    port: int


@dataclass(eq=False)
class Backend:
    """This process's state: its mailbox and its groups. It hangs on the patched class, ``ProcessGroupGloo``.

    Attributes:
        rank, size: this process and the number of processes.
        patience: seconds to wait for a rank that lives but is late.
        mailbox: None until the first group is made.
        groups: the :class:`Group` of each of Paddle's process groups.
    """

    rank: int
    size: int
    patience: float
    mailbox: Mailbox | None = None
    groups: dict[Any, Group] = field(default_factory=dict)

    def group_of(self, process_group: Any) -> Group:
        """Return the group that belongs to one of Paddle's process groups."""
        return self.groups[process_group]

    def create_group(self, original: Callable[..., Any], store: Any, rank: int, size: int, gid: int = 0) -> Any:
        """Make Paddle's process group ``gid`` with a store of its own, once all members are here.

        Paddle's constructor publishes the members' addresses under the keys "0", "1", ... of the store it is given; in
        the run's only store a rank reads the addresses of an earlier group.

        Args:
            original: Paddle's ``ProcessGroupGloo.create``.
            store: the run's store.
            rank, size: this process's place in the group and the group's size.
            gid: the group's number.
        """
        if self.mailbox is None:
            self.mailbox = connect(self.rank, self.size, store, own_host(), self.patience)
        host, port, own_store = "", 0, None
        if rank == 0:
            host = own_host()
            own_store, port = _new_store(host)
        members = self._assemble(gid, _Member(rank, self.rank, size, host, port))
        if own_store is None:
            from paddle.base import core

            own_store = core.TCPStore(members[0].host, members[0].port, False, 0, _STORE_TIMEOUT)
        send_at_once()
        process_group = original(own_store, rank, size, gid)
        self.groups[process_group] = Group(self.mailbox, gid, tuple(member.global_rank for member in members), rank)
        return process_group

    def _assemble(self, gid: int, me: _Member) -> list[_Member]:
        """Tell everybody that this rank joins group ``gid``; return the members once all have said so."""
        assert self.mailbox is not None
        label = f"making group {gid} of {me.size} ranks"
        text = np.frombuffer(json.dumps(asdict(me)).encode(), np.uint8)
        self.mailbox.broadcast(ANNOUNCEMENT, gid, label, text)
        members = {me.group_rank: me}
        while len(members) < me.size:
            message = self.mailbox.receive_announcement(gid, label)
            member = _Member(**json.loads(message.payload.tobytes()))
            if member.size != me.size or member.group_rank in members:
                raise RankFailure(
                    f"ranks {self.rank} and {member.global_rank} both make group {gid}, but not the same one: every "
                    "rank must call new_group for every group of the run, in the same order"
                )
            members[member.group_rank] = member
        return [members[place] for place in range(me.size)]


def job_store(original: Callable[[], Any]) -> Any:
    """Return the run's store, having waited for rank 0 to open it.

    Args:
        original: Paddle's ``create_or_get_global_tcp_store``. A client of it that comes before the server sleeps 3 s.

    Raises:
        RankFailure: when rank 0's store does not open within Paddle's time limit.
    """
    if int(os.environ.get("PADDLE_TRAINER_ID", "0")) != 0:
        _wait_for_port(*master_endpoint(), _STORE_TIMEOUT)
    store = original()
    send_at_once()
    return store


def own_host() -> str:
    """Return the address under which the other ranks reach this process, as the launcher published it."""
    host = os.environ.get("PADDLE_CURRENT_ENDPOINT", "").rpartition(":")[0]
    return socket.gethostbyname(host) if host else "127.0.0.1"


def master_endpoint() -> tuple[str, int]:
    """Rank 0's store, looked for where Paddle looks for it."""
    if os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT"):
        endpoint = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    else:
        endpoint = os.environ.get("PADDLE_MASTER") or os.environ.get("PADDLE_TRAINER_ENDPOINTS", "").split(",")[0]
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdigit():
        raise AlignmentError(
            "several processes on CPUs need PADDLE_MASTER=HOST:PORT (or PADDLE_TRAINER_ENDPOINTS) in the environment; "
            "start them with paddle.distributed.launch"
        )
    return host, int(port)


def _wait_for_port(host: str, port: int, patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RankFailure(
                    f"rank {os.environ.get('PADDLE_TRAINER_ID')} waited {patience:.0f} s for rank 0 at {host}:{port} "
                    f"({error}): it has not started, or its log says why it ended"
                ) from error
        time.sleep(0.02)


def _new_store(host: str) -> tuple[Any, int]:
    """Open a store on a free port of this process; return it with its port."""
    from paddle.base import core

    for _ in range(20):
        with socket.socket() as probe:
            probe.bind((host, 0))
            port = probe.getsockname()[1]
        # With 0 expected workers the constructor does not wait for them.
        store = core.TCPStore(host, port, True, 0, _STORE_TIMEOUT)
        # Paddle does not say when the port was taken in the meantime; it talks to whoever serves it.
        if store.add("alignment/opened", 1) == 1:
            return store, port
    raise AlignmentError(f"rank {os.environ.get('PADDLE_TRAINER_ID')} found no free port on {host} for a group's store")


def send_at_once() -> None:
    """Set TCP_NODELAY on this process's TCP sockets.

    Paddle's store writes a request in several small pieces; without this each waits 40 ms for the one before to be
    acknowledged. Sockets that a listening socket accepts later inherit the setting. Does nothing without /proc.
    """
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        # Not a socket, or closed since: not ours to change.
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(entry.name))) as duplicate:
            if duplicate.family in (socket.AF_INET, socket.AF_INET6) and duplicate.type == socket.SOCK_STREAM:
                duplicate.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def create_group(original: Callable[..., Any], store: Any, rank: int, size: int, gid: int = 0) -> Any:
    """Take the place of ``ProcessGroupGloo.create``; see :meth:`Backend.create_group`."""
    from paddle.base import core

    return core.ProcessGroupGloo.alignment_backend.create_group(original, store, rank, size, gid)
