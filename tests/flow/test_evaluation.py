"""How evaluation goes over its rows."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from alignment.flow import row_method
from alignment.flow.row_method import RowMethod
from alignment.parallel import World


class Rows(RowMethod):
    """A method and its engine in one; they only count."""

    name = title = "test"
    trainable = False

    def __init__(self, args: Any, rows: list[np.ndarray]) -> None:
        super().__init__(args)
        self.waiting = self.most_waiting = self.padding = 0
        self.seen: list[int] = []
        self.engine = self.model = self  # type: ignore[assignment]
        self.world, self.eval_rows = World(), rows

    def build_data(self, *args: Any) -> Any: ...

    def load_model(self, world: Any) -> Any: ...

    def eval(self) -> None: ...

    in_passes = staticmethod(nullcontext)

    def row_tokens(self, row: np.ndarray) -> int:
        return len(row)

    def collate(self, rows: list[np.ndarray]) -> dict[str, Any]:  # type: ignore[override]
        self.waiting += 1
        self.most_waiting = max(self.most_waiting, self.waiting)
        longest = max(map(len, rows))
        self.padding += sum(longest - len(row) for row in rows)
        return {"rows": rows}

    def infer_pass(self, batches: list[dict[str, Any]], rows: Any, measure: Any) -> list[Any]:
        self.waiting -= len(batches)
        self.seen += [int(row[0]) for batch in batches for row in batch["rows"]]
        return [measure(None, batch) for batch in batches]

    def rows(self, batch: Any) -> None: ...  # type: ignore[override]

    def loss(self, hidden: Any, batch: dict[str, Any]) -> tuple[float, dict[str, float]]:  # type: ignore[override]
        return float(sum(row.sum() for row in batch["rows"])), {}

    def count(self, batch: dict[str, Any]) -> int:
        return sum(map(len, batch["rows"]))


@pytest.mark.parametrize("budget", [0, 60])
def test_evaluation_collates_a_few_batches_at_a_time_and_pads_little(
    monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """D31: all batches were collated before the first forward, in the data's order."""
    monkeypatch.setattr(row_method, "EVALUATION_BATCHES", 3)
    rng = np.random.default_rng(0)
    rows = [np.full(rng.integers(1, 40), number) for number in range(100)]
    args = SimpleNamespace(per_device_eval_batch_size=4, max_tokens_per_micro_batch=budget, disable_tqdm=True)
    method = Rows(args, rows)
    assert method.measure()["loss"] == pytest.approx(sum(row.sum() for row in rows) / sum(map(len, rows)))
    assert sorted(method.seen) == list(range(100)) and method.waiting == 0
    assert method.most_waiting == 3
    assert method.padding < 0.1 * sum(map(len, rows))
