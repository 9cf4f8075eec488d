"""Tensors as bytes in place, and element-wise reductions of such bytes. NumPy arrays in, NumPy arrays out."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from alignment.errors import AlignmentError

if TYPE_CHECKING:
    import paddle

_REDUCTIONS = {"SUM": np.add, "AVG": np.add, "MAX": np.maximum, "MIN": np.minimum, "PRODUCT": np.multiply}
_NUMBERS = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")


def dtype_name(tensor: paddle.Tensor) -> str:
    """Return ``"float32"`` for ``paddle.float32`` and so on."""
    return str(tensor.dtype).rpartition(".")[2]


def readable(tensor: paddle.Tensor) -> np.ndarray:
    """Return the tensor's values as uint8 ``[bytes]``: the tensor's own memory, or a copy if it is not contiguous.

    The caller keeps the tensor alive while it uses the result.
    """
    if tensor.is_contiguous():
        return _bytes_of(tensor)
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)


@contextlib.contextmanager
def writable(tensor: paddle.Tensor) -> Iterator[np.ndarray]:
    """Give the tensor's values as uint8 ``[bytes]``; what the body writes there is in the tensor afterwards.

    Views of a larger buffer (slices of fused parameters) are written through.
    """
    if tensor.is_contiguous():
        yield _bytes_of(tensor)
        return
    import paddle

    with paddle.no_grad():
        # Not tensor.contiguous(), which would cut the view itself loose from its buffer.
        dense = paddle.assign(tensor)
        yield _bytes_of(dense)
        paddle.assign(dense, tensor)


def _bytes_of(tensor: paddle.Tensor) -> np.ndarray:
    size = int(tensor.size) * tensor.element_size()
    if size == 0:
        return np.empty(0, np.uint8)
    return np.frombuffer((ctypes.c_char * size).from_address(tensor.data_ptr()), np.uint8)


def reduce_parts(parts: Sequence[np.ndarray], dtype: str, op: str) -> np.ndarray:
    """Combine equally long byte arrays element by element, in the order given (so every rank gets the same bits).

    float16 and bfloat16 are accumulated in float32 and rounded once at the end.

    Args:
        parts: one uint8 ``[bytes]`` per rank.
        dtype: the elements' type: ``"float32"``, ``"bfloat16"``, ...
        op: ``"SUM"``, ``"AVG"``, ``"MAX"``, ``"MIN"`` or ``"PRODUCT"``.

    Returns:
        uint8 ``[bytes]``, new memory.

    Raises:
        AlignmentError: for a dtype or operation that has no meaning (AVG of integers).
    """
    if dtype not in _NUMBERS or op not in _REDUCTIONS or (op == "AVG" and "float" not in dtype):
        raise AlignmentError(f"a reduction {op} of {dtype} tensors is not possible on CPU processes")
    combine = _REDUCTIONS[op]
    total = _widen(parts[0], dtype).copy()
    # Infinities and NaN come through as on other devices, without NumPy's warnings.
    with np.errstate(over="ignore", invalid="ignore"):
        for part in parts[1:]:
            combine(total, _widen(part, dtype), out=total)
        if op == "AVG":
            total /= total.dtype.type(len(parts))
        return _narrow(total, dtype).view(np.uint8)


def _widen(data: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        # bfloat16 is the upper half of float32.
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype == "float16":
        return data.view(np.float16).astype(np.float32)
    return data.view(dtype)


def _narrow(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "float16":
        return values.astype(np.float16)
    if dtype != "bfloat16":
        return values
    bits = values.view(np.uint32)
    # Round to nearest, ties to even; a NaN must not round up to infinity.
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
