"""From a sample to token ids: segments are tokenised one by one and joined, cut to the limits, and every cut is
reported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignment.errors import DataError
from alignment.ppo.data.messages import Message, from_turns, is_empty, read_messages
from alignment.ppo.data.rendering import split_reasoning
from alignment.ppo.data.template import PromptTemplate, Segment

# Why a sample is left out. The names appear in summaries, in data_mixture.json and in messages.
EMPTY_PROMPT = "empty prompt"
EMPTY_ANSWER = "empty answer"
PROMPT_TOO_LONG = "prompt too long"
ANSWER_TOO_LONG = "answer too long"
NOT_GOOD = "not a good answer"
NOTHING_TRAINED = "no turn to train"
TIED = "tied answers"
IDENTICAL_ANSWERS = "identical answers"
CONTRADICTING = "contradicting safety labels"
IDENTICAL_AFTER_TRUNCATION = "identical after truncation"
MALFORMED = "malformed"
# Why a kept sample is shorter than its text.
PROMPT_CUT = "prompt cut on the left"
ANSWER_CUT = "answer cut on the right"

SUPERVISED_NEEDS = "SupervisedDataset needs (input, answer), (dialogue) or (text)"
PREFERENCE_NEEDS = "PreferenceDataset needs (input, answer, other_answer, better)"
SAFETY_NEEDS = (
    "SafetyPreferenceDataset needs (input, answer, other_answer, safer, is_safe, is_other_safe); PKU-SafeRLHF calls "
    "the labels safer_response_id, is_response_0_safe, is_response_1_safe"
)
PROMPT_NEEDS = "PromptOnlyDataset needs (input)"


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
        overlong_answers: what happens to an answer that its row has no room for: ``"truncate"`` cuts it on the right
            (without an end-of-sequence token, so that no model learns to stop in mid-sentence), ``"drop"`` leaves the
            row out.

    Raises:
        DataError: a limit is no whole number or too small, ``max_src_len`` leaves no room for an answer, or the choice
            is unknown.
    """

    max_length: int = 2048
    max_src_len: int | None = None
    overlong_prompts: str = "truncate"
    overlong_answers: str = "truncate"

    def __post_init__(self) -> None:
        for name in ("max_length", "max_src_len"):
            value = getattr(self, name)
            if value is None and name == "max_src_len":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 2:
                raise DataError(f"{name} must be a whole number of at least 2 tokens, not {value!r}")
        for name in ("overlong_prompts", "overlong_answers"):
            if getattr(self, name) not in ("truncate", "drop"):
                raise DataError(f'{name} must be "truncate" or "drop", not {getattr(self, name)!r}')


