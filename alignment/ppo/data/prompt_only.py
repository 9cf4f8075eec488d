"""Prompts alone: what the actor answers in PPO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from alignment.errors import DataError
from alignment.ppo.data.encode import Encoded, Encoder, prompt_messages, prompt_turns
from alignment.ppo.data.template import PromptTemplate
from alignment.ppo.data.tokenized import TokenizedDataset


class PromptOnlyDataset(TokenizedDataset):
    """Distinct prompts. A prompt that comes again is taken out before mixing; copies made by a proportion above 1 stay.

    ``ds[i]``: ``input_ids`` int64 [prompt_len], the very ids that the prompt has in SFT and reward rows; ``prompt``:
    the user's text as it was given (turns of a conversation joined by empty lines); ``row``: all fields of the sample
    and all columns of its source, for Python rewards; ``source``: the NAME it came from; ``index``: its position in the
    mixture, the same whatever else is dropped.
    """

    KIND = "prompt only"
    DEDUPLICATE = True

    def encode(self, encoder: Encoder, sample: Mapping[str, Any]) -> Encoded | str:
        return encoder.prompt(sample)

    def item(self, sample: int, position: int) -> dict[str, Any]:
        raw = self._samples[sample]
        fields = {name: value for name, value in raw.items() if name not in ("extra", "unread", "unusable")}
        prompt = {name: fields[name] for name in ("dialogue", "system", "tools") if name in fields}
        prompt["input"] = fields.get("input", prompt_messages(raw))
        return {
            "input_ids": self._table.row(sample),
            "prompt": "\n\n".join(prompt_turns(raw)),
            # A column is the file's own, also where a field is called the same (`answer`), but the prompt is as read.
            "row": {**fields, **(raw.get("extra") or {}), **prompt},
            "source": self._sources[int(self._source_of[position])].name,
            "index": position,
        }

    def columns(self) -> list[str]:
        """Every name that the ``row`` of some item has."""
        found = {"input": None}
        for sample in np.unique(self._sample_of[self._kept]):
            raw = self._samples[int(sample)]
            found.update(dict.fromkeys(name for name in raw if name not in ("extra", "unread")))
            found.update(dict.fromkeys(raw.get("extra") or {}))
        return list(found)

    def check_template(self, template: PromptTemplate, whose: str) -> None:
        """Try another template than the data set's on every form of conversation among the prompts, once each: what it
        has no place for would end a run when the first such prompt is scored.

        Args:
            template: resolved.
            whose: for the message.

        Raises:
            DataError: it cannot write one of them.
        """
        tried = set()
        for number in np.unique(self._sample_of[self._kept]):
            raw = self._samples[int(number)]
            messages, tools = prompt_messages(raw), raw.get("tools")
            form = (bool(tools), *((m["role"], "tool_calls" in m, not m["content"]) for m in messages))
            if form in tried:
                continue
            tried.add(form)
            try:
                template.format_messages(messages, tools)
            except DataError as err:
                raise DataError(
                    f"{whose} cannot write a prompt of {self.name!r} ({prompt_turns(raw)[-1]!r:.60}): {err}"
                ) from err

    def trained_tokens(self, samples: np.ndarray) -> int | None:
        return None
