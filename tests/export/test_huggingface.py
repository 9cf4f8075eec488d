"""The Hugging Face form: torch's names and orientation, transformers' config keys, and nothing lost on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from alignment.errors import ModelError
from alignment.export.export_model import export_model
from alignment.ppo.models import load_causal_lm, load_score_model, load_tokenizer, score_tokens, tokenizer_differs

MakeFolder = Callable[..., Path]


def read_all(folder: Path) -> tuple[dict[str, np.ndarray], list[dict[str, str]]]:
    """Tensors of all weight files through the safetensors library, and each file's metadata."""
    tensors: dict[str, np.ndarray] = {}
    metadata = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as opened:
            metadata.append(opened.metadata())
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    return tensors, metadata


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def same_weights(a: Any, b: Any) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert set(left) == set(right)
    for name in left:
        np.testing.assert_array_equal(left[name].numpy(), right[name].numpy(), err_msg=name)


def test_names_orientation_and_round_trip(kit: Any, make_folder: MakeFolder, model_type: str, tmp_path: Path) -> None:
    source = make_folder(model_type)
    export_model(source, tmp_path / "hf", format="huggingface")
    model = load_causal_lm(source)
    tensors, metadata = read_all(tmp_path / "hf")
    expected = kit.hf_tensors(model)
    assert metadata == [{"format": "pt"}]
    assert set(tensors) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)
    assert tensors["model.layers.0.mlp.gate_proj.weight"].shape == (48, 32)  # [out, in]
    assert tensors["model.embed_tokens.weight"].shape == (400, 32)
    same_weights(model, load_causal_lm(tmp_path / "hf"))


def test_config_keys(make_folder: MakeFolder, model_type: str, tmp_path: Path) -> None:
    source = make_folder(model_type, rope_theta=5e5, rms_norm_eps=1e-5)
    export_model(source, tmp_path / "hf", format="huggingface")
    config = read(tmp_path / "hf" / "config.json")
    title = {"llama": "Llama", "qwen2": "Qwen2", "mistral": "Mistral", "gemma": "Gemma"}[model_type]
    expected = {
        "architectures": [f"{title}ForCausalLM"],
        "model_type": model_type,
        "torch_dtype": "float32",
        "vocab_size": 400,
        "num_key_value_heads": 2,
        "rope_theta": 5e5,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "hidden_act": "gelu" if model_type == "gemma" else "silu",
        "tie_word_embeddings": model_type == "gemma",
        "eos_token_id": 0,
        "pad_token_id": None if model_type == "mistral" else 1,
    }
    assert {name: config[name] for name in expected} == expected
    assert config.get("head_dim") == {"gemma": 16, "qwen2": None}.get(model_type, 8)
    foreign = {"paddlenlp_version", "dpo_config", "seq_length", "alibi", "rope_scaling_type", "tensor_parallel_degree"}
    assert not foreign & set(config)
    generation = read(tmp_path / "hf" / "generation_config.json")
    # The tokenizer's eos first; the ids that paddlenlp's defaults name end answers here too, so they stay.
    assert np.ravel(generation["eos_token_id"])[0] == 0
    assert "_from_model_config" not in generation and "max_length" not in generation


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral"])
def test_a_tied_head_is_left_out(make_folder: MakeFolder, model_type: str, tmp_path: Path) -> None:
    source = make_folder(model_type, tie_word_embeddings=True)
    export_model(source, tmp_path / "hf", format="huggingface")
    assert "lm_head.weight" not in read_all(tmp_path / "hf")[0]
    assert read(tmp_path / "hf" / "config.json")["tie_word_embeddings"] is True
    same_weights(load_causal_lm(source), load_causal_lm(tmp_path / "hf"))


