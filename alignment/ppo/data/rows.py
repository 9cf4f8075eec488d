"""From a file's row to a :class:`RawSample`: the column layouts in use, told apart by their names.

A row is a prompt, alone or with what answers it. Null columns count as absent.

======================================================  ====================================================
the prompt                                              is
======================================================  ====================================================
``messages`` / ``conversations`` / ``conversation`` /   a conversation: messages (see messages.py), or texts
``dialogue`` / ``context`` (of messages)                of user and assistant by turns
``instruction`` with ``input`` or ``context``           both: after a space (Alpaca), an empty line (Dolly)
``prompt`` / ``question`` / ``query`` / ``problem`` /   text, or a conversation as above
``input`` / ``src`` / ``instruction``
======================================================  ====================================================

Beside it are read ``system`` / ``system_prompt``; ``history``, pairs of question and answer that come before a text
(the answers are trained like those of any conversation); ``tools`` / ``functions``, a list or JSON text of one.

======================================================  ====================================================
the answer                                              is
======================================================  ====================================================
``chosen rejected`` as texts, messages, or transcripts  a pair; whole conversations may repeat the prompt or
``\\n\\nHuman: ... Assistant: ...`` (HH)                come without one
``response_0 response_1 better_response_id`` (PKU,      a pair; those that tie are counted
and its safety labels), ``answer other_answer better``
(and RawSample's safety labels),
``response_1 response_2 preference_strength``,
``response1 response2 overall_preference`` (HelpSteer),
``human_ref_A human_ref_B labels history`` (SHP),
``response_j response_k``, ``src tgt response sort``,
``preferred_output non_preferred_output`` (OpenAI),
``conversation_a conversation_b winner`` (arena)
``completions`` / ``responses`` / ``answers`` /         a pair: the best and the worst; those between them
``candidates``: objects with a text and a rank or       are not read
score, or texts beside ``scores`` or ``ranks``
``output`` / ``response`` / ``completion`` /            an answer: text or messages; with ``label`` true or
``solution`` / ``answer`` / ``tgt``                     false (KTO), whether it is a good one
nothing of these                                        the assistant's turn that ends the conversation;
                                                        without one the row is a prompt
======================================================  ====================================================

A row without any prompt but with ``text`` is plain text for SFT, trained from end to end. All columns are kept for
Python rewards; the names of those that no sample was made of are kept in ``unread``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from alignment.errors import DataError
from alignment.ppo.data.base import RawSample
from alignment.ppo.data.messages import Message, from_turns, is_empty, kind_of, read_messages, read_tools, turns_of

_CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue")
_PROMPTS = ("prompt", "instruction", "question", "query", "problem", "input", "src")
_SYSTEMS = ("system", "system_prompt")
_TOOLS = ("tools", "functions")
_ANSWERS = ("answer", "output", "response", "completion", "solution", "tgt")
_LABELS = ("label", "kto_tag")
_RANKED = ("completions", "responses", "answers", "candidates")
_CHOSEN = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("preferred_output", "non_preferred_output"),
    ("response_j", "response_k"),
)
_STRENGTHS = (
    ("response_1", "response_2", "preference_strength"),
    ("response1", "response2", "overall_preference"),
)
# What RawSample calls safer, is_safe, is_other_safe.
_PKU_LABELS = ("safer_response_id", "is_response_0_safe", "is_response_1_safe")
_LABELS_OF_PAIRS = ("safer", "is_safe", "is_other_safe")
#: Columns that only :class:`~alignment.ppo.data.SafetyPreferenceDataset` reads.
SAFETY_COLUMNS = frozenset((*_PKU_LABELS, *_LABELS_OF_PAIRS))
_HH_TURN = re.compile(r"(?:^|\n\n)\s*(Human|Assistant):")

#: Columns that look like a part of the prompt. One that is not read is worth a warning, even where it reaches rewards.
PROMPT_LIKE = frozenset((*_CONVERSATIONS, *_PROMPTS, *_SYSTEMS, *_TOOLS, "history", "context", "documents", "passage"))

_NO_DIALOGUE = (
    "{0!r} and {1!r} together are no dialogue: {0!r} ends with the user's turn, {1!r} does not begin with the answer, "
    "nor with all of {0!r}"
)


class _Columns:
    """The columns of a row that are not null, and which of them nothing has read yet."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        if isinstance(row.get("input"), Mapping) and "messages" in row["input"]:  # OpenAI's pairs
            row = {name: value for name, value in row.items() if name != "input"} | dict(row["input"])
        self.row = {name: value for name, value in row.items() if value is not None}
        self.source = row
        self.left = {name: None for name, value in self.row.items() if not is_empty(value)}  # a set in order

    def has(self, *names: str) -> bool:
        return all(name in self.row for name in names)

    def first(self, names: Sequence[str]) -> str | None:
        return next((name for name in names if name in self.row), None)

    def take(self, name: str) -> Any:
        self.left.pop(name, None)
        return self.row.get(name)

    def text(self, name: str) -> str:
        self.left.pop(name, None)
        return text_field(self.source, name)

    def messages(self, name: str) -> list[Message]:
        """A column that holds a message, several, or texts that user and assistant say by turns."""
        value = self.take(name)
        if _are_texts(value):
            return from_turns(value)
        unread: set[str] = set()
        messages = read_messages([value] if isinstance(value, Mapping) else value, name, unread)
        self.left.update(dict.fromkeys(sorted(unread)))
        return messages


