"""Causal and score models survive saving, and folders of every layout give the same model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from paddlenlp.transformers import AutoModelForCausalLM

from alignment.errors import ModelError
from alignment.ppo.models import (
    AutoModelForScore,
    backbone_of,
    causal_logits,
    load_causal_lm,
    load_score_model,
    save_model,
    score_tokens,
    stored_dtype,
)
from alignment.ppo.models.safetensors_file import bfloat16_to_float32, to_bfloat16

Folder = Callable[[str], Path]
Said = Callable[[], str]


def assert_same_weights(a: Any, b: Any) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor.numpy(), second[name].numpy(), err_msg=name)


def test_causal_round_trip_is_bit_equal(kit: Any, model_type: str, causal_folder: Folder) -> None:
    model, loaded = kit.causal(model_type), load_causal_lm(causal_folder(model_type))
    assert_same_weights(model, loaded)
    ids = kit.ids(2, 9)
    np.testing.assert_array_equal(causal_logits(model, ids).numpy(), causal_logits(loaded, ids).numpy())


def test_paddlenlp_opens_what_we_save(kit: Any, model_type: str, causal_folder: Folder) -> None:
    assert_same_weights(kit.causal(model_type), AutoModelForCausalLM.from_pretrained(str(causal_folder(model_type))))


def test_we_open_what_paddlenlp_saves(kit: Any, model_type: str, tmp_path: Path) -> None:
    model = kit.causal(model_type)
    model.save_pretrained(str(tmp_path / "pdparams"))
    model.save_pretrained(str(tmp_path / "shards"), safe_serialization=True, max_shard_size="20KB")
    model.save_pretrained(str(tmp_path / "pd-shards"), max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    for name in ("pdparams", "shards", "pd-shards"):
        assert_same_weights(model, load_causal_lm(tmp_path / name))


@pytest.mark.parametrize("tied_type", ["llama", "qwen2", "gemma"])
def test_tied_embeddings_stay_tied(kit: Any, tied_type: str, tmp_path: Path) -> None:
    model = kit.causal(tied_type, tie_word_embeddings=True)
    save_model(model, tmp_path / "own")
    kit.write_hf(tmp_path / "hf", model, tie_word_embeddings=True)
    for name in ("own", "hf"):
        loaded = load_causal_lm(tmp_path / name)
        assert_same_weights(model, loaded)
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


@pytest.mark.parametrize(("kind", "shards"), [("safetensors", 1), ("safetensors", 3), ("bin", 1), ("bin", 3)])
def test_hugging_face_layout(kit: Any, model_type: str, kind: str, shards: int, tmp_path: Path) -> None:
    model = kit.causal(model_type)
    folder = kit.write_hf(tmp_path / "hf", model, kind=kind, shards=shards)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert_same_weights(model, load_causal_lm(folder))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_hugging_face_backbone_without_prefix(kit: Any, model_type: str, tmp_path: Path) -> None:
    model = kit.score(model_type)
    tensors = {n.removeprefix("model."): t for n, t in kit.hf_tensors(model).items() if n.startswith("model.")}
    loaded = load_score_model(kit.write_hf(tmp_path / "hf", model, tensors=tensors))
    assert_same_weights(model.backbone, loaded.backbone)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_reward_model_with_beavers_names(kit: Any, kind: str, tmp_path: Path) -> None:
    """PKU-Alignment's beaver models: score_head.weight, normalizer.mean/var/count, do_normalize in the config."""
    model = kit.score("llama")
    model.set_normalizer(mean=[0.5], var=[4.0], normalizer_count=70)
    settings = {
        "architectures": ["LlamaModelForScore"],
        "score_dim": 1,
        "bias": False,
        "score_type": "reward",
        "do_normalize": True,
        "normalizer_type": "ExponentialMovingAverage",
        "momentum": 0.9,
    }
    folder = kit.write_hf(tmp_path / "beaver", model, kind=kind, **settings)
    loaded = AutoModelForScore.from_pretrained(folder)
    ids = kit.ids(2, 7)
    expected = (score_tokens(model, ids, raw=True).numpy() - 0.5) / 2.0
    np.testing.assert_allclose(score_tokens(loaded, ids).numpy(), expected, atol=1e-6)
    assert int(loaded.normalizer.count) == 70
    np.testing.assert_array_equal(
        score_tokens(load_score_model(folder), ids).numpy(), score_tokens(model, ids, raw=True).numpy()
    )


