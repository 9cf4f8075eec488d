"""metrics.jsonl, its backends and the lines on screen."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from alignment.errors import ArgumentsError
from alignment.flow.metrics import MetricWriter, backend_names, read_metrics
from alignment.parallel import Topology, World
from alignment.tally import format_seconds


def arguments(**values: object) -> SimpleNamespace:
    return SimpleNamespace(**{"disable_tqdm": True, "report_to": [], "logging_dir": None, **values})


def test_rows_are_strict_json(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path, arguments(), World(), 10)
    writer.log(
        1,
        {"train/loss": np.float32(0.5), "bad": float("nan"), "worse": float("inf"), "n": 3, "what": "text"},
        epoch=0.1,
    )
    writer.close()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    (row,) = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert row.pop("time") > 0
    assert row == {
        "step": 1,
        "epoch": 0.1,
        "train/loss": 0.5,
        "bad": None,
        "worse": None,
        "n": 3,
        "what": "text",
        "nonfinite": ["bad", "worse"],
    }


def test_resume_cuts_rows_after_the_resumed_step(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path, arguments(), World(), 10)
    for step in range(1, 6):
        writer.log(step, {"x": step})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 6, "x"')  # a line that a crash cut short
    writer = MetricWriter(tmp_path, arguments(), World(), 10, start_step=3)
    writer.log(4, {"x": 40})
    writer.close()
    assert [(row["step"], row["x"]) for row in read_metrics(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    MetricWriter(tmp_path, arguments(), World(), 10).close()
    assert read_metrics(tmp_path) == []


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path / "run", arguments(report_to=["visualdl"]), World(Topology(2, 1)), 10)
    writer.advance(1, 5)
    writer.log(1, {"x": 1.0})
    writer.write("text")
    writer.close()
    assert not (tmp_path / "run").exists()


def test_the_plain_line_has_rate_and_remaining_time(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path, arguments(), World(), 10)
    writer.advance(4, tokens=400)
    line = writer.line(4, {"train/loss": 0.25, "train/tokens_per_second": 1.0})
    writer.close()
    assert line.startswith("step 4/10: loss 0.25, ")
    assert "steps/s" in line and "tokens/s" in line and line.endswith(" left")
    rates = writer.rates()
    assert rates["tokens_per_second"] == pytest.approx(100 * rates["steps_per_second"])
    assert rates["remaining_seconds"] == pytest.approx(6 / rates["steps_per_second"])


def test_the_bar_shows_rate_and_remaining_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = MetricWriter(tmp_path, arguments(disable_tqdm=False), World(), 10)
    for step in range(1, 11):
        writer.advance(step, tokens=7)
    writer.log(10, {"train/loss": 0.125})
    writer.close()
    shown = capsys.readouterr().err
    assert "10/10" in shown and "loss=0.125" in shown and "tok/s=" in shown and "step/s" in shown


def test_visualdl_gets_the_scalars(tmp_path: Path) -> None:
    from visualdl import LogReader

    writer = MetricWriter(tmp_path, arguments(report_to=["visualdl"]), World(), 10)
    writer.log(1, {"train/loss": 0.5, "bad": float("nan")})
    writer.log(2, {"train/loss": 0.25})
    writer.close()
    (file,) = (tmp_path / "runs").iterdir()
    data = LogReader(file_path=str(file)).get_data("scalar", "train/loss")
    assert [(row.id, row.value) for row in data] == [(1, 0.5), (2, 0.25)]


@pytest.mark.parametrize(
    ("name", "modules", "message"),
    [
        ("tensorboard", ["tensorboardX", "torch.utils.tensorboard"], "pip install tensorboardX"),
        ("wandb", ["wandb"], "pip install wandb"),
        ("visualdl", ["visualdl"], "pip install visualdl"),
    ],
)
def test_a_missing_backend_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, modules: list[str], message: str
) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ArgumentsError, match=message):
        MetricWriter(tmp_path, arguments(report_to=[name]), World(), 10)


def test_backend_names() -> None:
    """``report_to`` is read by the parser alone; "all" means what is installed."""
    assert backend_names([]) == [] and backend_names(["visualdl", "wandb"]) == ["visualdl", "wandb"]
    assert "visualdl" in backend_names(["all"])


def test_format_seconds() -> None:
    assert [format_seconds(s) for s in (0, 61, 3723)] == ["00:00", "01:01", "1:02:03"]
