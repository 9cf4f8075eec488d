"""GGUF files give the model, tokenizer and chat template that a safetensors folder of the same numbers gives."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from alignment.errors import ModelError
from alignment.export.export_model import export_model
from alignment.plan.shapes import find_shape
from alignment.ppo.models import (
    causal_logits,
    check_model_folder,
    load_causal_lm,
    load_tokenizer,
    model_context_length,
)
from alignment.ppo.models.gguf import PRE_TOKENIZERS, llama3_factors

Kind = gguf.GGMLQuantizationType
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "Hello, world! It costs 3.14159 or 20000.",
    " two  spaces\n\nand\tlines \r\n I'll don't",
    "caf\u00e9 e\u0301 \u6f22\u5b57 \U0001f642",
    "<|im_start|>user\nhi 12<|im_end|>\n",
]
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def byte_level(pre: str = "qwen2") -> Tokenizer:
    """A small tokenizer of the kind that ``tokenizer.ggml.pre`` names, made with the library's own classes."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    pieces = {
        "gpt-2": [words],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), words],
        "starcoder": [pre_tokenizers.Digits(individual_digits=True), words],
        "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), plain],
        "qwen2": [pre_tokenizers.Split(Regex(QWEN2), "isolated"), plain],
    }
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces[pre])
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, "200 20000 141 14 159 hello world the cat"] * 3, trainer)
    return tokenizer


