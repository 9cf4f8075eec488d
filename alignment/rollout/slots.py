"""Prompts, and the answers that grow behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from alignment.losses.token_sets import TokenSets
from alignment.rollout.rollout import Rollout
from alignment.rollout.sampler import SamplingSettings
from alignment.rollout.stopping import StopRule


@dataclass(frozen=True)
class GenerationPrompt:
    """One prompt to answer.

    Attributes:
        input_ids: ``[L]`` int64, the formatted prompt, L >= 1.
        prompt_index: the prompt's number in the run's stream; with the seed it fixes the random numbers.
        prompt: the text as the data set gave it.
        row: further columns, handed on to Python rewards.
        max_new_tokens: longest answer to this prompt, where that is less than the settings allow.
    """

    input_ids: np.ndarray
    prompt_index: int
    prompt: str
    row: dict[str, Any]
    max_new_tokens: int | None = None


@dataclass
class RowTable:
    """What is known of each answer ("row") while it grows; rows of a prompt stand beside each other.

    Attributes:
        prompts: that are answered.
        copies: answers to each.
        stop: what ends an answer.
        prompt_len, prompt_index, sample_index, limit: ``[N]`` int64; ``limit`` is the longest answer.
        response_len: ``[N]`` int64, tokens so far.
        finished: ``[N]`` bool, whether it ended by itself.
        tokens: ``[N, max limit]`` int64.
        logprobs, sampler_logprobs: ``[N, max limit]`` float32.
        ended: is told how many rows have just ended.
        allowed: of each row, the tokens that each of its own was drawn from, int32; empty without a masking policy.
    """

    prompts: Sequence[GenerationPrompt]
    copies: int
    stop: StopRule
    prompt_len: np.ndarray
    prompt_index: np.ndarray
    sample_index: np.ndarray
    limit: np.ndarray
    response_len: np.ndarray
    finished: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray
    sampler_logprobs: np.ndarray
    ended: Callable[[int], None] = lambda count: None
    allowed: dict[int, list[np.ndarray]] = field(default_factory=dict)

    @classmethod
    def start(
        cls,
        prompts: Sequence[GenerationPrompt],
        copies: int,
        settings: SamplingSettings,
        stop: StopRule,
        context_length: int | None,
        ended: Callable[[int], None] = lambda count: None,
    ) -> RowTable:
        """A table of empty answers."""
        repeat = np.repeat(np.arange(len(prompts)), copies)
        prompt_len = np.array([len(prompt.input_ids) for prompt in prompts], dtype=np.int64)[repeat]
        own = [settings.max_new_tokens if p.max_new_tokens is None else p.max_new_tokens for p in prompts]
        limit = np.minimum(np.array(own, dtype=np.int64)[repeat], settings.max_new_tokens)
        if context_length is not None:
            limit = np.minimum(limit, context_length - prompt_len)
        shape = (len(repeat), int(limit.max()))
        return cls(
            prompts=prompts,
            copies=copies,
            stop=stop,
            prompt_len=prompt_len,
            prompt_index=np.array([prompt.prompt_index for prompt in prompts], dtype=np.int64)[repeat],
            sample_index=np.tile(np.arange(copies, dtype=np.int64), len(prompts)),
            limit=limit,
            response_len=np.zeros(len(repeat), dtype=np.int64),
            finished=np.zeros(len(repeat), dtype=bool),
            tokens=np.zeros(shape, dtype=np.int64),
            logprobs=np.zeros(shape, dtype=np.float32),
            sampler_logprobs=np.zeros(shape, dtype=np.float32),
            ended=ended,
        )

    def __len__(self) -> int:
        return len(self.limit)

    def append(
        self,
        rows: np.ndarray,
        tokens: np.ndarray,
        logprobs: np.ndarray,
        sampler_logprobs: np.ndarray,
        allowed: np.ndarray | None = None,
    ) -> np.ndarray:
        """Add a token to each of ``rows`` (that have not ended); returns which go on, ``[len(rows)]`` bool.

        Args:
            rows: their numbers.
            tokens, logprobs, sampler_logprobs: ``[len(rows)]``.
            allowed: ``[len(rows), V]`` bool, what each token was drawn from; None: all tokens.
        """
        place = self.response_len[rows]
        self.tokens[rows, place] = tokens
        self.logprobs[rows, place] = logprobs
        self.sampler_logprobs[rows, place] = sampler_logprobs
        self.response_len[rows] += 1
        if allowed is not None:
            for row, mask in zip(rows.tolist(), allowed, strict=True):
                self.allowed.setdefault(row, []).append(np.flatnonzero(mask).astype(np.int32))
        if self.stop.strings:
            pairs = zip(rows.tolist(), tokens.tolist(), strict=True)
            ended = np.array([self.stop.ends(t, self.tokens[r, : self.response_len[r]]) for r, t in pairs], dtype=bool)
        else:
            ended = (tokens[:, None] == np.array(self.stop.eos_ids)).any(axis=1)  # np.isin takes 44 us, this 3
        self.finished[rows[ended]] = True
        going = ~ended & (place + 1 < self.limit[rows])
        self.ended(int(len(going) - going.sum()))
        return going

    def rollout(self, pad_id: int) -> Rollout:
        """All rows, as they are now."""
        width = max(1, int(self.response_len.max()))
        rows = np.full((len(self), int((self.prompt_len + self.response_len).max())), pad_id, dtype=np.int64)
        responses = []
        for i in range(len(rows)):
            start, length = int(self.prompt_len[i]), int(self.response_len[i])
            rows[i, :start] = self.prompts[i // self.copies].input_ids
            rows[i, start : start + length] = self.tokens[i, :length]
            responses.append(self.stop.text(self.tokens[i, :length].tolist(), bool(self.finished[i])))
        return Rollout(
            tokens=rows,
            prompt_len=self.prompt_len,
            response_len=self.response_len,
            finished=self.finished,
            logprobs=self.logprobs[:, :width],
            sampler_logprobs=self.sampler_logprobs[:, :width],
            prompt_index=self.prompt_index,
            sample_index=self.sample_index,
            prompts=[self.prompts[i // self.copies].prompt for i in range(len(rows))],
            responses=responses,
            rows=[self.prompts[i // self.copies].row for i in range(len(rows))],
            allowed=TokenSets.join([s for i in range(len(rows)) for s in self.allowed[i]]) if self.allowed else None,
            pad_id=pad_id,
        )
