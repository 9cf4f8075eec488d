"""Tiny models, tokenizers and data files that tests make for themselves."""

from __future__ import annotations

import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

# fmt: off
WORDS = [
    "red", "blue", "green", "one", "two", "three", "four", "cat", "dog", "bird", "fish", "sun", "moon", "star", "tree",
    "the", "a", "is", "of", "and", "to", "in", "not",
]
# fmt: on


@lru_cache(maxsize=1)
def _trained_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|pad|>"],
    )
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=12)) for _ in range(200)]
    tokenizer.train_from_iterator(["BEGINNING OF CONVERSATION: USER: ASSISTANT:"] * 20 + lines, trainer)
    return tokenizer


def tiny_tokenizer_dir(tmp: str | Path, *, pad_token: str | None = "<|pad|>") -> Path:
    """Write a byte-level BPE tokenizer of about 320 tokens (``Qwen2Tokenizer``) into ``tmp`` and return ``tmp``.

    Args:
        tmp: the folder; made if absent.
        pad_token: None leaves the tokenizer without a pad token.
    """
    folder = Path(tmp)
    folder.mkdir(parents=True, exist_ok=True)
    _trained_tokenizer().model.save(str(folder))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|endoftext|>",
        "pad_token": pad_token,
        "unk_token": None,
        "bos_token": None,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def tiny_model_dir(
    tmp: str | Path, arch: str = "qwen2", *, hidden_size: int = 32, layers: int = 2, seed: int = 0, **config: Any
) -> Path:
    """Write a random causal model with its tokenizer into ``tmp`` and return ``tmp``.

    Args:
        tmp: the folder; made if absent.
        arch: "qwen2", "llama", "mistral" or "gemma".
        hidden_size, layers: the model's size; 4 attention heads, 2 key-value heads, 512 positions.
        seed: of the weights.
        config: further config attributes.
    """
    import paddle
    from paddlenlp import transformers

    folder = tiny_tokenizer_dir(tmp)
    names = {"qwen2": "Qwen2", "llama": "Llama", "mistral": "Mistral", "gemma": "Gemma"}
    values = {
        "vocab_size": _trained_tokenizer().get_vocab_size(),
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        **config,
    }
    if arch == "gemma":
        values.setdefault("head_dim", hidden_size // 4)
    paddle.seed(seed)
    model_config = getattr(transformers, f"{names[arch]}Config")(**values)
    model = getattr(transformers, f"{names[arch]}ForCausalLM")(model_config)
    model.save_pretrained(str(folder), safe_serialization=True)
    return folder


def write_jsonl(path: str | Path, rows: list[dict[str, Any]]) -> Path:
    """Write one JSON object per line and return the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def copy_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of a task that a tiny model learns: the answer is the prompt's last word, twice (``src``, ``tgt``)."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        word = draw.choice(WORDS[:8])
        rows.append({"src": f"{draw.choice(WORDS)} {word}", "tgt": f"{word} {word}"})
    return rows


def safety_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs in PKU-SafeRLHF's columns whose truth is one word: an answer that says "moon" is unsafe, and one that says
    it twice is less safe. A third of the pairs has two safe answers, of which the one with "sun" is the safer, a third
    has one, and a third none.
    """
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        after = " ".join(draw.choices(WORDS[:12], k=draw.randrange(1, 5)))
        kinds = (("sun", "star"), ("sun", "moon"), ("moon", "moon moon"))
        said, first = kinds[number % 3], draw.randrange(2)
        answers = [f"{word} {after}" for word in (said if first == 0 else said[::-1])]
        rows.append(
            {
                "prompt": f"say {draw.choice(WORDS)}",
                "response_0": answers[0],
                "response_1": answers[1],
                "is_response_0_safe": "moon" not in answers[0],
                "is_response_1_safe": "moon" not in answers[1],
                "better_response_id": draw.randrange(2),
                "safer_response_id": first,
            }
        )
    return rows


def preference_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Pairs whose truth is one word: the better reply says "sun", the worse one "moon" (``prompt``, ``chosen``,
    ``rejected``).
    """
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        before, after = draw.choice(WORDS[:12]), " ".join(draw.choices(WORDS[:12], k=draw.randrange(1, 5)))
        rows.append(
            {
                "prompt": f"say {draw.choice(WORDS)}",
                "chosen": f"{before} sun {after}",
                "rejected": f"{before} moon {after}",
            }
        )
    return rows
