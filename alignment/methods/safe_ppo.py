"""Safe PPO: PPO under a limit on what answers cost (PPO-Lag of Safe RLHF, Dai et al. 2023).

A cost model (``alignment cost``) gives each answer a cost, positive for harm. What is looked for is the policy with the
largest mean reward among those whose mean cost is at most ``cost_limit``. Token by token (``t``), with the raw score
and the raw cost at the answer's last token:

    r_t = [t is last] score - kl_coeff KL_t        c_t = [t is last] cost + kl_coeff KL_t       KL to the reference
    A_r, A_c by GAE, each with its own critic      A = (A_r - lambda A_c) / (1 + lambda)
    log lambda += lambda_learning_rate lambda (mean cost - cost_limit),  lambda <= lambda_max   before each update

    actor: PPO's loss of A.    critic, cost critic: PPO's value loss of R_r = A_r + V_r and R_c = A_c + V_c

The whole KL penalty is in both streams, as in the authors' code (their paper halves it): divided by ``1 + lambda`` the
policy pays ``kl_coeff`` for it, whatever lambda is. Costs are neither normalised nor shaped, or the limit would mean
something else; ``clip_range_score`` cuts them in ``c_t``, not in the mean that lambda learns from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from alignment.arguments import values as read
from alignment.arguments.checks import check_sources
from alignment.arguments.critic_keys import CriticKeys
from alignment.arguments.resolve import sources_beside_file
from alignment.arguments.spec import argument
from alignment.flow.flow import Call, Flow
from alignment.flow.method import RoleSpec, Train
from alignment.flow.online import ACTOR, CRITIC, REFERENCE, logprobs, values
from alignment.flow.statistics import Statistics
from alignment.losses.advantages import explained_variance, gae, whiten
from alignment.losses.kl import kl_estimate, shape_rewards
from alignment.losses.lagrange import LagrangeMultiplier, safe_advantages
from alignment.methods.ppo import PPO
from alignment.rollout.rollout import Experience

if TYPE_CHECKING:
    from alignment.arguments.checks import Problems
    from alignment.flow.loop import Loop
    from alignment.rollout.rewards import RewardResult
    from alignment.rollout.rollout import Rollout

COST = RoleSpec("cost", "score", "cost_model_name_or_path", evaluates=True, options={"score_type": "cost"})
COST_CRITIC = RoleSpec("cost_critic", "value", "cost_critic_model_name_or_path", trained=True, folder="cost_value")

OUT_OF_REACH = (
    "lambda has reached lambda_max {:g} and the mean cost is {:.4g}, above cost_limit {:g}: costs cannot weigh more. "
    "If it stays there, the limit is out of this policy's reach, or lambda_max is too small"
)


@dataclass
class CostKeys(CriticKeys):
    """What answers cost, and the multiplier."""

    GROUP = "Safe PPO"

    cost_model_name_or_path: str | None = argument(
        None, "Folder (or name) of the cost model, which `alignment cost` trains."
    )
    cost: str | dict[str, float] | None = argument(
        None,
        'What costs are given by, as rewards are by reward: "model" (the cost model), "file.py:function", a registered '
        "NAME, a list, or an object NAME -> weight. Positive for harm.",
        parse=read.read_reward,
        derived="the cost model",
    )
    cost_tokenizer_name_or_path: str | None = argument(
        None, "Folder of the cost model's tokenizer.", derived="the cost model's"
    )
    cost_prompt_template: str = argument(
        "auto", "How prompts and answers are written for the cost model; as reward_prompt_template."
    )
    cost_critic_model_name_or_path: str | None = argument(
        None,
        "Folder (or name) of the model that starts the critic of costs; its optimizer has the keys of the critic.",
        derived="the cost model, else the actor's with a new head",
    )
    cost_limit: float = argument(
        0.0, "Mean cost of an answer that is allowed; above it lambda grows.", aliases=("threshold",)
    )
    cost_window: int = argument(
        128,
        "Latest answers, in whole rollouts, whose mean cost lambda learns from; 0: those of the rollout alone.",
        ge=0,
        unit="rows",
        aliases=("episode_cost_window_size",),
    )
    lambda_init: float = argument(1.0, "First lambda, the weight of costs against rewards.", gt=0)
    lambda_learning_rate: float = argument(0.1, "Learning rate of log lambda.", ge=0, aliases=("lambda_lr",))
    lambda_max: float | None = argument(5.0, "Largest lambda; null: no limit.", gt=0)

    def resolve_keys(self: Any) -> None:
        self.cost = sources_beside_file(self.cost, self.file)
        if self.cost_critic_model_name_or_path is None:
            self.cost_critic_model_name_or_path = self.cost_model_name_or_path or self.actor_model_name_or_path

    def check_keys(self: Any, problems: Problems) -> None:
        check_sources(self, problems, "cost", COST_CRITIC.key)
        if self.lambda_max is not None and self.lambda_init > self.lambda_max:
            problems.add(
                f"lambda_init {self.lambda_init:g} is above lambda_max {self.lambda_max:g}", "lambda_init", "lambda_max"
            )


class SafePPO(PPO):
    """PPO with a second critic, of costs, and a Lagrange multiplier between the two advantages."""

    name = "safe_ppo"
    title = "Safe PPO"
    summary = "PPO whose answers' mean cost keeps to a limit (PPO-Lag)"
    Arguments = None  # PPO's, with those of costs
    Keys = CostKeys
    metrics = ("reward", "cost")
    scored = ("reward", "cost")
    bar = ("train/reward", "train/cost", "train/lambda", "train/kl_divergence")

    def roles(self) -> list[RoleSpec]:
        actor = replace(ACTOR, starts_at=self.args.critic_warmup_steps)
        return [actor, REFERENCE, CRITIC, COST_CRITIC, self.reward_model, self.scoring(COST)]

    def flow(self) -> Flow:
        update = Train(
            {
                "cost_critic": partial(self.critic_loss, critic="cost_critic", prefix="cost_"),
                "critic": self.critic_loss,
                "actor": self.actor_loss,
            }
        )
        everything = ("rollout", "logprobs", "ref_logprobs", "scores", "values", "costs", "cost_values")
        return Flow(
            [
                Call("generate", "generate", ("actor",), ("prompts",), "rollout", self.generate),
                Call("actor_logprobs", "infer", ("actor",), ("rollout",), "logprobs", logprobs),
                Call("reference_logprobs", "infer", ("reference",), ("rollout",), "ref_logprobs", logprobs),
                Call("reward_scores", "infer", ("reward",), ("rollout",), "scores", self.score),
                Call("cost_scores", "infer", ("cost",), ("rollout",), "costs", self.score_costs),
                Call("critic_values", "infer", ("critic",), ("rollout",), "values", values),
                Call("cost_critic_values", "infer", ("cost_critic",), ("rollout",), "cost_values", values),
                Call("advantages", "host", (), everything, ("experience", "figures"), self.safe_experience),
                Call("update", "train", ("actor", "critic", "cost_critic"), ("experience",), "stats", update),
            ],
            inputs=("prompts",),
        )

    def begin(self, loop: Loop) -> None:
        super().begin(loop)
        self.begin_costs()

    def begin_costs(self) -> None:
        """The multiplier at its first value, and no costs seen."""
        args = self.args
        self.multiplier = LagrangeMultiplier(
            args.lambda_init, args.lambda_learning_rate, args.cost_limit, args.lambda_max
        )
        self.recent_costs: list[list[float]] = []  # of the latest rollouts: the sum and the number of answers

    def score_costs(self, cost: Any, rollout: Rollout) -> RewardResult:
        """The costs of the answers, by the cost model and whatever else ``cost`` names."""
        return self.scorers["cost"](rollout)

    def safe_experience(
        self,
        rollout: Rollout,
        logprobs: np.ndarray,
        ref_logprobs: np.ndarray,
        scores: RewardResult,
        values: np.ndarray,
        costs: RewardResult,
        cost_values: np.ndarray,
    ) -> tuple[Experience, Statistics]:
        """What is learnt from, of the rows of all ranks: lambda learns first, then the advantages are mixed by it.

        Arrays ``[B, R]`` of the actor by the training network, the reference, the critic and the cost critic.
        """
        args, mask = self.args, rollout.actions
        mean_cost = self.learn_lambda(costs.total)
        shaped = self.shape_scores(rollout, scores.total)
        columns = two_streams(
            (shaped, costs.total),
            kl_estimate(logprobs, ref_logprobs, args.kl_estimator) * mask,
            (values, cost_values),
            mask,
            rollout.response_len,
            self.kl_controller.kl_coeff,
            self.multiplier.value,
            args.clip_range_score,
            args.gamma,
            args.gae_lambda,
        )
        if args.normalize_advantage:
            columns["advantages"] = whiten(columns["advantages"], mask)
        columns |= {"scores": scores.total, "shaped_scores": shaped, "cost_scores": costs.total}
        in_float32 = {name: column.astype(np.float32) for name, column in columns.items()}
        experience = Experience(rollout, scores.parts, logprobs=logprobs, ref_logprobs=ref_logprobs, **in_float32)
        experience, figures = self.finish(experience, scores, cost=costs)
        describe_costs(figures, experience, costs, args.cost_limit)
        if self.multiplier.value == args.lambda_max and mean_cost > args.cost_limit:
            self._say({"lambda_max": OUT_OF_REACH.format(args.lambda_max, mean_cost, args.cost_limit)})
        figures.set("train/lambda", self.multiplier.value)
        figures.set("train/mean_cost", mean_cost)
        return experience, figures

    def learn_lambda(self, costs: np.ndarray) -> float:
        """Take in a rollout's costs ``[B]``; returns the mean cost of the window."""
        recent = self.recent_costs
        recent.append([float(costs.sum(dtype=np.float64)), len(costs)])
        while sum(count for _, count in recent[1:]) >= max(1, self.args.cost_window):
            recent.pop(0)
        mean = sum(total for total, _ in recent) / sum(count for _, count in recent)
        # While the policy does not learn yet, what lambda learnt from it would only run up.
        if self.loop.first_step >= self.args.critic_warmup_steps:
            self.multiplier.update(mean)
        return mean

    def state(self) -> dict[str, Any]:
        return {**super().state(), **self.cost_state()}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.load_cost_state(state)

    def cost_state(self) -> dict[str, Any]:
        """What it knows of costs, as JSON values."""
        return {"multiplier": self.multiplier.state_dict(), "recent_costs": self.recent_costs}

    def load_cost_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`cost_state` gave."""
        self.multiplier.load_state_dict(state["multiplier"])
        self.recent_costs = [list(rollout) for rollout in state["recent_costs"]]


def two_streams(
    scores: tuple[np.ndarray, np.ndarray],
    kl: np.ndarray,
    values: tuple[np.ndarray, np.ndarray],
    mask: np.ndarray,
    response_len: np.ndarray,
    kl_coeff: float,
    multiplier: float,
    clip_range_score: float | None,
    gamma: float,
    gae_lambda: float,
) -> dict[str, np.ndarray]:
    """Token rewards and token costs, the advantages and returns of both, and the mixed advantages.

    Args:
        scores: ``[B]``, rewards and costs.
        kl: ``[B, R]`` per-token estimates, 0 outside the mask.
        values: ``[B, R]`` of the critic and the cost critic.
        mask: ``[B, R]``, 1 for the tokens that the policy chose.
        response_len: ``[B]``.
        kl_coeff, multiplier, clip_range_score, gamma, gae_lambda: see the module.

    Returns:
        The columns of the experience by name, ``[B, R]`` in the dtype of ``kl``.
    """
    rewards = shape_rewards(scores[0], kl, response_len, kl_coeff, clip_range_score, action_mask=mask)
    costs = shape_rewards(scores[1], kl, response_len, -kl_coeff, clip_range_score, action_mask=mask)
    reward_advantages, returns = gae(rewards, values[0], mask, gamma, gae_lambda)
    cost_advantages, cost_returns = gae(costs, values[1], mask, gamma, gae_lambda)
    return {
        "kl": kl,
        "rewards": rewards,
        "values": values[0],
        "returns": returns,
        "reward_advantages": reward_advantages,
        "costs": costs,
        "cost_values": values[1],
        "cost_returns": cost_returns,
        "cost_advantages": cost_advantages,
        "advantages": safe_advantages(reward_advantages, cost_advantages, multiplier),
    }


def describe_costs(figures: Statistics, experience: Experience, costs: RewardResult, limit: float) -> None:
    """Add the figures of a rollout's costs, named as those of its rewards are."""
    rows, mask, tokens = len(experience), experience.actions, float(experience.actions.sum())
    figures.add("train/cost", costs.total.sum(), rows)
    figures.add("train/cost_std", costs.total.std() * rows, rows)
    figures.add("train/cost_above_limit", float((costs.total > limit).sum()), rows)
    figures.add("train/cost_with_kl", experience.costs.sum(), rows)
    if len(costs.parts) > 1:
        for name, part in costs.parts.items():
            figures.add(f"train/cost/{name}", part.sum(), rows)
    for name in ("reward_advantages", "cost_advantages", "cost_values", "cost_returns"):
        figures.add(f"train/{name}", (experience[name] * mask).sum(), tokens)
    explained = explained_variance(experience.cost_values, experience.cost_returns, mask)
    figures.add("train/cost_explained_variance", explained, 1)
