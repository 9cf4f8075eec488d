"""What Paddle's fused GPU operators compute, in numpy: from their documentation and the code of their kernels."""

from __future__ import annotations

import numpy as np
import paddle
from paddle import Tensor

from alignment.rollout.gpu_operators import BLOCK, CachedRows, GpuOperators


class ReferenceOperators(GpuOperators):
    """The operators' semantics on the host, in float32; every call is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def has(self, step: str, dtype: paddle.dtype, head_dim: int) -> bool:
        return True

    def _count(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        self._count("norm")
        return super().norm(x, weight, epsilon)  # has a CPU kernel in float32

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        self._count("swiglu")
        return super().swiglu(gate, up)  # likewise

    def rotary(self, q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        """Front half and back half turn together; the tables are as wide as a head."""
        self._count("rotary")
        assert tuple(cosine.shape) == tuple(sine.shape) == (1, q.shape[1], 1, q.shape[3])
        turned = []
        for x in (q.numpy(), k.numpy()):
            front, back = np.split(x, 2, axis=-1)
            rotated = np.concatenate([-back, front], axis=-1)
            turned.append(paddle.to_tensor(x * cosine.numpy() + rotated * sine.numpy()))
        return turned[0], turned[1]

    def prompt_attention(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float) -> Tensor:
        """Each sequence by itself, causal; query head ``h`` reads key head ``h // (query_heads / key_heads)``."""
        self._count("prompt attention")
        assert starts.dtype == paddle.int32
        q, k, v, starts = q.numpy(), k.numpy(), v.numpy(), starts.numpy()
        assert longest == np.diff(starts).max()
        out = np.zeros_like(q)
        for start, end in zip(starts[:-1], starts[1:], strict=True):
            for head in range(q.shape[1]):
                own = head // (q.shape[1] // k.shape[1])
                scores = q[start:end, head] @ k[start:end, own].T * scale
                scores[np.triu_indices(end - start, 1)] = -np.inf
                out[start:end, head] = softmax(scores) @ v[start:end, own]
        return paddle.to_tensor(out)

    def cached_attention(self, qkv: Tensor, keys: Tensor, values: Tensor, rows: CachedRows) -> Tensor:
        """As the kernel walks through the block tables: row ``b`` writes its key and value at column ``lengths[b]``
        and sees the columns 0 to ``lengths[b]``, the mask added to the scaled scores.
        """
        self._count("cached attention")
        tables, lengths, mask = rows.tables.numpy(), rows.lengths.numpy()[:, 0], rows.mask.numpy()
        for tensor in (rows.tables, rows.lengths, rows.none, rows.one, rows.offsets, rows.starts, rows.longest):
            assert tensor.dtype == paddle.int32
        assert rows.longest.place.is_cpu_place() and rows.longest_prompt.place.is_cpu_place()
        assert int(rows.longest) >= lengths.max() > 0 == int(rows.longest_prompt)
        assert mask.shape == (len(tables), 1, 1, tables.shape[1] * BLOCK) and mask.shape[3] > lengths.max()
        new, cache_k, cache_v = qkv.numpy(), keys.numpy(), values.numpy()
        key_heads, head_dim = cache_k.shape[1], cache_k.shape[3]
        query_heads = new.shape[1] // head_dim - 2 * key_heads
        longest_row = tables.shape[1] * BLOCK  # what the call passes as max_seq_len
        out = np.full([len(new), query_heads * head_dim], np.nan, dtype=new.dtype)
        for b, length in enumerate(lengths):
            token = b * longest_row - int(rows.offsets[b])  # padding before the row is taken out
            q, k, v = np.split(new[token].reshape(-1, head_dim), [query_heads, query_heads + key_heads], axis=0)
            cache_k[tables[b, length // BLOCK], :, length % BLOCK] = k
            cache_v[tables[b, length // BLOCK], :, length % BLOCK] = v
            column = np.arange(length + 1)
            block, within = tables[b, column // BLOCK], column % BLOCK
            for head in range(query_heads):
                own = head // (query_heads // key_heads)
                scores = cache_k[block, own, within] @ q[head] * head_dim**-0.5 + mask[b, 0, 0, : length + 1]
                mixed = softmax(scores) @ cache_v[block, own, within]
                out[token, head * head_dim : (head + 1) * head_dim] = mixed
        keys.set_value(cache_k)
        values.set_value(cache_v)
        return paddle.to_tensor(out)


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)
