"""Tokenizers made here and loaded by paddlenlp, and small helpers for files of rows."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from alignment.ppo.data import base

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT = [
    f"the quick brown fox asks {number} questions and the lazy dog gives {number * 7} answers, then both say hello"
    for number in range(60)
]


def make_bpe(folder: Path, eos: str = "<|endoftext|>", **config: Any) -> Path:
    """Train a byte-level BPE tokenizer and save it in the layout of paddlenlp's Qwen2Tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=[eos, "<|pad|>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))
    known = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": eos, "pad_token": "<|pad|>", "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(known | config))
    return folder


def load(folder: Path) -> Any:
    from paddlenlp.transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer without a beginning-of-sequence token (Qwen2's kind)."""
    return load(make_bpe(tmp_path_factory.mktemp("bpe")))


@pytest.fixture(scope="session")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer with a chat template whose turns end with its end-of-sequence token."""
    return load(make_bpe(tmp_path_factory.mktemp("chat"), eos="<|im_end|>", chat_template=CHATML))


@pytest.fixture(scope="session")
def bos_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer that puts a beginning-of-sequence token in front (Llama's kind)."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("llama")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT),
        model_writer=model,
        vocab_size=360,
        byte_fallback=True,
        model_type="bpe",
        minloglevel=2,
    )
    (folder / "sentencepiece.bpe.model").write_bytes(model.getvalue())
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load(folder)


@pytest.fixture
def registry() -> Iterator[None]:
    """Forget the data sets that a test registers."""
    classes, aliases = dict(base._CLASSES), dict(base._ALIASES)
    yield
    for now, before in ((base._CLASSES, classes), (base._ALIASES, aliases)):
        now.clear()
        now.update(before)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Write rows (objects, or text as it stands) as JSON lines; a name ending in .gz is packed."""

    def write(name: str, *rows: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return write
