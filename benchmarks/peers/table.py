"""From the figures of all rounds to medians, ratios and the table; pure functions, standard library only."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MIB = 1 << 20


@dataclass(frozen=True)
class Comparison:
    """One line of the table.

    Attributes:
        name: what was done, as ``"rollout W1, batch 16"``.
        unit: of the figures.
        higher_is_better: for rates; False for seconds and bytes.
        ours, peer: a figure per round (or per iteration of all rounds); empty where that side was not measured.
        why: what stands in place of a missing figure of ours.
    """

    name: str
    unit: str
    higher_is_better: bool
    ours: tuple[float, ...]
    peer: tuple[float, ...]
    why: str = ""

    def figures(self) -> dict[str, Any]:
        """``ours`` and ``peer`` with ``best`` and ``median``; ``ratio``: how many times better ours is, of the medians
        and of the best (None without both sides).
        """
        sides = {side: summary(values, self.higher_is_better) for side, values in self.sides().items()}
        ratio = {kind: self._ratio(sides, kind) for kind in ("median", "best")}
        return {"unit": self.unit, **sides, "ratio": ratio, **({"why": self.why} if self.why else {})}

    def sides(self) -> dict[str, tuple[float, ...]]:
        """Both sides' figures by name."""
        return {"ours": self.ours, "peer": self.peer}

    def _ratio(self, sides: Mapping[str, Mapping[str, float] | None], kind: str) -> float | None:
        ours, peer = sides["ours"], sides["peer"]
        if ours is None or peer is None:
            return None
        return ours[kind] / peer[kind] if self.higher_is_better else peer[kind] / ours[kind]


def summary(values: Sequence[float], higher_is_better: bool) -> dict[str, float] | None:
    """Best and median and how many there are; None without any."""
    if not values:
        return None
    best = max(values) if higher_is_better else min(values)
    return {"best": best, "median": statistics.median(values), "count": len(values)}


def best_of_both(name: str, comparisons: Sequence[Comparison]) -> Comparison | None:
    """Each side with the setting (of several compared ones) in which its median is best; None where a side is missing.

    A user would choose the setting, so this is the comparison that counts.
    """
    chosen: dict[str, tuple[float, ...]] = {}
    for side in ("ours", "peer"):
        candidates = [c.sides()[side] for c in comparisons if c.sides()[side]]
        if not candidates:
            return None
        pick = max if comparisons[0].higher_is_better else min
        chosen[side] = pick(candidates, key=statistics.median)
    first = comparisons[0]
    return Comparison(name, first.unit, first.higher_is_better, chosen["ours"], chosen["peer"])


def render(comparisons: Sequence[Comparison]) -> str:
    """The table: medians with the best in brackets, and how many times better ours is."""
    head = ["", "unit", "ours: median (best)", "peer: median (best)", "ours is better by: median (best)"]
    rows = [head]
    for comparison in comparisons:
        figures = comparison.figures()
        cells = [
            f"{shown(figures[side]['median'])} ({shown(figures[side]['best'])})" if figures[side] else "-"
            for side in ("ours", "peer")
        ]
        if comparison.why:
            cells[0] = comparison.why
        ratio = figures["ratio"]
        last = f"{ratio['median']:.2f}x ({ratio['best']:.2f}x)" if ratio["median"] is not None else ""
        rows.append([comparison.name, comparison.unit, *cells, last])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                row[1].ljust(widths[1]),
                *(c.rjust(n) for c, n in zip(row[2:], widths[2:], strict=True)),
            ]
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def shown(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"
