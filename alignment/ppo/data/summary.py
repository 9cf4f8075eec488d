"""What became of a data set's rows: kept, dropped and cut, how long they are, how much of them is learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from alignment.errors import some_of

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table

PERCENTILES = ("p50", "p90", "p99", "max")


@dataclass
class SourceSummary:
    """One source of the mixture."""

    name: str
    path: str | None
    proportion: str
    """As the user wrote it."""
    available: int
    """Rows the source holds."""
    duplicates: int
    """Of prompt-only data: prompts that had come before, taken out before mixing. Of others: rows taken whose prompt
    and answers had come before; they stay in.
    """
    taken: int
    """Rows that the proportion took."""
    kept: int
    dropped: dict[str, int] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)
    """Columns (and keys of messages) that hold something and were not read, with the number of rows that have them."""


@dataclass
class DatasetSummary:
    """The account of one tokenised data set: ``rows == kept + sum(dropped.values())``.

    ``lengths`` holds p50, p90, p99 and max of the row lengths in tokens (of a pair, the longer row);
    ``trained_fraction`` is the share of tokens that a loss looks at, None for prompts; ``truncated`` counts kept rows
    that were cut, by kind of cut; ``labels`` the kept rows by their labels (of safety pairs: which answers are safe).
    """

    name: str
    kind: str
    sources: list[SourceSummary]
    rows: int
    kept: int
    dropped: dict[str, int]
    truncated: dict[str, int]
    lengths: dict[str, int]
    tokens: int
    trained_fraction: float | None
    from_cache: bool = False
    labels: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        return asdict(self)

    def render(self) -> Table:
        """Return the summary as a table for ``rich.print``."""
        return summary_table([self])

    def __str__(self) -> str:
        return (
            f"{self.name} ({self.kind}): {self.rows} rows, {self.kept} kept, dropped: {counts_text(self.dropped)}, "
            f"cut: {counts_text(self.truncated)}"
        )


def summary_table(summaries: Sequence[DatasetSummary]) -> Table:
    """Return one table of several data sets: a line per source, a line of totals per data set."""
    from rich.table import Table

    table = Table(title="Data", title_justify="left")
    for column in ("data set", "proportion", "available", "duplicates", "rows", "kept"):
        table.add_column(column, justify="left" if column == "data set" else "right")
    table.add_column("dropped")
    table.add_column("cut")
    table.add_column("tokens " + "/".join(PERCENTILES), justify="right")
    table.add_column("trained", justify="right")
    for summary in summaries:
        share = "-" if summary.trained_fraction is None else f"{summary.trained_fraction:.1%}"
        spread = " ".join(str(summary.lengths[name]) for name in PERCENTILES)
        table.add_row(
            f"{summary.name} ({summary.kind})",
            "",
            str(sum(source.available for source in summary.sources)),
            str(sum(source.duplicates for source in summary.sources)),
            str(summary.rows),
            str(summary.kept),
            counts_text(summary.dropped),
            counts_text(summary.truncated),
            spread,
            share,
            style="bold",
        )
        if summary.labels:
            table.add_row(f"    {counts_text(summary.labels)}")
        for source in summary.sources:
            label = f"  {source.name}" + (f" {source.path}" if source.path else "")
            numbers = [str(value) for value in (source.available, source.duplicates, source.taken, source.kept)]
            table.add_row(label, source.proportion, *numbers, counts_text(source.dropped), "", "", "")
            if source.unread:
                table.add_row(f"    not read: {some_of(source.unread)}")
        table.add_section()
    return table


def counts_text(counts: Mapping[str, int]) -> str:
    """Write ``{"empty answer": 3}`` as ``3 empty answer``; nothing as ``-``."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "-"


def length_percentiles(lengths: np.ndarray) -> dict[str, int]:
    """Return p50, p90, p99 and max of int ``[rows]`` (each a length that occurs)."""
    import numpy as np

    values = np.percentile(lengths, [50, 90, 99, 100], method="higher")
    return {name: int(value) for name, value in zip(PERCENTILES, values, strict=True)}
