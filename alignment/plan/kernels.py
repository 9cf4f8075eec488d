"""What the CPU kernels (:mod:`alignment.kernels`) keep, take and compute: bytes and operators of layers and heads.

They stand for paddlenlp's layers where a model is undivided and float32 on a CPU
(:class:`alignment.ppo.models.fused.FusedDecoder`), for a rollout's layers also where tensor ranks divide it, and for
the LM head wherever a process has all of its columns. The counts were read off ``csrc/layer.h``, ``csrc/ops.cc`` and
``csrc/vocabulary.h``; ``tests/plan`` compares them with Paddle's allocator. What the kernels allocate by themselves
("buffers") Paddle's allocator does not see.

Notation as in :mod:`alignment.plan.activations`; everything is float32.
"""

from __future__ import annotations

from dataclasses import dataclass

from alignment.plan.activations import PlainLayer
from alignment.plan.shapes import ModelShape
from alignment.plan.work import Op, elementwise, norms

FLOAT = 4
#: Tokens that go through all layers together without gradient (``kGroup`` of ops.cc).
GROUP = 1024
#: Columns and rows of logits that exist at a time (``kVocabularyBlock`` and ``kTokenBlock`` of vocabulary.h).
VOCABULARY_BLOCK, TOKEN_BLOCK = 1024, 2048
#: Up to so many rows a product takes as long as reading its weights (``kFewRows`` of gemm.h).
FEW_ROWS = 4


@dataclass(frozen=True)
class FusedLayer(PlainLayer):
    """A decoder layer by the kernels, of real tokens alone."""

    stores_scores = False

    def kept(self, row_tokens: float) -> float:
        """Bytes per token between forward and backward: the output (the next layer's input), two scales of norms,
        q, k, v, a normaliser per head, the heads' output, the residual between the halves, gate and up.
        """
        shape = self.shape
        return FLOAT * (2 * shape.hidden + 2 + 2 * shape.query + 2 * shape.key + shape.heads + 2 * shape.intermediate)

    def scores(self, row_tokens: float) -> float:
        return FLOAT * self.shape.heads

    def input(self) -> float:
        return FLOAT * self.shape.hidden

    def running(self, row_tokens: float) -> float:
        """Without gradient: the stack's input and output, and then what the final norm adds to its input."""
        return FLOAT * 3 * self.shape.hidden

    def backward_working(self, row_tokens: float) -> float:
        """The gradients of a layer's output and input."""
        return FLOAT * 2 * self.shape.hidden

    def buffers(self) -> float:
        """Bytes per token that a layer's backward allocates by itself."""
        h, q, kv, inner = self.shape.hidden, self.shape.query, self.shape.key, self.shape.intermediate
        return FLOAT * (inner + max(inner, q + 2 * kv) + max(inner, q) + max(inner, h) + h)


def stack_buffers(shape: ModelShape, tokens: float, longest: float, tensor: int = 1) -> float:
    """Bytes that the layers without gradient work in: those of one group of packed tokens.

    Args:
        shape: the model.
        tokens: of the call.
        longest: tokens of the longest sequence, which is never cut.
        tensor: tensor ranks.
    """
    h, q, kv, inner = shape.hidden, shape.query / tensor, shape.key / tensor, shape.intermediate / tensor
    return FLOAT * min(tokens, max(GROUP, longest)) * max(h + 2 * q + 2 * kv, h + 2 * inner)


@dataclass(frozen=True)
class FusedHead:
    """LM head and log-probabilities by the kernels. Bytes in all for a number of labels."""

    shape: ModelShape

    def kept(self, labels: float) -> float:
        """For the backward: the states that were gathered, and a few numbers per label."""
        return labels * (FLOAT * self.shape.hidden + 6 * FLOAT)

    def running(self, labels: float) -> float:
        """While it runs forward: no more than it keeps."""
        return self.kept(labels)

    def buffers(self, labels: float) -> float:
        """Bytes of the block of logits that exists at a time."""
        return FLOAT * min(labels, TOKEN_BLOCK) * VOCABULARY_BLOCK


