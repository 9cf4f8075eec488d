"""Seconds of each phase by one roofline: products at a share of the card's peak, or weights, caches and optimizer
states at its bandwidth, whichever takes longer (Williams et al. 2009, doi:10.1145/1498765.1498785).

A product of ``[m, k]`` and ``[k, n]`` is ``2 m k n`` FLOPs and its backward two such products (Kaplan et al. 2020,
arXiv:2001.08361, section 2.1); attention adds ``4 s q`` per token and layer. A decoding step reads the weights once
and the caches of all rows (Pope et al. 2022, arXiv:2211.05102, section 2.1). Stages of a pipeline are taken to be
equal: a bubble of ``(p - 1) / m`` of the useful time (Narayanan et al. 2021, arXiv:2104.04473, section 2.2.1).
Messages are those of whole tensors, as a ring sends them (Thakur et al. 2005, doi:10.1177/1094342005051521), over the
slowest link of their group; nothing overlaps. Left out: embeddings' and heads' messages, choosing tokens, reading data,
differences in length between rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from alignment.flow.flow import optimizer_of
from alignment.parallel.topology import Topology
from alignment.plan.activations import COLUMN_INPUTS, cache_bytes
from alignment.plan.cards import Card
from alignment.plan.memory import part_of, residents
from alignment.plan.rollout_memory import rollout_of
from alignment.plan.setting import RolePlan, Setting
from alignment.plan.shapes import ModelShape, layer_of


@dataclass
class PhaseTime:
    """What a phase costs one process.

    Attributes:
        phase: its name.
        compute: seconds of the card.
        waiting: seconds for other stages.
        messages: seconds of sending ``sent`` bytes.
        offload: seconds of moving groups in and out before it.
        flops: of its products.
        sent: bytes.
    """

    phase: str
    compute: float = 0.0
    waiting: float = 0.0
    messages: float = 0.0
    offload: float = 0.0
    flops: float = 0.0
    sent: float = 0.0

    @property
    def seconds(self) -> float:
        """In all."""
        return self.compute + self.waiting + self.messages + self.offload

    def send(self, size: float, span: int, card: Card) -> None:
        """Count bytes that go to cards of a group over ``span`` neighbouring ones."""
        self.sent += size
        self.messages += size / card.sending(span)


def times_of(setting: Setting, card: Card) -> list[PhaseTime]:
    """The phases of an iteration, or of an optimizer step on given rows, in order."""
    found, moving, moves = [], 0.0, offload_traffic(setting, setting.topology)
    for call in setting.flow.calls:
        roles, averages, seen = setting.present(call.roles), setting.averages(call), setting.of_call(call)
        moving += sum(moves[call.name]) / (1e9 * card.host_link)
        if not roles and not averages:
            continue
        phase = PhaseTime(call.name, offload=moving)
        moving = 0.0
        for role in roles:
            if call.kind == "train":
                _train(seen, card, role, phase)
            elif call.kind == "generate" and role.head == "lm":
                _generate(seen, card, role, phase)
            else:
                _infer(seen, card, role, phase)
        for source, target in averages:  # both are read, the target is written; a copy is a little less
            phase.compute += 3.0 * setting.item * part_of(target, setting.topology).elements / card.moving
            for role in (source, target):
                _gather(setting, card, role, phase, 1)
        found.append(phase)
    return found


def forward_flops(shape: ModelShape, tokens: float, row_tokens: float, labels: float) -> float:
    """FLOPs of the products of a whole model's forward.

    Args:
        shape: the model.
        tokens: that are read.
        row_tokens: that each of them attends to.
        labels: positions whose logits are made; 0 for a model with a score head.
    """
    layers = shape.layers * (2.0 * shape.layer_matrices + 4.0 * row_tokens * shape.query)
    return tokens * layers + 2.0 * labels * shape.hidden * shape.vocab


def train_flops(shape: ModelShape, tokens: float, row_tokens: float, labels: float, recompute: bool) -> float:
    """FLOPs of a forward and its backward; with recomputation the layers' forward once more."""
    again = forward_flops(shape, tokens, row_tokens, 0) if recompute else 0.0
    return 3.0 * forward_flops(shape, tokens, row_tokens, labels) + again


def _recomputes(role: RolePlan, topology: Topology) -> bool:
    return role.recompute or topology.sharding_stage == 3


