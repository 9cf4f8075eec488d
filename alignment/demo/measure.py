"""How good each stage's model is: answers to the held-out prompts, greedy and sampled, and what the judges say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignment.demo.task import gold_score

ANSWER_TOKENS = 32
BATCH = 200


@dataclass(frozen=True)
class Answers:
    """What a model answered.

    Attributes:
        texts: the answers.
        gold: ``[prompts]`` their gold scores.
        reward: ``[prompts]`` float32, the reward model's scores; None without one.
        kl: ``[prompts]`` float32, ``sum log p(token) - log p_reference(token)`` over the answer's tokens: of sampled
            answers its mean estimates the KL in nats; None without a reference.
        tokens: ``[prompts]`` their lengths.
    """

    texts: list[str]
    gold: np.ndarray
    reward: np.ndarray | None
    kl: np.ndarray | None
    tokens: np.ndarray

    def summary(self) -> dict[str, float]:
        """Means, and the share of answers with which the gold rule finds nothing wrong."""
        values = {
            "gold": self.gold,
            "perfect": self.gold > 1 - 1e-9,
            "reward": self.reward,
            "kl": self.kl,
            "tokens": self.tokens,
        }
        return {name: float(np.mean(value)) for name, value in values.items() if value is not None}


class Judges:
    """The held-out prompts with those who judge the answers to them.

    Args:
        rows: the prompts' rows (see :meth:`alignment.demo.task.Question.row`).
        seed: of the sampling; every model draws with the same random numbers.
        reward_model: folder of the reward model, or None.
        reference: folder of the model from which the KL is counted, or None.
    """

    def __init__(self, rows: list[dict[str, Any]], seed: int, reward_model: Path | None, reference: Path | None):
        from alignment.engine.engine import Engine
        from alignment.parallel import init_world
        from alignment.ppo.models import load_causal_lm, load_score_model
        from alignment.rollout.roles import PolicyRole, RewardRole

        self.rows, self.seed, self.world = rows, seed, init_world()
        self.reward = self.reference = None
        if reward_model is not None:
            model = load_score_model(str(reward_model), score_type="reward")
            self.reward = RewardRole(Engine("reward model", model, self.world), BATCH)
        if reference is not None:
            self.reference = PolicyRole(Engine("reference", load_causal_lm(str(reference)), self.world), 1.0, BATCH)

    def judge(self, folder: Path) -> dict[str, Answers]:
        """Let the model in ``folder`` answer, once greedily and once by sampling at temperature 1.

        Returns:
            the answers under ``"greedy"`` and ``"sampled"``.
        """
        from alignment.engine.engine import Engine
        from alignment.ppo.data import Encoder, Limits, PromptTemplate
        from alignment.ppo.models import load_causal_lm, load_tokenizer, model_context_length
        from alignment.rollout.generate import GenerationEngine, GenerationPrompt
        from alignment.rollout.roles import PolicyRole
        from alignment.rollout.sampler import SamplingSettings
        from alignment.rollout.stopping import eos_token_ids

        tokenizer = load_tokenizer(str(folder))
        template = PromptTemplate.resolve(None, tokenizer)
        context = model_context_length(str(folder)) or 256
        encoder = Encoder(tokenizer, template, Limits(max_length=context, max_src_len=context - ANSWER_TOKENS))
        prompts = [
            GenerationPrompt(np.asarray(encoder.prompt_ids([row["prompt"]]), np.int64), i, row["prompt"], row)
            for i, row in enumerate(self.rows)
        ]
        model = load_causal_lm(str(folder))
        engine = GenerationEngine(model, tokenizer, eos_token_ids(model, tokenizer), context, BATCH)
        policy = PolicyRole(Engine("policy", model, self.world), 1.0, BATCH)
        answers = {}
        for mode in ("greedy", "sampled"):
            settings = SamplingSettings(max_new_tokens=ANSWER_TOKENS, seed=self.seed, greedy=mode == "greedy")
            rollout = engine.generate(prompts, settings)
            kl = reward = None
            if self.reward is not None:
                reward = self.reward.score_rows(rollout.tokens, rollout.lengths)
            if self.reference is not None:
                kl = (policy.logprobs(rollout) - self.reference.logprobs(rollout)).sum(axis=1)
            gold = [
                gold_score(text, row["kind"], row["right"])
                for text, row in zip(rollout.responses, self.rows, strict=True)
            ]
            answers[mode] = Answers(rollout.responses, np.array(gold), reward, kl, rollout.response_len)
        return answers
