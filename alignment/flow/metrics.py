"""Metrics to ``metrics.jsonl``, the progress bar (or plain lines), VisualDL, TensorBoard and Weights & Biases.

    writer = MetricWriter(output_dir, args, world, total_steps, start_step=resumed_step)
    writer.advance(step, tokens=1234)                        # after every step: moves the bar, feeds the rates
    writer.log(step, {"train/loss": 0.7, ...}, epoch=0.5)    # one row, every backend
    writer.close()

``metrics.jsonl`` holds one JSON object per line: ``step``, ``epoch`` (null where unknown), ``time`` (Unix seconds),
then the values, flat. A value that is NaN or infinite is written as null and its name listed under ``nonfinite``: the
file is always strict JSON.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from alignment.errors import ArgumentsError, CheckpointError
from alignment.flow.checkpoint import disk_errors
from alignment.log import get_logger
from alignment.parallel import World
from alignment.paths import METRICS_FILE
from alignment.tally import format_seconds


class Backend(Protocol):
    """Somewhere that scalars go."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Take the finite values of one row."""

    def close(self) -> None:
        """Flush and end."""


class VisualDLBackend:
    """VisualDL, Paddle's own viewer (``visualdl --logdir FOLDER``)."""

    def __init__(self, folder: str) -> None:
        try:
            from visualdl import LogWriter
        except ImportError as error:
            raise ArgumentsError(
                f'report_to "visualdl": not importable ({error}); pip install visualdl, or set report_to to "none"'
            ) from error
        self._writer = LogWriter(logdir=folder)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(tag=name, step=step, value=value)

    def close(self) -> None:
        self._writer.close()