def test_sequence_classification_head_is_a_score_head(kit: Any, tmp_path: Path) -> None:
    model = kit.score("qwen2")
    tensors = kit.hf_tensors(model)
    tensors["score.weight"] = tensors.pop("score_head.weight")
    tensors = {n: t for n, t in tensors.items() if not n.startswith("normalizer.")}
    folder = kit.write_hf(tmp_path / "hf", model, tensors=tensors, architectures=["Qwen2ForSequenceClassification"])
    loaded = load_score_model(folder)
    ids = kit.ids(2, 5)
    np.testing.assert_array_equal(score_tokens(loaded, ids).numpy(), score_tokens(model, ids).numpy())


def test_bfloat16_and_strided_torch_tensors(kit: Any, tmp_path: Path, torch_writer: Callable[..., None]) -> None:
    model = kit.causal("llama")
    tensors = kit.hf_tensors(model)
    folder = kit.write_hf(tmp_path / "hf", model)
    (folder / "model.safetensors").unlink()
    torch_writer(folder / "pytorch_model.bin", {name: np.asfortranarray(tensor) for name, tensor in tensors.items()})
    assert_same_weights(model, load_causal_lm(folder))
    torch_writer(folder / "pytorch_model.bin", tensors, bfloat16=True)
    for name, tensor in load_causal_lm(folder).state_dict().items():
        exact = model.state_dict()[name].numpy()
        truncated = ((exact.view(np.uint32) >> 16) << 16).view(np.float32)
        np.testing.assert_array_equal(tensor.numpy(), truncated, err_msg=name)


def test_score_round_trip_keeps_everything(kit: Any, model_type: str, tmp_path: Path) -> None:
    model = kit.score(
        model_type,
        bias=True,
        score_type="cost",
        do_normalize=True,
        normalizer_type="ExponentialMovingAverage",
        momentum=0.8,
    )
    model.normalizer.update(np.random.default_rng(0).normal(3.0, 2.0, [50]))
    save_model(model, tmp_path / "value")
    saved = json.loads((tmp_path / "value" / "config.json").read_text())
    assert saved["architectures"] == [type(model).__name__]
    assert (saved["score_type"], saved["momentum"], saved["normalizer_count"]) == ("cost", 0.8, 50)
    loaded = AutoModelForScore.from_pretrained(tmp_path / "value")
    assert type(loaded) is type(model)
    assert_same_weights(model, loaded)
    for name in ("score_dim", "bias", "score_type", "do_normalize", "normalizer_type", "momentum", "mean", "var"):
        assert getattr(loaded.config, name) == getattr(model.config, name), name
    ids = kit.ids(2, 9)
    np.testing.assert_array_equal(score_tokens(model, ids).numpy(), score_tokens(loaded, ids).numpy())


def test_a_causal_folder_gets_a_new_head_and_says_so(model_type: str, causal_folder: Folder, said: Said) -> None:
    folder = causal_folder(model_type)
    first, again, other = (load_score_model(folder, seed=seed, role="critic") for seed in (1, 1, 2))
    assert (
        "critic" in said()
        and "has no score head; a new one is drawn from normal(0, 1/sqrt(32 + 1)) with seed 1" in said()
    )
    head = first.score_head.weight.numpy()
    np.testing.assert_array_equal(head, again.score_head.weight.numpy())
    assert (head != other.score_head.weight.numpy()).all()
    assert first.score_head.bias is None
    assert_same_weights(load_causal_lm(folder).base_model, first.backbone)


