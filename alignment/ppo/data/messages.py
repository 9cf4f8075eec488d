"""Messages (``[{"role": ..., "content": ...}, ...]``) in the spellings that files use, read into one form.

The one form is OpenAI's: dicts with ``role`` (system, user, assistant, tool) and ``content`` (text), and where the file
has them ``reasoning_content``, ``tool_calls``, ``tool_call_id``, ``name`` and ``weight`` (0: the turn is context and is
not trained).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from alignment.errors import DataError

Message = dict[str, Any]

ROLES = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "developer": "system",  # OpenAI's newer word for it
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",  # Llama 3's word for it
    "function_call": "assistant",  # ShareGPT: the content is a call, or a list of them, as JSON text
}
_ROLE_KEYS = ("role", "from", "speaker")
_CONTENT_KEYS = ("content", "value", "text")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_WEIGHT_KEYS = ("weight", "train", "train_on_turn", "loss_mask", "loss")


def read_messages(value: object, column: str, unread: set[str] | None = None) -> list[Message]:
    """Read a list of messages; several turns of one speaker in a row are joined by an empty line.

    Args:
        value: what the file has. Keys that are null count as absent (tables have every key in every message).
        column: its name, for messages.
        unread: collects the keys that have no meaning here, as ``column.key``.

    Raises:
        DataError: a message is malformed, a role unknown, a part no text, or the system prompt not first. The messages
            are numbered as in the file.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"the column {column!r} must be a non-empty list of messages, not {kind_of(value)}")
    messages: list[Message] = []
    for number, raw in enumerate(value, 1):
        message = _read_message(raw, f"{column}: message {number}", column, set() if unread is None else unread)
        former = messages[-1] if messages else None
        if former is not None and _is_continued(former, message):
            if former.get("weight", 1) != message.get("weight", 1):
                raise DataError(
                    f"{column}: message {number} goes on with the assistant's turn, of which one part is to be trained "
                    "and another is not; give both the same weight"
                )
            former["content"] = "\n\n".join(filter(None, (former["content"], message["content"])))
            former.update((key, message[key]) for key in message if key not in former)
        elif message["role"] == "system" and former is not None:
            raise DataError(f"{column}: message {number} is a system prompt; it must be the first message")
        else:
            messages.append(message)
    if messages[-1]["role"] == "system":
        raise DataError(f"{column}: there is no turn beside the system prompt")
    return messages


def turns_of(messages: Sequence[Message]) -> tuple[str | None, list[str]] | None:
    """Return (system prompt or None, turns) of messages that are user and assistant by turns, user first, and nothing
    but text; None of all others.
    """
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    rest = messages[0 if system is None else 1 :]
    roles = ("user", "assistant")
    if any(set(message) != {"role", "content"} or message["role"] != roles[i % 2] for i, message in enumerate(rest)):
        return None
    return system, [message["content"] for message in rest]


def from_turns(turns: Sequence[str], system: str | None = None) -> list[Message]:
    """The inverse of :func:`turns_of`."""
    head = [{"role": "system", "content": system}] if system is not None and system.strip() else []
    return head + [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def read_tools(value: object, column: str = "tools") -> list[Any]:
    """Read tool definitions: a list of objects, or the same as JSON text.

    Raises:
        DataError: it is neither.
    """
    tools = value
    if isinstance(value, str):
        try:
            tools = json.loads(value) if value.strip() else []
        except ValueError as err:
            raise DataError(f"the column {column!r} must be a list of tools or one as JSON text ({err})") from None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"the column {column!r} must be a list of tools (objects), not {kind_of(value)}")
    if column == "functions":  # OpenAI's older form
        tools = [{"type": "function", "function": tool} for tool in tools]
    return tools


def kind_of(value: object) -> str:
    """Show a wrong value: its type and its beginning."""
    return "null" if value is None else f"{type(value).__name__} {value!r:.60}"


def _read_message(raw: object, where: str, column: str, unread: set[str]) -> Message:
    if not isinstance(raw, Mapping):
        raise DataError(f"{where} must be an object with role and content, not {kind_of(raw)}")
    left = {key: value for key, value in raw.items() if value is not None}
    role = _read_role(left, where)
    calls = _read_calls(left, where) if role == "assistant" else []
    reasoning = _take(left, _REASONING_KEYS) if role == "assistant" else None
    content = _take(left, _CONTENT_KEYS)
    if content is None and (calls or reasoning):
        content = ""
    message: Message = {"role": role, "content": _read_content(content, where)}
    if reasoning is not None:
        if not isinstance(reasoning, str):
            raise DataError(f"{where}: the reasoning must be text, not {kind_of(reasoning)}")
        if reasoning.strip():
            message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    for key in ("name", "tool_call_id") if role == "tool" else ():
        if key in left:
            message[key] = left.pop(key)
    # Only an assistant's turn can be trained. "weight": 0 of another turn says what is so anyway.
    weighed = [key for key in _WEIGHT_KEYS if key in left]
    for key in weighed:
        if left[key] not in (0, 1):
            raise DataError(f"{where}: {key!r} must be 0 (not trained) or 1, not {left[key]!r}")
        if role == "assistant" and left.pop(key) == 0:
            message["weight"] = 0
        elif left.get(key) == 0:
            del left[key]
    unread.update(f"{column}.{key}" for key, value in left.items() if not is_empty(value))
    return message


def is_empty(value: object) -> bool:
    """Whether a column or key holds nothing that could be lost: null, blank text, an empty list or object."""
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], {}, ())


def _read_role(left: dict[str, Any], where: str) -> str:
    keys = ", ".join(map(repr, left)) or "none"
    given = _take(left, _ROLE_KEYS)
    if given is None:
        raise DataError(f"{where} has no role; its keys are {keys}, and 'role' and 'content' are needed")
    role = ROLES.get(given.lower()) if isinstance(given, str) else None
    if role is None:
        raise DataError(f"{where} has the role {given!r}; known are {', '.join(ROLES)}")
    if given == "function_call":
        content = _take(left, _CONTENT_KEYS)
        try:
            calls = json.loads(content)
        except (TypeError, ValueError):
            raise DataError(f"{where}: a function_call must be JSON text, not {kind_of(content)}") from None
        calls = calls if isinstance(calls, list) else [calls]
        left["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return role


def _read_content(content: object, where: str) -> str:
    if not isinstance(content, list):
        if not isinstance(content, str):
            raise DataError(f"{where}: the content must be text, not {kind_of(content)}")
        return content
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise DataError(f"{where} has a part of type {kind!r}; only text parts can be read: {kind_of(part)}")
        texts.append(text)
    return "".join(texts)


def _read_calls(left: dict[str, Any], where: str) -> list[dict[str, Any]]:
    calls = left.pop("tool_calls", None) or []
    if left.get("function_call"):  # OpenAI's older form
        calls = [*calls, {"type": "function", "function": left.pop("function_call")}]
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise DataError(f"{where}: 'tool_calls' must be a list of objects, not {kind_of(calls)}")
    # Tables have the keys of every call in each; templates ask what is there.
    return [{key: value for key, value in call.items() if value is not None} for call in calls]


def _take(left: dict[str, Any], keys: Collection[str]) -> Any:
    for key in keys:
        if key in left:
            return left.pop(key)
    return None


def _is_continued(former: Message, message: Message) -> bool:
    """Whether two messages are one turn. Each result of a tool and each call is a message of its own."""
    return (
        former["role"] == message["role"] != "tool"
        and "tool_calls" not in former
        and "reasoning_content" not in message
    )
