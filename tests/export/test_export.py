"""Which folder is exported, the paddle form, and what people read when it cannot be."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignment.cli import main as command
from alignment.errors import AlignmentError, ArgumentsError, CheckpointError, ModelError
from alignment.export.export_model import export_model, find_model
from alignment.export.export_weights import parse_size
from alignment.ppo.models import load_causal_lm, load_score_model, load_tokenizer

MakeFolder = Callable[..., Path]


def weights_of(model: Any) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def assert_same(a: Any, b: Any) -> None:
    left, right = weights_of(a), weights_of(b)
    assert set(left) == set(right) and all(np.array_equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("tied", [False, True])
def test_paddle_form_opens_with_paddlenlp(
    make_folder: MakeFolder, model_type: str, tied: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from paddlenlp.transformers import AutoModelForCausalLM

    source = make_folder(model_type, tie_word_embeddings=tied)
    export_model(source, tmp_path / "hf", format="huggingface")
    export_model(tmp_path / "hf", tmp_path / "paddle")  # and from torch's layout back
    assert_same(load_causal_lm(source), load_causal_lm(tmp_path / "paddle"))
    capfd.readouterr()
    opened = AutoModelForCausalLM.from_pretrained(str(tmp_path / "paddle"))
    assert_same(load_causal_lm(source), opened)
    assert "newly initialized" not in "".join(capfd.readouterr())
    assert json.loads((tmp_path / "paddle" / "config.json").read_text())["model_type"] == model_type
    assert load_tokenizer(tmp_path / "paddle").eos_token_id == 0


def test_paddle_form_of_a_score_model(make_folder: MakeFolder, tmp_path: Path) -> None:
    source = make_folder("llama", "score", score_type="critic")
    report = export_model(source, tmp_path / "out", max_shard_size="30KB")
    assert report.architecture == "LlamaModelForScore" and len(report.weight_files) > 1
    settings: dict[str, Any] = {"score_type": None, "do_normalize": None}
    after = load_score_model(tmp_path / "out", **settings)
    assert_same(load_score_model(source, **settings), after)
    assert after.config.score_type == "critic"
    assert (tmp_path / "out" / "prompt_template.json").is_file()


def test_ppo_checkpoints_hold_two_models(
    make_folder: MakeFolder, make_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = make_checkpoint(policy=make_folder("qwen2"), value=make_folder("qwen2", "score", score_type="critic"))
    assert find_model(folder) == folder / "policy" == find_model(folder, "policy")
    assert find_model(folder, "value") == folder / "value" == find_model(folder / "value", "value")
    out = tmp_path / "out"
    assert command(["export", "--checkpoint", str(folder), "--role", "value", "--output", str(out)]) == 0
    assert f"exported {folder / 'value'} (Qwen2ModelForScore): {out}" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="no score head"):
        find_model(folder / "policy", "value")
    with pytest.raises(CheckpointError, match=r"no final model.*checkpoint-3"):
        find_model(folder.parent)
    shutil.rmtree(folder / "value")
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder / "trainer")
    with pytest.raises(CheckpointError, match=r"holds no value model, only policy"):
        find_model(folder, "value")


@pytest.mark.parametrize("inner", ["", "policy"])
def test_a_damaged_checkpoint_is_named(
    make_folder: MakeFolder, make_checkpoint: Callable[..., Path], inner: str, tmp_path: Path
) -> None:
    model = make_folder("qwen2")
    folder = make_checkpoint(**{inner or "plain": model})
    file = folder / inner / "model.safetensors"
    with file.open("rb+") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last[0] ^ 1]))
    with pytest.raises(CheckpointError, match=r"model\.safetensors has changed"):
        export_model(folder / inner, tmp_path / "out")
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        export_model(folder / inner, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_lora_adapter_is_merged_on_the_way(make_folder: MakeFolder, kit: Any, tmp_path: Path) -> None:
    from alignment.ppo.models import LoRASettings, causal_logits, save_model, unwrap

    model = load_causal_lm(make_folder("llama"), lora=LoRASettings(rank=2))
    kit.randomise(unwrap(model), 5)
    base = weights_of(load_causal_lm(make_folder("llama")))
    for name, tensor in unwrap(model).state_dict().items():
        if name in base:
            tensor.set_value(base[name])
    save_model(model, tmp_path / "adapter")
    export_model(tmp_path / "adapter", tmp_path / "hf", format="huggingface")
    ids = kit.ids(2, 6)
    exported = causal_logits(load_causal_lm(tmp_path / "hf"), ids).numpy()
    np.testing.assert_allclose(exported, causal_logits(model, ids).numpy(), atol=1e-4)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter", "hf"]


def test_output_appears_whole_or_not_at_all(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignment.export import export_model as export

    source = make_folder("qwen2")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(ArgumentsError, match=r"not empty.*--overwrite"):
        export_model(source, out)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export, "write_weights", full)
        with pytest.raises(CheckpointError, match="No space left on device; the disk is full"):
            export_model(source, out, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"] and (out / "mine.txt").read_text() == "keep"
    export_model(source, out, overwrite=True)
    assert not (out / "mine.txt").exists() and (out / "model.safetensors").is_file()
    for wrong in (out, tmp_path):  # replacing the source, or a folder that holds it, would destroy it
        with pytest.raises(ArgumentsError, match="where the model is read from"):
            export_model(out, wrong, overwrite=True)


def test_bad_folders(make_folder: MakeFolder, tmp_path: Path) -> None:
    source = make_folder("qwen2")
    cases: list[tuple[str, type[AlignmentError], str]] = []

    def case(name: str, error: type[AlignmentError], message: str) -> Path:
        cases.append((name, error, message))
        shutil.copytree(source, tmp_path / name)
        return tmp_path / name

    (case("noweights", ModelError, "has no weights") / "model.safetensors").unlink()
    (case("noconfig", ModelError, "has no config.json") / "config.json").unlink()
    config = json.loads((source / "config.json").read_text())
    target = case("alien", ModelError, "'falcon'.*not supported")
    (target / "config.json").write_text(json.dumps(config | {"model_type": "falcon"}))
    target = case("deeper", ModelError, r"lacks 12 of the .*layers\.2\.")
    (target / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    target = case("shallower", ModelError, r"has 12 tensors .*no place for: qwen2\.layers\.1\.")
    (target / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    target = case("wider", ModelError, r"model\.safetensors: tensor .*asks for \[32, 96\]")
    (target / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    cases.append(("noweightz", CheckpointError, "no such folder.*did you mean 'noweights'"))
    for name, error, message in cases:
        with pytest.raises(error, match=message):
            export_model(tmp_path / name, tmp_path / "out", format="huggingface")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "hugginface"], "did you mean 'huggingface'"),
        (["--role", "critic"], "policy, value"),
        (["--dtype", "float8"], "float32, float16, bfloat16"),
        (["--max_shard_size", "5 apples"], "write it as 5GB"),
        (["--frmat", "paddle"], "usage: alignment export"),
    ],
)
def test_wrong_options_end_with_a_message(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["export", "--checkpoint", str(tmp_path), "--output", str(tmp_path / "o"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_sizes() -> None:
    assert [parse_size(text) for text in ("5GB", "1.5mb", "2GiB", 700, "20 KB")] == [
        5 * 10**9,
        1_500_000,
        2 << 30,
        700,
        20_000,
    ]
    for wrong in ("", "GB", "0", "-1GB", "5TB"):
        with pytest.raises(ArgumentsError, match="is no size"):
            parse_size(wrong)
