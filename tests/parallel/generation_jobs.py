"""Jobs of forked ranks: the rollout engine on a model that tensor ranks share."""

from __future__ import annotations

from typing import Any

import numpy as np


def answers(folder: str, tensor: int, way: str, budget: int) -> dict[str, Any]:
    """Answer prompts greedily and by sampling on ``tensor`` ranks.

    Returns:
        ``greedy`` and ``sampled``: lists of token lists; ``logprobs``: of the sampled ones; ``ops``: what computed;
        ``wanted``: on one rank, what paddlenlp's own ``generate`` answers greedily.
    """
    import paddle

    from alignment.ppo.models import load_causal_lm, load_tokenizer
    from alignment.rollout.generate import GenerationEngine
    from alignment.rollout.layers import LayerOps
    from alignment.rollout.sampler import SamplingSettings

    world = _join(tensor)
    model = load_causal_lm(folder, topology=world.topology)
    engine = GenerationEngine(model, load_tokenizer(folder), [0], 128, 4, token_budget=budget)
    assert engine.ops is not None
    if way == "paddle":
        engine.ops = LayerOps(model, engine.ops.decoder)
    greedy = engine.generate(_prompts(), SamplingSettings(20, greedy=True))
    sampled = engine.generate(_prompts(), SamplingSettings(12, seed=3, top_p=0.9, repetition_penalty=1.2), 3)
    found: dict[str, Any] = {
        "greedy": [greedy.tokens[i, greedy.prompt_len[i] : greedy.lengths[i]].tolist() for i in range(len(greedy))],
        "sampled": [
            sampled.tokens[i, sampled.prompt_len[i] : sampled.lengths[i]].tolist() for i in range(len(sampled))
        ],
        "logprobs": sampled.logprobs,
        "ops": type(engine.ops).__name__,
        "group": engine.ops.decoder.tensor_group is not None,
    }
    if tensor == 1:
        found["wanted"] = []
        for prompt in _prompts():
            ids = paddle.to_tensor(prompt.input_ids[None])
            how = {"max_new_tokens": 20, "decode_strategy": "greedy_search", "eos_token_id": 0, "pad_token_id": 0}
            row = model.generate(ids, attention_mask=paddle.ones_like(ids), **how)[0][0].tolist()
            found["wanted"].append(row[: row.index(0) + 1] if 0 in row else row)
    world.close()
    return found


def masked_answers(folder: str, layout: dict[str, int], fused: bool) -> dict[str, Any]:
    """Answer prompts with a masking policy whose weights are the policy's, a little larger.

    Returns:
        ``answers``: lists of token lists; ``allowed``: the tokens of their sets, and how many each has.
    """
    from alignment.ppo.models import load_causal_lm, load_tokenizer
    from alignment.rollout.generate import GenerationEngine
    from alignment.rollout.masking import MaskingPolicy
    from alignment.rollout.sampler import SamplingSettings

    world = _join(**layout)
    model, copy = (load_causal_lm(folder, topology=world.topology) for _ in range(2))
    for parameter in copy.parameters():
        parameter.set_value(parameter * 1.1)
    schedule = world.groups.schedule if world.groups is not None else None
    engine = GenerationEngine(
        model, load_tokenizer(folder), [0], 128, 6, schedule, fused=fused, masking=MaskingPolicy(copy, top_mask=0.5)
    )
    assert (engine.ops is not None) == (fused and schedule is None)
    rollout = engine.generate(_prompts(), SamplingSettings(9, seed=3), 2)
    world.close()
    return {"answers": _responses(rollout), "allowed": [rollout.allowed.ids.tolist(), rollout.allowed.counts.tolist()]}


def _responses(rollout: Any) -> list[list[int]]:
    return [rollout.tokens[i, rollout.prompt_len[i] : rollout.lengths[i]].tolist() for i in range(len(rollout))]


def _prompts() -> list[Any]:
    from alignment.rollout.generate import GenerationPrompt

    rng = np.random.default_rng(1)
    return [GenerationPrompt(rng.integers(2, 300, n), i, "", {}) for i, n in enumerate([3, 40, 1, 17, 9])]


def _join(tensor: int = 1, pipeline: int = 1) -> Any:
    import os

    import paddle

    from alignment.parallel import Topology, init_world

    paddle.set_device("cpu")
    size, rank = int(os.environ["PADDLE_TRAINERS_NUM"]), int(os.environ["PADDLE_TRAINER_ID"])
    return init_world(Topology(size, rank, tensor=tensor, pipeline=pipeline))
