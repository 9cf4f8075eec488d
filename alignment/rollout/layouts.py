"""Who generates what with which weights: the training layout itself, or a rollout layout that ``eval_mode`` names.

- The model that is trained generates, wherever that can be: on one process, with tensor parallelism, and through the
  stages of a pipeline. Nothing is copied.
- Sequence parallelism cannot take tokens one at a time: a model without it that has the *same* parameter tensors
  generates.
- ``eval_mode: tensor_parallel`` or ``single``: every process of a data rank has a rollout model with less division,
  filled by :class:`~alignment.parallel.reshard.Resharder` before each rollout, and answers its share of the data
  rank's prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from alignment.engine.batching import rank_slice
from alignment.engine.engine import Engine
from alignment.errors import ArgumentsError, InvariantError
from alignment.parallel import Topology, World
from alignment.parallel.group_collectives import broadcast_object
from alignment.parallel.reshard import Moved, Resharder
from alignment.ppo.models import empty_like, pieces_of, without_sequence_parallel
from alignment.rollout.generate import GenerationEngine, GenerationPrompt
from alignment.rollout.rollout import Rollout
from alignment.rollout.sampler import SamplingSettings
from alignment.rollout.stopping import StopRule


@dataclass(frozen=True)
class RolloutLayout:
    """How a data rank's processes generate.

    Attributes:
        topology: that the rollout model is divided by.
        shares: into how many parts a data rank's prompts are cut.
        share: which of them this process answers.
        groups: whose members' parts are put together, one after the other: ``"pipeline"``, ``"tensor"``.
    """

    topology: Topology
    shares: int = 1
    share: int = 0
    groups: tuple[str, ...] = ()


def rollout_layout(topology: Topology, eval_mode: str) -> RolloutLayout:
    """The layout that ``eval_mode`` asks for; the training layout where it has nothing to put together.

    Args:
        topology: of the training.
        eval_mode: ``""``, ``"single"`` or ``"tensor_parallel"``.
    """
    if eval_mode == "single" and topology.splits_model:
        groups = ("tensor",) * (topology.tensor > 1) + ("pipeline",) * (topology.pipeline > 1)
        share = topology.stage * topology.tensor + topology.tensor_rank
        alone = replace(topology, tensor=1, pipeline=1, sharding=1, sharding_stage=0, sequence_parallel=False)
        return RolloutLayout(alone, topology.tensor * topology.pipeline, share, groups)
    if eval_mode == "tensor_parallel" and topology.pipeline > 1:
        tensor = Topology(topology.tensor, topology.tensor_rank, tensor=topology.tensor)
        return RolloutLayout(tensor, topology.pipeline, topology.stage, ("pipeline",))
    return RolloutLayout(topology)


class RolloutEngine:
    """Generates with the actor's weights in a rollout layout; every process of a data rank makes the same calls.

    Args:
        engine: the actor.
        world: the processes.
        eval_mode: see :func:`rollout_layout`.
        make: makes the generation engine for ``(model, pipeline schedule or None)``.

    Raises:
        ArgumentsError: the engine has a masking policy and the rollout another layout than the training.
    """

    def __init__(
        self, engine: Engine, world: World, eval_mode: str, make: Callable[[Any, Any], GenerationEngine]
    ) -> None:
        self.engine, self.world = engine, world
        self.layout = rollout_layout(world.topology, eval_mode)
        self.resharder: Resharder | None = None
        self.moved: Moved | None = None
        schedule = world.groups.schedule if world.groups is not None else None
        model = engine.model
        if self.layout.shares > 1:
            model, schedule = empty_like(engine.model, self.layout.topology), None
            self.resharder = Resharder(
                world, _source(engine), _target(model, self.layout.topology), self.layout.topology.tensor == 1
            )
        elif world.topology.sequence_parallel:
            model = without_sequence_parallel(engine.model, world.topology)
        self.inner = make(model, schedule)
        masking = self.inner.masking
        if masking is not None and masking.model is not None and model is not engine.model:
            raise ArgumentsError(
                "a masking policy (NLPO) reads in lock step with the policy, in the layout of the training: leave "
                "eval_mode empty and sequence_parallel off"
            )

    @property
    def pad_id(self) -> int:
        """See :attr:`GenerationEngine.pad_id`."""
        return self.inner.pad_id

    def stop_rule(self, strings: Sequence[str]) -> StopRule:
        """See :meth:`GenerationEngine.stop_rule`."""
        return self.inner.stop_rule(strings)

    @property
    def tokenizer(self) -> Any:
        """Of the generation engine."""
        return self.inner.tokenizer

    def refresh(self) -> Moved | None:
        """Bring the rollout model up to date; None where the training model itself generates."""
        if self.resharder is None or self.resharder.version == self.engine.steps:
            return None
        self.moved = self.resharder.refresh(self.engine.steps)
        return self.moved

    def generate(
        self,
        prompts: Sequence[GenerationPrompt],
        settings: SamplingSettings,
        num_return_sequences: int = 1,
        batch_size: int | None = None,
    ) -> Rollout:
        """Answer a data rank's prompts; see :meth:`GenerationEngine.generate`. Every process gets all answers.

        Raises:
            InvariantError: the rollout model's weights are not those of the actor's latest step.
        """
        if self.resharder is None:
            return self.inner.generate(prompts, settings, num_return_sequences, batch_size)
        if self.resharder.version != self.engine.steps:
            raise InvariantError(
                f"the rollout model has the weights of optimizer step {self.resharder.version}, the actor is at step "
                f"{self.engine.steps}: refresh it first"
            )
        mine = rank_slice(np.arange(len(prompts)), self.layout.share, self.layout.shares)
        part = None
        if len(mine):
            part = self.inner.generate([prompts[i] for i in mine], settings, num_return_sequences, batch_size)
        parts = [(self.layout.share, part)]
        for name in self.layout.groups:
            parts = self._gathered(parts, name)
        return Rollout.join([rollout for _, rollout in sorted(parts, key=_first) if rollout is not None])

    def _gathered(self, parts: list[tuple[int, Rollout | None]], name: str) -> list[tuple[int, Rollout | None]]:
        topology, groups = self.world.topology, self.world.groups
        assert groups is not None
        group = getattr(groups, name)
        members = range(topology.pipeline if name == "pipeline" else topology.tensor)
        together = []
        for member in members:
            stage, tensor = (member, topology.tensor_rank) if name == "pipeline" else (topology.stage, member)
            together += broadcast_object(parts, topology.process_at(topology.data_rank, stage, tensor), group)
        return together


def _first(item: tuple[int, Any]) -> int:
    return item[0]


def _source(engine: Engine) -> dict[str, tuple[int | None, Any]]:
    pieces = pieces_of(engine.model, engine.topology)
    state = engine.model.state_dict()
    return {piece.name: (piece.axis, state[local]) for local, piece in pieces.items() if not piece.duplicate}


def _target(model: Any, topology: Topology) -> dict[str, Any]:
    pieces, found, seen = pieces_of(model, topology), {}, set()
    for local, tensor in model.state_dict().items():
        if id(tensor) not in seen:  # a tied head is the embedding once more
            found[pieces[local].name] = tensor
        seen.add(id(tensor))
    return found
