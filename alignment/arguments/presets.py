"""Keys whose values stand for settings of other keys: ``preset``, ``compat``, ``rl_algorithm``.

What they set lies between the defaults and what the user gave.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alignment.arguments.spec import Spec, read_value


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
    if spec.sets is None:
        return {}
    names = _own_names(cls)
    return {
        value: {names[key]: setting for key, setting in settings.items() if key in names}
        for value, settings in spec.sets(cls).items()
    }


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
    """
    specs, result = cls.specs(), Settings()  # type: ignore[attr-defined]
    choosers = [(f"{name} {given[name]}", known[name]) for name in known if known[name].sets and name in given]
    for source, chooser in choosers:
        for key, value in settings_of(cls, chooser).get(given[chooser.name], {}).items():
            if key not in given:
                result.values[key] = read_value(specs[key], value, is_text=False)
                result.set_by[key] = source
    for source, chooser in choosers:
        wanted = settings_of(cls, chooser).get(given[chooser.name], {})
        done = {key: value for key, value in wanted.items() if result.set_by.get(key) == source}
        kept = [key for key in wanted if key in given]
        asked = chooser.sets(cls).get(given[chooser.name], {})  # type: ignore[misc]
        missing = [key for key in asked if key not in _own_names(cls)]
        parts = [f"{source} sets {in_words(done) or 'nothing'}"] if asked else []
        parts += [f"{', '.join(kept)}: as given"] * bool(kept)
        parts += [f"there is no key for {', '.join(missing)}"] * bool(missing)
        result.remarks += ["; ".join(parts)] * bool(parts)
    return result


def _own_names(cls: type) -> dict[str, str]:
    """Names and aliases of the keys of a class of arguments -> their names."""
    specs = cls.specs()  # type: ignore[attr-defined]
    return {**{alias: spec.name for spec in specs.values() for alias in spec.aliases}, **{name: name for name in specs}}
