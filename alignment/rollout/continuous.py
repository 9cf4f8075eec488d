"""The rollout engine's loop: continuous batching over a cache of a fixed number of tokens.

    admit     waiting answers get a region of the cache while there is room; a prompt is read once for all its answers
    decode    one token more for every answer that is under way, each at its own position
    evict     an answer that ends gives its region back at once, its prompt's region goes with the last of them

So time follows the tokens that are really produced. Nothing is padded, neither on the left nor on the right.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from alignment.errors import ModelError
from alignment.ppo.models import predicted_tokens
from alignment.rollout.arena import TokenArena, rounded
from alignment.rollout.layers import CachedBatch, LayerOps, PackedBatch
from alignment.rollout.masking import MaskingPolicy
from alignment.rollout.random_numbers import token_uniforms
from alignment.rollout.sampler import KeptMass, SamplingSettings
from alignment.rollout.slots import RowTable


@dataclass(frozen=True)
class BatchFigures:
    """What a batch took; unlike the batch itself it keeps no array alive.

    Attributes:
        steps: decoding steps.
        capacity: tokens that the cache could hold.
        most_used: tokens of the cache that were in use at once.
    """

    steps: int
    capacity: int
    most_used: int


class ContinuousBatch:
    """Lets the rows of a table grow until all have ended.

    Args:
        ops: the layers and the cache.
        table: the rows.
        settings: of sampling.
        budget: tokens that the cache may hold; at least what the largest row needs is taken.
        most_rows: rows that are under way at once; None for as many as the budget allows.
        kept: looks at some of the logits; None for nothing.
        masking: says which tokens may be sampled; None: all may.
        masking_ops: the layers of its model, which reads every token too, and their cache; None: it goes by the
            policy's own logits.

    Attributes:
        arena: the cache's places.
        steps: decoding steps made.
    """

    def __init__(
        self,
        ops: LayerOps,
        table: RowTable,
        settings: SamplingSettings,
        budget: int,
        most_rows: int | None = None,
        kept: KeptMass | None = None,
        masking: MaskingPolicy | None = None,
        masking_ops: LayerOps | None = None,
    ) -> None:
        self.masking, self._readers = masking, [ops] if masking_ops is None else [ops, masking_ops]
        self.ops, self.table, self.settings, self.steps, self.kept = ops, table, settings, 0, kept
        self.most_rows = most_rows or len(table)
        self.arena = TokenArena(_cache_size(table, budget, ops.block), ops.block)
        self._waiting = deque(range(len(table)))
        self._active = np.zeros(0, dtype=np.int64)
        self._newest = np.zeros(0, dtype=np.int64)  # the active rows' newest tokens
        count = len(table)
        self._own = np.zeros(count, dtype=np.int64)  # places of the rows' regions
        self._prompt_place: dict[int, int] = {}
        self._hidden: dict[int, list[Tensor]] = {}  # of each reader, behind a prompt whose answers have not all begun
        self._left = np.full(len(table.prompts), table.copies)  # answers of a prompt that have not ended
        self._uniforms = self._draw()
        self._seen = self._marks() if settings.repetition_penalty != 1.0 else None
        self._mark = paddle.ones([1], dtype="uint8")

    def run(self) -> BatchFigures:
        """Until all rows have ended.

        Raises:
            ModelError: the model gave NaN or infinite logits.
        """
        try:
            for reader in self._readers:
                reader.allocate(self.arena.capacity)
            while self._waiting or len(self._active):
                fresh = self._admit()
                if not len(fresh) and not len(self._active):
                    self._forget_prompts()  # the one region that is left stands in the way of a longer one
                    fresh = self._admit()
                if len(fresh):
                    self._begin(fresh)
                if len(self._active):
                    self._decode()
        finally:
            for reader in self._readers:
                reader.release()
        return BatchFigures(self.steps, self.arena.capacity, self.arena.most_used)

    # -- admission

    def _admit(self) -> np.ndarray:
        """Give waiting rows their regions, in order, while there is room."""
        table, fresh = self.table, []
        while self._waiting and len(self._active) + len(fresh) < self.most_rows:
            row = self._waiting[0]
            prompt = row // table.copies
            known = prompt in self._prompt_place
            place = None if known else self.arena.allocate(int(table.prompt_len[row]))
            if not known and place is None:
                break
            own = self.arena.allocate(int(table.limit[row]))
            if own is None:
                if place is not None:
                    self.arena.release(place)
                break
            if place is not None:
                self._prompt_place[prompt] = place
            self._own[row] = own
            fresh.append(self._waiting.popleft())
        return np.array(fresh, dtype=np.int64)

    def _begin(self, fresh: np.ndarray) -> None:
        """Read the prompts that were not read yet and choose the first token of each fresh row."""
        prompts = fresh // self.table.copies
        unread = [prompt for prompt in dict.fromkeys(prompts.tolist()) if prompt not in self._hidden]
        if unread:
            ids = [self.table.prompts[prompt].input_ids for prompt in unread]
            lengths = np.array([len(row) for row in ids], dtype=np.int64)
            positions = np.concatenate([np.arange(length) for length in lengths])
            place = np.repeat([self._prompt_place[prompt] for prompt in unread], lengths)
            starts = np.concatenate([[0], np.cumsum(lengths)])
            packed = PackedBatch(positions, place + positions, starts)
            read = [reader.prefill(np.concatenate(ids), packed) for reader in self._readers]
            self._hidden.update({prompt: [part[i : i + 1] for part in read] for i, prompt in enumerate(unread)})
        behind = [self._hidden[prompt] for prompt in prompts.tolist()]
        hidden = [paddle.concat(list(parts)) for parts in zip(*behind, strict=True)]
        if not self._waiting or self._waiting[0] // self.table.copies not in self._hidden:
            self._hidden.clear()
        else:
            self._hidden = {self._waiting[0] // self.table.copies: [part[-1:] for part in hidden]}
        chosen, allowed = self._choose(hidden, fresh, self._chance(fresh, 1), 0)
        self._take(fresh, *(part.numpy()[None] for part in chosen), allowed)

    def _forget_prompts(self) -> None:
        for place in self._prompt_place.values():
            self.arena.release(place)
        self._prompt_place.clear()
        self._hidden.clear()

    # -- decoding

    def _decode(self) -> None:
        """One burst of steps of the active rows; what was sampled is looked at behind it."""
        table, rows = self.table, self._active
        burst = 1 if self.masking is not None else self.ops.burst  # a mask is made on the host
        steps = min(burst, int((table.limit - table.response_len)[rows].min()))
        prompt_len, lengths = table.prompt_len[rows], table.response_len[rows]
        prompt_place = np.array([self._prompt_place[prompt] for prompt in (rows // table.copies).tolist()])
        own = self._own[rows]
        newest, burst_chosen, allowed = paddle.to_tensor(self._newest), [], None
        chance = self._chance(rows, steps)
        for step in range(steps):
            before = lengths + step  # answer tokens, of which the newest is not in the cache yet
            batch = CachedBatch(
                positions=prompt_len + before - 1,
                places=own + before - 1,
                spans=np.stack([prompt_place, prompt_len, own, before], axis=1),
                step=step,
            )
            hidden = [reader.decode(newest, batch) for reader in self._readers]
            chosen, allowed = self._choose(hidden, rows, chance, step)
            newest = chosen[0]
            burst_chosen.append(chosen)
        self.steps += steps
        self._active = self._active[:0]
        if steps == 1:
            self._take(rows, *(part.numpy()[None] for part in chosen), allowed)
        else:
            self._take(rows, *(paddle.stack(parts).numpy() for parts in zip(*burst_chosen, strict=True)))

    def _chance(self, rows: np.ndarray, steps: int) -> tuple[Any, Any, Tensor | None]:
        """What the choices of a burst need besides the logits, brought to the device before it begins."""
        positions = self.table.response_len[rows] + np.arange(steps)[:, None]
        uniforms = np.zeros(positions.shape) if self._uniforms is None else self._uniforms[rows, positions]
        staged = self.ops.stage(uniforms, positions < self.settings.min_new_tokens)
        return *staged, None if self._seen is None else paddle.to_tensor(rows)

    def _choose(
        self, hidden: list[Tensor], rows: np.ndarray, chance: tuple[Any, Any, Tensor | None], step: int
    ) -> tuple[tuple[Tensor, ...], np.ndarray | None]:
        """Tokens, log-probs and the sampler's log-probs, ``[rows]`` each; and what was allowed, ``[rows, V]``."""
        uniforms, early, marked = chance
        seen = None if marked is None else paddle.gather(self._seen, marked)
        logits, eos_ids, allowed = self.ops.logits(hidden[0]), self.table.stop.eos_ids, None
        if self.masking is not None:
            theirs = self._readers[1].logits(hidden[1]) if len(hidden) > 1 else logits
            too_early = self.table.response_len[rows] < self.settings.min_new_tokens
            allowed = self.masking.allow(theirs.numpy(), self.settings.temperature, too_early, eos_ids)
        if self.kept is not None and self.kept.wants(self.settings):
            self.kept.look(logits[: self.kept.ROWS].numpy(), self.settings, allowed)
        chosen = self.ops.choose(logits, self.settings, uniforms[step], early[step], eos_ids, seen, allowed)
        if marked is not None:
            paddle.index_put_(self._seen, (marked, chosen[0].clip(min=0)), self._mark)
        return chosen, allowed

    def _take(
        self,
        rows: np.ndarray,
        tokens: np.ndarray,
        logprobs: np.ndarray,
        sampler_logprobs: np.ndarray,
        allowed: np.ndarray | None = None,
    ) -> None:
        """Write down what was sampled, ``[steps, rows]`` (and of one step what was allowed, ``[rows, V]``); rows that
        go on are active, the others leave.
        """
        if (tokens < 0).any():
            raise ModelError("the model gave NaN or infinite logits during generation; are its weights intact?")
        on = np.arange(len(rows))
        for step in range(len(tokens)):
            found = (part[step, on] for part in (tokens, logprobs, sampler_logprobs))
            on = on[self.table.append(rows[on], *found, None if allowed is None else allowed[on])]
        going = np.zeros(len(rows), dtype=bool)
        going[on] = True
        for row in rows[~going].tolist():
            self._leave(row)
        self._active = np.concatenate([self._active, rows[going]])
        self._newest = self.table.tokens[self._active, self.table.response_len[self._active] - 1]

    def _leave(self, row: int) -> None:
        prompt = row // self.table.copies
        self.arena.release(int(self._own[row]))
        self._left[prompt] -= 1
        if not self._left[prompt]:
            self.arena.release(self._prompt_place.pop(prompt))

    # -- made once

    def _draw(self) -> np.ndarray | None:
        """``[N, max limit]`` float64: every random number that may be needed."""
        if self.settings.greedy:
            return None
        table = self.table
        columns = [
            token_uniforms(self.settings.seed, table.prompt_index, table.sample_index, position)
            for position in range(int(table.limit.max()))
        ]
        return np.stack(columns, axis=1)

    def _marks(self) -> Tensor:
        """``[N, V]`` uint8: the tokens that stand in each row."""
        seen = np.zeros((len(self.table), predicted_tokens(self.ops.model)), dtype=np.uint8)
        for row in range(len(self.table)):
            seen[row, self.table.prompts[row // self.table.copies].input_ids] = 1
        return paddle.to_tensor(seen)


def _cache_size(table: RowTable, budget: int, block: int) -> int:
    """Tokens of the cache: no more than all rows need at once, no less than the largest row needs."""
    own = -(-table.limit // block) * block
    prompts = -(-table.prompt_len // block) * block
    everything = int(own.sum() + prompts[:: table.copies].sum())
    return min(everything, max(rounded(budget, block), int((own + prompts).max())))
