"""What processes send each other: which collective, over which axis, how large, how often.

Volumes per rank: an all-reduce of ``S`` bytes over ``n`` ranks sends ``2 (n - 1) / n S`` as a ring (Thakur et al.
2005, doi:10.1177/1094342005051521), an all-gather of shares of ``S`` ``(n - 1) S``, a reduce-scatter, a reduce or a
broadcast of ``S`` ``(n - 1) / n S`` on average. The CPU back end sends the same but for all-reduces over two ranks or
of less than 32 KiB, where everybody sends everything to everybody.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from alignment.parallel.topology import Topology, layers_of_stage
from alignment.plan.activations import COLUMN_INPUTS
from alignment.plan.hardware import Card
from alignment.plan.memory import part_of
from alignment.plan.setting import RolePlan, Setting
from alignment.plan.shapes import layer_of

#: alignment.parallel.cpu_backend.collectives: smaller all-reduces are not sliced.
MAILBOX_SLICED_FROM = 32 * 1024


@dataclass(frozen=True)
class Message:
    """Collectives of one kind.

    Attributes:
        what: in words, for the report.
        kind: ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``reduce``, ``broadcast`` or ``send``.
        axis: ``tensor``, ``pipeline``, ``sharding``, ``replicas`` or ``data``.
        ranks: of the group.
        size: bytes of one: the tensor that is reduced or broadcast, each rank's share of an all-gather.
        count: how often.
    """

    what: str
    kind: str
    axis: str
    ranks: int
    size: float
    count: float = 1.0

    def sent(self, collectives: str = "ring") -> float:
        """Bytes that a rank sends, on average over the group."""
        n = self.ranks
        if n < 2 and self.kind != "send":
            return 0.0
        each = {
            "all_gather": n - 1.0,
            "reduce_scatter": (n - 1.0) / n,
            "reduce": (n - 1.0) / n,
            "broadcast": (n - 1.0) / n,
            "send": 1.0,
            "all_reduce": 2.0 * (n - 1.0) / n,
        }[self.kind]
        if self.kind == "all_reduce" and collectives == "mailbox" and (n < 3 or self.size < MAILBOX_SLICED_FROM):
            each = n - 1.0
        return each * self.size * self.count

    def seconds(self, card: Card, topology: Topology) -> float:
        """On a card's links: the volume over the slowest link of the group, and a start for each round."""
        inside = group_span(topology, self.axis) <= card.node
        rounds = 1.0 if self.kind == "send" else max(1.0, math.ceil(math.log2(max(2, self.ranks))))
        rounds *= 2.0 if self.kind == "all_reduce" else 1.0
        if self.ranks < 2 and self.kind != "send":
            return 0.0
        return self.sent(card.collectives) / card.link_rate(inside) + self.count * rounds * card.hop


def group_span(topology: Topology, axis: str) -> int:
    """Over how many neighbouring processes a group stretches: tensor ranks are next to each other, then sharding
    ranks, then stages, then replicas.
    """
    tensor, sharding, pipeline = topology.tensor, topology.sharding, topology.pipeline
    return {
        "tensor": tensor,
        "sharding": tensor * sharding,
        "pipeline": tensor * sharding * pipeline,
        "stages": tensor * sharding + 1,
    }.get(axis, topology.processes)


def layer_messages(setting: Setting, shape_hidden: int, tokens: float, topology: Topology, train: str) -> list[Message]:
    """Tensor parallelism's messages of one layer.

    Forward: a sum behind attention and one behind the feed-forward (Shoeybi et al. 2019, section 3); with sequence
    parallelism these are reduce-scatters, and every projection gathers its input. Backward: paddlenlp's five column
    projections each sum the gradient of their input by themselves.

    Args:
        setting: the run.
        shape_hidden: width of the model.
        tokens: of the micro batch.
        topology: the layout.
        train: ``"forward"`` or ``"backward"``.
    """
    t = topology.tensor
    if t == 1:
        return []
    size = tokens * shape_hidden * setting.item
    many, few = (2, COLUMN_INPUTS) if train == "forward" else (COLUMN_INPUTS, 2)
    if not topology.sequence_parallel:
        return [Message(f"layers, {train}", "all_reduce", "tensor", t, size, many)]
    return [
        Message(f"layers, {train}", "reduce_scatter", "tensor", t, size, many),
        Message(f"layers, {train}", "all_gather", "tensor", t, size / t, few),
    ]