@dataclass
class Encoded:
    """A tokenised sample.

    ``rows`` holds one list of ids per sequence (two for a pair, the better first); ``prompt_len`` is the number of ids
    of the prompt that they share; ``trained`` marks the ids of the (only) sequence that are learned, where that is not
    simply all after the prompt; ``signs`` of a safety pair: for each row +1 if its answer is unsafe, else -1.
    """

    rows: list[list[int]]
    prompt_len: int
    trained: list[bool] | None = None
    cuts: list[str] = field(default_factory=list)
    signs: list[int] | None = None


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
                    f"{name}={limit} leaves no room for a prompt: the template's own {template.assistant_header()!r} "
                    f"takes {header} tokens; use at least {header + 2}"
                )

    def _added_bos(self) -> int | None:
        """The beginning-of-sequence id, if the tokenizer puts one in front of text by itself."""
        bos_id = getattr(self.tokenizer, "bos_token_id", None)
        if bos_id is None:
            return None
        ids = _ids(self.tokenizer, "a", add_special_tokens=True)
        return int(bos_id) if ids[:1] == [bos_id] else None

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of a piece of text, without any special token of the tokenizer's own making.

        Raises:
            DataError: it holds half a surrogate pair (an emoji cut in two), which no encoding can write.
        """
        _check_unicode(text)
        return _ids(self.tokenizer, text, add_special_tokens=False) if text else []

    def segment_pieces(self, segments: Sequence[Segment]) -> list[tuple[list[int], list[bool]]]:
        """Return the ids of each segment and, for each id, whether it is learnt; see
        :meth:`~alignment.ppo.models.json_tokenizer.JsonTokenizer.encode_pieces` for how they meet.

        Raises:
            DataError: see :meth:`text_ids`.
        """
        together = getattr(self.tokenizer, "encode_pieces", None)
        texts = [segment.text for segment in segments]
        if together is None:
            found = [self.text_ids(text) for text in texts]
        else:
            eos = str(self.tokenizer.eos_token)
            for text in texts:
                _check_unicode(text)
            found = together([s.text + eos * (s.add_eos and not s.text.endswith(eos)) for s in segments])
        pieces = []
        for segment, ids in zip(segments, found, strict=True):
            if segment.add_eos and ids[-1:] != [self.eos_id]:
                ids = [*ids, self.eos_id]
            pieces.append((ids, [segment.is_answer] * len(ids)))
        return pieces

    def segment_ids(self, segments: Sequence[Segment]) -> tuple[list[int], list[bool]]:
        """Return the ids of the segments of a conversation and, for each id, whether it is learnt."""
        return self._opened(self.segment_pieces(segments))

    def _opened(self, pieces: Sequence[tuple[list[int], list[bool]]]) -> tuple[list[int], list[bool]]:
        """Join the pieces that open a conversation. Exactly one beginning-of-sequence token comes first if the
        tokenizer adds one, whether or not the template writes it too.
        """
        ids = [index for piece, _ in pieces for index in piece]
        trained = [learnt for _, piece in pieces for learnt in piece]
        if self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
            trained.insert(0, False)
        return ids, trained

    def prompt_ids(
        self, turns: Sequence[str] | Sequence[Message], system: str | None = None, tools: Sequence[Any] | None = None
    ) -> list[int]:
        """Return the ids of a prompt (turns or messages that end with the user), uncut: what every stage puts before
        the answer.
        """
        return self.segment_ids(self.template.format_messages(_conversation(turns, "input", system), tools))[0]

    def answered(
        self,
        turns: Sequence[str] | Sequence[Message],
        answer: str,
        ended: bool,
        system: str | None = None,
        tools: Sequence[Any] | None = None,
    ) -> tuple[list[int], list[int]]:
        """Return the ids of a prompt and of an answer that was generated.

        The answer is written as in a training row, up to its last character if it was cut; one that the template cannot
        write (a policy may say anything) is its bare text.
        """
        messages = _conversation(turns, "input", system)
        segments = self.template.format_messages(messages, tools)
        last = Segment(answer, is_answer=True, add_eos=ended)
        try:
            whole = self.template.format_messages(
                [*_untrained(messages), {"role": "assistant", "content": answer}], tools
            )
        except DataError:
            whole = []
        before, found, _ = whole[-1].text.rpartition(answer.rstrip()) if whole else ("", "", "")
        if found:
            segments, last = whole[:-1], whole[-1] if ended else Segment(before + answer, is_answer=True)
        pieces = self.segment_pieces([*segments, last])
        return self._opened(pieces[:-1])[0], pieces[-1][0]

    def cut_left(self, ids: list[Any], limit: int) -> list[Any]:
        """Shorten a prompt to ``limit`` from the left, keeping a beginning-of-sequence token that the tokenizer
        adds.
        """
        if len(ids) <= limit:
            return ids
        return ids[:1] + ids[len(ids) - limit + 1 :] if self.bos_id is not None else ids[len(ids) - limit :]

    # ---------------------------------------------------------------- the three kinds of rows

    def supervised(self, sample: Mapping[str, Any]) -> Encoded | str:
        """Tokenise a sample of ``input`` + ``answer``, ``dialogue`` or ``text``; returns the reason if it is to be
        dropped.

        Raises:
            DataError: a field is missing or has the wrong type.
        """
        _check_usable(sample)
        is_text = "text" in sample and not {"input", "dialogue"} & set(sample)
        if not is_text and ("dialogue" in sample) == ("input" in sample):
            what = "both `input` and `dialogue`" if "input" in sample else "neither `input` nor `dialogue`"
            raise DataError(f"the sample has {what}; {SUPERVISED_NEEDS}")
        if sample.get("good") is False:
            return NOT_GOOD
        if is_text:
            return self._plain_text(_text(sample, "text", SUPERVISED_NEEDS))
        if "dialogue" in sample:
            messages = _conversation(sample["dialogue"], "dialogue", sample.get("system"))
            if messages[-1]["role"] != "assistant":
                raise DataError("`dialogue` must end with the assistant's answer, but ends with the user")
        else:
            chosen = "other_answer" if sample.get("better") in (False,) and "other_answer" in sample else "answer"
            context = _prompt_messages(sample, SUPERVISED_NEEDS)
            if len(context) > 1 and sample.get(chosen) is None:
                raise DataError(f"the conversation ends with the user and has no answer to train; {SUPERVISED_NEEDS}")
            messages = [*_untrained(context), *_answer(sample, chosen, SUPERVISED_NEEDS)]
        if _is_blank(messages):
            return EMPTY_PROMPT
        if _says_nothing(messages[-1]):
            return EMPTY_ANSWER
        messages = [message | {"weight": 0} if _says_nothing(message) else message for message in messages]
        if not any(message["role"] == "assistant" and message.get("weight", 1) for message in messages):
            return NOTHING_TRAINED
        segments = self.template.format_messages(messages, sample.get("tools"))
        pieces = self.segment_pieces(segments)
        prompt, trained = self._opened(pieces[:-1])
        answer, answer_trained = pieces[-1]
        limit = self._prompt_limit(len(answer))
        cuts = []
        if len(prompt) > limit:
            if self.limits.overlong_prompts == "drop":
                return PROMPT_TOO_LONG
            cuts.append(PROMPT_CUT)
            prompt, trained = self.cut_left(prompt, limit), self.cut_left(trained, limit)
            # An earlier answer that lost its question, or its own beginning, is there to be read alone.
            at = int(self.bos_id is not None)
            while at < len(trained) and trained[at]:
                trained[at] = False
                at += 1
        room = self.limits.max_length - len(prompt)
        if len(answer) > room:
            if self.limits.overlong_answers == "drop":
                return ANSWER_TOO_LONG
            cuts.append(ANSWER_CUT)
        trained = trained + answer_trained[:room]
        return Encoded([prompt + answer[:room]], len(prompt), trained, cuts) if any(trained) else NOTHING_TRAINED

    def _plain_text(self, text: str) -> Encoded | str:
        """Text without a template: the beginning of a sequence (if the tokenizer adds one), the text, its end."""
        if not text.strip():
            return EMPTY_ANSWER
        ids, trained = self.segment_ids([Segment(text, is_answer=True, add_eos=True)])
        cuts = []
        if len(ids) > self.limits.max_length:
            if self.limits.overlong_answers == "drop":
                return ANSWER_TOO_LONG
            cuts.append(ANSWER_CUT)
        room = self.limits.max_length
        return Encoded([ids[:room]], trained.count(False), trained[:room], cuts)

    def preference(self, sample: Mapping[str, Any]) -> Encoded | str:
        """Tokenise a sample of ``input``, ``answer``, ``other_answer``, ``better``; returns the reason if it is to be
        dropped.

        Raises:
            DataError: a field is missing or has the wrong type.
        """
        return self._pair(sample, "better", PREFERENCE_NEEDS)

    def safety_preference(self, sample: Mapping[str, Any]) -> Encoded | str:
        """Tokenise a sample of ``input``, ``answer``, ``other_answer``, ``safer``, ``is_safe``, ``is_other_safe``, the
        safer answer first; returns the reason if it is to be dropped.

        Raises:
            DataError: a field is missing or has the wrong type.
        """
        encoded = self._pair(sample, "safer", SAFETY_NEEDS)
        safe = [_flag(sample, name, SAFETY_NEEDS) for name in ("is_safe", "is_other_safe")]
        if isinstance(encoded, str):
            return encoded
        if not sample["safer"]:
            safe.reverse()
        if safe == [False, True]:
            return CONTRADICTING
        encoded.signs = [-1 if one else 1 for one in safe]
        return encoded

    def _pair(self, sample: Mapping[str, Any], label: str, needs: str) -> Encoded | str:
        """Two answers to one prompt, first ``answer`` if the sample's ``label`` is true, else ``other_answer``."""
        _check_usable(sample)
        context = _prompt_messages(sample, needs)
        if "good" in sample and "other_answer" not in sample:
            raise DataError(
                f"a row of one answer and a label that says whether it is good (KTO) is no pair; {needs}: "
                "write rows of prompt, chosen, rejected"
            )
        answers = [_answer(sample, name, needs) for name in ("answer", "other_answer")]
        if label not in sample:
            raise DataError(f"`{label}` is missing; {needs}")
        first = sample[label]
        if first not in (True, False, None):
            raise DataError(f"`{label}` must be true or false, or null where neither is, not {first!r}")
        if any(len(answer) > 1 for answer in answers):
            raise DataError("an answer of a pair must be one message of the assistant")
        if first is not None and not first:
            answers.reverse()
        if _is_blank(context):
            return EMPTY_PROMPT
        if any(_says_nothing(answer[-1]) for answer in answers):
            return EMPTY_ANSWER
        if answers[0] == answers[1]:
            return IDENTICAL_ANSWERS
        if first is None:
            return TIED
        # Both are written for an answer with reasoning if one of them has some: they answer the same prompt.
        thinking = any(split_reasoning(answer[0])[0] for answer in answers) or None
        both = [
            self.template.format_messages([*_untrained(context), *answer], sample.get("tools"), thinking=thinking)
            for answer in answers
        ]
        if both[0][:-1] != both[1][:-1]:
            raise DataError(
                "the prompt template writes the prompt of the two answers differently; use another template"
            )
        pieces = [self.segment_pieces(segments) for segments in both]
        prompt, _ = self._opened(pieces[0][:-1])
        tails = [found[-1][0] for found in pieces]
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
            if self.limits.overlong_answers == "drop":
                return ANSWER_TOO_LONG
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
        messages = prompt_messages(sample)
        if _is_blank(messages):
            return EMPTY_PROMPT
        ids = self.prompt_ids(messages, tools=sample.get("tools"))
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


