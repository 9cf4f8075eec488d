"""How evaluation goes over its rows."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from alignment.flow import stage_trainer as loop
from alignment.flow.stage_trainer import StageTrainer
from alignment.parallel import World


class Rows:
    """An engine and a stage in one; they only count."""

    name = "test"
    trainable = False
    evaluates_first = False

    def __init__(self) -> None:
        self.waiting = self.most_waiting = self.padding = 0
        self.seen: list[int] = []
        self.engine = self.model = self

    def eval(self) -> None: ...

    in_passes = staticmethod(nullcontext)

    def row_tokens(self, row: np.ndarray) -> int:
        return len(row)

    def collate(self, rows: list[np.ndarray]) -> dict[str, Any]:
        self.waiting += 1
        self.most_waiting = max(self.most_waiting, self.waiting)
        longest = max(map(len, rows))
        self.padding += sum(longest - len(row) for row in rows)
        return {"rows": rows}

    def infer_pass(self, batches: list[dict[str, Any]], rows: Any, measure: Any) -> list[Any]:
        self.waiting -= len(batches)
        self.seen += [int(row[0]) for batch in batches for row in batch["rows"]]
        return [measure(None, batch) for batch in batches]

    def rows(self, batch: Any) -> None: ...

    def loss(self, hidden: Any, batch: dict[str, Any]) -> tuple[float, dict[str, float]]:
        return float(sum(row.sum() for row in batch["rows"])), {}

    def count(self, batch: dict[str, Any]) -> int:
        return sum(map(len, batch["rows"]))

    def metrics(self, stats: Any) -> dict[str, float]:
        return {}


@pytest.mark.parametrize("budget", [0, 60])
def test_evaluation_collates_a_few_batches_at_a_time_and_pads_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """D31: all batches were collated before the first forward, in the data's order."""
    monkeypatch.setattr(loop, "EVALUATION_BATCHES", 3)
    rng = np.random.default_rng(0)
    rows = [np.full(rng.integers(1, 40), number) for number in range(100)]
    stage = Rows()
    args = SimpleNamespace(
        output_dir=tmp_path,
        save_total_limit=1,
        per_device_eval_batch_size=4,
        max_tokens_per_micro_batch=budget,
        disable_tqdm=True,
    )
    trainer = StageTrainer(stage, args, World(), None, rows)  # type: ignore[arg-type]
    ignore = lambda *args, **kwargs: None  # noqa: E731
    trainer.writer = SimpleNamespace(log=ignore, write=ignore, pause=ignore)  # type: ignore[assignment]
    assert trainer.evaluate()["loss"] == pytest.approx(sum(row.sum() for row in rows) / sum(map(len, rows)))
    assert sorted(stage.seen) == list(range(100)) and stage.waiting == 0
    assert stage.most_waiting == 3
    assert stage.padding < 0.1 * sum(map(len, rows))
