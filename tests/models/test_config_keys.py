"""config.json: published ones pass in silence, what asks for something that is not computed is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignment.errors import ModelError
from alignment.export.export_model import export_model
from alignment.ppo.models import causal_logits, check_model_folder, load_causal_lm, model_context_length
from alignment.ppo.models.config_keys import check_keys, standard_form
from alignment.ppo.models.folders import ModelFolder, model_type_of
from alignment.ppo.models.loading import load_config

Said = Callable[[], str]

LLAMA3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def sizes(vocab: int, hidden: int, inner: int, layers: int, heads: int, kv: int, context: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": context,
        "initializer_range": 0.02,
        "use_cache": True,
    }


def llama(**more: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        **more,
    }


def qwen2(**more: Any) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        **more,
    }


#: Keys and values as published.
PUBLISHED: dict[str, dict[str, Any]] = {
    "LLaMA 1, an early conversion": {
        **llama(rms_norm_eps=1e-6, bos_token_id=0, eos_token_id=1, pad_token_id=-1),
        "max_sequence_length": 2048,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "initializer_range": 0.02,
        "torch_dtype": "float16",
        "transformers_version": "4.27.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "Llama 2 7B chat": llama(
        **sizes(32000, 4096, 11008, 32, 32, 32, 4096),
        _name_or_path="meta-llama/Llama-2-7b-chat-hf",
        pretraining_tp=1,
        rope_scaling=None,
        torch_dtype="float16",
        transformers_version="4.32.0.dev0",
    ),
    "Llama 3 8B": llama(
        **sizes(128256, 4096, 14336, 32, 32, 8, 8192),
        attention_bias=False,
        attention_dropout=0.0,
        pretraining_tp=1,
        rope_scaling=None,
        rope_theta=500000.0,
        torch_dtype="bfloat16",
        transformers_version="4.40.0.dev0",
    ),
    "Llama 3.1 8B Instruct": llama(
        **sizes(128256, 4096, 14336, 32, 32, 8, 131072)
        | {"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]},
        attention_bias=False,
        attention_dropout=0.0,
        mlp_bias=False,
        pretraining_tp=1,
        rope_scaling=LLAMA3_ROPE,
        rope_theta=500000.0,
        torch_dtype="bfloat16",
        transformers_version="4.42.3",
    ),
    "Llama 3.2 1B": llama(
        **sizes(128256, 2048, 8192, 16, 32, 8, 131072),
        attention_bias=False,
        attention_dropout=0.0,
        head_dim=64,
        mlp_bias=False,
        pretraining_tp=1,
        rope_scaling={**LLAMA3_ROPE, "factor": 32.0},
        rope_theta=500000.0,
        torch_dtype="bfloat16",
        transformers_version="4.45.0.dev0",
    )
    | {"tie_word_embeddings": True},
    "Llama 3.2 1B, saved by transformers 5": llama(
        **sizes(128256, 2048, 8192, 16, 32, 8, 131072),
        attention_bias=False,
        attention_dropout=0.0,
        dtype="bfloat16",
        head_dim=64,
        mlp_bias=False,
        pad_token_id=None,
        pretraining_tp=1,
        rope_parameters={**LLAMA3_ROPE, "factor": 32.0, "rope_theta": 500000.0},
        transformers_version="5.0.0",
    )
    | {"tie_word_embeddings": True},
    "Qwen2 7B": qwen2(
        **sizes(152064, 3584, 18944, 28, 28, 4, 131072),
        max_window_layers=28,
        sliding_window=131072,
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
        transformers_version="4.37.2",
    ),
    "Qwen2.5 0.5B Instruct": qwen2(
        **sizes(151936, 896, 4864, 24, 14, 2, 32768),
        max_window_layers=21,
        sliding_window=32768,
        tie_word_embeddings=True,
        torch_dtype="bfloat16",
        transformers_version="4.43.1",
    ),
    "Qwen2.5 0.5B, saved by transformers 4.57": qwen2(
        **sizes(151936, 896, 4864, 24, 14, 2, 32768),
        dtype="bfloat16",
        layer_types=["full_attention"] * 24,
        max_window_layers=21,
        rope_scaling=None,
        sliding_window=None,
        tie_word_embeddings=True,
        transformers_version="4.57.1",
    ),
    "Qwen2.5 0.5B, saved by transformers 5": {
        key: value
        for key, value in qwen2(
            **sizes(151936, 896, 4864, 24, 14, 2, 32768),
            dtype="bfloat16",
            layer_types=["full_attention"] * 24,
            max_window_layers=21,
            pad_token_id=None,
            rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"},
            sliding_window=None,
            tie_word_embeddings=True,
            transformers_version="5.0.0",
        ).items()
        if key != "rope_theta"
    },
    "DeepSeek R1 distill, Qwen 1.5B": qwen2(
        **sizes(151936, 1536, 8960, 28, 12, 2, 131072) | {"rope_theta": 10000},
        max_window_layers=21,
        sliding_window=4096,
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
        transformers_version="4.44.0",
        use_mrope=False,
    ),
    "DeepSeek R1 distill, Llama 8B": llama(
        **sizes(128256, 4096, 14336, 32, 32, 8, 131072),
        attention_bias=False,
        attention_dropout=0.0,
        mlp_bias=False,
        pretraining_tp=1,
        rope_scaling=LLAMA3_ROPE,
        rope_theta=500000.0,
        torch_dtype="bfloat16",
        transformers_version="4.43.0.dev0",
    ),
    "Mistral 7B v0.1": {
        **llama(architectures=["MistralForCausalLM"], model_type="mistral"),
        **sizes(32000, 4096, 14336, 32, 32, 8, 32768),
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0.dev0",
    },
    "Mistral 7B v0.3": {
        **llama(architectures=["MistralForCausalLM"], model_type="mistral"),
        **sizes(32768, 4096, 14336, 32, 32, 8, 32768),
        "attention_dropout": 0.0,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.42.0.dev0",
    },
    "Gemma 2B": {
        **llama(architectures=["GemmaForCausalLM"], model_type="gemma", rms_norm_eps=1e-6, pad_token_id=0),
        **sizes(256000, 2048, 16384, 18, 8, 1, 8192),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 256,
        "hidden_act": "gelu",
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.38.0.dev0",
    },
    "SmolLM2 135M Instruct": llama(
        **sizes(49152, 576, 1536, 30, 9, 3, 8192)
        | {"initializer_range": 0.041666666666666664, "tie_word_embeddings": True},
        attention_bias=False,
        attention_dropout=0.0,
        is_llama_config=True,
        mlp_bias=False,
        pad_token_id=2,
        pretraining_tp=1,
        rope_interleaved=False,
        rope_scaling=None,
        rope_theta=100000,
        torch_dtype="bfloat16",
        transformers_version="4.42.3",
        **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}},
    ),
    "TinyLlama 1.1B chat": llama(
        **sizes(32000, 2048, 5632, 22, 32, 4, 2048),
        attention_bias=False,
        pretraining_tp=1,
        rope_scaling=None,
        rope_theta=10000.0,
        torch_dtype="bfloat16",
        transformers_version="4.35.0",
    ),
    "Yi 6B": llama(
        **sizes(64000, 4096, 11008, 32, 32, 4, 4096),
        attention_bias=False,
        pad_token_id=0,
        pretraining_tp=1,
        rope_scaling=None,
        rope_theta=5000000.0,
        torch_dtype="bfloat16",
        transformers_version="4.34.0",
    ),
    "a reward model in Safe RLHF's form": llama(
        **sizes(32001, 4096, 11008, 32, 32, 32, 2048),
        architectures=["LlamaModelForScore"],
        bias=False,
        do_normalize=False,
        mean=[0.0],
        momentum=None,
        normalizer_type=None,
        pad_token_id=32000,
        pretraining_tp=1,
        rope_scaling=None,
        score_dim=1,
        score_type="reward",
        torch_dtype="bfloat16",
        transformers_version="4.36.2",
        var=[1.0],
    ),
    "a sequence classifier": qwen2(
        **sizes(151936, 896, 4864, 24, 14, 2, 32768),
        architectures=["Qwen2ForSequenceClassification"],
        id2label={"0": "LABEL_0"},
        label2id={"LABEL_0": 0},
        max_window_layers=21,
        problem_type="regression",
        sliding_window=32768,
        tie_word_embeddings=True,
        torch_dtype="bfloat16",
        transformers_version="4.45.0",
    ),
}


def folder_of(config: dict[str, Any], path: Path) -> ModelFolder:
    """A checked folder without weights."""
    where = f"model: {path / 'config.json'}"
    content = standard_form(config, where=where)
    model_type = model_type_of(content, path)
    check_keys(content, model_type, where=where)
    return ModelFolder(path, content, model_type, "safetensors", ())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_pass_in_silence(name: str, tmp_path: Path, said: Said) -> None:
    config = load_config(folder_of(PUBLISHED[name], tmp_path))
    assert said() == ""
    given = PUBLISHED[name]
    theta = given.get("rope_theta") or (given.get("rope_parameters") or {}).get("rope_theta") or 10000.0
    assert config.rope_theta == theta
    assert getattr(config, "rope_scaling", None) == (
        {**LLAMA3_ROPE, "factor": 32.0} if "3.2" in name else LLAMA3_ROPE if given.get("rope_scaling") else None
    )


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral", "gemma"])
def test_what_paddlenlp_writes_passes_in_silence(model_type: str, kit: Any, tmp_path: Path, said: Said) -> None:
    """Every attribute of its config classes, also those that it leaves out of a file because they are defaults."""
    everything = {
        k: v for k, v in vars(kit.config(model_type)).items() if not k.startswith("_") and k != "quantization_config"
    }
    folder_of({**everything, "dtype": "float32", "model_type": model_type}, tmp_path)
    assert said() == ""


#: model_type -> what is added to a plain config -> what the message names.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"attention_bias": True}, r"attention_bias is True: that asks for biases in the attention"),
    ("mistral", {"attention_bias": True}, "attention_bias"),
    ("gemma", {"attention_bias": True}, "attention_bias"),
    ("llama", {"mlp_bias": True}, "mlp_bias"),
    ("qwen2", {"mlp_bias": True}, "mlp_bias"),
    ("llama", {"sliding_window": 4096}, "sliding_window is 4096"),
    ("gemma", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
    ("mistral", {"layer_types": ["sliding_attention", "full_attention"]}, "a window in some layers only"),
    ("qwen2", {"layer_types": ["linear_attention"]}, "layer_types"),
    ("llama", {"layer_types": ["chunked_attention", "full_attention"]}, "layer_types"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("gemma", {"final_logit_softcapping": 30.0}, "a cap on the logits"),
    ("gemma", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("gemma", {"query_pre_attn_scalar": 224}, "query_pre_attn_scalar"),
    ("llama", {"attention_multiplier": 0.0078125}, "attention_multiplier"),
    ("llama", {"residual_multiplier": 0.22}, "residual_multiplier"),
    ("llama", {"embedding_multiplier": 12.0}, "embedding_multiplier"),
    ("llama", {"logits_scaling": 8.0}, "logits_scaling"),
    ("llama", {"logit_scale": 0.0625}, "logit_scale"),
    ("llama", {"no_rope_layers": [1, 1, 1, 0]}, "layers without rotary positions"),
    ("llama", {"no_rope_layer_interval": 4}, "layers without rotary positions"),
    ("llama", {"clip_qkv": 8.0}, "clip_qkv"),
    ("llama", {"qk_norm": True}, "norms of queries and keys"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved"),
    ("llama", {"scale_emb": 12, "scale_depth": 1.4}, "scale_emb"),
    ("llama", {"num_experts": 8}, "num_experts is 8: that asks for experts"),
    ("mistral", {"num_local_experts": 8, "num_experts_per_tok": 2}, "experts"),
    ("qwen2", {"use_mrope": True}, "multimodal"),
    ("qwen2", {"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, "rope_scaling of type 'mrope'"),
    ("mistral", {"alibi": True}, "alibi"),
    ("llama", {"head_dim": 16}, "head_dim 16 differs"),
    ("qwen2", {"hidden_act": "relu"}, "hidden_act 'relu'"),
    ("gemma", {"hidden_act": "silu"}, "hidden_act 'silu' is not supported for gemma"),
    ("gemma", {"hidden_activation": "relu"}, "hidden_activation 'relu'"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling of type 'yarn'"),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0}}, "type 'yarn'"),
    ("qwen2", {"rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 4.0}}, "type 'linear'"),
    ("llama", {"rope_scaling": {"factor": 4.0}}, "rope_scaling of type None"),
    ("llama", {"rope_scaling": "linear"}, "rope_scaling must be an object or null, got 'linear'"),
    (
        "gemma",
        {"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}, "full_attention": {"rope_theta": 1e6}}},
        "positions of their own to sliding_attention and full_attention layers",
    ),
    ("llama", {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "they must agree"),
    ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised \(gptq\)"),
    ("llama", {"compression_config": {"quantization_status": "frozen"}}, r"quantised \(frozen\)"),
]


@pytest.mark.parametrize(("model_type", "asks", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_not_computed_is_refused(
    model_type: str, asks: dict[str, Any], message: str, kit: Any, tmp_path: Path
) -> None:
    """D3, the kind: a key that changes the computation and is not read."""
    plain = {"model_type": model_type, **sizes(120, 32, 48, 2, 4, 2, 64)}
    if model_type == "gemma":
        plain["head_dim"] = 16
    load_config(folder_of(plain, tmp_path), role="actor")
    with pytest.raises(ModelError, match=message) as caught:
        load_config(folder_of(plain | asks, tmp_path), role="actor")
    assert "config.json" in str(caught.value)


def test_an_unknown_key_is_named_once(kit: Any, tmp_path: Path, said: Said) -> None:
    folder = kit.write_hf(tmp_path / "model", kit.causal("llama"), twist=3, auto_map={"AutoModel": "m.Model"})
    for role in ("actor", "critic"):
        assert check_model_folder(folder, role=role) is not None
    assert said().count("auto_map, twist are unknown here and not read") == 1


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral", "gemma"])
def test_folders_of_transformers_5(model_type: str, kit: Any, tmp_path: Path) -> None:
    """D3: positions came from the default theta of 10,000, without a word."""
    model = kit.causal(model_type, rope_theta=300.0)
    kit.write_hf(tmp_path / "4", model)
    kit.write_hf(tmp_path / "5", model)
    file = tmp_path / "5" / "config.json"
    config = json.loads(file.read_text())
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    config["dtype"] = config.pop("torch_dtype")
    file.write_text(json.dumps(config))
    ids = kit.ids(2, 40)
    old, new = (causal_logits(load_causal_lm(tmp_path / name), ids).numpy() for name in ("4", "5"))
    np.testing.assert_array_equal(new, old)


def test_scaled_positions_of_transformers_5(kit: Any, tmp_path: Path) -> None:
    """D3: llama3, linear and dynamic, by both spellings; the export says what was read."""
    model = kit.causal("llama")
    for kind in ("llama3", "linear", "dynamic"):
        scaling = LLAMA3_ROPE | {"original_max_position_embeddings": 16} if kind == "llama3" else {"factor": 4.0}
        scaling |= {"rope_type": kind}
        kit.write_hf(tmp_path / f"{kind}-4", model, rope_scaling=scaling)
        kit.write_hf(tmp_path / f"{kind}-5", model, rope_parameters={**scaling, "rope_theta": 10000.0})
        ids = kit.ids(2, 60)
        old, new = (causal_logits(load_causal_lm(tmp_path / f"{kind}-{v}"), ids).numpy() for v in (4, 5))
        np.testing.assert_array_equal(new, old)
        export_model(tmp_path / f"{kind}-5", tmp_path / f"{kind}-out", format="huggingface")
        written = json.loads((tmp_path / f"{kind}-out" / "config.json").read_text())
        assert written["rope_scaling"] == scaling and "rope_parameters" not in written


WINDOWS: dict[str, tuple[dict[str, Any], bool]] = {
    "switched off": ({"use_sliding_window": False, "max_window_layers": 0}, False),
    "no layer": ({"use_sliding_window": True, "max_window_layers": 2}, False),
    "some layers": ({"use_sliding_window": True, "max_window_layers": 1}, True),
    "by kind": ({"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}, True),
    "no kind": ({"use_sliding_window": True, "max_window_layers": 0, "layer_types": ["full_attention"] * 2}, False),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_qwen2_does_not_read_beyond_its_window(name: str, kit: Any, tmp_path: Path) -> None:
    """D19: longer rows were computed without the window, and the export said that there was none."""
    keys, felt = WINDOWS[name]
    folder = kit.write_hf(tmp_path / "model", kit.causal("qwen2"), sliding_window=16, **keys)
    assert model_context_length(folder) == (16 if felt else 64)
    model = load_causal_lm(folder)
    assert np.isfinite(causal_logits(model, kit.ids(1, 16)).numpy()).all()
    if felt:
        with pytest.raises(ModelError, match="rows of 17 tokens, but this model attends within a window of 16"):
            causal_logits(model, kit.ids(1, 17))
    else:
        causal_logits(model, kit.ids(1, 17))
    for format in ("huggingface", "paddle"):
        export_model(folder, tmp_path / format, format=format)
        written = json.loads((tmp_path / format / "config.json").read_text())
        assert {k: written.get(k) for k in keys} == keys and written["sliding_window"] == 16
        assert model_context_length(tmp_path / format) == (16 if felt else 64)


HUB = """
from alignment.ppo.models import local_folder, model_context_length
print(model_context_length("our/model"), local_folder("our/model"))
"""


def test_a_hub_models_context_is_that_of_its_folder(kit: Any, tmp_path: Path) -> None:
    """rl 17: it was unknown, so nothing was checked and positions behind the table were read."""
    folder = kit.write_hf(tmp_path / "models" / "our" / "model", kit.causal("llama"))
    environment = os.environ | {"PPNLP_HOME": str(tmp_path)}  # where fetched models are kept
    done = subprocess.run(
        [sys.executable, "-c", HUB], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["64", str(folder)]
