"""From a file's row to a :class:`RawSample`: the column layouts in use, told apart by their names.

====================================================================  =================================
columns                                                               becomes
====================================================================  =================================
``prompt response_0 response_1 better_response_id``                   a pair (PKU-SafeRLHF)
``prompt chosen rejected`` (text or messages)                         a pair
``chosen rejected`` (transcripts ``\\n\\nHuman: ... Assistant: ...``)  a pair over a conversation (HH)
``src tgt response sort``                                             a pair (paddlenlp's flashmask RM)
``messages`` / ``conversations`` / ``dialogue``                       a conversation
``instruction (input) output``                                        an answer (Alpaca)
``src tgt``, ``input answer``, ``question answer``, ``prompt response``, ``prompt completion``  an answer
``prompt`` / ``input`` / ``src`` / ``question`` / ``instruction``     a prompt
====================================================================  =================================

A ``system`` column is the system prompt. All columns are kept for Python rewards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from alignment.errors import DataError
from alignment.ppo.data.base import RawSample

_ANSWER_COLUMNS = (
    ("src", "tgt"),
    ("input", "answer"),
    ("question", "answer"),
    ("prompt", "answer"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("input", "output"),
)
_PROMPT_COLUMNS = ("prompt", "input", "src", "question", "instruction")
_ROLES = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "system": "system",
}
_HH_TURN = re.compile(r"(?:^|\n\n)\s*(Human|Assistant):")


def sample_from_row(row: Mapping[str, Any]) -> RawSample:
    """Make a sample of a row by the table above.

    Raises:
        DataError: no layout fits, or a column holds the wrong thing.
    """
    has = {name for name, value in row.items() if value is not None}
    if "response_0" in has or "response_1" in has:
        sample = paired_responses(row)
    elif {"chosen", "rejected"} & has:
        sample = _chosen_and_rejected(row)
    elif {"src", "response", "sort"} <= has:
        sample = _sorted_responses(row)
    elif conversation := [name for name in ("messages", "conversations", "dialogue") if name in has]:
        sample = _conversation(row, conversation[0])
    elif {"instruction", "output"} <= has:
        sample = instruction_row(row)
    else:
        sample = _plain(row, has)
    if "system" in has and "system" not in sample:
        sample["system"] = text_field(row, "system")
    sample["extra"] = dict(row)
    return sample


def text_field(row: Mapping[str, Any], name: str) -> str:
    """Return a column that must be text.

    Raises:
        DataError: it is missing or not text.
    """
    if name not in row:
        raise DataError(f"the column {name!r} is missing; the row has {', '.join(map(repr, row)) or 'no columns'}")
    if not isinstance(row[name], str):
        raise DataError(f"the column {name!r} must be text, not {_kind(row[name])}")
    return row[name]


def paired_responses(row: Mapping[str, Any]) -> RawSample:
    """Make a pair of ``prompt``, ``response_0``, ``response_1``, ``better_response_id`` and the safety columns, where
    present.
    """
    sample = RawSample(
        input=_prompt(row, "prompt"),
        answer=text_field(row, "response_0"),
        other_answer=text_field(row, "response_1"),
        better=_first_of_two(row, "better_response_id"),
        extra=dict(row),
    )
    if row.get("safer_response_id") is not None:
        sample["safer"] = _first_of_two(row, "safer_response_id")
    for column, key in (("is_response_0_safe", "is_safe"), ("is_response_1_safe", "is_other_safe")):
        if row.get(column) is not None:
            sample[key] = bool(row[column])  # type: ignore[literal-required]
    return sample


def instruction_row(row: Mapping[str, Any]) -> RawSample:
    """Make a sample of Alpaca's ``instruction``, ``input`` (may be empty or missing) and ``output``."""
    instruction = text_field(row, "instruction")
    context = text_field(row, "input") if row.get("input") is not None else ""
    return RawSample(
        input=f"{instruction} {context}" if context else instruction, answer=text_field(row, "output"), extra=dict(row)
    )


