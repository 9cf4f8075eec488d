"""A PPO run's state on disk: ``checkpoint-N/{policy,value,trainer}``.

There is no state of random number generators in it, because none has any: every random number follows from a key. The
sampler's is (seed, prompt's number, answer's number, position), the order of a pass over a rollout (seed, rollout's
number, pass), the order of prompts and supervised rows (seed, epoch). So a run draws the same numbers after a restart
and on any layout; the positions below are all there is to remember.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alignment.engine.engine import Engine
from alignment.errors import CheckpointError
from alignment.flow.halfway import HalfUsed, save_half_used

STATE_FILE = "trainer_state.json"


@dataclass
class PPOState:
    """Where a run stands. In the middle of an update there is a :class:`~alignment.flow.halfway.HalfUsed` besides.

    Attributes:
        global_step: optimizer steps taken (early-stopped ones counted as far as they went).
        rollouts: iterations done; the number of the rollout in work.
        prompt_position: position in the stream of prompts.
        ptx_position: position in the stream of supervised rows.
        kl_controller: its state.
        reward_moments: of the score normaliser.
        best_value: the best ``metric_for_best_model`` so far, or ``None``.
        best_step: the step it was reached at, -1 before.
        evaluated_at: the step of the last evaluation, -1 before.
        pending: figures of optimizer steps since the last row (:class:`~alignment.flow.statistics.Statistics`).
        timer: seconds and tokens of phases since the last row (:class:`~alignment.flow.flow.PhaseTimer`).
        reshard_bytes: bytes moved into the rollout layout since the last row.
        rng: what the random numbers follow from, for people and other tools.
    """

    global_step: int = 0
    rollouts: int = 0
    prompt_position: int = 0
    ptx_position: int = 0
    kl_controller: dict[str, float] = field(default_factory=dict)
    reward_moments: dict[str, float] = field(default_factory=dict)
    best_value: float | None = None
    best_step: int = -1
    evaluated_at: int = -1
    pending: dict[str, dict[str, float]] = field(default_factory=dict)
    timer: dict[str, dict[str, float]] = field(default_factory=dict)
    reshard_bytes: int = 0
    rng: dict[str, Any] = field(default_factory=dict)


def save_state(
    folder: Path,
    state: PPOState,
    actor: Engine,
    critic: Engine,
    save_extras: Callable[[Path], None],
    half_used: HalfUsed | None = None,
) -> None:
    """Write everything that a run needs to go on; every process calls it, the main one writes.

    Args:
        folder: an empty folder; it becomes a checkpoint when the caller renames it.
        state: the counters and small states.
        actor: to ``policy/``.
        critic: to ``value/``.
        save_extras: writes tokenizer and template into a model's folder.
        half_used: the rollout in work, in the middle of an update.
    """
    trainer, main = folder / "trainer", actor.world.is_main
    for name, engine in (("policy", actor), ("value", critic)):
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
    actor.save_state(trainer / "actor_optimizer.safetensors")
    critic.save_state(trainer / "critic_optimizer.safetensors")


def load_state(folder: Path, actor: Engine, critic: Engine) -> PPOState:
    """Read what :func:`save_state` wrote.

    Args:
        folder: a checkpoint that was verified.
        actor: gets the policy's weights and optimizer.
        critic: gets the value function's.

    Returns:
        The counters and small states.

    Raises:
        CheckpointError: something is missing, unreadable or belongs to another model.
    """
    state = read_state(folder)
    actor.load_weights(folder / "policy")
    critic.load_weights(folder / "value")
    actor.load_state(folder / "trainer" / "actor_optimizer.safetensors")
    critic.load_state(folder / "trainer" / "critic_optimizer.safetensors")
    return state


def read_state(folder: Path) -> PPOState:
    """The counters and small states of a checkpoint.

    Raises:
        CheckpointError: they are missing or unreadable.
    """
    file = folder / "trainer" / STATE_FILE
    try:
        return PPOState(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no PPO checkpoint: it has no trainer/{STATE_FILE}") from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
