"""The plan of a rollout against the engine's own admission, and micro batches against those that are cut."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from alignment.engine.batching import micro_batches
from alignment.parallel.topology import Topology
from alignment.plan.activations import cache_bytes
from alignment.plan.memory import memory_of, training_memory
from alignment.plan.rollout_memory import GPU_BLOCK, rollout_of
from alignment.plan.setting import RolePlan, Setting
from alignment.plan.shapes import ModelShape
from alignment.rollout import gpu_operators
from alignment.rollout.arena import BLOCK
from alignment.rollout.continuous import ContinuousBatch
from alignment.rollout.sampler import SamplingSettings
from alignment.rollout.slots import GenerationPrompt, RowTable
from alignment.rollout.stopping import StopRule

SHAPE = ModelShape("llama", 512, 64, 128, 2, 4, 2, 16)


def setting(**changes: object) -> Setting:
    values = {
        "prompt_tokens": 40,
        "response_tokens": 70,
        "mean_prompt": 40.0,
        "mean_response": 70.0,
        "samples": 24,
        "micro_rows": 8,
        "infer_rows": 8,
        "item": 4,
        "kernels": True,
        **changes,
    }
    roles = (RolePlan("actor", SHAPE, "lm", True), RolePlan("reference", SHAPE, "lm", False))
    return Setting("ppo", roles, Topology(), **values)


@pytest.mark.parametrize("budget", [1, 130, 500, 1000, 100_000])
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("most", [0, 5])
@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_the_cache_and_the_rows_are_the_engine_s(budget: int, copies: int, most: int, kind: str) -> None:
    planned = setting(answers_per_prompt=copies, token_budget=budget, rollout_rows=most, kernels=kind == "cpu", item=4)
    plan = rollout_of(planned, Topology(), 1)
    prompts = [GenerationPrompt(np.arange(1, 41), i, "", {}) for i in range(24 // copies)]
    settings = SamplingSettings(max_new_tokens=70, temperature=0.0)
    table = RowTable.start(prompts, copies, settings, StopRule((0,), None, None), None)
    block = BLOCK if kind == "cpu" else GPU_BLOCK
    batch = ContinuousBatch(SimpleNamespace(block=block), table, settings, budget, most or None)
    assert plan.tokens == batch.arena.capacity
    assert plan.rows == len(batch._admit())
    assert plan.answers == 24


def test_a_gpu_s_block_is_the_engine_s() -> None:
    assert GPU_BLOCK == gpu_operators.BLOCK


def test_a_budget_of_bytes_is_filled_and_shared_prompts_are_kept_once() -> None:
    few = setting(cache_bytes=300.0 * cache_bytes(SHAPE, 2, 1, 1, 4))
    assert rollout_of(few, Topology(), 1).tokens == 304
    once, each = (rollout_of(setting(answers_per_prompt=n), Topology(), 1).tokens for n in (4, 1))
    assert each - once == (24 - 6) * 48
    held = memory_of(few, Topology())[0].kinds
    assert held["kv_cache"] == 304 * cache_bytes(SHAPE, 2, 1, 1, 4)


def test_the_plain_path_takes_its_batches_and_its_copies() -> None:
    plain = setting(engine=False)
    assert rollout_of(plain, Topology(), 1).rows == 8
    held = memory_of(plain, Topology())[0].kinds
    assert held["kv_cache"] == 2 * cache_bytes(SHAPE, 2, 8, 110, 4)


@pytest.mark.parametrize("budget", [0, 50, 110, 250, 1000])
def test_micro_batches_are_those_that_are_cut(budget: int) -> None:
    planned = setting(max_tokens=budget, accumulation=2)
    parts = micro_batches([110] * 16, 8, budget)
    assert planned.micro_batch_at(110) == len(parts[0])
    assert planned.micro_batches_at(110) == len(parts)
    assert planned.infer_batch_at(110) == len(micro_batches([110] * 24, 8, budget)[0])
    pairs = Setting("reward", planned.roles[:1], Topology(), micro_rows=8, row_tokens=50, max_tokens=budget)
    parts = micro_batches([2 * 50] * 8, 8, budget)
    assert (pairs.micro_batch_at(50), pairs.micro_batches) == (len(parts[0]), len(parts))


def test_a_budget_of_tokens_bounds_activations() -> None:
    whole, less = (training_memory(setting(max_tokens=n), Topology(), setting().roles[0]) for n in (0, 220))
    assert less["activations"] == pytest.approx(whole["activations"] / 4)
