"""Where values come from: a JSON or YAML file, then the command line.

Nothing here knows any key's meaning; it yields ``Given(key, value, where)`` in the order in which they apply.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from json.decoder import scanstring
from pathlib import Path
from typing import Any

from alignment.arguments.spec import FALSE_WORDS, TRUE_WORDS
from alignment.errors import ArgumentsError

COMMAND_LINE = "command line"
YAML_ENDINGS = (".yaml", ".yml")
ENDINGS = (".json", *YAML_ENDINGS)


@dataclass(frozen=True)
class Given:
    """A key and value as the user wrote them.

    Attributes:
        key: as written, but with dashes turned into underscores on the command line.
        value: a JSON value, or a string from the command line.
        where: ``"ppo.json, line 12"`` or ``"command line"``.
        is_text: it comes from the command line.
    """

    key: str
    value: Any
    where: str
    is_text: bool = False


def read_file(path: str) -> list[Given]:
    """Read a file of arguments: YAML if it is called so, else JSON.

    Raises:
        ArgumentsError: the file is missing, unreadable, not JSON or YAML, no object, or has a key twice; with line and
            column.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        looked = "" if file.is_absolute() else f" (looked in {Path.cwd()})"
        kind = "is a folder, not an argument file" if file.is_dir() else "does not exist"
        raise ArgumentsError(f"argument file {path} {kind}{looked}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArgumentsError(f"{path}: not a UTF-8 text file (byte {error.start + 1})") from None
    except OSError as error:
        raise ArgumentsError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        if file.suffix in YAML_ENDINGS:
            from alignment.arguments.yaml_file import read_yaml

            items = read_yaml(text, path)
        else:
            items = _read_json(text, path)
    except RecursionError:
        raise ArgumentsError(f"{path}: its brackets are nested too deeply") from None
    return [Given(key, value, f"{path}, line {line}") for key, value, line in items]


def _read_json(text: str, path: str) -> list[tuple[str, Any, int]]:
    """``(key, value, line)`` of every key."""
    try:
        content = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_duplicates)
    except json.JSONDecodeError as error:
        raise ArgumentsError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {_mend(error)}"
        ) from None
    except _NotAllowed as error:
        raise ArgumentsError(f"{path}: {error}{_line_of(text, error.token)}") from None
    if not isinstance(content, dict):
        raise ArgumentsError(f'{path}: must hold one JSON object ({{"key": value, ...}}), not {_json_type(content)}')
    lines = key_lines(text)
    return [(key, value, lines[key]) for key, value in content.items()]


def key_lines(text: str) -> dict[str, int]:
    """Return the line of every top-level key of a JSON object's text, which must be valid."""
    decoder, lines = json.JSONDecoder(), {}
    position = _skip(text, text.index("{") + 1)
    while text[position] == '"':
        line = text.count("\n", 0, position) + 1
        key, position = scanstring(text, position + 1, True)
        lines[key] = line
        position = _skip(text, _skip(text, position) + 1)
        _, position = decoder.raw_decode(text, position)
        position = _skip(text, position)
        if text[position] == ",":
            position = _skip(text, position + 1)
    return lines


def _skip(text: str, position: int) -> int:
    while text[position] in " \t\r\n":
        position += 1
    return position


class _NotAllowed(ValueError):
    """Something that Python's JSON reader takes and we do not; ``token`` is the text to look for."""

    def __init__(self, message: str, token: str) -> None:
        super().__init__(message)
        self.token = token


def _refuse_constant(name: str) -> Any:
    raise _NotAllowed(f"{name} is not a JSON value", name)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _NotAllowed(f"key {key!r} is given twice", f'"{key}"')
        result[key] = value
    return result


def _line_of(text: str, token: str) -> str:
    lines = [str(number) for number, line in enumerate(text.splitlines(), 1) if token in line]
    return f" (line{'s' if len(lines) > 1 else ''} {' and '.join(lines)})" if lines else ""


def _mend(error: json.JSONDecodeError) -> str:
    """Return the reader's message with a hint for the usual slips."""
    before = error.doc[: error.pos].rstrip()
    following = error.doc[error.pos : error.pos + 1]
    if not error.doc.strip():
        return "the file is empty"
    if following in "}]" and before.endswith(","):
        return f"{error.msg}: there is a comma before the closing {following!r}" if following else error.msg
    if error.msg.startswith("Expecting ',' delimiter"):
        return f"{error.msg}: is a comma missing after the line before?"
    if error.doc.startswith(("//", "#"), error.pos):
        return f"{error.msg}: JSON has no comments"
    if following == "'":
        return f'{error.msg}: JSON strings stand in double quotes (")'
    return error.msg


def _json_type(value: Any) -> str:
    return {list: "a list", str: "a string", bool: "true/false", type(None): "null"}.get(type(value), "a number")


def read_argv(argv: Sequence[str], kind: Callable[[str], str | None]) -> tuple[str | None, list[Given]]:
    """Split a command line into the file's name and the overrides.

    Understood are ``FILE`` (first only), ``key=value``, ``--key=value``, ``--key value`` and ``--flag``; a list takes
    several values.

    Args:
        argv: the arguments after the program's (and the stage's) name.
        kind: gives a key's kind (see :class:`~alignment.arguments.spec.Spec`) or None for an unknown key: a truth
            value may stand without a value, a list may have several.

    Raises:
        ArgumentsError: a word that is none of these, or a key without its value.
    """
    words = [str(word) for word in argv]
    file = None
    if words and not words[0].startswith("-") and (words[0].endswith(ENDINGS) or "=" not in words[0]):
        file = words.pop(0)
    given, problems = [], []
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        bare = name.removeprefix("--").replace("-", "_")
        if name.startswith("--") and bare:
            if not equals:
                value = _following(bare, words, kind(bare))
                if value is None:
                    problems.append(f"{COMMAND_LINE}: {name} needs a value ({name} VALUE or {bare}=VALUE)")
                    continue
            given.append(Given(bare, value, COMMAND_LINE, True))
        elif equals and bare and not name.startswith("-"):
            given.append(Given(bare, value, COMMAND_LINE, True))
        elif word.endswith(ENDINGS):
            problems.append(f"{COMMAND_LINE}: {word!r}: only one argument file can be given, and it must come first")
        else:
            problems.append(f"{COMMAND_LINE}: {word!r} is not understood; write key=value, --key value or --key=value")
    if problems:
        raise ArgumentsError("\n".join(problems))
    return file, given


def _following(key: str, words: list[str], kind: str | None) -> str | None:
    """Take the value of ``--key`` from the words after it; None if there is none."""
    if kind == "bool":
        if words and words[0].lower() in TRUE_WORDS | FALSE_WORDS | {"null"}:
            return words.pop(0)
        return "true"
    values = []
    while words and not words[0].startswith("--"):
        # An unknown key may take several words, too: whoever looks before the method is known must not stumble over it.
        if (values and kind not in ("list", None)) or ((values or kind is None) and "=" in words[0]):
            break
        values.append(words.pop(0))
    # An unknown key alone is left to the parser, whose message names the nearest known one.
    return ",".join(values) if values else ("true" if kind is None else None)
