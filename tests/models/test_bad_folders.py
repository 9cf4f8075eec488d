"""What a user sees when a model folder cannot be used: one message that names the file and what would be right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alignment.errors import ModelError
from alignment.ppo.models import check_model_folder, load_causal_lm, load_score_model, model_context_length


def edit(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; None removes one."""
    file = folder / "config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def cut(file: Path, keep: float) -> None:
    raw = file.read_bytes()
    file.write_bytes(raw[: int(len(raw) * keep)])


def to_peft(folder: Path) -> None:
    """Leave what the peft library saves: an adapter without config.json."""
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"})
    )


def add_tensor(folder: Path, name: str) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), name: np.zeros([2], np.int32)}, file, metadata={"format": "pt"})


Break = Callable[[Path], object]

#: name -> (layout, what to break, what the message says). All of these are found before anything is loaded.
CHEAP: dict[str, tuple[str, Break, str]] = {
    "no config": (
        "safetensors",
        lambda f: (f / "config.json").unlink(),
        r"has no config\.json, so it is not a model folder \(it holds: model",
    ),
    "empty config": ("safetensors", lambda f: (f / "config.json").write_text(""), r"config\.json is empty"),
    "config {}": (
        "safetensors",
        lambda f: (f / "config.json").write_text("{}"),
        r"config\.json is empty; it must be a JSON object",
    ),
    "config cut short": (
        "safetensors",
        lambda f: cut(f / "config.json", 0.5),
        r"config\.json is not JSON: line 1, column \d+",
    ),
    "unknown architecture": (
        "safetensors",
        lambda f: edit(f, model_type="gpt2"),
        r"model_type 'gpt2' in config\.json is not supported; supported are llama, qwen2, mistral, gemma",
    ),
    "near miss": (  # D27: an invitation to write qwen2 into a Qwen3's config would make it load wrongly
        "safetensors",
        lambda f: edit(f, model_type="qwen3"),
        r"'qwen3' in config\.json is not supported; supported are llama, qwen2, mistral, gemma$",
    ),
    "git lfs": (  # D27
        "safetensors",
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc"),
        r"model\.safetensors is a Git LFS pointer, .* run 'git lfs pull'",
    ),
    "git lfs config": (
        "safetensors",
        lambda f: (f / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc"),
        r"config\.json is a Git LFS pointer",
    ),
    "git lfs bin": (
        "bin",
        lambda f: (f / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc"),
        r"pytorch_model\.bin is a Git LFS pointer",
    ),
    "peft": (  # D27
        "safetensors",
        lambda f: to_peft(f),
        r"is an adapter of the peft library \(for org/base\), not a whole model; merge it into .*merge_and_unload",
    ),
    "quantised config": (  # D27: the tensors of some fit
        "safetensors",
        lambda f: edit(f, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        r"quantization_config says that the weights are quantised \(bitsandbytes\); .* the original weights",
    ),
    "quantised tensors": (
        "safetensors",
        lambda f: add_tensor(f, "model.layers.0.self_attn.q_proj.qweight"),
        r"holds quantised weights \(model\.layers\.0\.self_attn\.q_proj\.qweight\)",
    ),
    "no architecture": (
        "safetensors",
        lambda f: edit(f, model_type=None, architectures=["BertForMaskedLM"]),
        r"names no supported architecture .*BertForMaskedLM.*supported are llama",
    ),
    "no weights": (
        "safetensors",
        lambda f: (f / "model.safetensors").unlink(),
        r"has no weights \(looked for model\.safetensors",
    ),
    "empty weights": (
        "safetensors",
        lambda f: (f / "model.safetensors").write_bytes(b""),
        r"model\.safetensors is empty",
    ),
    "cut weights": (
        "safetensors",
        lambda f: cut(f / "model.safetensors", 0.7),
        r"model\.safetensors is cut short: its header promises [\d,]+ bytes, the file has [\d,]+; copy it again",
    ),
    "cut header": (
        "safetensors",
        lambda f: cut(f / "model.safetensors", 0.005),
        r"model\.safetensors is cut short: its header alone",
    ),
    "not safetensors": (
        "safetensors",
        lambda f: (f / "model.safetensors").write_text("<!doctype html><title>Not found</title>"),
        r"model\.safetensors is not a safetensors file",
    ),
    "damaged header": (
        "safetensors",
        lambda f: (f / "model.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0{abc}"),
        r"damaged safetensors header",
    ),
    "missing shard": (
        "safetensors shards",
        lambda f: (f / "model-00002-of-00003.safetensors").unlink(),
        r"lacks 1 of the 3 weight files that model\.safetensors\.index\.json names: model-00002-of-00003\.safetensors",
    ),
    "cut shard": (
        "safetensors shards",
        lambda f: cut(f / "model-00003-of-00003.safetensors", 0.9),
        r"model-00003-of-00003\.safetensors is cut",
    ),
    "index without map": (
        "safetensors shards",
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        r"index\.json has no weight_map",
    ),
    "cut bin": (
        "bin",
        lambda f: cut(f / "pytorch_model.bin", 0.8),
        r"pytorch_model\.bin is cut short \(a zip archive without its end\)",
    ),
    "old torch": (
        "bin",
        lambda f: (f / "pytorch_model.bin").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF"),
        r"is not a zip archive as torch >= 1\.6 writes it",
    ),
    "missing bin shard": (
        "bin shards",
        lambda f: (f / "pytorch_model-00001-of-00003.bin").unlink(),
        r"pytorch_model-00001-of-00003\.bin",
    ),
}


def folder_of(kit: Any, layout: str, path: Path) -> Path:
    kind, _, shards = layout.partition(" ")
    return kit.write_hf(path, kit.causal("qwen2"), kind=kind, shards=3 if shards else 1)


@pytest.mark.parametrize("name", CHEAP)
def test_found_without_loading(kit: Any, tmp_path: Path, name: str) -> None:
    layout, damage, message = CHEAP[name]
    folder = folder_of(kit, layout, tmp_path / "model")
    assert check_model_folder(folder) is not None
    damage(folder)
    with pytest.raises(ModelError, match=message) as caught:
        check_model_folder(folder, role="actor")
    assert str(caught.value).startswith("actor: ") and str(folder) in str(caught.value)
    with pytest.raises(ModelError, match=message):
        load_causal_lm(folder)


#: found while loading
COSTLY: dict[str, tuple[Break, str]] = {
    "another size": (
        lambda f: edit(f, intermediate_size=64),
        r"tensor model\.layers\.0\.mlp\.\w+\.weight has shape \[\d+, \d+\] \(as \[in, out\]\); the config asks for",
    ),
    "more layers": (lambda f: edit(f, num_hidden_layers=3), r"lacks 12 of the \d+ tensors .*qwen2\.layers\.2\."),
    "fewer layers": (
        lambda f: edit(f, num_hidden_layers=1),
        r"has 12 tensors that its config has no place for: model\.layers\.1\.",
    ),
    "another architecture": (
        lambda f: edit(f, model_type="llama"),
        r"no place for: model\.layers\.0\.self_attn\.k_proj\.bias.*llama lacks a feature",
    ),
    "heads": (
        lambda f: edit(f, num_attention_heads=3),
        r"num_attention_heads 3 must be a multiple of num_key_value_heads 2",
    ),
    "head size": (lambda f: edit(f, head_dim=24), r"head_dim 24 differs from hidden_size / num_attention_heads = 8"),
    "hidden size": (
        lambda f: edit(f, hidden_size="wide"),
        r"hidden_size must be a whole number of at least 1, got 'wide'",
    ),
    "activation": (lambda f: edit(f, hidden_act="relu"), r"hidden_act 'relu' is not supported for qwen2"),
    "rotary scaling": (
        lambda f: edit(f, rope_scaling={"type": "linear", "factor": 2.0}),
        r"rope_scaling of type 'linear' is not supported by paddlenlp's qwen2",
    ),
    "score type": (
        lambda f: edit(f, score_type="rewards"),
        r"score_type 'rewards' is unknown; did you mean 'reward'\?",
    ),
    "normaliser": (lambda f: edit(f, normalizer_type="Welford"), r"normalizer_type 'Welford' is unknown"),
}


@pytest.mark.parametrize("name", COSTLY)
def test_found_while_loading(kit: Any, tmp_path: Path, name: str) -> None:
    damage, message = COSTLY[name]
    folder = folder_of(kit, "safetensors", tmp_path / "model")
    damage(folder)
    with pytest.raises(ModelError, match=message):
        load_score_model(folder, score_type=None, role="reward model")


def test_no_such_folder_names_a_near_one(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-100").mkdir()
    with pytest.raises(ModelError, match=r"actor: no such folder: .*checkpoint-10; did you mean 'checkpoint-100'\?"):
        check_model_folder(tmp_path / "checkpoint-10", role="actor")


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"is a file; give the folder"):
        check_model_folder(tmp_path / "model.safetensors")


def test_a_hub_name_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from alignment.ppo.models import upstream

    def unreachable(name: str, files: list[str]) -> None:
        raise OSError(f"no route to the hub for {name}")

    monkeypatch.setattr(upstream, "resolve_file_path", unreachable)
    monkeypatch.chdir(tmp_path)
    assert check_model_folder("some-owner/some-model") is None
    with pytest.raises(
        ModelError,
        match=r"no folder 'some-owner/some-model', and fetching .* no route .*Give the path of a local folder",
    ):
        load_causal_lm("some-owner/some-model")


def test_a_hub_name_that_can_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kit: Any) -> None:
    from alignment.ppo.models import upstream

    cache = kit.write_hf(tmp_path / "cache", kit.causal("llama"), shards=2)
    asked: list[str] = []

    def fetch(name: str, files: list[str]) -> str | None:
        found = next((cache / file for file in files if (cache / file).is_file()), None)
        asked.append(found.name if found else "")
        return None if found is None else str(found)

    monkeypatch.setattr(upstream, "resolve_file_path", fetch)
    monkeypatch.chdir(tmp_path)
    assert load_causal_lm("some-owner/some-model").config.model_type == "llama"
    assert [name for name in asked if name][:2] == ["config.json", "model.safetensors.index.json"]


def test_a_torch_file_cannot_run_code(kit: Any, tmp_path: Path, torch_writer: Callable[..., None]) -> None:
    folder = folder_of(kit, "bin", tmp_path / "model")
    torch_writer(folder / "pytorch_model.bin", {"a": np.zeros([2], dtype=np.float32)}, evil=True)
    with pytest.raises(ModelError, match=r"it wants to run os\.system; a weight file must hold tensors only"):
        load_causal_lm(folder)


def test_damaged_pdparams(kit: Any, tmp_path: Path) -> None:
    kit.causal("llama").save_pretrained(str(tmp_path / "m"))
    cut(tmp_path / "m" / "model_state.pdparams", 0.6)
    with pytest.raises(ModelError, match=r"model_state\.pdparams cannot be read as Paddle weights"):
        load_causal_lm(tmp_path / "m")


def test_unknown_dtype(kit: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"dtype 'fp32' is unknown; it is one of float32, float16, bfloat16"):
        load_causal_lm(folder_of(kit, "safetensors", tmp_path / "model"), dtype="fp32")


def test_context_length_comes_from_the_config_alone(kit: Any, tmp_path: Path) -> None:
    folder = folder_of(kit, "safetensors", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert model_context_length(folder) == 64
    edit(folder, max_position_embeddings=None)
    assert model_context_length(folder) is None
