"""The four roles of PPO: a model in its :class:`~alignment.ppo.engine.Engine`, and the one forward that its role asks
for.

Only response positions are computed behind the backbone, and every figure is float32 whatever the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import paddle
from paddle import Tensor

from alignment.ppo.algorithms.logprobs import token_logprobs, token_logprobs_and_entropy
from alignment.ppo.engine import Engine
from alignment.ppo.models import end_scores, final_hidden_states, lm_logits, score_tokens
from alignment.ppo.rollout import Rollout, map_micro_batches


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
    """

    def __init__(self, engine: Engine, temperature: float, micro_batch_size: int) -> None:
        self.engine, self.temperature, self.micro_batch_size = engine, temperature, micro_batch_size

    def forward(self, rollout: Rollout, entropy_grad: bool = False) -> tuple[Tensor, Tensor]:
        """``(logprobs, entropy)``, both ``[B, R]`` float32, zero behind the ends; differentiable when the engine is
        trainable.
        """
        positions = ResponsePositions.of(rollout)
        if not len(positions.labels):
            zeros = paddle.zeros(positions.shape, dtype="float32")
            return zeros, zeros
        logits = self._logits(rollout, positions)
        logprobs, entropy = token_logprobs_and_entropy(
            logits, paddle.to_tensor(positions.labels), self.temperature, entropy_grad
        )
        return positions.spread(logprobs), positions.spread(entropy)

    def negative_log_likelihood(self, input_ids: np.ndarray, labels: np.ndarray) -> tuple[Tensor, int]:
        """Summed next-token loss on labelled tokens, at temperature 1.

        Args:
            input_ids: ``[B, T]`` int64, right-padded.
            labels: ``[B, T]`` int64, not shifted, -100 where there is nothing to learn.

        Returns:
            ``(sum, count)``: a differentiable scalar and the number of tokens in it.
        """
        row, column = np.nonzero(labels[:, 1:] != -100)
        if not len(row):
            return paddle.zeros([]), 0
        hidden = final_hidden_states(self.engine.model, paddle.to_tensor(input_ids))
        index = paddle.to_tensor(row * input_ids.shape[1] + column)
        logits = lm_logits(self.engine.model, paddle.gather(hidden.reshape([-1, hidden.shape[-1]]), index))
        return -token_logprobs(logits, paddle.to_tensor(labels[row, column + 1])).sum(), len(row)

    def logprobs(self, rollout: Rollout) -> np.ndarray:
        """``[B, R]`` float32 without gradient, in micro batches."""
        return map_micro_batches(rollout, self.micro_batch_size, self._logprobs_once, rollout.width)

    def _logprobs_once(self, rollout: Rollout) -> np.ndarray:
        positions = ResponsePositions.of(rollout)
        if not len(positions.labels):
            return np.zeros(positions.shape, dtype=np.float32)
        with paddle.no_grad():
            logits = self._logits(rollout, positions)
            flat = token_logprobs(logits, paddle.to_tensor(positions.labels), self.temperature)
            return positions.spread(flat).numpy()

    def _logits(self, rollout: Rollout, positions: ResponsePositions) -> Tensor:
        hidden = final_hidden_states(self.engine.model, paddle.to_tensor(rollout.tokens))
        states = paddle.gather(hidden.reshape([-1, hidden.shape[-1]]), paddle.to_tensor(positions.states))
        return lm_logits(self.engine.model, states)


class ValueRole:
    """The critic: the value of the state before each response token.

    Args:
        engine: around a score model of type ``critic``.
        micro_batch_size: rows of a forward without gradient.
    """

    def __init__(self, engine: Engine, micro_batch_size: int) -> None:
        self.engine, self.micro_batch_size = engine, micro_batch_size

    def forward(self, rollout: Rollout) -> Tensor:
        """``[B, R]`` float32, zero behind the ends; differentiable."""
        positions = ResponsePositions.of(rollout)
        scores = score_tokens(self.engine.model, paddle.to_tensor(rollout.tokens))
        if not len(positions.labels):
            return paddle.zeros(positions.shape, dtype="float32")
        flat = paddle.gather(scores.astype("float32").reshape([-1]), paddle.to_tensor(positions.states))
        return positions.spread(flat)

    def values(self, rollout: Rollout) -> np.ndarray:
        """``[B, R]`` float32 without gradient, in micro batches."""

        def once(part: Rollout) -> np.ndarray:
            with paddle.no_grad():
                return self.forward(part).numpy()

        return map_micro_batches(rollout, self.micro_batch_size, once, rollout.width)


class RewardRole:
    """The reward model: one score per answer, read at its last real token.

    Args:
        engine: around a frozen score model.
        micro_batch_size: rows of a forward.
    """

    def __init__(self, engine: Engine, micro_batch_size: int) -> None:
        self.engine, self.micro_batch_size = engine, micro_batch_size

    def score_rows(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Scores of right-padded rows.

        Args:
            tokens: ``[B, T]`` int64.
            lengths: ``[B]`` real tokens of each row, at least 1.

        Returns:
            ``[B]`` float32.
        """
        parts = []
        with paddle.no_grad():
            for start in range(0, len(lengths), self.micro_batch_size):
                some = lengths[start : start + self.micro_batch_size]
                rows = tokens[start : start + self.micro_batch_size, : int(some.max())]
                scores = end_scores(self.engine.model, paddle.to_tensor(np.ascontiguousarray(rows)), some)
                parts.append(scores.astype("float32").numpy().reshape(-1))
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)
