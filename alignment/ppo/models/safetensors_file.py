"""Safetensors files, read and written one tensor at a time, bfloat16 included.

The format: 8 bytes little-endian length, a JSON object ``{name: {dtype, shape, data_offsets}}``, then the tensors'
bytes. The ``safetensors`` library's NumPy half knows no bfloat16: paddlenlp therefore stores it as ``U16``, which other
readers take for integers. Here ``BF16`` is written, and ``U16`` read as the bfloat16 that it is (no model has unsigned
integers for weights).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from alignment.errors import ModelError

#: A dtype's name in arguments -> safetensors' code of it.
DTYPE_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
#: Codes of the numbers that parameters may be stored as.
FLOATS = ("F64", *DTYPE_CODES.values())
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
_NUMPY: dict[str, Any] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "U32": np.uint32,
    "I64": np.int64,
    "U64": np.uint64,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
}
INDEX_FILE = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """One tensor to write.

    Attributes:
        name: in the file.
        shape: as written.
        code: safetensors' dtype name.
        read: returns it as an array of ``shape``: floats as any float dtype, or bfloat16's bits as uint16.
    """

    name: str
    shape: tuple[int, ...]
    code: str
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return int(np.prod(self.shape, dtype=np.int64)) * _ITEM_BYTES[self.code]


class SafetensorsFile:
    """A ``.safetensors`` file; tensors are read from a memory map when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset, self._tensors, self.metadata = read_safetensors_header(path)
        self._bytes: np.ndarray | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, as stored."""
        return {name: tuple(info["shape"]) for name, info in self._tensors.items()}

    def code(self, name: str) -> str:
        """Return safetensors' code of a tensor's dtype."""
        code = self._tensors[name]["dtype"]
        return "BF16" if code == "U16" else code

    def read(self, name: str) -> np.ndarray:
        """Return one tensor, as stored; bfloat16 comes as float32.

        Raises:
            ModelError: a dtype that NumPy has not.
        """
        info = self._tensors[name]
        if self._bytes is None:
            self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r")
        start, stop = info["data_offsets"]
        raw = self._bytes[self._offset + start : self._offset + stop]
        if self.code(name) == "BF16":
            return bfloat16_to_float32(np.frombuffer(raw, dtype=np.uint16)).reshape(info["shape"])
        if info["dtype"] not in _NUMPY:
            raise ModelError(
                f"{self.path}: tensor {name!r} has dtype {info['dtype']}, which cannot be loaded; use float32, "
                f"float16 or bfloat16"
            )
        return np.frombuffer(raw, dtype=_NUMPY[info["dtype"]]).reshape(info["shape"])


def read_safetensors_header(
    file: Path, *, role: str = "model"
) -> tuple[int, dict[str, dict[str, Any]], dict[str, str]]:
    """Read and check the header of a safetensors file.

    Returns:
        The offset of the first tensor byte, the tensors, the metadata.

    Raises:
        ModelError: the file is cut short, longer than its header says, or its header is damaged.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if len(head) < 8 or length > _MAX_HEADER_BYTES:
            raise ModelError(
                f"{role}: {file} is not a safetensors file (its first 8 bytes are no header length); copy it again"
            )
        if 8 + length > size:
            raise ModelError(
                f"{role}: {file} is cut short: its header alone takes {8 + length:,} bytes, the file has {size:,}; "
                f"copy it again"
            )
        raw = stream.read(length)
    try:
        tensors = json.loads(raw)
        metadata = tensors.pop("__metadata__", None) or {}
        end = 0
        for info in tensors.values():
            start, stop = info["data_offsets"]
            items = 1
            for dimension in info["shape"]:
                items *= dimension
            if start < 0 or any(dimension < 0 for dimension in info["shape"]):
                raise ValueError("a tensor's shape or offset is negative")
            if stop - start != items * _ITEM_BYTES[info["dtype"]]:
                raise ValueError("a tensor's shape, dtype and offsets disagree")
            end = max(end, stop)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{role}: {file} has a damaged safetensors header ({error}); copy it again") from error
    expected = 8 + length + end
    if size != expected:
        state = "is cut short" if size < expected else "has bytes after its last tensor"
        raise ModelError(
            f"{role}: {file} {state}: its header promises {expected:,} bytes, the file has {size:,}; copy it again"
        )
    return 8 + length, tensors, metadata


