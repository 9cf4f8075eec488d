"""Bytes on one process, phase by phase: what is resident, what a phase adds, and the peak.

Sharding as in Rajbhandari et al. 2020 (arXiv:1910.02054, section 5: 2 + 2 + 12 bytes a parameter in half precision,
divided by stage), but with whole parameters owned (:func:`alignment.parallel.topology.assign_owners`), so that the
shares are as even as the tensors allow. Residency follows the dataflow and ``offload_level`` by the rules of
:mod:`alignment.parallel.offload`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

from alignment.flow.flow import Call, optimizer_of
from alignment.parallel.topology import BUCKET_ELEMENTS, Topology, assign_owners, layers_of_stage
from alignment.plan.activations import (
    FLOAT,
    ChunkedHead,
    FusedHead,
    FusedLayer,
    PlainLayer,
    WholeHead,
    layer_kind,
    stack_buffers,
)
from alignment.plan.rollout_memory import rollout_memory
from alignment.plan.setting import RolePlan, Setting
from alignment.plan.shapes import PartTensor, buffer_bytes, layer_of, lora_tensors, part_tensors

#: Columns of the report, in its order.
KINDS = ("parameters", "optimizer", "gradients", "activations", "kv_cache", "workspace", "buffers", "other")


@dataclass(frozen=True)
class Part:
    """One model on one process; sums are taken once.

    Attributes:
        role: which model.
        tensors: of this process's part, by whole name.
        trained: of these, those that have gradients and an optimizer.
        owned: of the trained ones, those whose optimizer state lies here; of a frozen model under sharding stage 3,
            and of a trained one, those that stay here.
        sharded: whether ownership divides anything.
    """

    role: RolePlan
    tensors: Mapping[str, PartTensor]
    trained: Mapping[str, PartTensor]
    owned: frozenset[str]
    sharded: bool

    @cached_property
    def elements(self) -> int:
        """Of all parameters of the part."""
        return sum(tensor.elements for tensor in self.tensors.values())

    @cached_property
    def owned_elements(self) -> int:
        """Of those that this process owns."""
        return sum(self.tensors[name].elements for name in self.owned)

    @cached_property
    def trained_elements(self) -> int:
        """Of those with gradients."""
        return sum(tensor.elements for tensor in self.trained.values())

    @cached_property
    def owned_trained(self) -> list[PartTensor]:
        """Those that this process updates."""
        return [tensor for name, tensor in self.trained.items() if name in self.owned]

    @cached_property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max((tensor.elements for tensor in self.tensors.values()), default=0)

    @cached_property
    def in_pass(self) -> int:
        """Elements that are here at most while a pass runs under sharding stage 3: what is owned, what lies outside
        the layers, and one layer.
        """
        stay = sum(t.elements for name, t in self.tensors.items() if name in self.owned or layer_of(name) is None)
        missing: dict[int, int] = {}
        for name, tensor in self.tensors.items():
            layer = layer_of(name)
            if layer is not None and name not in self.owned:
                missing[layer] = missing.get(layer, 0) + tensor.elements
        return stay + max(missing.values(), default=0)


def part_of(role: RolePlan, topology: Topology) -> Part:
    """What a process holds of a model: the same on every tensor rank and replica."""
    stage, rank = topology.stage, topology.sharding_rank
    process = (stage * topology.sharding + rank) * topology.tensor
    one = topology.tensor * topology.pipeline * topology.sharding
    return _part(role, replace(topology, processes=one, process=process))


@lru_cache(maxsize=4096)
def _part(role: RolePlan, topology: Topology) -> Part:
    shared, tensors, trained = _shared(role, topology)
    divides = topology.sharding > 1 and (bool(trained) or topology.sharding_stage == 3)
    if not divides:
        return Part(role, tensors, trained, frozenset(tensors), False)
    owners = _owners(tuple((name, tensor.elements) for name, tensor in shared.items()), topology.sharding)
    mine = {name for name, owner in owners.items() if owner == topology.sharding_rank}
    return Part(role, tensors, trained, frozenset(mine | (set(tensors) - set(shared))), True)


def _shared(
    role: RolePlan, topology: Topology
) -> tuple[dict[str, PartTensor], dict[str, PartTensor], dict[str, PartTensor]]:
    """What sharding divides, all tensors, and the trained ones, of a process."""
    tensors = part_tensors(role.shape, role.head, topology)
    trained = dict(tensors) if role.trained else {}
    if role.lora_rank:
        trained = lora_tensors(role.shape, role.lora_rank)
        tensors = {**tensors, **trained}
    return trained or tensors, tensors, trained


@lru_cache(maxsize=256)
def _owners(sizes: tuple[tuple[str, int], ...], ranks: int) -> dict[str, int]:
    return assign_owners(dict(sizes), ranks)


def parameter_bytes(part: Part, topology: Topology, item: int) -> int:
    """Bytes of a model's parameters between passes."""
    rests = part.sharded and topology.sharding_stage == 3
    return item * (part.owned_elements if rests else part.elements)