def _infer(setting: Setting, card: Card, role: RolePlan, phase: PhaseTime) -> None:
    """A pass without gradient over a data rank's answers, in micro batches."""
    width, lm = setting.mean_width, role.head == "lm"
    rows = setting.infer_batch_at(width)
    count = -(-setting.passed_rows // rows)
    flops = forward_flops(role.shape, rows * width, width, rows * setting.mean_labels * lm)
    _passes(setting, card, role, phase, flops, 1.0, count, count)
    _talk(setting, card, role, phase, rows * width * count, 1.0, 0.0)
    _gather(setting, card, role, phase, count)


def _train(setting: Setting, card: Card, role: RolePlan, phase: PhaseTime) -> None:
    """The optimizer steps of a role in an iteration."""
    topology, width, m = setting.topology, setting.mean_width, setting.micro_batches
    rows = setting.micro_batch_at(width) * setting.rows_of_item
    tokens, labels = rows * width, rows * setting.mean_labels
    again = _recomputes(role, topology)
    flops = train_flops(role.shape, tokens, width, labels * (role.head == "lm"), again)
    passes = setting.steps * (1 + int(setting.ptx and role.name == "actor"))
    _passes(setting, card, role, phase, flops, 3.0, m * passes, m)
    _talk(setting, card, role, phase, tokens * m * passes, 1.0 + again, 1.0)
    _gather(setting, card, role, phase, (1 + again) * m * passes)
    part = part_of(role, topology)
    owned = sum(tensor.elements for tensor in part.owned_trained)
    # The norm reads a gradient; then gradient, moments and weights are read, moments and weights written.
    phase.compute += setting.steps * owned * (32 if setting.item == 4 else 36) / card.moving
    _share_gradients(setting, card, role, phase)


def _passes(
    setting: Setting, card: Card, role: RolePlan, phase: PhaseTime, flops: float, reads: float, count: int, m: int
) -> None:
    """Add ``count`` micro batches of ``flops`` each over the whole model, ``m`` of which follow each other without a
    gap; each reads the weights ``reads`` times.
    """
    topology = setting.topology
    divided = topology.tensor * topology.pipeline
    weights = setting.item * role.shape.parameters * reads / divided
    useful = count * max(flops / divided / card.computing(setting.item), weights / card.moving)
    phase.compute += useful
    phase.waiting += useful * (topology.pipeline - 1) / m
    phase.flops += count * flops / divided


def _generate(setting: Setting, card: Card, role: RolePlan, phase: PhaseTime) -> None:
    """Reading each prompt once, then a step per token of all answers that are under way."""
    layout, shares = setting.rollout_topology()
    plan, shape, t = rollout_of(setting, layout, shares), role.shape, layout.tensor
    steps = plan.rounds * max(0.0, setting.mean_response - 1)
    rate = card.computing(setting.item)
    read = forward_flops(shape, plan.prompts * setting.mean_prompt, setting.mean_prompt, plan.answers)
    context = setting.mean_prompt + setting.mean_response / 2
    step = forward_flops(shape, plan.rows, context, plan.rows)
    weights = card.weight_reads * setting.item * shape.parameters / t
    cache = cache_bytes(shape, shape.layers, plan.rows, context, setting.item, t)
    spent = read / t / rate + steps * max(step / t / rate, (weights + cache) / card.moving, shape.layers * card.launch)
    # Stages take turns: one batch is under way at a time.
    phase.compute += spent / layout.pipeline
    phase.waiting += spent * (layout.pipeline - 1) / layout.pipeline
    phase.flops += (read + steps * step) / t / layout.pipeline
    plain = replace(setting, topology=replace(layout, sequence_parallel=False))
    _talk(plain, card, role, phase, plan.prompts * setting.mean_prompt + steps * plan.rows, 1.0, 0.0)
    if setting.reshards:
        _fill_copy(setting, card, role, phase, layout)
    else:
        _gather(setting, card, role, phase, 1)


def _fill_copy(setting: Setting, card: Card, role: RolePlan, phase: PhaseTime, layout: Topology) -> None:
    """The rollout's copy: each stage's tensors to the other stages, with ``single`` slices to the tensor ranks too."""
    topology = setting.topology
    whole = float(setting.item * role.shape.parameters)
    p, t = topology.pipeline, topology.tensor
    if p > 1:
        phase.send(whole / t * (p - 1) / p, _span(topology, "pipeline"), card)
    if t > layout.tensor:
        phase.send(whole * (t - 1) / t, _span(topology, "tensor"), card)


def _talk(
    setting: Setting, card: Card, role: RolePlan, phase: PhaseTime, tokens: float, forward: float, backward: float
) -> None:
    """What tensor ranks and stages tell each other about so many tokens, whose layers run so often.

    Forward a sum behind attention and one behind the feed-forward (Shoeybi et al. 2019, section 3), backward one for
    each of paddlenlp's five column projections. Sequence parallelism scatters these sums and gathers the inputs.
    """
    topology = setting.topology
    t, p = topology.tensor, topology.pipeline
    size = tokens * role.shape.hidden * setting.item
    if t > 1:
        sums = 2 * forward + COLUMN_INPUTS * backward
        rounds = (2 + COLUMN_INPUTS) * (forward + backward) if topology.sequence_parallel else 2 * sums
        phase.send(size * role.shape.layers / p * rounds * (t - 1) / t, _span(topology, "tensor"), card)
    if p > 1:  # the ends send one way only
        phase.send(size * ((forward > 0) + (backward > 0)) * (p - 1) / p, _span(topology, "stages"), card)


def _gather(setting: Setting, card: Card, role: RolePlan, phase: PhaseTime, runs: float) -> None:
    """Sharding stage 3: layers are gathered each time they run."""
    topology, part = setting.topology, part_of(role, setting.topology)
    if part.sharded and topology.sharding_stage == 3:
        inside = sum(tensor.elements for name, tensor in part.tensors.items() if layer_of(name) is not None)
        share = (topology.sharding - 1) / topology.sharding
        phase.send(runs * setting.item * inside * share, _span(topology, "sharding"), card)


def _share_gradients(setting: Setting, card: Card, role: RolePlan, phase: PhaseTime) -> None:
    """Float32 gradients to their owners (stage 3: of each micro batch) and new weights back; sums
    over replicas.
    """
    topology, part = setting.topology, part_of(role, setting.topology)
    trained, n, replicas = part.trained_elements, topology.sharding, topology.data_size // topology.sharding
    if n > 1:
        often = {1: 1, 2: 1, 3: setting.micro_batches}[topology.sharding_stage]
        size = 4.0 * trained * often + (setting.item * trained if topology.sharding_stage < 3 else 0.0)
        phase.send(setting.steps * size * (n - 1) / n, _span(topology, "sharding"), card)
    if replicas > 1:
        owned = sum(tensor.elements for tensor in part.owned_trained)
        phase.send(setting.steps * 8.0 * owned * (replicas - 1) / replicas, topology.processes, card)


def _span(topology: Topology, axis: str) -> int:
    """Over how many neighbouring processes a group stretches: tensor ranks are next to each other, then sharding
    ranks, then stages, then replicas.
    """
    t, n = topology.tensor, topology.sharding
    return {"tensor": t, "sharding": t * n, "stages": t * n + 1, "pipeline": t * n * topology.pipeline}[axis]


def offload_traffic(setting: Setting, topology: Topology) -> dict[str, tuple[float, float]]:
    """Bytes that move in and out before each phase of an iteration, once the run goes evenly.

    Frozen groups are copied out once, at the start; trained ones every time (on a GPU; on a CPU only what changed).
    """
    here = residents(setting, topology)
    sizes = {**here.parameters, **{optimizer_of(name): size for name, size in here.optimizer.items()}}
    frozen = {role.name for role in setting.roles if not (role.trained or role.changes)}
    groups = [group for group in sizes if group in setting.managed]
    cycle = setting.flow.residency()
    inside = {group for group in groups if group in cycle[-1][1]}
    moves: dict[str, tuple[float, float]] = {}
    for phase, needed in cycle:
        come = [group for group in groups if group in needed and group not in inside]
        leave = [group for group in groups if group not in needed and group in inside]
        out = sum(sizes[group] for group in leave if group not in frozen)
        moves[phase] = (float(sum(sizes[group] for group in come)), float(out))
        inside = (inside | set(come)) - set(leave)
    return moves
