"""What is known of a mixture's samples before they are tokenised: which are equal, and which columns were not read."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignment.errors import DataError
from alignment.ppo.data.encode import prompt_messages
from alignment.ppo.data.files import BadRow
from alignment.ppo.data.rendering import is_trained
from alignment.ppo.data.rows import SAFETY_COLUMNS, unread_prompt_columns

# What token rows depend on; other columns may change without tokenising again.
_ANSWERS = ("answer", "other_answer")
_LABELS = ("better", "good", "safer", "is_safe", "is_other_safe")
_TEXT_FIELDS = ("input", "dialogue", "text", "system", "tools", "unusable", *_ANSWERS, *_LABELS)
_dump = json.JSONEncoder(sort_keys=True, default=str).encode  # json.dumps would make an encoder for every call


@dataclass(frozen=True)
class Survey:
    """Facts of the samples, in their order.

    Attributes:
        digest: hash of all that token rows depend on.
        prompts: uint64 [samples]; equal for equal prompts.
        contents: uint64 [samples]; equal for equal prompts and answers, whatever the label and other columns.
        unread: for every source, in how many of its samples a column (or key of a message) was not read.
    """

    digest: str
    prompts: np.ndarray
    contents: np.ndarray
    unread: list[dict[str, int]]

    def repeats(self, origin: Sequence[int]) -> list[int]:
        """For every source, how many of its samples have the prompt and answers of an earlier one."""
        _, first = np.unique(self.contents, return_index=True)
        again = np.ones(len(self.contents), dtype=bool)
        again[first] = False
        return np.bincount(np.asarray(origin, dtype=np.int64)[again], minlength=len(self.unread)).tolist()


def survey(samples: Iterable[Mapping[str, Any] | BadRow], origin: Sequence[int], sources: int, kind: str) -> Survey:
    """Go over all samples once.

    Args:
        samples: as they were read.
        origin: the number of each one's source.
        sources: how many there are.
        kind: of the data set.
    """
    digest = hashlib.sha256()
    prompts, contents = np.zeros((2, len(origin)), dtype=np.uint64)
    unread: list[Counter[str]] = [Counter() for _ in range(sources)]
    for number, (sample, source) in enumerate(zip(samples, origin, strict=True)):
        if isinstance(sample, BadRow):
            facts: dict[str, Any] = {"bad": sample.reason}
            prompts[number] = contents[number] = _short_hash(number)
        else:
            facts = {name: sample[name] for name in _TEXT_FIELDS if name in sample}
            prompts[number] = _short_hash(_first_prompt(sample, kind))
            answers = [_dump(facts.pop(name)) for name in _ANSWERS if name in facts]
            labels = [facts.pop(name, None) for name in _LABELS]
            context = _dump(facts)
            contents[number] = _short_hash([context, *sorted(answers)])
            facts = {"context": context, "answers": answers, "labels": labels}
            unread[source].update(_unread(sample, kind))
        digest.update(_dump(facts).encode() + b"\n")
    return Survey(digest.hexdigest(), prompts, contents, [dict(count.most_common()) for count in unread])


def _first_prompt(sample: Mapping[str, Any], kind: str) -> Any:
    """The messages before the first answer that is trained: two rows that have them in common show each other's."""
    try:
        messages = prompt_messages(sample)
    except DataError:  # plain text, or a sample that encoding will refuse
        return sample.get("text", sample.get("input"))
    if kind == "supervised" and "input" not in sample:
        trained = (number for number, one in enumerate(messages) if one["role"] == "assistant" and is_trained(one))
        messages = messages[: next(trained, len(messages))]
    return [messages, sample.get("tools") or []]


def _short_hash(value: Any) -> int:
    return int.from_bytes(hashlib.blake2b(_dump(value).encode(), digest_size=8).digest(), "little")


def _unread(sample: Mapping[str, Any], kind: str) -> list[str]:
    """Columns (and keys of messages) that were not read.

    Prompts hand all columns to rewards, so that of theirs only those count that look like a part of the prompt, and
    keys of messages.
    """
    names = list(sample.get("unread") or ())
    if kind == "prompt only":
        columns = sample.get("extra") or {}
        return unread_prompt_columns(sample) + [name for name in names if name not in columns and "." in name]
    if kind == "safety preference":
        names = [name for name in names if name not in SAFETY_COLUMNS]
        names += ["(which answer is better)"] * ("better" in sample)
    if kind == "supervised" and "other_answer" in sample:
        names.append("(the worse answer)")
    return names