def prompt_messages(sample: Mapping[str, Any]) -> list[Message]:
    """Return the messages of a sample's prompt: its ``input``, or its ``dialogue`` without the last answer.

    Raises:
        DataError: it has neither, or they have the wrong form.
    """
    if "input" in sample or "dialogue" not in sample:
        return _prompt_messages(sample, PROMPT_NEEDS)
    messages = _conversation(sample["dialogue"], "dialogue", sample.get("system"))
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def prompt_turns(sample: Mapping[str, Any]) -> list[str]:
    """Return the texts of a sample's prompt, without the system prompt.

    Raises:
        DataError: see :func:`prompt_messages`.
    """
    return [message["content"] for message in prompt_messages(sample) if message["role"] != "system"]


def prompt_key(sample: Mapping[str, Any]) -> str:
    """Return what is equal for samples whose prompts read the same: the prompt's messages and tools as JSON text.

    Raises:
        DataError: see :func:`prompt_messages`.
    """
    return json.dumps([prompt_messages(sample), sample.get("tools") or []], sort_keys=True, default=str)


def _check_usable(sample: Mapping[str, Any]) -> None:
    if "unusable" in sample:
        raise DataError(sample["unusable"])


def _prompt_messages(sample: Mapping[str, Any], needs: str) -> list[Message]:
    if sample.get("input") is None:
        what = "a row of plain `text` has no prompt; call the column `prompt` if it is one" if "text" in sample else ""
        raise DataError(f"{what or '`input` is missing'}; {needs}")
    messages = _conversation(sample["input"], "input", sample.get("system"))
    if messages[-1]["role"] == "assistant":
        raise DataError("`input` must end with the user's turn (or a tool's), not with the assistant's")
    return messages