def multiplied(m: float, k: float, n: float) -> list[Op]:
    """``[m, k] x [k, n]``: weights are read, and packed for the rows behind the first ones, before all cores compute;
    of a few rows both overlap.
    """
    weights, flops = FLOAT * k * n, 2.0 * m * k * n
    if m <= FEW_ROWS:
        return [Op("weights", flops, weights, launches=0)]
    return [Op("kernel", flops, launches=0), Op("weights", moved=weights, launches=0)]


def _products(shape: ModelShape, tokens: float, tensor: int) -> list[Op]:
    h, q, kv, inner = shape.hidden, shape.query / tensor, shape.key / tensor, shape.intermediate / tensor
    return [*multiplied(tokens, h, q + 2 * kv), *multiplied(tokens, q, h), *multiplied(tokens, h, 3 * inner)]


def _pointwise(shape: ModelShape, tokens: float, tensor: int) -> list[Op]:
    """Norms and residuals; the activated gate."""
    return [
        Op("normed", moved=FLOAT * 4 * tokens * shape.hidden, launches=0),
        Op("gate", moved=FLOAT * 3 * tokens * shape.intermediate / tensor, launches=0),
    ]


def layer_forward(shape: ModelShape, tokens: float, row_tokens: float, tensor: int = 1) -> list[Op]:
    """One layer over packed rows of ``row_tokens``, the masked half of attention left out."""
    attention = Op("causal", 2.0 * tokens * row_tokens * shape.query / tensor, launches=0)
    return [*_products(shape, tokens, tensor), *_pointwise(shape, tokens, tensor), attention]


def layer_backward(shape: ModelShape, tokens: float, row_tokens: float) -> list[Op]:
    """Its backward: two products for each, five for attention's two (Dao et al. 2022, appendix B)."""
    products = [op.times(2.0) for op in _products(shape, tokens, 1)]
    pointwise = [op.times(2.0) for op in _pointwise(shape, tokens, 1)]
    return [*products, *pointwise, Op("causal", 5.0 * tokens * row_tokens * shape.query, launches=0)]


def layer_decode(shape: ModelShape, rows: float, context: float, tensor: int = 1) -> list[Op]:
    """One layer of one new token for each row: weights are read once, keys and values of the context once."""
    q, kv = shape.query / tensor, shape.key / tensor
    cache = Op("cache", 4.0 * rows * context * q, FLOAT * 2 * rows * context * kv, launches=0)
    return [*_products(shape, rows, tensor), *_pointwise(shape, rows, tensor), cache]


def final_norm(shape: ModelShape, tokens: float, way: str) -> list[Op]:
    """The norm behind the last layer, and spreading its output over the rows: Paddle's operators."""
    ops = elementwise(way, FLOAT, norms(shape, tokens / 2), 3)
    return [*ops, Op("stream", moved=FLOAT * 2 * tokens * shape.hidden, launches=4)]


def lm_head(shape: ModelShape, labels: float) -> list[Op]:
    """Log-probabilities (and entropies, which cost nothing more) of labels."""
    return [*multiplied(labels, shape.hidden, shape.vocab), Op("scan", moved=FLOAT * labels * shape.vocab, launches=8)]


def lm_head_backward(shape: ModelShape, labels: float) -> list[Op]:
    """Its backward: the logits once more, and the gradients of states and weight."""
    products = [op.times(3.0) for op in multiplied(labels, shape.hidden, shape.vocab)]
    return [*products, Op("slope", moved=FLOAT * labels * shape.vocab, launches=8)]


def choice(shape: ModelShape, rows: float, nucleus: bool) -> list[Op]:
    """The logits of new tokens, and the choice among them.

    Args:
        shape: the model.
        rows: that choose.
        nucleus: whether only the most probable tokens have a chance (``top_p``).
    """
    kind = "nucleus" if nucleus else "choice"
    return [*multiplied(rows, shape.hidden, shape.vocab), Op(kind, moved=FLOAT * rows * shape.vocab, launches=10)]
