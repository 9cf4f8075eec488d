"""Writes what our side reads from the disk: models of a workload's shape, the tokenizer, prompts and rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.workloads import (
    CONTEXT,
    EOS_ID,
    FIRST_BYTE,
    PAD_ID,
    TEMPLATE,
    Row,
    Workload,
    parameters,
)

END, PAD = "<|endoftext|>", "<|pad|>"


def byte_characters() -> list[str]:
    """The printable stand-in of each byte in a byte-level vocabulary (the table of GPT-2), by byte.

    Printable bytes of Latin-1 stand for themselves, the others for the characters from 256 on.
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def vocabulary(size: int) -> dict[str, int]:
    """Eos, pad, the bytes, and tokens that no text contains, since there are no merges."""
    tokens = {END: EOS_ID, PAD: PAD_ID, **{c: FIRST_BYTE + byte for byte, c in enumerate(byte_characters())}}
    return {**tokens, **{f"filler{i}": i for i in range(len(tokens), size)}}


def write_tokenizer(folder: Path, size: int) -> None:
    """A ``Qwen2Tokenizer`` of ``size`` tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary(size), ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": END,
        "pad_token": PAD,
        "bos_token": None,
        "unk_token": None,
        "model_max_length": CONTEXT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_models(folder: Path, w: Workload) -> dict[str, int]:
    """Random models ``actor``, ``reward`` and ``critic`` with their tokenizer; returns each one's parameters."""
    from alignment import runtime

    with runtime.quiet_import():
        import paddle
    from paddlenlp.transformers import Qwen2Config, Qwen2ForCausalLM

    from alignment.ppo.models import load_score_model, load_tokenizer, save_model, save_tokenizer

    counts = {}
    for seed, name in enumerate(("base", "actor")):
        write_tokenizer(folder / name, w.vocab)
        paddle.seed(seed)
        config = Qwen2Config(**w.shape, bos_token_id=None, eos_token_id=EOS_ID, pad_token_id=PAD_ID)
        model = Qwen2ForCausalLM(config)
        model.save_pretrained(str(folder / name), safe_serialization=True)
        counts[name] = sum(int(p.size) for p in model.parameters())
    for name, base in (("reward", "base"), ("critic", "actor")):
        score = load_score_model(str(folder / base), score_type=name)
        save_model(score, folder / name)
        save_tokenizer(load_tokenizer(folder / base), folder / name)
        counts[name] = sum(int(p.size) for p in score.parameters())
    expected = {name: parameters(w, "language") for name in ("base", "actor")}
    expected |= {name: parameters(w, "score") for name in ("reward", "critic")}
    if counts != expected:
        raise AssertionError(f"the models have {counts} parameters, the workload says {expected}")
    return counts


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def common_arguments(output: Path) -> dict[str, Any]:
    """What all three stages' runs have in common."""
    return {
        "output_dir": str(output),
        "overwrite_output_dir": True,
        "prompt_template": TEMPLATE,
        "device": "cpu",
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "learning_rate": 1e-5,
        "do_eval": False,
        "evaluation_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 1,
    }


def supervised_row(row: Row) -> dict[str, str]:
    """As the ``jsonl`` data set reads it."""
    return {"src": row.prompt, "tgt": row.answer}


def preference_row(row: Row) -> dict[str, str]:
    """As the ``jsonl`` data set reads it."""
    return {"prompt": row.prompt, "chosen": row.answer, "rejected": row.other}