def _conversation(value: object, name: str, system: object) -> list[Message]:
    """Text, turns or messages as messages, the system prompt first."""
    if system is not None and not isinstance(system, str):
        raise DataError(f"`system` must be text, not {type(system).__name__} {system!r:.80}")
    if isinstance(value, str) and name == "input":
        value = [value]
    is_list = isinstance(value, (list, tuple)) and bool(value)
    if is_list and all(isinstance(turn, str) for turn in value):  # type: ignore[union-attr]
        return from_turns(value, system)  # type: ignore[arg-type]
    if not is_list or not all(isinstance(turn, Mapping) for turn in value):  # type: ignore[union-attr]
        form = "text or a non-empty list of texts" if name == "input" else "a non-empty list of texts"
        raise DataError(f"`{name}` must be {form} or messages, not {type(value).__name__} {value!r:.80}")
    messages = read_messages(value, name)
    if is_empty(system):
        return messages
    if messages[0]["role"] == "system":
        if messages[0]["content"].strip() == system.strip():  # type: ignore[union-attr]
            return messages
        raise DataError(f"`system` and the first message of `{name}` are different system prompts")
    return [{"role": "system", "content": system}, *messages]


def _answer(sample: Mapping[str, Any], name: str, needs: str) -> list[Message]:
    """An answer as messages. A whole number is text as it stands; of other numbers the spelling is lost (0.50)."""
    value = sample.get(name)
    if isinstance(value, (list, Mapping)) and value and all(isinstance(one, Mapping) for one in _listed(value)):
        messages = read_messages(_listed(value), name)
        if messages[0]["role"] == messages[-1]["role"] == "assistant":
            return messages
        raise DataError(f"`{name}` must begin and end with the assistant's turn")
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if value is None and sample.get("unread"):
        needs += f" (not read in this row: {', '.join(sample['unread'])})"
    return [{"role": "assistant", "content": _text({name: value}, name, needs)}]


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, Mapping) else value


