"""A run's state on disk: ``checkpoint-N/{policy,value,...,trainer}``.

There is no state of random number generators in it, because none has any: every random number follows from a key. The
sampler's is (seed, prompt's number, answer's number, position), the order of a pass over a batch (seed, batch's number,
pass), the order of prompts and supervised rows (seed, epoch). So a run draws the same numbers after a restart and on
any layout; the positions below are all there is to remember.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alignment.engine.engine import Engine
from alignment.errors import CheckpointError
from alignment.flow.halfway import HalfUsed, save_half_used

STATE_FILE = "trainer_state.json"


@dataclass
class LoopState:
    """Where a run stands. In the middle of an update there is a :class:`~alignment.flow.halfway.HalfUsed` besides.

    Attributes:
        global_step: optimizer steps taken (early-stopped ones counted as far as they went).
        rollouts: iterations done; the number of the one in work.
        position: of the feed, in the stream of prompts or rows.
        ptx_position: position in the stream of supervised rows.
        method: what the method remembers.
        best_value: the best ``metric_for_best_model`` so far, or ``None``.
        best_step: the step it was reached at, -1 before.
        without_improvement: evaluations since then.
        stopped: whether ``early_stopping_patience`` has ended the run.
        evaluated_at: the step of the last evaluation, -1 before.
        pending: figures of optimizer steps since the last row (:class:`~alignment.flow.statistics.Statistics`).
        timer: seconds and tokens of phases since the last row (:class:`~alignment.flow.flow.PhaseTimer`).
        rng: what the random numbers follow from, for people and other tools.
    """

    global_step: int = 0
    rollouts: int = 0
    position: int = 0
    ptx_position: int = 0
    method: dict[str, Any] = field(default_factory=dict)
    best_value: float | None = None
    best_step: int = -1
    without_improvement: int = 0
    stopped: bool = False
    evaluated_at: int = -1
    pending: dict[str, dict[str, float]] = field(default_factory=dict)
    timer: dict[str, dict[str, float]] = field(default_factory=dict)
    rng: dict[str, Any] = field(default_factory=dict)


def save_state(
    folder: Path,
    state: LoopState,
    engines: Mapping[str, Engine],
    save_extras: Callable[[Path], None],
    half_used: HalfUsed | None = None,
) -> None:
    """Write everything that a run needs to go on; every process calls it, the main one writes.

    Args:
        folder: an empty folder; it becomes a checkpoint when the caller renames it.
        state: the counters and small states.
        engines: those whose weights change, by the name of their folder; those that are trained have an optimizer.
        save_extras: writes tokenizer and template into a model's folder.
        half_used: the rows in work, in the middle of an update.
    """
    trainer = folder / "trainer"
    main = next(iter(engines.values())).world.is_main
    for name, engine in engines.items():
        target = folder / name
        if main:
            target.mkdir()
            save_extras(target)
        engine.save_weights(target)
    if main:
        trainer.mkdir()
        (trainer / STATE_FILE).write_text(json.dumps(asdict(state), indent=2), encoding="utf-8")
        if half_used is not None:
            save_half_used(trainer, half_used)
    for engine in engines.values():
        if engine.trainable:
            engine.save_state(trainer / f"{engine.name}_optimizer.safetensors")


def load_state(folder: Path, engines: Mapping[str, Engine]) -> LoopState:
    """Read what :func:`save_state` wrote.

    Args:
        folder: a checkpoint that was verified.
        engines: get their weights and optimizers.

    Returns:
        The counters and small states.

    Raises:
        CheckpointError: something is missing, unreadable or belongs to another model.
    """
    state = read_state(folder)
    for name, engine in engines.items():
        engine.load_weights(folder / name)
    for engine in engines.values():
        if engine.trainable:
            engine.load_state(folder / "trainer" / f"{engine.name}_optimizer.safetensors")
    return state


def read_state(folder: Path) -> LoopState:
    """The counters and small states of a checkpoint.

    Raises:
        CheckpointError: they are missing or unreadable.
    """
    file = folder / "trainer" / STATE_FILE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        if "prompt_position" in state:  # as PPO wrote it when it had a loop of its own
            state["position"] = state.pop("prompt_position")
            state["method"] = {n: state.pop(n) for n in ("kl_controller", "reward_moments", "reshard_bytes")}
        return LoopState(**state)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no checkpoint of this loop: it has no trainer/{STATE_FILE}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