def optimizer_bytes(part: Part, item: int) -> int:
    """Bytes of AdamW's state from the second step on: two float32 moments an element, in half precision a float32
    master weight too, and two numbers a tensor.
    """
    owned = part.owned_trained
    return sum(tensor.elements for tensor in owned) * (8 if item == 4 else 12) + 8 * len(owned)


@dataclass(frozen=True)
class PhaseMemory:
    """Bytes on one process at the peak of a phase, by kind (see :data:`KINDS`).

    Attributes:
        phase: its name.
        kinds: bytes of each kind.
        away: of the groups that ``offload_level`` has moved out.
    """

    phase: str
    kinds: Mapping[str, float]
    away: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(self.kinds.values())


@dataclass
class Residents:
    """Bytes of each group of tensors on one process: parameters and optimizer states by the names that the dataflow
    uses, and what never leaves.
    """

    parameters: dict[str, int] = field(default_factory=dict)
    optimizer: dict[str, int] = field(default_factory=dict)
    always: int = 0

    def kinds(self, needed: frozenset[str], managed: frozenset[str]) -> tuple[dict[str, float], tuple[str, ...]]:
        """Bytes of parameters and optimizers in a phase that needs some groups, and the groups that are away."""
        groups = {**self.parameters, **{optimizer_of(name): size for name, size in self.optimizer.items()}}
        away = tuple(sorted(name for name in groups if name in managed and name not in needed))
        here = {name: size for name, size in groups.items() if name not in away}
        return (
            {
                "parameters": float(sum(here.get(name, 0) for name in self.parameters)),
                "optimizer": float(sum(here.get(optimizer_of(name), 0) for name in self.optimizer)),
                "other": float(self.always),
            },
            away,
        )


def residents(setting: Setting, topology: Topology) -> Residents:
    """What one process holds between passes."""
    found = Residents()
    for role in setting.roles:
        part = part_of(role, topology)
        found.parameters[role.name] = parameter_bytes(part, topology, setting.item)
        found.always += buffer_bytes(role.shape, topology)
        if role.trained:
            found.optimizer[role.name] = optimizer_bytes(part, setting.item)
    actor = setting.role("actor")
    if actor is not None and setting.reshards:
        layout, _ = setting.rollout_topology()
        copy = part_of(replace(actor, trained=False), layout)
        found.always += setting.item * copy.elements + buffer_bytes(actor.shape, layout)
    return found


def memory_of(setting: Setting, topology: Topology) -> list[PhaseMemory]:
    """The phases of an iteration on one process, in order.

    Args:
        setting: the run.
        topology: with the process whose memory it is.
    """
    here = residents(setting, topology)
    phases = []
    for call, (name, needed) in zip(setting.flow.calls, setting.flow.residency(), strict=True):
        added = _added(setting.of_call(call), topology, call)
        if added:
            kinds, away = here.kinds(needed, setting.managed)
            phases.append(max((_phase(name, kinds, away, each) for each in added), key=lambda phase: phase.total))
    return phases


def _added(setting: Setting, topology: Topology, call: Call) -> list[dict[str, float]]:
    """What each part of a call adds, one after the other: of its roles, and of averages behind it."""
    found = []
    for role in setting.present(call.roles):
        if call.kind == "train":
            found.append(training_memory(setting, topology, role))
        elif call.kind == "generate" and role.head == "lm":
            found.append(_generate(setting, topology))
        else:
            found.append(_infer(setting, topology, role))
    for pair in setting.averages(call):
        found.append({"workspace": sum(_awake(setting, topology, role, whole=True) for role in pair)})
    return found


