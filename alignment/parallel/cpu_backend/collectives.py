"""The collectives of one group of ranks, on bytes, over the mailbox.

Every rank adds the parts up in rank order, so a sum has the same bits on all ranks, in every run.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from alignment.parallel.control import RankFailure
from alignment.parallel.cpu_backend.mailbox import COLLECTIVE, POINT_TO_POINT, Mailbox
from alignment.parallel.cpu_backend.raw_bytes import reduce_parts

# From this size on, and with three ranks or more, each rank adds up one slice and the slices are gathered: 2 (n-1) / n
# times the tensor per rank on the wire in place of n-1 times.
SLICED_FROM = 32 * 1024


@dataclass(eq=False)
class Group:
    """Some ranks of the run that communicate with each other.

    Attributes:
        mailbox: this process's connections.
        gid: the group's number, the same on all its ranks and different from all other groups'.
        ranks: the members' ranks in the run, in group order.
        rank: this process's place in ``ranks``.
    """

    mailbox: Mailbox
    gid: int
    ranks: tuple[int, ...]
    rank: int
    coalescing: bool = False
    pending: dict[int, deque[Receipt]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.ranks)

    def all_gather(self, data: np.ndarray, label: str) -> list[np.ndarray]:
        """Give ``data`` (uint8 ``[bytes]``) and return every member's, in group order."""
        return self._exchange([data] * self.size, label)

    def all_to_all(
        self, parts: Sequence[np.ndarray], label: str, sizes: Sequence[int] | None = None
    ) -> list[np.ndarray]:
        """Give member i ``parts[i]`` and return what each member gave to this one.

        Args:
            parts: uint8 arrays, one per member.
            label: what this is, for checks and messages.
            sizes: bytes expected from each member; by default the size of ``parts[i]``.
        """
        return self._exchange(parts, label, sizes)

    def all_reduce(self, data: np.ndarray, dtype: str, op: str, label: str) -> np.ndarray:
        """Return the element-wise reduction of all members' ``data``, the same bits on every member."""
        item = np.dtype("uint16" if dtype == "bfloat16" else dtype).itemsize
        if self.size < 3 or data.size < SLICED_FROM:
            return reduce_parts(self.all_gather(data, label), dtype, op)
        bounds = [data.size // item * i // self.size * item for i in range(self.size + 1)]
        slices = [data[start:stop] for start, stop in itertools.pairwise(bounds)]
        mine = self._exchange(slices, label, [slices[self.rank].size] * self.size)
        total = reduce_parts(mine, dtype, op)
        return np.concatenate(self._exchange([total] * self.size, label, [part.size for part in slices]))

    def reduce_scatter(self, parts: Sequence[np.ndarray], dtype: str, op: str, label: str) -> np.ndarray:
        """Return the reduction of what all members gave for this one: ``parts[i]`` is meant for member i."""
        return reduce_parts(self._exchange(parts, label, [parts[self.rank].size] * self.size), dtype, op)

    def reduce(self, data: np.ndarray, dst: int, dtype: str, op: str, label: str) -> np.ndarray | None:
        """Return the reduction of all members' ``data`` on member ``dst``, None on the others."""
        parts = self.gather(data, dst, label)
        return None if parts is None else reduce_parts(parts, dtype, op)

    def gather(self, data: np.ndarray, dst: int, label: str) -> list[np.ndarray] | None:
        """Return every member's ``data`` on member ``dst``, None on the others."""
        if self.rank != dst:
            self._send(dst, data, label)
            return None
        return [data if other == dst else self._receive(other, data.size, label) for other in range(self.size)]

    def broadcast(self, data: np.ndarray, src: int, label: str) -> np.ndarray:
        """Return member ``src``'s ``data``."""
        if self.rank != src:
            return self._receive(src, data.size, label)
        for other in self._others():
            self._send(other, data, label)
        return data

    def scatter(self, parts: Sequence[np.ndarray], size: int, src: int, label: str) -> np.ndarray:
        """Return the ``size`` bytes that member ``src`` has for this one; ``parts`` counts on ``src`` only."""
        if self.rank != src:
            return self._receive(src, size, label)
        for other in self._others():
            self._send(other, parts[other], label)
        return parts[src]

    def barrier(self) -> None:
        """Return when every member is here."""
        self.all_gather(np.empty(0, np.uint8), "barrier")

    def send(self, data: np.ndarray, dst: int) -> None:
        """Send ``data`` to member ``dst``; does not wait for it to be received."""
        self.mailbox.send(self.ranks[dst], POINT_TO_POINT, self.gid, "send", data)

    def post_receive(self, src: int, size: int, store: Callable[[np.ndarray], None]) -> Receipt:
        """Ask for the next message of member ``src``; ``store`` gets its bytes when the receipt is waited for."""
        receipt = Receipt(self, src, size, store)
        self.pending.setdefault(src, deque()).append(receipt)
        return receipt

    def complete(self, until: Receipt | None = None) -> None:
        """Receive what was asked for: of ``until``'s sender up to ``until``, or everything of everybody."""
        for src in [until.src] if until else list(self.pending):
            waiting = self.pending[src]
            while waiting and not (until and until.done):
                receipt = waiting.popleft()
                label = f"recv of {receipt.size} bytes ({self})"
                message = self.mailbox.receive(self.ranks[src], POINT_TO_POINT, self.gid, label)
                self._check_size(message.payload, receipt.size, src, label)
                receipt.store(message.payload)
                receipt.done = True

    def __str__(self) -> str:
        return f"group {self.gid} of ranks {', '.join(map(str, self.ranks))}"

    def _others(self) -> list[int]:
        """The other members, beginning after this one: so not everybody sends to the first at once."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def _exchange(
        self, parts: Sequence[np.ndarray], label: str, sizes: Sequence[int] | None = None
    ) -> list[np.ndarray]:
        for other in self._others():
            self._send(other, parts[other], label)
        return [
            parts[other]
            if other == self.rank
            else self._receive(other, (sizes or [p.size for p in parts])[other], label)
            for other in range(self.size)
        ]

    def _send(self, other: int, data: np.ndarray, label: str) -> None:
        self.mailbox.send(self.ranks[other], COLLECTIVE, self.gid, label, data)

    def _receive(self, other: int, size: int, label: str) -> np.ndarray:
        message = self.mailbox.receive(self.ranks[other], COLLECTIVE, self.gid, f"{label} ({self})")
        if message.label != label:
            raise RankFailure(
                f"the ranks lost step with each other in {self}: rank {self.ranks[self.rank]} is at {label!r}, "
                f"rank {self.ranks[other]} at {message.label!r}"
            )
        self._check_size(message.payload, size, other, label)
        return message.payload

    def _check_size(self, payload: np.ndarray, size: int, other: int, label: str) -> None:
        if payload.size != size:
            raise RankFailure(
                f"rank {self.ranks[self.rank]} expected {size} bytes from rank {self.ranks[other]} in {label}, "
                f"but got {payload.size}: the two gave tensors of different shapes or types"
            )


@dataclass(eq=False)
class Receipt:
    """A message that was asked for and perhaps not yet received; has the methods of Paddle's tasks."""

    group: Group
    src: int
    size: int
    store: Callable[[np.ndarray], None]
    done: bool = False

    def wait(self, *_: object) -> bool:
        """Receive it now, after all that was asked of the same sender before."""
        if not self.done:
            self.group.complete(self)
        return True

    synchronize = wait

    def is_completed(self) -> bool:
        """Whether it has arrived and was stored."""
        return self.done
