"""Conversations in a Jinja chat template: its text, and where in that text the assistant speaks.

A chat template only gives text. Which part of it the assistant said, and is to learn, is found so:

- ``{% generation %}`` blocks, where the template has them, say it outright.
- Else the last answer is what the finished conversation has beyond its prompt (the text with
  ``add_generation_prompt``). An earlier answer is what changes in the text when another text stands in its place.

What is found must hold the answer as the row gave it. Some templates leave out what came before ``</think>``: there
the reasoning is written as it was given, between the template's own prompt and what it writes of the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from alignment.errors import DataError
from alignment.log import say_once
from alignment.ppo.data.chat import MARKS, compile_template

#: A message in OpenAI's form: ``role`` (system, developer, user, assistant, tool) and ``content``, and where they apply
#: ``reasoning_content``, ``tool_calls``, ``tool_call_id``, ``name``, and ``weight`` (0: not trained).
Message = Mapping[str, Any]

THINK_BEGIN, THINK_END = "<think>", "</think>"
_STAND_IN = "\ufdd0stand-in\ufdd1"  # noncharacters: no text may hold them
_PASSED_ON = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")


@dataclass(frozen=True)
class Segment:
    """A piece of a conversation's text that is tokenised by itself."""

    text: str
    is_answer: bool = False
    """Whether the assistant says it and training learns it."""
    add_eos: bool = False
    """Whether the end-of-sequence token follows, unless the text already ends with it."""


def is_trained(message: Message) -> bool:
    """Whether an assistant's message is to be learnt."""
    return message.get("weight", 1) != 0


def split_reasoning(message: Message) -> tuple[str, str]:
    """Return an assistant's reasoning, tags included ("" if there is none), and the rest of its text."""
    content = message.get("content") or ""
    before, tag, rest = content.rpartition(THINK_END)
    inline = before + tag
    apart = message.get("reasoning_content")
    if apart and apart.strip():
        return f"{THINK_BEGIN}\n{apart.strip()}\n{THINK_END}\n\n{inline}", rest
    return inline, rest


