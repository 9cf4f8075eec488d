"""The reward model as one of the reward sources."""

from __future__ import annotations

from typing import Any

import numpy as np

from alignment.errors import RewardError
from alignment.ppo.data import Encoder, Limits, PromptTemplate
from alignment.ppo.models import build_reward_inputs, pad_rows
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
