"""What ends an answer: eos tokens and stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from alignment.ppo.models import predicted_tokens


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
        if item is not None and int(item) not in found and int(item) < predicted_tokens(model):
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
    _completes: dict[int, bool] = field(default_factory=dict, repr=False, compare=False)

    def ends(self, token: int, response: np.ndarray) -> bool:
        """Whether an answer ends with ``token``, its newest.

        Args:
            token: the newest.
            response: ``[n]`` int64, all tokens of the answer, the newest included.
        """
        if token in self.eos_ids:
            return True
        if not self.strings or not self._may_complete(token):
            return False
        # a character takes up to four byte-level tokens; what lies further back was looked at before
        reach = 4 * max(len(text.encode()) for text in self.strings) + 4
        text = self.tokenizer.decode(response[-reach:].tolist(), skip_special_tokens=True)
        return any(stop in text for stop in self.strings)

    def _may_complete(self, token: int) -> bool:
        """Whether some stop string may end with this token: most tokens cannot, so their rows need no decoding."""
        found = self._completes.get(token)
        if found is None:
            # behind another one, because a first token may lose its leading space
            first = self.tokenizer.decode([token], skip_special_tokens=True)
            twice = self.tokenizer.decode([token, token], skip_special_tokens=True)
            shown = first + twice
            found = any(self._may_end(stop[-1], shown) for stop in self.strings)
            self._completes[token] = found
        return found

    @staticmethod
    def _may_end(last: str, shown: str) -> bool:
        # a part of a character shows as U+FFFD or as nothing; white space comes and goes with a token's neighbours
        return last in shown or last.isspace() or "\ufffd" in shown or (not last.isascii() and not shown)

    def text(self, response: Sequence[int], finished: bool, *, special: bool = False) -> str:
        """The answer's text without what ended it, and without special tokens (``special``: with all but end and
        padding tokens).
        """
        ids = list(response)
        if finished and ids and ids[-1] in self.eos_ids:
            ids = ids[:-1]
        if special:
            hidden = {*self.eos_ids, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id}
            ids = [token for token in ids if token not in hidden]
        text = self.tokenizer.decode(ids, skip_special_tokens=not special)
        ends = [place for place in (text.find(stop) for stop in self.strings) if place >= 0]
        return text[: min(ends)] if ends else text
