"""Weight files that say more than they should: no code runs, nothing is read out of bounds, no folder is left."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from alignment.engine.weights import load_weights_into
from alignment.errors import CheckpointError, ModelError
from alignment.flow.checkpoint import CheckpointStore, verify
from alignment.flow.output import publishing
from alignment.parallel.topology import Topology
from alignment.ppo.models import (
    LoRASettings,
    check_model_folder,
    load_causal_lm,
    load_score_model,
    merge_lora,
    save_model,
)
from alignment.ppo.models.hf_layout import Weights
from alignment.ppo.models.pickle_files import PaddleFile, TorchFile


class Touch:
    """Unpickles by making a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.file),)


def as_pdparams(folder: Path, *extra: tuple[str, Any]) -> Path:
    """Turn a saved folder's weights into what ``paddle.save`` writes."""
    folder_weights = Weights(check_model_folder(folder), "llama")
    state = {name: folder_weights.read(name) for name in folder_weights} | dict(extra)
    (folder / "model.safetensors").unlink()
    with (folder / "model_state.pdparams").open("wb") as stream:
        pickle.dump(state, stream, protocol=4)
    return folder


def test_pdparams_run_no_code(kit: Any, tmp_path: Path) -> None:
    """A10: a model folder, a checkpoint that is resumed, and an adapter."""
    touched = tmp_path / "touched"
    model = kit.causal("llama")
    save_model(model, tmp_path / "model")
    evil = as_pdparams(tmp_path / "model", ("x", Touch(touched)))
    with pytest.raises(ModelError, match=r"model_state\.pdparams cannot be read .*wants to run posix\.mkdir"):
        load_causal_lm(evil)
    with pytest.raises(CheckpointError, match=r"wants to run posix\.mkdir"):
        load_weights_into(model, evil, "actor", Topology())

    save_model(model, tmp_path / "base")
    adapted = load_causal_lm(tmp_path / "base", lora=LoRASettings(rank=2))
    save_model(adapted, tmp_path / "adapter")
    file = tmp_path / "adapter" / "lora_model_state.pdparams"
    with file.open("wb") as stream:
        pickle.dump({"x": Touch(touched)}, stream)
    with pytest.raises(ModelError, match=r"wants to run posix\.mkdir"):
        merge_lora(tmp_path / "adapter", tmp_path / "merged")
    assert not touched.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_what_paddle_saves_is_read(tmp_path: Path, protocol: int) -> None:
    """A10: all forms of ``paddle.save``: tensors, arrays, several dtypes, bfloat16, an empty and a single number."""
    arrays = {
        "float": np.arange(6, dtype=np.float32).reshape(2, 3),
        "by columns": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
        "half": np.arange(3, dtype=np.float16),
        "count": np.array(7, dtype=np.int64),
        "empty": np.zeros([0, 3], np.float32),
        "other order": np.arange(3, dtype=">f4"),
    }
    tensor = paddle.to_tensor(np.array([0x3F80, 0xC000], np.uint16))
    file = tmp_path / "a.pdparams"
    paddle.save({**arrays, "bfloat16": tensor, "nested": paddle.ones([2])}, str(file), protocol=protocol)
    opened = PaddleFile(file)
    for name, wanted in arrays.items():
        np.testing.assert_array_equal(opened.read(name), wanted)
        assert opened.shapes()[name] == wanted.shape
    np.testing.assert_array_equal(opened.read("bfloat16"), np.array([1, -2], np.float32))
    assert opened.code("bfloat16") == "BF16"
    np.testing.assert_array_equal(opened.read("nested"), [1, 1])


@pytest.mark.parametrize(
    "value",
    [
        np.array([{"a": 1}], dtype=object),
        np.zeros(2, dtype=[("a", "f4")]),
        np.array(["text"]),
    ],
    ids=["objects", "records", "text"],
)
def test_arrays_that_hold_no_numbers_are_refused(tmp_path: Path, value: np.ndarray) -> None:
    """A10: an array of objects is a pickle inside a pickle."""
    file = tmp_path / "a.pdparams"
    file.write_bytes(pickle.dumps({"x": value}))
    with pytest.raises(ModelError, match="cannot be read as Paddle weights"):
        PaddleFile(file)