def test_rope_scaling_in_transformers_words(make_folder: MakeFolder, tmp_path: Path) -> None:
    source = make_folder("llama", rope_scaling_type="linear", rope_scaling_factor=2.0)
    export_model(source, tmp_path / "a", format="huggingface")
    assert read(tmp_path / "a" / "config.json")["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    export_model(make_folder("llama", rope_scaling=llama3), tmp_path / "b", format="huggingface")
    assert read(tmp_path / "b" / "config.json")["rope_scaling"] == llama3
    source = make_folder("llama", rope_scaling_type="ntk", rope_scaling_factor=2.0)
    with pytest.raises(ModelError, match="'ntk'.*--format paddle"):
        export_model(source, tmp_path / "c", format="huggingface")
    assert not (tmp_path / "c").exists()


def test_shards_and_their_index(make_folder: MakeFolder, tmp_path: Path) -> None:
    source = make_folder("llama")
    report = export_model(source, tmp_path / "hf", format="huggingface", max_shard_size="20KB")
    index = read(tmp_path / "hf" / "model.safetensors.index.json")
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files == sorted(report.weight_files)
    assert files == sorted(file.name for file in (tmp_path / "hf").glob("*.safetensors"))
    for file in files:
        with safe_open(tmp_path / "hf" / file, "np") as opened:
            names = set(opened.keys())
            size = sum(opened.get_tensor(name).nbytes for name in names)
        assert names == {name for name, place in index["weight_map"].items() if place == file}
        assert size <= 20_000 or len(names) == 1
    tensors, metadata = read_all(tmp_path / "hf")
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values()) == report.size
    assert metadata == [{"format": "pt"}] * len(files)
    same_weights(load_causal_lm(source), load_causal_lm(tmp_path / "hf"))


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_narrow_dtypes_round_to_nearest(make_folder: MakeFolder, tmp_path: Path, dtype: str, bits: int) -> None:
    source = make_folder("qwen2")
    export_model(source, tmp_path / "hf", format="huggingface", dtype=dtype)
    assert read(tmp_path / "hf" / "config.json")["torch_dtype"] == dtype
    exact, rounded = load_causal_lm(source).state_dict(), load_causal_lm(tmp_path / "hf").state_dict()
    for name, tensor in exact.items():
        error = np.abs(tensor.numpy() - rounded[name].numpy())
        assert (error <= np.maximum(np.abs(tensor.numpy()) * 2.0**-bits, 1e-7)).all(), name
    # What is narrow stays as it is, and exporting again changes nothing.
    export_model(tmp_path / "hf", tmp_path / "again", format="huggingface")
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()


def test_float16_overflow_is_named(make_folder: MakeFolder, tmp_path: Path) -> None:
    import paddle

    from alignment.ppo.models import save_model

    model = load_causal_lm(make_folder("qwen2"))
    model.lm_head.weight.set_value(paddle.full_like(model.lm_head.weight, 1e6))
    save_model(model, tmp_path / "big")
    with pytest.raises(ModelError, match=r"lm_head\.weight.*float16's range.*1e\+06"):
        export_model(tmp_path / "big", tmp_path / "hf", format="huggingface", dtype="float16")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["big"]


def test_bfloat16_rounding_of_special_numbers() -> None:
    from alignment.ppo.models.safetensors_file import bfloat16_to_float32, to_bfloat16

    # 1 + 2^-8 lies halfway between 1 and 1 + 2^-7 and goes to the even 1; 1 + 3 * 2^-8 goes up to 1 + 2^-6.
    given = np.array([0.0, -0.0, np.inf, -np.inf, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20], dtype=np.float32)
    wanted = np.array([0.0, -0.0, np.inf, -np.inf, 1.0, 1 + 2**-6, 1 + 2**-7], dtype=np.float32)
    np.testing.assert_array_equal(bfloat16_to_float32(to_bfloat16(given)), wanted)
    nans = np.array([0x7F800001, 0xFFFFFFFF], dtype=np.uint32).view(np.float32)
    assert np.isnan(bfloat16_to_float32(to_bfloat16(nans))).all()


def test_a_plain_score_head_under_both_names(
    kit: Any, make_folder: MakeFolder, model_type: str, tmp_path: Path
) -> None:
    source = make_folder(model_type, "score", score_type="reward")
    report = export_model(source, tmp_path / "hf", format="huggingface")
    assert report.architecture.endswith("ForSequenceClassification") and report.notes == []
    tensors, _ = read_all(tmp_path / "hf")
    assert tensors["score_head.weight"].shape == (1, 32)
    np.testing.assert_array_equal(tensors["score.weight"], tensors["score_head.weight"])
    assert not any(name.startswith("lm_head") for name in tensors)
    config = read(tmp_path / "hf" / "config.json")
    assert config["id2label"] == {"0": "LABEL_0"} and config["score_type"] == "reward"
    # By it transformers finds the last token of a row; paddlenlp's Mistral would zero that token's embedding.
    assert config["pad_token_id"] == (None if model_type == "mistral" else 1)
    before = load_score_model(source, score_type=None, do_normalize=None)
    after = load_score_model(tmp_path / "hf", score_type=None, do_normalize=None)
    same_weights(before, after)
    ids = kit.ids(2, 7)
    np.testing.assert_array_equal(score_tokens(before, ids).numpy(), score_tokens(after, ids).numpy())


