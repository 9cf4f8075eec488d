"""Argument files in YAML: the keys and values that the same file would have in JSON.

Plain words are read as YAML 1.2's core schema does, not as PyYAML (1.1) does: ``1e-5`` is a number; ``on``, ``off``,
``yes`` and ``no`` are text, which keys that are true or false take for what they say; dates, ``1:30`` and ``010`` are
text. What JSON has no words for (anchors, tags, several documents, keys twice) is refused.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from alignment.errors import ArgumentsError

_SEQUENCE, _MAPPING = "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"
_HINTS = {
    "cannot start any token": "; YAML is indented by spaces, and text that begins with a sign stands in quotes",
    "mapping values are not allowed": "; text that holds ': ' stands in quotes",
    "found another document": "; one file holds one set of arguments",
}


class _Loader(yaml.SafeLoader):
    """PyYAML's reader with the words of YAML 1.2 alone."""

    yaml_implicit_resolvers: dict[str, Any] = {}


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)

_SCALARS = {
    "tag:yaml.org,2002:null": lambda text: None,
    "tag:yaml.org,2002:bool": lambda text: text.lower() == "true",
    "tag:yaml.org,2002:int": int,
    "tag:yaml.org,2002:float": float,
    "tag:yaml.org,2002:str": str,
}


def read_yaml(text: str, path: str) -> list[tuple[str, Any, int]]:
    """Return ``(key, value, line)`` of every key of the file, in its order; values are as from JSON.

    Args:
        text: of the file.
        path: its name in messages.

    Raises:
        ArgumentsError: it is not YAML, holds no keys, has a key twice, or something that JSON does not have; with line
            and column.
    """
    try:
        node = yaml.compose(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        hint = next((hint for words, hint in _HINTS.items() if words in str(error.problem)), "")
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ArgumentsError(f"{path}{where}: not valid YAML: {error.problem or error.context}{hint}") from None
    except yaml.YAMLError as error:
        raise ArgumentsError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if node is None:
        raise ArgumentsError(f"{path}: the file is empty")
    if not isinstance(node, yaml.MappingNode):
        raise ArgumentsError(
            f"{path}, line {node.start_mark.line + 1}: must hold keys and values, a line for each: key: value"
        )
    content = _Reader(path)
    return [(key, content.value(value), line) for key, value, line in content.entries(node)]


class _Reader:
    """Turns nodes into values."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._seen: set[int] = set()

    def value(self, node: yaml.Node) -> Any:
        """The value of a node, as JSON would have it."""
        if id(node) in self._seen:
            raise self._error(node, "anchors and aliases (&, *) are not read; write the value again")
        self._seen.add(id(node))
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            try:
                return _SCALARS[node.tag](node.value)
            except ValueError:
                raise self._error(node, f"{node.value!r} is not what its tag says") from None
        if isinstance(node, yaml.SequenceNode) and node.tag == _SEQUENCE:
            return [self.value(item) for item in node.value]
        if isinstance(node, yaml.MappingNode) and node.tag == _MAPPING:
            return {key: self.value(item) for key, item, _ in self.entries(node)}
        raise self._error(node, f"the tag {node.tag!r} is not read")

    def entries(self, node: yaml.MappingNode) -> list[tuple[str, yaml.Node, int]]:
        """``(key, node of its value, line)`` of a mapping; keys are text as it is written."""
        lines: dict[str, int] = {}
        result = []
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise self._error(key, "a key is one word")
            if key.value == "<<" and key.style is None:
                raise self._error(key, "merge keys (<<) are not read; write the keys themselves")
            if key.value in lines:
                raise ArgumentsError(
                    f"{self._path}: key {key.value!r} is given twice (lines {lines[key.value]} and {line})"
                )
            lines[key.value] = line
            result.append((key.value, value, line))
        return result

    def _error(self, node: yaml.Node, message: str) -> ArgumentsError:
        mark = node.start_mark
        return ArgumentsError(f"{self._path}, line {mark.line + 1}, column {mark.column + 1}: {message}")
