"""A batch in the middle of its update, on disk: what a checkpoint between two optimizer steps of one update holds
beside the models.

``trainer/rollout.safetensors`` has the numbers of the rows of all data ranks (they are the same on every process),
``trainer/rollout.json`` their texts, the position in the passes and the figures that wait to be logged. Nothing in it
depends on the layout. The orders of the passes are not in it: they follow from the seed and the batch's number.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alignment.errors import CheckpointError
from alignment.flow.statistics import Statistics
from alignment.flow.update import Position
from alignment.rollout.rollout import Experience, Rollout

ARRAYS_FILE = "rollout.safetensors"
TEXTS_FILE = "rollout.json"


@dataclass
class HalfUsed:
    """A batch that was learnt from in part.

    Attributes:
        batch: the rows of all data ranks.
        position: where its update goes on.
        first_step: optimizer steps that the run had taken before this update.
        figures: of the iteration, which go into every row of this update.
        rows: ``(step, figures)`` of this update that wait to be written.
        call: the training call's name.
    """

    batch: Experience
    position: Position
    first_step: int
    figures: Statistics
    rows: list[tuple[int, Statistics]] = field(default_factory=list)
    call: str = "update"


def save_half_used(folder: Path, half: HalfUsed) -> None:
    """Write it; for the main process.

    Args:
        folder: ``trainer/`` of a checkpoint that is being written.
        half: further columns of the data set that JSON does not know are written as text: they were needed to score
            the answers, which is done.
    """
    half.batch.save(
        folder / "rollout",
        position=asdict(half.position),
        first_step=half.first_step,
        rollout_stats=half.figures.to_json(),
        call=half.call,
        waiting_rows=[[step, stats.to_json()] for step, stats in half.rows],
    )


def load_half_used(folder: Path) -> HalfUsed | None:
    """Read what :func:`save_half_used` wrote; every process calls it.

    Args:
        folder: ``trainer/`` of a checkpoint that was verified.

    Returns:
        The half-used rollout; ``None`` in a checkpoint between two rollouts. In files from before rollouts had a
        ``sampler_logprobs`` it is ``rollout_logprobs``: exact where top-k, top-p, the repetition penalty and the
        shortest length were off, and what such a run went by in any case.

    Raises:
        CheckpointError: a file is missing or cannot be read.
    """
    from safetensors import SafetensorError

    if not (folder / TEXTS_FILE).exists() and not (folder / ARRAYS_FILE).exists():
        return None
    try:
        texts = json.loads((folder / TEXTS_FILE).read_text(encoding="utf-8"))
        if "kinds" in texts:
            batch, texts = Experience.load(folder / "rollout")
        else:
            batch = _from_before(folder / ARRAYS_FILE, texts)
        return HalfUsed(
            batch=batch,
            position=Position(**texts["position"]),
            first_step=int(texts["first_step"]),
            figures=Statistics.from_json(texts["rollout_stats"]),
            rows=[(int(step), Statistics.from_json(stats)) for step, stats in texts["waiting_rows"]],
            call=texts.get("call", "update"),
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: the half-used rollout ({TEXTS_FILE}, {ARRAYS_FILE}) cannot be read: {error!r}"
        ) from error


def _from_before(file: Path, texts: dict[str, Any]) -> Experience:
    """Of files from before a rollout was a batch: padded arrays, those of the rollout and of the scores' parts under
    ``rollout/`` and ``score_parts/``.
    """
    from safetensors.numpy import load_file

    arrays: dict[str, dict[str, Any]] = {"rollout": {}, "score_parts": {}, "": {}}
    for name, array in load_file(str(file)).items():
        group, _, own = name.partition("/")
        arrays[group if own else ""][own or name] = array
    rollout = arrays["rollout"]
    rollout.setdefault("sampler_logprobs", rollout["logprobs"])
    lists = {name: texts[name] for name in ("prompts", "responses", "rows")}
    return Experience(Rollout(**rollout, **lists), arrays["score_parts"], **arrays[""])
