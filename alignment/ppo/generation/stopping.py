"""What ends an answer: eos tokens and stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


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


@dataclass(frozen=True)
class StopRule:
    """When an answer has ended by itself.

    Attributes:
        eos_ids: tokens that end an answer; they stay in it, and its text leaves them out.
        strings: texts that end it; the tokens stay in it, and its text is cut before the first of them.
        tokenizer: decodes, for ``strings``.
    """

    eos_ids: tuple[int, ...]
    strings: tuple[str, ...]
    tokenizer: Any

    def ends(self, token: int, response: np.ndarray) -> bool:
        """Whether an answer ends with ``token``, its newest.

        Args:
            token: the newest.
            response: ``[n]`` int64, all tokens of the answer, the newest included.
        """
        if token in self.eos_ids:
            return True
        if not self.strings:
            return False
        # a character takes up to four byte-level tokens; what lies further back was looked at before
        reach = 4 * max(len(text.encode()) for text in self.strings) + 4
        text = self.tokenizer.decode(response[-reach:].tolist(), skip_special_tokens=True)
        return any(stop in text for stop in self.strings)

    def text(self, response: Sequence[int], finished: bool) -> str:
        """The answer's text, without special tokens and without what ended it."""
        ids = list(response)
        if finished and ids and ids[-1] in self.eos_ids:
            ids = ids[:-1]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        ends = [place for place in (text.find(stop) for stop in self.strings) if place >= 0]
        return text[: min(ends)] if ends else text