def test_a_model_that_was_made_for_another_role_is_a_warning(
    kit: Any, tmp_path: Path, causal_folder: Folder, said: Said, caplog: pytest.LogCaptureFixture
) -> None:
    """A critic judged, and a reward model answered, with no more than a line of information."""
    save_model(load_score_model(causal_folder("gemma"), score_type="critic"), tmp_path / "value")
    load_score_model(tmp_path / "value", score_type="critic")
    load_score_model(tmp_path / "value", score_type=None)
    load_causal_lm(causal_folder("gemma"))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    load_score_model(tmp_path / "value", score_type="reward", role="reward model")
    assert f"reward model: {tmp_path / 'value'} is a critic" in said()
    load_causal_lm(tmp_path / "value", role="actor")  # its language head is the embedding
    assert f"actor: {tmp_path / 'value'} is a score model, no language model" in said()
    assert [record.levelname for record in caplog.records].count("WARNING") == 2


def test_a_new_head_that_nobody_trains_is_a_warning_or_refused(
    causal_folder: Folder, said: Said, caplog: pytest.LogCaptureFixture
) -> None:
    """PPO was run against random scores, and `alignment score` printed them, with no more than a line that said so."""
    folder = causal_folder("llama")
    load_score_model(folder, role="critic")
    assert "random" not in said() and not [r for r in caplog.records if r.levelname == "WARNING"]
    load_score_model(folder, new_head="used", role="reward model")
    assert "as it is not trained here, its scores are random numbers" in caplog.records[-1].getMessage()
    assert caplog.records[-1].levelname == "WARNING"
    with pytest.raises(ModelError, match="--model: .* has no score head.*train one from it with `alignment rm`"):
        load_score_model(folder, new_head="refused", role="--model")


def test_a_new_head_has_the_stated_spread(kit: Any) -> None:
    model = AutoModelForScore.from_config(
        kit.config("llama", hidden_size=1024, score_dim=8, num_hidden_layers=1, bias=True)
    )
    weight = model.score_head.weight.numpy()
    assert abs(weight.std() * np.sqrt(1025) - 1.0) < 0.03 and abs(weight.mean()) < 0.001
    np.testing.assert_array_equal(model.score_head.bias.numpy(), 0.0)


def test_a_critic_starts_from_a_reward_model_and_is_not_normalised(kit: Any, tmp_path: Path) -> None:
    reward = kit.score("llama", do_normalize=True, normalizer_type="RunningMeanStd")
    reward.normalizer.update(np.array([1.0, 5.0, 9.0]))
    save_model(reward, tmp_path / "rm")
    critic = load_score_model(tmp_path / "rm", score_type="critic", do_normalize=None)
    ids = kit.ids(2, 6)
    np.testing.assert_array_equal(score_tokens(critic, ids).numpy(), score_tokens(reward, ids, raw=True).numpy())
    shifted = (score_tokens(reward, ids, raw=True).numpy() - 5.0) / 4.0
    np.testing.assert_allclose(score_tokens(reward, ids).numpy(), shifted, atol=1e-5)


def test_a_score_model_can_be_an_actor_only_if_it_has_an_lm_head(kit: Any, tmp_path: Path) -> None:
    model = kit.score("llama")
    save_model(model, tmp_path / "rm")
    with pytest.raises(ModelError, match="lacks 1 of the .* tensors that its config asks for: lm_head.weight"):
        load_causal_lm(tmp_path / "rm")


