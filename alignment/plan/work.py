"""What a forward and a backward compute and move, operator by operator, and how long a card takes for it.

Every operator takes ``max(FLOPs / rate, bytes / bandwidth)`` (the roofline: Williams et al. 2009,
doi:10.1145/1498765.1498785). A product of ``[m, k]`` and ``[k, n]`` is ``2 m k n`` FLOPs and its backward two such
products, which sums up to the ``6 N D`` of Kaplan et al. 2020 (arXiv:2001.08361, section 2.1), plus attention's
products, which grow with the square of a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from alignment.plan.hardware import Card
from alignment.plan.shapes import UNFUSED_GATE, ModelShape


@dataclass(frozen=True)
class Op:
    """Operators of one kind.

    Attributes:
        kind: ``"gemm"``, ``"attention"`` or ``"elementwise"``.
        flops: of products.
        moved: bytes read and written.
        exponentials: of softmax and SiLU.
        launches: kernels that are started.
    """

    kind: str
    flops: float = 0.0
    moved: float = 0.0
    exponentials: float = 0.0
    launches: float = 1.0

    def times(self, factor: float) -> Op:
        """The same ``factor`` times."""
        return replace(
            self,
            flops=self.flops * factor,
            moved=self.moved * factor,
            exponentials=self.exponentials * factor,
            launches=self.launches * factor,
        )

    def seconds(self, card: Card, item: int) -> float:
        """On a card; what is computed runs while the next operator is started, but on a CPU."""
        rate = card.attention_rate(item) if self.kind == "attention" else card.gemm_rate(item)
        exponentials = self.exponentials / card.transcendental
        moved = self.moved / card.memory_rate
        started = self.launches * card.launch
        if card.collectives == "mailbox":
            return (self.flops / rate + exponentials + (moved if not self.flops else 0.0)) + started
        return max(self.flops / rate, moved, started)


def seconds(ops: Iterable[Op], card: Card, item: int) -> float:
    """Seconds of operators one after the other."""
    return sum(op.seconds(card, item) for op in ops)


def flops(ops: Iterable[Op]) -> float:
    """FLOPs of the products."""
    return sum(op.flops for op in ops)


def product(m: float, k: float, n: float, item: int, kind: str = "gemm") -> Op:
    """``[m, k] x [k, n]``."""
    return Op(kind, 2.0 * m * k * n, item * (m * k + k * n + m * n))


def layer_forward(
    shape: ModelShape,
    item: int,
    tensor: int,
    rows: float,
    new: float,
    context: float,
    *,
    flash: bool = False,
    outside: int = 1,
    cached: bool = False,
) -> list[Op]:
    """One decoder layer of paddlenlp's.

    Args:
        shape, item, tensor: as in :mod:`alignment.plan.activations`.
        rows: of the batch.
        new: tokens that are read, per row.
        context: tokens that they attend to, per row (``new`` without a cache).
        flash: whether attention is one fused operator, which leaves out the masked half.
        outside: by what sequence parallelism divides the norms.
        cached: whether keys and values are appended to a cache.
    """
    h, q, kv, inner = shape.hidden, shape.query / tensor, shape.key / tensor, shape.intermediate / tensor
    tokens, keys = rows * new, rows * context
    ops = [
        product(tokens, h, q, item),
        product(tokens, h, kv, item),
        product(tokens, h, kv, item),
        product(tokens, q, h, item),
        product(tokens, h, inner, item),
        product(tokens, h, inner, item),
        product(tokens, inner, h, item),
    ]
    # two norms: square, mean, reciprocal root times input, times weight
    ops.append(Op("elementwise", moved=2 * 7 * max(item, 4) * tokens * h / outside, launches=12))
    if shape.biases:
        ops.append(Op("elementwise", moved=2 * item * tokens * (q + 2 * kv), launches=3))
    # rotary: x cos, the rotated half, times sin, sum
    ops.append(Op("elementwise", moved=item * tokens * (10 * (q + kv) + 4 * shape.head_dim), launches=18))
    if cached:
        ops.append(Op("elementwise", moved=4 * item * keys * kv, launches=2))
    ops += (
        _flash(shape, item, tensor, rows, new, context) if flash else _scores(shape, item, tensor, rows, new, context)
    )
    ops.append(Op("elementwise", moved=6 * item * tokens * h / outside, launches=2))
    gate = 5 if shape.model_type in UNFUSED_GATE else 3
    ops.append(Op("elementwise", moved=gate * item * tokens * inner, exponentials=tokens * inner, launches=gate // 2))
    return ops


def _scores(shape: ModelShape, item: int, tensor: int, rows: float, new: float, context: float) -> list[Op]:
    """Attention operator by operator, masked half included (:func:`layer_forward`)."""
    q, kv, heads = shape.query / tensor, shape.key / tensor, shape.heads / tensor
    tokens, keys, scores = rows * new, rows * context, rows * new * context * heads
    half = 2.0 * rows * new * context * q
    ops = [
        Op("attention", half, item * (tokens * q + keys * q + scores)),
        Op("attention", half, item * (scores + keys * q + tokens * q)),
        # query: turn, divide; keys: turn twice; values: turn; output: turn
        Op("elementwise", moved=item * (6 * tokens * q + 6 * keys * q), launches=6),
        # mask, softmax in float32
        Op("elementwise", moved=(3 * item + 8) * scores, exponentials=scores, launches=3 if item == 4 else 5),
    ]
    if shape.kv_heads != shape.heads:
        ops.append(Op("elementwise", moved=2 * item * keys * (kv + q), launches=4))
    return ops


def _flash(shape: ModelShape, item: int, tensor: int, rows: float, new: float, context: float) -> list[Op]:
    q, kv = shape.query / tensor, shape.key / tensor
    seen = 0.5 if new == context else 1.0
    return [
        Op("attention", 4.0 * seen * rows * new * context * q, item * (2 * rows * new * q + 2 * rows * context * kv))
    ]


def backward(ops: Iterable[Op]) -> list[Op]:
    """The backward of a forward: of each product two, of everything else about twice the traffic."""
    return [op.times(2.0) if op.flops else replace(op.times(2.0), exponentials=op.exponentials) for op in ops]


def embedding(shape: ModelShape, item: int, tensor: int, tokens: float, trained: bool) -> list[Op]:
    """Looking tokens up; trained also the gradient, which is as large as the table and zero at first."""
    moved = 2.0 * item * tokens * shape.hidden
    if trained:
        moved += 2.0 * item * shape.vocab * shape.hidden / tensor + 3.0 * item * tokens * shape.hidden
    return [Op("elementwise", moved=moved, launches=2)]


def lm_head(
    shape: ModelShape, item: int, columns: float, labels: float, *, trained: bool = False, entropy: bool = False
) -> list[Op]:
    """Final norm, logits of the wanted positions and their log-probabilities (in float32), and the backward."""
    numbers = labels * columns
    scan = 4.0 * numbers * (8 + (3 if entropy else 0)) + (6.0 * numbers if item == 2 else 0.0)
    ops = [
        product(labels, shape.hidden, columns, item),
        Op("elementwise", moved=2 * item * labels * shape.hidden, launches=2),
        Op("elementwise", moved=scan, exponentials=numbers, launches=14),
    ]
    if trained:
        ops += [ops[0].times(2.0), Op("elementwise", moved=4.0 * numbers * 6, launches=8)]
    return ops


def score_head(shape: ModelShape, tokens: float, *, trained: bool = False) -> list[Op]:
    """A head of width 1 on every token, in float32."""
    op = Op("elementwise", moved=4.0 * tokens * shape.hidden * (4 if trained else 1), launches=4)
    return [op]


def adamw(elements: float, item: int) -> list[Op]:
    """One AdamW step with its gradient norm and clipping, by the elements that this process owns: gradient, moments
    and weights are read, moments and weights written; the norm squares and sums, the clip reads and writes.
    """
    update = 28.0 if item == 4 else 30.0
    return [Op("elementwise", moved=elements * (update + 3 * 4 + 2 * item), launches=20)]


def matmul_flops(shape: ModelShape, rows: float, row_tokens: float, labels: float, head: str) -> float:
    """FLOPs of the products of one forward: ``2 N D`` plus ``4 s q`` per token and layer of attention, plus the head.

    The closed form of what the lists above add up to (``tests/plan/test_work.py``).
    """
    tokens = rows * row_tokens
    per_token = 2.0 * shape.layer_matrices + 4.0 * row_tokens * shape.query
    return tokens * shape.layers * per_token + (2.0 * labels * shape.hidden * shape.vocab if head == "lm" else 0.0)