class _Question(NamedTuple):
    column: str
    messages: list[Message]
    has_history: bool = False


def sample_from_row(row: Mapping[str, Any]) -> RawSample:
    """Make a sample of a row by the tables above.

    Raises:
        DataError: no layout fits, or a column holds the wrong thing.
    """
    columns = _Columns(row)
    try:
        sample = _sample(columns)
    except DataError as err:
        # A prompt is enough for PPO, whatever else the row holds. Who needs the answer is told what is wrong with it.
        columns = _Columns(row)
        question = _question(columns)
        if question is None or isinstance(row.get("src"), list):  # of which a turn may be missing
            raise
        sample = _fields(columns, "input", question.messages) | RawSample(unusable=str(err))
    if (name := columns.first(_TOOLS)) and (tools := read_tools(columns.take(name), name)):
        sample["tools"] = tools
    return _with_rest(columns, sample, row)


def unread_prompt_columns(sample: Mapping[str, Any]) -> list[str]:
    """Return the columns that a sample was made without although they have the name and the form of a part of the
    prompt.
    """
    columns = sample.get("extra") or {}
    return [n for n in sample.get("unread") or () if n in PROMPT_LIKE and isinstance(columns.get(n), (str, list))]


def text_field(row: Mapping[str, Any], name: str) -> str:
    """Return a column that must be text. A whole number is text as it stands; of others the spelling is lost (0.50).

    Raises:
        DataError: it is missing or not text.
    """
    if name not in row:
        raise DataError(f"the column {name!r} is missing; the row has {', '.join(map(repr, row)) or 'no columns'}")
    value = row[name]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"the column {name!r} must be text, not {kind_of(value)}")
    return value


def paired_responses(row: Mapping[str, Any]) -> RawSample:
    """Make a pair of ``prompt``, ``response_0``, ``response_1``, and ``better_response_id``, the safety columns or all
    of them.
    """
    columns = _Columns(row)
    prompt = columns.messages("prompt") if isinstance(row.get("prompt"), list) else from_turns([columns.text("prompt")])
    return _with_rest(columns, _paired_responses(columns, prompt), row)


def instruction_row(row: Mapping[str, Any]) -> RawSample:
    """Make a sample of Alpaca's ``instruction``, ``input`` (may be empty or missing) and ``output``."""
    columns = _Columns(row)
    return _with_rest(columns, RawSample(input=_instruction(columns), answer=columns.text("output")), row)


def question_row(row: Mapping[str, Any]) -> RawSample:
    """Make a sample of ``question`` and ``answer``, both text."""
    columns = _Columns(row)
    return _with_rest(columns, RawSample(input=columns.text("question"), answer=columns.text("answer")), row)


