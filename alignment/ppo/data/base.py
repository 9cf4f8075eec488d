"""The two classes a user meets when bringing data: :class:`RawSample` and :class:`RawDataset`, and the registry by
NAME.
"""

from __future__ import annotations

import inspect
import random
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypedDict

from alignment.errors import AlignmentError, DataError, nearest


class RawSample(TypedDict, total=False):
    """One sample as text: the union of what the training stages need. Every key is optional.

    ========================  ==========================================================
    SupervisedDataset         ``input`` and ``answer``, or ``dialogue``, or ``text``
    PreferenceDataset         ``input``, ``answer``, ``other_answer``, ``better``
    SafetyPreferenceDataset   ``input``, ``answer``, ``other_answer``, ``safer``, ``is_safe``, ``is_other_safe``
    PromptOnlyDataset         ``input`` (or ``dialogue``: its last answer is left away)
    ========================  ==========================================================

    A list of texts is a conversation: user and assistant by turns. A list of messages (dicts of OpenAI's form:
    ``role``, ``content``, ``reasoning_content``, ``tool_calls``, ``weight``, ...; see messages.py) can say more: calls
    and results of tools, reasoning, and with ``weight`` 0 an answer that is not trained.
    Keys beyond the ones below are allowed; like ``extra`` they reach Python rewards as columns.
    """

    input: str | list[str] | list[dict[str, Any]]
    """The user's text, or a conversation that ends with the user's turn (or a tool's). Its answers are not trained."""
    answer: str | list[dict[str, Any]]
    """The assistant's answer."""
    other_answer: str | list[dict[str, Any]]
    """Another answer to the same input."""
    dialogue: list[str] | list[dict[str, Any]]
    """A whole conversation that ends with the assistant. Every answer in it is trained, but for empty ones."""
    text: str
    """Plain text without a prompt, trained from end to end."""
    system: str
    """A system prompt, put in front of the first user turn in the way of the template."""
    tools: list[dict[str, Any]]
    """Definitions of the tools that the assistant may call."""
    good: bool
    """Whether ``answer`` is a good one (KTO's label). One that is not is never trained by SupervisedDataset."""
    better: bool | None
    """Whether ``answer`` is better than ``other_answer``; None: neither is. SupervisedDataset trains the better one."""
    safer: bool | None
    """Whether ``answer`` is safer than ``other_answer``; None: neither is."""
    is_safe: bool
    """Whether ``answer`` is safe."""
    is_other_safe: bool
    """Whether ``other_answer`` is safe."""
    extra: dict[str, Any]
    """The source's own columns, handed to Python rewards."""
    unusable: str
    """What is wrong with the answer or the pair of a row of which only the prompt could be read."""
    unread: list[str]
    """Which columns (and keys of messages) the sample was made without; they are named in the data table."""


_CLASSES: dict[str, type[RawDataset]] = {}  # NAME -> class; strong, so that a class lives as long as its name
_ALIASES: dict[str, str] = {}  # alias -> NAME


class RawDataset(ABC):
    """A data set of :class:`RawSample`, found by its ``NAME``.

    Define the class attribute ``NAME`` (and ``ALIASES``, if it has other names) and the methods ``__init__``,
    ``__getitem__`` and ``__len__``. Defining the class registers it; a class without a ``NAME`` of its own is a base
    for others. An ``__init__`` that takes ``path`` can be given one in dataset strings (``name::path``).

    Raises:
        DataError: (when a class is defined) the NAME is empty, is not text, has a ``:`` or ``,`` in it, or belongs to a
            class in another file.
    """

    NAME: ClassVar[str | None] = None
    ALIASES: ClassVar[Sequence[str]] = ()
    FIELDS: ClassVar[Sequence[str] | None] = None
    """Which keys its samples have, if that is known beforehand: a wrong use is then told before anything is loaded."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("NAME") is not None:
            _register(cls)
        elif cls.__dict__.get("ALIASES"):
            raise DataError(f"{_described(cls)} has ALIASES but no NAME; give it one")

    @abstractmethod
    def __getitem__(self, index: int) -> RawSample:
        """Return sample ``index`` (0 <= index < len)."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples."""

    def __iter__(self) -> Iterator[RawSample]:
        for index in range(len(self)):
            yield self[index]

    def where(self, index: int) -> str:
        """Say where sample ``index`` comes from, for messages; data sets read from files say file and line."""
        return f"sample {index}"

    @classmethod
    def load(cls, name: str, /, *args: Any, **kwargs: Any) -> RawDataset:
        """Make the data set registered as ``name`` (a NAME or an alias).

        Args:
            name: the NAME or one of the ALIASES.
            *args, **kwargs: for the class's ``__init__``.

        Raises:
            DataError: nothing has that name (the known names are listed), the class does not take the arguments, or its
                ``__init__`` failed.
        """
        raw_class = find_class(name)
        try:
            inspect.signature(raw_class).bind(*args, **kwargs)
        except TypeError as err:
            raise DataError(
                f"data set {name!r} cannot be made with {_arguments(args, kwargs)}: {err}; "
                f"{_described(raw_class)} takes {inspect.signature(raw_class)}"
            ) from err
        try:
            return raw_class(*args, **kwargs)
        except AlignmentError:
            raise
        except Exception as err:
            raise DataError(f"data set {name!r} could not be made: {describe_exception(err)}") from err

    make = load

    def split_train_test(
        self, split_ratio: float = 0.2, shuffle: bool = True, seed: int = 42
    ) -> tuple[RawDataset, RawDataset]:
        """Split into a train and a test part; the train part is never empty.

        Args:
            split_ratio: the share of the test part, between 0 and 1, both excluded. With two or more samples the test
                part has at least one.
            shuffle: whether the test part is drawn at random; otherwise it is the end of the data set.
            seed: of the draw.

        Raises:
            DataError: ``split_ratio`` is not between 0 and 1, or the data set is empty.
        """
        train, test = split_indices(len(self), split_ratio, seed if shuffle else None)
        return RawSubset(self, train), RawSubset(self, test)


