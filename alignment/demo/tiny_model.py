"""The demo's model: a byte-level BPE tokenizer trained on its own text, and a Qwen2 of random weights."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from alignment.demo import task

END = "<|endoftext|>"
PAD = "<|pad|>"
VOCABULARY = 640
# How Qwen2's tokenizer cuts text before BPE (the pattern of paddlenlp's Qwen2Tokenizer).
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTEXT = 256
HIDDEN = 160
LAYERS = 3
MODEL = {
    "hidden_size": HIDDEN,
    "intermediate_size": 480,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    # Wider than a large model's 0.02, which at this width would leave the first layers nearly silent.
    "initializer_range": 0.05,
}


def write_tokenizer(folder: Path) -> int:
    """Write the tokenizer's files in the layout of paddlenlp's ``Qwen2Tokenizer`` and return its vocabulary's size.

    It is trained on the task's words and phrases (the same for every seed) and the default prompt template; it knows
    every byte, so any text can be written with it.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    from alignment.ppo.data.template import PROMPT_INPUT

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END, PAD],
        show_progress=False,
    )
    questions = task.Questions(random.Random(0)).take(2000)
    lines = [PROMPT_INPUT.format(input=question.prompt) for question in questions]
    lines += [" ".join(("", task.write_answer(q.kind, q.right, True), *task.CHATTER)) for q in questions]
    tokenizer.train_from_iterator(lines, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": END,
        "pad_token": PAD,
        "bos_token": None,
        "unk_token": None,
        "model_max_length": CONTEXT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return tokenizer.get_vocab_size()


def write_model(folder: Path, seed: int) -> int:
    """Write tokenizer and model into ``folder`` and return the model's number of parameters."""
    import paddle

    from alignment.ppo.models.loading import CAUSAL_MODELS

    vocabulary: int = write_tokenizer(folder)
    paddle.seed(seed)
    settings: dict[str, Any] = {**MODEL, "vocab_size": vocabulary}
    ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    qwen2: Any = CAUSAL_MODELS["qwen2"]
    config = qwen2.config_class(**settings, bos_token_id=None, eos_token_id=ids[END], pad_token_id=ids[PAD])
    model = qwen2(config)
    model.save_pretrained(str(folder), safe_serialization=True)
    return sum(int(parameter.size) for parameter in model.parameters())
