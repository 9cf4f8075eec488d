"""Dynamic sampling (DAPO, Yu et al. 2025, section 3.2): prompts whose answers all score alike teach nothing, so further
prompts are answered in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from alignment.engine.batching import rank_slice
from alignment.flow.statistics import Statistics

if TYPE_CHECKING:
    from alignment.parallel import World
    from alignment.rollout.rewards import RewardResult
    from alignment.rollout.rollout import Rollout


@dataclass
class Refilled:
    """What :func:`sample_with_spread` returns.

    Attributes:
        rollout: this data rank's rows, whole groups, in the order of the prompts; None where it has none.
        scores: of these rows.
        figures: ``train/sampling_rounds``, ``train/sampling_groups`` and the share ``train/groups_without_spread``;
            equal on all ranks.
        dropped_tokens: sampled on all ranks and not used.
        message: what a user should know; empty where the batch was filled.
    """

    rollout: Rollout | None
    scores: RewardResult | None
    figures: Statistics
    dropped_tokens: int
    message: str = ""


def sample_with_spread(
    prompts: Sequence[Any],
    further: Callable[[], Sequence[Any]],
    generate: Callable[[Sequence[Any]], Rollout | None],
    score: Callable[[Rollout], RewardResult],
    spread: Callable[[Rollout, RewardResult], np.ndarray],
    world: World,
    most: int,
) -> Refilled:
    """Answer and score prompts in rounds until there are as many groups with spread as the first round had prompts.

    The groups are those of the first prompts in the stream's order that have spread, shared out anew, so that neither
    they nor their order depend on the number of ranks. Without a single one the first round's are taken as they are:
    a step that teaches nothing, instead of a run that stands still.

    Args:
        prompts: this data rank's share of the first round; may be empty.
        further: this rank's share of the next round.
        generate: answers prompts; None for none. Every rank calls it in each round.
        score: rewards of answers.
        spread: ``[B]`` bool, rows whose group is to be kept.
        world: the data ranks.
        most: rounds.
    """
    wanted = groups = drawn = tokens = rounds = 0
    kept: list[tuple[Rollout, RewardResult]] = []
    first: list[tuple[Rollout, RewardResult]] = []
    while rounds < most:
        mine = prompts if rounds == 0 else further()
        rollout, good, sampled = generate(mine), 0, 0
        if rollout is not None:
            scores = score(rollout)
            rows = np.flatnonzero(spread(rollout, scores))
            good, sampled = len(np.unique(rollout.prompt_index[rows])), int(rollout.chosen_len.sum())
            if rounds == 0:
                first.append((rollout, scores))
            if good:
                kept.append((rollout.select(rows), scores.select(rows)))
        counts = np.sum(world.all_gather_object((len(mine), good, sampled), "groups with spread"), axis=0)
        rounds, drawn, groups, tokens = rounds + 1, drawn + counts[0], groups + counts[1], tokens + counts[2]
        wanted = wanted or int(counts[0])
        if groups >= wanted:
            break
    figures = Statistics()
    figures.set("train/sampling_rounds", float(rounds))
    figures.set("train/sampling_groups", float(min(groups, wanted)))
    figures.add("train/groups_without_spread", float(drawn - groups), float(drawn))
    message = ""
    if groups < wanted:
        message = (
            f"dynamic_sampling: of {drawn} prompts in {rounds} round{'s' * (rounds > 1)} (max_gen_batches {most}) the "
            f"answers to {groups} differ in their scores, and {wanted} were wanted: "
            + (
                f"the step is made with {groups}"
                if groups
                else "the first round is taken as it is, and teaches nothing"
            )
            + ". Are the prompts too easy or too hard, or the reward a constant? (This is said once; "
            "train/sampling_groups tells it of each step.)"
        )
    mine_now = _shared_out(kept if groups else first, wanted, world)
    used = sum(int(rollout.chosen_len.sum()) for rollout, _ in mine_now)
    dropped = int(tokens) - int(world.sum(used))
    rollout, scores = mine_now[0] if mine_now else (None, None)
    return Refilled(rollout, scores, figures, dropped, message)


def _shared_out(
    pieces: list[tuple[Rollout, RewardResult]], wanted: int, world: World
) -> list[tuple[Rollout, RewardResult]]:
    """This rank's share of the first ``wanted`` groups of all ranks' rows, in the prompts' order: a pair or none."""
    everyone = [piece for part in world.all_gather_object(pieces, "rows of groups") for piece in part]
    rollout = type(everyone[0][0]).join([piece for piece, _ in everyone])
    scores = type(everyone[0][1]).join([piece for _, piece in everyone])
    mine = rank_slice(np.unique(rollout.prompt_index)[:wanted], world.rank, world.size)
    order = np.argsort(rollout.prompt_index, kind="stable")
    rows = order[np.isin(rollout.prompt_index[order], mine)]
    return [(rollout.select(rows), scores.select(rows))] if len(rows) else []
