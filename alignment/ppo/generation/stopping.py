"""Which tokens end an answer."""

from __future__ import annotations

from typing import Any


def eos_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokenizer's eos first, then any others that the model's generation config names (Llama 3 has several).

    Args:
        model: a causal language model; its ``generation_config.eos_token_id`` may be a number, a list or ``None``.
        tokenizer: has ``eos_token_id``.
    """
    found = [int(tokenizer.eos_token_id)]
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    for item in configured if isinstance(configured, (list, tuple)) else [configured]:
        # a config that was copied from a larger model may name ids that this one does not have
        if item is not None and int(item) not in found and int(item) < model.config.vocab_size:
            found.append(int(item))
    return tuple(found)
