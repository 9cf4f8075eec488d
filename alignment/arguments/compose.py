"""The arguments class of a method: its own keys, on top of what all methods of its sort have."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

from alignment.arguments.spec import Spec, argument, read_value, specs
from alignment.arguments.stage_arguments import Arguments
from alignment.errors import ArgumentsError, nearest

A = TypeVar("A", bound=Arguments)

#: What :func:`argument` takes besides the default.
_DETAILS = {field.name for field in dataclasses.fields(Spec)} - {"name", "kind", "optional", "group"}


def compose(
    keys: type | None,
    base: type[A],
    stage: str,
    title: str,
    *,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    metrics: tuple[str, ...] = (),
) -> type[A]:
    """Make the arguments class of a method.

    Example::

        @dataclass
        class Keys:
            scale: str = argument("group", "What the advantages are divided by.", choices=("group", "batch", "none"))

            def check_keys(self, problems):
                ...

        compose(Keys, OnlineArguments, "grpo", "GRPO", changes={"num_return_sequences": {"default": 8, "ge": 2}})

    Args:
        keys: a dataclass whose fields are made by :func:`~alignment.arguments.spec.argument`; they stand under
            ``title`` in the documentation, or under its ``GROUP``. It may define ``resolve_keys`` and ``check_keys``
            (see :class:`~alignment.arguments.stage_arguments.Arguments`) and derive from
            :class:`~alignment.arguments.critic_keys.CriticKeys`. None: there are none.
        base: :class:`~alignment.arguments.OnlineArguments`, :class:`~alignment.arguments.RowArguments` or another class
            of arguments.
        stage: the method's name.
        title: the method's name as people read it.
        changes: what is otherwise for keys of ``base``: key -> attributes of its
            :class:`~alignment.arguments.spec.Spec`, such as ``{"default": 8, "ge": 2}``.
        presets: names that stand for settings of keys: name -> {key: setting}. With them the class has a key
            ``preset``.
        metrics: what its evaluations give besides what those of ``base`` do. The first is the default of
            ``metric_for_best_model``.

    Raises:
        ArgumentsError: a field was not made by ``argument``, is of another type than the key of ``base`` with its
            name or has the name of something else, or ``changes`` or ``presets`` name a key that there is not or a
            value that it does not take.
    """
    bases = (base,) if keys is None else (keys, base)
    if keys is not None:
        _check_keys(keys, base, title)
    inherited = specs(base) if keys is None else {**specs(base), **specs(keys)}
    fields = [_changed(title, inherited, bases, key, details) for key, details in (changes or {}).items()]
    if presets:
        fields.append(_preset_key(title, presets))
    namespace: dict[str, Any] = {
        "STAGE": stage,
        "TITLE": title,
        "GROUP": title if keys is None else keys.__dict__.get("GROUP", title),
        "__doc__": f"Arguments of {title}; see :class:`~alignment.arguments.stage_arguments.Arguments`.",
    }
    if metrics:
        namespace["METRICS"] = (*metrics, *(name for name in base.METRICS if name not in metrics))
    name = "".join(word.capitalize() for word in stage.split("_")) + "Arguments"
    made = dataclasses.make_dataclass(name, fields, bases=bases, namespace=namespace)
    _check_presets(made, presets or {})
    return made


def _check_keys(keys: type, base: type[Arguments], title: str) -> None:
    if not dataclasses.is_dataclass(keys):
        raise ArgumentsError(f"{title}: its Keys are no dataclass; write @dataclass above the class")
    own, known = specs(keys), specs(base)
    plain = [field.name for field in dataclasses.fields(keys) if field.name not in own]
    if plain:
        raise ArgumentsError(
            f"{title}: {', '.join(plain)}: a key is made by argument(default, help), from alignment.arguments.spec"
        )
    for name, spec in own.items():
        if name in known and spec.kind != known[name].kind:
            raise ArgumentsError(f"{title}: {name} is a key of all such methods, of another type; give it another name")
        if name not in known and hasattr(base, name):
            raise ArgumentsError(f"{title}: {name} is something that all arguments have; give the key another name")


def _changed(title: str, known: Mapping[str, Spec], bases: tuple[type, ...], key: str, details: Mapping[str, Any]):
    """The field of ``key`` with other details, for ``make_dataclass``."""
    if key not in known:
        raise ArgumentsError(f"{title}: there is no key {key!r} to change{nearest(key, known)}")
    unknown = sorted(set(details) - _DETAILS)
    if unknown:
        raise ArgumentsError(f"{title}: {key} has no {unknown[0]!r}{nearest(unknown[0], _DETAILS)}")
    owner = next(base for base in bases if key in getattr(base, "__dataclass_fields__", {}))
    merged = {**owner.__dataclass_fields__[key].metadata, "default": known[key].default, **details}
    return key, get_type_hints(owner)[key], argument(**merged)


def _check_presets(made: type[Arguments], presets: Mapping[str, Mapping[str, Any]]) -> None:
    for name, settings in presets.items():
        for key, value in settings.items():
            where = f"{made.TITLE}: the preset {name} sets {key!r}"
            if key not in specs(made):
                raise ArgumentsError(f"{where}, which is no key{nearest(key, specs(made))}")
            try:
                read_value(specs(made)[key], value, is_text=False)
            except ValueError as error:
                raise ArgumentsError(f"{where}: {error}") from None


def _preset_key(title: str, presets: Mapping[str, Mapping[str, Any]]):
    field = argument(
        None,
        f"A form of {title} by name: sets keys that are not given, and says which.",
        choices=tuple(presets),
        sets=lambda cls, chosen: presets,
        derived="none",
    )
    return "preset", str | None, field
