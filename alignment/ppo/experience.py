"""From a rollout and the models' answers to an :class:`Experience`: rewards, advantages, returns, and the metrics about
them.

Everything here sees the rows of ALL data ranks, on every rank alike, so that normalisation, whitening and the KL
controller do not depend on the layout.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from alignment.flow.statistics import Statistics
from alignment.losses.advantages import RunningMoments, explained_variance, gae, whiten
from alignment.losses.kl import FixedKLController, apply_missing_eos_rule, kl_estimate, shape_rewards
from alignment.rollout.rollout import Experience, Rollout


def assemble_experience(
    rollout: Rollout,
    logprobs: np.ndarray,
    ref_logprobs: np.ndarray,
    values: np.ndarray,
    scores: np.ndarray,
    score_parts: dict[str, np.ndarray],
    args: Any,
    kl_controller: FixedKLController,
    moments: RunningMoments | None,
) -> Experience:
    """Compute token rewards, advantages and returns of all rows.

    The score's way: normalised by the running moments (if given), then the missing-EOS rule, then clipped to
    ``clip_range_score``, then added at the response's last token to ``-kl_coeff * KL``.

    Args:
        rollout: all rows of the iteration.
        logprobs: ``[B, R]`` of the actor by the training network.
        ref_logprobs: ``[B, R]`` of the reference.
        values: ``[B, R]`` of the critic.
        scores: ``[B]`` weighted sums of the reward sources.
        score_parts: ``[B]`` each.
        args: the PPO arguments.
        kl_controller: gives ``kl_coeff``; not changed here.
        moments: of the scores, to normalise by; takes these scores in first. ``None`` for no running normalisation.

    Returns:
        The experience, float32.
    """
    mask = rollout.mask
    shaped = scores.astype(np.float32)
    if moments is not None:
        moments.update(scores)
        shaped = moments.normalize(shaped)
    shaped = apply_missing_eos_rule(
        shaped, rollout.finished, args.missing_eos_rule, args.missing_eos_score, args.missing_eos_penalty
    )
    kl = kl_estimate(logprobs, ref_logprobs, args.kl_estimator) * mask
    rewards = shape_rewards(shaped, kl, rollout.response_len, kl_controller.kl_coeff, args.clip_range_score)
    advantages, returns = gae(rewards, values, mask, args.gamma, args.gae_lambda)
    if args.normalize_advantage:
        advantages = whiten(advantages, mask)
    return Experience(
        rollout=rollout,
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        values=values,
        scores=scores.astype(np.float32),
        score_parts=score_parts,
        shaped_scores=shaped,
        kl=kl.astype(np.float32),
        rewards=rewards.astype(np.float32),
        advantages=advantages.astype(np.float32),
        returns=returns.astype(np.float32),
    )


def summed_k1(experience: Experience) -> np.ndarray:
    """``[B]`` k1 estimate of each answer's KL to the reference, in nats: what the adaptive controller and the metric
    use.
    """
    return ((experience.logprobs - experience.ref_logprobs) * experience.mask).sum(axis=1)


def rollout_gaps(experience: Experience) -> np.ndarray:
    """``[N]``, of each response token: how far the log-prob of the rollout engine is from the training network's."""
    return np.abs(experience.rollout.logprobs - experience.logprobs)[experience.mask > 0]


def clipped_scores(experience: Experience, clip_range_score: float) -> np.ndarray:
    """``[B]`` bool, the rows whose score ``clip_range_score`` has cut."""
    return np.abs(experience.shaped_scores) > clip_range_score


def describe_experience(experience: Experience, kl_coeff: float, clip_range_score: float) -> Statistics:
    """The metrics of one rollout (names as in the reference where it has them)."""
    stats, rollout, mask = Statistics(), experience.rollout, experience.mask
    rows, tokens = len(experience), float(mask.sum())
    stats.add("train/reward", experience.scores.sum(), rows)
    stats.add("train/reward_std", experience.scores.std() * rows if rows else 0.0, rows)
    if len(experience.score_parts) > 1:
        for name, part in experience.score_parts.items():
            stats.add(f"train/reward/{name}", part.sum(), rows)
    stats.add("train/norm_reward", experience.shaped_scores.sum(), rows)
    stats.add("reward/clipped_fraction", clipped_scores(experience, clip_range_score).sum(), rows)
    stats.add("train/norm_reward_with_kl", experience.rewards.sum(), rows)
    stats.add("train/kl_divergence", summed_k1(experience).sum(), rows)
    stats.add("train/kl_divergence_per_token", summed_k1(experience).sum(), tokens)
    stats.add("train/mean_generated_length", rollout.response_len.sum(), rows)
    stats.maximum("train/max_generated_length", float(rollout.response_len.max(initial=0)))
    stats.add("train/truncation_rate", float((~rollout.finished).sum()), rows)
    stats.add("train/values", (experience.values * mask).sum(), tokens)
    stats.add("train/returns", (experience.returns * mask).sum(), tokens)
    stats.add("train/advantages", (experience.advantages * mask).sum(), tokens)
    stats.add("train/explained_variance", explained_variance(experience.values, experience.returns, mask), 1)
    gaps = rollout_gaps(experience)
    stats.add("train/rollout_logprob_gap_mean", gaps.sum(), tokens)
    stats.maximum("train/rollout_logprob_gap", float(gaps.max(initial=0.0)))
    stats.set("train/kl_coeff", kl_coeff)
    return stats
