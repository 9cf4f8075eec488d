"""Keys whose values stand for settings of other keys: ``preset``, ``compat``, ``rl_algorithm``.

What they set lies between the defaults and what the user gave.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alignment.arguments.spec import Spec, read_value
from alignment.errors import ArgumentsError


@dataclass
class Settings:
    """What was set in the user's place.

    Attributes:
        values: key -> value.
        set_by: key -> what set it: ``"compat verl"``.
        remarks: one line for each such key: what it set, what it left as given, and what it could not set.
    """

    values: dict[str, Any] = field(default_factory=dict)
    set_by: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def settings_of(cls: type, spec: Spec) -> dict[str, dict[str, Any]]:
    """What the values of a key set in a class of arguments: value -> {key: setting}; for most keys nothing."""
    tables = {} if spec.sets is None else spec.sets(cls, {})
    return {value: _own(cls, settings) for value, settings in tables.items()}


def in_words(settings: Mapping[str, Any]) -> str:
    """Settings of keys in words: ``"kl_coeff 0.001, scale none"``."""

    def word(value: Any) -> str:
        return "none" if value is None else value if isinstance(value, str) else json.dumps(value)

    return ", ".join(f"{key} {word(value)}" for key, value in settings.items())


def settings_for(cls: type, known: Mapping[str, Spec], given: Mapping[str, Any]) -> Settings:
    """Collect what the given keys set of those that are not given.

    Args:
        cls: a class of arguments.
        known: all its keys, in rising precedence where two set the same: those of others, the shared ones, the
            method's own.
        given: keys and values of the user.

    Raises:
        ArgumentsError: a value is asked for that its key does not take.
    """
    specs, result = cls.specs(), Settings()  # type: ignore[attr-defined]
    for name, chooser in reversed(known.items()):  # what comes last is settled first, and stays
        if chooser.sets is None or name not in given:
            continue
        source = f"{name} {given[name]}"
        asked = chooser.sets(cls, {**result.values, **given}).get(given[name], {})
        wanted = _own(cls, asked)
        done = {key: value for key, value in wanted.items() if key not in given and key not in result.values}
        for key, value in done.items():
            try:
                result.values[key] = read_value(specs[key], value, is_text=False)
            except ValueError as error:
                raise ArgumentsError(
                    f"{source} asks for {key} {value}, which {cls.TITLE} does not take ({error}); give {key} yourself"
                ) from None
            result.set_by[key] = source
        kept = [key for key in wanted if key in given]
        missing = [key for key in asked if not _own(cls, {key: None})]
        parts = [f"{source} sets {in_words(done) or 'nothing'}"] if asked else []
        parts += [f"{', '.join(kept)}: as given"] * bool(kept)
        parts += [f"there is no key for {', '.join(missing)}"] * bool(missing)
        result.remarks += ["; ".join(parts)] * bool(parts)
    return result


def _own(cls: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings that a class of arguments has keys for, under the keys' own names."""
    specs = cls.specs()  # type: ignore[attr-defined]
    names = {alias: spec.name for spec in specs.values() for alias in spec.aliases}
    names |= {name: name for name in specs}
    return {names[key]: value for key, value in settings.items() if key in names}