@dataclass(frozen=True)
class ChatRenderer:
    """A Jinja source with what it is rendered with.

    Attributes:
        source: the template.
        eos_token, bos_token: the tokenizer's, "" where it has none.
        date: the run's day, ``YYYY-MM-DD``: what ``strftime_now`` tells the template.
        enable_thinking: for prompts, and for answers without reasoning.
        name: for messages.
    """

    source: str
    eos_token: str = ""
    bos_token: str = ""
    date: str = ""
    enable_thinking: bool = False
    name: str = "Jinja"

    # ---------------------------------------------------------------- text

    def render(
        self, messages: Sequence[Message], *, prompt: bool, tools: Sequence[Any] | None = None, thinking: bool = False
    ) -> str:
        """Return the template's text, without the marks of ``{% generation %}``.

        Raises:
            DataError: the template fails on it.
        """
        return self._render(messages, prompt, tools, thinking).replace(MARKS[0], "").replace(MARKS[1], "")

    def _render(self, messages: Sequence[Message], prompt: bool, tools: Sequence[Any] | None, thinking: bool) -> str:
        import datetime

        import jinja2

        today = datetime.date.fromisoformat(self.date) if self.date else datetime.date.today()
        try:
            return compile_template(self.source).render(
                messages=[_passed_on(message, self.source) for message in messages],
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=prompt,
                enable_thinking=thinking,
                eos_token=self.eos_token,
                bos_token=self.bos_token,
                strftime_now=today.strftime,
            )
        except jinja2.TemplateError as err:
            raise DataError(f"the prompt template ({self.name}) cannot be rendered: {err}") from err
        except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError, OverflowError) as err:
            raise DataError(
                f"the prompt template ({self.name}) cannot be rendered: {type(err).__name__}: {err}"
            ) from err

    # ---------------------------------------------------------------- segments

    def segments(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, thinking: bool | None = None
    ) -> list[Segment]:
        """Write a conversation as segments; see :meth:`PromptTemplate.format_messages`.

        Raises:
            DataError: the template fails, leaves out a part of the conversation, or rewrites an answer to be learnt.
        """
        if thinking is None:
            reasons = any(m["role"] == "assistant" and is_trained(m) and split_reasoning(m)[0] for m in messages)
            has_answer = messages[-1]["role"] == "assistant"
            thinking = self.enable_thinking or (has_answer and reasons)
        find = self._marked if self.marks_answers else self._found
        text, spans = find(messages, tools, thinking)
        segments: list[Segment] = []
        at = 0
        for index, start, end in spans:
            segments.append(Segment(text[at:start]))
            is_last = index == len(messages) - 1
            segments.append(Segment(text[start:end], is_answer=is_trained(messages[index]), add_eos=is_last))
            at = end
        if messages[-1]["role"] != "assistant":
            segments.append(Segment(text[at:]))
        return segments

    @property
    def marks_answers(self) -> bool:
        """Whether the template says by ``{% generation %}`` what the assistant says."""
        return any(f"{{%{dash} generation" in self.source for dash in ("", "-", "+"))

    def _marked(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, thinking: bool
    ) -> tuple[str, list[tuple[int, int, int]]]:
        """The text, and (message, start, end) of each answer, by the template's own marks."""
        is_prompt = messages[-1]["role"] != "assistant"
        pieces = self._render(messages, is_prompt, tools, thinking).split(MARKS[0])
        text, ranges = pieces[0], []
        for piece in pieces[1:]:
            answer, _, after = piece.partition(MARKS[1])
            ranges.append((len(text), len(text) + len(answer)))
            text += answer + after
        self._check_context(text, messages, tools)
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if len(ranges) != len(answers):
            raise DataError(
                f"the prompt template ({self.name}) marks {len(ranges)} answers by {{% generation %}}, but the "
                f"conversation has {len(answers)}"
            )
        spans = []
        for index, (start, end) in zip(answers, ranges, strict=True):
            if self.eos_token and text.startswith(self.eos_token, end):  # else the model would never learn to stop
                end += len(self.eos_token)
            if index == len(messages) - 1:
                # What the prompt of a generation gives is not for the model to say.
                prompt = self.render(messages[:index], prompt=True, tools=tools, thinking=thinking)
                start = max(start, len(prompt)) if text.startswith(prompt) and len(prompt) <= end else start
            self._check_whole(text[start:end], messages[index])
            spans.append((index, start, end))
        return text, spans

    def _found(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, thinking: bool
    ) -> tuple[str, list[tuple[int, int, int]]]:
        """The text, and (message, start, end) of each answer, by comparing renderings."""
        has_answer = messages[-1]["role"] == "assistant"
        before = messages[:-1] if has_answer else messages
        prompt = self.render(before, prompt=True, tools=tools, thinking=thinking)
        self._check_context(prompt, before, tools)
        spans = []
        for index, message in enumerate(before):
            if message["role"] != "assistant":
                continue
            try:
                spans.append((index, *self._earlier(prompt, before, index, tools, thinking)))
            except DataError:
                if has_answer and is_trained(message):
                    raise
                # Context that the template shortens is what the model will read in use, too.
        if not has_answer:
            return prompt, spans
        answer = self._last(prompt, messages, tools, thinking)
        return prompt + answer, [*spans, (len(messages) - 1, len(prompt), len(prompt) + len(answer))]

    def _earlier(
        self, prompt: str, messages: Sequence[Message], index: int, tools: Sequence[Any] | None, thinking: bool
    ) -> tuple[int, int]:
        """Where an earlier answer stands in the prompt."""
        message = messages[index]
        other = [*messages[:index], {"role": "assistant", "content": _STAND_IN}, *messages[index + 1 :]]
        before, found, after = self.render(other, prompt=True, tools=tools, thinking=thinking).partition(_STAND_IN)
        shape = _shape(self, thinking)
        before = before.removesuffix(shape.lead)  # a turn of calls may have none
        start, end = len(before), len(prompt) - len(after)
        if not found or not prompt.startswith(before) or not prompt.endswith(after) or start > end:
            raise DataError(
                f"message {index + 1}: the chat template rewrites the conversation around this answer, so its tokens "
                "cannot be told apart; give it weight 0, or write one row per answer"
            )
        self._check_whole(prompt[start:end], message, number=index + 1)
        if after.startswith(shape.end):
            end += len(shape.end)
        return start, end

    def _last(self, prompt: str, messages: Sequence[Message], tools: Sequence[Any] | None, thinking: bool) -> str:
        """What the last answer adds to its prompt, its end included."""
        message = messages[-1]
        full = self.render(messages, prompt=False, tools=tools, thinking=thinking)
        shape = _shape(self, thinking)
        if full.startswith(prompt):
            answer = shape.without_tail(full[len(prompt) :])
            if _is_whole(answer, message):
                return answer
        # The template leaves the reasoning out, or its prompt holds more than its finished turn does.
        reasoning, rest = split_reasoning(message)
        plain = {**{key: value for key, value in message.items() if key != "reasoning_content"}, "content": rest}
        stand_in = {"role": "assistant", "content": _STAND_IN}
        head = self.render([*messages[:-1], stand_in], prompt=False, tools=tools, thinking=thinking)
        head = head.partition(_STAND_IN)[0]
        full = self.render([*messages[:-1], plain], prompt=False, tools=tools, thinking=thinking)
        if not full.startswith(head):
            raise DataError(
                f"the prompt template ({self.name}) writes this answer otherwise than others, so that it cannot be "
                "told what of it is to be learnt; use another template"
            )
        answer = shape.without_tail(full[len(head) :])
        self._check_whole(answer, plain)
        lead = head[len(prompt) :] if head.startswith(prompt) else shape.lead
        is_open = prompt.rstrip().endswith(THINK_BEGIN)
        if is_open and not reasoning:
            reasoning = f"\n{THINK_END}\n\n"
            say_once(
                f"the prompt template ({self.name}) opens {THINK_BEGIN} for every answer; where a row has no "
                f"reasoning, {THINK_END} is written before its answer"
            )
        elif is_open:
            reasoning = reasoning.lstrip().removeprefix(THINK_BEGIN)
            if prompt.endswith("\n"):
                reasoning = reasoning.removeprefix("\n")
        if reasoning and not is_open:
            say_once(
                f"the prompt template ({self.name}) leaves out what stands before {THINK_END}; the reasoning of "
                "answers to be learnt is written as the rows have it"
            )
        return (lead if lead.isspace() else "") + reasoning + answer

    # ---------------------------------------------------------------- checks

    def _check_whole(self, text: str, message: Message, number: int | None = None) -> None:
        if _is_whole(text, message):
            return
        where = "" if number is None else f"message {number}: "
        reasoning, _ = split_reasoning(message)
        if number is not None and reasoning and _bare(reasoning) not in _bare(text):
            raise DataError(
                f"{where}the chat template drops the reasoning of earlier answers, so this one cannot be learnt as the "
                "row has it; give it weight 0, or write one row per answer"
            )
        what = "the tool calls or the text" if message.get("tool_calls") else "a part"
        raise DataError(f"{where}the prompt template ({self.name}) leaves out {what} of the assistant's answer")

    def _check_context(self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None) -> None:
        """Refuse a template that leaves out what the user, the system or a tool said, or the tools."""
        bare = ""
        for number, message in enumerate(messages, 1):
            content = message.get("content") or ""
            if message["role"] == "assistant" or content.strip() in text:
                continue
            bare = bare or _bare(text)
            quoted = json.dumps(content, ensure_ascii=False)[1:-1]
            if _bare(content) not in bare and _bare(quoted) not in bare:
                raise DataError(
                    f"message {number}: the prompt template ({self.name}) leaves out the text of the role "
                    f"{message['role']!r}"
                )
        for tool in tools or ():
            name = _tool_name(tool)
            if name and name not in text:
                raise DataError(
                    f"the prompt template ({self.name}) has no place for tools: it leaves out the tool {name!r}"
                )

    def check(self) -> None:
        """Refuse a source that leaves out the user's text or has no header for the answer to follow.

        Raises:
            DataError: with what is wrong.
        """
        user, answer = "What is this?", "An answer."
        prompt = self.render([{"role": "user", "content": user}], prompt=True, thinking=self.enable_thinking)
        if user not in prompt:
            raise DataError(
                f"the prompt template ({self.name}) leaves out the user's text; it must write message['content'] of "
                "every message in `messages`"
            )
        turn = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        full = self.render(turn, prompt=False, thinking=self.enable_thinking)
        if answer not in full:
            raise DataError(f"the prompt template ({self.name}) leaves out the assistant's answer")
        lead = full[len(prompt) :].partition(answer)[0] if full.startswith(prompt) else ""
        if THINK_BEGIN not in lead and THINK_END not in lead and lead.strip():
            raise DataError(
                f"the prompt template ({self.name}) writes {lead!r} before an answer but not at the end of a prompt; "
                "end it with {% if add_generation_prompt %}...{% endif %} around that text"
            )