def byte_level_fields(tokenizer: Tokenizer, pre: str = "qwen2") -> dict[str, Any]:
    saved = json.loads(tokenizer.to_str())
    tokens = sorted(saved["model"]["vocab"], key=saved["model"]["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in saved["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT,
    }


FIELDS = byte_level_fields(byte_level())
VOCABULARY = len(FIELDS["tokenizer.ggml.tokens"])


def neighbours(heads: int, rows: int) -> list[int]:
    """Where each row of a query or key projection comes from when a Llama is written as GGUF: pairs that lie half a
    head apart in Hugging Face's layout become neighbours.
    """
    size = rows // heads
    return [head * size + half * (size // 2) + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]


def q4_k(block: np.ndarray) -> np.ndarray:
    """256 numbers of a Q4_K block, written out after the format's description: ``d * scale * q - dmin * minimum``."""
    d, dmin = block[:4].view(np.float16).astype(np.float32)
    packed, quants = block[4:16].astype(int), block[16:]
    values = []
    for j in range(8):
        if j < 4:
            scale, minimum = packed[j] & 63, packed[j + 4] & 63
        else:
            scale = (packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4
            minimum = packed[j + 4] >> 4 | (packed[j] >> 6) << 4
        q = quants[j // 2 * 32 :][:32] >> (j % 2 * 4) & 15
        values.append(d * np.float32(scale) * q.astype(np.float32) - dmin * np.float32(minimum))
    return np.concatenate(values)


def q6_k(block: np.ndarray) -> np.ndarray:
    """256 numbers of a Q6_K block: ``d * scale * (q - 32)``, q of four low and two high bits."""
    low, high, scales, d = block[:128], block[128:192], block[192:208].view(np.int8), block[208:].view(np.float16)[0]
    values = np.empty(256, np.float32)
    for i in range(256):
        half, part, lane = i // 128, i % 128 // 32, i % 32
        four = low[half * 64 + part % 2 * 32 + lane] >> (part // 2 * 4) & 15
        two = high[half * 32 + lane] >> (part * 2) & 3
        values[i] = np.float32(d) * np.float32(scales[i // 16]) * np.float32(int(four | two << 4) - 32)
    return values


BY_HAND: dict[Kind, Callable[[np.ndarray], np.ndarray]] = {Kind.Q4_K: q4_k, Kind.Q6_K: q6_k}
#: Where the half-precision scales of a block lie; any other bytes may be random.
SCALES = {Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}


def stored(array: np.ndarray, kind: Kind, rng: np.random.Generator) -> np.ndarray:
    """A matrix as a GGUF file stores it; of kinds that the gguf package cannot make, random blocks."""
    if kind not in SCALES:
        return gguf.quantize(array, kind)
    items, size = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, [*array.shape[:-1], array.shape[-1] // items, size], dtype=np.uint8)
    for place in SCALES[kind]:
        data[..., place : place + 2] = np.array([0.002], np.float16).view(np.uint8)
    return data.reshape(*array.shape[:-1], -1)


def write_gguf(path: Path, model: Any, tensors: dict[str, np.ndarray], kind: Kind, fields: dict[str, Any]) -> Path:
    """Write a model as GGUF.

    Args:
        model: for its config.
        tensors: under Hugging Face's names, matrices as :func:`stored` gives them.
        kind: of the matrices.
        fields: metadata to add, or to take away where the value is None.
    """
    config, architecture = model.config, model.config.model_type
    numbers = {
        "block_count": config.num_hidden_layers,
        "context_length": 64,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 50000.0,
    }
    writer = gguf.GGUFWriter(None, fields.get("general.architecture", architecture))
    metadata = {f"{architecture}.{name}": value for name, value in numbers.items()} | fields
    metadata.pop("general.architecture", None)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add[list] = writer.add_array
    for name, value in metadata.items():
        if value is not None:
            add[type(value)](name, value)
    for name, data in tensors.items():
        block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        target = f"blk.{block[1]}.{NAMES[block[2]]}.{block[3]}" if block else NAMES.get(name, name)
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if architecture == "llama" and part in name:
                data = data[neighbours(heads, len(data))]
        writer.add_tensor(target, np.ascontiguousarray(data), raw_dtype=kind if data.dtype == np.uint8 else None)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny(kit: Any, architecture: str, kind: Kind = Kind.F32, **config: Any) -> Any:
    size = 256 if kind in SCALES else 64
    sizes = {"hidden_size": size, "intermediate_size": size, "vocab_size": VOCABULARY}
    return kit.causal(architecture, **sizes | config)


def make(kit: Any, path: Path, architecture: str = "llama", **fields: Any) -> Path:
    """A tiny sound file with ``fields`` changed (a dot is written ``__``)."""
    model = tiny(kit, architecture)
    changed = FIELDS | {name.replace("__", "."): value for name, value in fields.items()}
    return write_gguf(path, model, kit.hf_tensors(model), Kind.F32, changed)


KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_weights_are_those_of_a_safetensors_folder(kit: Any, tmp_path: Path, architecture: str, name: str) -> None:
    kind, rng = Kind[name], np.random.default_rng(3)
    model = tiny(kit, architecture, kind, tie_word_embeddings=name in ("F32", "Q8_0"))
    kept, expected = {}, {}
    for key, array in kit.hf_tensors(model).items():
        kept[key] = expected[key] = array
        if array.ndim == 2:
            kept[key] = stored(array, kind, rng)
            expected[key] = np.ascontiguousarray(gguf.dequantize(kept[key], kind))
            if kind in BY_HAND:
                size = gguf.GGML_QUANT_SIZES[kind][1]
                rows = [[BY_HAND[kind](block) for block in row.reshape(-1, size)] for row in kept[key]]
                np.testing.assert_allclose(expected[key], np.array(rows).reshape(array.shape), rtol=1e-6)
    file = write_gguf(tmp_path / "gguf" / "model.gguf", model, kept, kind, FIELDS)
    settings = {"rms_norm_eps": 1e-5, "rope_theta": 50000.0}
    folder = kit.write_hf(tmp_path / "hf", model, tensors=expected, **settings)
    wanted = load_causal_lm(folder)
    ids = kit.ids(2, 9)
    for path in (file, file.parent):  # the file itself, and the folder that holds it
        loaded = load_causal_lm(path)
        assert set(loaded.state_dict()) == set(wanted.state_dict())
        for key, tensor in loaded.state_dict().items():
            np.testing.assert_array_equal(tensor.numpy(), wanted.state_dict()[key].numpy(), err_msg=key)
        np.testing.assert_array_equal(causal_logits(loaded, ids).numpy(), causal_logits(wanted, ids).numpy())
    found = check_model_folder(file)
    assert found is not None
    assert found.config["torch_dtype"] == {"F16": "float16", "BF16": "bfloat16"}.get(name, "float32")
    assert found.config["tie_word_embeddings"] is (name in ("F32", "Q8_0"))
    assert model_context_length(file) == 64


@pytest.mark.parametrize("pre", list(PRE_TOKENIZERS))
def test_byte_level_ids_are_those_of_the_original(kit: Any, tmp_path: Path, pre: str) -> None:
    original = byte_level(pre)
    fields = byte_level_fields(original, pre)
    model = tiny(kit, "llama", vocab_size=len(fields["tokenizer.ggml.tokens"]))
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", model, kit.hf_tensors(model), Kind.F32, fields))
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == original.encode(text).ids, text
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template is not None
    assert tokenizer.decode(tokenizer(TEXTS[1])["input_ids"]) == TEXTS[1]


def test_sentencepiece_ids_are_those_of_the_original(kit: Any, tmp_path: Path) -> None:
    saved = io.BytesIO()
    lines = ["the cat sat on the mat", "a man and a dog ran to the hat that the cat had", "12 hats, 20 cats."] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=saved, vocab_size=300, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        minloglevel=2,
    )  # fmt: skip
    original = sentencepiece.SentencePieceProcessor(model_proto=saved.getvalue())
    count = original.vocab_size()
    kinds = [2 if original.is_unknown(i) else 3 if original.is_control(i) else 6 if original.is_byte(i) else 1
             for i in range(count)]  # fmt: skip
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [original.id_to_piece(i) for i in range(count)],
        "tokenizer.ggml.scores": [float(original.get_score(i)) for i in range(count)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    model = tiny(kit, "llama", vocab_size=count)
    file = write_gguf(tmp_path / "m.gguf", model, kit.hf_tensors(model), Kind.F32, fields)
    found = check_model_folder(file)
    assert found is not None
    tokenizer = Tokenizer.from_file(str(found.path / "tokenizer.json"))
    for text in ("the cat and the dog", " two  spaces", "12 caf\u00e9s \U0001f642\nthat"):
        assert tokenizer.encode(text, add_special_tokens=False).ids == original.encode(text), text
        assert tokenizer.decode(original.encode(text)) == text
    assert tokenizer.encode("the").ids[0] == 1  # the kind writes its bos unless the file says otherwise


def test_rows_without_a_token_are_no_part_of_the_tokenizer(kit: Any, tmp_path: Path) -> None:
    tokens = [*FIELDS["tokenizer.ggml.tokens"], f"[PAD{VOCABULARY}]"]
    kinds = [*FIELDS["tokenizer.ggml.token_type"], 5]
    model = kit.causal("qwen2", hidden_size=64, intermediate_size=64, vocab_size=VOCABULARY + 1)
    fields = FIELDS | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", model, kit.hf_tensors(model), Kind.F32, fields))
    assert len(tokenizer.get_vocab()) == VOCABULARY


def test_scaled_rotary_positions(kit: Any, tmp_path: Path) -> None:
    """Llama 3's scaling stands in a tensor, others in the metadata; both end in config.json, or are refused."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    model = tiny(kit, "llama")
    factors = llama3_factors(scaling, 50000.0, 16).astype(np.float32)
    assert factors[0] == 1 and factors[-1] == 8
    file = write_gguf(
        tmp_path / "a.gguf", model, {**kit.hf_tensors(model), "rope_freqs.weight": factors}, Kind.F32, FIELDS
    )
    found = check_model_folder(file)
    assert found is not None and found.config["rope_scaling"] == scaling
    factors[3] += 1
    file = write_gguf(
        tmp_path / "b.gguf", model, {**kit.hf_tensors(model), "rope_freqs.weight": factors}, Kind.F32, FIELDS
    )
    with pytest.raises(ModelError, match="rotary factors"):
        check_model_folder(file)
    linear = {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 2.0}
    found = check_model_folder(make(kit, tmp_path / "c.gguf", **linear))
    assert found is not None and found.config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_unpacked_once_and_again_when_the_file_changes(kit: Any, tmp_path: Path, cache: Path) -> None:
    file = make(kit, tmp_path / "m.gguf")
    first = check_model_folder(file)
    assert first is not None and first.path.is_relative_to(cache)
    made = first.weight_files[0].stat().st_mtime_ns
    again = check_model_folder(file)
    assert again == first and first.weight_files[0].stat().st_mtime_ns == made
    make(kit, file, llama__context_length=32)
    assert model_context_length(file) == 32
    assert not list((cache / "models").glob(".making-*"))


def test_a_cache_that_cannot_be_written(kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "occupied").write_text("")
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "occupied"))
    with pytest.raises(ModelError, match="cannot be written.*ALIGNMENT_CACHE"):
        check_model_folder(make(kit, tmp_path / "m.gguf"))


def test_a_run_can_be_planned(kit: Any, tmp_path: Path) -> None:
    make(kit, tmp_path / "base" / "model.gguf")
    for path in (tmp_path / "base", tmp_path / "base" / "model.gguf"):
        assert find_shape(str(path), "model_name_or_path").layers == 2


def test_export_writes_an_ordinary_folder(kit: Any, tmp_path: Path) -> None:
    file = make(kit, tmp_path / "m.gguf", "qwen2")
    export_model(file, tmp_path / "out", format="huggingface")
    ids = kit.ids(2, 7)
    np.testing.assert_array_equal(
        causal_logits(load_causal_lm(tmp_path / "out"), ids).numpy(), causal_logits(load_causal_lm(file), ids).numpy()
    )
    original, copy = load_tokenizer(file), load_tokenizer(tmp_path / "out")
    assert [copy(text)["input_ids"] for text in TEXTS] == [original(text)["input_ids"] for text in TEXTS]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"general__architecture": "gpt2"}, "architecture 'gpt2' is not supported.*llama, qwen2"),
    "experts": ({"llama__expert_count": 8}, "mixture of experts"),
    "adapter": ({"general__type": "adapter"}, "holds no whole model"),
    "parts": ({"split__count": 3}, "one of 3 parts of a model; merge them"),
    "no size": ({"llama__block_count": None}, "lacks llama.block_count"),
    "part of a head": ({"llama__rope__dimension_count": 8}, "only 8 of 16 numbers of a head are rotated"),
    "no tokenizer": ({"tokenizer__ggml__model": None}, "has no tokenizer"),
    "other tokenizer": ({"tokenizer__ggml__model": "bert"}, "tokenizer 'bert' is not supported"),
    "pieces": ({"tokenizer__ggml__pre": "qwen3"}, "pre-tokenizer 'qwen3'.*did you mean.*qwen2.*known are gpt-2"),
    "no merges": ({"tokenizer__ggml__merges": None}, "lists no merges"),
    "no scores": ({"tokenizer__ggml__model": "llama"}, "lists no scores"),
    "id": ({"tokenizer__ggml__eos_token_id": 5000}, "the eos token has id 5000, but the tokenizer has"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_in_one_sentence(kit: Any, tmp_path: Path, cache: Path, name: str) -> None:
    fields, message = BAD[name]
    file = make(kit, tmp_path / "m.gguf", **fields)
    with pytest.raises(ModelError, match=message) as caught:
        check_model_folder(file, role="actor")
    assert str(caught.value).startswith(f"actor: {file}") and "\n" not in str(caught.value)
    assert not [path for path in (cache / "models").iterdir() if path.suffix != ".lock"]


@pytest.mark.parametrize("part", [0.0001, 0.2, 0.6, 0.99])
def test_a_file_that_is_cut_short(kit: Any, tmp_path: Path, part: float) -> None:
    file = make(kit, tmp_path / "m.gguf")
    file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size) + 4])
    with pytest.raises(ModelError, match="cut short or damaged"):
        load_causal_lm(file)


def test_something_else_under_the_name(kit: Any, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        check_model_folder(tmp_path / "m.gguf")
    model = tiny(kit, "llama")
    tensors = {**kit.hf_tensors(model), "blk.0.attn_sinks.weight": np.ones(4, np.float32)}
    with pytest.raises(ModelError, match="'blk.0.attn_sinks.weight' has no place in a model of architecture llama"):
        check_model_folder(write_gguf(tmp_path / "sinks.gguf", model, tensors, Kind.F32, FIELDS))
    tensors = kit.hf_tensors(model) | {"model.norm.weight": np.ones(64, np.int32)}
    with pytest.raises(ModelError, match="'output_norm.weight' is of type I32, which the gguf package cannot"):
        check_model_folder(write_gguf(tmp_path / "integers.gguf", model, tensors, Kind.F32, FIELDS))
