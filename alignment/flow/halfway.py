"""A rollout in the middle of its update, on disk: what a checkpoint between two optimizer steps of one update holds
beside the models.

``trainer/rollout.safetensors`` has the arrays of the :class:`~alignment.rollout.rollout.Experience` (the rows of all
data ranks: they are the same on every process), ``trainer/rollout.json`` its texts, the position in its passes and the
figures that wait to be logged. Nothing in it depends on the layout. The orders of the passes are not in it: they follow
from the seed and the rollout's number.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from alignment.errors import CheckpointError
from alignment.flow.statistics import Statistics
from alignment.ppo.update import Position
from alignment.rollout.rollout import Experience, Rollout

ARRAYS_FILE = "rollout.safetensors"
TEXTS_FILE = "rollout.json"
_PARTS = "score_parts/"
_TEXTS = ("prompts", "responses", "rows")


@dataclass
class HalfUsed:
    """An experience that was learnt from in part.

    Attributes:
        experience: the rows of all data ranks.
        position: where its update goes on.
        first_step: optimizer steps that the run had taken before this update.
        rollout_stats: the rollout's figures, which go into every row of this update.
        rows: ``(step, figures)`` of this update that wait to be written.
    """

    experience: Experience
    position: Position
    first_step: int
    rollout_stats: Statistics
    rows: list[tuple[int, Statistics]] = field(default_factory=list)


def save_half_used(folder: Path, half: HalfUsed) -> None:
    """Write it; for the main process.

    Args:
        folder: ``trainer/`` of a checkpoint that is being written.
        half: further columns of the data set that JSON does not know are written as text: they were needed to score
            the answers, which is done.
    """
    from safetensors.numpy import save_file

    experience, rollout = half.experience, half.experience.rollout
    arrays = {f.name: getattr(rollout, f.name) for f in fields(Rollout) if f.name not in _TEXTS}
    arrays = {f"rollout/{name}": array for name, array in arrays.items() if array is not None}
    for name in _experience_arrays():
        arrays[name] = getattr(experience, name)
    arrays.update({f"{_PARTS}{name}": part for name, part in experience.score_parts.items()})
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, str(folder / ARRAYS_FILE))
    texts = {
        "position": asdict(half.position),
        "first_step": half.first_step,
        "rollout_stats": asdict(half.rollout_stats),
        "waiting_rows": [[step, asdict(stats)] for step, stats in half.rows],
        **{name: getattr(rollout, name) for name in _TEXTS},
    }
    (folder / TEXTS_FILE).write_text(json.dumps(texts, ensure_ascii=False, default=_plain), encoding="utf-8")


def load_half_used(folder: Path) -> HalfUsed | None:
    """Read what :func:`save_half_used` wrote; every process calls it.

    Args:
        folder: ``trainer/`` of a checkpoint that was verified.

    Returns:
        The half-used rollout; ``None`` in a checkpoint between two rollouts. In one that was written before
        ``sampler_logprobs`` were kept they are ``logprobs``: exact where top-k, top-p, the repetition penalty and the
        shortest length were off.

    Raises:
        CheckpointError: a file is missing or cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    file = folder / TEXTS_FILE
    if not file.exists() and not (folder / ARRAYS_FILE).exists():
        return None
    try:
        texts = json.loads(file.read_text(encoding="utf-8"))
        arrays = load_file(str(folder / ARRAYS_FILE))
        parts = {name.removeprefix(_PARTS): array for name, array in arrays.items() if name.startswith(_PARTS)}
        of_rollout = {
            name.removeprefix("rollout/"): array for name, array in arrays.items() if name.startswith("rollout/")
        }
        if "sampler_logprobs" not in of_rollout:
            # written before it was kept: what such runs used in its place, and the same where nothing was cut off
            of_rollout["sampler_logprobs"] = of_rollout["logprobs"].copy()
        rollout = Rollout(**of_rollout, **{name: texts[name] for name in _TEXTS})
        figures = {name: arrays[name] for name in _experience_arrays()}
        return HalfUsed(
            experience=Experience(rollout=rollout, score_parts=parts, **figures),
            position=Position(**texts["position"]),
            first_step=int(texts["first_step"]),
            rollout_stats=Statistics(**texts["rollout_stats"]),
            rows=[(int(step), Statistics(**stats)) for step, stats in texts["waiting_rows"]],
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: the half-used rollout ({TEXTS_FILE}, {ARRAYS_FILE}) cannot be read: {error!r}"
        ) from error


def _experience_arrays() -> list[str]:
    return [f.name for f in fields(Experience) if f.name not in ("rollout", "score_parts")]


def _plain(value: Any) -> Any:
    """What JSON can hold of a value of a data set."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return str(value)