def write_weights(
    folder: Path, tensors: list[StoredTensor], *, metadata_format: str, max_shard_bytes: int
) -> list[str]:
    """Write ``model.safetensors``, or shards with ``model.safetensors.index.json``; returns the weight files' names.

    Files of an earlier save that are not written anew are removed: they would be taken for parts of the model.

    Args:
        folder: exists.
        tensors: filled into shards in this order.
        metadata_format: ``"np"`` (paddlenlp's) or ``"pt"`` (torch's), written as the files' ``format``.
        max_shard_bytes: of tensors in a file; a larger tensor gets a file of its own.

    Raises:
        ModelError: a number does not fit the dtype.
        OSError: the disk refuses.
    """
    shards: list[list[StoredTensor]] = [[]]
    room = max_shard_bytes
    for tensor in tensors:
        if shards[-1] and tensor.size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.size
    many = len(shards) > 1
    files = [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" if many else "model.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    for file, shard in zip(files, shards, strict=True):
        _write_file(folder / file, shard, metadata_format)
    if many:
        weight_map = {t.name: file for file, shard in zip(files, shards, strict=True) for t in shard}
        index = {
            "metadata": {"total_size": sum(t.size for t in tensors)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for left in folder.glob("model*.safetensors*"):
        if left.name not in files and not (many and left.name == INDEX_FILE):
            left.unlink()
    return files


def code_of(dtype: Any) -> str:
    """Return safetensors' code of a NumPy or Paddle dtype; uint16 is Paddle's NumPy form of bfloat16."""
    name = np.dtype(dtype).name if isinstance(dtype, type | np.dtype) else str(dtype).rpartition(".")[2]
    if name in ("uint16", "bfloat16"):
        return "BF16"
    return next(code for code, known in _NUMPY.items() if np.dtype(known) == np.dtype(name))


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """Widen bfloat16 given as uint16 bits: its 16 bits are the upper half of the float32 with the same value."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(array: np.ndarray) -> np.ndarray:
    """Round to bfloat16, to nearest and halves to even, and return its bits as uint16."""
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    # A NaN's fraction may round to zero, which would make it an infinity.
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded)


def _write_file(path: Path, tensors: list[StoredTensor], metadata_format: str) -> None:
    # Wide numbers first, so that every tensor starts at a multiple of its item's size, as safetensors' own writer does.
    ordered = sorted(tensors, key=lambda tensor: (-_ITEM_BYTES[tensor.code], tensor.name))
    header: dict[str, Any] = {"__metadata__": {"format": metadata_format}}
    offset = 0
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": tensor.code,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in ordered:
            _write_tensor(stream, tensor)
        stream.flush()
        os.fsync(stream.fileno())


def _write_tensor(stream: BinaryIO, tensor: StoredTensor) -> None:
    array = tensor.read()
    if tensor.code == "BF16":
        out = array if array.dtype == np.uint16 else to_bfloat16(array)
    else:
        with np.errstate(over="ignore"):
            out = array.astype(_NUMPY[tensor.code], copy=False)
        if tensor.code == "F16" and not np.isfinite(out[np.isfinite(array)]).all():
            raise ModelError(
                f"tensor {tensor.name} holds numbers beyond float16's range (largest: "
                f"{np.abs(array[np.isfinite(array)]).max():.4g}); export as bfloat16 or float32"
            )
    stream.write(np.ascontiguousarray(out).data if out.size else b"")
