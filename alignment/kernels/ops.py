"""The CPU kernels for Python: one method for each operator of ``csrc/ops.cc``, with the shapes that it takes.

The operators check what they are given: sizes, and the ids, positions and places that say where memory is read. What
does not fit is a ``ValueError`` that names it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import paddle
from paddle import Tensor

from alignment import runtime
from alignment.kernels.build import OPT_OUT, BuildError, library
from alignment.log import get_logger


@dataclass(frozen=True)
class LayerShape:
    """The numbers of a decoder layer.

    Attributes:
        hidden, intermediate: widths.
        query_heads, key_heads, head_dim: of the attention; grouped queries share their keys.
        window: tokens that a token sees, itself included; 0 for all.
        activation: 0 for SiLU, 1 for the exact GELU.
        epsilon: of the norms.
        norm_offset: added to the norms' weights (1 for Gemma).
        biases: whether q, k and v have any.
        rounded: the layer is a bfloat16 model's: what it hands on is rounded (see
            :mod:`alignment.ppo.models.precision`).
    """

    hidden: int
    intermediate: int
    query_heads: int
    key_heads: int
    head_dim: int
    window: int
    activation: int
    epsilon: float
    norm_offset: float
    biases: bool
    rounded: bool = False

    @property
    def numbers(self) -> list[int]:
        """As the operators take them."""
        return [
            self.hidden,
            self.intermediate,
            self.query_heads,
            self.key_heads,
            self.head_dim,
            self.window,
            self.activation,
            int(self.biases),
            int(self.rounded),
        ]

    @property
    def weights(self) -> int:
        """Tensors of one layer: norm, q, k, v, output, norm, gate, up, down, then q, k and v biases if any."""
        return 12 if self.biases else 9


WHOLE, ATTENTION, MLP = 0, 1, 2


class Kernels:
    """The operators; see ``csrc/`` for what each computes. All tensors are float32 on the CPU."""

    def stack(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        angles: tuple[Tensor, Tensor],
        cache: Tensor,
        plan: Tensor,
        shape: LayerShape,
        sequences: int,
        *,
        cached: bool,
        part: int = WHOLE,
        first_layer: int = 0,
    ) -> Tensor:
        """Decoder layers without gradient.

        Args:
            x: ``[T, hidden]``, tokens of packed sequences or one new token for each row.
            weights: of all layers, one after the other.
            angles: cosines and sines ``[positions, head_dim / 2]``.
            cache: ``[layers, 2, tokens, key_heads * head_dim]``, written in place; empty to keep nothing.
            plan: int64. Packed: positions ``[T]``, places in the cache ``[T]`` (-1: not kept), starts
                ``[sequences + 1]``. Cached: positions ``[T]``, places ``[T]``, spans ``[T, 4]``, which are place and
                length of the shared prompt and of the row's own tokens, the new one included.
            shape: of a layer.
            sequences: in ``x`` when packed.
            cached: whether rows read the cache, or each other.
            part: ``WHOLE``; ``ATTENTION`` or ``MLP`` alone of one layer, without the residual (tensor parallelism).
            first_layer: which layer's cache the first of ``weights`` uses.

        Returns:
            ``[T, hidden]``.
        """
        values = (shape.numbers, shape.epsilon, shape.norm_offset, sequences, cached, part, first_layer)
        return _run("alignment_stack", x, list(weights), *angles, cache, plan, *values)[0]

    def embed(self, ids: Tensor, weight: Tensor, scale: float) -> Tensor:
        """Rows ``ids`` ``[T]`` int64 of ``weight`` ``[vocab, hidden]``, times ``scale``; without gradient."""
        return _run("alignment_embed", ids, weight, float(scale))[0]

    def rms_norm(self, x: Tensor, weight: Tensor, shape: LayerShape) -> Tensor:
        """The norm of :meth:`stack`'s layers, ``[..., hidden]``, without gradient."""
        return _run("alignment_rms_norm", x, weight, shape.epsilon, shape.norm_offset)[0]

    def layer_forward(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        angles: tuple[Tensor, Tensor],
        plan: Tensor,
        shape: LayerShape,
        sequences: int,
    ) -> list[Tensor]:
        """One decoder layer over packed sequences ``[T, hidden]``; returns its output and ten tensors for
        :meth:`layer_backward`. ``plan``: int64 positions ``[T]`` and starts ``[sequences + 1]``.
        """
        values = (shape.numbers, shape.epsilon, shape.norm_offset, sequences)
        return _run("alignment_layer_forward", x, list(weights), *angles, plan, *values)

    def layer_backward(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        angles: tuple[Tensor, Tensor],
        plan: Tensor,
        saved: Sequence[Tensor],
        grad: Tensor,
        shape: LayerShape,
        sequences: int,
    ) -> list[Tensor]:
        """Gradients of :meth:`layer_forward`: of ``x``, then of each weight."""
        grads = [paddle.empty_like(weight) for weight in weights]
        values = (shape.numbers, shape.epsilon, shape.norm_offset, sequences)
        inputs = (x, list(weights), *angles, plan, list(saved), grads, grad)
        return [_run("alignment_layer_backward", *inputs, *values)[0], *grads]

    def label_logprobs(
        self,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float,
        *,
        tied: bool,
        entropy: bool,
        sets: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> list[Tensor]:
        """``[logprobs, entropy, log_norm, greedy]``, each ``[N]``, of ``labels`` ``[N]`` int64 under
        ``softmax(x @ weight / temperature)`` with ``x`` ``[N, hidden]``; the logits are never whole in memory. With
        ``sets``, rising ids ``[n]`` and where each label's begin ``[N + 1]``, both int64, each softmax is over a set.
        """
        return _run("alignment_label_logprobs", x, weight, labels, *sets, float(temperature), tied, entropy)

    def label_logprobs_backward(
        self,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        log_norm: Tensor,
        entropy: Tensor,
        grads: tuple[Tensor, Tensor | None],
        temperature: float,
        *,
        tied: bool,
        of_weight: bool = True,
        sets: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients ``(of x, of weight)`` from those of log-probs and entropy (None: not differentiated); that of the
        weight None unless ``of_weight``; with the ``sets`` of the forward.
        """
        of_logprobs, of_entropy = grads
        inputs = (x, weight, labels, log_norm, entropy, of_logprobs, of_logprobs if of_entropy is None else of_entropy)
        values = (float(temperature), tied, of_entropy is not None, of_weight)
        dx, dweight = _run("alignment_label_logprobs_backward", *inputs, *sets, *values)
        return dx, dweight if of_weight else None

    def square_sum(self, tensors: Sequence[Tensor]) -> float:
        """Sum of the squares of all elements, added up in float64; the same for any number of threads."""
        return float(_run("alignment_square_sum", list(tensors))[0])

    def adamw(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        moments: tuple[Sequence[Tensor], Sequence[Tensor]],
        powers: tuple[Sequence[Tensor], Sequence[Tensor]],
        *,
        rate: float,
        betas: tuple[float, float],
        epsilon: float,
        scale: float,
        decay: Sequence[float],
    ) -> None:
        """One step of AdamW in place.

        Args:
            weights, grads: of one shape each.
            moments: first and second, shaped as the weights.
            powers: beta1 and beta2 to the number of this step, ``[1]`` for each weight; raised for the next one.
            rate, betas, epsilon: AdamW's.
            scale: what gradients are multiplied by (clipping).
            decay: weight decay of each weight.
        """
        lists = [list(group) for group in (weights, grads, *moments, *powers)]
        _run("alignment_adamw", *lists, [rate, *betas, epsilon, scale], list(decay))

    def project(self, x: Tensor, weight: Tensor, *, tied: bool) -> Tensor:
        """``x @ weight`` (or its transpose when ``tied``): ``[B, hidden]`` -> ``[B, vocab]``."""
        return _run("alignment_project", x, weight, tied)[0]

    def choose(
        self,
        logits: Tensor,
        uniforms: Tensor,
        seen: Tensor,
        banned: Tensor,
        allowed: Tensor | None = None,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        penalty: float,
        greedy: bool,
        banned_ids: Sequence[int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One token for each row, as :func:`alignment.rollout.sampler.choose_tokens`.

        Args:
            logits: ``[B, V]``.
            uniforms: ``[B]`` float64.
            seen: ``[B, V]`` uint8, tokens that stand in the row; empty without a repetition penalty.
            banned: ``[B]`` uint8, whether ``banned_ids`` have no chance in this row.
            allowed: ``[B, V]`` uint8, tokens that have a chance; None for all.
            temperature, top_k, top_p, penalty, greedy: see :class:`SamplingSettings`.
            banned_ids: the eos ids.

        Returns:
            ``(tokens [B] int64, logprobs [B] float32, sampler_logprobs [B] float32)``; a token is -1 where a logit is
            NaN or infinite, or no token has a chance.
        """
        values = (float(temperature), int(top_k), float(top_p), float(penalty), bool(greedy), list(banned_ids))
        return tuple(_run("alignment_choose", logits, uniforms, seen, banned, allowed, *values))


def _run(name: str, *inputs: object) -> list[Tensor]:
    """Call an operator.

    Raises:
        ValueError: sizes do not fit, or a number says to read where there is nothing.
        MemoryError: there is not enough for what it computes.
    """
    from paddle import _C_ops

    try:
        return _C_ops._run_custom_op(name, *inputs)
    except OSError as error:  # what Paddle makes of an operator's exception
        text = str(error).partition("\n")[0]
        raise (MemoryError if "no memory for" in text else ValueError)(f"{name}: {text}") from None


@functools.cache
def kernels() -> Kernels | None:
    """The operators, compiled at the first call if need be; None where they cannot be had, which is said once."""
    if os.environ.get(OPT_OUT, "") == "0" or not runtime.is_cpu():
        return None
    from paddle.utils.cpp_extension import load_op_meta_info_and_register_op

    try:
        load_op_meta_info_and_register_op(str(library()))
    except (BuildError, OSError, RuntimeError) as error:
        get_logger().warning("no CPU kernels: %s; Paddle's own operators are used, which are slower", error)
        return None
    return Kernels()
