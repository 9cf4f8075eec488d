"""ReMax (Li et al. 2024): REINFORCE against the score of the prompt's greedy answer. No critic.

Every prompt is answered a second time, greedily and once, and that answer is scored as the others are. Of each sampled
answer, token by token (``t``), with the score at its last token:

    r_t = -kl_coeff KL_t + [t is last] score          KL_t of the policy to the reference, by ``kl_estimator``
    A_t = sum_{s >= t} gamma^(s - t) r_s - score of the greedy answer

    loss: max(-A rho, -A clip(rho, 1 - low, 1 + high)) - entropy_coeff H           rho = pi / pi_old (as in verl)

In a rollout's first optimizer step rho is 1 and the gradient is the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from alignment.arguments.critic_keys import NO_CRITIC
from alignment.flow.flow import Call, Flow
from alignment.flow.method import Loss, RoleSpec, Train, Window
from alignment.flow.online import ACTOR, OnlineMethod, logprobs

if TYPE_CHECKING:
    from paddle import Tensor

    from alignment.flow.statistics import Statistics
    from alignment.rollout.generate import GenerationPrompt
    from alignment.rollout.rewards import RewardResult
    from alignment.rollout.rollout import Experience, Rollout


@dataclass
class Keys:
    """ReMax has no keys of its own."""

    FOREIGN = NO_CRITIC


class ReMax(OnlineMethod):
    """Policy gradient against the greedy answer's score."""

    name = "remax"
    title = "ReMax"
    summary = "each answer against the greedy answer to its prompt; no critic, no groups"
    Keys = Keys
    bar = ("train/reward", "train/greedy_reward", "train/kl_divergence", "train/actor_loss")

    def roles(self) -> list[RoleSpec]:
        return [ACTOR, self.reference_model, self.reward_model]

    def flow(self) -> Flow:
        rows = ("rollout", "logprobs", "ref_logprobs", "scores", "greedy", "greedy_scores")
        update = Train({"actor": self.actor_loss})
        return Flow(
            [
                Call("generate", "generate", ("actor",), ("prompts",), "rollout", self.generate),
                Call(
                    "greedy_generate", "generate", ("actor",), ("prompts",), "greedy", self.generate_greedily, samples=1
                ),
                Call("actor_logprobs", "infer", ("actor",), ("rollout",), "logprobs", logprobs),
                Call("reference_logprobs", "infer", ("reference",), ("rollout",), "ref_logprobs", logprobs),
                Call("reward_scores", "infer", ("reward",), ("rollout",), "scores", self.score),
                Call("greedy_reward_scores", "infer", ("reward",), ("greedy",), "greedy_scores", self.score),
                Call("advantages", "host", (), rows, ("experience", "figures"), self.advantages),
                Call("update", "train", ("actor",), ("experience",), "stats", update),
            ],
            inputs=("prompts",),
        )

    def generate_greedily(self, actor: Any, prompts: list[GenerationPrompt]) -> Rollout | None:
        """The greedy answer to each of this data rank's prompts; None without any."""
        return self.answer(prompts, self.sampling.as_greedy())

    def advantages(
        self,
        rollout: Rollout,
        logprobs: np.ndarray,
        ref_logprobs: np.ndarray | None,
        scores: RewardResult,
        greedy: Rollout,
        greedy_scores: RewardResult,
    ) -> tuple[Experience, Statistics]:
        """Of the rows of all ranks; arrays ``[B, R]``, ``greedy`` one row a prompt."""
        # Normalised by the same moments as the sampled answers' scores, which alone they learn from.
        shaped = self.shape_scores(rollout, scores.total)
        baseline = self.clip_scores(self.shape_scores(greedy, greedy_scores.total, learn=False))
        experience = self.advantages_by(
            "remax",
            rollout,
            scores,
            logprobs,
            ref_logprobs,
            self.advantage_options(normalize="tokens" if self.args.normalize_advantage else "none"),
            shaped,
            greedy_scores=of_same_prompt(baseline, greedy.prompt_index, rollout.prompt_index),
        )
        experience, figures = self.finish(experience, scores)
        figures.add("train/greedy_reward", float(greedy_scores.total.sum()), len(greedy))
        self.count_tokens(greedy, "greedy")
        return experience, figures

    def actor_loss(self, logprobs: Tensor, entropy: Tensor, batch: Experience, window: Window) -> Loss:
        """``logprobs`` and ``entropy`` ``[b, R]``."""
        inputs = self.policy_inputs(logprobs, batch, window, self.policy_options(), self.args.policy_loss_mean)
        return self.policy_loss("ppo", inputs, entropy, batch, window)


def of_same_prompt(values: np.ndarray, prompts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted prompt.

    Args:
        values: ``[P]``.
        prompts: ``[P]`` int, their prompts' numbers, each once.
        wanted: ``[B]`` int.

    Returns:
        ``[B]``.
    """
    order = np.argsort(prompts)
    return values[order[np.searchsorted(prompts[order], wanted)]]
