"""The reward model as one of the reward sources."""

from __future__ import annotations

from typing import Any

import numpy as np

from alignment.errors import RewardError
from alignment.ppo.data import PromptTemplate
from alignment.ppo.models import build_reward_inputs
from alignment.ppo.rewards import RewardBatch
from alignment.ppo.roles import RewardRole


class RewardModelScorer:
    """Scores answers with the reward model.

    Where the reward model has the actor's tokenizer and template it reads the very tokens that were sampled; otherwise
    prompt and answer are formatted and tokenised anew for it.

    Args:
        role: the frozen reward model.
        tokenizer: the reward model's own, or ``None`` when it is the actor's.
        template: the reward model's own; used with ``tokenizer`` only.
        max_length: longest row for the reward model; used with ``tokenizer`` only.
    """

    def __init__(
        self,
        role: RewardRole,
        tokenizer: Any | None = None,
        template: PromptTemplate | None = None,
        max_length: int = 0,
    ) -> None:
        self.role, self.tokenizer, self.template, self.max_length = role, tokenizer, template, max_length

    def __call__(self, batch: RewardBatch) -> np.ndarray:
        """``[B]`` float32.

        Raises:
            RewardError: the batch comes without its tokens.
        """
        rollout = batch.rollout
        if rollout is None:
            raise RewardError("the reward model scores tokens, and this batch has only texts")
        if self.tokenizer is None or self.template is None:
            return self.role.score_rows(rollout.tokens, rollout.lengths)
        # a conversation's turns are in the row; its prompt is their text
        prompts = [row.get("input", prompt) for row, prompt in zip(batch.rows, batch.prompts, strict=True)]
        finished = rollout.finished.tolist()
        systems, tools = ([row.get(name) for row in batch.rows] for name in ("system", "tools"))
        ids, lengths = build_reward_inputs(
            prompts, batch.responses, finished, self.tokenizer, self.template, self.max_length, systems, tools
        )
        return self.role.score_rows(ids, lengths)
