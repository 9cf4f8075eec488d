"""Rewards that are a user's Python function ``f(prompts, responses, **row) -> list[float]``."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from alignment.errors import AlignmentError, RewardError, nearest
from alignment.rollout.rewards.reward_source import RewardBatch, RewardSource, check_scores

RESPONSE_NAMES = ("responses", "completions")  # the second as in trl
OWN_NAMES = ("prompts", *RESPONSE_NAMES)
IDS_NAME = "response_ids"


class PythonReward(RewardSource):
    """A function as a reward source.

    The function gets ``prompts`` and ``responses`` (lists of text) and, by keyword, the columns of the data set that it
    names: a list with one value per response, ``None`` where a row lacks the column. With ``**row`` it gets all
    columns. ``completions`` may be said for ``responses``; a function that uses none of these names gets prompts and
    responses by position. One that names ``response_ids`` also gets each answer's tokens, a list of numbers.

    Args:
        name: what messages and metrics call it.
        function: the function.

    Raises:
        RewardError: it cannot be called like that.
    """

    def __init__(self, name: str, function: Callable) -> None:
        self.NAME = name
        self.function = function
        if not callable(function):
            raise RewardError(f"reward {name!r} is {function!r} ({type(function).__name__}), not a function")
        call = function if inspect.isroutine(function) else getattr(type(function), "__call__", function)  # noqa: B004
        if inspect.iscoroutinefunction(call) or inspect.isgeneratorfunction(call) or inspect.isasyncgenfunction(call):
            raise RewardError(f"reward {name!r} is an async function or a generator; it must be a plain function")
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError) as error:
            raise RewardError(f"reward {name!r}: the signature of {function!r} cannot be read ({error})") from error
        self._parameters = {p.name: p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        self._columns: list[str] | None = None
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        by_keyword = {p.name for p in self._parameters.values() if p.kind is not p.POSITIONAL_ONLY}
        self._by_name = bool(by_keyword & set(OWN_NAMES))
        if self._by_name:
            if not self._takes_all and not by_keyword & set(RESPONSE_NAMES):
                raise RewardError(f"reward {name!r} has no parameter `responses`; write {name_hint(function)}")
        else:
            places = [p for p in self._parameters.values() if p.kind is not p.KEYWORD_ONLY]
            if len(places) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
                raise RewardError(f"reward {name!r} does not take prompts and responses; write {name_hint(function)}")
            for parameter in places[:2]:
                del self._parameters[parameter.name]

    def score(self, batch: RewardBatch) -> np.ndarray:
        """Call the function and return its ``[B]`` float32 scores.

        Raises:
            RewardError: it needs a column that there is not, it raised, or what it returned is not ``B`` finite
                numbers.
        """
        positional, named = self._arguments(batch)
        try:
            values = self.function(*positional, **named)
        except AlignmentError:
            raise
        except Exception as error:
            raise RewardError(self._failure(error, batch)) from error
        return check_scores(self.NAME, values, batch, self.partial)

    def settle_columns(self, columns: Collection[str]) -> None:
        """See :meth:`RewardSource.settle_columns`: whether a column is missing is decided once, by all rows of the run,
        and not by which of them happen to be in a batch.
        """
        self._columns = [column for column in columns if column not in OWN_NAMES]
        self._require(self._columns)

    def _require(self, columns: Collection[str]) -> None:
        own = {*OWN_NAMES, IDS_NAME}
        missing = [
            p.name
            for p in self._parameters.values()
            if p.default is p.empty and p.kind is not p.POSITIONAL_ONLY and p.name not in own and p.name not in columns
        ]
        if missing:
            close = nearest(missing[0], columns)
            raise RewardError(
                f"reward {self.NAME!r} needs the column{'s' * (len(missing) != 1)} {', '.join(map(repr, missing))}, "
                f"which the prompts' rows do not have; they have: {', '.join(map(repr, columns)) or 'none'}{close}"
            )

    def _arguments(self, batch: RewardBatch) -> tuple[list[Any], dict[str, Any]]:
        columns: Collection[str]
        if self._columns is None:
            columns = dict.fromkeys(key for row in batch.rows for key in row if key not in OWN_NAMES)
            self._require(columns)
        else:
            columns = self._columns
        wanted = columns if self._takes_all else [key for key in columns if key in self._parameters]
        # Lists of their own: a function may sort or change what it gets.
        named: dict[str, Any] = {key: [row.get(key) for row in batch.rows] for key in wanted}
        if not self._by_name:
            positional = [list(batch.prompts), list(batch.responses)]
        else:
            positional = []
            responses = "completions" if "completions" in self._parameters else "responses"
            for key, values in (("prompts", batch.prompts), (responses, batch.responses)):
                if key in self._parameters or self._takes_all:
                    named[key] = list(values)
        if IDS_NAME in self._parameters:
            named[IDS_NAME] = batch.response_ids()
        return positional, named

    def _failure(self, error: Exception, batch: RewardBatch) -> str:
        place = _place_of(error.__traceback__, self.function)
        text = f"reward {self.NAME!r} failed: {type(error).__name__}: {error}\n  at {place}"
        if len(batch) == 1:
            return f"{text}, on this sample:\n{batch.show(0)}"
        # a function gets the whole batch, so which of its samples was at fault cannot be told from outside
        return f"{text}, in a batch of {len(batch)}. Its first sample:\n{batch.show(0)}" if len(batch) else text


def name_hint(function: Callable) -> str:
    """How the function's first line should look."""
    return f"`def {getattr(function, '__name__', 'reward')}(prompts, responses, **row)`"


def load_function(spec: str) -> Callable:
    """Load ``"file.py:function"`` or ``"package.module:function"``.

    Args:
        spec: the file as the arguments have found it, beside the JSON file or in the current folder.

    Raises:
        RewardError: there is no such file or the function's name is missing.
        AlignmentError: the file or module cannot be loaded or has no such function.
    """
    from alignment.plugins import load_object

    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise RewardError(f'reward {spec!r}: name the function too, as in "{place or name}:my_reward"')
    if place.endswith(".py"):
        file = Path(place).expanduser().resolve()
        if not file.is_file():
            raise RewardError(f"reward {spec!r}: there is no such file (looked for {file})")
        place = str(file)
    return load_object(f"{place}:{name}")


def _place_of(trace: TracebackType | None, function: Callable) -> str:
    """File, line and text of the innermost frame in the function's own file (or of the innermost one)."""
    frames = traceback.extract_tb(trace)[1:]  # without our own call
    if not frames:
        return f"the call of {function!r}"
    code = getattr(inspect.unwrap(function), "__code__", None)
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    frame = (own or frames)[-1]
    return f"{frame.filename}, line {frame.lineno}" + (f" ({frame.line})" if frame.line else "")
