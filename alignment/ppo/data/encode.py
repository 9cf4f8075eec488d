"""From a sample to token ids: segments are tokenised one by one and joined, cut to the limits, and every cut is
reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignment.errors import DataError
from alignment.ppo.data.template import PromptTemplate, Segment

# Why a sample is left out. The names appear in summaries, in data_mixture.json and in messages.
EMPTY_PROMPT = "empty prompt"
EMPTY_ANSWER = "empty answer"
PROMPT_TOO_LONG = "prompt too long"
IDENTICAL_ANSWERS = "identical answers"
IDENTICAL_AFTER_TRUNCATION = "identical after truncation"
MALFORMED = "malformed"
# Why a kept sample is shorter than its text.
PROMPT_CUT = "prompt cut on the left"
ANSWER_CUT = "answer cut on the right"

SUPERVISED_NEEDS = "SupervisedDataset needs (input, answer) or (dialogue)"
PREFERENCE_NEEDS = "PreferenceDataset needs (input, answer, other_answer, better)"
PROMPT_NEEDS = "PromptOnlyDataset needs (input)"

# What the version of the token rows on disk depends on: raise it with every change of meaning in this module.
ENCODING_VERSION = 1


@dataclass(frozen=True)
class Limits:
    """How long rows may be, in tokens.

    Args:
        max_length: of a whole row, prompt and answer together.
        max_src_len: of the prompt, template included. None: in rows with an answer the prompt is cut only as far as the
            answer needs room, and an answer can claim at most half of ``max_length``; in prompt rows it is
            ``max_length``.
        overlong_prompts: what happens to a longer prompt: ``"truncate"`` cuts it on the left (the beginning-of-sequence
            token and the assistant's header stay), ``"drop"`` leaves the row out.

    Raises:
        DataError: a limit is no whole number or too small, ``max_src_len`` leaves no room for an answer, or the choice
            is unknown.
    """

    max_length: int = 2048
    max_src_len: int | None = None
    overlong_prompts: str = "truncate"

    def __post_init__(self) -> None:
        for name in ("max_length", "max_src_len"):
            value = getattr(self, name)
            if value is None and name == "max_src_len":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 2:
                raise DataError(f"{name} must be a whole number of at least 2 tokens, not {value!r}")
        if self.overlong_prompts not in ("truncate", "drop"):
            raise DataError(f'overlong_prompts must be "truncate" or "drop", not {self.overlong_prompts!r}')


@dataclass
class Encoded:
    """A tokenised sample.

    ``rows`` holds one list of ids per sequence (two for a pair, the better first); ``prompt_len`` is the number of ids
    of the prompt that they share; ``trained`` marks the ids of the (only) sequence that are learned, where that is not
    simply all after the prompt.
    """

    rows: list[list[int]]
    prompt_len: int
    trained: list[bool] | None = None
    cuts: list[str] = field(default_factory=list)


class Encoder:
    """Tokenises with one tokenizer and one template.

    Args:
        tokenizer: called as ``tokenizer(text, add_special_tokens=...)``; has ``eos_token_id``.
        template: see :class:`PromptTemplate`.
        limits: see :class:`Limits`.

    Raises:
        DataError: the tokenizer has no end-of-sequence token, or a prompt's limit has no room beside the template's
            header.
    """

    def __init__(self, tokenizer: Any, template: PromptTemplate, limits: Limits) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.limits = limits
        if getattr(tokenizer, "eos_token_id", None) is None:
            raise DataError(
                "the tokenizer has no end-of-sequence token, so answers could never end; add eos_token to its "
                "configuration"
            )
        self.eos_id = int(tokenizer.eos_token_id)
        self.bos_id = self._added_bos()
        self._header_len = header = len(self.text_ids(template.assistant_header()))
        for name, limit in (("max_length", limits.max_length), ("max_src_len", limits.max_src_len)):
            if limit is not None and limit < header + 2:
                raise DataError(
                    f"{name}={limit} leaves no room for a prompt: the template's own "
                    f"{template.assistant_header()!r} takes "
                    f"{header} tokens; use at least {header + 2}"
                )

    def _added_bos(self) -> int | None:
        """The beginning-of-sequence id, if the tokenizer puts one in front of text by itself."""
        bos_id = getattr(self.tokenizer, "bos_token_id", None)
        if bos_id is None:
            return None
        ids = _ids(self.tokenizer, "a", add_special_tokens=True)
        return int(bos_id) if ids[:1] == [bos_id] else None

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of a piece of text, without any special token of the tokenizer's own making."""
        return _ids(self.tokenizer, text, add_special_tokens=False) if text else []

    def segment_ids(self, segments: Sequence[Segment], opens: bool = True) -> tuple[list[int], list[bool]]:
        """Return the ids of segments and, for each id, whether it belongs to an answer.

        Args:
            segments: see :meth:`PromptTemplate.format_turns`.
            opens: whether they open a conversation. Then exactly one beginning-of-sequence token comes first if the
                tokenizer adds one, whether or not the template writes it too.
        """
        ids: list[int] = []
        trained: list[bool] = []
        for segment in segments:
            piece = self.text_ids(segment.text)
            if segment.add_eos and piece[-1:] != [self.eos_id]:
                piece = [*piece, self.eos_id]
            ids += piece
            trained += [segment.is_answer] * len(piece)
        if opens and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
            trained.insert(0, False)
        return ids, trained

    def prompt_ids(self, turns: Sequence[str], system: str | None = None) -> list[int]:
        """Return the ids of a prompt (an odd number of turns), uncut: what every stage puts before the answer."""
        return self.segment_ids(self.template.format_turns(turns, system))[0]

    def cut_left(self, ids: list[Any], limit: int) -> list[Any]:
        """Shorten a prompt to ``limit`` from the left, keeping a beginning-of-sequence token that the tokenizer
        adds.
        """
        if len(ids) <= limit:
            return ids
        return ids[:1] + ids[len(ids) - limit + 1 :] if self.bos_id is not None else ids[len(ids) - limit :]

    # ---------------------------------------------------------------- the three kinds of rows

    def supervised(self, sample: Mapping[str, Any]) -> Encoded | str:
        """Tokenise a sample of ``input`` + ``answer`` or ``dialogue``; returns the reason if it is to be dropped.

        Raises:
            DataError: a field is missing or has the wrong type.
        """
        if ("dialogue" in sample) == ("input" in sample):
            what = "both `input` and `dialogue`" if "input" in sample else "neither `input` nor `dialogue`"
            raise DataError(f"the sample has {what}; {SUPERVISED_NEEDS}")
        if "dialogue" in sample:
            turns = _turn_list(sample["dialogue"], "dialogue")
            if len(turns) % 2:
                raise DataError(
                    f"`dialogue` must end with an answer, so have an even number of turns, not {len(turns)}"
                )
        else:
            turns = [*_input_turns(sample, SUPERVISED_NEEDS), _text(sample, "answer", SUPERVISED_NEEDS)]
        if _all_blank(turns[0::2]):
            return EMPTY_PROMPT
        if not turns[-1].strip():
            return EMPTY_ANSWER
        segments = self.template.format_turns(turns, _system(sample))
        prompt, trained = self.segment_ids(segments[:-1])
        answer, _ = self.segment_ids(segments[-1:], opens=False)
        if "dialogue" not in sample:  # earlier answers of an `input` are context
            trained = [False] * len(prompt)
        limit = self._prompt_limit(len(answer))
        cuts = []
        if len(prompt) > limit:
            if self.limits.overlong_prompts == "drop":
                return PROMPT_TOO_LONG
            cuts.append(PROMPT_CUT)
        prompt, trained = self.cut_left(prompt, limit), self.cut_left(trained, limit)
        room = self.limits.max_length - len(prompt)
        if len(answer) > room:
            cuts.append(ANSWER_CUT)
            answer = answer[:room]
        return Encoded([prompt + answer], len(prompt), trained + [True] * len(answer), cuts)

    def preference(self, sample: Mapping[str, Any]) -> Encoded | str:
        """Tokenise a sample of ``input``, ``answer``, ``other_answer``, ``better``; returns the reason if it is to be
        dropped.

        Raises:
            DataError: a field is missing or has the wrong type.
        """
        turns = _input_turns(sample, PREFERENCE_NEEDS)
        answers = [_text(sample, "answer", PREFERENCE_NEEDS), _text(sample, "other_answer", PREFERENCE_NEEDS)]
        if sample.get("better") is None:
            raise DataError(f"`better` is missing; {PREFERENCE_NEEDS}")
        if sample["better"] not in (True, False):
            raise DataError(f"`better` must be true or false, not {sample['better']!r}")
        if not sample["better"]:
            answers.reverse()
        if _all_blank(turns[0::2]):
            return EMPTY_PROMPT
        if not all(answer.strip() for answer in answers):
            return EMPTY_ANSWER
        if answers[0] == answers[1]:
            return IDENTICAL_ANSWERS
        system = _system(sample)
        both = [self.template.format_turns([*turns, answer], system) for answer in answers]
        prompt, _ = self.segment_ids(both[0][:-1])
        tails = [self.segment_ids(segments[-1:], opens=False)[0] for segments in both]
        if tails[0] == tails[1]:
            return IDENTICAL_ANSWERS
        limit = self._prompt_limit(max(map(len, tails)))
        cuts = []
        if len(prompt) > limit:
            if self.limits.overlong_prompts == "drop":
                return PROMPT_TOO_LONG
            cuts.append(PROMPT_CUT)
            prompt = self.cut_left(prompt, limit)
        room = self.limits.max_length - len(prompt)
        if max(map(len, tails)) > room:
            cuts.append(ANSWER_CUT)
            tails = [tail[:room] for tail in tails]
            if tails[0] == tails[1]:
                return IDENTICAL_AFTER_TRUNCATION
        return Encoded([prompt + tail for tail in tails], len(prompt), cuts=cuts)

    def prompt(self, sample: Mapping[str, Any]) -> Encoded | str:
        """Tokenise the prompt of a sample; returns the reason if it is to be dropped.

        Raises:
            DataError: a field is missing or has the wrong type.
        """
        turns = prompt_turns(sample)
        if _all_blank(turns[0::2]):
            return EMPTY_PROMPT
        ids = self.prompt_ids(turns, _system(sample))
        limit = min(self.limits.max_src_len or self.limits.max_length, self.limits.max_length)
        cuts = []
        if len(ids) > limit:
            if self.limits.overlong_prompts == "drop":
                return PROMPT_TOO_LONG
            cuts.append(PROMPT_CUT)
            ids = self.cut_left(ids, limit)
        return Encoded([ids], len(ids), cuts=cuts)

    def _prompt_limit(self, answer_len: int) -> int:
        """How long the prompt may be beside an answer of ``answer_len`` tokens; see :class:`Limits`."""
        if self.limits.max_src_len is not None:
            limit = self.limits.max_src_len
        else:
            limit = self.limits.max_length - min(answer_len, self.limits.max_length // 2)
        return min(max(limit, self._header_len + 1), self.limits.max_length - 1)


def prompt_turns(sample: Mapping[str, Any]) -> list[str]:
    """Return the turns of a sample's prompt: its ``input``, or its ``dialogue`` without the last answer.

    Raises:
        DataError: it has neither, or they have the wrong form.
    """
    if "input" not in sample and "dialogue" in sample:
        turns = _turn_list(sample["dialogue"], "dialogue")
        return turns if len(turns) % 2 else turns[:-1]
    return _input_turns(sample, PROMPT_NEEDS)


def _input_turns(sample: Mapping[str, Any], needs: str) -> list[str]:
    value = sample.get("input")
    if isinstance(value, str):
        return [value]
    if value is None:
        raise DataError(f"`input` is missing; {needs}")
    turns = _turn_list(value, "input")
    if len(turns) % 2 == 0:
        raise DataError(f"`input` must end with the user's turn, so have an odd number of turns, not {len(turns)}")
    return turns


def _turn_list(value: object, name: str) -> list[str]:
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(turn, str) for turn in value):
        form = "text or a non-empty list of texts" if name == "input" else "a non-empty list of texts"
        raise DataError(f"`{name}` must be {form}, not {type(value).__name__} {value!r:.80}")
    return list(value)


def _text(sample: Mapping[str, Any], name: str, needs: str) -> str:
    value = sample.get(name)
    if value is None:
        raise DataError(f"`{name}` is missing; {needs}")
    if not isinstance(value, str):
        raise DataError(f"`{name}` must be text, not {type(value).__name__} {value!r:.80}")
    return value


def _system(sample: Mapping[str, Any]) -> str | None:
    value = sample.get("system")
    if value is not None and not isinstance(value, str):
        raise DataError(f"`system` must be text, not {type(value).__name__} {value!r:.80}")
    return value


def _all_blank(turns: Sequence[str]) -> bool:
    return not any(turn.strip() for turn in turns)


def _ids(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
    return list(
        tokenizer(text, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False)["input_ids"]
    )
