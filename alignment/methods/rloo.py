"""RLOO: REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024; Kool et al. 2019). No critic.

Of each of the G answers ``i`` to a prompt:

    R_i = score_i - kl_coeff sum_t KL_t               KL_t of the policy to the reference, by ``kl_estimator``
    A_i = R_i - mean_{j != i} R_j                     the same for every token of the answer

    loss: max(-A rho, -A clip(rho, 1 - low, 1 + high)) - entropy_coeff H
    rho:  of each token, pi / pi_old (``policy_loss: ppo``: verl, SkyRL, OpenRLHF), or of the whole answer,
          exp(sum_t log rho_t) (``policy_loss: rloo``: TRL)

With ``token_rewards: tokens`` the KL stays at its tokens: A_t = sum_{s >= t} (-kl_coeff KL_s) + score's A_i (OpenRLHF).
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
from alignment.losses.estimators import TOKEN_REWARDS
from alignment.losses.policy import loss_defaults

if TYPE_CHECKING:
    from paddle import Tensor

    from alignment.flow.statistics import Statistics
    from alignment.rollout.rewards import RewardResult
    from alignment.rollout.rollout import Experience, Rollout


@dataclass
class Keys:
    """RLOO's own keys."""

    FOREIGN = NO_CRITIC

    policy_loss: str = argument(
        "ppo",
        "The clipped ratio: of each token (ppo), or of the whole answer (rloo, as in TRL; then policy_loss_mean is "
        "sequence unless it is given).",
        choices=("ppo", "rloo"),
    )
    token_rewards: str = argument(
        "score",
        "The KL penalty: its sum is part of the answer's score before the baseline is taken off (score), or it stays "
        "at its tokens (tokens, as in OpenRLHF).",
        choices=TOKEN_REWARDS,
    )
    normalize_over: str = argument(
        "tokens", "What normalize_advantage takes mean and deviation over.", choices=("tokens", "sequences")
    )
    eps: float = argument(1e-6, "Added to the deviation over sequences.", ge=0)

    def resolve_keys(self) -> None:
        if "policy_loss_mean" not in self.given | self.set_by.keys():
            self.policy_loss_mean = loss_defaults(self.policy_loss)["aggregation"]


class RLOO(OnlineMethod):
    """Policy gradient against the mean score of a prompt's other answers."""

    name = "rloo"
    title = "RLOO"
    summary = "several answers a prompt, each against the mean of the others; no critic"
    Keys = Keys
    changes = {"num_return_sequences": {"default": 4, "ge": 2}, "kl_coeff": {"default": 0.05}}

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
        options = self.advantage_options(normalize=self.args.normalize_over if self.args.normalize_advantage else None)
        return self.finish(self.advantages_by("rloo", rollout, scores, logprobs, ref_logprobs, options), scores)

    def actor_loss(self, logprobs: Tensor, entropy: Tensor, batch: Experience, window: Window) -> Loss:
        """``logprobs`` and ``entropy`` ``[b, R]``."""
        inputs = self.policy_inputs(logprobs, batch, window, self.policy_options(), self.args.policy_loss_mean)
        return self.policy_loss(self.args.policy_loss, inputs, entropy, batch, window)
