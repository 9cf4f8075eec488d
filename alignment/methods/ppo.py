"""PPO with a critic (Schulman et al. 2017; for language models Ziegler et al. 2019, Ouyang et al. 2022).

Of each answer, token by token (``t``) that the policy chose, with the score at the last one (tokens that a tool put in
are stepped over):

    r_t = -kl_coeff KL_t + [t is last] score          KL_t of the policy to the reference, by ``kl_estimator``
    A_t = sum_l (gamma lambda)^l delta_{t+l}          delta_t = r_t + gamma V_{t+1} - V_t  (GAE, Schulman et al. 2016)
    R_t = A_t + V_t

    actor:  max(-A rho, -A clip(rho, 1 - low, 1 + high)) - entropy_coeff H       rho = pi / pi_old
    critic: value_coeff 0.5 max((V - R)^2, (clip(V, V_old -+ clip_range_value) - R)^2)

each a mean over the tokens of the whole optimizer step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from alignment.arguments.ppo_arguments import PPOArguments
from alignment.flow.flow import Call, Flow
from alignment.flow.method import Loss, RoleSpec, Train, Window
from alignment.flow.online import ACTOR, CRITIC, REFERENCE, OnlineMethod, logprobs, values
from alignment.losses.advantages import gae, whiten
from alignment.losses.kl import kl_estimate, shape_rewards
from alignment.losses.policy import PolicyOptions, value_loss
from alignment.rollout.rollout import Experience

if TYPE_CHECKING:
    from paddle import Tensor

    from alignment.flow.statistics import Statistics
    from alignment.rollout.rewards import RewardResult
    from alignment.rollout.rollout import Rollout


class PPO(OnlineMethod):
    """Policy gradient with clipped ratios, a critic, and a KL penalty to a frozen reference."""

    name = "ppo"
    title = "PPO"
    summary = "train a policy against rewards, with a critic"
    Arguments = PPOArguments
    bar = ("train/reward", "train/kl_divergence", "train/actor_loss", "train/reward_critic_loss")

    def roles(self) -> list[RoleSpec]:
        actor = replace(ACTOR, starts_at=self.args.critic_warmup_steps)
        return [actor, REFERENCE, CRITIC, self.reward_model]

    def flow(self) -> Flow:
        # The update needs both models and both optimizers' states throughout: its steps take turns, critic and actor
        # in each window, and moving either of them between two windows would move both once per optimizer step.
        update = Train({"critic": self.critic_loss, "actor": self.actor_loss})
        return Flow(
            [
                Call("generate", "generate", ("actor",), ("prompts",), "rollout", self.generate),
                Call("actor_logprobs", "infer", ("actor",), ("rollout",), "logprobs", logprobs),
                Call("reference_logprobs", "infer", ("reference",), ("rollout",), "ref_logprobs", logprobs),
                Call("reward_scores", "infer", ("reward",), ("rollout",), "scores", self.score),
                Call("critic_values", "infer", ("critic",), ("rollout",), "values", values),
                Call(
                    "advantages",
                    "host",
                    (),
                    ("rollout", "logprobs", "ref_logprobs", "scores", "values"),
                    ("experience", "figures"),
                    self.advantages,
                ),
                Call("update", "train", ("actor", "critic"), ("experience",), "stats", update),
            ],
            inputs=("prompts",),
        )

    def advantages(
        self,
        rollout: Rollout,
        logprobs: np.ndarray,
        ref_logprobs: np.ndarray,
        scores: RewardResult,
        values: np.ndarray,
    ) -> tuple[Experience, Statistics]:
        """Token rewards, advantages and returns of the rows of all ranks, so that whitening, normalisation and the KL
        controller do not depend on the layout.
        """
        return self.finish(self.experience(rollout, logprobs, ref_logprobs, scores, values), scores)

    def experience(
        self,
        rollout: Rollout,
        logprobs: np.ndarray,
        ref_logprobs: np.ndarray,
        scores: RewardResult,
        values: np.ndarray,
    ) -> Experience:
        """What is learnt from; arrays ``[B, R]`` of the actor by the training network, the reference, the critic."""
        args, mask = self.args, rollout.actions
        # The score's way: normalised by the running moments (if any), then the missing-EOS rule, then clipped, then
        # added to the KL penalty at the last token that the policy chose.
        shaped = self.shape_scores(rollout, scores.total)
        kl = kl_estimate(logprobs, ref_logprobs, args.kl_estimator) * mask
        coeff, lengths = self.kl_controller.kl_coeff, rollout.response_len
        rewards = shape_rewards(shaped, kl, lengths, coeff, args.clip_range_score, action_mask=mask)
        advantages, returns = gae(rewards, values, mask, args.gamma, args.gae_lambda)
        if args.normalize_advantage:
            advantages = whiten(advantages, mask)
        columns = {
            "values": values,
            "scores": scores.total,
            "shaped_scores": shaped,
            "kl": kl,
            "rewards": rewards,
            "advantages": advantages,
            "returns": returns,
        }
        in_float32 = {name: column.astype(np.float32) for name, column in columns.items()}
        return Experience(rollout, scores.parts, logprobs=logprobs, ref_logprobs=ref_logprobs, **in_float32)

    def critic_loss(
        self, values: Tensor, batch: Experience, window: Window, critic: str = "reward_critic", prefix: str = ""
    ) -> Loss:
        """The clipped value loss of the columns ``<prefix>values`` and ``<prefix>returns``; ``values`` ``[b, R]``."""
        args, tokens, denominator = self.args, float(batch.actions.sum()), window.denominator("token")
        loss, clipped = value_loss(
            values,
            batch.tensor(f"{prefix}values"),
            batch.tensor(f"{prefix}returns"),
            batch.tensor("actions"),
            args.clip_range_value,
            denominator=denominator,
        )
        return Loss(
            loss * args.value_coeff,
            sums={
                f"train/{critic}_loss": (loss, tokens, denominator),
                f"train/{prefix}value_clip_fraction": (clipped, tokens),
            },
        )

    def actor_loss(self, logprobs: Tensor, entropy: Tensor, batch: Experience, window: Window) -> Loss:
        """The clipped surrogate with an entropy bonus; ``logprobs`` and ``entropy`` ``[b, R]``."""
        args = self.args
        options = PolicyOptions(args.clip_range_ratio_low, args.clip_range_ratio_high, args.dual_clip)
        inputs = self.policy_inputs(logprobs, batch, window, options, args.policy_loss_mean)
        return self.policy_loss("ppo", inputs, entropy, batch, window)
