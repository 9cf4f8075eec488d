"""The generation engine: prompts (token ids) in, a :class:`~alignment.ppo.rollout.Rollout` out.

One prefill per prompt however many answers are wanted of it, a key-value cache, and rows leave the batch when they
finish. The engine pads on the left inside itself, because Paddle's models append to their caches; nothing outside ever
sees that.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

from alignment.errors import ModelError
from alignment.ppo.generation.decoder import Decoder
from alignment.ppo.generation.sampler import SamplingSettings, choose_tokens
from alignment.ppo.rollout import Rollout, join_rollouts

# A smaller batch pays for copying the caches of the rows that stay once a quarter of the rows have finished.
_COMPACT_BELOW = 0.75


@dataclass(frozen=True)
class GenerationPrompt:
    """One prompt to answer.

    Attributes:
        input_ids: ``[L]`` int64, the formatted prompt, L >= 1.
        prompt_index: the prompt's number in the run's stream; with the seed it fixes the random numbers.
        prompt: the text as the data set gave it.
        row: further columns, handed on to Python rewards.
    """

    input_ids: np.ndarray
    prompt_index: int
    prompt: str
    row: dict[str, Any]


class GenerationEngine:
    """Answers prompts with a causal language model.

    Args:
        model: a paddlenlp causal language model; its parameters are used as they are, nothing is copied.
        tokenizer: for decoding and for the pad id.
        eos_ids: tokens that end an answer.
        context_length: the longest row that the model can take, or ``None`` for no limit.
        batch_size: answers that are generated together.
        schedule: of the pipeline, where ``model`` is a stage; every process of it makes the same calls.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        eos_ids: Sequence[int],
        context_length: int | None,
        batch_size: int,
        schedule: Any = None,
    ) -> None:
        self.model, self.tokenizer, self.decoder = model, tokenizer, Decoder(model, schedule)
        self.eos_ids = tuple(int(i) for i in eos_ids)
        self.context_length, self.batch_size = context_length, max(1, batch_size)
        # Only Mistral's models have sliding windows that are in force; paddlenlp's code ignores them.
        config = model.config
        self.window: int | None = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None

    def generate(
        self,
        prompts: Sequence[GenerationPrompt],
        settings: SamplingSettings,
        num_return_sequences: int = 1,
        batch_size: int | None = None,
    ) -> Rollout:
        """Answer each prompt ``num_return_sequences`` times.

        Args:
            prompts: at least one.
            settings: limits and sampling.
            num_return_sequences: answers per prompt, beside each other in the result.
            batch_size: answers that are generated together; the engine's own if not given.

        Returns:
            ``len(prompts) * num_return_sequences`` rows in the order of the prompts.

        Raises:
            ModelError: a prompt is empty or leaves no room for an answer, or the model gave NaN.
        """
        self._check(prompts)
        was_training = self.model.training
        self.model.eval()
        per_batch = max(1, (batch_size or self.batch_size) // num_return_sequences)
        try:
            with paddle.no_grad():
                parts = [
                    self._generate_batch(prompts[i : i + per_batch], settings, num_return_sequences)
                    for i in range(0, len(prompts), per_batch)
                ]
        finally:
            if was_training:
                self.model.train()
        return join_rollouts(parts, self.pad_id)

    @property
    def pad_id(self) -> int:
        """What fills rows behind their end; it has no influence."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.eos_ids[0])

    def _check(self, prompts: Sequence[GenerationPrompt]) -> None:
        for prompt in prompts:
            length = len(prompt.input_ids)
            if length == 0:
                raise ModelError(f"prompt {prompt.prompt_index} has no token: {prompt.prompt[:80]!r}")
            if self.context_length is not None and length >= self.context_length:
                raise ModelError(
                    f"prompt {prompt.prompt_index} has {length} tokens, and the model's context is "
                    f"{self.context_length}: no room for an answer (lower max_src_len): {prompt.prompt[:80]!r}"
                )

    def _generate_batch(
        self, prompts: Sequence[GenerationPrompt], settings: SamplingSettings, num_return_sequences: int
    ) -> Rollout:
        state = _Batch.start(prompts, num_return_sequences, settings, self.context_length)
        logits, caches = self._prefill(prompts)
        repeat = np.repeat(np.arange(len(prompts)), num_return_sequences)
        if num_return_sequences > 1:
            index = paddle.to_tensor(repeat)
            logits, caches = None if logits is None else logits[repeat], _gather(caches, index)
        prompt_width = max(len(prompt.input_ids) for prompt in prompts)
        # which slots of the (left-padded) row are real; grows by one column a step
        visible = np.zeros((len(prompts), prompt_width), dtype=np.int64)
        for i, prompt in enumerate(prompts):
            visible[i, prompt_width - len(prompt.input_ids) :] = 1
        visible = visible[repeat]
        active = np.arange(len(repeat))
        vocabulary = int(self.model.config.vocab_size)
        seen = self._seen(prompts, repeat, vocabulary) if settings.repetition_penalty != 1.0 else None
        position = 0
        while True:
            choose = functools.partial(self._choose, logits, settings, state, active, position, seen)
            tokens, logprobs = self.decoder.decide(choose)
            growing = state.append(active, position, tokens, logprobs)
            if seen is not None:
                seen[active, tokens] = True
            ended = growing & np.isin(tokens, self.eos_ids)
            state.finished[active[ended]] = True
            position += 1
            going = growing & ~ended & (position < state.limit[active])
            if not going.any():
                return state.rollout(prompts, num_return_sequences, self)
            # rows that are done ride along, unheeded, until enough of them have gathered
            if going.mean() <= _COMPACT_BELOW:
                stay = np.nonzero(going)[0]
                active, tokens, visible = active[stay], tokens[stay], visible[stay]
                caches = _gather(caches, paddle.to_tensor(stay))
            visible = np.concatenate([visible, np.ones((len(active), 1), dtype=np.int64)], axis=1)
            logits, caches = self._decode(tokens, state.prompt_len[active] + position - 1, visible, caches)

    def _choose(
        self,
        logits: np.ndarray,
        settings: SamplingSettings,
        state: _Batch,
        active: np.ndarray,
        position: int,
        seen: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        if not np.isfinite(logits).all():
            raise ModelError("the model gave NaN or infinite logits during generation; are its weights intact?")
        return choose_tokens(
            logits,
            settings,
            state.prompt_index[active],
            state.sample_index[active],
            position,
            self.eos_ids,
            None if seen is None else seen[active],
        )

    def _seen(self, prompts: Sequence[GenerationPrompt], repeat: np.ndarray, vocab: int) -> np.ndarray:
        seen = np.zeros((len(prompts), vocab), dtype=bool)
        for i, prompt in enumerate(prompts):
            seen[i, prompt.input_ids] = True
        return seen[repeat]

    def _prefill(self, prompts: Sequence[GenerationPrompt]) -> tuple[np.ndarray | None, Any]:
        width = max(len(prompt.input_ids) for prompt in prompts)
        tokens = np.full((len(prompts), width), self.pad_id, dtype=np.int64)
        mask, positions = np.zeros_like(tokens), np.zeros_like(tokens)
        for i, prompt in enumerate(prompts):
            start = width - len(prompt.input_ids)
            tokens[i, start:] = prompt.input_ids
            mask[i, start:] = 1
            positions[i, start:] = np.arange(width - start)
        first = width if self.window is None else min(width, self.window)
        logits, caches = self.decoder.step(tokens[:, :first], mask[:, :first], positions[:, :first], None)
        # behind a sliding window token by token: slow, and right whatever the model's own code makes of windows
        for slot in range(first, width):
            logits, caches = self._decode(tokens[:, slot], positions[:, slot], mask[:, : slot + 1], caches)
        return logits, caches

    def _decode(
        self, tokens: np.ndarray, positions: np.ndarray, mask: np.ndarray, caches: Any
    ) -> tuple[np.ndarray | None, Any]:
        if self.window is not None and mask.shape[1] > self.window:
            mask = mask.copy()
            mask[:, : -self.window] = 0
        return self.decoder.step(tokens[:, None], mask, positions[:, None], caches)


def _gather(caches: Any, index: paddle.Tensor) -> list[tuple[paddle.Tensor, ...]]:
    return [tuple(paddle.index_select(tensor, index, axis=0) for tensor in layer) for layer in caches]


@dataclass
class _Batch:
    """What is known of each row while it grows."""

    prompt_len: np.ndarray
    prompt_index: np.ndarray
    sample_index: np.ndarray
    limit: np.ndarray
    response_len: np.ndarray
    finished: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray

    @classmethod
    def start(
        cls,
        prompts: Sequence[GenerationPrompt],
        num_return_sequences: int,
        settings: SamplingSettings,
        context_length: int | None,
    ) -> _Batch:
        repeat = np.repeat(np.arange(len(prompts)), num_return_sequences)
        prompt_len = np.array([len(prompt.input_ids) for prompt in prompts], dtype=np.int64)[repeat]
        room = settings.max_new_tokens if context_length is None else context_length - prompt_len
        limit = np.minimum(np.full(len(repeat), settings.max_new_tokens), room).astype(np.int64)
        shape = (len(repeat), int(limit.max()))
        return cls(
            prompt_len=prompt_len,
            prompt_index=np.array([prompt.prompt_index for prompt in prompts], dtype=np.int64)[repeat],
            sample_index=np.tile(np.arange(num_return_sequences, dtype=np.int64), len(prompts)),
            limit=limit,
            response_len=np.zeros(len(repeat), dtype=np.int64),
            finished=np.zeros(len(repeat), dtype=bool),
            tokens=np.zeros(shape, dtype=np.int64),
            logprobs=np.zeros(shape, dtype=np.float32),
        )

    def append(self, active: np.ndarray, position: int, tokens: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
        """Add a token to each active row that is still growing; returns which those are, ``[len(active)]`` bool."""
        growing = (position < self.limit[active]) & ~self.finished[active]
        rows = active[growing]
        self.tokens[rows, position] = tokens[growing]
        self.logprobs[rows, position] = logprobs[growing]
        self.response_len[rows] += 1
        return growing

    def rollout(
        self, prompts: Sequence[GenerationPrompt], num_return_sequences: int, engine: GenerationEngine
    ) -> Rollout:
        width = max(1, int(self.response_len.max()))
        longest = int((self.prompt_len + self.response_len).max())
        rows = np.full((len(self.limit), longest), engine.pad_id, dtype=np.int64)
        responses = []
        for i in range(len(rows)):
            start, length = int(self.prompt_len[i]), int(self.response_len[i])
            rows[i, :start] = prompts[i // num_return_sequences].input_ids
            rows[i, start : start + length] = self.tokens[i, :length]
            text = self.tokens[i, : length - 1 if self.finished[i] else length]
            responses.append(engine.tokenizer.decode(text.tolist(), skip_special_tokens=True))
        return Rollout(
            tokens=rows,
            prompt_len=self.prompt_len,
            response_len=self.response_len,
            finished=self.finished,
            logprobs=self.logprobs[:, :width],
            prompt_index=self.prompt_index,
            sample_index=self.sample_index,
            prompts=[prompts[i // num_return_sequences].prompt for i in range(len(rows))],
            responses=responses,
            rows=[prompts[i // num_return_sequences].row for i in range(len(rows))],
        )
