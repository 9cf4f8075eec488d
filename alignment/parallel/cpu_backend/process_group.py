"""The methods of Paddle's process group (`paddle.base.core.ProcessGroupGloo`), on CPU tensors over the mailbox.

Each function here takes the place of the method of the same name; ``pg`` is the method's ``self``. Ranks (``src``,
``dst``) are places in the group. Results are written into the tensors given. A collective is finished when it returns,
so ``sync_op`` makes no difference; what is returned has ``wait()`` as Paddle's tasks do. Only receiving can be put off:
an asynchronous ``recv``, and any between ``_start_coalescing`` and ``_end_coalescing``, happens when it is waited for.

Functions of Paddle's that exist in two forms with the arguments the other way round are told apart by ``sync_op``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from alignment.errors import AlignmentError
from alignment.parallel.cpu_backend.collectives import Group, Receipt
from alignment.parallel.cpu_backend.raw_bytes import dtype_name, readable, writable

if TYPE_CHECKING:
    import paddle


class Finished:
    """A task that is done."""

    def wait(self, *_: object) -> bool:
        """Return at once."""
        return True

    synchronize = wait
    is_completed = wait


def all_reduce(pg: Any, tensor: paddle.Tensor, op: Any = None, sync_op: bool = True) -> Finished:
    group, name = _group(pg), _op_name(op)
    with writable(tensor) as data:
        data[:] = group.all_reduce(data, dtype_name(tensor), name, f"all_reduce {_describe(tensor)} {name}")
    return Finished()


def reduce(pg: Any, tensor: paddle.Tensor, dst: int, op: Any = None, sync_op: bool = True) -> Finished:
    group, name = _group(pg), _op_name(op)
    with writable(tensor) as data:
        label = f"reduce {_describe(tensor)} {name} to {dst}"
        total = group.reduce(data, dst, dtype_name(tensor), name, label)
        if total is not None:
            data[:] = total
    return Finished()


def broadcast(pg: Any, tensor: paddle.Tensor, src: int, sync_op: bool = True) -> Finished:
    with writable(tensor) as data:
        data[:] = _group(pg).broadcast(data, src, f"broadcast {_describe(tensor)} from {src}")
    return Finished()


def all_gather(pg: Any, first: Any, second: Any, sync_op: bool | None = None) -> Finished:
    """``all_gather(out, in, sync_op)``, or the older ``all_gather(in, out)``."""
    return all_gather_on_calc_stream(pg, *((second, first) if sync_op is None else (first, second)))


def all_gather_on_calc_stream(pg: Any, out: Any, tensor: paddle.Tensor) -> Finished:
    """``out`` is a list of one tensor per member, or one tensor for all of them in a row."""
    _write(out, _group(pg).all_gather(readable(tensor), f"all_gather {_describe(tensor)}"))
    return Finished()


def all_gather_into_tensor(pg: Any, out: paddle.Tensor, tensor: paddle.Tensor, sync_op: bool = True) -> Finished:
    return all_gather_on_calc_stream(pg, out, tensor)


def all_gather_partial(pg: Any, out: paddle.Tensor, tensor: paddle.Tensor, num: int, id: int) -> Finished:
    """Gather the ``id``-th of ``num`` pieces of each member's tensor into ``out``."""
    piece = _pieces(readable(tensor), num)[id]
    _write(out, _group(pg).all_gather(piece, f"all_gather_partial {_describe(tensor)}"))
    return Finished()


def reduce_scatter(pg: Any, out: paddle.Tensor, tensors: Any, op: Any = None, sync_op: bool = True) -> Finished:
    """``tensors`` is a list of one tensor per member, or one tensor that is cut along its first axis."""
    group, name = _group(pg), _op_name(op)
    parts = _parts(tensors, group)
    _write(out, [group.reduce_scatter(parts, dtype_name(out), name, f"reduce_scatter {_describe(out)} {name}")])
    return Finished()


def scatter(pg: Any, first: Any, second: Any, src: int, sync_op: bool | None = None) -> Finished:
    """``scatter(out, in, src, sync_op)``, or the older ``scatter(in, out, src)``."""
    return scatter_on_calc_stream(pg, *((second, first) if sync_op is None else (first, second)), src)


def scatter_on_calc_stream(pg: Any, out: paddle.Tensor, tensors: Any, src: int) -> Finished:
    """``tensors`` is a list of one tensor per member, or one tensor for all; it counts on member ``src`` only."""
    group = _group(pg)
    parts = _parts(tensors, group) if group.rank == src else []
    with writable(out) as data:
        data[:] = group.scatter(parts, data.size, src, f"scatter {_describe(out)} from {src}")
    return Finished()


def scatter_tensor(
    pg: Any, out: paddle.Tensor, tensor: paddle.Tensor | None, src: int, sync_op: bool = True
) -> Finished:
    return scatter_on_calc_stream(pg, out, tensor, src)


def gather(
    pg: Any, tensor: paddle.Tensor, out: Any, dst: int, sync_op: bool = True, use_calc_stream: bool = False
) -> Finished:
    parts = _group(pg).gather(readable(tensor), dst, f"gather {_describe(tensor)} to {dst}")
    if parts is not None:
        _write(out, parts)
    return Finished()


