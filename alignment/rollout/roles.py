"""The roles of a method: a model in its :class:`~alignment.engine.engine.Engine`, and the one forward that its role
asks for.

Only response positions are computed behind the backbone, and every figure is float32 whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import paddle
from paddle import Tensor

from alignment.engine.batching import micro_batches
from alignment.engine.engine import Engine
from alignment.ppo.models import Rows, scores_of, take_end
from alignment.rollout.rollout import Rollout, join_micro_batches

R = TypeVar("R")


@dataclass(frozen=True)
class ResponsePositions:
    """Where a micro batch's response tokens lie; built on the host from lengths alone.

    Attributes:
        states: ``[N]`` int64 index into the flattened ``[B * T]`` positions from which each response token is
            predicted.
        labels: ``[N]`` int64, the response tokens themselves.
        slots: ``[B * R]`` int64, which of the N values belongs to each slot; N itself (a zero) for slots behind the
            end.
        shape: ``(B, R)``.
    """

    states: np.ndarray
    labels: np.ndarray
    slots: np.ndarray
    shape: tuple[int, int]

    @classmethod
    def of(cls, rollout: Rollout) -> ResponsePositions:
        """The positions of a rollout's responses."""
        mask = rollout.mask.astype(bool)
        row, step = np.nonzero(mask)
        position = rollout.prompt_len[row] - 1 + step
        slots = np.full(mask.shape, len(row), dtype=np.int64)
        slots[mask] = np.arange(len(row))
        return cls(
            states=row * rollout.tokens.shape[1] + position,
            labels=rollout.tokens[row, position + 1],
            slots=slots.reshape(-1),
            shape=mask.shape,
        )

    def spread(self, flat: Tensor) -> Tensor:
        """``[N] -> [B, R]`` with zeros behind the ends; differentiable."""
        padded = paddle.concat([flat, paddle.zeros([1], dtype=flat.dtype)])
        return paddle.gather(padded, paddle.to_tensor(self.slots)).reshape(self.shape)