BAD_VIEWS: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    "stride": (0, (4, 4), (-64, 1)),
    "offset": (-8, (4, 4), (4, 1)),
    "shape": (0, (-4, 4), (4, 1)),
    "dimensions": (0, (4, 4), (1,)),
}


@pytest.mark.parametrize("name", BAD_VIEWS)
def test_a_torch_tensor_stays_inside_its_storage(tmp_path: Path, torch_writer: Callable[..., None], name: str) -> None:
    """A11: a negative stride passed the check of the end and read the memory before the numbers."""
    offset, shape, stride = BAD_VIEWS[name]
    file = tmp_path / "pytorch_model.bin"
    torch_writer(file, {"w": np.ones([4, 4], np.float32)})

    def integer(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    with zipfile.ZipFile(file) as archive:
        parts = {entry: archive.read(entry) for entry in archive.namelist()}
    honest = integer(0) + b"(" + integer(4) * 2 + b"t(" + integer(4) + integer(1) + b"t"
    told = b"".join(integer(n) for n in shape), b"".join(integer(n) for n in stride)
    crafted = integer(offset) + b"(" + told[0] + b"t(" + told[1] + b"t"
    assert parts["archive/data.pkl"].count(honest) == 1
    parts["archive/data.pkl"] = parts["archive/data.pkl"].replace(honest, crafted)
    with zipfile.ZipFile(file, "w") as archive:
        for entry, raw in parts.items():
            archive.writestr(entry, raw)
    with pytest.raises(ModelError, match="cannot be read as a torch weight file: a tensor"):
        TorchFile(file)


def test_negative_offsets_of_safetensors_are_refused(kit: Any, tmp_path: Path) -> None:
    """A11, the same kind: offsets that lie before the numbers."""
    save_model(kit.causal("llama"), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    info = header["llama.norm.weight"]
    size = info["data_offsets"][1] - info["data_offsets"][0]
    info["data_offsets"] = [-size, 0]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(ModelError, match="negative"):
        check_model_folder(tmp_path / "model")


@pytest.mark.parametrize("outside", ["../other.safetensors", "absolute", "a/../../other.safetensors"])
def test_an_index_stays_in_its_folder(kit: Any, tmp_path: Path, outside: str) -> None:
    """C5: names in an index."""
    folder = kit.write_hf(tmp_path / "model", kit.causal("llama"))
    (folder / "model.safetensors").rename(tmp_path / "other.safetensors")
    name = str(tmp_path / "other.safetensors") if outside == "absolute" else outside
    (folder / "a").mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(ModelError, match=r"names '.*other\.safetensors', which is no file of its folder"):
        check_model_folder(folder)


def test_a_manifest_stays_in_its_folder(tmp_path: Path) -> None:
    """C5: names in a checkpoint's manifest."""
    secret = tmp_path / "secret"
    secret.write_text("x")
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    entry = {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": {"../secret": entry}}))
    with pytest.raises(CheckpointError, match=r"names '\.\./secret', which is no file of the checkpoint"):
        verify(folder)


MODES = """
import os, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from alignment.flow.checkpoint import CheckpointStore
from alignment.flow.output import publishing
os.umask(0o027)
root = Path(sys.argv[1])
with CheckpointStore(root).writing(3) as folder:
    (folder / "trainer").mkdir()
    save_file({"a": np.zeros(3, np.float32)}, folder / "trainer" / "optimizer.safetensors")
with publishing(root / "final") as folder:
    save_file({"a": np.zeros(3, np.float32)}, folder / "model.safetensors")
"""


def test_files_have_the_modes_of_the_umask(kit: Any, tmp_path: Path) -> None:
    """A19: the library that writes safetensors makes them readable by their owner alone."""
    subprocess.run([sys.executable, "-c", MODES, str(tmp_path)], check=True)
    for path in tmp_path.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o750 if path.is_dir() else 0o640), path
    save_model(kit.score("llama"), tmp_path / "model")  # this process's umask
    (tmp_path / "plain").write_text("")
    plain = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()} == {plain}
    load_score_model(tmp_path / "model")
    with publishing(tmp_path / "again"), CheckpointStore(tmp_path / "more").writing(1):
        pass