def all_to_all(pg: Any, out: Any, tensors: Any, sync_op: bool = True) -> Finished:
    """``out`` and ``tensors`` are lists of one tensor per member, or tensors that are cut along their first axis."""
    group = _group(pg)
    sizes = [part.size for part in _parts(out, group)]
    _write(out, group.all_to_all(_parts(tensors, group), "all_to_all", sizes))
    return Finished()


def alltoall(pg: Any, tensors: Any, out: Any) -> Finished:
    return all_to_all(pg, out, tensors)


def all_to_all_single(
    pg: Any,
    out: paddle.Tensor,
    tensor: paddle.Tensor,
    out_sizes: Sequence[int],
    in_sizes: Sequence[int],
    sync_op: bool = True,
) -> Finished:
    """Rows of ``tensor`` for each member are ``in_sizes``, rows of ``out`` from each member ``out_sizes``."""
    group = _group(pg)
    given, wanted = _rows(readable(tensor), tensor, in_sizes), _rows(readable(out), out, out_sizes)
    _write(out, group.all_to_all(given, "all_to_all_single", [part.size for part in wanted]))
    return Finished()


def alltoall_single(
    pg: Any, tensor: paddle.Tensor, out: paddle.Tensor, in_sizes: Sequence[int], out_sizes: Sequence[int]
) -> Finished:
    return all_to_all_single(pg, out, tensor, out_sizes, in_sizes)


def barrier(pg: Any, device_id: int = -1) -> Finished:
    _group(pg).barrier()
    return Finished()


def send(pg: Any, tensor: paddle.Tensor, dst: int, sync_op: bool = True) -> Finished:
    _group(pg).send(readable(tensor), dst)
    return Finished()


def send_partial(pg: Any, tensor: paddle.Tensor, dst: int, num: int, id: int, sync_op: bool = True) -> Finished:
    """Send the ``id``-th of ``num`` pieces of ``tensor``."""
    _group(pg).send(_pieces(readable(tensor), num)[id], dst)
    return Finished()


def recv(pg: Any, tensor: paddle.Tensor, src: int, sync_op: bool = True) -> Receipt | Finished:
    return recv_partial(pg, tensor, src, 1, 0, sync_op)


def recv_partial(
    pg: Any, tensor: paddle.Tensor, src: int, num: int, id: int, sync_op: bool = True
) -> Receipt | Finished:
    """Receive into the ``id``-th of ``num`` pieces of ``tensor``."""
    group = _group(pg)

    def store(payload: np.ndarray) -> None:
        with writable(tensor) as data:
            _pieces(data, num)[id][:] = payload

    receipt = group.post_receive(src, int(tensor.size) * tensor.element_size() // num, store)
    if sync_op and not group.coalescing:
        receipt.wait()
    return receipt


def start_coalescing(pg: Any) -> None:
    """From here on receiving is put off, so that every member can send first."""
    _group(pg).coalescing = True


def end_coalescing(pg: Any, tasks: Sequence[Any] | None = None) -> None:
    group = _group(pg)
    group.coalescing = False
    group.complete()


def _group(pg: Any) -> Group:
    return type(pg).alignment_backend.group_of(pg)


def _op_name(op: Any) -> str:
    return "SUM" if op is None else op.name


def _describe(tensor: paddle.Tensor) -> str:
    return f"{dtype_name(tensor)} {int(tensor.size)}"


def _parts(tensors: Any, group: Group) -> list[np.ndarray]:
    """One byte array per member, of a list of tensors or of one tensor that is cut into equal pieces."""
    if isinstance(tensors, (list, tuple)):
        if len(tensors) != group.size:
            raise AlignmentError(f"{group} needs a list of {group.size} tensors, not of {len(tensors)}")
        return [readable(tensor) for tensor in tensors]
    return _pieces(readable(tensors), group.size)


def _pieces(data: np.ndarray, num: int) -> list[np.ndarray]:
    if data.size % num:
        raise AlignmentError(f"a tensor of {data.size} bytes cannot be cut into {num} equal pieces")
    size = data.size // num
    return [data[size * i : size * (i + 1)] for i in range(num)]


def _rows(data: np.ndarray, tensor: paddle.Tensor, rows: Sequence[int]) -> list[np.ndarray]:
    if sum(rows) != tensor.shape[0]:
        raise AlignmentError(f"all_to_all was given {tensor.shape[0]} rows, but sizes {list(rows)}")
    stops = np.cumsum(rows) * (data.size // max(1, tensor.shape[0]))
    return [data[stop - (data.size // max(1, tensor.shape[0])) * n : stop] for n, stop in zip(rows, stops, strict=True)]


def _write(out: Any, parts: Sequence[np.ndarray]) -> None:
    """Write one part into each tensor of a list, or all parts in a row into one tensor."""
    if isinstance(out, (list, tuple)):
        targets, values = list(out), list(parts)
    else:
        targets, values = [out], [parts[0] if len(parts) == 1 else np.concatenate(parts)]
    for target, value in zip(targets, values, strict=True):
        with writable(target) as data:
            if data.size != value.size:
                raise AlignmentError(
                    f"the output tensor {_describe(target)} has {data.size} bytes; needed: {value.size}"
                )
            data[:] = value