def _role(setting: Setting, name: str) -> RolePlan:
    role = setting.role(name)
    assert role is not None
    return role


def _phase(name: str, resident: Mapping[str, float], away: tuple[str, ...], added: Mapping[str, float]) -> PhaseMemory:
    kinds = {kind: resident.get(kind, 0.0) + added.get(kind, 0.0) for kind in KINDS}
    return PhaseMemory(name, kinds, away)


def _layer(setting: Setting, role: RolePlan, topology: Topology) -> PlainLayer:
    if setting.fused_layers(role, topology):
        return FusedLayer(role.shape)
    return layer_kind(role.shape, setting.item, topology.tensor, topology.sequence_parallel, setting.flash)


def _awake(setting: Setting, topology: Topology, role: RolePlan, whole: bool) -> float:
    """Bytes of parameters that a pass adds under sharding stage 3; with the whole model for generation."""
    part = part_of(role, topology)
    if not part.sharded or topology.sharding_stage < 3:
        return 0.0
    there = part.elements if whole or role.lora_rank else part.in_pass
    return float(setting.item * (there - part.owned_elements))


def _generate(setting: Setting, topology: Topology) -> dict[str, float]:
    """The rollout's cache and activations, and the weights that it needs besides the resident ones."""
    actor = _role(setting, "actor")
    layout, shares = setting.rollout_topology()
    added = rollout_memory(setting, topology if shares == 1 else layout, shares)
    work = setting.readers * _awake(setting, topology, actor, whole=True)
    if setting.reshards:
        work += 2.0 * setting.item * max(BUCKET_ELEMENTS, part_of(actor, topology).largest)
    return {**added, "workspace": added.get("workspace", 0.0) + work}


def _infer(setting: Setting, topology: Topology, role: RolePlan) -> dict[str, float]:
    """One layer of a micro batch without gradient, then the head on the answers."""
    width = setting.width
    rows = setting.infer_batch_at(width)
    layer = _layer(setting, role, topology)
    tokens, labels = rows * width, rows * setting.labels
    peak = tokens * layer.running(width)
    if topology.last_stage:
        hidden = tokens * setting.item * role.shape.hidden
        peak = max(peak, hidden + _head(setting, topology, role, labels, tokens, False))
    buffers = _head_buffers(setting, topology, role, labels)
    if isinstance(layer, FusedLayer):
        buffers = max(buffers, stack_buffers(role.shape, tokens, width))
    return {"activations": peak, "workspace": _awake(setting, topology, role, whole=False), "buffers": buffers}


def _head(setting: Setting, topology: Topology, role: RolePlan, labels: float, tokens: float, kept: bool) -> float:
    """Bytes of a head: of an LM head by wanted positions, of a score head a float32 copy of all states."""
    if role.head == "score":
        return tokens * (4.0 * role.shape.hidden if setting.item == 2 else 0.0) + 8.0 * tokens
    head: FusedHead | ChunkedHead = FusedHead(role.shape)
    if not setting.fused_head(role, topology):
        head = ChunkedHead(WholeHead(role.shape, setting.item, topology.tensor, setting.temperature))
    return head.kept(labels) if kept else head.running(labels)


def _head_buffers(setting: Setting, topology: Topology, role: RolePlan, labels: float) -> float:
    """Bytes of the kernels' block of logits."""
    has = topology.last_stage and role.head == "lm" and setting.fused_head(role, topology)
    return FusedHead(role.shape).buffers(labels) if has else 0.0


