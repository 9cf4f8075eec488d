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
        remarks: one line for each such key: what it set, and what it left as given.
    """

    values: dict[str, Any] = field(default_factory=dict)
    set_by: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def settings_of(cls: type, spec: Spec) -> Mapping[str, Mapping[str, Any]]:
    """What the values of a key set in a class of arguments: value -> {key: setting}; for most keys nothing."""
    return {} if spec.sets is None else spec.sets(cls)


def in_words(settings: Mapping[str, Any]) -> str:
    """Settings of keys in words: ``"kl_coeff 0.001, scale none"``."""
    words = (f"{key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items())
    return ", ".join(words) or "nothing else"


def settings_for(cls: type, known: Mapping[str, Spec], given: Mapping[str, Any]) -> Settings:
    """Collect what the given keys set of those that are not given.

    Args:
        cls: a class of arguments.
        known: all its keys, in rising precedence where two set the same: those of others, the shared ones, the
            method's own.
        given: keys and values of the user.
    """
    own, result = cls.specs(), Settings()
    asked: list[tuple[str, dict[str, Any]]] = []
    for name, spec in known.items():
        if spec.sets is not None and name in given:
            source, wanted = f"{name} {given[name]}", settings_of(cls, spec).get(given[name], {})
            wanted = {key: value for key, value in wanted.items() if key in own}
            if wanted or name in own:
                asked.append((source, wanted))
            for key, value in wanted.items():
                if key not in given:
                    result.values[key] = read_value(own[key], value, is_text=False)
                    result.set_by[key] = source
    for source, wanted in asked:
        done = {key: value for key, value in wanted.items() if result.set_by.get(key) == source}
        kept = [key for key in wanted if key in given]
        as_given = f" ({', '.join(kept)}: as given)" if kept else ""
        result.remarks.append(f"{source} sets {in_words(done)}{as_given}")
    return result