def _untrained(messages: Sequence[Message]) -> list[Message]:
    return [message | {"weight": 0} if message["role"] == "assistant" else message for message in messages]


def _says_nothing(message: Message) -> bool:
    """Whether it is an assistant's turn with nothing in it."""
    is_assistant = message["role"] == "assistant"
    return is_assistant and not (message["content"].strip() or {"tool_calls", "reasoning_content"} & set(message))


def _is_blank(messages: Sequence[Message]) -> bool:
    """Whether nobody asks anything."""
    return not any(message["content"].strip() for message in messages if message["role"] in ("user", "tool"))


def _text(sample: Mapping[str, Any], name: str, needs: str) -> str:
    value = sample.get(name)
    if value is None:
        raise DataError(f"`{name}` is missing; {needs}")
    if not isinstance(value, str):
        raise DataError(f"`{name}` must be text, not {type(value).__name__} {value!r:.80}")
    return value


def _flag(sample: Mapping[str, Any], name: str, needs: str) -> bool:
    value = sample.get(name)
    if value is None:
        raise DataError(f"`{name}` is missing; {needs}")
    if value not in (True, False):
        raise DataError(f"`{name}` must be true or false, not {value!r:.80}")
    return bool(value)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as err:
        around = text[max(err.start - 20, 0) : err.start + 20].encode("ascii", "backslashreplace").decode()
        raise DataError(
            f"the text holds half a surrogate pair (an emoji or rare character that was cut in two): '{around}'; "
            "remove it"
        ) from None


def _ids(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
    return list(
        tokenizer(text, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False)["input_ids"]
    )
