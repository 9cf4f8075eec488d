"""Jobs of forked ranks under sharding."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np


def held(folder: str) -> dict[str, float]:
    """Run one training and one inference pass with an unequal number of micro batches on the two ranks.

    Returns:
        Elements of the whole model, of this rank's own parameters and of these with embedding, norm and head; how many
        of the model's elements this rank held between passes, behind the forward of a trained model and of a frozen
        one; the sum of squares of its gradients; the number of results.
    """
    import paddle

    from alignment.engine.engine import Engine, OptimizerSettings
    from alignment.parallel import Topology, init_world
    from alignment.ppo.models import Rows, load_causal_lm

    paddle.set_device("cpu")
    rank = int(os.environ["PADDLE_TRAINER_ID"])
    world = init_world(Topology(2, rank, sharding=2, sharding_stage=3))
    engine = Engine("actor", load_causal_lm(folder), world, OptimizerSettings(1e-3))
    frozen = Engine("reference", load_causal_lm(folder), world)

    def resident(which: Engine) -> int:
        assert which._sharding is not None
        there = [name for name, p in which._sharding.parameters.items() if p._is_initialized()]
        return sum(int(np.prod(which._sharding._shapes[name])) for name in there)

    sharding = engine._sharding
    assert sharding is not None
    sizes = {name: int(np.prod(sharding._shapes[name])) for name in sharding.parameters}
    mine = {name for name in sizes if sharding.owner[name] == rank}
    outside = {name for name in sizes if ".layers." not in name}
    seen: dict[str, float] = {"between": resident(engine)}
    batches = [np.array([[1, 2, 3, 4]]), np.array([[5, 6, 7, 8]])][: 2 - rank]

    def loss(hidden: paddle.Tensor, batch: np.ndarray) -> tuple[paddle.Tensor, float]:
        seen["trained"] = resident(engine)
        return hidden.square().sum(), 0.0

    def look(hidden: paddle.Tensor, batch: np.ndarray) -> float:
        seen["frozen"] = resident(frozen)
        return float(hidden.sum())

    results = engine.train_pass(batches, Rows, loss)
    gradients = [p.grad for p in engine.model.parameters() if p.grad is not None]
    seen["gradients"] = float(sum(float(g.square().sum()) for g in gradients))
    seen["results"] = len(results) + len(frozen.infer_pass(batches, Rows, look))
    seen |= {
        "whole": sum(sizes.values()),
        "own": sum(sizes[name] for name in mine),
        "own_and_outside": sum(sizes[name] for name in mine | outside),
        "after": resident(engine),
    }
    world.close()
    return seen


def train_two_tensors(folder: str, stage: str, *more: str) -> int:
    """A run of SFT with LoRA on one matrix: two trained tensors for all ranks."""
    from alignment.sft.run_sft import main
    from tests.flow.disk_jobs import write_arguments

    ready = Path(folder, "ready")
    if os.environ["PADDLE_TRAINER_ID"] == "0" and not ready.exists():
        write_arguments("sft", Path(folder))
        ready.write_text("")
    while not ready.exists():
        time.sleep(0.05)
    words = [
        str(Path(folder, "sft.json")), "lora=true", "lora_target_modules=.*layers.0.*q_proj.*", f"sharding={stage}",
        "num_train_epochs=4", "learning_rate=0.01", *more,
    ]  # fmt: skip
    return main(words)
