"""The data that travels through an iteration: :class:`Rollout` (what was sampled) and :class:`Experience` (what is
learnt from).

Lengths travel, masks are derived: every row carries ``prompt_len``, ``response_len`` and ``finished``, and no mask is
ever inferred from token ids. A row is ``[prompt | response]``, padded on the right; pad may equal eos.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from alignment.losses.kl import response_mask


@dataclass
class Rollout:
    """Sampled answers, on the host.

    Attributes:
        tokens: ``[B, T]`` int64, ``[prompt | response | padding]``.
        prompt_len: ``[B]`` int64.
        response_len: ``[B]`` int64, the EOS included; 0 where the model answered nothing.
        finished: ``[B]`` bool, whether the answer ended by itself, with an EOS or a stop string, rather than at the
            length limit. ``missing_eos_rule`` goes by it.
        logprobs: ``[B, R]`` float32, log-probs of the response's tokens as the generation engine computed them, at the
            sampling temperature and before top-k, top-p and the repetition penalty.
        sampler_logprobs: ``[B, R]`` float32, log-probs of the same tokens in the distribution that each was drawn from:
            with the repetition penalty, no eos before the shortest length, and renormalised over what top-k and top-p
            kept. 0 for a greedy choice; bit by bit ``logprobs`` where nothing changed the distribution.
        prompt_index: ``[B]`` int64, the prompt's number in the run's endless stream of prompts.
        sample_index: ``[B]`` int64, which of the prompt's answers this is.
        prompts: ``B`` texts as the data set gave them (a dialogue is joined by its template).
        responses: ``B`` texts without special tokens.
        rows: ``B`` further columns of the data set, for Python rewards.
        action_mask: ``[B, R]`` bool, True for tokens that the policy chose, False for those that an environment or a
            tool put in; None where the policy chose every one.
    """

    tokens: np.ndarray
    prompt_len: np.ndarray
    response_len: np.ndarray
    finished: np.ndarray
    logprobs: np.ndarray
    sampler_logprobs: np.ndarray
    prompt_index: np.ndarray
    sample_index: np.ndarray
    prompts: list[str]
    responses: list[str]
    rows: list[dict[str, Any]]
    action_mask: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.prompt_len)

    @property
    def lengths(self) -> np.ndarray:
        """``[B]`` int64, tokens of prompt and response together."""
        return self.prompt_len + self.response_len

    @property
    def width(self) -> int:
        """R, the longest response (at least 1, so that arrays have a column)."""
        return max(1, int(self.response_len.max(initial=0)))

    @property
    def mask(self) -> np.ndarray:
        """``[B, R]`` float32, 1 for each token of the response, whoever chose it."""
        return response_mask(self.response_len, self.width)

    @property
    def actions(self) -> np.ndarray:
        """``[B, R]`` float32, 1 for each token of the response that the policy chose; losses and statistics are over
        these.
        """
        return self.mask if self.action_mask is None else self.mask * self.action_mask[:, : self.width]

    def select(self, index: Sequence[int] | np.ndarray) -> Rollout:
        """The given rows, in the given order, cut to the longest of them."""
        return _trim(self, np.asarray(index, dtype=np.int64))


@dataclass
class Experience:
    """A rollout with everything that the update needs; ``[B, R]`` arrays are aligned with the response's tokens.

    Attributes:
        rollout: the rows.
        logprobs: ``[B, R]`` float32 of the actor before the update, by the training network.
        ref_logprobs: ``[B, R]`` float32 of the frozen reference.
        values: ``[B, R]`` float32, the critic's value of the state before each token.
        scores: ``[B]`` float32, the weighted sum of the reward sources, before normalising, the missing-EOS rule and
            clipping.
        score_parts: ``[B]`` float32 each, by the reward's name.
        shaped_scores: ``[B]`` float32, what entered the token rewards (normalised, with the missing-EOS rule).
        kl: ``[B, R]`` float32 per-token estimates, 0 behind the end.
        rewards: ``[B, R]`` float32.
        advantages: ``[B, R]`` float32.
        returns: ``[B, R]`` float32.
    """

    rollout: Rollout
    logprobs: np.ndarray
    ref_logprobs: np.ndarray
    values: np.ndarray
    scores: np.ndarray
    score_parts: dict[str, np.ndarray]
    shaped_scores: np.ndarray
    kl: np.ndarray
    rewards: np.ndarray
    advantages: np.ndarray
    returns: np.ndarray

    def __len__(self) -> int:
        return len(self.rollout)

    @property
    def mask(self) -> np.ndarray:
        """``[B, R]`` float32."""
        return self.rollout.mask

    def select(self, index: Sequence[int] | np.ndarray) -> Experience:
        """The given rows, in the given order, cut to the longest of them."""
        order = np.asarray(index, dtype=np.int64)
        rollout = self.rollout.select(order)
        width = rollout.width
        taken = {f.name: _take(getattr(self, f.name), order, width) for f in fields(self) if f.name != "rollout"}
        return Experience(rollout=rollout, **taken)


def _take(value: Any, order: np.ndarray, width: int) -> Any:
    if isinstance(value, dict):
        return {key: _take(part, order, width) for key, part in value.items()}
    taken = value[order]
    return taken[:, :width] if taken.ndim == 2 else taken


def _trim(rollout: Rollout, order: np.ndarray) -> Rollout:
    chosen = replace(
        rollout,
        prompt_len=rollout.prompt_len[order],
        response_len=rollout.response_len[order],
        finished=rollout.finished[order],
        prompt_index=rollout.prompt_index[order],
        sample_index=rollout.sample_index[order],
        prompts=[rollout.prompts[i] for i in order],
        responses=[rollout.responses[i] for i in order],
        rows=[rollout.rows[i] for i in order],
    )
    longest = max(1, int(chosen.lengths.max(initial=0)))
    chosen.tokens = rollout.tokens[order][:, :longest]
    chosen.logprobs = rollout.logprobs[order][:, : chosen.width]
    chosen.sampler_logprobs = rollout.sampler_logprobs[order][:, : chosen.width]
    if rollout.action_mask is not None:
        chosen.action_mask = rollout.action_mask[order][:, : chosen.width]
    return chosen


def _pad_to(array: np.ndarray, width: int, value: float | int) -> np.ndarray:
    missing = width - array.shape[1]
    return array if missing <= 0 else np.pad(array, ((0, 0), (0, missing)), constant_values=value)


def _join_arrays(arrays: list[np.ndarray], pad_value: float | int) -> np.ndarray:
    if arrays[0].ndim == 1:
        return np.concatenate(arrays)
    width = max(array.shape[1] for array in arrays)
    return np.concatenate([_pad_to(array, width, pad_value) for array in arrays])


def join_rollouts(parts: Sequence[Rollout], pad_id: int) -> Rollout:
    """Put rollouts together, in order.

    Args:
        parts: at least one.
        pad_id: the token behind the shorter rows; what it is has no influence on anything.

    Raises:
        ValueError: there is nothing to join.
    """
    if not parts:
        raise ValueError("no rollout to join")
    joined: dict[str, Any] = {}
    if any(part.action_mask is not None for part in parts):
        parts = [replace(part, action_mask=part.actions > 0) for part in parts]
    for field in fields(Rollout):
        values = [getattr(part, field.name) for part in parts]
        if values[0] is None:
            continue
        if isinstance(values[0], list):
            joined[field.name] = [item for value in values for item in value]
        else:
            joined[field.name] = _join_arrays(values, pad_id if field.name == "tokens" else 0)
    return Rollout(**joined)


def join_micro_batches(pieces: Sequence[np.ndarray], groups: Sequence[np.ndarray], width: int) -> np.ndarray:
    """Join the ``[b]`` or ``[b, r]`` float arrays of micro batches to ``[B]`` or ``[B, width]``, in the rows' order.

    Args:
        pieces: one array per micro batch; none gives ``[0, width]``.
        groups: the numbers of each micro batch's rows, all of ``0 ... B - 1`` once.
        width: R of the result.
    """
    if not pieces:
        return np.zeros((0, width), dtype=np.float32)
    joined = _join_arrays(list(pieces), 0)[np.argsort(np.concatenate(groups))]
    return _pad_to(joined, width, 0) if joined.ndim == 2 else joined
