"""NLPO: PPO whose actions a lagging copy of the policy masks (Ramamurthy et al. 2023, section 4 and algorithm 1).

The copy ``psi`` says for each state which tokens may be chosen, the most probable ones that together pass ``top_mask``.
Answers are sampled from the policy over these tokens, and it is this policy that is trained:

    Z(s) = { tokens in front of which psi has a mass of at most top_mask }                     (learned_top_p)
    pi_Z(a | s) = pi(a | s) / pi(Z | s) for a in Z, else 0
    actor:  PPO's clipped loss with rho = pi_Z / pi_Z,old, entropy bonus of pi_Z

What was allowed is kept with each token of the rollout, so ``rho`` is over the same tokens before and after a step. The
critic, the advantages and the KL penalty are PPO's. The KL is between whole policies, pi and the reference: over masked
ones it would not count what was cut off.

Every ``mask_update_rollouts`` rollouts ``psi`` becomes a copy of the policy, behind the update (algorithm 1), and masks
the next rollout with that. Evaluation answers under the mask too: that is the policy that was trained. The folder
``policy`` of a run is the whole policy; the copy that masks it is in each checkpoint's ``masking``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from alignment.arguments.critic_keys import CriticKeys
from alignment.arguments.spec import argument
from alignment.flow.flow import Average, Call, Flow
from alignment.flow.method import RoleSpec
from alignment.flow.online import REFERENCE
from alignment.losses.vocabulary_mask import VOCABULARY_MASKS
from alignment.methods.ppo import PPO

if TYPE_CHECKING:
    from alignment.arguments.checks import Problems
    from alignment.flow.statistics import Statistics
    from alignment.rollout.generate import GenerationPrompt
    from alignment.rollout.masking import MaskingPolicy
    from alignment.rollout.rewards import RewardResult
    from alignment.rollout.rollout import Experience, Rollout


@dataclass
class Keys(CriticKeys):
    """NLPO's keys."""

    GROUP = "NLPO"

    mask_type: str = argument(
        "learned_top_p",
        "Which tokens may be chosen: the lagging copy's most probable ones that together pass the probability top_mask "
        "(learned_top_p) or its top_mask most probable ones (learned_top_k); topk: the policy's own, without a copy.",
        choices=VOCABULARY_MASKS,
    )
    top_mask: float = argument(
        0.9, "The probability, or with learned_top_k and topk the number of tokens; -1: no mask, which is PPO."
    )
    mask_min_tokens: int = argument(
        1, "Tokens that learned_top_p allows at least.", ge=1, unit="tokens", aliases=("min_tokens_to_keep",)
    )
    mask_update_rollouts: int = argument(
        5,
        "The copy is brought up to date each time that so many rollouts were learnt from.",
        ge=1,
        unit="rollouts",
        aliases=("target_update_iterations",),
    )

    def check_keys(self, problems: Problems) -> None:
        if self.top_mask == -1:
            return
        if self.mask_type == "learned_top_p":
            if not 0 < self.top_mask <= 1:
                problems.add(
                    f"top_mask {self.top_mask:g} is no probability: learned_top_p takes one above 0, at most 1 (or -1: "
                    "no mask)",
                    "top_mask",
                    "mask_type",
                )
        elif self.top_mask < 1 or self.top_mask != int(self.top_mask):
            problems.add(
                f"top_mask {self.top_mask:g} is no number of tokens: {self.mask_type} takes a whole one, at least 1 "
                "(or -1: no mask)",
                "top_mask",
                "mask_type",
            )


class NLPO(PPO):
    """PPO over the tokens that a lagging copy of the policy allows."""

    name = "nlpo"
    title = "NLPO"
    summary = "PPO over the tokens that a lagging copy of the policy finds probable"
    Arguments = None  # PPO's, with NLPO's keys
    Keys = Keys
    # What is sampled from is what is trained; the mask has cut off the tail already.
    changes = {"top_p": {"default": 1.0}}

    def roles(self) -> list[RoleSpec]:
        actor, *others = super().roles()
        copied = self.args.mask_type != "topk" and self.args.top_mask != -1
        masking = replace(REFERENCE, name="masking", folder="masking", evaluates=True, present=copied)
        return [replace(actor, masked=self.args.top_mask != -1), masking, *others]

    def flow(self) -> Flow:
        return super().flow().edit(
            change={
                "generate": {"roles": ("actor", "masking"), "run": self.generate_masked},
                "actor_logprobs": {"gives": ("plain_logprobs", "logprobs"), "run": plain_and_masked_logprobs},
                "advantages": {
                    "needs": ("rollout", "plain_logprobs", "logprobs", "ref_logprobs", "scores", "values"),
                    "run": self.masked_advantages,
                },
            },
            add=[
                Call(
                    "mask_update",
                    "host",
                    (),
                    ("stats",),
                    "mask_updated",
                    lambda stats: None,
                    when=self.mask_is_due,
                    after=(Average("actor", "masking", 1.0),),
                )
            ],
        )  # fmt: skip

    def mask_is_due(self, step: int) -> bool:
        """Whether the copy is brought up to date behind this update; counted in rollouts, so ``step`` says nothing."""
        done = self.loop.state.rollouts + 1
        return "masking" in self.roles_there and done % self.args.mask_update_rollouts == 0

    def masking(self, roles: Mapping[str, Any]) -> MaskingPolicy | None:
        from alignment.rollout.masking import MaskingPolicy

        args = self.args
        if args.top_mask == -1:
            return None
        model = roles["masking"].engine.model if "masking" in roles else None
        return MaskingPolicy(model, args.mask_type, args.top_mask, args.mask_min_tokens)

    def generate_masked(self, actor: Any, masking: Any, prompts: list[GenerationPrompt]) -> Rollout | None:
        """Answer prompts; the generator has the masking policy's model (:meth:`masking`), which must be there."""
        return self.generate(actor, prompts)

    def masked_advantages(
        self,
        rollout: Rollout,
        plain_logprobs: np.ndarray,
        logprobs: np.ndarray,
        ref_logprobs: np.ndarray,
        scores: RewardResult,
        values: np.ndarray,
    ) -> tuple[Experience, Statistics]:
        """PPO's advantages, with the KL of the whole policies; the ratios will be to the masked ``logprobs``."""
        experience = self.experience(rollout, plain_logprobs, ref_logprobs, scores, values)
        experience = experience.add("response", logprobs=logprobs, plain_logprobs=plain_logprobs)
        experience, figures = self.finish(experience, scores)
        if "allowed_counts" in rollout:
            chosen = rollout.actions > 0
            # pi(Z): how much of the policy the mask leaves; it falls as the policy moves away from its copy
            figures.add("train/mask_kept_mass", np.exp((plain_logprobs - logprobs)[chosen]).sum(), chosen.sum())
            figures.add("train/mask_tokens", rollout["allowed_counts"][chosen].sum(), chosen.sum())
        return experience, figures


def plain_and_masked_logprobs(role: Any, rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
    """``[b, R]`` float32 each of a policy: over all tokens, and over those that were allowed."""
    return role.plain_and_masked_logprobs(rollout)
