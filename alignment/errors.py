"""Errors that are written for the person who reads them.

Every failure that a user can cause or cure is an :class:`AlignmentError`. The command line prints its message alone,
without a traceback, and exits with status 2; anything else that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AlignmentError(Exception):
    """A failure that the user can understand and mend.

    The message says what is wrong, where (file, line, key, row, rank) and what would be right.
    """


class ArgumentsError(AlignmentError):
    """A key, value or combination of arguments that cannot be used."""


class DataError(AlignmentError):
    """A data set, file or row that cannot be used."""


class ModelError(AlignmentError):
    """A model or tokenizer folder that cannot be used."""


class CheckpointError(AlignmentError):
    """A checkpoint that is damaged, incomplete or belongs to another run."""


class RewardError(AlignmentError):
    """A reward source that failed or returned something that is not a reward."""


class NonFiniteError(AlignmentError):
    """A loss, gradient or weight became NaN or infinite."""


class InvariantError(AlignmentError):
    """Something that must hold in a correct run does not (ratio 1 on the first pass, frozen weights that moved,
    ...).
    """


def some_of(names: Iterable[str], limit: int = 4) -> str:
    """The first ``limit`` names, and how many more there are: ``"a, b and 3 more"``; of none ``"nothing"``."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more or "nothing"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name nearest to ``name``, or an empty string.

    Args:
        name: what the user wrote.
        known: all names that would have been right.
    """
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else ""
