"""Sums that become means over all micro batches, windows and ranks: a mean of means is wrong as soon as they differ in
size, so nothing is averaged before everything is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from alignment.parallel import World


@dataclass
class Statistics:
    """Weighted means, maxima, last values, plain totals and rows, gathered piece by piece.

    A mean is kept as a sum and a weight, so that joining pieces of any size, from any rank, gives the mean over
    everything. Totals (numbers that add up) and arrays (rows that are joined along axis 0) are not figures themselves:
    a method makes its own of them.
    """

    sums: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, raw: Mapping[str, float | np.ndarray]) -> Statistics:
        """Of numbers that add up and arrays that are joined."""
        made = cls()
        for name, value in raw.items():
            if isinstance(value, np.ndarray):
                made.arrays[name] = value
            else:
                made.totals[name] = float(value)
        return made

    def raw(self) -> dict[str, float | np.ndarray]:
        """The totals and arrays together."""
        return {**self.totals, **self.arrays}

    def to_json(self) -> dict[str, dict[str, Any]]:
        """As JSON values; what is empty is left out."""
        kinds = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name)}
        if "arrays" in kinds:
            kinds["arrays"] = {name: [str(array.dtype), array.tolist()] for name, array in self.arrays.items()}
        return kinds

    @classmethod
    def from_json(cls, values: Mapping[str, Mapping[str, Any]]) -> Statistics:
        """Undo :meth:`to_json`."""
        made = cls(**{kind: dict(named) for kind, named in values.items() if kind != "arrays"})
        for name, (dtype, rows) in values.get("arrays", {}).items():
            made.arrays[name] = np.asarray(rows, dtype=dtype)
        return made

    def add(self, name: str, total: float, weight: float) -> None:
        """Count ``total``, a sum over ``weight`` things, towards the mean ``name``."""
        self.sums[name] = self.sums.get(name, 0.0) + float(total)
        self.weights[name] = self.weights.get(name, 0.0) + float(weight)

    def maximum(self, name: str, value: float) -> None:
        """Count ``value`` towards the maximum ``name``."""
        self.maxima[name] = float(np.maximum(self.maxima.get(name, -np.inf), value))  # NaN stays NaN

    def set(self, name: str, value: float) -> None:
        """Remember the newest value (a learning rate, a coefficient)."""
        self.last[name] = float(value)

    def merge(self, other: Statistics) -> None:
        """Take in another's pieces."""
        for name, total in other.sums.items():
            self.add(name, total, other.weights[name])
        for name, value in other.maxima.items():
            self.maximum(name, value)
        self.last.update(other.last)
        for name, value in other.totals.items():
            self.totals[name] = self.totals.get(name, 0.0) + value
        for name, rows in other.arrays.items():
            self.arrays[name] = np.concatenate([self.arrays[name], rows]) if name in self.arrays else rows

    def over_ranks(self, world: World) -> Statistics:
        """The same over all ranks, equal on each; ``last`` values are rank 0's."""
        joined, parts = Statistics(), world.all_gather_object(self)
        for part in reversed(parts):
            joined.merge(part)
        for name in joined.arrays:
            joined.arrays[name] = np.concatenate([part.arrays[name] for part in parts if name in part.arrays])
        return joined

    def result(self) -> dict[str, float]:
        """The figures by name; a mean over nothing is left out."""
        means = {name: total / self.weights[name] for name, total in self.sums.items() if self.weights[name] > 0}
        return {**means, **self.maxima, **self.last}
