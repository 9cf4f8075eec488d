"""A2C (Mnih et al. 2016; for language models RL4LMs, Ramamurthy et al. 2022): a critic, one pass, no ratio, no clip.

Of each answer, token by token (``t``), with the score at its last token:

    r_t = -kl_coeff KL_t + [t is last] score          KL_t of the policy to the reference, by ``kl_estimator``
    A_t = sum_l (gamma lambda)^l delta_{t+l}          delta_t = r_t + gamma V_{t+1} - V_t
    R_t = A_t + V_t

    actor:  -A log pi - entropy_coeff H
    critic: value_coeff (V - R)^2

each a mean over the tokens of the whole optimizer step. Without a ratio, a step is right for the policy that sampled:
let an optimizer step have all rows of a rollout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from alignment.arguments.critic_keys import CriticKeys
from alignment.flow.flow import Call, Flow
from alignment.flow.method import Loss, RoleSpec, Train, Window
from alignment.flow.online import ACTOR, CRITIC, OnlineMethod, logprobs, values
from alignment.losses.policy import value_loss

if TYPE_CHECKING:
    from paddle import Tensor

    from alignment.arguments.checks import Problems
    from alignment.flow.statistics import Statistics
    from alignment.rollout.rewards import RewardResult
    from alignment.rollout.rollout import Experience, Rollout

NO_CLIP = "A2C has no ratio and clips nothing"


@dataclass
class Keys(CriticKeys):
    """A critic's keys; A2C has none of its own."""

    def check_keys(self, problems: Problems) -> None:
        if self.update_iters > 1:
            problems.add(
                f"update_iters is {self.update_iters}, but A2C goes over a rollout once: it has no ratio that would "
                "correct for the steps before. Set it to 1, or use ppo",
                "update_iters",
            )
        prompts = self.per_device_prompt_batch_size * self.prompt_batches_per_rollout
        rows, step = prompts * self.num_return_sequences, self.per_device_train_batch_size
        step *= self.gradient_accumulation_steps
        if rows > step:
            self.notes.append(
                f"a rollout has {rows} rows on each process and an optimizer step {step}: A2C has no ratio, so nothing "
                "corrects for the steps in between; raise gradient_accumulation_steps, or lower "
                "per_device_prompt_batch_size"
            )


class A2C(OnlineMethod):
    """Advantage actor-critic."""

    name = "a2c"
    title = "A2C"
    summary = "a critic, one pass over each rollout, no clip"
    Keys = Keys
    changes = {
        "gamma": {"default": 0.99},
        "gae_lambda": {"default": 1.0},
        "value_coeff": {"default": 0.5},
        "max_grad_norm": {"default": 0.5},
        **{
            key: {"no_effect": NO_CLIP}
            for key in (
                "clip_range_value", "clip_range_ratio", "clip_range_ratio_low", "clip_range_ratio_high", "dual_clip"
            )
        },
    }  # fmt: skip
    bar = ("train/reward", "train/kl_divergence", "train/actor_loss", "train/reward_critic_loss")

    def roles(self) -> list[RoleSpec]:
        return [
            replace(ACTOR, starts_at=self.args.critic_warmup_steps),
            self.reference_model,
            CRITIC,
            self.reward_model,
        ]

    def flow(self) -> Flow:
        rows = ("rollout", "logprobs", "ref_logprobs", "scores", "values")
        update = Train({"critic": self.critic_loss, "actor": self.actor_loss}, passes=1)
        return Flow(
            [
                Call("generate", "generate", ("actor",), ("prompts",), "rollout", self.generate),
                Call("actor_logprobs", "infer", ("actor",), ("rollout",), "logprobs", logprobs),
                Call("reference_logprobs", "infer", ("reference",), ("rollout",), "ref_logprobs", logprobs),
                Call("reward_scores", "infer", ("reward",), ("rollout",), "scores", self.score),
                Call("critic_values", "infer", ("critic",), ("rollout",), "values", values),
                Call("advantages", "host", (), rows, ("experience", "figures"), self.advantages),
                Call("update", "train", ("actor", "critic"), ("experience",), "stats", update),
            ],
            inputs=("prompts",),
        )

    def advantages(
        self,
        rollout: Rollout,
        logprobs: np.ndarray,
        ref_logprobs: np.ndarray | None,
        scores: RewardResult,
        values: np.ndarray,
    ) -> tuple[Experience, Statistics]:
        """Of the rows of all ranks; arrays ``[B, R]``."""
        args = self.args
        options = self.advantage_options(
            lam=args.gae_lambda, normalize="tokens" if args.normalize_advantage else "none"
        )
        experience = self.advantages_by("gae", rollout, scores, logprobs, ref_logprobs, options, values=values)
        return self.finish(experience.add("response", values=values), scores)

    def critic_loss(self, values: Tensor, batch: Experience, window: Window) -> Loss:
        """The squared error, without PPO's half; ``values`` ``[b, R]``."""
        tokens, denominator = float(batch.actions.sum()), window.denominator("token")
        old, returns, actions = batch.tensor("values"), batch.tensor("returns"), batch.tensor("actions")
        loss = 2.0 * value_loss(values, old, returns, actions, denominator=denominator)[0]
        return Loss(loss * self.args.value_coeff, sums={"train/reward_critic_loss": (loss, tokens, denominator)})

    def actor_loss(self, logprobs: Tensor, entropy: Tensor, batch: Experience, window: Window) -> Loss:
        """``logprobs`` and ``entropy`` ``[b, R]``."""
        inputs = self.policy_inputs(logprobs, batch, window, self.policy_options(), self.args.policy_loss_mean)
        return self.policy_loss("a2c", inputs, entropy, batch, window)
