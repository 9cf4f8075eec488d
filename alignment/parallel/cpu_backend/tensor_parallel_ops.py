"""The tensor-parallel operators that Paddle has no CPU kernel for, as differentiable layers over all-reduce and gather.

``ring_id`` is the number of the tensor-parallel group. Tensors are split along their last axis: member i of n holds
``[..., i*k : (i+1)*k]`` of ``[..., n*k]``. The pairs of operators are those of Shoeybi et al., "Megatron-LM" (2019),
section 3: where the forward copies, the backward adds up, and the other way round.
"""

from __future__ import annotations

from typing import Any

import paddle
import paddle.distributed as dist
from paddle.autograd import PyLayer

from alignment.errors import AlignmentError


def _sum(tensor: paddle.Tensor, ring_id: int) -> paddle.Tensor:
    """A new tensor with the sum over the group."""
    total = paddle.assign(tensor)
    dist.all_reduce(total, group=dist.get_group(ring_id))
    return total


def _join(tensor: paddle.Tensor, ring_id: int) -> paddle.Tensor:
    """All members' tensors side by side: [..., k] -> [..., n*k]."""
    parts: list[paddle.Tensor] = []
    dist.all_gather(parts, tensor, group=dist.get_group(ring_id))
    return paddle.concat(parts, axis=-1)


def _own_part(tensor: paddle.Tensor, rank: int, nranks: int) -> paddle.Tensor:
    """This member's share: [..., n*k] -> [..., k]."""
    width = tensor.shape[-1]
    if width % nranks:
        raise AlignmentError(
            f"the last axis of a tensor of shape {list(tensor.shape)} cannot be split over {nranks} ranks"
        )
    return paddle.assign(tensor[..., width // nranks * rank : width // nranks * (rank + 1)])


class _Identity(PyLayer):
    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, ring_id: int) -> paddle.Tensor:
        ctx.ring_id = ring_id
        return paddle.assign(x)

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> paddle.Tensor:
        return _sum(grad, ctx.ring_id)


class _Split(PyLayer):
    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, rank: int, nranks: int, ring_id: int) -> paddle.Tensor:
        ctx.ring_id = ring_id
        return _own_part(x, rank, nranks)

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> paddle.Tensor:
        return _join(grad, ctx.ring_id)


class _Concat(PyLayer):
    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, rank: int, nranks: int, ring_id: int) -> paddle.Tensor:
        ctx.rank, ctx.nranks = rank, nranks
        return _join(x, ring_id)

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> paddle.Tensor:
        return _own_part(grad, ctx.rank, ctx.nranks)


class _SoftmaxWithCrossEntropy(PyLayer):
    """-log softmax(logits)[label] with the vocabulary split over the group, by the usual shift by the maximum:
    log(sum_j exp(l_j - m)) - (l_label - m).
    """

    @staticmethod
    def forward(
        ctx: Any, logits: paddle.Tensor, label: paddle.Tensor, ignore_index: int, ring_id: int, rank: int
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        group = dist.get_group(ring_id)
        width = logits.shape[-1]
        _check_labels(label, ignore_index, width * group.nranks)
        shifted = logits.astype("float32")
        top = paddle.max(shifted, axis=-1, keepdim=True)
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        shifted = shifted - top
        weights = paddle.exp(shifted)
        place = label.astype("int64") - width * rank
        here = paddle.logical_and(place >= 0, place < width)
        place = paddle.where(here, place, paddle.zeros_like(place))
        chosen = paddle.take_along_axis(shifted, place, axis=-1) * here.astype("float32")
        # One message for both sums: [..., 2].
        sums = paddle.concat([paddle.sum(weights, axis=-1, keepdim=True), chosen], axis=-1)
        dist.all_reduce(sums, group=group)
        total, chosen = sums[..., :1], sums[..., 1:]
        valid = (label != ignore_index).astype("float32")
        softmax = weights / total
        loss = (paddle.log(total) - chosen) * valid
        ctx.save_for_backward(softmax, place, here.astype("float32"), valid)
        ctx.dtype = logits.dtype
        softmax = softmax.astype(logits.dtype)
        ctx.mark_non_differentiable(softmax)
        return softmax, loss.astype(logits.dtype)

    @staticmethod
    def backward(ctx: Any, _: paddle.Tensor, grad: paddle.Tensor) -> tuple[paddle.Tensor, None]:
        softmax, place, here, valid = ctx.saved_tensor()
        scale = grad.astype("float32") * valid
        inner = paddle.put_along_axis(softmax * scale, place, -here * scale, axis=-1, reduce="add")
        return inner.astype(ctx.dtype), None


def _check_labels(label: paddle.Tensor, ignore_index: int, vocab: int) -> None:
    wrong = paddle.logical_and(label != ignore_index, paddle.logical_or(label < 0, label >= vocab))
    if bool(paddle.any(wrong)):
        raise AlignmentError(
            f"a label is {int(label[wrong][0])}; it must be in 0..{vocab - 1} or the ignored label {ignore_index}"
        )


def c_identity(x: paddle.Tensor, ring_id: int, use_calc_stream: bool = True, use_model_parallel: bool = True) -> Any:
    """Return a copy of ``x``; its gradient is the sum of the members' gradients."""
    return _Identity.apply(x, ring_id)


def legacy_c_identity(x: paddle.Tensor, *attributes: Any) -> Any:
    """:func:`c_identity` with the attributes as a flat list of names and values."""
    return _Identity.apply(x, dict(zip(attributes[::2], attributes[1::2], strict=True))["ring_id"])


def c_split(x: paddle.Tensor, rank: int, nranks: int, ring_id: int, *_: object) -> Any:
    """Return this member's share of ``x`` (``[..., n*k]`` -> ``[..., k]``); the gradients are put side by side."""
    return _Split.apply(x, rank, nranks, ring_id)


def c_concat(x: paddle.Tensor, rank: int, nranks: int, ring_id: int, *_: object) -> Any:
    """Put the members' ``x`` side by side (``[..., k]`` -> ``[..., n*k]``); the gradient is this member's share."""
    return _Concat.apply(x, rank, nranks, ring_id)


def c_softmax_with_cross_entropy(
    logits: paddle.Tensor, label: paddle.Tensor, ignore_index: int, ring_id: int, rank: int, nranks: int
) -> Any:
    """Return (softmax ``[..., k]``, loss ``[..., 1]``) of logits whose last axis is split over the group.

    The loss is exact however small the probability (Paddle's CPU softmax stops at -64). A label that equals
    ``ignore_index`` has loss 0 and gradient 0. The softmax carries no gradient.

    Args:
        logits: ``[..., k]`` of a floating type; computed in float32.
        label: ``[..., 1]``, int32 or int64, ids in the whole vocabulary.
        ignore_index, ring_id, rank, nranks: the ignored label, the group's number, this member, the group's size.

    Raises:
        AlignmentError: for a label outside the vocabulary.
    """
    return _SoftmaxWithCrossEntropy.apply(logits, label, ignore_index, ring_id, rank)


def c_split_backward(ctx: Any, grad: paddle.Tensor) -> paddle.Tensor:
    """The gradient of ``c_split_eager``, gathered along the axis that was split (Paddle gathers along the first)."""
    return _join(grad, ctx.group.id)