def training_memory(setting: Setting, topology: Topology, role: RolePlan) -> dict[str, float]:
    """Gradients, activations and workspace at the peak of one optimizer step of a role."""
    part, width = part_of(role, topology), setting.width
    rows = setting.micro_batch_at(width)
    tokens = rows * setting.rows_of_item * width
    # Every token of a supervised row may be an answer's, also in the ptx loss.
    labels = tokens if setting.ptx else rows * setting.rows_of_item * setting.labels
    layer = _layer(setting, role, topology)
    count = len(layers_of_stage(role.shape.layers, topology.pipeline, topology.stage))
    recompute = role.recompute or (part.sharded and topology.sharding_stage == 3 and not role.lora_rank)
    each = layer.input() if recompute else layer.kept(width)
    waiting = min(setting.micro_batches_at(width), topology.pipeline - topology.stage)
    kept_layers = tokens * count * each * waiting
    working = tokens * (layer.backward_working(width) + (layer.kept(width) if recompute else 0.0))
    head_kept = head_running = 0.0
    if topology.last_stage:
        final = tokens * (layer.norm() + setting.item * role.shape.hidden)
        head_kept = final + _head(setting, topology, role, labels, tokens, True)
        head_running = final + _head(setting, topology, role, labels, tokens, False)
    gradients, before = float(FLOAT * part.trained_elements), _gradients_before(setting, topology, part)
    buffers, fresh_head, fresh_layer = _head_buffers(setting, topology, role, labels), 0.0, 0.0
    if isinstance(layer, FusedLayer):
        # The kernels make all gradients of a layer, and of a head, before they are added to those that are there.
        buffers = max(buffers, tokens * layer.buffers())
        fresh_head = FLOAT * float(role.shape.hidden * role.shape.vocab) if role.head == "lm" else 0.0
        fresh_layer = FLOAT * float(role.shape.layer_matrices)
    # At the forward's end all activations are there, and gradients of micro batches before; at the backward's end all
    # gradients, but only the first layer's activations.
    head = max(head_running, head_kept + working)
    begin = {"activations": kept_layers + head, "gradients": before + max(fresh_head, 0.0 if before else fresh_layer)}
    end = {"activations": tokens * each + working, "gradients": gradients + (fresh_layer if before else 0.0)}
    step = {"activations": 0.0, "gradients": gradients, "workspace": _travelling(part, topology), "buffers": 0.0}
    # Under sharding stage 3 parameters rest again before gradients travel.
    for moment in (begin, end):
        moment |= {"workspace": _awake(setting, topology, role, whole=False), "buffers": buffers}
    return max((begin, end, step), key=lambda moment: sum(moment.values()))


def _gradients_before(setting: Setting, topology: Topology, part: Part) -> float:
    """Bytes of gradients that are there when the last micro batch of a step has run forward."""
    owned = sum(tensor.elements for tensor in part.owned_trained)
    own, every = float(FLOAT * owned), float(FLOAT * part.trained_elements)
    reduced = part.sharded and topology.sharding_stage >= 2 and topology.pipeline == 1
    several = setting.micro_batches_at(setting.width) > 1
    if part.sharded and topology.sharding_stage == 3:
        # Every micro batch ends with its gradients at their owners.
        before = own
    elif several:
        return every
    else:
        before = own if reduced else every
    return before if several or (setting.ptx and part.role.name == "actor") else 0.0


def _travelling(part: Part, topology: Topology) -> float:
    """The float32 bucket that gradients travel in, and the tensors it is put together from."""
    if topology.data_size == 1 or not part.trained:
        return 0.0
    largest = max(tensor.elements for tensor in part.trained.values())
    return 8.0 * max(min(BUCKET_ELEMENTS, part.trained_elements), largest)


def telling_processes(setting: Setting) -> list[Topology]:
    """Processes among which the fullest one is: of each pipeline stage sharding rank 0, and the ranks that own most of
    each model and of all together (tensor ranks and replicas hold the same amounts).
    """
    base, found = setting.topology, list[Topology]()
    for stage in range(base.pipeline):
        first = replace(base, process=stage * base.sharding * base.tensor)
        chosen = {0}
        if base.sharding > 1:
            loads = [_loads(role, first) for role in setting.roles if role.trained or base.sharding_stage == 3]
            together = [sum(column) for column in zip(*loads, strict=True)]
            chosen |= {load.index(max(load)) for load in [*loads, together]}
        found += [replace(base, process=(stage * base.sharding + rank) * base.tensor) for rank in sorted(chosen)]
    return found


@lru_cache(maxsize=256)
def _loads(role: RolePlan, topology: Topology) -> list[int]:
    """Elements that each sharding rank owns of a model's part on one stage."""
    shared = _shared(role, topology)[0]
    owners = _owners(tuple((name, tensor.elements) for name, tensor in shared.items()), topology.sharding)
    load = [0] * topology.sharding
    for name, owner in owners.items():
        load[owner] += shared[name].elements
    return load
