"""RFT: rejection-sampling fine-tuning (Yuan et al. 2023, with the selection of trlX). No critic, no reference.

An iteration answers its prompts ``num_return_sequences`` times, scores the answers and puts them into the pools of
their prompts, which keep what earlier epochs have answered. Then follow ``update_iters`` rounds of imitation, each
stricter than the one before. In round ``k`` of ``K``:

    percentile  p_k = start_percentile + (end_percentile - start_percentile) k / K
    threshold   tau_g = the p_k quantile of the scores in prompt g's pool, at least the smallest of the prompts' + 0.001
                and at most the largest - 0.001
    learnt      each answer once whose score is at least tau_g:  loss = -mean_t log pi(token_t), of the answer's tokens

Thresholds only rise within an iteration, so a round learns from a part of what the round before did: each answer has
the number of rounds that it takes part in. trlX learns the prompts' tokens, too; here they are given, not learnt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alignment.arguments.spec import argument
from alignment.flow.flow import Call, Flow
from alignment.flow.method import Loss, RoleSpec, Train, Window
from alignment.flow.online import ACTOR, OnlineMethod
from alignment.flow.statistics import Statistics
from alignment.losses.kl import apply_missing_eos_rule
from alignment.losses.policy import aggregate
from alignment.losses.selection import select_answers, selection_percentile
from alignment.rollout.rollout import Experience

if TYPE_CHECKING:
    from paddle import Tensor

    from alignment.arguments.checks import Problems
    from alignment.arguments.sizes import Sizes
    from alignment.flow.loop import Loop
    from alignment.rollout.rewards import RewardResult
    from alignment.rollout.rollout import Rollout

#: The files of the pools in a checkpoint's ``trainer/``, without their endings.
POOLS = "pools"
#: Keys of methods with a ratio or a KL, which imitation has not.
UNUSED = (
    "kl_coeff", "kl_estimator", "adaptive_kl", "kl_target", "kl_horizon", "gamma", "normalize_reward",
    "normalize_advantage", "clip_range_ratio", "clip_range_ratio_low", "clip_range_ratio_high", "clip_range_score",
    "dual_clip", "target_kl", "rollout_correction",
)  # fmt: skip


@dataclass
class Keys:
    """RFT's own keys."""

    start_percentile: float = argument(
        0.7, "Share of a prompt's answers that the first round leaves out, by their scores.", ge=0, le=1
    )
    end_percentile: float = argument(0.95, "The share that a round after the last would leave out.", ge=0, le=1)
    keep_pools: bool = argument(
        True, "Whether answers of earlier epochs stay in their prompts' pools; false: each iteration has its own alone."
    )

    def check_keys(self: Any, problems: Problems) -> None:
        if self.start_percentile > self.end_percentile:
            problems.add(
                f"start_percentile {self.start_percentile:g} is above end_percentile {self.end_percentile:g}: rounds "
                "become stricter, not laxer",
                "start_percentile",
                "end_percentile",
            )
        unused = sorted(self.given.intersection(UNUSED))
        if unused:
            self.notes.append(f"{', '.join(unused)}: not used by RFT, which imitates the best answers")

    def derive_sizes(self, num_rows: int, world_size: int = 1) -> Sizes:
        """As of any method that generates, with the most optimizer steps that there can be: how many answers are chosen
        is not known before, and pools grow with the epochs. The prompts, not the steps, end such a run.
        """
        sizes = super().derive_sizes(num_rows, world_size)  # type: ignore[misc]
        grown = int(np.ceil(sizes.rollouts / sizes.rollouts_per_epoch)) if self.keep_pools else 1
        return sizes if self.max_steps > 0 else replace(sizes, total_steps=sizes.total_steps * grown)  # type: ignore