class TensorBoardBackend:
    """TensorBoard, through tensorboardX or torch's writer."""

    def __init__(self, folder: str) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ArgumentsError(
                    'report_to "tensorboard": not installed; pip install tensorboardX (and tensorboard to look at it)'
                ) from None
        self._writer = SummaryWriter(folder)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbBackend:
    """Weights & Biases; project and run name come from its own variables (WANDB_PROJECT, WANDB_NAME, WANDB_MODE)."""

    def __init__(self, folder: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ArgumentsError('report_to "wandb": wandb is not installed; pip install wandb') from None
        self._run = wandb.init(dir=folder, config=dict(config), project=os.environ.get("WANDB_PROJECT", "alignment"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def backend_names(report_to: Sequence[str]) -> list[str]:
    """The backends that ``report_to`` means, as the parser reads it: "all" is every one that is installed."""
    if "all" not in report_to:
        return list(report_to)
    from importlib.util import find_spec

    modules = {"visualdl": "visualdl", "tensorboard": "tensorboardX", "wandb": "wandb"}
    return [name for name, module in modules.items() if find_spec(module)]


class MetricWriter:
    """The run's metrics. Only the main process writes and shows; on the others every method does nothing.

    Args:
        output_dir: where ``metrics.jsonl`` goes.
        args: the stage's arguments: ``disable_tqdm``, ``report_to``, ``logging_dir``, ``to_dict()``; missing attributes
            take their defaults.
        world: the processes of the run.
        total_steps: length of the bar.
        start_step: the step that the run resumes from; rows of later steps are removed from ``metrics.jsonl``. 0 starts
            the file anew.
        last_row: remove rows of later steps than this instead: what follows is written again.
        bar_keys: names that the bar and the plain lines show; by default a bar shows the first four of a row and a
            line all. A row that has none of them (an evaluation's) is shown as if there were no choice.
        unit: what one step is called in the bar.

    Raises:
        ArgumentsError: a backend in ``report_to`` is not installed.
        CheckpointError: the file cannot be written.
    """

    def __init__(
        self,
        output_dir: str | Path,
        args: Any,
        world: World,
        total_steps: int,
        *,
        start_step: int = 0,
        last_row: int | None = None,
        bar_keys: tuple[str, ...] = (),
        unit: str = "step",
    ) -> None:
        self.path = Path(output_dir) / METRICS_FILE
        self.total_steps, self.start_step, self._bar_keys, self._unit = total_steps, start_step, bar_keys, unit
        self._active = world.is_main
        self._backends: list[Backend] = []
        self._bar: Any = None
        self._begin = time.monotonic()
        self._paused = 0.0
        self._tokens = 0
        self._step = start_step
        names = backend_names(getattr(args, "report_to", None) or [])
        if not self._active:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            truncate_metrics(self.path, (start_step or -1) if last_row is None else last_row)
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  (lives as long as the run)
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self.path}: {error.strerror or error}; choose another output_dir"
            ) from error
        folder = str(getattr(args, "logging_dir", None) or Path(output_dir) / "runs")
        makers = {
            "visualdl": lambda: VisualDLBackend(folder),
            "tensorboard": lambda: TensorBoardBackend(folder),
            "wandb": lambda: WandbBackend(str(output_dir), args.to_dict() if hasattr(args, "to_dict") else {}),
        }
        self._backends = [makers[name]() for name in names]
        if not getattr(args, "disable_tqdm", False):
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, initial=start_step, unit=unit, dynamic_ncols=True, file=sys.stderr)

    def advance(self, step: int, tokens: int = 0) -> None:
        """Tell that step ``step`` is done and that it processed ``tokens`` tokens over all ranks."""
        if not self._active:
            return
        self._tokens += tokens
        if self._bar is not None:
            self._bar.update(step - self._step)
        self._step = step

    def log(self, step: int, values: Mapping[str, Any], *, epoch: float | None = None, echo: bool = True) -> None:
        """Write one row.

        Args:
            step: optimizer step (PPO: iteration).
            values: names to numbers; anything with ``float()`` that is not a bool, int or str becomes a float. Strings
                stay in the file alone.
            epoch: passes over the data so far.
            echo: also show it: on the bar, or as a plain line where the bar is off.
        """
        if not self._active:
            return
        row: dict[str, Any] = {
            "step": int(step),
            "epoch": None if epoch is None else round(float(epoch), 6),
            "time": round(time.time(), 3),
        }
        bad, scalars = [], {}
        for name, value in values.items():
            if value is None or isinstance(value, (bool, str)):
                row[name] = value
                continue
            number: float = value if isinstance(value, int) else float(value)
            if math.isfinite(number):
                row[name] = scalars[name] = number
            else:
                row[name] = None
                bad.append(name)
        if bad:
            row["nonfinite"] = bad
        with disk_errors(self.path):
            self._file.write(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n")
            self._file.flush()
            for backend in self._backends:
                backend.scalars(step, scalars)
        if not echo:
            return
        if self._bar is not None:
            keys = [key for key in self._bar_keys if key in scalars] or list(scalars)[:4]
            shown = {key.rsplit("/", 1)[-1]: f"{scalars[key]:.4g}" for key in keys}
            if self._tokens:
                shown["tok/s"] = f"{self.rates()['tokens_per_second']:.0f}"
            self._bar.set_postfix(shown)
        else:
            chosen = {key: scalars[key] for key in scalars if not self._bar_keys or key in self._bar_keys}
            get_logger().info(self.line(step, chosen or scalars))

    def write(self, text: str) -> None:
        """Print ``text`` on the main process without tearing the bar."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def rates(self) -> dict[str, float]:
        """``steps_per_second``, ``tokens_per_second`` and ``remaining_seconds`` since this process began (pauses left
        out).
        """
        elapsed = max(1e-9, time.monotonic() - self._begin - self._paused)
        steps = (self._step - self.start_step) / elapsed
        left = (self.total_steps - self._step) / steps if steps > 0 else math.inf
        return {"steps_per_second": steps, "tokens_per_second": self._tokens / elapsed, "remaining_seconds": left}

    def pause(self, seconds: float) -> None:
        """Leave ``seconds`` (an evaluation, a save) out of the rates."""
        self._paused += seconds

    def line(self, step: int, values: Mapping[str, float]) -> str:
        """The plain line of one row: step, values, rate and remaining time."""
        rates = self.rates()
        shown = {name: value for name, value in values.items() if not name.endswith("_per_second")}
        parts = [f"{name.removeprefix('train/')} {value:.4g}" for name, value in shown.items()]
        parts.append(f"{rates['steps_per_second']:.3g} {self._unit}s/s")
        if self._tokens:
            parts.append(f"{rates['tokens_per_second']:.0f} tokens/s")
        if math.isfinite(rates["remaining_seconds"]):
            parts.append(f"{format_seconds(rates['remaining_seconds'])} left")
        return f"{self._unit} {step}/{self.total_steps}: " + ", ".join(parts)

    def close(self) -> None:
        """Close files, backends and the bar; further calls do nothing."""
        if not self._active:
            return
        self._active = False
        if self._bar is not None:
            self._bar.close()
        with disk_errors(self.path):
            self._file.close()
        for backend in self._backends:
            backend.close()


def truncate_metrics(path: Path, last_step: int) -> None:
    """Remove from a ``metrics.jsonl`` the rows after step ``last_step`` (all of them for -1) and a last line that was
    cut short.
    """
    if not path.exists():
        return
    kept = []
    if last_step >= 0:
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row.get("step", 0) <= last_step:
                kept.append(line + "\n")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a ``metrics.jsonl`` (a folder means the file in it)."""
    path = Path(path)
    if path.is_dir():
        path = path / METRICS_FILE
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