class PolicyRole:
    """Actor or reference: log-probs of response tokens at the sampling temperature.

    Args:
        engine: around a causal language model.
        temperature: of sampling.
        micro_batch_size: rows of a forward without gradient.
        max_tokens: padded tokens of such a forward, in place of its rows; 0: not limited.
        entropy_grad: whether the entropy is differentiated in training.
        masked: whether it is trained over the tokens of ``rollout.allowed`` alone (NLPO).
    """

    def __init__(
        self,
        engine: Engine,
        temperature: float,
        micro_batch_size: int,
        max_tokens: int = 0,
        entropy_grad: bool = False,
        masked: bool = False,
    ) -> None:
        self.engine, self.temperature, self.entropy_grad, self.masked = engine, temperature, entropy_grad, masked
        self.micro_batch_size, self.max_tokens = micro_batch_size, max_tokens

    def of_hidden(
        self, hidden: Tensor, rollout: Rollout, entropy_grad: bool = False, masked: bool = False
    ) -> tuple[Tensor, Tensor]:
        """``(logprobs, entropy)``, both ``[B, R]`` float32, zero behind the ends, from final hidden states
        ``[B, T, hidden]``; differentiable when the engine is trainable. With ``masked`` of the policy over
        ``rollout.allowed`` alone.
        """
        positions = ResponsePositions.of(rollout)
        if not len(positions.labels):
            zeros = paddle.zeros(positions.shape, dtype="float32")
            return zeros, zeros
        scores = self.engine.score_labels(
            _states(hidden, positions),
            paddle.to_tensor(positions.labels),
            self.temperature,
            entropy=True,
            entropy_grad=entropy_grad,
            allowed=rollout.allowed if masked else None,
        )
        return positions.spread(scores.logprobs), positions.spread(scores.entropy)

    def train(self, parts: Sequence[Rollout], loss: Callable[[Tensor, Tensor, Rollout], tuple[Tensor, R]]) -> list[R]:
        """Forward and backward of micro batches.

        Args:
            parts: micro batches.
            loss: from ``(logprobs, entropy)``, both ``[b, R]``, and the micro batch to a scalar and a result; see
                :meth:`Engine.train_pass`.

        Returns:
            The results.
        """
        return self.engine.train_pass(
            parts,
            rows_of,
            lambda hidden, part: loss(*self.of_hidden(hidden, part, self.entropy_grad, self.masked), part),
        )

    def train_supervised(
        self, batches: Sequence[Mapping[str, np.ndarray]], loss: Callable[[Tensor, int, Any], tuple[Tensor, R]]
    ) -> list[R]:
        """Forward and backward of supervised micro batches (the ptx loss), at temperature 1.

        Args:
            batches: ``input_ids`` and ``labels`` ``[B, T]`` int64, right-padded; labels not shifted, -100 where there
                is nothing to learn; ``lengths`` ``[B]``.
            loss: from the summed next-token loss and the number of its tokens to a scalar and a result.

        Returns:
            The results.
        """
        return self.engine.train_pass(
            batches,
            lambda batch: Rows(batch["input_ids"], lengths=batch["lengths"]),
            lambda hidden, batch: loss(*self.negative_log_likelihood(hidden, batch["labels"]), batch),
        )

    def negative_log_likelihood(self, hidden: Tensor, labels: np.ndarray) -> tuple[Tensor, int]:
        """Summed next-token loss on labelled tokens, at temperature 1.

        Args:
            hidden: ``[B, T, hidden]`` final hidden states.
            labels: ``[B, T]`` int64, not shifted, -100 where there is nothing to learn.

        Returns:
            ``(sum, count)``: a differentiable scalar and the number of tokens in it.
        """
        row, column = np.nonzero(labels[:, 1:] != -100)
        if not len(row):
            return hidden.sum() * 0.0, 0
        index = paddle.to_tensor(row * labels.shape[1] + column)
        states = paddle.gather(hidden.reshape([-1, hidden.shape[-1]]), index)
        scores = self.engine.score_labels(states, paddle.to_tensor(labels[row, column + 1]))
        return -scores.logprobs.sum(), len(row)

    def logprobs(self, rollout: Rollout, masked: bool = False) -> np.ndarray:
        """``[B, R]`` float32 without gradient, in micro batches; with ``masked`` of the policy over
        ``rollout.allowed`` alone.
        """
        return self._infer(rollout, (masked,))[0]

    def plain_and_masked_logprobs(self, rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
        """:meth:`logprobs` without and with ``masked``, ``[B, R]`` float32 each, in one pass."""
        plain, masked = self._infer(rollout, (False, True))
        return plain, masked

    def _infer(self, rollout: Rollout, masked: Sequence[bool]) -> list[np.ndarray]:
        def compute(hidden: Tensor, part: Rollout) -> list[np.ndarray]:
            positions = ResponsePositions.of(part)
            if not len(positions.labels):
                return [np.zeros(positions.shape, dtype=np.float32) for _ in masked]
            states, labels = _states(hidden, positions), paddle.to_tensor(positions.labels)
            found = []
            for only_allowed in masked:
                allowed = part.allowed if only_allowed else None
                scores = self.engine.score_labels(states, labels, self.temperature, allowed=allowed)
                found.append(positions.spread(scores.logprobs).numpy())
            return found

        groups = micro_batches(rollout.lengths, self.micro_batch_size, self.max_tokens)
        pieces = self.engine.infer_pass([rollout.select(group) for group in groups], rows_of, compute)
        return [join_micro_batches([piece[i] for piece in pieces], groups, rollout.width) for i in range(len(masked))]


class ValueRole:
    """The critic: the value of the state before each response token.

    Args:
        engine: around a score model of type ``critic``.
        micro_batch_size: rows of a forward without gradient.
        max_tokens: padded tokens of such a forward, in place of its rows; 0: not limited.
    """

    def __init__(self, engine: Engine, micro_batch_size: int, max_tokens: int = 0) -> None:
        self.engine, self.micro_batch_size, self.max_tokens = engine, micro_batch_size, max_tokens

    def of_hidden(self, hidden: Tensor, rollout: Rollout) -> Tensor:
        """``[B, R]`` float32, zero behind the ends, from final hidden states ``[B, T, hidden]``; differentiable."""
        positions = ResponsePositions.of(rollout)
        scores = scores_of(self.engine.model, hidden)
        if not len(positions.labels):
            return paddle.zeros(positions.shape, dtype="float32")
        flat = paddle.gather(scores.astype("float32").reshape([-1]), paddle.to_tensor(positions.states))
        return positions.spread(flat)

    def train(self, parts: Sequence[Rollout], loss: Callable[[Tensor, Rollout], tuple[Tensor, R]]) -> list[R]:
        """Forward and backward of micro batches; ``loss`` gets the values ``[b, R]``, see :meth:`Engine.train_pass`."""
        return self.engine.train_pass(parts, rows_of, lambda hidden, part: loss(self.of_hidden(hidden, part), part))

    def values(self, rollout: Rollout) -> np.ndarray:
        """``[B, R]`` float32 without gradient, in micro batches."""
        groups = micro_batches(rollout.lengths, self.micro_batch_size, self.max_tokens)
        parts = [rollout.select(group) for group in groups]
        pieces = self.engine.infer_pass(parts, rows_of, lambda hidden, part: self.of_hidden(hidden, part).numpy())
        return join_micro_batches(pieces, groups, rollout.width)


class RewardRole:
    """The reward model: one score per answer, read at its last real token.

    Args:
        engine: around a frozen score model.
        micro_batch_size: rows of a forward.
        max_tokens: padded tokens of a forward, in place of its rows; 0: not limited.
    """

    def __init__(self, engine: Engine, micro_batch_size: int, max_tokens: int = 0) -> None:
        self.engine, self.micro_batch_size, self.max_tokens = engine, micro_batch_size, max_tokens

    def score_rows(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Scores of right-padded rows.

        Args:
            tokens: ``[B, T]`` int64.
            lengths: ``[B]`` real tokens of each row, at least 1.

        Returns:
            ``[B]`` float32.
        """
        groups = micro_batches(lengths, self.micro_batch_size, self.max_tokens)
        parts = [(tokens[group][:, : int(lengths[group].max())], lengths[group]) for group in groups]

        def compute(hidden: Tensor, part: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
            return take_end(scores_of(self.engine.model, hidden), part[1]).astype("float32").numpy().reshape(-1)

        scores = self.engine.infer_pass(parts, lambda part: Rows(part[0], lengths=part[1]), compute)
        return join_micro_batches(scores, groups, 1) if scores else np.zeros(0, dtype=np.float32)


def _states(hidden: Tensor, positions: ResponsePositions) -> Tensor:
    """``[N, hidden]``: the hidden states that predict the response tokens."""
    return paddle.gather(hidden.reshape([-1, hidden.shape[-1]]), paddle.to_tensor(positions.states))


def rows_of(rollout: Rollout) -> Rows:
    """A rollout as a model reads it."""
    return Rows(rollout.tokens, lengths=rollout.lengths)
