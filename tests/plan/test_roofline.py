"""Times: FLOPs against the products that a model really makes, the layout of rollouts, offloading, and what each of a
roofline's sides does.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import paddle
import pytest

from alignment.flow.flow import Call, Flow, optimizer_of
from alignment.parallel.offload import Residency
from alignment.parallel.topology import Topology
from alignment.plan.cards import card_named
from alignment.plan.memory import memory_of, residents
from alignment.plan.roofline import PhaseTime, forward_flops, offload_traffic, times_of, train_flops
from alignment.plan.setting import RolePlan, Setting
from alignment.plan.shapes import MODELS, ModelShape
from alignment.rollout.layouts import rollout_layout
from tests.plan.test_activations import NAMES, build
from tests.ppo.conftest import PPO_BETWEEN, PPO_ITERATION

ROWS, TOKENS = 2, 48
SMALL = ModelShape("llama", 512, 64, 128, 4, 4, 4, 16)
A100 = card_named("a100-80g")


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
    assert len(counted) == 2 * 7 + 1
    forward = forward_flops(shape, ROWS * TOKENS, TOKENS, ROWS * TOKENS)
    assert forward == pytest.approx(sum(counted) + attention)
    assert train_flops(shape, ROWS * TOKENS, TOKENS, ROWS * TOKENS, False) == 3 * forward


def ppo(shape: ModelShape = MODELS["Llama-2-7b"], topology: Topology | None = None, **changes: Any) -> Setting:
    roles = (
        RolePlan("actor", shape, "lm", True),
        RolePlan("reference", shape, "lm", False),
        RolePlan("critic", shape, "score", True),
        RolePlan("reward", shape, "score", False),
    )
    values = {"prompt_tokens": 512, "response_tokens": 512, "mean_prompt": 512.0, "mean_response": 512.0}
    values |= {"samples": 16, "micro_rows": 4, "accumulation": 4, "infer_rows": 16, "flash": True, **changes}
    return Setting("ppo", roles, topology or Topology(), **values)


def times(setting: Setting, **card: float) -> dict[str, PhaseTime]:
    return {time.phase: time for time in times_of(setting, replace(A100, **card))}


def test_phases_are_those_of_the_graph() -> None:
    """Another method's graph has its own phases, residency and times; the same calls take the same."""
    calls = [
        Call("generate", "generate", ("actor",), ("prompts",), "rollout"),
        Call("reference_logprobs", "infer", ("reference",), ("rollout",), "ref_logprobs"),
        Call("update", "train", ("actor",), ("rollout", "ref_logprobs"), "stats"),
    ]
    whole = ppo(offload_level="freeze_model")
    setting = replace(whole, roles=whole.roles[:2], calls=Flow(calls, ("prompts",)))
    names = ["generate", "reference_logprobs", "update"]
    assert [phase.phase for phase in memory_of(setting, Topology())] == names == list(times(setting))
    assert times(setting)["generate"] == times(whole)["generate"]
    assert times(setting)["update"].compute < 0.6 * times(whole)["update"].compute
    assert [phase.away for phase in memory_of(setting, Topology())] == [("reference",), (), ("reference",)]


def test_products_bound_passes_and_bandwidth_bounds_decoding() -> None:
    base, flops, bandwidth = times(ppo()), times(ppo(), tflops=2 * A100.tflops), times(ppo(), bandwidth=1e4)
    assert flops["actor_logprobs"].seconds == pytest.approx(base["actor_logprobs"].seconds / 2)
    assert bandwidth["actor_logprobs"].seconds == pytest.approx(base["actor_logprobs"].seconds)
    # 511 steps that read 13.5 GB of weights, beside the answers' caches
    assert base["generate"].seconds > 511 * 13.5e9 / A100.moving
    assert bandwidth["generate"].seconds < 0.5 * base["generate"].seconds
    assert flops["generate"].seconds > 0.9 * base["generate"].seconds


def test_a_pipeline_waits_and_micro_batches_fill_it() -> None:
    few = times(ppo(topology=Topology(4, 0, pipeline=4), micro_rows=16, accumulation=1))["update"]
    many = times(ppo(topology=Topology(4, 0, pipeline=4), micro_rows=1, accumulation=16))["update"]
    assert few.waiting > 10 * many.waiting > 0


def test_messages_follow_the_layout_and_the_link() -> None:
    """Of one layer's sums forward, a ring over two ranks sends each tensor once."""
    two = times(ppo(topology=Topology(2, 0, tensor=2)))["actor_logprobs"]
    assert two.sent == pytest.approx(2 * 32 * 16 * 1024 * 4096 * 2)
    assert two.messages == two.sent / (1e9 * A100.link * A100.link_efficiency)
    far = times(ppo(topology=Topology(2, 0, tensor=2)), node=1)["actor_logprobs"]
    assert far.messages == pytest.approx(two.messages * A100.link / A100.network)
    assert times(ppo())["update"].sent == 0


@pytest.mark.parametrize("mode", ["", "single", "tensor_parallel"])
def test_the_rollout_s_layout_is_the_runner_s(mode: str) -> None:
    for tensor, pipeline, sharding in itertools.product((1, 2), (1, 2, 4), (1, 2)):
        count = tensor * pipeline * sharding
        topology = Topology(count, 0, tensor, pipeline, sharding, 1 if sharding > 1 else 0)
        real = rollout_layout(topology, mode)
        layout, shares = ppo(SMALL, topology, eval_mode=mode).rollout_topology()
        assert shares == real.shares
        assert (layout.tensor, layout.pipeline) == (real.topology.tensor, real.topology.pipeline)


def test_offloading_moves_what_the_residency_moves() -> None:
    """Against :class:`Residency` itself with a back end that only counts, in its second iteration."""
    for level in ("freeze_model", "optimizer", "train_model", "freeze_model optimizer train_model"):
        planned = ppo(SMALL, offload_level=level)
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
