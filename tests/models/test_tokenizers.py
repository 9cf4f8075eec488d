"""Tokenizers always have eos and pad, and texts move from one to another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignment.errors import DataError, ModelError
from alignment.ppo.data import Encoder, Limits, PromptTemplate
from alignment.ppo.models import (
    check_tokenizer_fits,
    load_tokenizer,
    save_tokenizer,
    tokenizer_differs,
)
from alignment.rollout.rewards.reward_model import build_reward_inputs

Said = Callable[[], str]
FAST = {"fast": True, "tokenizer_class": "PretrainedTokenizerFast"}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_own_pad_is_kept_and_no_file_changes(kit: Any, tmp_path: Path) -> None:
    folder = kit.tokenizer_folder(tmp_path / "t")
    before = contents(folder)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|endoftext|>")
    assert tokenizer.padding_side == "right" and tokenizer.model_max_length == 512
    text = "the cat sat on 12 mats, é 漢 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ((), "<|endoftext|>"),
        (("<|reserved_special_token_0|>",), "<|reserved_special_token_0|>"),
        (("[PAD]", "<|finetune_right_pad_id|>"), "<|finetune_right_pad_id|>"),
    ],
)
def test_missing_pad_is_chosen_without_growing_the_vocabulary(
    kit: Any, tmp_path: Path, said: Said, extra: tuple[str, ...], expected: str
) -> None:
    folder = kit.tokenizer_folder(tmp_path / "t", extra=extra, pad_token=None, **FAST)
    content = (
        (folder / "tokenizer.json").read_text().replace("<|pad|>", "<|other|>")
    )  # the trainer's own pad is no candidate here
    (folder / "tokenizer.json").write_text(content)
    before = contents(folder)
    tokenizer = load_tokenizer(folder, role="actor")
    assert tokenizer.pad_token == expected
    assert tokenizer.pad_token_id == json.loads(content)["model"]["vocab"][expected]
    assert len(tokenizer.get_vocab()) == len(json.loads(content)["model"]["vocab"])
    assert (
        "actor" in said()
        and f"the tokenizer has no pad token; padding uses {'eos' if not extra else 'a reserved token'}" in said()
    )
    assert contents(folder) == before


def test_a_pad_beyond_the_embedding_is_replaced(kit: Any, tmp_path: Path, said: Said) -> None:
    folder = kit.tokenizer_folder(tmp_path / "t")
    size = len(load_tokenizer(folder).get_vocab())
    kit.tokenizer_folder(folder, pad_token="<[pad]>", added_tokens_decoder={str(size): {"content": "<[pad]>"}})
    (folder / "config.json").write_text(json.dumps({"vocab_size": size}))
    assert load_tokenizer(folder).pad_token == "<|pad|>"
    assert f"pads with id {size}, which has no row in the model's embedding ({size} rows)" in said()


def test_a_pad_that_is_no_token_is_replaced(kit: Any, tmp_path: Path, said: Said) -> None:
    assert load_tokenizer(kit.tokenizer_folder(tmp_path / "t", pad_token="<nothing>")).pad_token == "<|pad|>"
    assert "the tokenizer has no pad token" in said()


def test_pad_may_equal_eos(kit: Any, tmp_path: Path, said: Said) -> None:
    tokenizer = load_tokenizer(kit.tokenizer_folder(tmp_path / "t", pad_token="<|endoftext|>"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert "pad" not in said()


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "LlamaTokenizer"])
def test_hugging_face_classes_are_read_from_tokenizer_json(kit: Any, tmp_path: Path, name: str) -> None:
    plain = load_tokenizer(kit.tokenizer_folder(tmp_path / "plain"))
    fast = load_tokenizer(kit.tokenizer_folder(tmp_path / "fast", fast=True, tokenizer_class=name))
    text = "the dog ran to the man 42"
    assert fast(text)["input_ids"] == plain(text)["input_ids"]
    save_tokenizer(fast, tmp_path / "saved")
    assert not tokenizer_differs(fast, load_tokenizer(tmp_path / "saved"))


def test_a_sentencepiece_model_in_hugging_faces_layout(tmp_path: Path) -> None:
    """Hugging Face calls the file ``tokenizer.model``; paddlenlp's Llama class looks for another name."""
    import sentencepiece

    folder, corpus = tmp_path / "t", tmp_path / "corpus.txt"
    folder.mkdir()
    corpus.write_text("the cat sat on the mat\nhello world and good bye\n" * 30)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "spm.model").rename(folder / "tokenizer.model")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **special}))
    tokenizer = load_tokenizer(folder)
    ids = tokenizer("hello world")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "hello world"
    save_tokenizer(tokenizer, tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved")("hello world")["input_ids"] == ids
    # paddlenlp knows neither several templates nor this tag; who reads the template is PromptTemplate.
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    for template in (source, [{"name": "default", "template": source}, {"name": "tool_use", "template": "x"}]):
        config = {"tokenizer_class": "LlamaTokenizer", **special, "chat_template": template}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        assert load_tokenizer(folder)("hello world")["input_ids"] == ids


def test_model_max_length_can_be_set(kit: Any, tmp_path: Path) -> None:
    assert load_tokenizer(kit.tokenizer_folder(tmp_path / "t"), model_max_length=48).model_max_length == 48


BAD: dict[str, tuple[Callable[[Any, Path], object], str]] = {
    "no folder": (lambda kit, f: None, r"critic: no such folder: "),
    "a file": (lambda kit, f: f.write_text(""), r"is a file; give the folder"),
    "no tokenizer": (
        lambda kit, f: f.mkdir(),
        r"has no tokenizer_config\.json, so it holds no tokenizer; name its folder with tokenizer_name_or_path",
    ),
    "empty config": (
        lambda kit, f: (kit.tokenizer_folder(f) / "tokenizer_config.json").write_text(""),
        r"tokenizer_config\.json is empty",
    ),
    "not JSON": (
        lambda kit, f: (kit.tokenizer_folder(f) / "tokenizer_config.json").write_text("{"),
        r"tokenizer_config\.json is not JSON: line 1",
    ),
    "a list": (
        lambda kit, f: (kit.tokenizer_folder(f) / "tokenizer_config.json").write_text("[]"),
        r"must be a JSON object",
    ),
    "unknown class": (
        lambda kit, f: kit.tokenizer_folder(f, tokenizer_class="NoSuchTokenizer"),
        r"cannot be loaded .*NoSuchTokenizer",
    ),
    "no vocabulary": (
        lambda kit, f: (kit.tokenizer_folder(f) / "vocab.json").unlink(),
        r"vocab\.json and merges\.txt cannot be loaded",
    ),
    "damaged vocabulary": (
        lambda kit, f: (kit.tokenizer_folder(f) / "vocab.json").write_text("{"),
        r"vocab\.json and merges\.txt cannot be loaded \(.*EOF",
    ),
    "damaged tokenizer.json": (
        lambda kit, f: (kit.tokenizer_folder(f, **FAST) / "tokenizer.json").write_text("{}"),
        r"the tokenizer\.json cannot be loaded \(.*line 1",
    ),
    "no eos": (
        lambda kit, f: kit.tokenizer_folder(f, eos_token=None, **FAST),
        r'has no end-of-sequence token; set "eos_token" in .*tokenizer_config\.json to the token that ends an answer',
    ),
    "eos that is no token": (
        lambda kit, f: kit.tokenizer_folder(f, eos_token="<end-of-turn>"),
        r"has no token '<end-of-turn>', which is to end sequences; set \"eos_token\" in ",
    ),
    "eos unknown to the model": (
        lambda kit, f: (kit.tokenizer_folder(f, eos_token="the") / "config.json").write_text('{"vocab_size": 256}'),
        r"end-of-sequence token 'the' .* but the model's embedding has only 256 rows",
    ),
    "files of two tokenizers": (
        lambda kit, f: kit.tokenizer_folder(f, added_tokens_decoder={"7": {"content": "<|pad|>"}}, **FAST),
        r"gives the token '<\|pad\|>' the id 7, but tokenizer\.json gives it 1; the two files are not of one tokenizer",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tokenizer_folders(kit: Any, tmp_path: Path, name: str) -> None:
    damage, message = BAD[name]
    damage(kit, tmp_path / "t")
    with pytest.raises(ModelError, match=message) as caught:
        load_tokenizer(tmp_path / "t", role="critic")
    assert str(caught.value).startswith("critic: ")


def test_a_vocabulary_larger_than_the_embedding_is_refused(kit: Any, tmp_path: Path, said: Said) -> None:
    """rl.md 8: more tokens than rows are an error, fewer are said once."""
    from alignment.ppo.models import save_model

    tokenizer = load_tokenizer(kit.tokenizer_folder(tmp_path / "t"))
    size = len(tokenizer.get_vocab())
    for rows in (120, size, size + 24):
        save_model(kit.causal("llama", vocab_size=rows), tmp_path / str(rows))
    with pytest.raises(ModelError, match=r"actor: the tokenizer's largest id is \d+, but the embedding of .* 120 rows"):
        check_tokenizer_fits(tokenizer, tmp_path / "120", role="actor")
    check_tokenizer_fits(tokenizer, tmp_path / str(size), role="actor")
    assert "the other rows" not in said()
    check_tokenizer_fits(tokenizer, tmp_path / str(size + 24), role="actor")
    assert f"has {size + 24} rows, its tokenizer {size} tokens; the other rows are never sampled" in said()
    check_tokenizer_fits(tokenizer, tmp_path / str(size + 24), role="critic")  # nothing is sampled from it
    assert said().endswith(f"has {size + 24} rows, its tokenizer {size} tokens; the other rows stay unused")


def test_tokenizers_differ_by_vocabulary_and_special_tokens(kit: Any, tmp_path: Path) -> None:
    first = load_tokenizer(kit.tokenizer_folder(tmp_path / "a"))
    assert not tokenizer_differs(first, load_tokenizer(kit.tokenizer_folder(tmp_path / "b")))
    assert tokenizer_differs(
        first, load_tokenizer(kit.tokenizer_folder(tmp_path / "c", text="quite other words were here"))
    )
    assert tokenizer_differs(first, load_tokenizer(kit.tokenizer_folder(tmp_path / "d", eos_token="<|pad|>")))
    # Which token pads makes no difference to any row.
    assert not tokenizer_differs(first, load_tokenizer(kit.tokenizer_folder(tmp_path / "e", pad_token="<|endoftext|>")))


def rows_of(ids: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]


def test_reward_inputs_are_built_from_text(kit: Any, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(kit.tokenizer_folder(tmp_path / "t"))
    template = PromptTemplate.resolve("beaver", tokenizer)
    prompts, responses = ["the cat?", ["hi", "yes", "a dog?"]], [" sat on the mat", " no"]
    ids, lengths, cut = build_reward_inputs(prompts, responses, [True, False], tokenizer, template, 200)
    assert not cut.any()
    assert ids.dtype == lengths.dtype == np.int64
    first, second = (tokenizer.decode(row) for row in rows_of(ids, lengths))
    assert first == template.format_prompt("the cat?") + " sat on the mat<|endoftext|>"
    assert second == template.format_prompt(["hi", "yes", "a dog?"]) + " no"
    assert "yes<|endoftext|>" in second
    assert (ids[0, lengths[0] :] == tokenizer.pad_token_id).all() and lengths[0] != lengths[1]


def test_reward_inputs_have_the_tokens_of_the_training_rows(kit: Any, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(kit.tokenizer_folder(tmp_path / "t"))
    template = PromptTemplate.resolve("beaver", tokenizer)
    sample = {"input": "the cat?", "answer": "sat", "other_answer": "the mat", "better": True}
    trained = Encoder(tokenizer, template, Limits(max_length=200)).preference(sample).rows
    ids, lengths, _ = build_reward_inputs(["the cat?"] * 2, ["sat", "the mat"], [True] * 2, tokenizer, template, 200)
    assert rows_of(ids, lengths) == trained


def test_reward_inputs_of_messages_with_tools(kit: Any, tmp_path: Path) -> None:
    """D16: another reward model reads the tools and the messages of a prompt, as its own training rows had them."""
    tokenizer = load_tokenizer(kit.tokenizer_folder(tmp_path / "t"))
    template = PromptTemplate.resolve(
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}] {{ m.content }}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}",
        tokenizer,
    )
    messages = [{"role": "user", "content": "the cat?"}, {"role": "tool", "content": "a dog"}]
    sample = {"input": messages, "tools": [{"name": "look"}], "answer": "sat", "other_answer": "no", "better": True}
    trained = Encoder(tokenizer, template, Limits(max_length=200)).preference(sample).rows
    ids, lengths, _ = build_reward_inputs(
        [messages] * 2, ["sat", "no"], [True] * 2, tokenizer, template, 200, None, [sample["tools"]] * 2
    )
    assert rows_of(ids, lengths) == trained and "look" in tokenizer.decode(trained[0])


def test_long_reward_inputs_lose_the_start_of_the_prompt(kit: Any, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(kit.tokenizer_folder(tmp_path / "t"))
    template = PromptTemplate.resolve("beaver", tokenizer)
    header = len(tokenizer(template.assistant_header())["input_ids"])
    limit = header + 12
    ids, lengths, _ = build_reward_inputs(["the cat sat " * 30], [" the end"], [True], tokenizer, template, limit)
    assert lengths.tolist() == [limit]
    assert tokenizer.decode(ids[0].tolist()).endswith("cat sat  ASSISTANT: the end<|endoftext|>")
    # rl 10: an answer alone may be too long, whatever the policy writes; it is cut and counted
    ids, lengths, cut = build_reward_inputs(["a"], [" the dog" * limit], [True], tokenizer, template, limit)
    assert lengths.tolist() == [limit] and cut.all()
    assert tokenizer.decode(ids[0].tolist()).endswith(" the dog<|endoftext|>")
    with pytest.raises(DataError, match="2 prompts, 1 responses and 1 flags"):
        build_reward_inputs(["a", "b"], ["c"], [True], tokenizer, template, limit)


def test_reward_inputs_carry_system_prompts(kit: Any, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(kit.tokenizer_folder(tmp_path / "t"))
    template = PromptTemplate.resolve("beaver", tokenizer)
    ids, lengths, _ = build_reward_inputs(
        ["a?", "b?"], ["x", "y"], [True] * 2, tokenizer, template, 200, ["Be the cat.", None]
    )
    first, second = (tokenizer.decode(row) for row in rows_of(ids, lengths))
    assert "Be the cat." in first and "Be the cat." not in second


CHATML_TEXT = (
    "<|im_start|>user\nthe cat 🙂<|im_end|>\n<|im_start|>assistant\n <think> \nthe mat</think>\n\n42<|im_end|>\n"
)
ADDED = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")


def qwen2_folder(kit: Any, folder: Path, *, with_json: bool) -> Path:
    """As Qwen2.5's: special tokens as plain text, further added tokens (not special) in added_tokens_decoder alone."""
    from tokenizers import AddedToken, Tokenizer

    kit.tokenizer_folder(folder, fast=True)
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    fast.add_tokens([AddedToken(text, normalized=False, special=index < 2) for index, text in enumerate(ADDED)])
    decoder = {
        str(index): {"content": token.content, "special": token.special, "normalized": False}
        for index, token in fast.get_added_tokens_decoder().items()
    }
    kit.tokenizer_folder(folder, eos_token="<|im_end|>", added_tokens_decoder=decoder)
    (folder / "tokenizer.json").unlink()
    if with_json:
        fast.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("with_json", [True, False])
def test_white_space_and_added_tokens_are_those_of_tokenizer_json(kit: Any, tmp_path: Path, with_json: bool) -> None:
    """D1, D2: the newline after a turn's end stays, added tokens are one token, whichever files lie in the folder."""
    from tokenizers import Tokenizer

    truth = Tokenizer.from_file(str(qwen2_folder(kit, tmp_path / "truth", with_json=True) / "tokenizer.json"))
    tokenizer = load_tokenizer(qwen2_folder(kit, tmp_path / "t", with_json=with_json))
    ids = tokenizer(CHATML_TEXT)["input_ids"]
    assert ids == truth.encode(CHATML_TEXT).ids
    assert all(truth.token_to_id(text) in ids for text in ADDED)
    assert tokenizer.decode(ids) == CHATML_TEXT
    assert tokenizer.decode(ids, skip_special_tokens=True) == CHATML_TEXT.replace("<|im_start|>", "").replace(
        "<|im_end|>", ""
    )
    assert tokenizer.decode([*ids, 10**6]) == CHATML_TEXT  # P7: an id without a token is nothing


def test_a_tokenizer_is_saved_as_it_was_read(kit: Any, tmp_path: Path) -> None:
    """D2, D28: the very tokenizer.json, the chat template in the form that others read, and what else was there."""
    folder = qwen2_folder(kit, tmp_path / "t", with_json=True)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    tokenizer = load_tokenizer(folder)
    save_tokenizer(tokenizer, tmp_path / "plain")
    before, plain = contents(folder), contents(tmp_path / "plain")
    assert {name for name in before if before[name] == plain.get(name)} >= set(before) - {"tokenizer_config.json"}
    template = PromptTemplate.resolve("beaver", tokenizer)
    save_tokenizer(tokenizer, tmp_path / "trained", template)
    trained = contents(tmp_path / "trained")
    assert trained["tokenizer.json"] == before["tokenizer.json"]
    assert trained["chat_template.jinja"].decode() == template.as_jinja()
    assert json.loads(trained["tokenizer_config.json"])["chat_template"] == template.as_jinja()
    assert PromptTemplate.load(tmp_path / "trained") == PromptTemplate("beaver")
    again = load_tokenizer(tmp_path / "trained")
    assert again(CHATML_TEXT) == tokenizer(CHATML_TEXT) and not tokenizer_differs(again, tokenizer)


def test_a_fetched_tokenizer_is_that_of_its_folder(kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D22: a hub's name stands for the folder that was fetched, template and fingerprint included."""
    from alignment.ppo.data.cache import tokenizer_fingerprint
    from alignment.ppo.models import upstream

    cache = qwen2_folder(kit, tmp_path / "cache" / "owner" / "model", with_json=True)
    (cache / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")

    def from_cache(name: str, files: list[str]) -> str | None:
        found = tmp_path / "cache" / name / files[0]
        return str(found) if found.is_file() else None

    monkeypatch.setattr(upstream, "resolve_file_path", from_cache)
    tokenizer = load_tokenizer("owner/model")
    assert Path(tokenizer.name_or_path) == cache
    assert PromptTemplate.resolve("chat", tokenizer).source == (cache / "chat_template.jinja").read_text()
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(load_tokenizer(cache))
    with pytest.raises(ModelError, match="no folder 'owner/other', and fetching a tokenizer of that name failed"):
        load_tokenizer("owner/other")
