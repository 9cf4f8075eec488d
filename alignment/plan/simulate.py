"""Scaling on paper: PPO of 7B and 70B models on 8-512 cards, each in the fastest layout that fits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from alignment.parallel.topology import Topology
from alignment.plan.hardware import GIB, card_named
from alignment.plan.known import MODELS
from alignment.plan.model import Plan, memory_everywhere
from alignment.plan.setting import RolePlan, Setting
from alignment.plan.times import times_of

CARDS = (8, 16, 32, 64, 128, 256, 512)
SIZES = {"7B": "Llama-2-7b", "70B": "Llama-2-70b"}
CARD = "h100-80g"
SAMPLES, PROMPT, RESPONSE = 1024, 512, 512
OFFLOAD = ("", "freeze_model", "freeze_model optimizer", "freeze_model optimizer train_model")


def settings(name: str, cards: int) -> Iterator[Setting]:
    """The layouts that are tried: tensor parallelism inside a node, pipelines, sharding stages 1 and 3, rows
    of a micro batch. All share one rollout of :data:`SAMPLES` answers and one optimizer step.
    """
    shape = MODELS[name]
    roles = (
        RolePlan("actor", shape, "lm", True, True),
        RolePlan("reference", shape, "lm", False),
        RolePlan("critic", shape, "score", True, True),
        RolePlan("reward", shape, "score", False),
    )
    for tensor, pipeline in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16)):
        model = tensor * pipeline
        if cards % model or cards // model > SAMPLES:
            continue
        data = cards // model
        own = SAMPLES // data
        for stage, rows, mode in itertools.product((1, 3), (1, 4, 16), ("", "tensor_parallel")):
            pointless = (stage == 3 and (pipeline > 1 or data == 1)) or (mode and pipeline == 1)
            if pointless or rows > own or own % rows:
                continue
            yield Setting(
                stage="ppo",
                roles=roles,
                topology=Topology(cards, 0, tensor, pipeline, data, stage if data > 1 else 0, tensor > 1),
                item=2,
                flash=True,
                micro_rows=rows,
                accumulation=own // rows,
                prompt_tokens=PROMPT,
                response_tokens=RESPONSE,
                mean_prompt=PROMPT,
                mean_response=RESPONSE,
                samples=own,
                cache_bytes=card_named(CARD).cache_bytes,
                nucleus=True,
                infer_rows=min(own, 16),
                eval_mode=mode,
            )


def best_plan(name: str, cards: int) -> tuple[Plan | None, Plan]:
    """The fastest plan that fits, if any, and the one that takes least memory; each layout offloads as little as it
    can.
    """
    card, fitting, least = card_named(CARD), list[Plan](), list[Plan]()
    for setting in settings(name, cards):
        for offload in OFFLOAD:
            tried = replace(setting, offload_level=offload)
            plan = Plan(tried, card, memory_everywhere(tried), [])
            if plan.fits:
                fitting.append(replace(plan, times=times_of(tried, card)))
                break
        else:
            least.append(plan)
    best = min(fitting, key=lambda plan: plan.seconds) if fitting else None
    if best is not None:
        return best, best
    smallest = min(least, key=lambda plan: plan.peak)
    return None, replace(smallest, times=times_of(smallest.setting, card))


def rows() -> list[dict[str, Any]]:
    """One entry for each size and number of cards."""
    found = []
    for size, name in SIZES.items():
        for cards in CARDS:
            best, least = best_plan(name, cards)
            plan = best or least
            times = {time.phase: time.seconds for time in plan.times}
            found.append(
                {
                    "model": size,
                    "cards": cards,
                    "fits": best is not None,
                    "layout": plan.setting.topology.describe().split(" (")[0],
                    "rows": plan.setting.micro_rows,
                    "offload_level": plan.setting.offload_level,
                    "eval_mode": plan.setting.eval_mode,
                    "peak_gib": plan.peak / GIB,
                    "peak_phase": plan.worst[1].phase,
                    "seconds": plan.seconds,
                    "generate": times["generate"],
                    "update": times["update"],
                    "scoring": plan.seconds - times["generate"] - times["update"],
                    "messages": sum(time.messages for time in plan.times) / plan.seconds,
                    "tokens_per_second_and_card": plan.tokens_per_second / cards,
                }
            )
    return found


def as_json() -> list[dict[str, Any]]:
    """The table for programs."""
    return rows()


def markdown() -> str:
    """The table of ``docs/plan.md``."""
    head = (
        "| model | cards | layout | rows, offload_level, eval_mode | peak GiB | in | s per iteration | generate | "
        "scoring | update | in messages | tokens/s and card |"
    )
    lines = [head, "|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows():
        options = f"{row['rows']}, {row['offload_level'] or '-'}, {row['eval_mode'] or '-'}"
        start = f"| {row['model']} | {row['cards']} | {row['layout']} | {options} | {row['peak_gib']:.1f} | "
        start += f"{row['peak_phase']} | "
        if not row["fits"]:
            lines.append(start + "does not fit | | | | | |")
            continue
        lines.append(
            start + f"{row['seconds']:.1f} | {row['generate']:.1f} | {row['scoring']:.1f} | {row['update']:.1f} | "
            f"{100 * row['messages']:.0f} % | {row['tokens_per_second_and_card']:,.0f} |"
        )
    return "\n".join(lines)
