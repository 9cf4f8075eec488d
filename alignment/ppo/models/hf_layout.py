"""Weight files of every layout, read one tensor at a time as NumPy arrays with paddlenlp's names and orientation.

Two layouts exist. paddlenlp's own folders name the backbone after the architecture (``qwen2.layers.0...``) and store
a linear weight as ``[in, out]``; Hugging Face's name it ``model.`` and store ``[out, in]``. paddlenlp has a converter
(``convert_from_torch=True``); it is not used, because it writes its result into the user's folder, runs whatever code
a ``.bin`` file's pickle names, reads bfloat16 ``.bin`` files as integers and loads a folder with missing tensors as a
partly random model.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignment.errors import ModelError

from .folders import ModelFolder, check_torch_zip
from .safetensors_file import FLOATS, SafetensorsFile, bfloat16_to_float32, code_of

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


class _TorchUnpickler(pickle.Unpickler):
    """Rebuilds the description of the tensors in a torch file and refuses everything else, so that a weight file
    cannot run code.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module == "collections" and name == "OrderedDict":
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return lambda storage, offset, shape, stride, *_: _TorchTensor(storage, offset, tuple(shape), tuple(stride))
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
        except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
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


class PaddleFile:
    """A ``.pdparams`` file as ``paddle.save`` writes it; read whole, since the format allows nothing else."""

    metadata: dict[str, str] = {"format": "np"}

    def __init__(self, path: Path) -> None:
        import paddle

        self.path = path
        try:
            state = paddle.load(str(path), return_numpy=True)
        except (
            pickle.UnpicklingError,
            EOFError,
            ValueError,
            KeyError,
            IndexError,
            AttributeError,
            ImportError,
            OSError,
        ) as error:
            raise ModelError(
                f"{path} cannot be read as Paddle weights ({error}); it is cut short or damaged, copy it again"
            ) from error
        if not isinstance(state, dict):
            raise ModelError(f"{path} holds a {type(state).__name__}, not a dictionary of tensors")
        self._tensors = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}

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


_READERS = {"safetensors": SafetensorsFile, "torch": TorchFile, "paddle": PaddleFile}


class Weights:
    """All weights of a folder under paddlenlp's names and orientation.

    Args:
        folder: a checked folder.
        prefix: paddlenlp's name of the backbone inside its causal model (``"llama"``, ``"qwen2"``, ...).
    """

    def __init__(self, folder: ModelFolder, prefix: str) -> None:
        self.folder = folder
        self._files = [_READERS[folder.kind](path) for path in folder.weight_files]
        stored = {name: shape for file in self._files for name, shape in file.shapes().items()}
        self.is_torch_layout = _is_torch_layout(stored, prefix, self._files[0].metadata, folder.kind)
        self._sources: dict[str, tuple[Any, str]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in self._files:
            for name, shape in file.shapes().items():
                target = _paddle_name(name, prefix)
                self._sources[target] = (file, name)
                self._shapes[target] = shape[::-1] if self._transposed(target, shape) else shape

    def _transposed(self, name: str, shape: tuple[int, ...]) -> bool:
        # Every matrix of a decoder is a linear layer's weight but the token embedding, which both layouts store as
        # [vocab, hidden].
        return self.is_torch_layout and len(shape) == 2 and not name.endswith("embed_tokens.weight")

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape in paddlenlp's orientation."""
        return self._shapes[name]

    def code(self, name: str) -> str:
        """Return safetensors' code of a tensor's dtype (``"F32"``, ``"BF16"``, ...).

        Raises:
            ModelError: a parameter is not stored as floating-point numbers.
        """
        file, stored_name = self._sources[name]
        code = file.code(stored_name)
        if code not in FLOATS and name != "normalizer.count":
            raise ModelError(
                f"{file.path}: tensor {stored_name!r} is stored as {code}, which is no dtype of weights; they are "
                f"{', '.join(FLOATS)}. Are they quantised, or written by a tool that takes bfloat16 for integers?"
            )
        return code

    def stored_name(self, name: str) -> str:
        """Return the tensor's name in its file, for messages."""
        return self._sources[name][1]

    def file_of(self, name: str) -> Path:
        """Return the file that holds the tensor, for messages."""
        return self._sources[name][0].path

    def read(self, name: str) -> np.ndarray:
        """Return a tensor in paddlenlp's orientation, contiguous; bfloat16 comes as float32.

        Raises:
            ModelError: a parameter is not stored as floating-point numbers.
        """
        file, stored_name = self._sources[name]
        self.code(name)
        array = file.read(stored_name)
        return np.ascontiguousarray(array.T) if self._transposed(name, array.shape) else array


def _is_torch_layout(names: dict[str, tuple[int, ...]], prefix: str, metadata: dict[str, str], kind: str) -> bool:
    """Decide the layout by the backbone's name in the files; if the backbone has none, by the format that the file
    declares.
    """
    if any(name.startswith("model.") for name in names):
        return True
    if any(name.startswith(f"{prefix}.") for name in names):
        return False
    return kind == "torch" or metadata.get("format") == "pt"


def _paddle_name(name: str, prefix: str) -> str:
    """Return paddlenlp's name for a stored name."""
    if name.startswith("model."):
        return prefix + name[len("model") :]
    if name.startswith(("layers.", "embed_tokens.", "norm.")):
        return f"{prefix}.{name}"
    if name.startswith("score.") and name.count(".") == 1:  # transformers' *ForSequenceClassification with one label
        return f"score_head.{name[len('score.') :]}"
    return name
