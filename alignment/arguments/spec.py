"""How one argument is described, and how a value given for it is read.

Every key is declared once, as a dataclass field made by :func:`argument`; its help, range and effects live in the
field's metadata, so that the parser, the error messages and ``docs/arguments.md`` cannot disagree.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from alignment.errors import nearest

#: What the reference's parser takes for a truth value, on the command line and in strings of a file, and YAML's words.
TRUE_WORDS = frozenset({"yes", "true", "t", "y", "1", "on"})
FALSE_WORDS = frozenset({"no", "false", "f", "n", "0", "off"})

_KIND_WORDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a string",
    "list": "a list of strings",
    "json": "JSON",
}


@dataclass(frozen=True)
class Spec:
    """One argument.

    Attributes:
        name: the key.
        kind: ``"bool"``, ``"int"``, ``"float"``, ``"str"``, ``"list"`` (of strings) or ``"json"`` (anything, read by
            ``parse``).
        optional: None is a value.
        default: the value when the key is not given, before values are derived from other keys.
        help: one sentence: what it does.
        ge, gt, le, lt: bounds of a number.
        choices: all allowed values, or None. A registry (:class:`alignment.named.Named`) is asked when a value is read,
            so names that plug-ins add count too.
        unit: ``"tokens"``, ``"rows"``, ``"optimizer steps"``, ... or empty.
        aliases: other names of the key.
        parse: for values of more than one type: ``parse(value, is_text)`` returns the value or raises ``ValueError``.
        required: there is no default.
        derived: how the default follows from other keys, in words.
        no_effect: why the key changes nothing, wherever it runs.
        on_cpu: why it changes nothing on a CPU.
        alone: why it changes nothing with one process.
        together: why it changes nothing with several processes.
        unavailable: why any value but the default is refused.
        neutral: further values that ask for nothing and of which nothing need be said.
        group: the heading under which the documentation lists it.
        sets: of a key whose values stand for settings of other keys: ``sets(cls, chosen)`` gives ``{value: {key:
            setting}}`` for a class of arguments, where ``chosen`` has the values of keys that are settled. Keys that
            are given themselves stay.
    """

    name: str
    kind: str
    optional: bool
    default: Any
    help: str = ""
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: Collection[Any] | None = None
    unit: str = ""
    aliases: tuple[str, ...] = ()
    parse: Callable[[Any, bool], Any] | None = None
    required: bool = False
    derived: str = ""
    no_effect: str = ""
    on_cpu: str = ""
    alone: str = ""
    together: str = ""
    unavailable: str = ""
    neutral: tuple[Any, ...] = ()
    group: str = ""
    sets: Callable[[type, Mapping[str, Any]], Mapping[str, Mapping[str, Any]]] | None = None

    def is_neutral(self, value: Any) -> bool:
        """Say whether ``value`` asks for nothing: the default, nothing at all, or one of ``neutral``."""
        if value is None or value == "" or value == [] or (value is False and self.default is None):
            return True
        return any(_same(value, neutral) for neutral in (self.default, *self.neutral))

    def range_text(self) -> str:
        """Return the allowed values in words: ``"> 0"``, ``"0 to 1"``, ``"linear, cosine"``, or an empty string."""
        if self.choices is not None:
            return ", ".join("(empty)" if choice == "" else str(choice) for choice in self.choices)
        if self.ge is not None and self.le is not None:
            return f"{self.ge:g} to {self.le:g}"
        bounds = [(">=", self.ge), (">", self.gt), ("<=", self.le), ("<", self.lt)]
        return " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)


def argument(default: Any = None, help: str = "", **details: Any) -> Any:
    """Declare an argument: a dataclass field whose metadata hold the keyword arguments of :class:`Spec`.

    Args:
        default: the default; lists and dicts are copied for every instance.
        help: one sentence: what the argument does.
        **details: further attributes of :class:`Spec`.
    """
    metadata = {"help": help, **details}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@functools.cache
def specs(cls: type) -> dict[str, Spec]:
    """Return the :class:`Spec` of every argument declared by the dataclass ``cls``, in the order of declaration."""
    hints = typing.get_type_hints(cls)
    groups = {}
    for base in reversed(cls.__mro__):
        for name in base.__dict__.get("__annotations__", {}):
            groups.setdefault(name, base.__dict__.get("GROUP") or getattr(cls, "GROUP", ""))
    result = {}
    for field in dataclasses.fields(cls):
        if "help" in field.metadata:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            kind, optional = kind_of(hints[field.name])
            result[field.name] = Spec(
                name=field.name,
                kind=kind,
                optional=optional,
                default=default,
                group=groups[field.name],
                **field.metadata,
            )
    return result


def kind_of(hint: Any) -> tuple[str, bool]:
    """Return ``(kind, optional)`` of a type hint.

    Args:
        hint: ``int``, ``str | None``, ``list[str]``, ...; whatever is none of the plain kinds is ``"json"``.
    """
    optional = False
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        members = [member for member in typing.get_args(hint) if member is not types.NoneType]
        optional = len(members) < len(typing.get_args(hint))
        hint = members[0] if len(members) == 1 else None
    if hint in (bool, int, float, str):
        return hint.__name__, optional
    return ("list" if hint == list[str] else "json"), optional


def read_value(spec: Spec, value: Any, *, is_text: bool) -> Any:
    """Turn what the user wrote into the argument's value.

    Args:
        spec: the argument.
        value: a value from JSON, or the text from the command line.
        is_text: the value comes from the command line, where everything is text.

    Returns:
        the value; None means "as if it had not been given".

    Raises:
        ValueError: wrong type, not one of the choices or out of range; the message says what would be right.
    """
    if value is None or (is_text and (value == "null" or (value == "" and spec.kind != "str"))):
        return None
    read = spec.parse or _READERS[spec.kind]
    value = read(value, is_text)
    _check_range(spec, value)
    return value


def _check_range(spec: Spec, value: Any) -> None:
    if spec.choices is not None:
        for item in value if isinstance(value, list) else [value]:
            if item not in spec.choices:
                near = nearest(item, filter(None, spec.choices)) if isinstance(item, str) else ""
                raise ValueError(f"{item!r} is not one of {', '.join(map(repr, spec.choices))}{near}")
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if not math.isfinite(value):
        raise ValueError(f"must be a finite number, not {value}")
    inside = (
        (spec.ge is None or value >= spec.ge)
        and (spec.gt is None or value > spec.gt)
        and (spec.le is None or value <= spec.le)
        and (spec.lt is None or value < spec.lt)
    )
    if not inside:
        raise ValueError(f"must be {spec.range_text()}, not {value}")


def read_bool(value: Any, is_text: bool = False) -> bool:
    """Read true/false, 1/0, yes/no, on/off, y/n, t/f; raise ``ValueError`` for anything else."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in TRUE_WORDS | FALSE_WORDS:
        return value.strip().lower() in TRUE_WORDS
    raise ValueError(_expected("bool", value))


