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
        kind: ``"gemm"`` and ``"attention"`` are products; the CPU kernels' are ``"kernel"`` and ``"causal"``, or
            ``"weights"`` and ``"cache"`` where reading one operand takes as long. The others are elementwise, by what
            limits them on a CPU:
            ``"stream"`` (sums, products, copies of whole tensors), ``"broadcast"`` (one operand is smaller),
            ``"reduction"`` (along an axis, or with its result), ``"power"``, ``"exponential"`` (softmax, SiLU),
            ``"turn"`` (copies of turned views), ``"pad"`` (gradients of slices) and ``"fold"`` (gradients of what was
            broadcast, which are summed up); ``"far"`` goes once over all weights, which no cache holds; ``"adamw"``
            and ``"squares"`` are the optimizer's; ``"normed"``, ``"gate"``, ``"scan"``, ``"slope"``, ``"choice"`` and
            ``"nucleus"`` are the CPU kernels' (:mod:`alignment.plan.kernels`).
        flops: of products.
        moved: bytes read and written.
        launches: kernels that are started.
    """

    kind: str
    flops: float = 0.0
    moved: float = 0.0
    launches: float = 1.0

    def times(self, factor: float) -> Op:
        """The same ``factor`` times."""
        return replace(self, flops=self.flops * factor, moved=self.moved * factor, launches=self.launches * factor)

    def seconds(self, card: Card, item: int) -> float:
        """On a card: computing and moving at the same time; an accelerator starts the next operator meanwhile."""
        computing = 0.0
        if self.flops:
            computing = self.flops / card.computing_rate(self.kind, item)
        spent = max(computing, self.moved / card.moving_rate(self.kind))
        started = self.launches * card.launch
        return spent + started if card.collectives == "mailbox" else max(spent, started)


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
    ops += elementwise("forward", item, norms(shape, tokens / outside), 6)
    if shape.biases:
        ops.append(Op("stream", moved=2 * item * tokens * (q + 2 * kv), launches=3))
    # rotary, for q and k: times cos, the rotated half times sin; the half itself, and the sum
    ops.append(Op("broadcast", moved=4 * item * tokens * (q + kv), launches=4))
    ops.append(Op("stream", moved=item * tokens * 6 * (q + kv), launches=12))
    if cached:
        ops.append(Op("stream", moved=4 * item * keys * kv, launches=2))
    ops += (
        _flash(shape, item, tensor, rows, new, context) if flash else _scores(shape, item, tensor, rows, new, context)
    )
    ops.append(Op("stream", moved=6 * item * tokens * h / outside, launches=2))
    gate = 5 if shape.model_type in UNFUSED_GATE else 3
    ops.append(Op("exponential", moved=gate * item * tokens * inner, launches=gate // 2))
    return ops


def norms(shape: ModelShape, tokens: float) -> dict[str, tuple[float, float]]:
    """Numbers read and written by the two norms of a layer, ``{kind: (forward, backward)}``.

    Forward: square; mean; the reciprocal root times the input; times the weight. Backward: the same products for the
    input, and products that are summed up for the root and for the weight; three sums of gradients.
    """
    numbers = 2 * tokens * shape.hidden
    return {
        "power": (2 * numbers, 2 * numbers),
        "reduction": (numbers, 2 * numbers),
        "broadcast": (2 * numbers, 0.0),
        "fold": (0.0, 6 * numbers),
        "stream": (2 * numbers, 10 * numbers),
    }


def elementwise(way: str, item: int, numbers: dict[str, tuple[float, float]], launches: float) -> list[Op]:
    """Operators of a table ``{kind: (forward, backward)}``; norms compute in float32."""
    place = 0 if way == "forward" else 1
    return [
        Op(kind, moved=max(item, 4) * both[place], launches=launches * (1 + place) / len(numbers))
        for kind, both in numbers.items()
    ]


def _scores(shape: ModelShape, item: int, tensor: int, rows: float, new: float, context: float) -> list[Op]:
    """Attention operator by operator, masked half included (:func:`layer_forward`); products read turned views."""
    q, kv, heads = shape.query / tensor, shape.key / tensor, shape.heads / tensor
    tokens, keys, scores = rows * new, rows * context, rows * new * context * heads
    half = 2.0 * rows * new * context * q
    ops = [
        Op("attention", half, item * (3 * tokens * q + 3 * keys * q + scores)),
        Op("attention", half, item * (scores + 3 * keys * q + tokens * q)),
        Op("turn", moved=item * 4 * tokens * q, launches=6),  # queries divided by the root of d; the output
        Op("broadcast", moved=item * 2 * scores, launches=1),  # mask
        Op("exponential", moved=(2 * item if item == 4 else 14) * scores, launches=1 if item == 4 else 3),
    ]
    if shape.kv_heads != shape.heads:
        ops.append(Op("stream", moved=2 * item * keys * (kv + q), launches=4))
    return ops


def _flash(shape: ModelShape, item: int, tensor: int, rows: float, new: float, context: float) -> list[Op]:
    q, kv = shape.query / tensor, shape.key / tensor
    seen = 0.5 if new == context else 1.0
    return [
        Op("attention", 4.0 * seen * rows * new * context * q, item * (2 * rows * new * q + 2 * rows * context * kv))
    ]


def layer_backward(
    shape: ModelShape,
    item: int,
    tensor: int,
    rows: float,
    row_tokens: float,
    *,
    flash: bool = False,
    outside: int = 1,
) -> list[Op]:
    """The backward of :func:`layer_forward` without a cache: of each product two, and what other gradients need."""
    forward = layer_forward(shape, item, tensor, rows, row_tokens, row_tokens, flash=flash, outside=outside)
    ops = [op.times(2.0) for op in forward if op.flops]
    h, q, kv, inner = shape.hidden, shape.query / tensor, shape.key / tensor, shape.intermediate / tensor
    tokens = rows * row_tokens
    ops += elementwise("backward", item, norms(shape, tokens / outside), 12)
    if shape.biases:
        ops.append(Op("fold", moved=2 * item * tokens * (q + 2 * kv), launches=3))
    # rotary: times cos, the half times sin; the halves back into their places, twice
    ops.append(Op("broadcast", moved=4 * item * tokens * (q + kv), launches=4))
    ops.append(Op("pad", moved=3 * item * tokens * (q + kv), launches=8))
    ops.append(Op("stream", moved=item * tokens * 8 * (q + kv), launches=8))
    ops.append(Op("turn", moved=item * 4 * tokens * q, launches=4))
    ops.append(Op("stream", moved=item * tokens * 9 * h / outside, launches=4))
    if not flash:
        scores = rows * row_tokens * row_tokens * shape.heads / tensor
        ops.append(Op("exponential", moved=(3 * item if item == 4 else 18) * scores, launches=2))
        if shape.kv_heads != shape.heads:
            ops.append(Op("reduction", moved=2 * item * tokens * (kv + q), launches=4))
    gate = 9 if shape.model_type in UNFUSED_GATE else 5
    ops.append(Op("exponential", moved=gate * item * tokens * inner, launches=gate // 2))
    return ops


def embedding(shape: ModelShape, item: int, tensor: int, tokens: float, trained: bool) -> list[Op]:
    """Looking tokens up; trained the gradient, which is as large as the table and zero at first."""
    if not trained:
        return [Op("stream", moved=2.0 * item * tokens * shape.hidden, launches=2)]
    moved = 2.0 * item * shape.vocab * shape.hidden / tensor + 3.0 * item * tokens * shape.hidden
    return [Op("far", moved=moved, launches=2)]


def lm_head(shape: ModelShape, item: int, columns: float, labels: float, *, entropy: bool = False) -> list[Op]:
    """Final norm, logits of the wanted positions and their log-probabilities (in float32)."""
    numbers = labels * columns
    ops = [
        product(labels, shape.hidden, columns, item),
        Op("stream", moved=2 * item * labels * shape.hidden, launches=8),
        # largest, difference, sum, quotient
        Op("reduction", moved=4.0 * numbers * 6, launches=6),
        Op("exponential", moved=4.0 * numbers * 2, launches=1),
    ]
    if item == 2:
        ops.append(Op("stream", moved=6.0 * numbers, launches=1))
    if entropy:
        ops += [Op("stream", moved=4.0 * numbers * 3), Op("reduction", moved=4.0 * numbers)]
    return ops


def lm_head_backward(shape: ModelShape, item: int, columns: float, labels: float) -> list[Op]:
    """Its backward: the probabilities times a number per row, one added in each row, two products."""
    numbers = labels * columns
    return [
        product(labels, shape.hidden, columns, item).times(2.0),
        Op("reduction", moved=4.0 * numbers * 2, launches=4),
        Op("stream", moved=(4.0 * 3 + (6.0 if item == 2 else 0.0)) * numbers, launches=4),
    ]


def score_head(shape: ModelShape, tokens: float, *, trained: bool = False) -> list[Op]:
    """A head of width 1 on every token, in float32; trained: its backward."""
    return [Op("stream", moved=4.0 * tokens * shape.hidden * (3 if trained else 1), launches=4)]


def adamw(elements: float, item: int) -> list[Op]:
    """One AdamW step with its gradient norm and clipping, by the elements that this process owns: the norm reads the
    gradient; then gradient, moments and weights are read, moments and weights written. In float32 the clip is part of
    that pass (the CPU kernel); in half precision it reads and writes the gradient once more.
    """
    update = 28.0 if item == 4 else 30.0
    ops = [Op("squares", moved=elements * item, launches=10), Op("adamw", moved=elements * update, launches=10)]
    return ops if item == 4 else [*ops, Op("far", moved=elements * 2 * item, launches=0)]


def matmul_flops(shape: ModelShape, rows: float, row_tokens: float, labels: float, head: str) -> float:
    """FLOPs of the products of one forward: ``2 N D`` plus ``4 s q`` per token and layer of attention, plus the head.

    The closed form of what the lists above add up to (``tests/plan/test_work.py``).
    """
    tokens = rows * row_tokens
    per_token = 2.0 * shape.layer_matrices + 4.0 * row_tokens * shape.query
    return tokens * shape.layers * per_token + (2.0 * labels * shape.hidden * shape.vocab if head == "lm" else 0.0)
