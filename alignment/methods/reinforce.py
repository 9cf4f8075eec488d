"""REINFORCE++ (Hu et al. 2025): PPO's clip and token rewards, with the batch's mean in the place of a critic.

Of each answer, token by token (``t``), with the score at its last token:

    r_t = -kl_coeff KL_t + [t is last] score          KL_t of the policy to the reference, by ``kl_estimator``
    G_t = r_t + gamma G_{t+1}
    A   = (G - mean) / sqrt(var + whiten_eps)         over all tokens of the rollout

    loss: max(-A rho, -A clip(rho, 1 - low, 1 + high)) - entropy_coeff H           rho = pi / pi_old

``advantage: reinforce_plus_plus_baseline`` (preset ``reinforce_baseline``) takes the mean of a prompt's answers off
first: R_i = score_i - kl_coeff sum_t KL_t, A = whiten(R_i - mean_g R). With ``token_rewards: tokens`` the score alone
is centred, and the KL stays at its tokens (OpenRLHF).

Tokens that the policy did not choose have no advantage and take nothing off the returns in front of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from alignment.arguments.critic_keys import NO_CRITIC
from alignment.arguments.spec import argument
from alignment.flow.flow import Call, Flow
from alignment.flow.method import Loss, RoleSpec, Train, Window
from alignment.flow.online import ACTOR, OnlineMethod, logprobs
from alignment.losses.estimators import STDS, TOKEN_REWARDS

if TYPE_CHECKING:
    from paddle import Tensor

    from alignment.arguments.checks import Problems
    from alignment.flow.statistics import Statistics
    from alignment.rollout.rewards import RewardResult
    from alignment.rollout.rollout import Experience, Rollout

PLAIN, BASELINE = "reinforce_plus_plus", "reinforce_plus_plus_baseline"


@dataclass
class Keys:
    """REINFORCE++'s own keys."""

    FOREIGN = NO_CRITIC

    advantage: str = argument(
        PLAIN, "The advantage: token returns, or the answer's score less the mean of its prompt's answers (baseline).",
        choices=(PLAIN, BASELINE),
    )  # fmt: skip
    token_rewards: str = argument(
        "score",
        "With the baseline, the KL penalty: its sum is part of the answer's score before the mean is taken off "
        "(score), or it stays at its tokens (tokens, as in OpenRLHF).",
        choices=TOKEN_REWARDS,
    )
    whiten_std: str = argument(
        "unbiased", "The variance of the whitening: divided by n - 1 (unbiased) or by n (biased).", choices=STDS
    )
    whiten_eps: float = argument(1e-8, "Added to that variance.", ge=0)

    def check_keys(self, problems: Problems) -> None:
        if self.advantage == BASELINE and self.num_return_sequences < 2:
            problems.add(
                f"advantage {BASELINE} takes the mean of a prompt's answers off, and there is one: nothing would be "
                "learnt. Set num_return_sequences to 2 or more (8 is usual)",
                "advantage",
                "num_return_sequences",
            )


class Reinforce(OnlineMethod):
    """Policy gradient with whitened token returns."""

    name = "reinforce"
    title = "REINFORCE++"
    summary = "token returns, whitened over the batch; no critic, no groups"
    Keys = Keys
    changes = {
        "kl_coeff": {"default": 0.01},
        "clip_range_score": {"default": 10.0},
        "normalize_advantage": {"default": True, "derived": ""},
    }
    presets = {"reinforce_baseline": {"advantage": BASELINE, "num_return_sequences": 8}}

    def roles(self) -> list[RoleSpec]:
        return [ACTOR, self.reference_model, self.reward_model]

    def flow(self) -> Flow:
        rows = ("rollout", "logprobs", "ref_logprobs", "scores")
        update = Train({"actor": self.actor_loss})
        return Flow(
            [
                Call("generate", "generate", ("actor",), ("prompts",), "rollout", self.generate),
                Call("actor_logprobs", "infer", ("actor",), ("rollout",), "logprobs", logprobs),
                Call("reference_logprobs", "infer", ("reference",), ("rollout",), "ref_logprobs", logprobs),
                Call("reward_scores", "infer", ("reward",), ("rollout",), "scores", self.score),
                Call("advantages", "host", (), rows, ("experience", "figures"), self.advantages),
                Call("update", "train", ("actor",), ("experience",), "stats", update),
            ],
            inputs=("prompts",),
        )

    def advantages(
        self, rollout: Rollout, logprobs: np.ndarray, ref_logprobs: np.ndarray | None, scores: RewardResult
    ) -> tuple[Experience, Statistics]:
        """Of the rows of all ranks; arrays ``[B, R]``."""
        args = self.args
        options = self.advantage_options(normalize=None if args.normalize_advantage else "none")
        return self.finish(self.advantages_by(args.advantage, rollout, scores, logprobs, ref_logprobs, options), scores)

    def actor_loss(self, logprobs: Tensor, entropy: Tensor, batch: Experience, window: Window) -> Loss:
        """``logprobs`` and ``entropy`` ``[b, R]``."""
        inputs = self.policy_inputs(logprobs, batch, window, self.policy_options(), self.args.policy_loss_mean)
        return self.policy_loss("ppo", inputs, entropy, batch, window)