def split_transcript(text: str) -> list[str]:
    """Split an HH transcript (``\\n\\nHuman: ...\\n\\nAssistant: ...``) into turns: user and assistant alternately.

    Two turns of the same speaker in a row, which the real files have, are joined by an empty line.

    Raises:
        DataError: it does not begin with ``Human:``.
    """
    pieces = _HH_TURN.split(text)
    if pieces[0].strip():
        raise DataError(
            "the transcript has text before its first 'Human:' (without a prompt column, 'chosen' and 'rejected' must "
            "be whole transcripts)"
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


def _sample(columns: _Columns) -> RawSample:
    for chosen, rejected in _CHOSEN:
        if columns.has(chosen) or columns.has(rejected):
            return _chosen_and_rejected(columns, chosen, rejected)
    if columns.has("conversation_a", "conversation_b", "winner"):
        return _arena(columns)
    if columns.has("src", "response", "sort"):
        return _sorted_responses(columns)
    if columns.has("human_ref_A", "human_ref_B"):
        prompt = from_turns([columns.text("history")])
        better = not _first_of_two(columns, "labels")  # 1 where A is the better one
        return _pair(columns, prompt, columns.text("human_ref_A"), columns.text("human_ref_B"), better)
    if columns.has("src", "tgt") and isinstance(columns.row["tgt"], (str, list)):
        return _src_and_tgt(columns)
    question = _question(columns)
    if question is None:
        return _without_prompt(columns)
    if columns.has("response_0") or columns.has("response_1", "better_response_id"):
        return _paired_responses(columns, question.messages)
    if columns.has("answer", "other_answer"):
        return _two_answers(columns, question.messages)
    for first, second, strength in _STRENGTHS:
        if columns.has(first, second, strength):
            better = _is_first_stronger(columns, strength)
            return _pair(columns, question.messages, columns.text(first), columns.text(second), better)
    return _ranked(columns, question.messages) or _answered(columns, question)


def _question(columns: _Columns) -> _Question | None:
    """The prompt of a row, or its whole conversation."""
    if (name := columns.first(_CONVERSATIONS)) is not None:
        return _Question(name, columns.messages(name))
    context = columns.row.get("context")
    if isinstance(context, list) and context and isinstance(context[0], Mapping):
        return _Question("context", columns.messages("context"))
    name = columns.first(_PROMPTS)
    if name is None:
        return None
    asked = columns.row[name]
    if isinstance(asked, list):
        for column in _ANSWERS if name != "src" else ():
            answers = columns.row.get(column)
            if _are_texts(asked) and _are_texts(answers) and len(asked) == len(answers):
                raise DataError(
                    f"the columns {name!r} and {column!r} are both lists of texts. Is this a table written column by "
                    "column? Write one object a line. Turns of a conversation go into `messages`, or into `src` and "
                    "`tgt`"
                )
        return _Question(name, columns.messages(name))
    text = _instruction(columns) if name == "instruction" else columns.text(name)
    if re.match(r"\s*Human:", text) and (text.startswith("\n\n") or text.rstrip().endswith("Assistant:")):
        return _Question(name, from_turns(split_transcript(re.sub(r"\s*Assistant:\s*$", "", text))))
    before = _history(columns)
    return _Question(name, from_turns([*before, text]), bool(before))


def _instruction(columns: _Columns) -> str:
    """``instruction`` and what it is about: Alpaca's ``input`` after a space, Dolly's ``context`` after an empty
    line.
    """
    instruction = columns.text("instruction")
    name = next((name for name in ("input", "context") if not is_empty(columns.row.get(name))), None)
    if name is None:
        return instruction
    return (" " if name == "input" else "\n\n").join(filter(None, (instruction, columns.text(name))))


def _history(columns: _Columns) -> list[str]:
    pairs = columns.take("history")
    if is_empty(pairs):
        return []
    if not isinstance(pairs, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise DataError(
            f"the column 'history' must be a list of [question, answer] pairs, not {kind_of(pairs)}; a conversation of "
            "messages goes into `messages`"
        )
    turns = [turn for pair in pairs for turn in pair]
    if not all(isinstance(turn, str) for turn in turns):
        raise DataError(f"the column 'history' must hold pairs of texts, not {kind_of(pairs)}")
    return turns


def _answered(columns: _Columns, question: _Question) -> RawSample:
    """A conversation, or a prompt with at most one answer."""
    prompt = question.messages
    if prompt[-1]["role"] == "assistant" and question.column in (*_CONVERSATIONS, "context"):
        return _fields(columns, "dialogue", prompt)
    # NuminaMath's `answer` is the bare result; what there is to learn is its `solution`.
    name = columns.first(("solution", *_ANSWERS) if question.column == "problem" else _ANSWERS)
    if name is None:
        return _fields(columns, "input", prompt)
    value = columns.take(name)
    answer = _plain_answer(columns.messages(name)) if _has_messages(value) else value
    if question.has_history and isinstance(answer, str):
        sample = _fields(columns, "dialogue", [*prompt, {"role": "assistant", "content": answer}])
    else:
        sample = _fields(columns, "input", prompt)
        sample["answer"] = answer
    label = columns.first(_LABELS)
    if label is not None and (
        isinstance(columns.row[label], bool) or (name == "completion" and columns.row[label] in (0, 1))
    ):
        sample["good"] = bool(columns.take(label))
    return sample


def _without_prompt(columns: _Columns) -> RawSample:
    if isinstance(columns.row.get("text"), str):
        return RawSample(text=columns.text("text"))
    nulls = [name for name in columns.source if name not in columns.row and name in (*_CONVERSATIONS, *_PROMPTS)]
    if nulls:
        raise DataError(f"the column {' and '.join(map(repr, nulls))} is null, and nothing else could be the prompt")
    raise DataError(
        f"no known layout has the columns {', '.join(map(repr, columns.row)) or '(none)'}; known are for example "
        "prompt+response, instruction+output, messages, prompt+chosen+rejected, or prompt alone"
    )


def _chosen_and_rejected(columns: _Columns, one: str, other: str) -> RawSample:
    for name in (one, other):
        if not columns.has(name):
            what = "null" if name in columns.source else "missing"
            raise DataError(f"the column {name!r} is {what}; a pair needs both {one!r} and {other!r}")
    if not isinstance(columns.row[one], (list, Mapping)):
        return _pair_of_texts(columns, one, other)
    both = []
    for name in (one, other):
        if not isinstance(columns.row[name], (list, Mapping)):
            raise DataError(f"the column {name!r} must be a list, not {kind_of(columns.row[name])}")
        both.append(columns.messages(name))
    if all(messages[0]["role"] == "assistant" for messages in both):
        question = _question(columns)
        if question is None:
            raise DataError(f"{one!r} begins with the assistant's answer, and there is no prompt column beside it")
        both = [question.messages + messages for messages in both]
    else:
        # Whole conversations. A prompt beside them is their beginning, or it is the text of a turn (UltraFeedback).
        name = next((name for name in (*_PROMPTS, *_CONVERSATIONS) if _has_messages(columns.row.get(name))), None)
        if name is not None and columns.row[name] not in (columns.row[one], columns.row[other]):
            prompt = columns.messages(name)
            for number, messages in enumerate(both):
                if messages[: len(prompt)] == prompt:
                    continue
                if prompt[-1]["role"] != "assistant" or messages[0]["role"] == "system":
                    raise DataError(_NO_DIALOGUE.format(name, (one, other)[number]))
                both[number] = prompt + messages
    for name, messages in zip((one, other), both, strict=True):
        if messages[-1]["role"] != "assistant":
            raise DataError(f"{name!r} must end with the assistant's answer, but ends with the user")
    _check_same_prompt(both[0][:-1], both[1][:-1], one, other)
    return _pair(columns, both[0][:-1], _plain_answer(both[0][-1:]), _plain_answer(both[1][-1:]), True)


def _arena(columns: _Columns) -> RawSample:
    """lmsys's battles: two conversations, and who won (``model_a``, ``model_b``, else nobody)."""
    pair = _chosen_and_rejected(columns, "conversation_a", "conversation_b")
    winner = columns.text("winner")
    pair["better"] = winner == "model_a" if winner in ("model_a", "model_b") else None
    return pair


def _pair_of_texts(columns: _Columns, one: str, other: str) -> RawSample:
    first, second = columns.text(one), columns.text(other)
    name = columns.first((*_CONVERSATIONS, *_PROMPTS))
    prompt = columns.row.get(name) if name else None
    repeats = isinstance(prompt, str) and _HH_TURN.match(prompt) and first.startswith(prompt)
    if prompt is not None and not (repeats and second.startswith(prompt)):
        question = _question(columns)
        return _pair(columns, question.messages if question else [], first, second, True)
    if name is not None:
        columns.take(name)
    turns = [split_transcript(text) for text in (first, second)]
    for which, own in zip((one, other), turns, strict=True):
        if len(own) % 2:
            raise DataError(f"{which!r} must end with the assistant's answer, but ends with the user")
    _check_same_prompt(from_turns(turns[0][:-1]), from_turns(turns[1][:-1]), one, other)
    return _pair(columns, from_turns(turns[0][:-1]), turns[0][-1], turns[1][-1], True)


def _check_same_prompt(one: list[Message], other: list[Message], *names: str) -> None:
    if one == other:
        return
    first, second = names
    systems = [messages[0] for messages in (one, other) if messages[:1] and messages[0]["role"] == "system"]
    if len(systems) == 1 or (systems and systems[0] != systems[1]):
        raise DataError(
            f"{first!r} and {second!r} have different system prompts, so they do not answer the same prompt"
        )
    raise DataError(f"{first!r} and {second!r} differ before their last answers, so they do not answer the same prompt")


def _paired_responses(columns: _Columns, prompt: list[Message]) -> RawSample:
    sample = _fields(columns, "input", prompt)
    sample |= RawSample(answer=columns.text("response_0"), other_answer=columns.text("response_1"))
    if columns.has("better_response_id") or not columns.has("safer_response_id"):
        sample["better"] = _first_of_two(columns, "better_response_id")
    sample |= _safety_labels(columns, _PKU_LABELS)
    if (number := sample.get("safer")) is not None:
        is_number = number in (0, 1) and not isinstance(number, bool)
        sample["safer"] = number == 0 if is_number else f"safer_response_id {number!r}"  # type: ignore[typeddict-item]
    return sample


def _two_answers(columns: _Columns, prompt: list[Message]) -> RawSample:
    """A pair under RawSample's own names."""
    sample = _fields(columns, "input", prompt)
    for name in ("answer", "other_answer"):
        is_text = not _has_messages(columns.row[name])
        sample[name] = columns.text(name) if is_text else _plain_answer(columns.messages(name))  # type: ignore[literal-required]
    if "better" in columns.source:
        sample["better"] = columns.take("better")  # null: neither is
    if "safer" in columns.source:
        sample["safer"] = None
    return sample | _safety_labels(columns, _LABELS_OF_PAIRS)


def _safety_labels(columns: _Columns, names: Sequence[str]) -> RawSample:
    """The labels as they stand, in the order of :data:`_LABELS_OF_PAIRS`.

    They stay among the columns that are not read, since of the stages only cost models learn from them. What they hold
    is checked there: a wrong label must not cost other stages the row.
    """
    labels = zip(names, _LABELS_OF_PAIRS, strict=True)
    return RawSample(**{key: columns.row[name] for name, key in labels if columns.has(name)})  # type: ignore[typeddict-item]


def _sorted_responses(columns: _Columns) -> RawSample:
    """paddlenlp's ``src`` (turns), ``tgt`` (earlier answers), ``response`` (two) and ``sort`` (two numbers, the larger
    is better).
    """
    questions = _texts(columns, "src")
    answers = _texts(columns, "tgt") if columns.row.get("tgt") else []
    responses, sort = _texts(columns, "response"), columns.take("sort")
    if len(questions) != len(answers) + 1:
        raise DataError(f"'src' has {len(questions)} turns and 'tgt' {len(answers)}; 'src' must have one more")
    if len(responses) != 2 or not _are_numbers(sort, 2):
        raise DataError("'response' must hold two texts and 'sort' two numbers")
    if sort[0] == sort[1]:
        raise DataError(f"'sort' must tell the answers apart (the larger number is the better answer), not {sort}")
    turns = [turn for pair in zip(questions, answers, strict=False) for turn in pair] + [questions[-1]]
    return _pair(columns, from_turns(turns), responses[0], responses[1], sort[0] > sort[1])


def _src_and_tgt(columns: _Columns) -> RawSample:
    """paddlenlp's ``src`` (the user's turns) and ``tgt`` (the answers; one fewer makes a prompt)."""
    questions, answers = _texts(columns, "src"), _texts(columns, "tgt")
    turns = [turn for pair in zip(questions, answers, strict=False) for turn in pair]
    if len(questions) == len(answers) == 1:
        return _fields(columns, "input", from_turns(questions)) | RawSample(answer=answers[0])
    if len(questions) == len(answers):
        return _fields(columns, "dialogue", from_turns(turns))
    if len(questions) == len(answers) + 1:
        return _fields(columns, "input", from_turns([*turns, questions[-1]]))
    raise DataError(f"'src' has {len(questions)} turns and 'tgt' {len(answers)}; they must be as many")


def _ranked(columns: _Columns, prompt: list[Message]) -> RawSample | None:
    """The best and the worst of several answers; None if there are no answers, or nothing that ranks them."""
    name = columns.first(_RANKED)
    answers = columns.row.get(name) if name else None
    if not isinstance(answers, list) or len(answers) < 2:
        return None
    if all(isinstance(answer, str) for answer in answers):
        texts = answers
        ranking = columns.first(("scores", "ranks"))
        ranks = columns.row.get(ranking) if ranking else None
    elif all(isinstance(answer, Mapping) for answer in answers):
        texts = [
            next((a[key] for key in ("text", *_ANSWERS, "content") if isinstance(a.get(key), str)), None)
            for a in answers
        ]
        ranking = next((key for key in ("rank", "overall_score", "score", "pm_score") if key in answers[0]), None)
        ranks = [answer.get(ranking) for answer in answers]
    else:
        return None
    if ranking is None or not _are_numbers(ranks, len(answers)) or None in texts:
        return None
    columns.take(name)
    columns.take(ranking)
    sign = -1 if ranking in ("rank", "ranks") else 1  # rank 1 is the best answer, score 1 the worst
    order = sorted(range(len(answers)), key=lambda i: -sign * ranks[i])
    if len(answers) > 2:
        columns.left[f"{name} (all but the best and the worst)"] = None
    best, worst = order[0], order[-1]
    return _pair(columns, prompt, texts[best], texts[worst], True if ranks[best] != ranks[worst] else None)


def _pair(columns: _Columns, prompt: list[Message], answer: Any, other: Any, better: bool | None) -> RawSample:
    return _fields(columns, "input", prompt) | RawSample(answer=answer, other_answer=other, better=better)


def _fields(columns: _Columns, key: str, messages: list[Message]) -> RawSample:
    """Messages, and a ``system`` column before them, as a sample: as plain turns where they are no more than that."""
    name = columns.first(_SYSTEMS)
    if name is not None and columns.text(name).strip():
        system = {"role": "system", "content": columns.text(name)}
        if messages[0]["role"] != "system":
            messages = [system, *messages]
        elif messages[0]["content"].strip() != system["content"].strip():
            raise DataError(f"the column {name!r} and the first message are different system prompts")
    plain = turns_of(messages)
    if plain is None:
        return RawSample(**{key: messages})  # type: ignore[typeddict-item]
    system_text, turns = plain
    sample = RawSample(**{key: turns[0] if key == "input" and len(turns) == 1 else turns})  # type: ignore[typeddict-item]
    if system_text is not None:
        sample["system"] = system_text
    return sample


def _with_rest(columns: _Columns, sample: RawSample, row: Mapping[str, Any]) -> RawSample:
    """Add the row itself, and the names of columns that are not read and do not repeat what was read."""
    told = [value for name, value in columns.row.items() if name not in columns.left]
    told += [text for value in told if isinstance(value, list) for text in map(_content, value)]
    repeats = {name for name in (*PROMPT_LIKE, *_ANSWERS) if columns.row.get(name) in told}
    if unread := [name for name in columns.left if name not in repeats]:
        sample["unread"] = unread
    sample["extra"] = dict(row)
    return sample


def _content(message: object) -> object:
    if isinstance(message, Mapping):
        return next((message[key] for key in ("content", "value", "text") if message.get(key)), None)
    return message


def _has_messages(value: object) -> bool:
    """Whether a value is a message or a list of messages."""
    if isinstance(value, Mapping):
        value = [value]
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, Mapping) and not {"role", "from", "speaker"}.isdisjoint(one) for one in value)
    )