class RFT(OnlineMethod):
    """Imitates the best of several answers to each prompt."""

    name = "rft"
    title = "RFT"
    summary = "several answers a prompt; the best are imitated, in rounds that become stricter"
    Keys = Keys
    changes = {
        "num_return_sequences": {"default": 32, "aliases": ("rollout_n", "n_generations_per_prompt")},
        "update_iters": {
            "default": 4,
            "help": "Rounds of imitation after each generation, each stricter than the one before.",
            "aliases": ("n_improve_steps",),
        },
        # the number of steps that there will be is not known, so there is nothing to decay over
        "lr_scheduler_type": {"default": "constant"},
    }
    bar = ("train/reward", "train/chosen_score", "train/actor_loss")

    def roles(self) -> list[RoleSpec]:
        return [replace(ACTOR, temperature=1.0), self.reward_model]

    def flow(self) -> Flow:
        update = Train({"actor": self.imitation_loss}, takes_part="rounds")
        return Flow(
            [
                Call("generate", "generate", ("actor",), ("prompts",), "rollout", self.generate),
                Call("reward_scores", "infer", ("reward",), ("rollout",), "scores", self.score),
                Call("select", "host", (), ("rollout", "scores"), ("chosen", "figures"), self.select),
                Call("update", "train", ("actor",), ("chosen",), "stats", update),
            ],
            inputs=("prompts",),
        )

    def begin(self, loop: Loop) -> None:
        super().begin(loop)
        self.pools: dict[bytes, Experience] = {}  # by the prompt's tokens

    def select(self, rollout: Rollout, scores: RewardResult) -> tuple[Experience, Statistics]:
        """Put the answers of all ranks into the pools; returns those that are learnt from, with the column ``rounds``,
        and the figures of the new ones.
        """
        args = self.args
        kept = apply_missing_eos_rule(
            scores.total.astype(np.float32),
            rollout.finished,
            args.missing_eos_rule,
            args.missing_eos_score,
            args.missing_eos_penalty,
        )
        new, figures = self.finish(Experience(rollout, scores.parts, scores=scores.total, pool_scores=kept), scores)
        new = new.add(rows=[{} for _ in range(len(new))])  # they were needed for the scores; a pool keeps no copy
        asked = by_prompt(new)
        for prompt, answers in asked.items():
            if prompt in self.pools:
                asked[prompt] = Experience.join([self.pools[prompt], answers])
        if args.keep_pools:
            self.pools.update(asked)
        pool = Experience.join(list(asked.values()))
        rounds, thresholds = rounds_of(pool, args.update_iters, args.start_percentile, args.end_percentile)
        chosen = pool.add(rounds=rounds).select(np.flatnonzero(rounds))
        figures.set("train/pool_answers", len(pool))
        figures.set("train/chosen_answers", len(chosen))
        figures.set("train/chosen_answers_last_round", int((rounds == args.update_iters).sum()))
        figures.set("train/threshold_first_round", float(np.mean(thresholds[0])))
        figures.set("train/threshold_last_round", float(np.mean(thresholds[-1])))
        figures.add("train/chosen_score", chosen.pool_scores.sum(), len(chosen))
        return chosen, figures

    def imitation_loss(self, logprobs: Tensor, entropy: Tensor, batch: Experience, window: Window) -> Loss:
        """The mean negative log-prob; ``logprobs`` and ``entropy`` ``[b, R]`` at temperature 1."""
        mean, mask = self.args.policy_loss_mean, batch.tensor("actions")
        denominator = window.denominator(mean)
        loss = aggregate(-logprobs, mask, mean, denominator)
        tokens, answers = float(batch.actions.sum()), float((batch.actions.sum(axis=1) > 0).sum())
        entropies = (entropy * mask).sum()
        shown = {
            "train/actor_loss": (loss, tokens if mean == "token" else answers, denominator),
            "train/entropy": (entropies, tokens),
        }
        bonus = self.args.entropy_coeff * entropies / window.denominator("token") if self.args.entropy_coeff else 0.0
        return Loss(loss - bonus, shown)

    def save_files(self, folder: Path) -> None:
        if self.pools:
            Experience.join(list(self.pools.values())).save(folder / POOLS)

    def load_files(self, folder: Path) -> None:
        if self.args.keep_pools and (folder / f"{POOLS}.json").exists():
            self.pools = by_prompt(Experience.load(folder / POOLS)[0])


def texts_of(rows: Rollout) -> list[tuple[bytes, bytes]]:
    """The tokens of each row's prompt and of its answer, as bytes: what tells them apart (a prompt's number in the
    stream differs by epoch).
    """
    flat, ends = rows.flat("tokens"), np.cumsum(rows.lengths)
    starts = ends - rows.lengths
    cuts = zip(starts.tolist(), (starts + rows.prompt_len).tolist(), ends.tolist(), strict=True)
    return [(flat[start:cut].tobytes(), flat[cut:end].tobytes()) for start, cut, end in cuts]


def by_prompt(rows: Experience) -> dict[bytes, Experience]:
    """The rows of each prompt, prompts and rows in their order."""
    found: dict[bytes, list[int]] = {}
    for row, (prompt, _) in enumerate(texts_of(rows)):
        found.setdefault(prompt, []).append(row)
    return dict(zip(found, rows.split(found.values()), strict=True))


def rounds_of(pool: Experience, rounds: int, start: float, end: float) -> tuple[np.ndarray, list[list[float]]]:
    """In how many rounds, the first ones, each answer takes part.

    Args:
        pool: the answers to some prompts, with the column ``pool_scores``.
        rounds: of imitation.
        start, end: percentiles, 0 to 1, ``start <= end``.

    Returns:
        ``[B]`` int64 (of equal answers to a prompt the first one stands for all), and of each round the prompts'
        thresholds.
    """
    pools: dict[bytes, list[tuple[bytes, float]]] = {}
    first: dict[tuple[bytes, bytes], int] = {}
    for row, (pair, score) in enumerate(zip(texts_of(pool), pool.pool_scores.tolist(), strict=True)):
        pools.setdefault(pair[0], []).append((pair[1], score))
        first.setdefault(pair, row)
    taken, thresholds = np.zeros(len(pool), np.int64), []
    for number in range(rounds):
        selection = select_answers(pools, selection_percentile(number, start, end, rounds))
        taken[[first[pair] for pair in selection.chosen]] += 1
        thresholds.append(selection.thresholds)
    return taken, thresholds
