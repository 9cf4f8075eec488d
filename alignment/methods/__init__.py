"""The algorithms by NAME: one file a method, from top to bottom.

A method is a class with these attributes (no method's module loads Paddle when it is imported):

=========== ==========================================================================================================
``name``    what commands and checkpoints call it: ``"grpo"``
``title``   what people call it: ``"GRPO"``
``summary`` one line for ``alignment methods``
``Keys``    a dataclass of its own keys (see :func:`alignment.arguments.compose.compose`), or None, on top of ``base``:
``base``    ``"online"``: it generates (:class:`~alignment.arguments.OnlineArguments`); ``"rows"``: it learns from given
            rows (:class:`~alignment.arguments.RowArguments`)
``changes`` optional: keys of ``base`` that are otherwise here: ``{"num_return_sequences": {"default": 8, "ge": 2}}``
``presets`` optional: names that stand for settings of keys: ``{"dr_grpo": {"scale": "none"}}``
``metrics`` optional: what its evaluations give besides what ``base`` does; the first decides which checkpoint is best
``run``     ``run(args, world, argv) -> int``: the training, from checked arguments to the exit status
=========== ==========================================================================================================

Instead of ``Keys``, ``base``, ``changes``, ``presets`` and ``metrics`` it may have ``Arguments``, a whole class of
arguments.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from alignment.arguments.compose import compose
from alignment.arguments.online_arguments import OnlineArguments
from alignment.arguments.row_arguments import RowArguments
from alignment.arguments.stage_arguments import Arguments
from alignment.errors import ArgumentsError, nearest

M = TypeVar("M", bound=type)

#: Where the toolkit's own methods are.
BUILT_IN: dict[str, str] = {
    "sft": "alignment.methods.sft:SFT",
    "reward": "alignment.methods.reward:RewardModel",
    "cost": "alignment.methods.reward:CostModel",
    "ppo": "alignment.methods.ppo:PPO",
    "grpo": "alignment.methods.grpo:GRPO",
    "rloo": "alignment.methods.rloo:RLOO",
    "reinforce": "alignment.methods.reinforce:Reinforce",
    "remax": "alignment.methods.remax:ReMax",
    "a2c": "alignment.methods.a2c:A2C",
    "nlpo": "alignment.methods.nlpo:NLPO",
    "safe_ppo": "alignment.methods.safe_ppo:SafePPO",
    "rft": "alignment.methods.rft:RFT",
}
#: Other names of methods.
ALIASES = {"rm": "reward"}
BASES: dict[str, type[Arguments]] = {"online": OnlineArguments, "rows": RowArguments}

_REGISTERED: dict[str, type] = {}


def register_method(method: M) -> M:
    """Make a method known by its ``name``, to ``alignment run NAME`` and in messages; a class decorator.

    Example::

        @register_method
        class Mine:
            name, title, summary, base, Keys = "mine", "Mine", "what it does", "online", None

            @staticmethod
            def run(args, world, argv):
                ...

    Raises:
        ArgumentsError: the class lacks something, or its name belongs to another one.
    """
    _check(method)
    name = method.name
    known = _REGISTERED.get(name)
    if name in BUILT_IN and BUILT_IN[name] != f"{method.__module__}:{method.__qualname__}":
        raise ArgumentsError(f"{_place(method)}: {name!r} is a method of the toolkit; give yours another name")
    if known is not None and _place(known) != _place(method):
        raise ArgumentsError(f"the method {name!r} is registered twice: by {_place(known)} and by {_place(method)}")
    _REGISTERED[name] = method
    return method


def find_method(name: str) -> type:
    """Return the method of a name, an alias, or ``file.py:Class``.

    Raises:
        ArgumentsError: there is none; the message lists the names and says the nearest.
    """
    name = ALIASES.get(name, name)
    if name in BUILT_IN:
        return _load(name)
    if name in _REGISTERED:
        return _REGISTERED[name]
    if ":" in name:
        from alignment.plugins import load_object

        method = load_object(name)
        _check(method, name)
        return method
    known = [*BUILT_IN, *(other for other in _REGISTERED if other not in BUILT_IN)]
    raise ArgumentsError(
        f"unknown method {name!r}{nearest(name, [*known, *ALIASES, *preset_names()])}\nKnown: "
        f'{", ".join(known) or "none"}. A class of your own is given as "file.py:Class"; `plugins` names files that '
        "register methods."
    )


def known_methods() -> dict[str, type]:
    """Every method by name: the toolkit's, then those that plug-ins registered."""
    return {**{name: _load(name) for name in BUILT_IN}, **_REGISTERED}


