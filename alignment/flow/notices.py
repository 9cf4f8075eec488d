"""What quietly spoils learning and leaves every figure finite: found in a rollout, said once, with the key to turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignment.rollout.rollout import Experience

#: The part of the rows whose score may be clipped, or whose text may be cut for the reward model.
TOLERATED = 0.05
#: The mean probability that top_k and top_p must leave of the policy. Below it answers come from another distribution
#: than the one that is trained. The default top_p of 0.8 never leaves less than 0.8.
KEPT_MASS = 0.75


def notices(
    experience: Experience, figures: Mapping[str, float], args: Any, kept: float | None = None
) -> dict[str, str]:
    """What to warn of after a rollout.

    Args:
        experience: all rows.
        figures: of the rollout, by metric.
        args: the PPO arguments.
        kept: mean probability that ``top_k`` and ``top_p`` have left; None where it was not looked at.

    Returns:
        Warnings by kind.
    """
    found, rollout = {}, experience.rollout
    clipped = figures.get("reward/clipped_fraction", 0.0)
    if clipped > TOLERATED:
        scores = experience.shaped_scores
        found["clipped"] = (
            f"clip_range_score {args.clip_range_score:g} cuts {clipped:.0%} of the scores, which range from "
            f"{scores.min():.4g} to {scores.max():.4g}: cut scores are equal, so nothing is learnt from their "
            "differences. Raise clip_range_score, or set normalize_reward"
        )
    if len(rollout) and not rollout.finished.any():
        found["cut"] = (
            f"no answer of this rollout has ended by itself: all {len(rollout)} were cut at max_dec_len "
            f"{args.max_dec_len} or the context. Does the model end its answers, and is the tokenizer's eos what it "
            "ends them with? Raise max_dec_len, or set missing_eos_rule"
        )
    if len(rollout) and not any(text.strip() for text in rollout.responses):
        found["empty"] = (
            f"all {len(rollout)} answers of this rollout are empty texts: every reward is a constant. Raise "
            "min_dec_len, and look at the prompt template: was the model trained on it?"
        )
    for name in figures:
        what, _, figure = name.partition("/")
        if figure == "truncated_fraction" and figures[name] > TOLERATED:
            found[f"{what} truncated"] = (
                f"{figures[name]:.0%} of the texts are longer than the {what} model's context and were cut for it: "
                f"lower max_src_len or max_dec_len, or take a {what} model with a longer context"
            )
    if kept is not None and kept < KEPT_MASS:
        found["narrow"] = (
            f"top_k {args.top_k} and top_p {args.top_p:g} leave {kept:.0%} of the policy's probability in the mean: "
            "answers come from a far narrower distribution than the one that is trained, whose log-probs and KL are "
            "computed. Use top_k 0 and a top_p near 1"
        )
    return found
