"""GRPO, policy gradient against the other answers to the same prompt (Shao et al. 2024), and its family.

Of each answer i to a prompt g, with the score r_i:

    A_i = (r_i - mean_g) / (std_g + eps)               scale: group; batch: std of all scores; none: no division
    loss = aggregation of max(-A rho, -A clip(rho, 1 - low, 1 + high)) + kl_coeff KL       rho = pi / pi_old

There is no critic, and without a KL no reference. The forms by name are presets, each a set of keys:

    dr_grpo  no division, sum over answers' tokens / (answers * max_dec_len)               Liu et al. 2025
    dapo     clip 0.2 and 0.28, prompts without spread are sampled anew, long answers      Yu et al. 2025
    gspo     one ratio an answer, exp(mean log rho), mean over answers                     Zheng et al. 2025
    cispo    -A sg(clip(rho, low, high)) log pi: no token loses its gradient               MiniMax-M1 2025
    gdpo     several rewards, each normalised by itself, their sum over all answers        Liu et al. 2026
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from alignment.arguments.critic_keys import NO_CRITIC
from alignment.arguments.spec import argument
from alignment.flow.flow import Call, Flow
from alignment.flow.method import Loss, RoleSpec, Train, Window
from alignment.flow.online import ACTOR, OnlineMethod, logprobs
from alignment.flow.refill import sample_with_spread
from alignment.losses import groups as grouped
from alignment.losses.aggregation import AGGREGATIONS
from alignment.losses.estimators import ADVANTAGES, STDS, TOKEN_REWARDS
from alignment.losses.kl import KL_ESTIMATORS, kl_terms
from alignment.losses.policy import LOSS_DEFAULTS, POLICY_LOSSES
from alignment.losses.shaping import overlong_filter, overlong_penalty

if TYPE_CHECKING:
    from paddle import Tensor

    from alignment.flow.statistics import Statistics
    from alignment.rollout.rewards import RewardResult
    from alignment.rollout.rollout import Experience, Rollout

_CLIP = {"clip_range_low": "clip_range_ratio_low", "clip_range_high": "clip_range_ratio_high"}
_BROUGHT = ("aggregation", "cispo_low", "cispo_high", *_CLIP)
# What each policy loss's own paper sets; "ppo" is the default, whose settings are those of the keys.
_LOSS_SETTINGS = {
    name: {_CLIP.get(key, key): value for key, value in settings.items() if key in _BROUGHT}
    for name, settings in LOSS_DEFAULTS.items()
    if name != "ppo"
}
# Estimators of the KL whose mean gradient as a loss is 0.
_FLAT_IN_LOSS = ("k1", "k3_offpolicy")
# What these need, a method of groups does not give.
_ELSEWHERE = {
    "advantage": {"gae": "it needs a critic: use ppo", "remax": "it needs greedy answers: use remax"},
    "policy_loss": {"apo": "it needs the values V* of the prompts"},
}


def _loss_settings(cls: type, chosen: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """:data:`_LOSS_SETTINGS`; a clip_range_ratio that is given is for both sides, whatever the loss."""
    left_out = _CLIP.values() if "clip_range_ratio" in chosen else ()
    return {loss: {k: v for k, v in keys.items() if k not in left_out} for loss, keys in _LOSS_SETTINGS.items()}


@dataclass
class Keys:
    """The keys of GRPO."""

    GROUP = "GRPO"
    FOREIGN = NO_CRITIC

    advantage: str = argument("grpo", "Estimator of the advantages, a registered name.", choices=ADVANTAGES)
    scale: str = argument(
        "group",
        "What the distance from the group's mean is divided by: the group's deviation, that of all scores, nothing.",
        choices=grouped.SCALES,
    )
    std: str = argument("unbiased", "Deviation by n - 1, or by n.", choices=STDS)
    eps: float = argument(1e-6, "Added to the deviation.", ge=0)
    singletons: str = argument(
        "refuse", "Prompts with one answer: refused, advantage 0, or its raw score.", choices=grouped.SINGLETONS
    )
    leave_one_out: bool = argument(False, "Mean and deviation of the other answers alone (NeMo).")
    token_rewards: str = argument(
        "score",
        "How a KL in the reward enters: its sum is part of the score, or token by token behind the group's mean.",
        choices=TOKEN_REWARDS,
    )
    policy_loss: str = argument(
        "ppo",
        "Loss of the policy, a registered name; each but ppo brings its paper's clips and aggregation.",
        choices=POLICY_LOSSES,
        sets=_loss_settings,
    )
    aggregation: str = argument(
        "token",
        "How tokens' losses become one: mean over the step's tokens, over answers' means, over answers' sums, sum by "
        "answers and length_constant, mean over prompts' means.",
        choices=AGGREGATIONS,
    )
    length_constant: float | None = argument(
        None, "The length that aggregation constant divides by.", gt=0, unit="tokens", derived="max_dec_len"
    )
    cispo_low: float = argument(0.0, "cispo: smallest weight, a ratio.", ge=0)
    cispo_high: float = argument(5.0, "cispo: largest weight, a ratio.", gt=0)
    kl_in: str = argument(
        "loss", "Where the KL to the reference is, if kl_coeff is above 0.", choices=("loss", "reward")
    )
    kl_loss_coeff: float | None = argument(
        None, "Paddlenlp's key: kl_coeff, with kl_in loss.", ge=0, derived="kl_coeff"
    )
    kl_log_ratio_clamp: float | None = argument(20.0, "Log-ratios in the KL are cut to +- this.", gt=0)
    kl_clamp: float | None = argument(None, "Each token's KL is cut to +- this.", gt=0, derived="off")
    dynamic_sampling: bool = argument(
        False, "Leave out prompts whose answers all score alike and sample further prompts in their place (DAPO)."
    )
    max_gen_batches: int = argument(10, "Rounds of dynamic_sampling; then what there is is trained on.", ge=1)
    enable_overlong_reward_buffer: bool = argument(
        False, "Take off the score of answers that come near max_dec_len (DAPO, eq. 13)."
    )
    overlong_reward_buffer: int | None = argument(
        None,
        "Over so many tokens in front of max_dec_len the penalty grows.",
        ge=1,
        unit="tokens",
        derived="a fifth of max_dec_len",
    )
    overlong_penalty_factor: float = argument(1.0, "The penalty at max_dec_len.", ge=0)
    overlong_filter: bool = argument(
        False, "Learn nothing from answers cut at max_dec_len; their scores stay in the group's mean (DAPO)."
    )

    def resolve_keys(self: Any) -> None:
        """Fill in what follows from other keys."""
        if self.kl_loss_coeff is not None:
            if "kl_coeff" in self.given and self.kl_coeff != self.kl_loss_coeff:
                self.remarks.append(f"kl_coeff {self.kl_coeff:g} is not used: kl_loss_coeff weighs the KL in the loss")
            self.kl_coeff, self.kl_in = self.kl_loss_coeff, "loss"
        self.length_constant = self.length_constant or float(self.max_dec_len)
        self.overlong_reward_buffer = self.overlong_reward_buffer or max(1, self.max_dec_len // 5)

    def check_keys(self: Any, problems: Any) -> None:
        """Refuse what cannot be computed."""
        if self.num_return_sequences == 1 and self.singletons == "refuse":
            problems.add(
                "num_return_sequences is 1, and an answer is judged by the others to its prompt: set it to 2 or more "
                "(8 is usual)",
                "num_return_sequences",
            )
        for key, names in _ELSEWHERE.items():
            if getattr(self, key) in names:
                problems.add(f"{key} {getattr(self, key)}: {names[getattr(self, key)]}", key)
        if self.cispo_low >= self.cispo_high:
            problems.add(f"cispo_low {self.cispo_low:g} is not below cispo_high {self.cispo_high:g}", "cispo_low")
        if self.enable_overlong_reward_buffer and self.overlong_reward_buffer > self.max_dec_len:
            problems.add(
                f"overlong_reward_buffer {self.overlong_reward_buffer} is above max_dec_len {self.max_dec_len}",
                "overlong_reward_buffer",
                "max_dec_len",
            )
        if self.advantage == "gdpo":
            self._check_gdpo(problems)
        idle = sorted(self.given & {"kl_in", "kl_estimator", "kl_log_ratio_clamp", "kl_clamp"})
        if idle and self.kl_coeff == 0:
            self.notes.append(f"{', '.join(idle)}: not used, because kl_coeff is 0")
        if self.kl_coeff > 0 and self.kl_in == "loss" and self.kl_estimator in _FLAT_IN_LOSS:
            self.notes.append(
                f"kl_estimator {self.kl_estimator} in the loss has a gradient of 0 on average: k3+ has that of the KL, "
                "or set kl_in to reward"
            )
        if "max_gen_batches" in self.given and not self.dynamic_sampling:
            self.notes.append("max_gen_batches is not used, because dynamic_sampling is false")

    def _check_gdpo(self: Any, problems: Any) -> None:
        shaping = {
            "enable_overlong_reward_buffer": self.enable_overlong_reward_buffer,
            "missing_eos_rule": self.missing_eos_rule != "none",
            "normalize_reward": self.normalize_reward,
            "kl_in": self.kl_in == "reward" and self.kl_coeff > 0,
        }
        for key, asked in shaping.items():
            if asked:
                problems.add(
                    f"advantage gdpo normalises each reward by itself, so {key} {getattr(self, key)} has no sum to "
                    "change: leave it out, or give the penalty as a reward of its own",
                    "advantage",
                    key,
                )


class GRPO(OnlineMethod):
    """Policy gradient with the other answers to a prompt as the baseline."""

    name = "grpo"
    title = "GRPO"
    summary = "train a policy against rewards, each answer judged by the others to its prompt; no critic"
    Keys = Keys
    changes = {
        "num_return_sequences": {"default": 8},
        "kl_coeff": {"default": 0.0, "help": "Weight of the KL to the reference; 0: no reference is loaded."},
        "kl_estimator": {
            "default": "k3",
            "choices": KL_ESTIMATORS,
            "help": "Estimator of the KL; in the loss k1+ and k3+ have the right gradient (docs/compat.md).",
        },
        "policy_loss_mean": {"unavailable": "set aggregation"},
    }
    presets = {
        "grpo": {},
        "dr_grpo": {"scale": "none", "aggregation": "constant"},
        "dapo": {
            "clip_range_ratio_low": 0.2,
            "clip_range_ratio_high": 0.28,
            "aggregation": "token",
            "dynamic_sampling": True,
            "enable_overlong_reward_buffer": True,
            "overlong_filter": True,
        },
        "gspo": {"policy_loss": "gspo", **_LOSS_SETTINGS["gspo"]},
        "cispo": {"policy_loss": "cispo", **_LOSS_SETTINGS["cispo"]},
        "gdpo": {"advantage": "gdpo"},
    }
    bar = ("train/reward", "train/actor_loss", "train/entropy")

    def roles(self) -> list[RoleSpec]:
        return [ACTOR, self.reference_model, self.reward_model]

    def flow(self) -> Flow:
        args, rows = self.args, ("rollout", "logprobs", "ref_logprobs", "scores")
        update = Train({"actor": self.actor_loss}, None, args.aggregation, args.length_constant)
        flow = Flow(
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
        if not args.dynamic_sampling:
            return flow
        # Scores decide how many rounds there are, so the reward model has to be there while the actor generates.
        gives = ("rollout", "scores", "sampling")
        filled = Call("generate", "generate", ("actor", "reward"), ("prompts",), gives, self.generate_with_spread)
        return flow.edit(drop=("generate", "reward_scores"), add=[filled])

    @property
    def partial_rewards(self) -> bool:
        """Whether a reward may say of an answer that it does not apply (``None``)."""
        return self.args.advantage == "gdpo"

    # -- dynamic sampling

    def generate_with_spread(
        self, actor: Any, reward: Any, prompts: list[Any]
    ) -> tuple[Rollout | None, RewardResult | None, Statistics]:
        """As many prompts as were asked for whose answers differ in their scores, or as there are in
        ``max_gen_batches`` rounds; see :func:`~alignment.flow.refill.sample_with_spread`.
        """
        found = sample_with_spread(
            prompts,
            further=lambda: self.loop.feed.next(within=True),
            generate=lambda some: self.generate(actor, some),
            score=lambda rollout: self.score(reward, rollout),
            spread=self.spread,
            world=self.world,
            most=self.args.max_gen_batches,
        )
        self.timer.count_tokens("generate", found.dropped_tokens)
        if found.message:
            self._say({"dynamic_sampling": found.message})
        return found.rollout, found.scores, found.figures

    def spread(self, rollout: Rollout, scores: RewardResult) -> np.ndarray:
        """``[B]`` bool: whether the scores of the row's group differ, before any shaping (for ``gdpo`` those of any
        reward that counts).
        """
        columns, weights = self.rewards_of(scores)
        judged = columns[:, weights != 0] if self.args.advantage == "gdpo" else scores.total[:, None]
        return np.any([grouped.groups_with_spread(c, rollout.prompt_index) for c in judged.T], axis=0)

    def rewards_of(self, scores: RewardResult) -> tuple[np.ndarray, np.ndarray]:
        """``[B, K]`` each reward by itself and ``[K]`` their weights."""
        given = self.args.reward
        weights = list(given.values()) if isinstance(given, dict) else [1.0]
        return np.stack(list(scores.parts.values()), axis=1), np.asarray(weights)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "began": self.loop.feed.began}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.loop.feed.began = state["began"]

    # -- advantages

    def shape_scores(self, rollout: Rollout, scores: np.ndarray, learn: bool = True) -> np.ndarray:
        args, shaped = self.args, super().shape_scores(rollout, scores, learn)
        if not args.enable_overlong_reward_buffer:
            return shaped
        buffer, factor = args.overlong_reward_buffer, args.overlong_penalty_factor
        return (shaped + overlong_penalty(rollout.response_len, args.max_dec_len, buffer, factor)).astype(np.float32)

    def advantages(
        self, rollout: Rollout, logprobs: np.ndarray, ref_logprobs: np.ndarray | None, scores: RewardResult
    ) -> tuple[Experience, Statistics]:
        """Of the rows of all ranks, since a prompt's answers may lie on several of them; arrays ``[B, R]``."""
        args = self.args
        rewards, weights = self.rewards_of(scores)
        in_reward = ref_logprobs if args.kl_in == "reward" else None
        options = self.advantage_options(normalize="tokens" if args.normalize_advantage else None)
        experience = self.advantages_by(
            args.advantage, rollout, scores, logprobs, in_reward, options, rewards=rewards, reward_weights=weights
        )
        if ref_logprobs is not None and in_reward is None:
            experience = experience.add("response", ref_logprobs=ref_logprobs)
        experience, stats = self.finish(experience, scores)
        moments = grouped.group_moments(scores.total, rollout.prompt_index)
        stats.add("train/reward_group_std", float(np.sqrt(moments.variance).sum()), len(rollout))
        if not args.dynamic_sampling:  # which has counted those that it left out
            stats.add("train/groups_without_spread", float((~self.spread(rollout, scores)).sum()), len(rollout))
        if args.overlong_filter:
            kept = overlong_filter(experience.action_mask, rollout.finished)
            experience = experience.add("response", action_mask=kept)
        return experience, stats

    # -- the loss

    def actor_loss(self, logprobs: Tensor, entropy: Tensor, batch: Experience, window: Window) -> Loss:
        """The policy loss that is chosen, with the KL where it is in the loss; ``logprobs`` and ``entropy``
        ``[b, R]``.
        """
        args, kl = self.args, None
        inputs = self.policy_inputs(logprobs, batch, window, self.policy_options())
        # rows that were half used when the key was set have no reference's log-probs: it holds from the next rollout on
        if args.kl_coeff > 0 and args.kl_in == "loss" and "ref_logprobs" in batch:
            reference, mask = batch.tensor("ref_logprobs"), batch.tensor("actions")
            kl = kl_terms(logprobs, reference, mask, args.kl_estimator, args.kl_log_ratio_clamp, args.kl_clamp)
        return self.policy_loss(args.policy_loss, inputs, entropy, batch, window, kl)