def all_arguments() -> dict[str, type[Arguments]]:
    """The class of arguments of every method, by the method's name."""
    return {name: arguments_of(method) for name, method in known_methods().items()}


def with_preset(name: str) -> type | None:
    """The method that has a preset of this name; None if there is none."""
    return next((method for method in known_methods().values() if name in getattr(method, "presets", {})), None)


def preset_names() -> list[str]:
    """The presets of every method."""
    return [name for method in known_methods().values() for name in getattr(method, "presets", {})]


@functools.cache
def arguments_of(method: type) -> type[Arguments]:
    """The class of a method's arguments: its ``Arguments``, else its ``Keys`` on top of its ``base``.

    Raises:
        ArgumentsError: its keys are not declared as keys are (see :func:`alignment.arguments.compose.compose`).
    """
    whole = getattr(method, "Arguments", None)
    if whole is not None:
        return whole
    optional: dict[str, Any] = {
        name: getattr(method, name) for name in ("changes", "presets", "metrics") if hasattr(method, name)
    }
    return compose(method.Keys, BASES[method.base], method.name, method.title, **optional)


def _load(name: str) -> type:
    module, _, attribute = BUILT_IN[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def _place(method: type) -> str:
    """Where a class is defined: the same after its file is loaded a second time."""
    try:
        file = inspect.getfile(method)
    except (TypeError, OSError):
        file = method.__module__
    return f"{method.__qualname__} in {file}"


def _check(method: Any, given: str = "") -> None:
    """Refuse what is no method, in words."""
    if not isinstance(method, type):
        raise ArgumentsError(f"{given or repr(method)} is no class, so it is no method")
    where = given or _place(method)
    texts = [name for name in ("name", "title", "summary") if not _is_text(getattr(method, name, None))]
    if texts:
        raise ArgumentsError(f"{where} is no method: it has no text as {' and '.join(texts)} (class attributes)")
    if not method.name.isidentifier():  # type: ignore[attr-defined]
        raise ArgumentsError(f"{where}: a method's name is letters, digits and _, not {method.name!r}")
    if not callable(getattr(method, "run", None)):
        raise ArgumentsError(f"{where} is no method: it has no run(args, world, argv)")
    missing = sorted(getattr(method, "__abstractmethods__", ()))
    if missing:
        raise ArgumentsError(f"{where} is no method yet: it does not say its {', '.join(missing)} (docs/methods.md)")
    whole = getattr(method, "Arguments", None)
    if whole is not None:
        if not (isinstance(whole, type) and issubclass(whole, Arguments)):
            raise ArgumentsError(f"{where}: its Arguments do not derive from alignment.arguments.Arguments")
        if not (_is_text(whole.STAGE) and _is_text(whole.TITLE)):
            raise ArgumentsError(f"{where}: its Arguments have no STAGE and TITLE: its name, and as people read it")
    elif getattr(method, "base", None) not in BASES or not hasattr(method, "Keys"):
        raise ArgumentsError(
            f"{where} is no method: it needs Arguments, or Keys (a dataclass, or None) and base "
            f"({' or '.join(map(repr, BASES))})"
        )
    presets = getattr(method, "presets", {})
    if not isinstance(presets, Mapping) or not all(isinstance(settings, Mapping) for settings in presets.values()):
        raise ArgumentsError(f"{where}: presets is a dict of NAME -> {{key: value}}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
