"""A registry: things by NAME, and an error that lists the names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from alignment.errors import ArgumentsError, nearest

Thing = TypeVar("Thing")


class Named(Generic[Thing]):
    """Functions or classes known by name, in the order of their registration.

    Example::

        POLICY_LOSSES: Named[Callable[[PolicyInputs], PolicyLoss]] = Named("policy_loss")

        @POLICY_LOSSES.register("mine")
        def mine(inputs): ...

        POLICY_LOSSES["mine"]

    Args:
        what: what is named, as the user calls it (a key's name where there is one).
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._things: dict[str, Thing] = {}

    def register(self, *names: str) -> Callable[[Thing], Thing]:
        """Make what is decorated known by each of ``names``.

        Raises:
            ArgumentsError: a name belongs to something that was defined elsewhere.
        """

        def remember(thing: Thing) -> Thing:
            for name in names:
                known = self._things.get(name)
                if known is not None and _place(known) != _place(thing):
                    raise ArgumentsError(
                        f"{self.what} {name!r} is registered twice: by {_place(known)} and by {_place(thing)}"
                    )
                self._things[name] = thing
            return thing

        return remember

    def __getitem__(self, name: str) -> Thing:
        """What is registered as ``name``.

        Raises:
            ArgumentsError: nothing is; the message has the nearest name and lists all.
        """
        if name not in self._things:
            raise ArgumentsError(
                f"unknown {self.what} {name!r}{nearest(str(name), self._things)}\nKnown: {', '.join(self._things)}."
            )
        return self._things[name]

    def __contains__(self, name: object) -> bool:
        return name in self._things

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def __len__(self) -> int:
        return len(self._things)


def _place(thing: object) -> str:
    """Where it was defined: the same after its file is loaded a second time."""
    return f"{getattr(thing, '__module__', '?')}.{getattr(thing, '__qualname__', repr(thing))}"
