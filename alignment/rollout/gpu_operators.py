"""Paddle's fused GPU operators, one method for each call, with the arguments and the shapes as the operators want them.

What each demands was read from Paddle 3.3's Python wrappers, shape inference and CUDA kernels; the shapes are checked
in the tests by Paddle's own shape inference. :mod:`~alignment.rollout.gpu_check` compares each operator with the
plain step that it replaces on the GPU at hand before it is used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import paddle
from paddle import Tensor
from paddle.incubate.nn import functional as fused
from paddle.nn import functional as F

# Tokens of a block of the cache. The attention kernel is built for 32, 64 and 128; 64 is the operator's own default.
BLOCK = 64
# Added to the scores of places that are not seen; float16 holds it, and exp() of it is 0.
UNSEEN = -60000.0
# The attention kernel keeps a row's scores in shared memory, four bytes each; every GPU with bfloat16 has 99 KiB.
LONGEST_ROW = 16384

# The steps that an operator replaces, and the operators' names among Paddle's kernels.
NORM, ROTARY, SWIGLU, PROMPT, CACHED = "norm", "rotary", "swiglu", "prompt attention", "cached attention"
KERNELS = {
    NORM: "fused_rms_norm_quant",
    ROTARY: "fused_rotary_position_embedding",
    SWIGLU: "swiglu",
    PROMPT: "flash_attn_unpadded",
    CACHED: "block_multihead_attention",
}


@dataclass(frozen=True)
class CachedRows:
    """Where the rows of a decoding step find their keys and values.

    Attributes:
        tables: ``[B, W]`` int32, the cache's blocks of each row in order.
        lengths: ``[B, 1]`` int32, places before the new token's, those that the mask hides included.
        mask: ``[B, 1, 1, W * BLOCK]`` in the model's dtype, added to the scores: 0 or :data:`UNSEEN`.
        none: ``[B, 1]`` int32 zeros: no row reads a prompt.
        one: ``[B, 1]`` int32 ones: each row brings one token.
        offsets: ``[B]`` int32, ``b * (W * BLOCK - 1)``: padding before row ``b`` if all were ``W * BLOCK`` long.
        starts: ``[B + 1]`` int32, 0 to B.
        longest_prompt: ``[1]`` int32 on the host, 0.
        longest: ``[1]`` int32 on the host, at least the largest of ``lengths``. Without these two the operator copies
            lengths from the device and waits.
    """

    tables: Tensor
    lengths: Tensor
    mask: Tensor
    none: Tensor
    one: Tensor
    offsets: Tensor
    starts: Tensor
    longest_prompt: Tensor
    longest: Tensor


def dtype_name(dtype: paddle.dtype) -> str:
    """``float32``, ``bfloat16``, ..."""
    return str(dtype).rsplit(".", 1)[-1].lower()


class GpuOperators:
    """The operators that a build of Paddle has for its GPU.

    Args:
        registered: the build's kernels by name, as texts ``(backend, layout, dtype)``; this build's if not given.
        capability: of the GPU; of the one at hand if not given.
    """

    def __init__(
        self, registered: Mapping[str, Sequence[str]] | None = None, capability: tuple[int, int] | None = None
    ) -> None:
        if registered is None:
            registered = paddle.base.core._get_registered_phi_kernels("function")
        self._found = {step: registered.get(kernel, ()) for step, kernel in KERNELS.items()}
        self._capability = capability

    def has(self, step: str, dtype: paddle.dtype, head_dim: int) -> bool:
        """Whether there is an operator for one of :data:`KERNELS` with this dtype and width of heads."""
        name = dtype_name(dtype)
        if not any(re.fullmatch(rf"\(GPU, .*, {name}\)", kernel) for kernel in self._found[step]):
            return False
        if step in (NORM, ROTARY, SWIGLU):
            return name in ("float32", "float16", "bfloat16")
        # FlashAttention computes in 16 bits on Ampere and newer; some builds list its kernel for float32 all the same.
        if name not in ("float16", "bfloat16") or self._gpu() < (8, 0):
            return False
        return head_dim in (32, 64, 128) if step == CACHED else head_dim % 8 == 0 and head_dim <= 256

    def _gpu(self) -> tuple[int, int]:
        if self._capability is None:
            self._capability = tuple(paddle.device.cuda.get_device_capability())
        return self._capability

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Root-mean-square norm.

        Args:
            x: ``[T, hidden]``.
            weight: ``[hidden]``, of ``x``'s dtype.
            epsilon: added to the mean square.

        Returns:
            ``[T, hidden]``.
        """
        return fused.fused_rms_norm(x, weight, None, epsilon, begin_norm_axis=1)[0]

    def rotary(self, q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary positions, halves as in Llama's code ("neox style" means adjacent pairs to this operator).

        Positions are not handed over: with them the tables would have to be as long as the packed batch.

        Args:
            q: ``[1, T, query_heads, head_dim]``.
            k: ``[1, T, key_heads, head_dim]``.
            cosine, sine: ``[1, T, 1, head_dim]`` of each token, the first half repeated; dtype as ``q``.

        Returns:
            ``q`` and ``k`` turned, in their shapes.
        """
        turned = fused.fused_rotary_position_embedding(q, k, None, sin=sine, cos=cosine, use_neox_rotary_style=False)
        return turned[0], turned[1]

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """``silu(gate) * up``, all ``[T, intermediate]``."""
        return F.swiglu(gate, up)

    def prompt_attention(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float) -> Tensor:
        """Causal attention of packed sequences among themselves (FlashAttention).

        Args:
            q: ``[T, query_heads, head_dim]``, float16 or bfloat16.
            k, v: ``[T, key_heads, head_dim]``.
            starts: ``[S + 1]`` int32, where each sequence begins.
            longest: tokens of the longest sequence.
            scale: of the scores.

        Returns:
            ``[T, query_heads, head_dim]``.
        """
        mixed, _ = F.flash_attention.flash_attn_unpadded(
            q, k, v, starts, starts, longest, longest, scale, dropout=0.0, causal=True, training=False
        )
        return mixed

    def cached_attention(self, qkv: Tensor, keys: Tensor, values: Tensor, rows: CachedRows) -> Tensor:
        """Keep one new token of each row in the cache and let it see the row's places.

        The operator's own rotary positions are off: they would be counted from the row's first place, and the places
        behind a prompt up to the end of its last block are a gap.

        Args:
            qkv: ``[B, (query_heads + 2 key_heads) * head_dim]``: q, k and v beside each other, float16 or bfloat16.
            keys, values: ``[blocks, key_heads, BLOCK, head_dim]``, written in place.
            rows: where to write and what to see.

        Returns:
            ``[B, query_heads * head_dim]``.
        """
        return fused.block_multihead_attention(
            qkv,
            keys,
            values,
            seq_lens_encoder=rows.none,
            seq_lens_decoder=rows.lengths,
            seq_lens_this_time=rows.one,
            padding_offsets=rows.offsets,
            cum_offsets=rows.offsets,
            cu_seqlens_q=rows.starts,
            cu_seqlens_k=rows.starts,
            block_tables=rows.tables,
            max_enc_len_this_time=rows.longest_prompt,
            max_dec_len_this_time=rows.longest,
            tgt_mask=rows.mask,
            max_seq_len=int(rows.tables.shape[1]) * BLOCK,
            block_size=BLOCK,
        )[0]
