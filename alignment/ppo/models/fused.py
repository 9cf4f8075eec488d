"""A decoder's forward and backward by the CPU kernels, over the real tokens of a micro batch alone.

Rows come right-padded or packed; their real tokens are laid one sequence behind the other, ``[T, hidden]``, so that no
pad is ever computed and a micro batch costs what its tokens cost, however the lengths vary. What is computed is what
:mod:`alignment.ppo.models.forward` computes on paddlenlp's layers, to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.autograd import PyLayer

from alignment.kernels.ops import Kernels, LayerShape, kernels
from alignment.ppo.models.decoder import Decoder, decoder_of
from alignment.ppo.models.forward import Rows, check_context, checked_lengths


@dataclass(frozen=True)
class Packed:
    """The real tokens of a micro batch, one sequence behind the other.

    Attributes:
        tokens: ``[T]`` int64.
        positions: ``[T]`` int64, each token's place in its sequence.
        starts: ``[S + 1]`` int64, where each of S sequences begins; T at the end.
        slots: ``[batch * seq]`` int64, which token stands in each place of the rows; T in a pad's.
        shape: ``(batch, seq)``.
    """

    tokens: np.ndarray
    positions: np.ndarray
    starts: np.ndarray
    slots: np.ndarray
    shape: tuple[int, int]

    @classmethod
    def of(cls, rows: Rows) -> Packed:
        """Lay the sequences of rows behind each other; without ``rows.lengths`` every token counts as real.

        Raises:
            ModelError: a length is below 1 or beyond the rows' width.
        """
        batch, width = rows.input_ids.shape
        lengths = [width] * batch if rows.lengths is None else rows.lengths
        real = np.arange(width) < checked_lengths(lengths, [batch, width])[:, None]
        begins = np.zeros([batch, width], dtype=bool)
        begins[:, 0] = True
        positions = np.broadcast_to(np.arange(width), [batch, width])
        if rows.segment_ids is not None and rows.position_ids is not None:
            begins[:, 1:] = rows.segment_ids[:, 1:] != rows.segment_ids[:, :-1]
            positions = rows.position_ids
        count = int(real.sum())
        slots = np.full(batch * width, count, dtype=np.int64)
        slots[real.reshape(-1)] = np.arange(count)
        return cls(
            tokens=rows.input_ids[real].astype(np.int64),
            positions=positions[real].astype(np.int64),
            starts=np.append(np.flatnonzero(begins[real]), count).astype(np.int64),
            slots=slots,
            shape=(batch, width),
        )

    def spread(self, x: Tensor) -> Tensor:
        """``[T, hidden]`` -> ``[batch, seq, hidden]`` with zeros in the pads' places; differentiable."""
        if len(self.slots) > len(self.tokens):
            x = paddle.concat([x, paddle.zeros([1, x.shape[1]], dtype=x.dtype)])
            x = paddle.gather(x, paddle.to_tensor(self.slots))
        return x.reshape([*self.shape, -1])


class FusedDecoder:
    """The decoder of a whole float32 model on the CPU.

    Args:
        decoder: what :func:`decoder_of` read.
        operators: the kernels.
        recompute: keep each layer's input only and make the rest anew in the backward.
    """

    def __init__(self, decoder: Decoder, operators: Kernels, *, recompute: bool = False) -> None:
        self.decoder, self._kernels, self._recompute = decoder, operators, recompute
        self._parameters = list(decoder.backbone.parameters())

    @classmethod
    def of(cls, model: nn.Layer, *, recompute: bool = False) -> FusedDecoder | None:
        """The model's decoder; None where the kernels cannot be had or cannot stand for it."""
        if not hasattr(model, "base_model_prefix"):
            return None
        operators = kernels()
        decoder = decoder_of(model) if operators is not None else "no kernels"
        if operators is None or isinstance(decoder, str) or decoder.tensor_group is not None:
            return None
        config = decoder.backbone.config
        if getattr(config, "attention_dropout", 0.0):
            return None
        if any(weight.dtype != paddle.float32 for weight in decoder.backbone.parameters()):
            return None
        return cls(decoder, operators, recompute=recompute)

    @property
    def trains(self) -> bool:
        """Whether gradients are wanted now, of every weight."""
        return paddle.is_grad_enabled() and not any(parameter.stop_gradient for parameter in self._parameters)

    @property
    def applies(self) -> bool:
        """Whether it can run now: gradients are wanted of every weight or of none."""
        return self.trains or not paddle.is_grad_enabled() or all(p.stop_gradient for p in self._parameters)

    def hidden_states(self, rows: Rows) -> Tensor:
        """The final hidden states ``[batch, seq, hidden]`` of a micro batch, zeros in the pads' places.

        Raises:
            ModelError: the rows are longer than the model's positions reach, or a length is out of range.
        """
        check_context(self.decoder.backbone, rows.input_ids.shape[1])
        packed = Packed.of(rows)
        x = self.decoder.embed(paddle.to_tensor(packed.tokens))
        x = self._with_gradient(x, packed) if self.trains else self._plain(x, packed)
        return packed.spread(self.decoder.norm(x))

    def _plain(self, x: Tensor, packed: Packed) -> Tensor:
        decoder, sequences = self.decoder, len(packed.starts) - 1
        nowhere = np.full(len(packed.tokens), -1, dtype=np.int64)
        plan = paddle.to_tensor(np.concatenate([packed.positions, nowhere, packed.starts]))
        weights = [weight for layer in decoder.layers for weight in layer]
        angles = decoder.angles(int(packed.positions.max()) + 1)
        nothing = paddle.empty([0], dtype="float32")
        return self._kernels.stack(x, weights, angles, nothing, plan, decoder.shape, sequences, cached=False)

    def _with_gradient(self, x: Tensor, packed: Packed) -> Tensor:
        run = _Run(
            self._kernels,
            self.decoder.shape,
            self.decoder.angles(int(packed.positions.max()) + 1),
            paddle.to_tensor(np.concatenate([packed.positions, packed.starts])),
            len(packed.starts) - 1,
            self._recompute,
        )
        for layer in self.decoder.layers:
            x = _Layer.apply(x, run, *layer)
        return x


@dataclass(frozen=True)
class _Run:
    """What the layers of one forward share."""

    kernels: Kernels
    shape: LayerShape
    angles: tuple[Tensor, Tensor]
    plan: Tensor
    sequences: int
    recompute: bool

    def forward(self, x: Tensor, weights: Any) -> list[Tensor]:
        return self.kernels.layer_forward(x, weights, self.angles, self.plan, self.shape, self.sequences)


class _Layer(PyLayer):
    """``(x [T, hidden], weights) -> [T, hidden]``: one decoder layer."""

    @staticmethod
    def forward(ctx, x, run, *weights):  # type: ignore[no-untyped-def]
        x = x.contiguous()
        output, *kept = run.forward(x, weights)
        ctx.run = run
        ctx.save_for_backward(x, *weights, *([] if run.recompute else kept))
        return output

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        run = ctx.run
        x, *rest = ctx.saved_tensor()
        weights, kept = rest[: run.shape.weights], rest[run.shape.weights :]
        if run.recompute:
            kept = run.forward(x, weights)[1:]
        return tuple(
            run.kernels.layer_backward(
                x, weights, run.angles, run.plan, kept, grad.contiguous(), run.shape, run.sequences
            )
        )
