"""The reward model as one of the reward sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from alignment.errors import DataError, RewardError
from alignment.ppo.data import Encoder, Limits, PromptTemplate
from alignment.rollout.rewards import RewardBatch
from alignment.rollout.roles import RewardRole
from alignment.rollout.rollout import Rollout


class RewardModelScorer:
    """Scores answers with the reward model.

    Where the reward model has the actor's tokenizer and template it reads the very tokens that were sampled; otherwise
    prompt and answer are formatted and tokenised anew for it. Either way an answer that a stop string has ended reads
    as one that the model has ended there: its text before the stop string, then eos.

    Args:
        role: the frozen reward model.
        tokenizer: what the reward model reads: its own, or the actor's.
        template: what the reward model was trained on.
        eos_ids: tokens that end an answer of the actor's.
        max_length: longest row for the reward model; longer ones lose the start of their prompt, then the start of
            their answer.
        anew: whether ``tokenizer`` and ``template`` are not the actor's.

    Attributes:
        figures: ``"truncated"`` ``[B]``: 1 where a row of the newest batch was cut to ``max_length``.
    """

    def __init__(
        self,
        role: RewardRole,
        tokenizer: Any,
        template: PromptTemplate,
        eos_ids: tuple[int, ...],
        max_length: int,
        *,
        anew: bool,
    ) -> None:
        self.role, self.tokenizer, self.template, self.max_length = role, tokenizer, template, max_length
        self.eos_ids, self.anew = eos_ids, anew
        self.figures: dict[str, np.ndarray] = {}

    def __call__(self, batch: RewardBatch) -> np.ndarray:
        """``[B]`` float32.

        Raises:
            RewardError: the batch comes without its tokens.
        """
        rollout = batch.rollout
        if rollout is None:
            raise RewardError("the reward model scores tokens, and this batch has only texts")
        ids, lengths, cut = self._anew(batch.rows, rollout) if self.anew else self._as_sampled(rollout)
        self.figures = {"truncated": cut.astype(np.float32)}
        return self.role.score_rows(ids, lengths)

    def _anew(self, columns: list[dict[str, Any]], rollout: Rollout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        # a conversation's turns are in the row; its prompt is their text
        prompts = [row.get("input", prompt) for row, prompt in zip(columns, rollout.prompts, strict=True)]
        systems, tools = ([row.get(name) for row in columns] for name in ("system", "tools"))
        finished = rollout.finished.tolist()
        return build_reward_inputs(
            prompts, rollout.responses, finished, self.tokenizer, self.template, self.max_length, systems, tools
        )

    def _as_sampled(self, rollout: Rollout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        last = rollout.tokens[np.arange(len(rollout)), rollout.lengths - 1]
        stopped = np.flatnonzero(rollout.finished & ~np.isin(last, self.eos_ids))
        if not len(stopped):
            return rollout.tokens, rollout.lengths, np.zeros(len(rollout), dtype=bool)
        rows = [row[: int(length)].tolist() for row, length in zip(rollout.tokens, rollout.lengths, strict=True)]
        encoder = Encoder(self.tokenizer, self.template, Limits(self.max_length))
        for i in stopped:
            rows[i][int(rollout.prompt_len[i]) :] = [*encoder.text_ids(rollout.responses[i]), encoder.eos_id]
        cut = np.array([len(row) > self.max_length for row in rows])
        return *pad_rows([row[-self.max_length :] for row in rows], self.tokenizer.pad_token_id), cut


def build_reward_inputs(
    prompts: Sequence[str | list[Any]],
    responses: Sequence[str],
    finished: Sequence[bool],
    reward_tokenizer: Any,
    template: PromptTemplate,
    max_length: int,
    systems: Sequence[str | None] | None = None,
    tools: Sequence[Any] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokenise prompts and answers anew for a reward model that has another tokenizer than the actor.

    Args:
        prompts: raw prompts, as the data set gave them.
        responses: the answers' texts, without special tokens.
        finished: whether each answer ended with eos; only then does its row end with the reward model's eos.
        reward_tokenizer: as from :func:`load_tokenizer`.
        template: turns a prompt into the text that the reward model was trained on.
        max_length: longest row; longer ones lose the start of their prompt, then that of their answer, since the score
            is read at the end.
        systems: the rows' system prompts, if they have any.
        tools: the rows' definitions of tools, if they have any.

    Returns:
        ``ids [rows, longest]`` int64, right-padded; ``lengths [rows]`` int64, each at least 1; ``cut [rows]`` bool,
        which rows were too long.

    Raises:
        DataError: the three lists differ in length.
    """
    if not len(prompts) == len(responses) == len(finished):
        raise DataError(
            f"{len(prompts)} prompts, {len(responses)} responses and {len(finished)} flags do not make rows"
        )
    # The encoder that made the reward model's training rows, so that prompt and answer meet at the same token boundary.
    encoder = Encoder(reward_tokenizer, template, Limits(max_length=max_length))
    rows: list[list[int]] = []
    cut = np.zeros(len(prompts), dtype=bool)
    for index, (prompt, response, ended) in enumerate(zip(prompts, responses, finished, strict=True)):
        turns = [prompt] if isinstance(prompt, str) else list(prompt)
        system, functions = systems[index] if systems else None, tools[index] if tools else None
        head, answer = encoder.answered(turns, response, ended, system, functions)
        cut[index] = len(head) + len(answer) > max_length
        room = max_length - len(answer)
        rows.append((encoder.cut_left(head, room) if room > 0 else []) + answer[-max_length:])
    return *pad_rows(rows, reward_tokenizer.pad_token_id), cut


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """``ids [rows, longest]`` int64, padded on the right, and ``lengths [rows]`` int64."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    ids = np.full([len(rows), int(lengths.max(initial=0))], pad_id, dtype=np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
    return ids, lengths
