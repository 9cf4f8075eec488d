"""Weight files that are pickles, torch's ``.bin`` and Paddle's ``.pdparams``, read without running what they name.

A pickle is a program. ``torch.load`` and ``paddle.load`` run it; the unpicklers here know the few calls that rebuild
tensors and refuse all others, and what a file says of places in memory is checked before anything is read there.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignment.errors import ModelError

from .folders import check_torch_zip
from .safetensors_file import bfloat16_to_float32, code_of

#: What a cut or crafted pickle may raise on its way.
_DAMAGE = (
    pickle.UnpicklingError,
    EOFError,
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    IndexError,
    MemoryError,
    OverflowError,
    OSError,
)
#: torch's storage classes -> NumPy dtype; bfloat16 is read as bits and widened.
_TORCH_STORAGES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": "bfloat16",
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


@dataclass(frozen=True)
class _Storage:
    """A block of numbers inside a torch archive, not read yet."""

    dtype: Any
    key: str
    items: int


@dataclass(frozen=True)
class _TorchTensor:
    """A view on a storage, as torch pickles a tensor."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _torch_tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> _TorchTensor:
    """What a file says of a tensor; the numbers say where it is read, so they are not believed."""
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in numbers):
        raise pickle.UnpicklingError(f"a tensor's offset, shape or stride is no natural number: {numbers}")
    if len(shape) != len(stride):
        raise pickle.UnpicklingError(f"a tensor has {len(shape)} dimensions and {len(stride)} strides")
    return _TorchTensor(storage, offset, tuple(shape), tuple(stride))


class _TorchUnpickler(pickle.Unpickler):
    """Rebuilds the description of the tensors in a torch file and refuses everything else, so that a weight file
    cannot run code.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module == "collections" and name == "OrderedDict":
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return lambda storage, offset, shape, stride, *_: _torch_tensor(storage, offset, shape, stride)
        if module == "torch._utils" and name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return lambda data, *_: data
        if module in ("torch", "torch.storage") and name in _TORCH_STORAGES:
            return name
        raise pickle.UnpicklingError(f"it wants to run {module}.{name}; a weight file must hold tensors only")

    def persistent_load(self, pid: Any) -> _Storage:
        _, storage_class, key, _, items = pid
        return _Storage(_TORCH_STORAGES[storage_class], str(key), int(items))


class TorchFile:
    """A ``pytorch_model.bin`` file (zip format), read without torch; tensors are read when asked for."""

    metadata: dict[str, str] = {"format": "pt"}

    def __init__(self, path: Path) -> None:
        self.path = path
        self._prefix = check_torch_zip(path)
        with zipfile.ZipFile(path) as archive:
            raw = archive.read(f"{self._prefix}/data.pkl")
        try:
            state = _TorchUnpickler(io.BytesIO(raw)).load()
        except _DAMAGE as error:
            raise ModelError(
                f"{path} cannot be read as a torch weight file: {error}; save the model as safetensors"
            ) from error
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
        if not isinstance(state, dict):
            raise ModelError(f"{path} holds a {type(state).__name__}, not a dictionary of tensors")
        self._tensors: dict[str, _TorchTensor] = {k: v for k, v in state.items() if isinstance(v, _TorchTensor)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, as stored."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def code(self, name: str) -> str:
        """Return safetensors' code of a tensor's dtype."""
        return code_of(self._tensors[name].storage.dtype)

    def read(self, name: str) -> np.ndarray:
        """Return one tensor, as stored; bfloat16 comes as float32."""
        tensor = self._tensors[name]
        is_bfloat16 = isinstance(tensor.storage.dtype, str)
        dtype = np.dtype(np.uint16 if is_bfloat16 else tensor.storage.dtype)
        try:
            with zipfile.ZipFile(self.path) as archive:
                raw = archive.read(f"{self._prefix}/data/{tensor.storage.key}")
        except (KeyError, zipfile.BadZipFile) as error:
            raise ModelError(
                f"{self.path}: the numbers of tensor {name!r} are missing or damaged ({error}); copy the file again"
            ) from error
        last = (
            tensor.offset + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride, strict=True))
            if all(tensor.shape)
            else -1
        )
        if (last + 1) * dtype.itemsize > len(raw):
            raise ModelError(f"{self.path}: tensor {name!r} reaches beyond its storage; copy the file again")
        flat = np.frombuffer(raw, dtype=dtype)[tensor.offset :]
        strides = tuple(s * dtype.itemsize for s in tensor.stride)
        array = np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False))
        return bfloat16_to_float32(array) if is_bfloat16 else array


class _NumpyType:
    """A pickled ``numpy.dtype``: made from its code, then told its byte order."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.dtype = np.dtype(str(code))
        if self.dtype.kind not in "biuf":
            raise pickle.UnpicklingError(f"it holds an array of {code!r}; a weight file must hold numbers only")

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _NumpyArray:
    """A pickled ``numpy.ndarray``: made empty, then given its content. NumPy's own classes are kept away from what the
    file says, since they believe it.
    """

    array = np.zeros([0], np.float32)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, by_columns, raw = state
        if not isinstance(kind, _NumpyType) or not isinstance(raw, bytes):
            raise pickle.UnpicklingError("an array's content is no string of numbers")
        items = len(raw) // kind.dtype.itemsize
        if any(type(n) is not int or n < 0 for n in shape) or math.prod(shape) != items:
            raise pickle.UnpicklingError(f"an array of shape {shape} holds {items} numbers")
        flat = np.frombuffer(raw, kind.dtype) if items else np.zeros([0], kind.dtype)
        self.array = flat.reshape(shape, order="F" if by_columns else "C")


