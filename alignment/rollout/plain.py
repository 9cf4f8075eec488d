"""The plain way to generate: through paddlenlp's own modules, or the stages of a pipeline, in batches of a fixed size.

It serves what the rollout engine cannot (``use_fusemt`` off, pipelines, LoRA, other architectures): slower, and the
same tokens but for rounding. Rows are padded on the left inside, because Paddle's models append to their caches.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle

from alignment.errors import ModelError
from alignment.ppo.models import predicted_tokens
from alignment.rollout.masking import MaskingPolicy
from alignment.rollout.plain_decoder import PlainDecoder
from alignment.rollout.random_numbers import token_uniforms
from alignment.rollout.sampler import KeptMass, SamplingSettings, choose_tokens
from alignment.rollout.slots import RowTable

# A smaller batch pays for copying the caches of the rows that stay once a quarter of the rows have finished.
_COMPACT_BELOW = 0.75


class PlainBatch:
    """Lets the rows of a table grow together, the prompts' first.

    Args:
        decoder: of the model or of this process's stage.
        window: tokens that a token sees, or None.
        pad_id: fills rows on the left.
        kept: looks at some of the logits.
        masking: says which tokens may be sampled; None: all may.
        masking_decoder: of its model, which reads every token too; None: it goes by the policy's own logits.
    """

    def __init__(
        self,
        decoder: PlainDecoder,
        window: int | None,
        pad_id: int,
        kept: KeptMass,
        masking: MaskingPolicy | None = None,
        masking_decoder: PlainDecoder | None = None,
    ) -> None:
        self.decoder, self.window, self.pad_id, self.kept, self.masking = decoder, window, pad_id, kept, masking
        self._readers = [decoder] if masking_decoder is None else [decoder, masking_decoder]

    def run(self, table: RowTable, settings: SamplingSettings) -> None:
        """Until all rows have ended.

        Raises:
            ModelError: the model gave NaN or infinite logits.
        """
        prompts = [prompt.input_ids for prompt in table.prompts]
        logits, caches = self._prefill(prompts)  # of each reader
        repeat = np.repeat(np.arange(len(prompts)), table.copies)
        if table.copies > 1:
            index = paddle.to_tensor(repeat)
            logits = [None if part is None else part[repeat] for part in logits]
            caches = [_gather(cache, index) for cache in caches]
        width = max(len(prompt) for prompt in prompts)
        # which slots of the (left-padded) row are real; grows by one column a step
        visible = np.zeros((len(prompts), width), dtype=np.int64)
        for i, prompt in enumerate(prompts):
            visible[i, width - len(prompt) :] = 1
        visible = visible[repeat]
        active, growing = np.arange(len(repeat)), np.ones(len(repeat), dtype=bool)
        vocabulary = predicted_tokens(self.decoder.model)
        seen = _seen(prompts, repeat, vocabulary) if settings.repetition_penalty != 1.0 else None
        position = 0
        while True:
            choose = functools.partial(self._choose, logits, settings, table, active, growing, position, seen)
            tokens, *found = self.decoder.decide(choose)
            if seen is not None:
                seen[active, tokens] = True
            going = growing.copy()
            going[growing] = table.append(
                active[growing], tokens[growing], *(None if part is None else part[growing] for part in found)
            )
            growing = going
            position += 1
            if not growing.any():
                return
            # rows that are done ride along, unheeded, until enough of them have gathered
            if growing.mean() <= _COMPACT_BELOW:
                stay = np.nonzero(growing)[0]
                active, tokens, visible, growing = active[stay], tokens[stay], visible[stay], growing[stay]
                caches = [_gather(cache, paddle.to_tensor(stay)) for cache in caches]
            visible = np.concatenate([visible, np.ones((len(active), 1), dtype=np.int64)], axis=1)
            # rows that ride along stay where they ended: what lies behind it may be beyond the model's positions
            places = table.prompt_len[active] + table.response_len[active] - 1
            logits, caches = self._decode(tokens, places, visible, caches)

    def _choose(
        self,
        logits: Sequence[np.ndarray],
        settings: SamplingSettings,
        table: RowTable,
        active: np.ndarray,
        growing: np.ndarray,
        position: int,
        seen: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        own, early, allowed = logits[0], np.full(len(active), position < settings.min_new_tokens), None
        if self.masking is not None:
            allowed = self.masking.allow(logits[-1], settings.temperature, early, table.stop.eos_ids)
        if self.kept.wants(settings):
            self.kept.look(own[growing], settings, None if allowed is None else allowed[growing])
        tokens, logprobs, sampler_logprobs = choose_tokens(
            own,
            settings,
            token_uniforms(settings.seed, table.prompt_index[active], table.sample_index[active], position),
            early,
            table.stop.eos_ids,
            None if seen is None else seen[active],
            allowed,
        )
        if (tokens[growing] < 0).any():
            raise ModelError("the model gave NaN or infinite logits during generation; are its weights intact?")
        return tokens.clip(min=0), logprobs, sampler_logprobs, allowed

    def _prefill(self, prompts: Sequence[np.ndarray]) -> tuple[list[np.ndarray | None], list[Any]]:
        width = max(len(prompt) for prompt in prompts)
        tokens = np.full((len(prompts), width), self.pad_id, dtype=np.int64)
        mask, positions = np.zeros_like(tokens), np.zeros_like(tokens)
        for i, prompt in enumerate(prompts):
            start = width - len(prompt)
            tokens[i, start:] = prompt
            mask[i, start:] = 1
            positions[i, start:] = np.arange(width - start)
        first = width if self.window is None else min(width, self.window)
        fresh = [None] * len(self._readers)
        logits, caches = self._step(tokens[:, :first], mask[:, :first], positions[:, :first], fresh)
        # behind a sliding window token by token: slow, and right whatever the model's own code makes of windows
        for slot in range(first, width):
            logits, caches = self._decode(tokens[:, slot], positions[:, slot], mask[:, : slot + 1], caches)
        return logits, caches

    def _step(
        self, tokens: np.ndarray, mask: np.ndarray, positions: np.ndarray, caches: Sequence[Any]
    ) -> tuple[list[np.ndarray | None], list[Any]]:
        """Of each reader; see :meth:`PlainDecoder.step`."""
        readers = zip(self._readers, caches, strict=True)
        logits, grown = zip(*(reader.step(tokens, mask, positions, cache) for reader, cache in readers), strict=True)
        return list(logits), list(grown)

    def _decode(
        self, tokens: np.ndarray, positions: np.ndarray, mask: np.ndarray, caches: Sequence[Any]
    ) -> tuple[list[np.ndarray | None], list[Any]]:
        if self.window is not None and mask.shape[1] > self.window:
            mask = mask.copy()
            mask[:, : -self.window] = 0
        return self._step(tokens[:, None], mask, positions[:, None], caches)


def _seen(prompts: Sequence[np.ndarray], repeat: np.ndarray, vocabulary: int) -> np.ndarray:
    seen = np.zeros((len(prompts), vocabulary), dtype=bool)
    for i, prompt in enumerate(prompts):
        seen[i, prompt] = True
    return seen[repeat]


def _gather(caches: Any, index: paddle.Tensor) -> list[tuple[paddle.Tensor, ...]]:
    return [tuple(paddle.index_select(tensor, index, axis=0) for tensor in layer) for layer in caches]