def test_bias_and_normalizer_keep_their_names(kit: Any, tmp_path: Path) -> None:
    from alignment.ppo.models import save_model

    model = kit.score("llama", bias=True, do_normalize=True, normalizer_type="RunningMeanStd", score_type="cost")
    model.train()
    model.normalizer.update(np.array([1.0, 4.0, 7.0]))
    save_model(model, tmp_path / "reward")
    report = export_model(tmp_path / "reward", tmp_path / "hf", format="huggingface", dtype="bfloat16")
    assert report.architecture == "LlamaModelForScore" and any("AutoModel" in note for note in report.notes)
    tensors = {}
    with safe_open(tmp_path / "hf" / "model.safetensors", "np") as opened:
        names = set(opened.keys())
        tensors = {name: opened.get_tensor(name) for name in names if name.startswith("normalizer.")}
    assert {"score_head.weight", "score_head.bias"} <= names and "score.weight" not in names
    assert (tensors["normalizer.mean"], tensors["normalizer.var"], tensors["normalizer.count"]) == (4.0, 9.0, 3)
    after = load_score_model(tmp_path / "hf", score_type=None, do_normalize=None)
    assert (after.config.score_type, after.config.do_normalize, int(after.normalizer.count)) == ("cost", True, 3)
    export_model(tmp_path / "reward", tmp_path / "exact", format="huggingface")
    same_weights(
        load_score_model(tmp_path / "reward", score_type=None, do_normalize=None),
        load_score_model(tmp_path / "exact", score_type=None, do_normalize=None),
    )


def test_tokenizer_json_encodes_alike(make_folder: MakeFolder, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    source = make_folder("qwen2")
    export_model(source, tmp_path / "hf", format="huggingface")
    own, again = load_tokenizer(source), load_tokenizer(tmp_path / "hf")
    fast = Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    for text in ("the cat sat", " two  spaces\n\n", "e\u0301 \u6f22 \U0001f642", "a<|endoftext|> b", "it's 12,345"):
        assert fast.encode(text).ids == own(text)["input_ids"] == again(text)["input_ids"], text
    assert not tokenizer_differs(own, again)
    config = read(tmp_path / "hf" / "tokenizer_config.json")
    assert config["tokenizer_class"] == "Qwen2Tokenizer" and config["eos_token"] == "<|endoftext|>"
    assert config["added_tokens_decoder"]["1"]["content"] == "<|pad|>"


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("template", ["beaver", CHAT])
def test_chat_template_writes_the_trained_prompt(make_folder: MakeFolder, template: str, tmp_path: Path) -> None:
    import jinja2

    from alignment.ppo.data import PromptTemplate

    source = make_folder("qwen2", template=template)
    export_model(source, tmp_path / "hf", format="huggingface")
    assert (tmp_path / "hf" / "prompt_template.json").read_bytes() == (source / "prompt_template.json").read_bytes()
    chat = read(tmp_path / "hf" / "tokenizer_config.json")["chat_template"]
    trained = PromptTemplate.resolve(None, load_tokenizer(source))
    turns = ["who?", "the cat", "and what?"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(chat).render(
        messages=[{"role": "system", "content": "Be good."}, *messages],
        add_generation_prompt=True,
        eos_token="<|endoftext|>",
    )
    assert text == trained.format_prompt(turns, system="Be good.")


def test_ids_outside_the_vocabulary_are_not_passed_on(kit: Any, tmp_path: Path) -> None:
    from alignment.ppo.models import save_model

    save_model(kit.causal("qwen2", eos_token_id=151643, pad_token_id=151643, bos_token_id=5), tmp_path / "m")
    report = export_model(tmp_path / "m", tmp_path / "hf", format="huggingface")
    config = read(tmp_path / "hf" / "config.json")
    assert (config["eos_token_id"], config["pad_token_id"], config["bos_token_id"]) == (None, None, 5)
    assert report.notes == ["the source has no tokenizer, so none was exported"]


def test_a_tokenizer_that_would_encode_otherwise_is_not_shipped(make_folder: MakeFolder, tmp_path: Path) -> None:
    """D2: an export refuses where it warned and went on."""
    from alignment.errors import ModelError
    from alignment.export.hf_tokenizer import write_hf_tokenizer

    source = make_folder("qwen2")
    tokenizer = load_tokenizer(source)
    tokenizer.backend.add_tokens(["<think>"])  # training reads it as one token, the file does not
    (tmp_path / "hf").mkdir()
    with pytest.raises(ModelError, match=r"would encode '<think>' otherwise than the tokenizer that the model was"):
        write_hf_tokenizer(source, tmp_path / "hf", tokenizer)


@pytest.mark.parametrize("format", ["paddle", "huggingface"])
def test_every_exported_folder_has_the_chat_template(make_folder: MakeFolder, format: str, tmp_path: Path) -> None:
    """D28: the trained template in both places where other programs look, also of a Beaver model."""
    from alignment.ppo.data import PromptTemplate
    from alignment.ppo.models.tokenizers import copy_tokenizer_files

    source = make_folder("qwen2")
    export_model(source, tmp_path / "out", format=format)
    jinja = PromptTemplate().as_jinja()
    assert (tmp_path / "out" / "chat_template.jinja").read_text(encoding="utf-8") == jinja
    assert read(tmp_path / "out" / "tokenizer_config.json")["chat_template"] == jinja
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    (tmp_path / "merged").mkdir()  # what merge_lora does with the base's files
    assert "chat_template.jinja" in copy_tokenizer_files(tmp_path / "out", tmp_path / "merged")