def end_messages(
    setting: Setting, role: RolePlan, tokens: float, labels: float, topology: Topology, kind: str
) -> list[Message]:
    """Tensor parallelism's messages at embedding and head.

    Args:
        kind: ``"forward"``, ``"forward, entropy"``, ``"generate"`` or ``"backward"``.
    """
    t, found = topology.tensor, list[Message]()
    if t == 1:
        return found
    divided = role.shape.vocab % t == 0
    size = tokens * role.shape.hidden * setting.item
    backward = kind == "backward"
    if topology.first_stage:
        if divided and not backward:
            found.append(Message("embedding", "all_reduce", "tensor", t, size))
        if topology.sequence_parallel and backward:
            found.append(Message("embedding, backward", "all_gather", "tensor", t, size / t))
    if topology.sequence_parallel and not backward and kind != "generate":
        found.append(Message("sequence at the end of a stage", "all_gather", "tensor", t, size / t))
    if topology.last_stage and role.head == "lm" and divided:
        if backward:
            whole = labels * role.shape.hidden * setting.item
            found.append(Message("head, backward", "all_reduce", "tensor", t, whole))
        elif kind == "generate":
            share = labels * role.shape.vocab / t * setting.item
            found.append(Message("logits", "all_gather", "tensor", t, share))
        else:
            count = 4 if kind == "forward, entropy" else 3
            found.append(Message("softmax", "all_reduce", "tensor", t, 4.0 * labels, count))
    return found


def step_messages(setting: Setting, role: RolePlan, topology: Topology) -> list[Message]:
    """Messages of one optimizer step behind its passes: gradients to their owners or to everybody, weights back."""
    part, found = part_of(role, topology), list[Message]()
    replicas = topology.data_size // topology.sharding
    trained, item = part.trained_elements, setting.item
    if topology.sequence_parallel:
        norms = sum(t.elements for name, t in part.trained.items() if name.endswith("norm.weight"))
        found.append(Message("norms' gradients", "all_reduce", "tensor", topology.tensor, 4.0 * norms))
    ends = topology.first_stage or topology.last_stage
    if topology.pipeline > 1 and role.shape.tied and role.head == "lm" and ends:
        size = item * max(t.elements for name, t in part.tensors.items() if name.endswith("embed_tokens.weight"))
        found.append(Message("tied embedding's gradient", "send", "pipeline", 2, size))
    if topology.sharding > 1:
        # In a pipeline once a step; stage 2 with every pass (the ptx loss is a second one), stage 3 every micro batch.
        passes = 1 + int(setting.ptx and role.name == "actor")
        often = {1: 1, 2: passes, 3: passes * setting.micro_batches}[topology.sharding_stage]
        often = 1 if topology.pipeline > 1 else often
        ranks = topology.sharding
        found.append(Message("gradients to their owners", "reduce", "sharding", ranks, 4.0 * trained, often))
        if topology.sharding_stage < 3:
            found.append(Message("new weights", "broadcast", "sharding", ranks, float(item * trained)))
    if replicas > 1:
        owned = sum(tensor.elements for tensor in part.owned_trained)
        found.append(Message("gradients", "all_reduce", "replicas", replicas, 4.0 * owned))
    return found


def gather_messages(setting: Setting, role: RolePlan, topology: Topology, runs: float, passes: float) -> list[Message]:
    """Sharding stage 3: layers are gathered each time they run, the rest with each pass.

    Args:
        runs: how often every layer runs.
        passes: how often embedding, final norm and head are gathered.
    """
    part = part_of(role, topology)
    if not part.sharded or topology.sharding_stage < 3:
        return []
    ranks, outside = topology.sharding, part.outside_elements
    inside = sum(t.elements for name, t in part.tensors.items() if layer_of(name) is not None)
    return [
        Message("layers' weights", "broadcast", "sharding", ranks, float(setting.item * inside), runs),
        Message("other weights", "broadcast", "sharding", ranks, float(setting.item * outside), passes),
    ]


def reshard_messages(setting: Setting, topology: Topology) -> list[Message]:
    """Filling the rollout's copy of the actor (:mod:`alignment.parallel.reshard`): every stage's tensors go to the
    other stages, and with ``single`` the tensor ranks' slices to each other.
    """
    actor = setting.role("actor")
    if actor is None or not setting.reshards:
        return []
    found, layout = [], setting.rollout_topology()[0]
    for stage in range(topology.pipeline):
        process = stage * topology.sharding * topology.tensor
        part = part_of(actor, replace(topology, process=process))
        size = float(setting.item * sum(t.elements for t in part.tensors.values() if not t.duplicate))
        if topology.pipeline > 1:
            found.append(Message("rollout's weights", "broadcast", "pipeline", topology.pipeline, size))
        if topology.tensor > 1 and layout.tensor == 1:
            found.append(Message("rollout's weights", "all_gather", "tensor", topology.tensor, size))
    return found


def layers_here(shape_layers: int, topology: Topology) -> int:
    """Layers of this process's stage."""
    return len(layers_of_stage(shape_layers, topology.pipeline, topology.stage))