class _PaddleUnpickler(pickle.Unpickler):
    """Rebuilds the NumPy arrays of a file that ``paddle.save`` wrote and refuses everything else, so that a weight
    file cannot run code.
    """

    _KNOWN: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("numpy.core.multiarray", "_reconstruct"): _NumpyArray,
        ("numpy._core.multiarray", "_reconstruct"): _NumpyArray,
        ("numpy", "ndarray"): "ndarray",  # an argument of _reconstruct
        ("numpy", "dtype"): _NumpyType,
        ("builtins", "tuple"): tuple,  # (name, array), as a single tensor is kept
        ("__builtin__", "tuple"): tuple,
        ("_codecs", "encode"): lambda text, *_: text.encode("latin1"),  # bytes, in protocol 2
        ("__builtin__", "bytes"): lambda: b"",  # the same, if there are none
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._KNOWN:
            return self._KNOWN[module, name]
        raise pickle.UnpicklingError(f"it wants to run {module}.{name}; a weight file must hold tensors only")


class PaddleFile:
    """A ``.pdparams`` file as ``paddle.save`` writes it; read whole, since the format allows nothing else."""

    metadata: dict[str, str] = {"format": "np"}

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as stream:
                state = _PaddleUnpickler(stream, encoding="latin1").load()
        except _DAMAGE as error:
            raise ModelError(
                f"{path} cannot be read as Paddle weights ({error}); if it is cut short or damaged, copy it again; "
                "save the model as safetensors if paddle.load opens it"
            ) from error
        if not isinstance(state, dict):
            raise ModelError(f"{path} holds a {type(state).__name__}, not a dictionary of tensors")
        self._tensors: dict[str, np.ndarray] = {}
        for name, value in state.items():
            array = value[1] if isinstance(value, tuple) and len(value) == 2 else value
            if isinstance(array, _NumpyArray):
                self._tensors[str(name)] = array.array
        # Arrays beyond 1 GiB are cut into flat slices under pickle's old protocols.
        for name, info in (state.get("UnpackBigParamInfor@@") or {}).items():
            try:
                slices = [self._tensors.pop(part) for part in info["slices"]]
                self._tensors[name] = np.concatenate(slices).reshape(info["OriginShape"])
            except (KeyError, TypeError, ValueError) as error:
                raise ModelError(f"{path}: the slices of tensor {name!r} do not fit together ({error})") from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, as stored."""
        return {name: value.shape for name, value in self._tensors.items()}

    def code(self, name: str) -> str:
        """Return safetensors' code of a tensor's dtype."""
        return code_of(self._tensors[name].dtype)

    def read(self, name: str) -> np.ndarray:
        """Return one tensor, as stored; bfloat16 comes as float32."""
        value = self._tensors[name]
        return bfloat16_to_float32(value) if value.dtype == np.uint16 else value
