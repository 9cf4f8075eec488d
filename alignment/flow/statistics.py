"""Sums that become means over all micro batches, windows and ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from alignment.parallel import World


@dataclass
class Statistics:
    """Weighted means, maxima and last values, gathered piece by piece.

    A mean is kept as a sum and a weight, so that joining pieces of any size, from any rank, gives the mean over
    everything.
    """

    sums: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)

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

    def over_ranks(self, world: World) -> Statistics:
        """The same over all ranks, equal on each; ``last`` values are rank 0's."""
        joined = Statistics()
        for part in reversed(world.all_gather_object(self)):
            joined.merge(part)
        return joined

    def result(self) -> dict[str, float]:
        """The figures by name; a mean over nothing is left out."""
        means = {name: total / self.weights[name] for name, total in self.sums.items() if self.weights[name] > 0}
        return {**means, **self.maxima, **self.last}