class RawSubset(RawDataset):
    """Some samples of another data set, in the given order."""

    def __init__(self, parent: RawDataset, indices: Sequence[int]) -> None:
        self.parent = parent
        self.indices = list(indices)

    def __getitem__(self, index: int) -> RawSample:
        return self.parent[self.indices[index]]

    def __len__(self) -> int:
        return len(self.indices)

    def where(self, index: int) -> str:
        return self.parent.where(self.indices[index])


def split_indices(count: int, ratio: float, seed: int | None) -> tuple[list[int], list[int]]:
    """Split ``range(count)`` into a (train, test) pair of ascending index lists; train is never empty.

    Args:
        count: the number of things to split.
        ratio: the test part's share. It is rounded to whole things, then held between 1 and ``count - 1``; a single
            thing goes to train.
        seed: of the random choice; None takes the end.

    Raises:
        DataError: the ratio is not between 0 and 1, or there is nothing to split.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0.0 < ratio < 1.0:
        raise DataError(f"a split ratio must be a number between 0 and 1 (both excluded), not {ratio!r}")
    if count == 0:
        raise DataError("an empty data set cannot be split into a train and a test part")
    test_count = min(max(round(count * ratio), 1), count - 1)
    if seed is None:
        test = range(count - test_count, count)
    else:
        test = sorted(random.Random(seed).sample(range(count), test_count))
    chosen = set(test)
    return [index for index in range(count) if index not in chosen], list(test)


def known_names() -> list[str]:
    """Return every registered NAME, sorted."""
    return sorted(_CLASSES)


def find_class(name: str) -> type[RawDataset]:
    """Return the class registered under a NAME or an alias.

    Raises:
        DataError: there is none; the message lists the known names and the nearest one.
    """
    if not isinstance(name, str):
        raise DataError(f"a data set is named by text, not by {name!r}")
    found = _CLASSES.get(_ALIASES.get(name, name))
    if found is None:
        near = nearest(name, [*_CLASSES, *_ALIASES]) or "."
        hub = (
            f"One of a hub is read from a folder that holds its files: jsonl::/path/to/{name}. " if "/" in name else ""
        )
        raise DataError(
            f"no data set is named {name!r}{near} Known names: {', '.join(known_names())}. {hub}"
            "A data set of your own is known once its file has been imported: name that file in `plugins`"
        )
    return found


def source_file(cls: type) -> str | None:
    """Return the file that defines ``cls``, or None for a class typed in a console."""
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    return str(Path(file).resolve()) if file else None


def describe_exception(err: BaseException) -> str:
    """Say an exception of user code in one line: its type, its text and the line of the file it was raised on."""
    frames = traceback.extract_tb(err.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    text = str(err).strip() or "no message"
    return f"{type(err).__name__}: {text}{place}"


def _described(cls: type) -> str:
    return f"class {cls.__qualname__} in {source_file(cls) or 'the console'}"


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    given = [repr(value) for value in args] + [f"{key}={value!r}" for key, value in kwargs.items()]
    return f"({', '.join(given)})"


def _is_reloaded(new: type, old: type) -> bool:
    """Whether ``new`` is ``old`` defined again: the same class name in the same file (or both in the console)."""
    return new.__qualname__ == old.__qualname__ and source_file(new) == source_file(old)


def _check_name(cls: type[RawDataset], name: object, what: str) -> str:
    if not isinstance(name, str) or not name.strip() or name != name.strip():
        raise DataError(f"{_described(cls)}: {what} must be non-empty text without spaces around it, not {name!r}")
    if ":" in name or "," in name:
        raise DataError(
            f"{_described(cls)}: {what} {name!r} contains ':' or ',', which separate name, proportion and path "
            "in dataset strings; choose another"
        )
    return name


def _register(cls: type[RawDataset]) -> None:
    """Enter ``cls`` under its NAME and ALIASES; a reloaded class replaces its former self."""
    name = _check_name(cls, cls.NAME, "NAME")
    aliases = cls.__dict__.get("ALIASES", ())
    if isinstance(aliases, str):
        raise DataError(f"{_described(cls)}: ALIASES must be a list or tuple of names; write ({aliases!r},)")
    names = [name, *(_check_name(cls, alias, "alias") for alias in aliases)]
    for new in names:
        owner = _CLASSES.get(_ALIASES.get(new, new))
        if owner is not None and not _is_reloaded(cls, owner):
            raise DataError(
                f"the data set name {new!r} is taken twice: by {_described(owner)} and by {_described(cls)}; rename one"
            )
    for alias in [alias for alias, target in _ALIASES.items() if target == name]:
        del _ALIASES[alias]
    _CLASSES[name] = cls
    _ALIASES.update({alias: name for alias in names[1:] if alias != name})
