"""Seconds of each phase: operators on the card, messages between cards, the pipeline's bubble, offloading.

Messages are not overlapped with computing, as in this toolkit. Rows are taken to have their average lengths
(``mean_prompt``, ``mean_response``), answers to end together. Sampling on the host and reading data are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from alignment.flow.flow import PPO_ITERATION, optimizer_of
from alignment.parallel.offload import LEVELS
from alignment.parallel.topology import Topology
from alignment.plan import kernels, traffic, work
from alignment.plan.activations import LABELS_AT_ONCE, WholeHead
from alignment.plan.hardware import Card
from alignment.plan.memory import part_of, residents
from alignment.plan.one_f_one_b import forward_only, one_forward_one_backward
from alignment.plan.rollout_memory import rollout_of, rollout_ops
from alignment.plan.setting import RolePlan, Setting
from alignment.plan.traffic import Message, layers_here
from alignment.plan.work import Op


@dataclass
class PhaseTime:
    """What a phase costs.

    Attributes:
        phase: its name.
        compute: seconds that the slowest process computes.
        messages: seconds of collectives and sends.
        bubble: seconds that it waits for other stages.
        offload: seconds of moving groups in and out before it.
        flops: of the products of one process (the last stage's).
        sent: bytes that one process sends.
        count: messages of one process.
        details: every message.
    """

    phase: str
    compute: float = 0.0
    messages: float = 0.0
    bubble: float = 0.0
    offload: float = 0.0
    flops: float = 0.0
    sent: float = 0.0
    count: float = 0.0
    details: list[Message] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """In all."""
        return self.compute + self.messages + self.bubble + self.offload

    def add_messages(self, messages: list[Message], card: Card, topology: Topology, times: float = 1.0) -> None:
        """Count messages, ``times`` times."""
        for message in messages:
            if message.ranks < 2 or not message.size:
                continue
            message = replace(message, count=message.count * times)
            self.details.append(message)
            self.messages += message.seconds(card, topology)
            self.sent += message.sent(card.collectives)
            self.count += message.count


def times_of(setting: Setting, card: Card) -> list[PhaseTime]:
    """The phases of an iteration (PPO) or of an optimizer step (SFT, reward model), in order."""
    if setting.stage != "ppo":
        phase = PhaseTime("train")
        _train_step(setting, card, setting.roles[0], phase, float(setting.row_tokens))
        return [phase]
    found = []
    for call in PPO_ITERATION.calls:
        roles = [role for role in (setting.role(name) for name in call.roles) if role is not None]
        if call.kind == "host" or len(roles) < len(call.roles):
            continue
        phase = PhaseTime(call.name)
        if call.kind == "generate":
            _generate(setting, card, roles[0], phase)
        elif call.kind == "infer":
            _infer(setting, card, roles[0], phase)
        else:
            for role in roles:
                _train_step(setting, card, role, phase, setting.mean_response, setting.steps)
        found.append(phase)
    for phase, seconds in zip(found, _offload_seconds(setting, card, [p.phase for p in found]), strict=True):
        phase.offload = seconds
    return found


def actor_step(setting: Setting, card: Card) -> PhaseTime:
    """One optimizer step of the actor alone."""
    phase, actor = PhaseTime("actor's step"), setting.role("actor")
    assert actor is not None
    _train_step(setting, card, actor, phase, setting.mean_response)
    return phase


def stages_of(topology: Topology) -> list[Topology]:
    """One process of each pipeline stage."""
    step = topology.sharding * topology.tensor
    return [replace(topology, process=stage * step) for stage in range(topology.pipeline)]


def forward_ops(
    setting: Setting,
    role: RolePlan,
    topology: Topology,
    rows: float,
    width: float,
    labels: float,
    entropy: bool = False,
    trained: bool = False,
) -> list[Op]:
    """One micro batch's forward on one stage."""
    count, tokens = layers_here(role.shape.layers, topology), rows * width
    if setting.fused_layers(role, topology):
        # Without gradient packed tokens go through all layers in groups.
        group = tokens if trained else min(tokens, max(float(kernels.GROUP), width))
        ops = [op.times(count * tokens / group) for op in kernels.layer_forward(role.shape, group, width)]
        ops += kernels.final_norm(role.shape, tokens, "forward")
    else:
        sizes, outside = (role.shape, setting.item, topology.tensor, rows, width, width), _outside(topology)
        ops = [op.times(count) for op in work.layer_forward(*sizes, flash=setting.flash, outside=outside)]
    if topology.first_stage:
        ops += work.embedding(role.shape, setting.item, topology.tensor, tokens, False)
    if topology.last_stage:
        ops += _head_ops(setting, role, topology, tokens, labels, entropy)
    return ops


def train_ops(
    setting: Setting,
    role: RolePlan,
    topology: Topology,
    rows: float,
    width: float,
    labels: float,
    entropy: bool = False,
) -> tuple[list[Op], list[Op]]:
    """One micro batch's forward and backward on one stage; with recomputation the layers' forward is in both."""
    count, tokens = layers_here(role.shape.layers, topology), rows * width
    first = forward_ops(setting, role, topology, rows, width, labels, entropy, True)
    if fused := setting.fused_layers(role, topology):
        layer = kernels.layer_forward(role.shape, tokens, width)
        behind = kernels.layer_backward(role.shape, tokens, width)
    else:
        sizes, outside = (role.shape, setting.item, topology.tensor, rows, width), _outside(topology)
        layer = work.layer_forward(*sizes, width, flash=setting.flash, outside=outside)
        behind = work.layer_backward(*sizes, flash=setting.flash, outside=outside)
    second = [op.times(count) for op in behind]
    part = part_of(role, topology)
    if role.recompute or (part.sharded and topology.sharding_stage == 3):
        second += [op.times(count) for op in layer]
    if fused:
        second += kernels.final_norm(role.shape, tokens, "backward")
    if topology.first_stage:
        second += work.embedding(role.shape, setting.item, topology.tensor, tokens, True)
    if topology.last_stage:
        second += _head_backward(setting, role, topology, tokens, labels)
    # Weights' gradients are added to those of the micro batch before.
    often = 1.0 - 1.0 / setting.micro_batches
    second.append(Op("far", moved=3.0 * often * setting.item * part.trained_elements, launches=0))
    return first, second


def _outside(topology: Topology) -> int:
    return topology.tensor if topology.sequence_parallel else 1


def _head_ops(
    setting: Setting, role: RolePlan, topology: Topology, tokens: float, labels: float, entropy: bool
) -> list[Op]:
    if role.head == "score":
        return work.score_head(role.shape, tokens)
    if setting.fused_head(role, topology):
        return kernels.lm_head(role.shape, labels)
    columns = WholeHead(role.shape, setting.item, topology.tensor).columns
    return work.lm_head(role.shape, setting.item, columns, labels, entropy=entropy)


def _head_backward(setting: Setting, role: RolePlan, topology: Topology, tokens: float, labels: float) -> list[Op]:
    if role.head == "score":
        return work.score_head(role.shape, tokens, trained=True)
    if setting.fused_head(role, topology):
        return kernels.lm_head_backward(role.shape, labels)
    columns = WholeHead(role.shape, setting.item, topology.tensor).columns
    behind = work.lm_head_backward(role.shape, setting.item, columns, labels)
    if labels <= LABELS_AT_ONCE:
        return behind
    # Of several chunks the logits are made anew.
    return behind + work.lm_head(role.shape, setting.item, columns, labels, entropy=True)


def _pass_traffic(
    setting: Setting,
    role: RolePlan,
    tokens: float,
    labels: float,
    layers: Mapping[str, float],
    ends: tuple[str, ...],
    stages: Sequence[Topology] | None = None,
) -> list[Message]:
    """Tensor parallelism's messages of one micro batch, of a process on average over the pipeline's stages.

    Args:
        setting: the run.
        role: the model.
        tokens, labels: of the micro batch.
        layers: how often the layers run ``"forward"`` and ``"backward"``.
        ends: kinds of :func:`alignment.plan.traffic.end_messages`.
        stages: one process of each stage; all of the training's layout if not given.
    """
    found: list[Message] = []
    stages = stages or stages_of(setting.topology)
    for stage in stages:
        here: list[Message] = []
        for kind, often in layers.items():
            count = often * layers_here(role.shape.layers, stage)
            layer = traffic.layer_messages(setting, role.shape.hidden, tokens, stage, kind)
            here += [replace(message, count=message.count * count) for message in layer]
        for kind in ends:
            here += traffic.end_messages(setting, role, tokens, labels, stage, kind)
        found += [replace(message, count=message.count / len(stages)) for message in here]
    return _joined(found)


def _joined(messages: list[Message]) -> list[Message]:
    """Equal messages as one with their counts added."""
    counts: dict[Message, float] = {}
    for message in messages:
        key = replace(message, count=0.0)
        counts[key] = counts.get(key, 0.0) + message.count
    return [replace(message, count=count) for message, count in counts.items()]


def _infer(setting: Setting, card: Card, role: RolePlan, phase: PhaseTime) -> None:
    """A pass without gradient over a data rank's answers, in micro batches."""
    width = setting.mean_width
    rows = setting.infer_batch_at(width)
    count, labels = -(-setting.samples // rows), rows * setting.mean_response
    stages = stages_of(setting.topology)
    ops = [forward_ops(setting, role, stage, rows, width, labels) for stage in stages]
    each = [work.seconds(stage, card, setting.item) for stage in ops]
    last = stages[-1]
    messages = _pass_traffic(setting, role, rows * width, labels, {"forward": 1.0}, ("forward",))
    hop = _hop(setting, card, role, rows * width)
    _pipelined(phase, card, setting, forward_only(each, count, 0.0), max(each) * count, messages, count)
    phase.flops += count * work.flops(ops[-1])
    _handing_on(phase, setting, card, role, rows * width, count, hop, 1)
    phase.add_messages(traffic.gather_messages(setting, role, last, count, 1), card, last)


def _train_step(
    setting: Setting, card: Card, role: RolePlan, phase: PhaseTime, response: float, steps: int = 1
) -> None:
    """``steps`` optimizer steps of a role."""
    width, count = setting.mean_width, setting.micro_batches
    rows = float(setting.micro_batch_at(width) * setting.rows_of_item)
    ppo = setting.stage == "ppo"
    labels, entropy = rows * (response if ppo else width), ppo and role.head == "lm"
    stages, last = stages_of(setting.topology), stages_of(setting.topology)[-1]
    passes = 1 + int(setting.ptx and role.name == "actor")
    both = [train_ops(setting, role, stage, rows, width, labels, entropy) for stage in stages]
    forward = [work.seconds(first, card, setting.item) for first, _ in both]
    backward = [work.seconds(second, card, setting.item) for _, second in both]
    whole = one_forward_one_backward(forward, backward, count)
    useful = count * max(f + b for f, b in zip(forward, backward, strict=True))
    part = part_of(role, last)
    again = 1.0 if role.recompute or (part.sharded and last.sharding_stage == 3) else 0.0
    ends = ("forward, entropy" if entropy else "forward", "backward")
    messages = _pass_traffic(setting, role, rows * width, labels, {"forward": 1.0 + again, "backward": 1.0}, ends)
    hop = _hop(setting, card, role, rows * width)
    _pipelined(phase, card, setting, whole * passes * steps, useful * passes * steps, messages, count * passes * steps)
    phase.flops += steps * passes * count * (work.flops(both[-1][0]) + work.flops(both[-1][1]))
    _handing_on(phase, setting, card, role, rows * width, count * passes * steps, hop, 2)
    runs = 1.0 + again
    phase.add_messages(
        traffic.gather_messages(setting, role, last, runs * count, count), card, last, float(passes * steps)
    )
    phase.add_messages(traffic.step_messages(setting, role, last), card, last, float(steps))
    owned = sum(tensor.elements for tensor in part.owned_trained)
    phase.compute += steps * work.seconds(work.adamw(owned, setting.item), card, setting.item)


def _pipelined(
    phase: PhaseTime,
    card: Card,
    setting: Setting,
    whole: float,
    useful: float,
    messages: list[Message],
    count: float,
) -> None:
    """Add a pass of ``count`` micro batches; its messages are stretched by the bubble as its operators are."""
    phase.compute += useful
    phase.bubble += whole - useful
    before = phase.messages
    phase.add_messages(messages, card, setting.topology, count)
    if useful:
        phase.bubble += (phase.messages - before) * (whole / useful - 1.0)


def _hop(setting: Setting, card: Card, role: RolePlan, tokens: float) -> float:
    """Seconds of handing a micro batch's hidden states to the next stage."""
    if setting.topology.pipeline == 1:
        return 0.0
    message = Message("hidden states", "send", "stages", 2, tokens * role.shape.hidden * setting.item)
    return message.seconds(card, setting.topology)


def _handing_on(
    phase: PhaseTime, setting: Setting, card: Card, role: RolePlan, tokens: float, count: float, hop: float, ways: int
) -> None:
    """Hidden states between stages: every micro batch, forward and (``ways`` 2) gradients back; the first one's way
    through all stages is waited for.
    """
    if setting.topology.pipeline == 1:
        return
    size, stages = tokens * role.shape.hidden * setting.item, setting.topology.pipeline
    often = count * ways * (stages - 1) / stages  # the ends send one way only
    phase.add_messages([Message("hidden states", "send", "stages", 2, size, often)], card, setting.topology)
    phase.bubble += hop * ways * (setting.topology.pipeline - 2)


def _generate(setting: Setting, card: Card, role: RolePlan, phase: PhaseTime) -> None:
    """A rollout's operators, messages, and what the host does between."""
    layout, shares = setting.rollout_topology()
    plan = rollout_of(setting, layout, shares)
    rows, batches, prompts = plan.rows, plan.rounds, max(1.0, plan.rows / plan.copies)
    stages = stages_of(replace(layout, sequence_parallel=False))
    for stage in stages:
        ops = rollout_ops(setting, stage, plan, layers_here(role.shape.layers, stage))
        # The stages take turns: one batch is under way at a time.
        seconds = work.seconds(ops, card, setting.item)
        if stage.last_stage:
            phase.compute += seconds + batches * setting.mean_response * card.step
            phase.flops = work.flops(ops)
            logits = 4.0 * rows * role.shape.vocab * setting.mean_response * batches
            if not card.is_cpu and not setting.engine_generates:
                phase.compute += logits / (1e9 * card.host_link)  # the plain path chooses on the host
        else:
            phase.bubble += seconds
    plain = replace(setting, topology=replace(setting.topology, sequence_parallel=False))
    for tokens, often in ((prompts * setting.mean_prompt, 1.0), (rows, setting.mean_response - 1)):
        messages = _pass_traffic(plain, role, tokens, rows, {"forward": 1.0}, ("generate",), stages)
        before = phase.messages
        phase.add_messages(messages, card, layout, often * batches)
        # The other stages' messages are waited for.
        phase.bubble += (phase.messages - before) * (layout.pipeline - 1)
    if layout.pipeline > 1:
        behind = (layout.pipeline - 1) / layout.pipeline  # the last stage sends none
        for tokens, often in ((prompts * setting.mean_prompt, 1.0), (rows, setting.mean_response - 1)):
            size = tokens * role.shape.hidden * setting.item
            sends = Message("hidden states", "send", "stages", 2, size, batches * often * behind)
            phase.add_messages([sends], card, layout)
            phase.bubble += sends.seconds(card, layout) * (layout.pipeline - 1)
        told = Message("chosen tokens", "broadcast", "pipeline", layout.pipeline, 64.0 + 16.0 * rows)
        phase.add_messages([told], card, layout, 2 * batches * setting.mean_response)
    phase.add_messages(traffic.reshard_messages(setting, setting.topology), card, setting.topology)
    if not setting.reshards:
        phase.add_messages(traffic.gather_messages(setting, role, setting.topology, 1, 1), card, setting.topology)


def offload_traffic(setting: Setting, topology: Topology) -> dict[str, tuple[float, float]]:
    """Bytes that move in and out before each phase of an iteration, once the run goes evenly.

    Frozen groups are copied out once, at the start; trained ones every time (on a GPU; on a CPU only what changed).
    """
    managed = frozenset(group for word in setting.offload_level.split() for group in LEVELS[word])
    here = residents(setting, topology)
    sizes = {**here.parameters, **{optimizer_of(name): size for name, size in here.optimizer.items()}}
    frozen = {role.name for role in setting.roles if not role.trained}
    groups = [group for group in sizes if group in managed]
    cycle = PPO_ITERATION.residency()
    inside = {group for group in groups if group in cycle[-1][1]}
    moves: dict[str, tuple[float, float]] = {}
    for phase, needed in cycle:
        come = [group for group in groups if group in needed and group not in inside]
        leave = [group for group in groups if group not in needed and group in inside]
        out = sum(sizes[group] for group in leave if group not in frozen)
        moves[phase] = (float(sum(sizes[group] for group in come)), float(out))
        inside = (inside | set(come)) - set(leave)
    return moves


def _offload_seconds(setting: Setting, card: Card, phases: list[str]) -> list[float]:
    if not setting.offload_level:
        return [0.0] * len(phases)
    moves = offload_traffic(setting, setting.topology)
    waiting, found = 0.0, []
    for phase, (into, out) in moves.items():
        waiting += (into + out) / (1e9 * card.host_link)
        if phase in phases:
            found.append(waiting)
            waiting = 0.0
    return found
