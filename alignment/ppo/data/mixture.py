"""Which data sets, and how much of each: dataset strings, proportions, and the rows that a proportion takes."""

from __future__ import annotations

import glob
import inspect
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.errors import DataError
from alignment.ppo.data.base import RawDataset, find_class
from alignment.ppo.data.files import EVALUATION

if TYPE_CHECKING:
    import numpy as np

Proportion = float | Fraction
"""A share of the data set (1.0 is all of it, 2.3 two copies and 30 % more); a negative integer Fraction -N means
exactly N rows.
"""

_SYNTAX = "name, name:0.5, name:1/3, name:N/-1 (exactly N rows), name::path or name:0.5:path"


@dataclass(frozen=True)
class Source:
    """One entry of a mixture."""

    name: str
    """The registered NAME (aliases are resolved)."""
    proportion: Proportion = 1.0
    given: str = "1.0"
    """The proportion as the user wrote it."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """For the data set's ``__init__``; ``path`` among them."""

    @property
    def label(self) -> str:
        """The name for messages and tables: NAME, and the path if there is one."""
        return f"{self.name} ({self.kwargs['path']})" if self.kwargs.get("path") else self.name

    def load(self) -> RawDataset:
        """Make the raw data set."""
        return RawDataset.load(self.name, **self.kwargs)


def parse_proportion(text: object, where: str) -> Proportion:
    """Turn ``0.5``, ``1/3``, ``2.3`` or ``N/-1`` (exactly N rows) into a :data:`Proportion`.

    Raises:
        DataError: it is none of these, negative, or not finite; ``where`` opens the message.
    """
    right = "a number of at least 0, a fraction like 1/3, or N/-1 for exactly N rows"
    if isinstance(text, Fraction):
        value: Proportion = text if text < 0 and text.denominator == 1 else float(text)
    elif isinstance(text, str):
        whole = re.fullmatch(r"\s*(\d+)\s*/\s*-1\s*", text)
        share = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
        if whole:
            value = Fraction(-int(whole[1])) if int(whole[1]) else 0.0
        elif share:
            if int(share[2]) == 0:
                raise DataError(f"{where}: the proportion {text!r} divides by zero; use {right}")
            value = int(share[1]) / int(share[2])
        else:
            try:
                value = float(text)
            except ValueError:
                raise DataError(f"{where}: the proportion {text!r} is not {right}") from None
    elif isinstance(text, (int, float)) and not isinstance(text, bool):
        value = float(text)
    else:
        raise DataError(f"{where}: the proportion {text!r} is not {right}")
    if not isinstance(value, Fraction) and not 0.0 <= value < math.inf:
        raise DataError(f"{where}: the proportion must be {right}, not {text}")
    return value


