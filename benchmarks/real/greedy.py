"""Greedy answers of the real model, compared token for token with those that transformers gave (recorded.json)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from alignment.cli import run_main

RECORDED = Path(__file__).with_name("recorded.json")
#: Where the two best logits are closer than this, rounding may choose the other one.
TIE = 1e-3


def compare(path: str | Path) -> dict[str, Any]:
    """Let the model in ``path`` answer the recorded prompts.

    Args:
        path: model folder or GGUF file.

    Returns:
        ``prompts``, ``prompts_equal`` (ids of the rendered prompt), ``equal`` (answers equal token for token),
        ``ties`` (answers that differ first where the record was undecided), ``tokens`` compared, and ``different``:
        prompt, place, both ids and the gap of every other difference.
    """
    import numpy as np

    from alignment.ppo.data import Encoder, Limits, PromptTemplate
    from alignment.ppo.models import load_causal_lm, load_tokenizer
    from alignment.rollout.generate import GenerationEngine, GenerationPrompt
    from alignment.rollout.sampler import SamplingSettings
    from alignment.rollout.stopping import eos_token_ids

    rows = json.loads(RECORDED.read_text(encoding="utf-8"))["rows"]
    tokenizer = load_tokenizer(path)
    encoder = Encoder(tokenizer, PromptTemplate.resolve("chat", tokenizer), Limits(max_length=512, max_src_len=256))
    prompts = [
        GenerationPrompt(np.asarray(encoder.prompt_ids([row["prompt"]]), np.int64), i, row["prompt"], {})
        for i, row in enumerate(rows)
    ]
    model = load_causal_lm(path)
    engine = GenerationEngine(model, tokenizer, eos_token_ids(model, tokenizer), 512, len(rows))
    longest = max(len(row["answer_ids"]) for row in rows)
    rollout = engine.generate(prompts, SamplingSettings(max_new_tokens=longest, greedy=True, seed=0))
    result: dict[str, Any] = {"prompts": len(rows), "prompts_equal": 0, "equal": 0, "ties": 0, "tokens": 0}
    result["different"] = []
    for i, row in enumerate(rows):
        result["prompts_equal"] += list(rollout.tokens[i, : rollout.prompt_len[i]]) == row["prompt_ids"]
        start, count = int(rollout.prompt_len[i]), int(rollout.response_len[i])
        ours, theirs = rollout.tokens[i, start : start + count].tolist(), row["answer_ids"]
        result["tokens"] += len(theirs)
        places = [k for k, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b]
        place = places[0] if places else min(len(ours), len(theirs))
        if not places and len(ours) == len(theirs):
            result["equal"] += 1
        elif place < len(theirs) and row["gaps"][place] <= TIE:
            result["ties"] += 1
        else:
            result["different"].append(
                {"prompt": row["prompt"], "place": place, "ours": ours[place:][:1], "theirs": theirs[place:][:1]}
                | {"gap": row["gaps"][place] if place < len(theirs) else None}
            )
    return result


def main(argv: list[str]) -> None:
    """Compare the model in the first argument and write the result into the file that the second names."""
    Path(argv[1]).write_text(json.dumps(compare(argv[0]), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_main(main))
