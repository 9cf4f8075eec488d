"""A decoder layer behind a key-value cache, defined once for every device.

:class:`LayerOps` writes it down in Paddle's own operators; a subclass replaces the steps that its device does better
(:class:`CpuKernelOps`: the C++ kernels). The cache has one place per token; which places a row reads is said by the
batch, so rows come and go without anything being moved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import Tensor
from paddle.nn import functional as F

from alignment.kernels.ops import ATTENTION, MLP, Kernels
from alignment.parallel.tensor_ranks import add_up
from alignment.ppo.models.decoder import Decoder, head_weight
from alignment.ppo.models.forward import kept_tokens, lm_logits
from alignment.ppo.models.precision import rounded
from alignment.rollout.arena import BLOCK
from alignment.rollout.sampler import SamplingSettings, choose_tokens

#: Prompts are read in groups of so many tokens: what a layer holds at once does not grow with the number of prompts.
#: Larger groups are no faster.
PREFILL_TOKENS = 4096


@dataclass(frozen=True)
class PackedBatch:
    """Whole prompts, one after the other.

    Attributes:
        positions: ``[T]`` int64, each token's place in its prompt.
        places: ``[T]`` int64, where in the cache it is kept.
        starts: ``[S + 1]`` int64, where each prompt begins.
    """

    positions: np.ndarray
    places: np.ndarray
    starts: np.ndarray

    def parts(self, tokens: int) -> Iterator[tuple[PackedBatch, int, int]]:
        """Cut into batches of whole prompts, in order, of at most so many tokens each when padded to their longest (a
        longer prompt is alone), with the tokens ``[first, last)`` that each has.
        """
        lengths, begin = np.diff(self.starts), 0
        while begin < len(lengths):
            widths = np.maximum.accumulate(lengths[begin:])
            fits = np.flatnonzero(widths * np.arange(1, len(widths) + 1) > tokens)
            end = begin + (max(1, int(fits[0])) if len(fits) else len(widths))
            first, last = int(self.starts[begin]), int(self.starts[end])
            starts = self.starts[begin : end + 1] - first
            yield PackedBatch(self.positions[first:last], self.places[first:last], starts), first, last
            begin = end


@dataclass(frozen=True)
class CachedBatch:
    """One new token for each row.

    Attributes:
        positions: ``[B]`` int64.
        places: ``[B]`` int64, where in the cache the new token is kept.
        spans: ``[B, 4]`` int64: place and length of the row's prompt, place and length of its answer so far with the
            new token.
        step: of a burst, from 0; every further step has the same rows, each one token longer.
    """

    positions: np.ndarray
    places: np.ndarray
    spans: np.ndarray
    step: int = 0


class LayerOps:
    """Decoder layers in Paddle's own operators, on any device.

    Args:
        model: the causal language model, whole or this tensor rank's part.
        decoder: of it.

    Attributes:
        burst: decoding steps between two looks at what was sampled (a look waits for the device).
        block: regions of the cache begin at multiples of so many tokens.
    """

    burst = 1
    block = BLOCK

    def __init__(self, model: Any, decoder: Decoder) -> None:
        self.model, self.decoder, self.shape = model, decoder, decoder.shape
        self.dtype = decoder.layers[0][0].dtype
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def allocate(self, tokens: int) -> None:
        """Make a cache of so many tokens, in place of any that there was."""
        shape = [tokens, self.shape.key_heads * self.shape.head_dim]
        self.keys = [paddle.zeros(shape, dtype=self.dtype) for _ in self.decoder.layers]
        self.values = [paddle.zeros(shape, dtype=self.dtype) for _ in self.decoder.layers]

    def release(self) -> None:
        """Give the cache back."""
        self.keys, self.values = [], []

    @property
    def bytes_per_token(self) -> int:
        """Of the cache."""
        width = self.shape.key_heads * self.shape.head_dim
        return 2 * len(self.decoder.layers) * width * paddle.empty([0], dtype=self.dtype).element_size()

    # -- the decoder

    def prefill(self, tokens: np.ndarray, batch: PackedBatch) -> Tensor:
        """Read whole prompts ``[T]`` and keep them; returns ``[S, hidden]``, behind each prompt's last token."""
        angles = self.decoder.angles(int(batch.positions.max()) + 1)
        ends = []
        for part, first, last in batch.parts(PREFILL_TOKENS):
            x = self.layers(self.embed(paddle.to_tensor(tokens[first:last])), part, angles)
            ends.append(paddle.gather(x, paddle.to_tensor(part.starts[1:] - 1)))
        return self.final_norm(ends[0] if len(ends) == 1 else paddle.concat(ends))

    def decode(self, tokens: Tensor, batch: CachedBatch) -> Tensor:
        """Read one more token ``[B]`` of each row; returns ``[B, hidden]``."""
        angles = self.decoder.angles(int(batch.positions.max()) + 1)
        return self.final_norm(self.layers(self.embed(tokens), batch, angles))

    def layers(self, x: Tensor, batch: PackedBatch | CachedBatch, angles: tuple[Tensor, Tensor]) -> Tensor:
        """All decoder layers, ``[T, hidden]`` -> ``[T, hidden]``: each half adds to the residual stream, and with
        tensor parallelism what it adds is the sum of all ranks' parts.
        """
        plan = self.prepare(batch, angles)
        for number, weights in enumerate(self.decoder.layers):
            x = x + self.handed_on(self.total(self.attention(x, weights, number, plan)))
            x = self.handed_on(x + self.handed_on(self.total(self.mlp(x, weights, plan))))
        return x

    def handed_on(self, x: Tensor) -> Tensor:
        """What one step hands to the next: rounded in a bfloat16 model on a CPU."""
        return rounded(x) if self.shape.rounded else x

    def embed(self, tokens: Tensor) -> Tensor:
        """``[T]`` int64 -> ``[T, hidden]``."""
        return self.decoder.embed(tokens)

    def final_norm(self, x: Tensor) -> Tensor:
        """``[..., hidden]``."""
        return self.decoder.norm(x)

    def total(self, part: Tensor) -> Tensor:
        """Add up what the tensor ranks have."""
        group = self.decoder.tensor_group
        return part if group is None else add_up(part, group)

    def prepare(self, batch: PackedBatch | CachedBatch, angles: tuple[Tensor, Tensor]) -> Any:
        """What all layers of a step need, made once."""
        positions = paddle.to_tensor(batch.positions)
        rotary = tuple(paddle.gather(table, positions).astype(self.dtype).unsqueeze(1) for table in angles)
        index, mask = _seen_places(batch, self.shape.window)
        width = len(batch.starts) - 1 if isinstance(batch, PackedBatch) else len(batch.places)
        gathered = None
        if isinstance(batch, PackedBatch):
            lengths = np.diff(batch.starts)
            row = np.repeat(np.arange(width), lengths)
            gathered = row * int(lengths.max()) + batch.positions, (width, int(lengths.max()))
        return _Plan(rotary, paddle.to_tensor(batch.places), paddle.to_tensor(index), paddle.to_tensor(mask), gathered)

    def attention(self, x: Tensor, weights: list[Tensor], number: int, plan: Any) -> Tensor:
        """What the attention of a layer adds: norm, q/k/v, rotary positions, cache, attention, output."""
        normed = self.handed_on(self.norm(x, weights[0]))
        biases = weights[9:] if self.shape.biases else [None] * 3
        q, k, v = (self.handed_on(F.linear(normed, w, b)) for w, b in zip(weights[1:4], biases, strict=True))
        q, k = self.rotate(q, k, plan)
        return F.linear(self.handed_on(self.attend(q, k, v, number, plan)), weights[4])

    def mlp(self, x: Tensor, weights: list[Tensor], plan: Any) -> Tensor:
        """What the feed-forward half of a layer adds: norm, gate and up, activation, down."""
        normed = self.handed_on(self.norm(x, weights[5]))
        gate, up = (self.handed_on(F.linear(normed, weight)) for weight in weights[6:8])
        return F.linear(self.handed_on(self.activate(gate, up)), weights[8])

    # -- its steps

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Root-mean-square norm in float32 (Zhang and Sennrich 2019)."""
        wide = x.astype("float32")
        scaled = wide * paddle.rsqrt(wide.square().mean(-1, keepdim=True) + self.shape.epsilon)
        return scaled.astype(x.dtype) * (weight + self.shape.norm_offset if self.shape.norm_offset else weight)

    def rotate(self, q: Tensor, k: Tensor, plan: Any) -> tuple[Tensor, Tensor]:
        """Rotary positions of ``[T, heads * head_dim]`` each, halves as in Llama's code."""
        return tuple(_rotated(x, self.shape.head_dim, *plan.rotary) for x in (q, k))

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        """The feed-forward half's activation, ``[T, intermediate]``."""
        return (F.gelu(gate) if self.shape.activation else F.silu(gate)) * up

    def attend(self, q: Tensor, k: Tensor, v: Tensor, number: int, plan: Any) -> Tensor:
        """Keep the new tokens' keys and values ``[T, key_heads * head_dim]`` in layer ``number``'s cache, then the
        attention of the new tokens over the places that they see, ``[T, query_heads * head_dim]``.
        """
        paddle.scatter_(self.keys[number], plan.places, k)
        paddle.scatter_(self.values[number], plan.places, v)
        return self.attend_over(q, self.keys[number], self.values[number], plan)

    def attend_over(self, q: Tensor, keys: Tensor, values: Tensor, plan: Any) -> Tensor:
        """Attention over ``keys`` and ``values`` ``[places, key_heads * head_dim]`` as ``plan`` says."""
        shape, (rows, places) = self.shape, plan.index.shape
        if plan.gathered is not None:
            slots, (rows, length) = plan.gathered
            spread = paddle.zeros([rows * length, q.shape[1]], dtype=q.dtype)
            slots = paddle.to_tensor(slots)
            q = paddle.scatter(spread, slots, q)
        flat = plan.index.reshape([-1])
        k, v = (
            paddle.gather(cache, flat).reshape([rows, places, shape.key_heads, shape.head_dim]).transpose([0, 2, 1, 3])
            for cache in (keys, values)
        )
        group = shape.query_heads // shape.key_heads
        q = q.reshape([rows, -1, shape.key_heads, group, shape.head_dim]).transpose([0, 2, 3, 1, 4])
        new = q.shape[3]
        q = q.reshape([rows, shape.key_heads, group * new, shape.head_dim])
        scores = paddle.matmul(q, k, transpose_y=True).astype("float32") * shape.head_dim**-0.5
        scores = scores.reshape([rows, shape.key_heads, group, new, places])
        scores = paddle.where(plan.mask.reshape([rows, 1, 1, -1, places]), scores, paddle.full([], -1e30))
        weights = F.softmax(scores, axis=-1).astype(v.dtype).reshape([rows, shape.key_heads, group * new, places])
        mixed = paddle.matmul(weights, v).reshape([rows, shape.key_heads, group, new, shape.head_dim])
        mixed = mixed.transpose([0, 3, 1, 2, 4]).reshape([rows * new, shape.query_heads * shape.head_dim])
        return mixed if plan.gathered is None else paddle.gather(mixed, slots)

    # -- the choice of a token

    def logits(self, hidden: Tensor) -> Tensor:
        """``[B, hidden]`` -> ``[B, vocab]`` float32, all columns on every tensor rank."""
        return lm_logits(self.model, hidden)

    def stage(self, uniforms: np.ndarray, early: np.ndarray) -> tuple[Any, Any]:
        """Bring what :meth:`choose` needs in the steps of a burst, ``[steps, B]`` each, to where it is needed."""
        return uniforms, early

    def choose(
        self,
        logits: Tensor,
        settings: SamplingSettings,
        uniforms: np.ndarray,
        early: np.ndarray,
        eos_ids: tuple[int, ...],
        seen: Tensor | None,
        allowed: np.ndarray | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose one token for each row, see :func:`choose_tokens`.

        Args:
            logits: ``[B, V]``.
            settings: how.
            uniforms: ``[B]`` float64, the rows' random numbers; of :meth:`stage`.
            early: ``[B]`` bool, where eos has no chance yet; of :meth:`stage`.
            eos_ids: tokens that end an answer.
            seen: ``[B, V]`` uint8, tokens that stand in the row; None without a repetition penalty.
            allowed: ``[B, V]`` bool, tokens that have a chance; None for all.

        Returns:
            ``(tokens [B] int64, logprobs [B] float32, sampler_logprobs [B] float32)``; a token is -1 where a logit is
            NaN or infinite, or none is allowed.
        """
        values = logits.numpy()
        marks = None if seen is None else seen.numpy().astype(bool)
        chosen = choose_tokens(values, settings, uniforms, early, eos_ids, marks, allowed)
        tokens, logprobs, sampler_logprobs = (paddle.to_tensor(part) for part in chosen)
        return tokens, logprobs, sampler_logprobs


@dataclass(frozen=True)
class _Plan:
    """Of one step: rotary tables ``[T, 1, head_dim / 2]``, places ``[T]``, places that each row sees ``[R, W]``, which
    of them each new token may see ``[R, new, W]``, and where packed tokens lie in padded rows.
    """

    rotary: tuple[Tensor, ...]
    places: Tensor
    index: Tensor
    mask: Tensor
    gathered: tuple[np.ndarray, tuple[int, int]] | None


def _rotated(x: Tensor, head_dim: int, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.reshape([x.shape[0], -1, head_dim]).chunk(2, axis=-1)
    turned = paddle.concat([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.reshape([x.shape[0], -1])


def _seen_places(batch: PackedBatch | CachedBatch, window: int) -> tuple[np.ndarray, np.ndarray]:
    """``(index [R, W], mask [R, new, W])``: the places that a row reads, and which of them each new token sees."""
    if isinstance(batch, PackedBatch):
        lengths = np.diff(batch.starts)
        width = int(lengths.max())
        index = np.zeros((len(lengths), width), dtype=np.int64)
        index[np.arange(width) < lengths[:, None]] = batch.places
        behind = np.arange(width)[:, None] - np.arange(width)  # how far back a key lies
        mask = (behind >= 0) & ((behind < window) if window else True)
        return index, np.broadcast_to(mask, (len(lengths), width, width)).copy()
    prompt, prompt_len, own, own_len = batch.spans.T[:, :, None]
    width = int((prompt_len + own_len).max())
    column = np.arange(width)
    total = prompt_len + own_len
    index = np.where(column < prompt_len, prompt + column, own + column - prompt_len)
    mask = (column < total) & ((column >= total - window) if window else True)
    return np.where(column < total, index, 0), mask[:, None, :]


class CpuKernelOps(LayerOps):
    """The C++ kernels: a whole stack of layers in one call, or a half layer at a time between the sums of tensor
    parallelism; and the choice of the token.

    Args:
        model, decoder: see :class:`LayerOps`.
        kernels: the operators.
    """

    def __init__(self, model: Any, decoder: Decoder, kernels: Kernels) -> None:
        super().__init__(model, decoder)
        self.kernels = kernels
        self.weights = [tensor for layer in decoder.layers for tensor in layer]
        self.cache = paddle.empty([0])
        self.nothing_seen = paddle.empty([0], dtype="uint8")

    def allocate(self, tokens: int) -> None:
        """See :meth:`LayerOps.allocate`."""
        assert tokens % BLOCK == 0
        width = self.shape.key_heads * self.shape.head_dim
        self.cache = paddle.empty([len(self.decoder.layers), 2, tokens, width])

    def release(self) -> None:
        """See :meth:`LayerOps.release`."""
        self.cache = paddle.empty([0])

    def prepare(self, batch: PackedBatch | CachedBatch, angles: tuple[Tensor, Tensor]) -> Any:
        """The plan as the kernels read it, see :meth:`Kernels.stack`."""
        packed = isinstance(batch, PackedBatch)
        more = batch.starts if isinstance(batch, PackedBatch) else batch.spans.reshape(-1)
        plan = paddle.to_tensor(np.concatenate([batch.positions, batch.places, more]))
        return angles, plan, len(more) - 1 if packed else 0, not packed

    def layers(self, x: Tensor, batch: PackedBatch | CachedBatch, angles: tuple[Tensor, Tensor]) -> Tensor:
        """See :meth:`LayerOps.layers`."""
        if self.decoder.tensor_group is not None:
            return super().layers(x, batch, angles)
        angles, plan, sequences, cached = self.prepare(batch, angles)
        return self.kernels.stack(x, self.weights, angles, self.cache, plan, self.shape, sequences, cached=cached)

    def attention(self, x: Tensor, weights: list[Tensor], number: int, plan: Any) -> Tensor:
        """See :meth:`LayerOps.attention`."""
        return self._part(x, weights, number, plan, ATTENTION)

    def mlp(self, x: Tensor, weights: list[Tensor], plan: Any) -> Tensor:
        """See :meth:`LayerOps.mlp`."""
        return self._part(x, weights, 0, plan, MLP)

    def _part(self, x: Tensor, weights: list[Tensor], number: int, plan: Any, part: int) -> Tensor:
        angles, numbers, sequences, cached = plan
        how = {"cached": cached, "part": part, "first_layer": number}
        return self.kernels.stack(x, weights, angles, self.cache, numbers, self.shape, sequences, **how)

    def embed(self, tokens: Tensor) -> Tensor:
        """See :meth:`LayerOps.embed`."""
        table = self.decoder.backbone.embed_tokens
        # Mistral's gives zeros for the pad id, which may be sampled like any other
        if self.decoder.tensor_group is not None or getattr(table, "_padding_idx", -1) != -1:
            return super().embed(tokens)
        x = self.kernels.embed(tokens, table.weight, self.decoder.embedding_scale)
        return x if self.decoder.embedding_scale == 1.0 else self.handed_on(x)

    def final_norm(self, x: Tensor) -> Tensor:
        """See :meth:`LayerOps.final_norm`."""
        return self.handed_on(self.kernels.rms_norm(x, self.decoder.backbone.norm.weight, self.shape))

    def logits(self, hidden: Tensor) -> Tensor:
        """See :meth:`LayerOps.logits`."""
        if self.decoder.tensor_group is not None:
            return super().logits(hidden)
        weight, tied = head_weight(self.model)
        logits, kept = self.kernels.project(hidden, weight, tied=tied), kept_tokens(self.model)
        return logits if kept is None else logits[:, :kept].contiguous()

    def choose(
        self,
        logits: Tensor,
        settings: SamplingSettings,
        uniforms: np.ndarray,
        early: np.ndarray,
        eos_ids: tuple[int, ...],
        seen: Tensor | None,
        allowed: np.ndarray | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`LayerOps.choose`."""
        return self.kernels.choose(
            logits,
            paddle.to_tensor(uniforms),
            self.nothing_seen if seen is None else seen,
            paddle.to_tensor(early.astype(np.uint8)),
            None if allowed is None else paddle.to_tensor(allowed.astype(np.uint8)),
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            penalty=settings.repetition_penalty,
            greedy=settings.greedy,
            banned_ids=eos_ids,
        )