def parse_dataset(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Parse ``name[:proportion[:path]]``, several separated by commas.

    Returns:
        ``(name, {"proportion": p})`` per data set, with ``"path"`` where one was given. Everything after the second
        colon is the path, so it may hold colons; ``~`` is expanded. A path with a comma needs the dict form.

    Raises:
        DataError: an entry is empty, a proportion is not one, or a path is announced and missing.
    """
    return [
        (name, {**attrs, "proportion": parse_proportion(attrs["proportion"], f"data set {name!r}")})
        for name, attrs in _split_string(text)
    ]


def _split_string(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Like :func:`parse_dataset`, but proportions stay as they were written."""
    if not isinstance(text, str):
        raise DataError(f"a dataset string is text ({_SYNTAX}), not {text!r}")
    return [_split_entry(entry, text) for entry in text.split(",")]


def _split_entry(entry: str, text: str) -> tuple[str, dict[str, Any]]:
    """One ``name[:proportion[:path]]`` of the dataset string ``text``."""
    where = f"dataset string {entry.strip()!r}"
    parts = [part.strip() for part in entry.split(":", 2)]
    if not parts[0]:
        raise DataError(f"dataset string {text!r}: an entry has no name; the forms are {_SYNTAX}")
    attrs: dict[str, Any] = {"proportion": "1.0"}
    if len(parts) == 2 and not parts[1]:
        raise DataError(f"{where} ends with a colon; the forms are {_SYNTAX}")
    if len(parts) > 1 and parts[1]:
        try:
            parse_proportion(parts[1], where)
        except DataError as err:
            path = ":".join(parts[1:])
            is_path = re.search(r"[/\\.~]", path) and not re.fullmatch(r"[\d./+-]*", path)
            hint = f". A path comes after two colons: {parts[0]}::{path}" if is_path else ""
            raise DataError(f"{err}{hint}") from None
        attrs["proportion"] = parts[1]
    if len(parts) == 3:
        if not parts[2]:
            raise DataError(f"{where}: the path after the second colon is empty; the forms are {_SYNTAX}")
        attrs["path"] = os.path.expanduser(parts[2])
    return parts[0], attrs


def parse_mixture(names_and_attrs: Any, evaluation: bool = False) -> list[Source]:
    """Turn any accepted description of a mixture into sources, in order, without those of proportion 0.

    Args:
        names_and_attrs: a dataset string; a dict of name -> proportion, ``"proportion:path"`` or dict (``proportion``,
            ``path`` and further arguments of the data set); or an iterable of dataset strings and pairs like the items
            of such a dict. The same name may come several times with different paths. In place of a name, the path of a
            file or folder that exists, or a pattern that matches, is read as ``jsonl``.
        evaluation: ask data sets with a ``split`` for their validation or test part, where none is given.

    Raises:
        DataError: it is none of these, a name is unknown, the same source is listed twice, or nothing is left.
    """
    sources = []
    for name, attrs in _entries(names_and_attrs):
        where = f"data set {name!r}"
        attrs = dict(attrs) if isinstance(attrs, Mapping) else {"proportion": attrs}
        known = _class_of(name, attrs)
        given = attrs.pop("proportion", 1.0)
        if attrs.get("path") is not None:
            attrs["path"] = os.path.expanduser(os.fspath(attrs["path"]))
        if evaluation and "split" in inspect.signature(known).parameters:
            attrs.setdefault("split", EVALUATION)
        sources.append(Source(str(known.NAME), parse_proportion(given, where), _as_written(given), attrs))
    seen = set()
    for source in sources:
        key = (source.name, repr(sorted(source.kwargs.items(), key=repr)))
        if key in seen:
            raise DataError(
                f"data set {source.label} is listed twice; list it once, with a proportion of 2 if two copies are meant"
            )
        seen.add(key)
    taken = [source for source in sources if source.proportion != 0]
    if not taken:
        what = "all proportions are 0" if sources else "the list is empty"
        raise DataError(f"no data set to read: {what} in {names_and_attrs!r}")
    return taken


def _class_of(name: Any, attrs: dict[str, Any]) -> type[RawDataset]:
    """The class registered as ``name``; a path in its place goes to ``attrs`` and means ``jsonl``."""
    try:
        return find_class(name)
    except DataError as err:
        path = Path(name).expanduser() if isinstance(name, str) and name.strip() and "path" not in attrs else None
        if path is not None and (path.exists() or glob.glob(str(path), recursive=True)):
            attrs["path"] = str(path)
            return find_class("jsonl")
        if path is not None and (path.suffix or name.startswith(("/", ".", "~"))):
            raise DataError(f"there is no file {name} (looked in {Path.cwd()}), and {err}") from None
        raise


def _entries(spec: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(spec, str):
        return _split_string(spec)
    if isinstance(spec, Mapping):
        return [_pair(name, attrs) for name, attrs in spec.items()]
    if not isinstance(spec, Iterable):
        raise DataError(f"data sets are given as a string ({_SYNTAX}), a dict or a list of pairs, not as {spec!r}")
    entries: list[tuple[str, Any]] = []
    for entry in spec:
        if isinstance(entry, str):
            entries += _split_string(entry)
        elif isinstance(entry, (tuple, list)) and len(entry) == 2:
            entries.append(_pair(*entry))
        else:
            raise DataError(
                f"a list of data sets holds strings ({_SYNTAX}) or (name, proportion or dict) pairs, not {entry!r}"
            )
    return entries


def _pair(name: Any, attrs: Any) -> tuple[str, Any]:
    """``("jsonl", "0.5:d/shards")`` means the same as ``jsonl:0.5:d/shards``."""
    if isinstance(name, str) and isinstance(attrs, str):
        return _split_entry(f"{name}:{attrs}", f"{name}:{attrs}")
    return name, attrs


def _as_written(given: Any) -> str:
    if isinstance(given, Fraction) and given < 0:
        return f"{-given}/-1"
    return str(given)


def take_rows(available: int, proportion: Proportion, rng: np.random.Generator) -> np.ndarray:
    """Return which rows of a data set a proportion takes.

    ``round(available * p)`` rows, or exactly N: whole copies first, each in order, then the rest drawn without
    replacement and put in order.

    Args:
        available: rows of the data set.
        proportion: see :data:`Proportion`.
        rng: for the draw.

    Returns:
        int64 ``[taken]`` row numbers.
    """
    import numpy as np

    wanted = int(-proportion) if isinstance(proportion, Fraction) else round(available * proportion)
    if available == 0 or wanted == 0:
        return np.zeros(0, dtype=np.int64)
    copies, rest = divmod(wanted, available)
    drawn = np.sort(rng.choice(available, size=rest, replace=False))
    return np.concatenate([np.tile(np.arange(available), copies), drawn]).astype(np.int64)