def test_dropout_is_off(kit: Any, tmp_path: Path) -> None:
    model = kit.causal("qwen2", attention_dropout=0.4)
    save_model(model, tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["attention_dropout"] == 0.4
    loaded = load_causal_lm(tmp_path / "m")
    ids = kit.ids(2, 9)
    loaded.train()
    training = causal_logits(loaded, ids).numpy()
    loaded.eval()
    np.testing.assert_array_equal(training, causal_logits(loaded, ids).numpy())


def test_bfloat16_on_a_cpu_is_float32_tensors_with_bfloat16_numbers(causal_folder: Folder) -> None:
    model, exact = (load_causal_lm(causal_folder("llama"), dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert {p.dtype for p in model.parameters()} == {paddle.float32}
    assert (stored_dtype(model), stored_dtype(exact)) == ("bfloat16", "float32")
    for (name, given), rounded in zip(exact.named_parameters(), model.parameters(), strict=True):
        np.testing.assert_array_equal(rounded.numpy(), bfloat16_to_float32(to_bfloat16(given.numpy())), err_msg=name)


def test_float16_is_refused_on_a_cpu(causal_folder: Folder) -> None:
    """B1: it would be a model that nothing can compute with."""
    with pytest.raises(ModelError, match="no float16 kernels on CPUs; load it as float32 or bfloat16"):
        load_causal_lm(causal_folder("llama"), dtype="float16")


def test_config_overrides_reach_the_model(causal_folder: Folder) -> None:
    assert (
        load_causal_lm(
            causal_folder("llama"), config_overrides={"use_flash_attention": True}
        ).config.use_flash_attention
        is True
    )


def test_scaled_rotary_positions_are_translated(kit: Any, tmp_path: Path) -> None:
    from alignment.ppo.models import check_model_folder, load_config

    model = kit.causal("llama")
    folder = kit.write_hf(tmp_path / "hf", model)
    content = json.loads((folder / "config.json").read_text())
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    cases = [
        ({"rope_type": "linear", "factor": 2.0}, "LlamaLinearScalingRotaryEmbedding"),
        ({"type": "dynamic", "factor": 2.0}, "LlamaDynamicNTKScalingRotaryEmbedding"),
        ({"type": "llama3", **llama3}, "Llama3RotaryEmbedding"),
        ({"rope_type": "default"}, "LlamaRotaryEmbedding"),
    ]
    for scaling, rotary in cases:
        (folder / "config.json").write_text(json.dumps(content | {"rope_scaling": scaling}))
        assert type(load_causal_lm(folder).llama.layers[0].self_attn.rotary_emb).__name__ == rotary
    (folder / "config.json").write_text(json.dumps(content | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}))
    with pytest.raises(ModelError, match="rope_scaling of type 'yarn' is not supported by paddlenlp's llama"):
        load_config(check_model_folder(folder))


def test_mistral_with_tied_embeddings_gets_a_copied_head(kit: Any, tmp_path: Path, said: Said) -> None:
    model = kit.causal("mistral")
    tensors = {n: t for n, t in kit.hf_tensors(model).items() if n != "lm_head.weight"}
    loaded = load_causal_lm(kit.write_hf(tmp_path / "hf", model, tensors=tensors, tie_word_embeddings=True))
    np.testing.assert_array_equal(loaded.lm_head.weight.numpy(), model.mistral.embed_tokens.weight.numpy().T)
    assert "cannot tie the LM head" in said()


def test_gemma_in_hugging_faces_layout_tells_of_its_gelu(kit: Any, tmp_path: Path, said: Said) -> None:
    load_causal_lm(kit.write_hf(tmp_path / "hf", kit.causal("gemma")))
    assert "tanh approximation" in said()


def test_fused_weights_are_asked_for_in_vain(causal_folder: Folder) -> None:
    with pytest.raises(ModelError, match="fuse_attention_qkv and fuse_attention_ffn must be false"):
        load_causal_lm(causal_folder("qwen2"), config_overrides={"fuse_attention_qkv": True})


def test_generation_settings_of_the_folder_are_kept(kit: Any, tmp_path: Path) -> None:
    folder = kit.write_hf(tmp_path / "hf", kit.causal("llama"), eos_token_id=2)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9], "temperature": 0.6}))
    model = load_causal_lm(folder)
    assert model.generation_config.eos_token_id == [2, 9]
    save_model(model, tmp_path / "again")
    assert load_causal_lm(tmp_path / "again").generation_config.eos_token_id == [2, 9]
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json is not JSON: line 1"):
        load_causal_lm(folder)


def test_the_pad_id_is_embedded_like_any_other(kit: Any, model_type: str, tmp_path: Path) -> None:
    """paddlenlp's Mistral gives zeros for its config's pad id, which may well be eos."""
    save_model(kit.causal(model_type, pad_token_id=1), tmp_path / "m")
    loaded = load_causal_lm(tmp_path / "m")
    embedding = backbone_of(loaded).embed_tokens
    assert (embedding(paddle.to_tensor([1])).numpy()[0] == embedding.weight.numpy()[1]).all()
    assert embedding.weight.numpy()[1].any()