def split_transcript(text: str) -> list[str]:
    """Split an HH transcript (``\\n\\nHuman: ...\\n\\nAssistant: ...``) into turns: user and assistant alternately.

    Two turns of the same speaker in a row, which the real files have, are joined by an empty line.

    Raises:
        DataError: it does not begin with ``Human:``.
    """
    pieces = _HH_TURN.split(text)
    if pieces[0].strip():
        raise DataError(
            "the transcript has text before its first 'Human:' (without a prompt column, 'chosen' and 'rejected' "
            "must be "
            "whole transcripts)"
        )
    turns: list[str] = []
    former = None
    for speaker, said in zip(pieces[1::2], pieces[2::2], strict=True):
        if speaker == former:
            turns[-1] = "\n\n".join(filter(None, (turns[-1], said.strip())))
        else:
            turns.append(said.strip())
        if former is None and speaker != "Human":
            raise DataError("the transcript must begin with 'Human:', not with 'Assistant:'")
        former = speaker
    if not turns:
        raise DataError("a transcript needs turns that begin with 'Human:' and 'Assistant:'")
    return turns


def read_messages(value: object, column: str) -> tuple[str | None, list[str]]:
    """Read ``[{"role": ..., "content": ...}, ...]`` (or ``from``/``value``) as (system prompt or None, turns).

    Raises:
        DataError: a message is malformed, a role unknown, the system prompt not first, or the speakers do not take
            turns.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"the column {column!r} must be a non-empty list of messages, not {_kind(value)}")
    system = None
    turns: list[str] = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping):
            raise DataError(f"{column}: message {number} must be an object with role and content, not {_kind(message)}")
        role_name = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        role = _ROLES.get(role_name.lower()) if isinstance(role_name, str) else None
        if role is None:
            raise DataError(f"{column}: message {number} has the role {role_name!r}; known are {', '.join(_ROLES)}")
        if not isinstance(content, str):
            raise DataError(f"{column}: the content of message {number} must be text, not {_kind(content)}")
        if role == "system":
            if number > 1:
                raise DataError(f"{column}: message {number} is a system prompt; it must be the first message")
            system = content
        elif role != ("user", "assistant")[len(turns) % 2]:
            raise DataError(
                f"{column}: message {number} is another {role} turn; user and assistant must take turns, user first"
            )
        else:
            turns.append(content)
    if not turns:
        raise DataError(f"{column}: there is no turn beside the system prompt")
    return system, turns


def _plain(row: Mapping[str, Any], has: set[str]) -> RawSample:
    for asked, answered in _ANSWER_COLUMNS:
        if {asked, answered} <= has:
            return _question_and_answer(row, asked, answered)
    for column in _PROMPT_COLUMNS:
        if column in has:
            return _with_system(row, column, {})
    raise DataError(
        f"no known layout has the columns {', '.join(map(repr, row)) or '(none)'}; known are for example src+tgt, "
        "input+answer, "
        "instruction+output, messages, prompt+chosen+rejected, or prompt alone"
    )


def _question_and_answer(row: Mapping[str, Any], asked: str, answered: str) -> RawSample:
    questions, answers = row[asked], row[answered]
    if isinstance(answers, str) and asked != "src":  # a list of `src` holds the user's turns alone
        return _with_system(row, asked, {"answer": answers})
    questions, answers = _texts(questions, asked), _texts(answers, answered)
    turns = [turn for pair in zip(questions, answers, strict=False) for turn in pair]
    if len(questions) == len(answers) == 1:
        return RawSample(input=questions[0], answer=answers[0])
    if len(questions) == len(answers):
        return RawSample(dialogue=turns)
    if len(questions) == len(answers) + 1:
        return RawSample(input=[*turns, questions[-1]])
    raise DataError(f"{asked!r} has {len(questions)} turns and {answered!r} {len(answers)}; they must be as many")


def _with_system(row: Mapping[str, Any], column: str, fields: dict[str, Any]) -> RawSample:
    """A sample whose prompt may be text, a conversation of texts, or messages with a system prompt."""
    if isinstance(row[column], list) and row[column] and isinstance(row[column][0], Mapping):
        system, turns = read_messages(row[column], column)
        return RawSample(**({"system": system} if system is not None else {}), input=turns, **fields)
    return RawSample(input=_prompt(row, column), **fields)


def _conversation(row: Mapping[str, Any], column: str) -> RawSample:
    value = row[column]
    if isinstance(value, list) and value and all(isinstance(turn, str) for turn in value):
        system, turns = None, list(value)
    else:
        system, turns = read_messages(value, column)
    sample = (
        RawSample(dialogue=turns) if len(turns) % 2 == 0 else RawSample(input=turns if len(turns) > 1 else turns[0])
    )
    if system is not None:
        sample["system"] = system
    return sample


def _chosen_and_rejected(row: Mapping[str, Any]) -> RawSample:
    prompt = next((name for name in _PROMPT_COLUMNS if row.get(name) is not None), None)
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise DataError(f"the column {name!r} is missing; a pair needs both 'chosen' and 'rejected'")
    if prompt is not None and isinstance(row["chosen"], str):
        if isinstance(row[prompt], str) and _HH_TURN.match(row[prompt]):
            turns = split_transcript(re.sub(r"\s*Assistant:\s*$", "", row[prompt]))
            fields = {"input": turns}
        else:
            fields = dict(_with_system(row, prompt, {}))
        return RawSample(**fields, answer=row["chosen"], other_answer=text_field(row, "rejected"), better=True)
    if isinstance(row["chosen"], str):
        system, chosen, rejected = None, *(split_transcript(text_field(row, name)) for name in ("chosen", "rejected"))
    else:
        before: list[Mapping[str, Any]] = list(row[prompt]) if prompt and isinstance(row[prompt], list) else []
        if prompt and not before and len(row["chosen"]) == 1:
            before = [{"role": "user", "content": text_field(row, prompt)}]
        system, chosen = read_messages([*before, *_list(row, "chosen")], "chosen")
        _, rejected = read_messages([*before, *_list(row, "rejected")], "rejected")
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if len(turns) % 2:
            raise DataError(f"{name!r} must end with the assistant's answer, but ends with the user")
    if chosen[:-1] != rejected[:-1]:
        raise DataError(
            "'chosen' and 'rejected' differ before their last answers, so they do not answer the same prompt"
        )
    sample = RawSample(input=chosen[:-1], answer=chosen[-1], other_answer=rejected[-1], better=True)
    if system is not None:
        sample["system"] = system
    return sample


def _sorted_responses(row: Mapping[str, Any]) -> RawSample:
    """paddlenlp's ``src`` (turns), ``tgt`` (earlier answers), ``response`` (two) and ``sort`` (two numbers, the larger
    is better).
    """
    questions = _texts(row["src"], "src")
    answers = _texts(row["tgt"], "tgt") if row.get("tgt") else []
    responses, sort = _texts(row["response"], "response"), _list(row, "sort")
    if len(questions) != len(answers) + 1:
        raise DataError(f"'src' has {len(questions)} turns and 'tgt' {len(answers)}; 'src' must have one more")
    if len(responses) != 2 or len(sort) != 2 or not all(isinstance(rank, (int, float)) for rank in sort):
        raise DataError("'response' must hold two texts and 'sort' two numbers")
    if sort[0] == sort[1]:
        raise DataError(
            f"'sort' must tell the answers apart (the larger number is the better answer), not {list(sort)}"
        )
    turns = [turn for pair in zip(questions, answers, strict=False) for turn in pair] + [questions[-1]]
    prompt = turns if len(turns) > 1 else turns[0]
    return RawSample(input=prompt, answer=responses[0], other_answer=responses[1], better=sort[0] > sort[1])


def _prompt(row: Mapping[str, Any], column: str) -> str | list[str]:
    value = row.get(column)
    return _texts(value, column) if isinstance(value, list) else text_field(row, column)


def _texts(value: object, column: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"the column {column!r} must be text or a non-empty list of texts, not {_kind(value)}")
    return list(texts)


def _list(row: Mapping[str, Any], column: str) -> list[Any]:
    if not isinstance(row.get(column), list):
        raise DataError(f"the column {column!r} must be a list, not {_kind(row.get(column))}")
    return list(row[column])


def _first_of_two(row: Mapping[str, Any], column: str) -> bool:
    value = row.get(column)
    if isinstance(value, bool) or value not in (0, 1):
        raise DataError(f"the column {column!r} must be 0 or 1, not {value!r}")
    return value == 0


def _kind(value: object) -> str:
    return "null" if value is None else f"{type(value).__name__} {value!r:.60}"
