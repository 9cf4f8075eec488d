"""Each fused operator against the plain step that it replaces, on this GPU, before the rollout engine uses it.

An operator may be missing from a build, refuse a shape or compute something else than another version did. A step that
fails here is computed by :class:`LayerOps` in Paddle's own operators, and a line says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from alignment.log import get_logger
from alignment.ppo.models.decoder import Decoder
from alignment.rollout.gpu_operators import (
    BLOCK,
    CACHED,
    KERNELS,
    NORM,
    PROMPT,
    ROTARY,
    SWIGLU,
    GpuOperators,
    dtype_name,
)
from alignment.rollout.gpu_ops import GpuOps
from alignment.rollout.layers import CachedBatch, PackedBatch

# Largest difference between the two, relative to the largest value: a few roundings of the dtype.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
_LENGTHS = (3, BLOCK + 5, BLOCK)


def sound_steps(decoder: Decoder, operators: GpuOperators) -> list[str]:
    """The steps of :data:`KERNELS` whose operators exist and agree with the plain step for this decoder's shape."""
    dtype, found = decoder.layers[0][0].dtype, []
    for step in KERNELS:
        if not operators.has(step, dtype, decoder.shape.head_dim):
            continue
        try:
            with paddle.no_grad():
                fused, plain = (_CASES[step](_ops(decoder, operators, use)) for use in ([step], []))
                gap = _gap(fused, plain)
        except Exception as error:  # whatever an operator raises on a GPU that it does not know
            get_logger().warning("%s (Paddle's %s) cannot be used here: %s", step, KERNELS[step], _message(error))
            continue
        limit = TOLERANCE[dtype_name(dtype)]
        if gap <= limit:  # false for NaN
            found.append(step)
        else:
            text = "%s (Paddle's %s) is not used: it differs from the plain step by %.2g of the largest value"
            get_logger().warning(text, step, KERNELS[step], gap)
    return found


def gpu_layers(model: Any, decoder: Decoder) -> GpuOps:
    """The layers for a model on the GPU, with the operators that are sound there."""
    operators = GpuOperators()
    steps = sound_steps(decoder, operators)
    missing = [step for step in KERNELS if step not in steps]
    get_logger().info("rollout engine on the GPU: fused %s", ", ".join(steps) or "nothing")
    if missing:
        get_logger().info("rollout engine on the GPU: %s in Paddle's plain operators", ", ".join(missing))
    return GpuOps(model, decoder, operators, steps)


def _ops(decoder: Decoder, operators: GpuOperators, steps: list[str]) -> GpuOps:
    ops = GpuOps(None, replace(decoder, layers=decoder.layers[:1]), operators, steps)
    ops.shape = replace(ops.shape, window=0)
    return ops


def _random(ops: GpuOps, *shape: int) -> Tensor:
    seed = sum(shape)
    return paddle.to_tensor(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(ops.dtype)


def _projected(ops: GpuOps, tokens: int) -> list[Tensor]:
    heads = (ops.shape.query_heads, ops.shape.key_heads, ops.shape.key_heads)
    return [_random(ops, tokens, count * ops.shape.head_dim) for count in heads]


def _angles(ops: GpuOps) -> tuple[Tensor, Tensor]:
    """Not the model's: its context may be shorter than the rows here."""
    turns = np.random.default_rng(1).uniform(0, 2 * np.pi, (4 * BLOCK, ops.shape.head_dim // 2)).astype(np.float32)
    return paddle.to_tensor(np.cos(turns)), paddle.to_tensor(np.sin(turns))


def _prompts(ops: GpuOps) -> tuple[Any, list[Tensor]]:
    lengths = np.array(_LENGTHS)
    positions = np.concatenate([np.arange(length) for length in lengths])
    places = np.repeat(np.arange(3) * 4 * BLOCK, lengths) + positions
    batch = PackedBatch(positions, places, np.concatenate([[0], np.cumsum(lengths)]))
    return ops.prepare(batch, _angles(ops)), _projected(ops, len(places))


def _norm(ops: GpuOps) -> list[Tensor]:
    return [ops.norm(_random(ops, 5, ops.shape.hidden), _random(ops, ops.shape.hidden))]


def _rotary(ops: GpuOps) -> list[Tensor]:
    ops.allocate(12 * BLOCK)
    plan, (q, k, _) = _prompts(ops)
    return list(ops.rotate(q, k, plan))


def _swiglu(ops: GpuOps) -> list[Tensor]:
    return [ops.activate(_random(ops, 5, ops.shape.intermediate), _random(ops, 5, ops.shape.intermediate) + 1)]


def _prompt_attention(ops: GpuOps) -> list[Tensor]:
    ops.allocate(12 * BLOCK)
    plan, (q, k, v) = _prompts(ops)
    return [ops.attend(q, k, v, 0, plan), ops.keys[0], ops.values[0]]


def _cached_attention(ops: GpuOps) -> list[Tensor]:
    """Two steps behind prompts of different lengths, of which two rows share one."""
    _prompt_attention(ops)
    prompt = np.array([0, 4, 8, 8]) * BLOCK
    prompt_len, own, before = np.array(_LENGTHS)[[0, 1, 2, 2]], np.array([1, 6, 9, 10]) * BLOCK, np.array([1, 1, 1, 1])
    mixed = []
    for step in range(2):
        spans = np.stack([prompt, prompt_len, own, before + step], axis=1)
        batch = CachedBatch(prompt_len + before + step - 1, own + before + step - 1, spans, step)
        plan = ops.prepare(batch, _angles(ops))
        mixed.append(ops.attend(*_projected(ops, 4), 0, plan))
    return [*mixed, ops.keys[0], ops.values[0]]


_CASES: dict[str, Callable[[GpuOps], list[Tensor]]] = {
    NORM: _norm,
    ROTARY: _rotary,
    SWIGLU: _swiglu,
    PROMPT: _prompt_attention,
    CACHED: _cached_attention,
}


def _gap(fused: list[Tensor], plain: list[Tensor]) -> float:
    gaps = []
    for got, wanted in zip(fused, plain, strict=True):
        got, wanted = got.astype("float32").numpy(), wanted.astype("float32").numpy()
        gaps.append(float(np.abs(got - wanted).max() / np.abs(wanted).max()))
    return max(gaps) if all(np.isfinite(gaps)) else float("nan")


def _message(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if line.startswith("(")), lines[-1])[
        :200
    ]  # Paddle: a stack, then "(Kind) text"
