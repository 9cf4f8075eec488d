"""Jobs of forked ranks: a rollout model that is filled from a divided training model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np


def rollout_weights(folder: str, layout: dict[str, int], eval_mode: str) -> dict[str, Any]:
    """Fill a rollout model, change the training model as an optimizer step would, and fill it again.

    Returns:
        ``equal``: whether the rollout model had the training model's weights each time; ``stale``: what generating
        without the second filling said; ``bytes``: that the second filling moved to this process.
    """
    import paddle

    from alignment.engine.engine import Engine, OptimizerSettings
    from alignment.ppo.models import load_causal_lm, load_tokenizer
    from alignment.rollout.generate import GenerationEngine, GenerationPrompt
    from alignment.rollout.layouts import RolloutEngine
    from alignment.rollout.sampler import SamplingSettings

    world = _join(layout)
    whole = load_causal_lm(folder)
    engine = Engine("actor", load_causal_lm(folder, topology=world.topology), world, OptimizerSettings(1e-3))
    tokenizer = load_tokenizer(folder)
    rollout = RolloutEngine(
        engine, world, eval_mode, lambda model, schedule: GenerationEngine(model, tokenizer, [0], 64, 4, schedule)
    )
    rollout.refresh()
    equal = [_holds(rollout.inner.model, whole, 1.0)]
    for parameter in engine.model.parameters():
        parameter.set_value(parameter * 2.0)
    engine.steps += 1
    prompts = [GenerationPrompt(np.array([5, 6, 7]), 0, "a", {})]
    try:
        rollout.generate(prompts, SamplingSettings(max_new_tokens=2, seed=0))
        stale = "generated"
    except Exception as error:
        stale = f"{type(error).__name__}: {error}"
    moved = rollout.refresh()
    equal.append(_holds(rollout.inner.model, whole, 2.0))
    paddle.disable_static()
    world.close()
    return {"equal": equal, "stale": stale, "bytes": moved.nbytes, "again": rollout.refresh()}


def damaged_transfer(folder: str) -> str:
    """What the first filling says when a bucket arrives with other numbers than were sent."""
    import paddle
    import paddle.distributed as dist

    from alignment.engine.engine import Engine, OptimizerSettings
    from alignment.ppo.models import load_causal_lm
    from alignment.rollout.layouts import RolloutEngine

    world = _join({"pipeline": 2})
    engine = Engine("actor", load_causal_lm(folder, topology=world.topology), world, OptimizerSettings(1e-3))
    rollout = RolloutEngine(engine, world, "tensor_parallel", lambda model, schedule: SimpleNamespace(masking=None))
    send = dist.broadcast

    def damaged(tensor: Any, src: int, group: Any) -> None:
        send(tensor, src=src, group=group)
        if dist.get_rank() != src and tensor.size > 2:  # not the checksums
            paddle.assign(tensor + 1e-3, tensor)

    dist.broadcast = damaged
    try:
        rollout.refresh()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        dist.broadcast = send
    return "nothing"


def masked_elsewhere(folder: str) -> str:
    """What a rollout in another layout says of a masking policy in that of the training."""
    from alignment.engine.engine import Engine, OptimizerSettings
    from alignment.ppo.models import load_causal_lm, load_tokenizer
    from alignment.rollout.generate import GenerationEngine
    from alignment.rollout.layouts import RolloutEngine
    from alignment.rollout.masking import MaskingPolicy

    world = _join({"pipeline": 2})
    engine = Engine("actor", load_causal_lm(folder, topology=world.topology), world, OptimizerSettings(1e-3))
    masking, tokenizer = MaskingPolicy(load_causal_lm(folder, topology=world.topology)), load_tokenizer(folder)
    try:
        RolloutEngine(
            engine,
            world,
            "single",
            lambda model, schedule: GenerationEngine(model, tokenizer, [0], 64, 4, schedule, masking=masking),
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _join(layout: dict[str, int]) -> Any:
    import os

    import paddle

    from alignment.parallel import Topology, init_world

    paddle.set_device("cpu")
    size, rank = int(os.environ["PADDLE_TRAINERS_NUM"]), int(os.environ["PADDLE_TRAINER_ID"])
    return init_world(Topology(size, rank, **layout))


def _holds(model: Any, whole: Any, factor: float) -> bool:
    """Whether a rollout model, or this rank's slices of one, has the whole model's weights times a factor."""
    from alignment.parallel import Topology
    from alignment.ppo.models import pieces_of

    config = model.config
    tensor = max(1, config.tensor_parallel_degree)
    topology = Topology(tensor, config.tensor_parallel_rank if tensor > 1 else 0, tensor=tensor)
    expected = whole.state_dict()
    pieces = pieces_of(model, topology)
    return all(
        np.array_equal(tensor_.numpy(), pieces[name].cut(expected[pieces[name].name].numpy() * factor, topology))
        for name, tensor_ in model.state_dict().items()
    )
