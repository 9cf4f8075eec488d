"""Adapters train alone, and merged folders compute what the adapted model computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from alignment.errors import ModelError
from alignment.ppo.models import (
    AutoModelForScore,
    LoRASettings,
    causal_logits,
    load_causal_lm,
    load_score_model,
    merge_lora,
    save_model,
    score_tokens,
    unwrap,
)

Folder = Callable[[str], Path]


def train_adapter(model: Any, loss: Callable[[], paddle.Tensor]) -> dict[str, np.ndarray]:
    """Take some steps, and return what every tensor was before."""
    before = {name: tensor.numpy().copy() for name, tensor in unwrap(model).state_dict().items()}
    optimizer = paddle.optimizer.AdamW(0.05, parameters=[p for p in model.parameters() if not p.stop_gradient])
    for _ in range(3):
        loss().backward()
        optimizer.step()
        optimizer.clear_grad()
    return before


def test_only_adapters_move_and_the_merge_is_equal(
    kit: Any, model_type: str, causal_folder: Folder, tmp_path: Path
) -> None:
    base = causal_folder(model_type)
    paddle.seed(3)
    model = load_causal_lm(base, lora=LoRASettings(rank=4))
    ids = kit.ids(3, 9)
    plain = causal_logits(load_causal_lm(base), ids).numpy()
    np.testing.assert_allclose(causal_logits(model, ids).numpy(), plain, atol=1e-6)  # B starts at zero
    before = train_adapter(model, lambda: causal_logits(model, ids).square().mean())
    moved = {name for name, tensor in unwrap(model).state_dict().items() if (tensor.numpy() != before[name]).any()}
    assert moved and all("lora_" in name for name in moved)
    assert len(moved) == 2 * 2 * 7  # A and B of seven linear layers in each of two layers
    save_model(model, tmp_path / "adapter")
    kit.tokenizer_folder(tmp_path / "adapter")
    merge_lora(tmp_path / "adapter", tmp_path / "merged")
    adapted = causal_logits(model, ids).numpy()
    assert np.abs(adapted - plain).max() > 0.01
    merged = load_causal_lm(tmp_path / "merged")
    np.testing.assert_allclose(causal_logits(merged, ids).numpy(), adapted, atol=1e-5)
    assert (tmp_path / "merged" / "tokenizer_config.json").is_file()
    assert not any("lora" in name for name in merged.state_dict())


def test_a_score_models_head_is_trained_whole_and_survives_the_merge(
    kit: Any, causal_folder: Folder, tmp_path: Path
) -> None:
    settings = {"do_normalize": True, "normalizer_type": "RunningMeanStd", "score_type": "cost"}
    model = load_score_model(causal_folder("qwen2"), lora=LoRASettings(rank=2, alpha=8), **settings)
    ids = kit.ids(3, 9)
    before = train_adapter(model, lambda: (score_tokens(model, ids, raw=True) - 1.0).square().mean())
    assert (unwrap(model).state_dict()["score_head.weight"].numpy() != before["score_head.weight"]).any()
    model.model.normalizer.update(np.array([1.0, 4.0, 7.0]))
    save_model(model, tmp_path / "adapter")
    merge_lora(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForScore.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(score_tokens(merged, ids).numpy(), score_tokens(model, ids).numpy(), atol=1e-5)
    assert (merged.config.score_type, merged.config.do_normalize, int(merged.normalizer.count)) == ("cost", True, 3)
    assert float(merged.normalizer.mean[0]) == 4.0 and float(merged.normalizer.var[0]) == 9.0


def test_the_base_can_be_named_or_moved(kit: Any, causal_folder: Folder, tmp_path: Path) -> None:
    model = load_causal_lm(causal_folder("llama"), lora=LoRASettings(target_modules=(r".*q_proj",)))
    assert json.loads(json.dumps(model.lora_config.base_model_name_or_path)) == str(causal_folder("llama"))
    save_model(model, tmp_path / "adapter")
    config = tmp_path / "adapter" / "lora_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ModelError, match="does not say which model the adapter belongs to"):
        merge_lora(tmp_path / "adapter", tmp_path / "merged")
    merge_lora(tmp_path / "adapter", tmp_path / "merged", base=causal_folder("llama"))
    ids = kit.ids(1, 5)
    np.testing.assert_allclose(
        causal_logits(load_causal_lm(tmp_path / "merged"), ids).numpy(), causal_logits(model, ids).numpy(), atol=1e-6
    )


def test_an_adapter_of_another_model_is_refused(kit: Any, causal_folder: Folder, tmp_path: Path) -> None:
    save_model(load_causal_lm(causal_folder("llama"), lora=LoRASettings()), tmp_path / "adapter")
    save_model(kit.causal("llama", num_hidden_layers=1), tmp_path / "small")
    with pytest.raises(ModelError, match=r"does not fit its base: \d+ tensors differ"):
        merge_lora(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "small")


def test_an_adapter_folder_is_no_model_folder(causal_folder: Folder, tmp_path: Path) -> None:
    save_model(load_causal_lm(causal_folder("llama"), lora=LoRASettings()), tmp_path / "adapter")
    shutil.copytree(tmp_path / "adapter", tmp_path / "an adapter")
    with pytest.raises(
        ModelError,
        match=r"is a LoRA adapter, not a whole model; merge it .* --lora_path '.*/an adapter' --o",
    ):
        load_causal_lm(tmp_path / "an adapter")
    with pytest.raises(ModelError, match="merging would overwrite"):
        merge_lora(tmp_path / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "lora_model_state.pdparams").write_bytes(b"cut")
    with pytest.raises(ModelError, match=r"LoRA adapter .* cannot be loaded into its base"):
        merge_lora(tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: LoRASettings(rank=0), "rank must be at least 1"),
        (lambda folder: LoRASettings(dropout=1.0), "dropout must be at least 0 and below 1"),
        (
            lambda folder: load_causal_lm(folder, lora=LoRASettings(target_modules=("q_proj",))),
            "match no linear layer.*llama.layers.0.self_attn.q_proj",
        ),
        (
            lambda folder: load_causal_lm(folder, lora=LoRASettings(target_modules=(r".*embed_tokens",))),
            "match a layer that is not linear",
        ),
        (lambda folder: merge_lora(folder, folder / "out"), "holds no LoRA adapter"),
    ],
)
def test_bad_settings_are_refused(causal_folder: Folder, make: Callable[[Path], object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make(causal_folder("llama"))
