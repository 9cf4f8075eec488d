"""`Batch`: the data that travels between the calls of a flow: rows with named columns, ragged, without padding.

A column has a kind:

- ``"row"``: one number (or a fixed-size vector) per row, an array ``[B, ...]``;
- ``"list"``: one object per row, text or anything, a list;
- any other name is a *length kind*: so many values per row as ``batch.sizes[kind]`` says, kept end to end in one flat
  array. ``batch["name"]`` shows them padded on the right, ``[B, widest]``.

Lengths travel and masks are derived; no mask is ever inferred from token ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from alignment.errors import nearest

if TYPE_CHECKING:
    from paddle import Tensor

    from alignment.parallel import World

ROW, LIST = "row", "list"


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        kind: see the module.
        values: ``[B, ...]``, a list of B, or the flat values of all rows, ``[sum of lengths]``.
        fill: what a padded view shows behind a row's end.
    """

    kind: str
    values: Any
    fill: float | int = 0

    @property
    def ragged(self) -> bool:
        """Whether rows have as many values as a length kind says."""
        return self.kind not in (ROW, LIST)


class Batch:
    """Rows with named columns.

    Args:
        columns: by name; arrays ``[B, ...]`` (kind ``row``) or lists (kind ``list``).
        sizes: ``[B]`` int64 by length kind: how many values each row has.

    Raises:
        ValueError: columns differ in their number of rows.
    """

    def __init__(self, columns: Mapping[str, Any] = {}, sizes: Mapping[str, np.ndarray] = {}) -> None:
        self.sizes: dict[str, np.ndarray] = {kind: np.asarray(size) for kind, size in sizes.items()}
        self.columns: dict[str, Column] = {}
        self._padded: dict[str, np.ndarray] = {}
        self._put(None, columns)

    @classmethod
    def _of(cls, columns: dict[str, Column], sizes: dict[str, np.ndarray]) -> Self:
        made = cls.__new__(cls)
        made.columns, made.sizes, made._padded = columns, sizes, {}
        return made

    # -- reading

    def __len__(self) -> int:
        for size in self.sizes.values():
            return len(size)
        for column in self.columns.values():
            return len(column.values)
        return 0

    def __contains__(self, name: object) -> bool:
        return name in self.columns

    def __getitem__(self, name: str) -> Any:
        """A column: a list, an array ``[B, ...]``, or of a ragged one the padded view ``[B, widest]`` (at least 1
        wide).

        Raises:
            KeyError: there is none of that name; lists the names.
        """
        column = self.columns.get(name)
        if column is None:
            raise KeyError(
                f"the batch has no column {name!r}{nearest(name, self.columns)}; it has {', '.join(self.columns)}"
            )
        if not column.ragged:
            return column.values
        if name not in self._padded:
            mask = self.mask_of(column.kind)
            padded = np.full(mask.shape, column.fill, dtype=column.values.dtype)
            padded[mask] = column.values
            padded.flags.writeable = False  # it would change this view and nothing else
            self._padded[name] = padded
        return self._padded[name]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("columns", "sizes"):  # not there yet while it is unpickled
            raise AttributeError(name)
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(error.args[0]) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("columns", "sizes", "_padded"):
            raise AttributeError(f"a batch does not change: `batch.add({name}=...)` gives one with another column")
        object.__setattr__(self, name, value)

    def flat(self, name: str) -> np.ndarray:
        """The values of a ragged column end to end, ``[sum of lengths]``."""
        return self.columns[name].values

    def tensor(self, name: str) -> Tensor:
        """A column, or another of the batch's arrays, as a Paddle tensor."""
        import paddle

        return paddle.to_tensor(getattr(self, name))

    def widest(self, kind: str) -> int:
        """The largest length of a kind, at least 1, so that padded views have a column."""
        return max(1, int(self.sizes[kind].max(initial=0)))

    def mask_of(self, kind: str) -> np.ndarray:
        """``[B, widest]`` bool, where rows have values of a length kind."""
        return np.arange(self.widest(kind)) < self.sizes[kind][:, None]

    def groups(self, name: str) -> list[np.ndarray]:
        """The row numbers of each value of a row column, values in the order of their first row (answers to one
        prompt: ``groups("prompt_index")``).
        """
        _, first, inverse = np.unique(self[name], return_index=True, return_inverse=True)
        return [np.flatnonzero(inverse == number) for number in np.argsort(first, kind="stable")]

    # -- changing: everything gives a new batch of the same class

    def add(self, kind: str | None = None, /, **columns: Any) -> Self:
        """With further columns, or others in their place.

        Args:
            kind: a length kind, where they are padded arrays ``[B, at least the widest]`` whose values behind the rows'
                ends are dropped; None for arrays ``[B, ...]`` and lists.
            columns: by name.

        Raises:
            ValueError: another number of rows, or an array that is narrower than the longest row.
        """
        made = self._of(dict(self.columns), dict(self.sizes))
        made._put(kind, columns)
        return made

    def _put(self, kind: str | None, columns: Mapping[str, Any], fill: float | int = 0) -> None:
        for name, values in columns.items():
            if kind is not None:
                values, mask = np.asarray(values), self.mask_of(kind)
                if (
                    values.ndim != 2
                    or values.shape[0] != len(self)
                    or values.shape[1] < self.sizes[kind].max(initial=0)
                ):
                    raise ValueError(
                        f"column {name}: {values.shape} for {len(self)} rows of up to "
                        f"{int(self.sizes[kind].max(initial=0))} values ({kind})"
                    )
                width = min(values.shape[1], mask.shape[1])
                self.columns[name] = Column(kind, values[:, :width][mask[:, :width]], fill)
                continue
            listed = isinstance(values, list)
            if (self.columns or self.sizes) and len(values) != len(self):
                raise ValueError(f"column {name}: {len(values)} rows in a batch of {len(self)}")
            self.columns[name] = Column(LIST if listed else ROW, values if listed else np.asarray(values))

    def drop(self, *names: str) -> Self:
        """Without some columns."""
        return self._of({n: c for n, c in self.columns.items() if n not in names}, dict(self.sizes))

    def rename(self, names: Mapping[str, str]) -> Self:
        """With columns under other names (``{now: then}``)."""
        return self._of({names.get(n, n): c for n, c in self.columns.items()}, dict(self.sizes))

    def select(self, index: Sequence[int] | np.ndarray) -> Self:
        """The given rows, in the given order."""
        order = np.asarray(index, dtype=np.int64)
        places = {kind: _places(size, order) for kind, size in self.sizes.items()}
        taken = {}
        for name, column in self.columns.items():
            if column.kind == LIST:
                values: Any = [column.values[i] for i in order]
            else:
                values = column.values[places[column.kind] if column.ragged else order]
            taken[name] = Column(column.kind, values, column.fill)
        return self._of(taken, {kind: size[order] for kind, size in self.sizes.items()})

    def split(self, groups: Iterable[Sequence[int] | np.ndarray]) -> list[Self]:
        """One batch for each group of row numbers."""
        return [self.select(group) for group in groups]

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Batches put together, in order.

        Raises:
            ValueError: there is nothing to join, or the parts have other columns than the first.
        """
        if not parts:
            raise ValueError("no batch to join")
        first = parts[0]
        for part in parts[1:]:
            if part.columns.keys() != first.columns.keys():
                differing = sorted(part.columns.keys() ^ first.columns.keys())
                raise ValueError(f"batches with other columns cannot be joined: {', '.join(differing)}")
        joined = {}
        for name, column in first.columns.items():
            values = [part.columns[name].values for part in parts]
            together = sum(values, []) if column.kind == LIST else np.concatenate(values)
            joined[name] = Column(column.kind, together, column.fill)
        lengths = {kind: np.concatenate([part.sizes[kind] for part in parts]) for kind in first.sizes}
        return first._of(joined, lengths)

    def over_ranks(self, world: World) -> Self:
        """The rows of all data ranks, in the ranks' order, on each of them."""
        return self.join(world.all_gather_object(self, "rows of a batch"))

    # -- on disk

    def save(self, stem: Path, **more: Any) -> None:
        """Write ``<stem>.safetensors`` (numbers) and ``<stem>.json`` (lists, kinds), without pickle.

        Args:
            stem: path without suffix.
            more: further JSON values that are kept beside the rows. What JSON does not know is written as text.
        """
        from safetensors.numpy import save_file

        arrays = {f"lengths/{kind}": size for kind, size in self.sizes.items()}
        arrays |= {f"columns/{n}": c.values for n, c in self.columns.items() if c.kind != LIST}
        save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, str(stem.with_suffix(".safetensors")))
        texts = {
            **more,
            "kinds": {name: [column.kind, column.fill] for name, column in self.columns.items()},
            "lists": {name: column.values for name, column in self.columns.items() if column.kind == LIST},
        }
        stem.with_suffix(".json").write_text(json.dumps(texts, ensure_ascii=False, default=_plain), encoding="utf-8")

    @classmethod
    def load(cls, stem: Path) -> tuple[Self, dict[str, Any]]:
        """What :meth:`save` wrote: the batch, and the further values.

        Raises:
            OSError, ValueError, KeyError, SafetensorError: a file is missing or broken.
        """
        from safetensors.numpy import load_file

        texts = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
        arrays = load_file(str(stem.with_suffix(".safetensors")))
        lists = texts.pop("lists")
        columns = {
            name: Column(kind, lists[name] if kind == LIST else arrays[f"columns/{name}"], fill)
            for name, (kind, fill) in texts.pop("kinds").items()
        }
        lengths = {n.removeprefix("lengths/"): a for n, a in arrays.items() if n.startswith("lengths/")}
        return cls._of(columns, lengths), texts


def _places(lengths: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Where the values of the rows ``order`` lie in a flat array of rows of these lengths."""
    starts, sizes = (np.cumsum(lengths) - lengths)[order], lengths[order]
    ends = np.cumsum(sizes)
    return np.arange(int(sizes.sum())) + np.repeat(starts - (ends - sizes), sizes)


def _plain(value: Any) -> Any:
    """What JSON can hold of a value of a data set."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return str(value)
