"""FLOPs against the products that a model really makes, the schedule against its closed form, links and rollouts."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import paddle
import pytest

from alignment.parallel.topology import Topology
from alignment.plan import work
from alignment.plan.hardware import card_named
from alignment.plan.one_f_one_b import forward_only, one_forward_one_backward
from alignment.plan.setting import RolePlan, Setting
from alignment.plan.shapes import ModelShape
from alignment.plan.times import forward_ops, offload_traffic, train_ops
from alignment.plan.traffic import Message
from tests.plan.test_activations import NAMES, build

ROWS, TOKENS = 2, 48


@pytest.mark.parametrize("kind", NAMES)
def test_flops_are_those_of_the_model_s_products(kind: str) -> None:
    from alignment.ppo.models import causal_logits

    model, shape = build(kind, 2)
    counted = []

    def count(layer: Any, inputs: Any, output: Any) -> None:
        counted.append(2.0 * int(np.prod(inputs[0].shape[:-1])) * int(layer.weight.size))

    for layer in model.sublayers():
        if isinstance(layer, paddle.nn.Linear):
            layer.register_forward_post_hook(count)
    model.lm_head.register_forward_post_hook(count)
    causal_logits(model, paddle.to_tensor(np.ones([ROWS, TOKENS], dtype=np.int64)))
    attention = 2 * 4.0 * ROWS * TOKENS * TOKENS * shape.query
    planned = _setting(shape)
    ops = forward_ops(planned, planned.roles[0], Topology(), ROWS, TOKENS, ROWS * TOKENS)
    assert len(counted) == 2 * 7 + 1
    assert work.flops(ops) == pytest.approx(sum(counted) + attention)
    assert work.flops(ops) == pytest.approx(work.matmul_flops(shape, ROWS, TOKENS, ROWS * TOKENS, "lm"))


def test_training_is_three_forwards_and_recompute_a_fourth() -> None:
    shape = ModelShape("llama", 512, 64, 128, 2, 4, 4, 16)
    planned = _setting(shape)
    forward = work.flops(forward_ops(planned, planned.roles[0], Topology(), ROWS, TOKENS, 10.0))
    head = work.flops(work.lm_head(shape, 4, 512, 10.0))
    first, second = train_ops(planned, planned.roles[0], Topology(), ROWS, TOKENS, 10.0)
    assert work.flops(first + second) == pytest.approx(3 * forward)
    again = RolePlan("actor", shape, "lm", True, True)
    first, second = train_ops(planned, again, Topology(), ROWS, TOKENS, 10.0)
    assert work.flops(first + second) == pytest.approx(4 * forward - head)


def _setting(shape: ModelShape) -> Setting:
    return Setting("sft", (RolePlan("model", shape, "lm", True),), Topology(), item=4, row_tokens=TOKENS)


@pytest.mark.parametrize(("stages", "micro"), itertools.product((1, 2, 4, 8), (1, 2, 5, 16)))
def test_equal_stages_have_the_bubble_of_narayanan(stages: int, micro: int) -> None:
    seconds = one_forward_one_backward([1.0] * stages, [2.0] * stages, micro)
    assert seconds == pytest.approx((micro + stages - 1) * 3.0)
    assert forward_only([1.0] * stages, micro) == micro + stages - 1


def test_a_slow_stage_sets_the_pace() -> None:
    even = one_forward_one_backward([1.0] * 4, [2.0] * 4, 32)
    slow = one_forward_one_backward([1.0, 1.0, 1.0, 2.0], [2.0, 2.0, 2.0, 4.0], 32)
    assert slow > 1.8 * even
    assert slow >= 32 * 6.0


def test_volumes_of_collectives() -> None:
    size = 1e6
    assert Message("", "all_reduce", "tensor", 4, size).sent() == pytest.approx(1.5e6)
    assert Message("", "all_gather", "tensor", 4, size).sent() == pytest.approx(3e6)
    assert Message("", "reduce_scatter", "tensor", 4, size).sent() == pytest.approx(0.75e6)
    assert Message("", "broadcast", "sharding", 4, size, 2).sent() == pytest.approx(1.5e6)
    assert Message("", "all_reduce", "tensor", 1, size).sent() == 0.0
    card = card_named("h100-80g")
    near, far = (Topology(n, 0, tensor=n) for n in (8, 16))
    a = Message("", "all_reduce", "tensor", 8, size).seconds(card, near)
    b = Message("", "all_reduce", "tensor", 16, size).seconds(card, far)
    assert b > 2 * a


@pytest.mark.parametrize("mode", ["", "single", "tensor_parallel"])
def test_the_rollout_s_layout_is_the_runner_s(mode: str) -> None:
    from alignment.rollout.layouts import rollout_layout

    for tensor, pipeline, sharding in itertools.product((1, 2), (1, 2, 4), (1, 2)):
        count = tensor * pipeline * sharding
        topology = Topology(count, 0, tensor, pipeline, sharding, 1 if sharding > 1 else 0)
        shape = ModelShape("llama", 512, 64, 128, 4, 4, 4, 16)
        planned = Setting("ppo", (RolePlan("actor", shape, "lm", True),), topology, eval_mode=mode)
        real = rollout_layout(topology, mode)
        layout, shares = planned.rollout_topology()
        assert shares == real.shares
        assert (layout.tensor, layout.pipeline) == (real.topology.tensor, real.topology.pipeline)


def test_offloading_moves_what_the_residency_moves() -> None:
    """Against :class:`Residency` itself with a back end that only counts, in its second iteration."""
    from alignment.flow.flow import PPO_BETWEEN, PPO_ITERATION, optimizer_of
    from alignment.parallel.offload import Residency
    from alignment.plan.memory import residents

    shape = ModelShape("llama", 512, 64, 128, 4, 4, 4, 16)
    roles = (
        RolePlan("actor", shape, "lm", True),
        RolePlan("reference", shape, "lm", False),
        RolePlan("critic", shape, "score", True),
        RolePlan("reward", shape, "score", False),
    )
    for level in ("freeze_model", "optimizer", "train_model", "freeze_model optimizer train_model"):
        planned = Setting("ppo", roles, Topology(), offload_level=level)
        here = residents(planned, Topology())
        sizes = {**here.parameters, **{optimizer_of(name): size for name, size in here.optimizer.items()}}
        residency = Residency(level, PPO_ITERATION.residency(), PPO_BETWEEN, _Counting(sizes))
        for group in sizes:
            residency.add(group, list, frozen=group in ("reference", "reward"))
        for _ in range(2):
            residency.drain()
            for phase, _ in PPO_ITERATION.residency():
                residency.enter(phase)
        metrics = residency.drain()
        for phase, (into, out) in offload_traffic(planned, Topology()).items():
            assert metrics.get(f"offload/{phase}_bytes_in", 0.0) == into, (level, phase)
            assert metrics.get(f"offload/{phase}_bytes_out", 0.0) == out, (level, phase)


class _Counting:
    """Moves nothing and says what it would have moved, as the GPU's back end does."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes, self.copied = sizes, set[str]()

    def move_out(self, group: str, tensors: Any, frozen: bool) -> int:
        again = not frozen or group not in self.copied
        self.copied.add(group)
        return self.sizes[group] if again else 0

    def move_in(self, group: str, tensors: Any) -> int:
        return self.sizes[group]

    def prefetch(self, group: str) -> None:
        pass

    def close(self) -> None:
        pass
