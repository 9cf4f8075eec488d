"""Jobs of forked ranks: the rollout engine's GPU layers on a model that tensor ranks share."""

from __future__ import annotations

import os
from typing import Any

import numpy as np


def answers(folder: str, tensor: int, steps: list[str] | None) -> dict[str, Any]:
    """Sample answers on ``tensor`` ranks.

    Args:
        folder: of the model.
        tensor: ranks that share it.
        steps: the GPU layers with these fused steps (their semantics in numpy); None for the layers on any device.

    Returns:
        ``tokens`` and ``logprobs`` of the rows, whether the model was divided (``group``), and the fused operators that
        were called (``calls``).
    """
    import paddle

    from alignment.parallel import Topology, init_world
    from alignment.ppo.models import load_causal_lm, load_tokenizer
    from alignment.rollout.generate import GenerationEngine, GenerationPrompt
    from alignment.rollout.gpu_ops import GpuOps
    from alignment.rollout.layers import LayerOps
    from alignment.rollout.sampler import SamplingSettings
    from tests.rollout.gpu_reference import ReferenceOperators

    paddle.set_device("cpu")
    size, rank = int(os.environ["PADDLE_TRAINERS_NUM"]), int(os.environ["PADDLE_TRAINER_ID"])
    world = init_world(Topology(size, rank, tensor=tensor))
    model = load_causal_lm(folder, topology=world.topology)
    engine, operators = GenerationEngine(model, load_tokenizer(folder), [0], 128, 4), ReferenceOperators()
    assert engine.ops is not None
    decoder = engine.ops.decoder
    engine.ops = LayerOps(model, decoder) if steps is None else GpuOps(model, decoder, operators, steps)
    rng = np.random.default_rng(1)
    prompts = [GenerationPrompt(rng.integers(2, 300, n), i, "", {}) for i, n in enumerate([3, 70, 1, 17])]
    rollout = engine.generate(prompts, SamplingSettings(14, seed=3, top_p=0.9, repetition_penalty=1.2), 2)
    found = {
        "tokens": rollout.tokens,
        "logprobs": rollout.logprobs,
        "group": decoder.tensor_group is not None,
        "calls": sorted(operators.calls),
    }
    world.close()
    return found
