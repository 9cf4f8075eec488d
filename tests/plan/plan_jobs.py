"""Jobs of forked ranks that measure what a plan predicts: bytes held, bytes at a peak, bytes sent."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from typing import Any

import numpy as np


def measure(folder: str, layout: dict[str, Any], sizes: dict[str, int], recompute: bool) -> dict[str, Any]:
    """Train, score and generate with one causal model in a layout.

    Args:
        folder: of the model.
        layout: fields of a ``Topology``.
        sizes: ``rows`` of a micro batch, ``micro_batches``, ``prompt`` and ``response`` tokens.
        recompute: of the model that is trained.

    Returns:
        Bytes by name: what lies there between passes, what a phase adds at its peak, what a phase sends.
    """
    import paddle

    from alignment.engine.engine import Engine, OptimizerSettings
    from alignment.parallel import Topology, init_world
    from alignment.ppo.models import load_causal_lm
    from alignment.rollout.roles import PolicyRole

    paddle.set_device("cpu")
    rank = int(os.environ.get("PADDLE_TRAINER_ID", "0"))
    topology = Topology(process=rank, **layout)
    world = init_world(topology)
    before = allocated()
    model = load_causal_lm(folder, topology=topology)
    gc.collect()
    found: dict[str, Any] = {"loaded": allocated() - before}
    engine = Engine("actor", model, world, OptimizerSettings(1e-3), recompute=recompute)
    role = PolicyRole(engine, 1.0, sizes["rows"])
    found["parameters"] = held(model)
    parts = [rollout(sizes["rows"], sizes["prompt"], sizes["response"]) for _ in range(sizes["micro_batches"])]

    def loss(logprobs: Any, entropy: Any, part: Any) -> tuple[Any, float]:
        return -logprobs.sum() / 100, 0.0

    role.train(parts, loss)
    engine.step()
    found["parameters_after_step"] = held(model)
    found["optimizer"] = sum(bytes_of(tensor) for tensor in engine.optimizer_tensors())
    with counting() as sent, peak_above() as peak:
        role.train(parts, loss)
    found["train_sent"], found["train_peak"] = sum(sent), peak[0]
    found["gradients"] = sum(bytes_of(p.grad) for p in engine.parameters.values() if p.grad is not None)
    with counting() as sent:
        engine.step()
    found["step_sent"] = sum(sent)
    with counting() as sent, peak_above() as peak:
        role.logprobs(parts[0])
    found["infer_sent"], found["infer_peak"] = sum(sent), peak[0]
    if topology.sharding_stage < 3:
        found |= generate(engine, world, sizes, True)
        plain = generate(engine, world, sizes, False)
        found |= {f"plain_{name}": value for name, value in plain.items()}
    world.close()
    return found


def generate(engine: Any, world: Any, sizes: dict[str, int], fused: bool) -> dict[str, Any]:
    """Answers of full length: bytes of the cache (the plain path's at the last step), the peak, and bytes sent."""
    from alignment.rollout.generate import GenerationEngine, GenerationPrompt
    from alignment.rollout.layers import CpuKernelOps
    from alignment.rollout.layouts import RolloutEngine
    from alignment.rollout.plain_decoder import PlainDecoder
    from alignment.rollout.sampler import SamplingSettings

    caches: list[int] = []

    class WatchedPlain(PlainDecoder):
        def step(self, *args: Any) -> Any:
            logits, grown = super().step(*args)
            caches.append(sum(bytes_of(tensor) for layer in grown for tensor in layer))
            return logits, grown

    class WatchedKernels(CpuKernelOps):
        def allocate(self, tokens: int) -> None:
            super().allocate(tokens)
            caches.append(bytes_of(self.cache))

    def make(model: Any, schedule: Any) -> GenerationEngine:
        made = GenerationEngine(model, Tokenizer(), [0], None, sizes["rows"], schedule, fused=fused)
        if made.ops is not None:
            made.ops = WatchedKernels(model, made.ops.decoder, made.ops.kernels)
        made._plain.decoder = WatchedPlain(model, schedule)
        made._plain._readers[0] = made._plain.decoder
        return made

    generator = RolloutEngine(engine, world, "", make)
    prompts = [GenerationPrompt(np.arange(1, sizes["prompt"] + 1), i, "", {}) for i in range(sizes["rows"])]
    new = sizes["response"]
    settings = SamplingSettings(max_new_tokens=new, min_new_tokens=new, seed=1)
    with counting() as sent, peak_above() as peak:
        generator.generate(prompts, settings)
    return {
        "cache": caches[-1],
        "generate_peak": peak[0],
        "generate_sent": sum(sent),
    }


class Tokenizer:
    """As much of a tokenizer as generation asks for."""

    pad_token_id = 0

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


def rollout(rows: int, prompt: int, response: int) -> Any:
    """Rows of one length."""
    from alignment.rollout.rollout import Rollout

    draw = np.random.default_rng(0)
    return Rollout(
        tokens=draw.integers(1, 300, [rows, prompt + response]),
        prompt_len=np.full(rows, prompt),
        response_len=np.full(rows, response),
        finished=np.zeros(rows, dtype=bool),
        logprobs=np.zeros([rows, response], dtype=np.float32),
        sampler_logprobs=np.zeros([rows, response], dtype=np.float32),
        prompt_index=np.arange(rows),
        sample_index=np.zeros(rows, dtype=np.int64),
        prompts=[""] * rows,
        responses=[""] * rows,
        rows=[{}] * rows,
    )


def allocated() -> int:
    """Bytes that Paddle's CPU allocator has given out."""
    from paddle.base import core

    return core.host_memory_stat_current_value("Allocated", 0)


@contextlib.contextmanager
def peak_above() -> Iterator[list[int]]:
    """The largest number of bytes that the body has there beyond what was there before."""
    from paddle.base import core

    gc.collect()
    before, found = allocated(), [0]
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    yield found
    found[0] = core.host_memory_stat_peak_value("Allocated", 0) - before


@contextlib.contextmanager
def counting() -> Iterator[list[int]]:
    """Bytes that this rank sends through the CPU back end inside, one entry for each message."""
    from alignment.parallel.cpu_backend.mailbox import Mailbox

    sent: list[int] = []
    original = Mailbox.send

    def send(self: Any, rank: int, kind: Any, gid: int, label: str, data: np.ndarray) -> Any:
        sent.append(int(data.size))
        return original(self, rank, kind, gid, label, data)

    Mailbox.send = send  # type: ignore[method-assign]
    try:
        yield sent
    finally:
        Mailbox.send = original  # type: ignore[method-assign]


def bytes_of(tensor: Any) -> int:
    """Bytes of a tensor's numbers."""
    return int(tensor.size) * tensor.element_size()


def held(model: Any) -> int:
    """Bytes of the parameters that are there, each once."""
    there = {id(p): p for p in model.parameters() if p._is_initialized()}
    return sum(bytes_of(p) for p in there.values())
