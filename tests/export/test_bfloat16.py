"""Models in bfloat16: saved, exported and read back to the bit, by the library that others read them with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from alignment.errors import ModelError
from alignment.export.export_model import export_model
from alignment.ppo.models import load_causal_lm, save_model, save_whole_model
from alignment.ppo.models.safetensors_file import SafetensorsFile, bfloat16_to_float32, to_bfloat16


def bits_of(model: Any) -> dict[str, np.ndarray]:
    """The weights rounded to bfloat16, as bits: what Paddle gives to NumPy for such a tensor."""
    return {name: to_bfloat16(tensor.numpy()) for name, tensor in model.state_dict().items()}


def halved(kit: Any, model_type: str) -> tuple[Any, dict[str, np.ndarray]]:
    """A model whose tensors are bfloat16, as on a GPU."""
    import paddle

    model = kit.causal(model_type)
    bits = bits_of(model)
    for name, tensor in model.state_dict().items():
        paddle.to_tensor(bits[name])._share_buffer_to(tensor)
        assert tensor.dtype == paddle.bfloat16, name
    return model, bits


def header(file: Path) -> dict[str, Any]:
    raw = file.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


def read_bits(file: Path) -> dict[str, np.ndarray]:
    """Read with the library's own reader."""
    result = {}
    with safe_open(file, framework="paddle") as opened:
        for name in opened.keys():  # noqa: SIM118  (no mapping)
            tensor = opened.get_tensor(name)
            assert str(tensor.dtype) == "paddle.bfloat16", name
            result[name] = tensor.numpy()
    return result


def codes(file: Path) -> set[str]:
    return {info["dtype"] for name, info in header(file).items() if name != "__metadata__"}


@pytest.mark.parametrize("way", ["whole", "divided"])
def test_a_bfloat16_model_is_saved_as_bfloat16(kit: Any, tmp_path: Path, way: str) -> None:
    """A2: paddlenlp writes U16, which every other reader takes for integers."""
    model, bits = halved(kit, "qwen2")
    if way == "whole":
        save_model(model, tmp_path / "saved")
    else:
        save_whole_model(model, tmp_path / "saved", {name: t.numpy() for name, t in model.state_dict().items()})
    file = tmp_path / "saved" / "model.safetensors"
    assert codes(file) == {"BF16"}
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"
    read = read_bits(file)
    assert set(read) == set(bits)
    for name, wanted in bits.items():
        np.testing.assert_array_equal(read[name], wanted, err_msg=name)


@pytest.mark.parametrize("stored", ["BF16", "U16"])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32", "float16"])
def test_export_of_a_bfloat16_model(kit: Any, tmp_path: Path, stored: str, dtype: str | None) -> None:
    """A2: it became 64-bit integers, whatever --dtype said; U16 is what earlier versions and paddlenlp wrote."""
    model, bits = halved(kit, "llama")
    save_model(model, tmp_path / "saved")
    if stored == "U16":
        save_file(bits, tmp_path / "saved" / "model.safetensors", metadata={"format": "np"})
        assert codes(tmp_path / "saved" / "model.safetensors") == {"U16"}
    export_model(tmp_path / "saved", tmp_path / "out", format="huggingface", dtype=dtype)
    file = tmp_path / "out" / "model.safetensors"
    code = {None: "BF16", "bfloat16": "BF16", "float32": "F32", "float16": "F16"}[dtype]
    assert codes(file) == {code}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == (dtype or "bfloat16")
    head = {
        "BF16": lambda: bfloat16_to_float32(read_bits(file)["lm_head.weight"]),
        "F32": lambda: SafetensorsFile(file).read("lm_head.weight"),
        "F16": lambda: SafetensorsFile(file).read("lm_head.weight").astype(np.float32),
    }[code]()
    wanted = bfloat16_to_float32(bits["lm_head.weight"])
    np.testing.assert_allclose(head.T, wanted, rtol=0, atol=2**-24 if code == "F16" else 0)
    # and it is the same model
    back = load_causal_lm(tmp_path / "saved")
    np.testing.assert_array_equal(back.state_dict()["lm_head.weight"].numpy(), wanted)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
def test_parameters_that_are_no_floats_are_refused(kit: Any, tmp_path: Path, dtype: type) -> None:
    """A2: what has an unknown dtype is not silently turned into something else, in loading and in exporting."""
    folder = tmp_path / "saved"
    save_model(kit.causal("llama"), folder)
    tensors = {name: tensor.astype(dtype) for name, tensor in read_floats(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "np"})
    for use in (lambda: load_causal_lm(folder), lambda: export_model(folder, tmp_path / "out")):
        with pytest.raises(ModelError, match=r"is stored as [IU]\d+, which is no dtype of weights"):
            use()
    assert not (tmp_path / "out").exists()


def read_floats(file: Path) -> dict[str, np.ndarray]:
    opened = SafetensorsFile(file)
    return {name: opened.read(name) for name in opened.shapes()}
