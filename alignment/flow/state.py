"""A run's state on disk: ``checkpoint-N/{policy,value,...,trainer}``.

There is no state of random number generators in it, because none has any: every random number follows from a key. The
sampler's is (seed, prompt's number, answer's number, position), the order of a pass over a batch (seed, batch's number,
pass), the order of prompts and supervised rows (seed, epoch). So a run draws the same numbers after a restart and on
any layout; the positions below are all there is to remember.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alignment.engine.engine import Engine
from alignment.errors import CheckpointError
from alignment.flow.checkpoint import write_json
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
        best_metrics: of the evaluation then.
        eval_metrics: of the last evaluation.
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
    best_metrics: dict[str, float] = field(default_factory=dict)
    eval_metrics: dict[str, float] = field(default_factory=dict)
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
    optimizers: Mapping[str, Engine],
    save_extras: Callable[[Path], None],
    half_used: HalfUsed | None = None,
) -> None:
    """Write everything that a run needs to go on; every process calls it, the main one writes.

    Args:
        folder: an empty folder; it becomes a checkpoint when the caller renames it.
        state: the counters and small states.
        engines: those whose weights change, by the name of their folder.
        optimizers: those that are trained, by the name of their optimizer's file.
        save_extras: writes tokenizer and template into a model's folder.
        half_used: the rows in work, in the middle of an update.
    """
    trainer = folder / "trainer"
    main = next(iter(engines.values())).world.is_main
    for name, engine in engines.items():
        target = folder / name
        if main:
            target.mkdir(exist_ok=True)
            save_extras(target)
        engine.save_weights(target)
    if main:
        trainer.mkdir()
        write_json(trainer / STATE_FILE, _strict(asdict(state)))
        if half_used is not None:
            save_half_used(trainer, half_used)
    for file, engine in optimizers.items():
        engine.save_state(trainer / file)


def load_state(folder: Path, engines: Mapping[str, Engine], optimizers: Mapping[str, Engine]) -> LoopState:
    """Read what :func:`save_state` wrote.

    Args:
        folder: a checkpoint that was verified.
        engines: get their weights.
        optimizers: get their optimizers' states.

    Returns:
        The counters and small states.

    Raises:
        CheckpointError: something is missing, unreadable or belongs to another model.
    """
    state = read_state(folder)
    load_weights(folder, engines)
    for file, engine in optimizers.items():
        engine.load_state(folder / "trainer" / file)
    return state


def load_weights(folder: Path, engines: Mapping[str, Engine]) -> None:
    """Read the weights of a checkpoint; ``engines`` by the name of their folder in it.

    Raises:
        CheckpointError: something is missing, unreadable or belongs to another model.
    """
    for name, engine in engines.items():
        if not (folder / name).is_dir():
            raise CheckpointError(
                f"{folder} has no {name}: it was saved by a run without that model. Use the arguments of that run, or "
                "start a new one from its models, without resume_from_checkpoint"
            )
        engine.load_weights(folder / name)


def read_state(folder: Path) -> LoopState:
    """The counters and small states of a checkpoint.

    Raises:
        CheckpointError: they are missing or unreadable.
    """
    file, before = folder / "trainer" / STATE_FILE, folder / "trainer" / "state.json"
    try:
        if before.exists() and not file.exists():  # as SFT and reward models wrote it when they had a loop of their own
            return _of_a_stage(json.loads(before.read_text(encoding="utf-8")))
        state = json.loads(file.read_text(encoding="utf-8"))
        if "prompt_position" in state:  # as PPO wrote it when it had a loop of its own
            state["position"] = state.pop("prompt_position")
            state["method"] = {n: state.pop(n) for n in ("kl_controller", "reward_moments", "reshard_bytes")}
        return LoopState(**state)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no checkpoint of this loop: it has no trainer/{STATE_FILE}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None


def _of_a_stage(state: dict[str, Any]) -> LoopState:
    """What is waiting for the next row is not taken over: its kinds have changed."""
    best = {f"eval/{name}": value for name, value in state["best_metrics"].items()}
    last = {f"eval/{name}": value for name, value in state["eval_metrics"].items()}
    return LoopState(
        global_step=state["step"],
        rollouts=state["step"],
        position=state["step"],
        method={"order": state["order"], "loss_sum": state["loss_sum"]},
        best_value=state["best_value"],
        best_step=state["best_step"],
        best_metrics=best,
        eval_metrics=last,
        evaluated_at=state["last_eval_step"],
    )


def _strict(value: Any) -> Any:
    """NaN and infinity as None, which strict JSON can hold."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
