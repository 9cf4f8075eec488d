"""Parts back into wholes: tensors that are spread over processes, gathered on the main process, a bounded number of
bytes at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from alignment.parallel.world import World

CHUNK_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Share:
    """What one process can give of a whole array.

    Attributes:
        axis: along which tensor ranks hold slices, in their order; None where each holds all of it.
        read: returns this process's array.
        nbytes: about how large it is.
    """

    axis: int | None
    read: Callable[[], np.ndarray]
    nbytes: int


def gather_whole(world: World, shares: Mapping[str, Share]) -> Iterator[tuple[str, np.ndarray]]:
    """Join the shares of all processes; every process calls it and runs through the iterator.

    Args:
        world: the processes.
        shares: by the whole array's name; a process leaves out what it has not.

    Yields:
        on the main process ``(name, whole array)``, sorted by name; nothing on the others.
    """
    if world.processes == 1:
        for name in sorted(shares):
            yield name, shares[name].read()
        return
    inventory = world.all_processes({name: (s.axis, s.nbytes) for name, s in shares.items()}, "inventory of shares")
    suppliers = {name: _suppliers(name, inventory, world) for name in sorted(set().union(*inventory))}
    for chunk in _chunks(suppliers, inventory):
        mine = {name: shares[name].read() for name in chunk if world.process in suppliers[name]}
        parts = world.gather_to_main(mine, "shares")
        if not world.is_main or parts is None:
            continue
        for name in chunk:
            arrays = [parts[process][name] for process in suppliers[name]]
            axis = inventory[suppliers[name][0]][name][0]
            yield name, arrays[0] if axis is None else np.concatenate(arrays, axis=axis)


def _suppliers(name: str, inventory: list[dict[str, tuple[int | None, int]]], world: World) -> list[int]:
    """The processes whose arrays make the whole: one, or one of each tensor rank."""
    holders = [process for process, shares in enumerate(inventory) if name in shares]
    if inventory[holders[0]][name][0] is None:
        return holders[:1]
    tensor = world.topology.tensor
    first = {process % tensor: process for process in reversed(holders)}
    return [first[rank] for rank in range(tensor)]


def _chunks(
    suppliers: Mapping[str, list[int]], inventory: list[dict[str, tuple[int | None, int]]]
) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for name, processes in suppliers.items():
        nbytes = sum(inventory[process][name][1] for process in processes)
        if chunk and size + nbytes > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(name)
        size += nbytes
    if chunk:
        yield chunk