def read_int(value: Any, is_text: bool = False) -> int:
    """Read a whole number; a string of digits is one, 2.0 and true are not."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            return int(value.strip().replace("_", ""))
        except ValueError:
            pass
    raise ValueError(_expected("int", value))


def read_float(value: Any, is_text: bool = False) -> float:
    """Read a number; the string "1e-5" is one, true is not."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value.strip())
        except ValueError:
            pass
    raise ValueError(_expected("float", value))


def read_str(value: Any, is_text: bool = False) -> str:
    """Read a string."""
    if isinstance(value, str):
        return value
    raise ValueError(_expected("str", value))


def read_list(value: Any, is_text: bool = False) -> list[str]:
    """Read a list of strings; a single string is a comma-separated one (or, on the command line, a JSON list)."""
    if isinstance(value, str):
        if is_text and value.lstrip().startswith("["):
            return read_list(read_json(value, True))
        value = [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise ValueError(_expected("list", value))


def read_json(value: Any, is_text: bool = False) -> Any:
    """Read anything; text from the command line is parsed as JSON if it can be, and is a string otherwise."""
    if is_text and isinstance(value, str):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            if value.lstrip()[:1] in ("{", "["):
                raise ValueError(f"is not valid JSON ({error.msg} at character {error.pos + 1}): {value}") from None
    return value


_READERS: dict[str, Callable[[Any, bool], Any]] = {
    "bool": read_bool,
    "int": read_int,
    "float": read_float,
    "str": read_str,
    "list": read_list,
    "json": read_json,
}


def _expected(kind: str, value: Any) -> str:
    return f"must be {_KIND_WORDS[kind]}, not {json.dumps(value, ensure_ascii=False, default=repr)}"


def _same(left: Any, right: Any) -> bool:
    """Compare by type as well, so that False does not count as 0."""
    return isinstance(left, bool) == isinstance(right, bool) and left == right
