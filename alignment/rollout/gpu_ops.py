"""The rollout engine's layers on a GPU: :class:`LayerOps` with steps replaced by Paddle's fused operators."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from alignment.ppo.models.decoder import Decoder
from alignment.rollout.gpu_cache import Burst, slots
from alignment.rollout.gpu_operators import (
    BLOCK,
    CACHED,
    LONGEST_ROW,
    NORM,
    PROMPT,
    ROTARY,
    SWIGLU,
    CachedRows,
    GpuOperators,
)
from alignment.rollout.gpu_sampling import choose_on_device
from alignment.rollout.layers import CachedBatch, LayerOps, PackedBatch
from alignment.rollout.sampler import SamplingSettings


class GpuOps(LayerOps):
    """Decoder layers on a GPU. A step whose operator is not in ``steps`` is computed as :class:`LayerOps` does.

    Within a burst of decoding steps nothing is copied between host and device and nothing waits.

    Args:
        model, decoder: see :class:`LayerOps`.
        operators: Paddle's.
        steps: which of them to use, of :data:`~alignment.rollout.gpu_operators.KERNELS`.
    """

    burst = 4
    block = BLOCK

    def __init__(self, model: Any, decoder: Decoder, operators: GpuOperators, steps: Collection[str]) -> None:
        super().__init__(model, decoder)
        self.operators, self.steps = operators, frozenset(steps)
        self._burst: Burst | None = None
        self._eos: tuple[tuple[int, ...], Tensor] | None = None

    # -- the cache, in blocks: [blocks, key_heads, BLOCK, head_dim]

    def allocate(self, tokens: int) -> None:
        """See :meth:`LayerOps.allocate`; ``tokens`` are whole blocks."""
        # Zeros: what is never written is hidden by a mask, but NaN times a weight of nothing would still be NaN.
        shape = [tokens // BLOCK, self.shape.key_heads, BLOCK, self.shape.head_dim]
        self.keys = [paddle.zeros(shape, dtype=self.dtype) for _ in self.decoder.layers]
        self.values = [paddle.zeros(shape, dtype=self.dtype) for _ in self.decoder.layers]

    def release(self) -> None:
        """See :meth:`LayerOps.release`."""
        super().release()
        self._burst = None

    # -- the decoder

    def decode(self, tokens: Tensor, batch: CachedBatch) -> Tensor:
        """See :meth:`LayerOps.decode`; where the last choice failed (-1), token 0 is read instead."""
        return super().decode(tokens.clip(min=0), batch)

    def final_norm(self, x: Tensor) -> Tensor:
        """See :meth:`LayerOps.final_norm`."""
        return self.norm(x, self.decoder.backbone.norm.weight) if NORM in self.steps else super().final_norm(x)

    def prepare(self, batch: PackedBatch | CachedBatch, angles: tuple[Tensor, Tensor]) -> Any:
        """See :meth:`LayerOps.prepare`."""
        if isinstance(batch, PackedBatch):
            return self._prompt_plan(batch, angles)
        if batch.step == 0 or self._burst is None:
            blocks = int(self.keys[0].shape[0])
            self._burst = Burst.start(batch.positions, batch.places, batch.spans, self.burst, blocks)
        else:
            self._burst.advance()
        burst, window = self._burst, self.shape.window
        rotary = self._tables(angles, burst.positions)
        if CACHED in self.steps and burst.longest <= LONGEST_ROW:
            return _StepPlan(rotary, burst.rows(window, self.dtype))
        rows, width = burst.real.shape
        column = paddle.arange(width).unsqueeze(0)
        seen = paddle.logical_and(column <= burst.lengths, paddle.logical_not(burst.hidden(window)))
        index = paddle.arange(rows * width).reshape([rows, width])
        return _StepPlan(rotary, None, slots(burst.places, self.shape.key_heads), burst.tables, index, seen)

    def _prompt_plan(self, batch: PackedBatch, angles: tuple[Tensor, Tensor]) -> _PromptPlan:
        lengths = np.diff(batch.starts)
        longest, window = int(lengths.max()), self.shape.window
        positions, places = paddle.to_tensor(batch.positions), paddle.to_tensor(batch.places)
        plain = None
        if PROMPT not in self.steps or (window and longest > window):  # the operator knows no window
            # prompts read each other only, so they need not read the cache
            plain = super().prepare(replace(batch, places=np.arange(len(batch.places))), angles)
        kept = slots(places, self.shape.key_heads)
        starts = paddle.to_tensor(batch.starts.astype(np.int32))
        return _PromptPlan(self._tables(angles, positions), kept, starts, longest, plain)

    def _tables(self, angles: tuple[Tensor, Tensor], positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the tokens as :meth:`rotate` needs them."""
        cosine, sine = (paddle.gather(table, positions).astype(self.dtype).unsqueeze(1) for table in angles)
        if ROTARY not in self.steps:
            return cosine, sine
        return tuple(paddle.concat([half, half], axis=-1).unsqueeze(0) for half in (cosine, sine))

    # -- its steps

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """See :meth:`LayerOps.norm`."""
        if NORM not in self.steps:
            return super().norm(x, weight)
        weight = weight + self.shape.norm_offset if self.shape.norm_offset else weight
        return self.operators.norm(x, weight.astype(x.dtype), self.shape.epsilon)

    def rotate(self, q: Tensor, k: Tensor, plan: Any) -> tuple[Tensor, Tensor]:
        """See :meth:`LayerOps.rotate`."""
        if ROTARY not in self.steps:
            return super().rotate(q, k, plan)
        wide = [1, q.shape[0], -1, self.shape.head_dim]
        turned = self.operators.rotary(q.reshape(wide), k.reshape(wide), *plan.rotary)
        return turned[0].reshape(q.shape), turned[1].reshape(k.shape)

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        """See :meth:`LayerOps.activate`; the operator knows SiLU only."""
        if SWIGLU not in self.steps or self.shape.activation:
            return super().activate(gate, up)
        return self.operators.swiglu(gate, up)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, number: int, plan: Any) -> Tensor:
        """See :meth:`LayerOps.attend`."""
        keys, values = self.keys[number], self.values[number]
        if isinstance(plan, _StepPlan) and plan.rows is not None:
            return self.operators.cached_attention(paddle.concat([q, k, v], axis=-1), keys, values, plan.rows)
        self.keys[number], self.values[number] = _kept(keys, plan.slots, k), _kept(values, plan.slots, v)
        if isinstance(plan, _StepPlan):
            return self.attend_over(q, *(_flat(c[number], plan.tables) for c in (self.keys, self.values)), plan)
        if plan.plain is not None:
            return self.attend_over(q, k, v, plan.plain)
        heads = [q.shape[0], -1, self.shape.head_dim]
        scale = self.shape.head_dim**-0.5
        mixed = self.operators.prompt_attention(
            q.reshape(heads), k.reshape(heads), v.reshape(heads), plan.starts, plan.longest, scale
        )
        return mixed.reshape(q.shape)

    # -- the choice of a token

    def stage(self, uniforms: np.ndarray, early: np.ndarray) -> tuple[Any, Any]:
        """See :meth:`LayerOps.stage`."""
        return paddle.to_tensor(uniforms), paddle.to_tensor(early)

    def choose(
        self,
        logits: Tensor,
        settings: SamplingSettings,
        uniforms: Any,
        early: Any,
        eos_ids: tuple[int, ...],
        seen: Tensor | None,
        allowed: np.ndarray | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`LayerOps.choose`; nothing is looked at from the host but what is ``allowed``."""
        if self._eos is None or self._eos[0] != eos_ids or self._eos[1].shape[0] != logits.shape[-1]:
            ends = np.zeros(logits.shape[-1], dtype=bool)
            ends[list(eos_ids)] = True
            self._eos = eos_ids, paddle.to_tensor(ends)
        banned = self._eos[1] if eos_ids and settings.min_new_tokens else None
        mask = None if allowed is None else paddle.to_tensor(allowed)
        return choose_on_device(logits, settings, uniforms, early, banned, seen, mask)


@dataclass(frozen=True)
class _PromptPlan:
    """Of a prefill: rotary tables, where keys and values are kept ``[T * key_heads]``, where prompts begin ``[S + 1]``
    int32, tokens of the longest, and the plan of :class:`LayerOps` over the packed tokens where it is needed.
    """

    rotary: tuple[Tensor, Tensor]
    slots: Tensor
    starts: Tensor
    longest: int
    plain: Any


@dataclass(frozen=True)
class _StepPlan:
    """Of a decoding step: rotary tables and the operator's rows; or, without it, where keys and values are kept, the
    block tables, and what :meth:`LayerOps.attend_over` reads of a plan.
    """

    rotary: tuple[Tensor, Tensor]
    rows: CachedRows | None
    slots: Tensor | None = None
    tables: Tensor | None = None
    index: Tensor | None = None
    mask: Tensor | None = None
    gathered: None = None


def _kept(cache: Tensor, where: Tensor, new: Tensor) -> Tensor:
    """The cache with ``new`` ``[T, key_heads * head_dim]`` written, in place, to the ``slots``."""
    flat = cache.reshape([-1, cache.shape[-1]])
    flat = paddle.scatter_(flat, where, new.reshape([-1, cache.shape[-1]]))
    return flat.reshape(cache.shape)


def _flat(cache: Tensor, tables: Tensor) -> Tensor:
    """``[B * W * BLOCK, key_heads * head_dim]``: the rows' blocks, one after the other."""
    blocks = paddle.gather(cache, tables.reshape([-1])).transpose([0, 2, 1, 3])
    return blocks.reshape([-1, cache.shape[1] * cache.shape[3]])
