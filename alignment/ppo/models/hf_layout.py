"""Weight files of every layout, read one tensor at a time as NumPy arrays with paddlenlp's names and orientation.

Two layouts exist. paddlenlp's own folders name the backbone after the architecture (``qwen2.layers.0...``) and store
a linear weight as ``[in, out]``; Hugging Face's name it ``model.`` and store ``[out, in]``. paddlenlp has a converter
(``convert_from_torch=True``); it is not used, because it writes its result into the user's folder, runs whatever code
a ``.bin`` file's pickle names, reads bfloat16 ``.bin`` files as integers and loads a folder with missing tensors as a
partly random model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from alignment.errors import ModelError

from .folders import ModelFolder, refuse_quantised
from .pickle_files import PaddleFile, TorchFile
from .safetensors_file import FLOATS, SafetensorsFile

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
        refuse_quantised(stored, folder.weight_files[0])
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