def _plain_answer(messages: list[Message]) -> Any:
    """An answer's message as its text, if that is all there is to it."""
    is_text = len(messages) == 1 and set(messages[0]) == {"role", "content"} and messages[0]["role"] == "assistant"
    return messages[0]["content"] if is_text else messages


def _texts(columns: _Columns, name: str) -> list[str]:
    value = columns.take(name)
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"the column {name!r} must be text or a non-empty list of texts, not {kind_of(value)}")
    return list(texts)


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _are_numbers(value: object, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(isinstance(one, (int, float)) for one in value)


def _is_first_stronger(columns: _Columns, name: str) -> bool | None:
    """HelpSteer's strength of a preference: below 0 for the first answer, above 0 for the second, 0 for neither."""
    value = columns.take(name)
    if not isinstance(value, (int, float)):
        raise DataError(f"the column {name!r} must be a number, not {kind_of(value)}")
    return None if value == 0 else value < 0


def _first_of_two(columns: _Columns, name: str) -> bool:
    columns.take(name)
    return _is_first(columns.row, name)


def _is_first(row: Mapping[str, Any], column: str) -> bool:
    value = row.get(column)
    if isinstance(value, bool) or value not in (0, 1):
        raise DataError(f"the column {column!r} must be 0 or 1, not {value!r}")
    return value == 0