@dataclass(frozen=True)
class _Shape:
    """What a template writes around an answer.

    Attributes:
        lead: between the prompt and the answer (a space, say).
        tail: all after the last answer.
        end: of that, what belongs to the answer: its end token.
    """

    lead: str
    tail: str
    end: str

    def without_tail(self, answer: str) -> str:
        """An answer as rendered -> as learnt: its end token stays, white space and headers behind it go."""
        if self.tail and answer.endswith(self.tail):
            return answer[: len(answer) - len(self.tail)] + self.end
        return answer.rstrip()


@lru_cache(maxsize=64)
def _shape(renderer: ChatRenderer, thinking: bool) -> _Shape:
    user = {"role": "user", "content": "What is this?"}
    turn = [user, {"role": "assistant", "content": _STAND_IN}]
    prompt = renderer.render([user], prompt=True, thinking=thinking)
    full = renderer.render(turn, prompt=False, thinking=thinking)
    head, _, tail = full.partition(_STAND_IN)
    lead = head[len(prompt) :] if head.startswith(prompt) else ""
    eos = renderer.eos_token
    if eos and eos in tail:
        return _Shape(lead, tail, tail[: tail.index(eos) + len(eos)])
    try:
        going_on = renderer.render([*turn, user], prompt=True, thinking=thinking).partition(_STAND_IN)[2]
    except DataError:  # a template for one turn
        going_on = tail
    # What does not follow an answer that goes on ends no turn: some templates close with a header for the next one.
    end = tail.rstrip() if going_on.startswith(tail.rstrip()) else ""
    return _Shape(lead, tail, end)


def _passed_on(message: Message, source: str) -> dict[str, Any]:
    """A message as templates expect it: no keys without a value, arguments of calls as objects."""
    passed = {key: message[key] for key in _PASSED_ON if message.get(key) or key in ("role", "content")}
    passed["content"] = passed.get("content") or ""
    if passed["role"] == "developer" and "developer" not in source:
        passed["role"] = "system"
    if "tool_calls" in passed:
        passed["tool_calls"] = [_with_object(call) for call in passed["tool_calls"]]
    return passed


def _with_object(call: Any) -> Any:
    """OpenAI writes a call's arguments as JSON text, chat templates expect them as an object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _tool_name(tool: Any) -> str:
    described = tool.get("function", tool) if isinstance(tool, Mapping) else None
    return str(described.get("name") or "") if isinstance(described, Mapping) else ""


def _is_whole(text: str, message: Message) -> bool:
    """Whether a rendered answer holds all that the message says, but for white space."""
    said = [message.get("content") or "", message.get("reasoning_content") or ""]
    said += [_tool_name(call) for call in message.get("tool_calls") or ()]
    bare = _bare(text)
    return all(_bare(part) in bare for part in said)


def _bare(text: str) -> str:
    return "".join(text.split())
