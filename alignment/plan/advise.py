"""What else a run could be, and the cheapest change that makes it fit, by trying changes through the same model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from alignment.errors import AlignmentError
from alignment.plan.model import Plan, memory_everywhere, predict
from alignment.plan.rollout_memory import rollout_of
from alignment.plan.setting import Setting
from alignment.plan.times import times_of

#: Orders in which offload levels are added: what is cheapest to move first.
_OFFLOADING = ("freeze_model", "freeze_model optimizer", "freeze_model optimizer train_model")
#: At most so many changes of different kinds are tried together.
MOST_CHANGES = 3


@dataclass(frozen=True)
class Alternative:
    """Another way to run.

    Attributes:
        words: ``key=value`` that make it; ``cards=N`` stands for that many processes.
        plan: what it would take.
    """

    words: tuple[str, ...]
    plan: Plan


@dataclass(frozen=True)
class Alternatives:
    """What a plan was compared with.

    Attributes:
        single: every change by itself.
        advice: the cheapest change, or set of changes, that fits; None where the plan fits, or nothing does.
    """

    single: tuple[Alternative, ...]
    advice: Alternative | None


def alternatives(plan: Plan, build: Callable[[Sequence[str]], Setting], args: Any) -> Alternatives:
    """Try changes one by one; where the plan does not fit, also together, as few as will do.

    "Cheapest" is the least time per row. More cards are asked for only when nothing else helps.

    Args:
        plan: of the run as it is.
        build: the setting with further ``key=value`` words; raises :class:`AlignmentError` where that cannot be.
        args: the resolved arguments of the run as it is.
    """
    kinds = _changes(plan.setting, args)
    single = [found for words in itertools.chain.from_iterable(kinds) if (found := _try(plan, build, words))]
    if plan.fits:
        return Alternatives(tuple(single), None)
    possible = {words for words in itertools.chain.from_iterable(kinds)} & {found.words for found in single}
    for count in range(1, MOST_CHANGES + 1):
        fitting = list(_together(plan, build, kinds, count, possible))
        if fitting:
            return Alternatives(tuple(single), min(fitting, key=lambda found: found.plan.seconds_per_row()))
    return Alternatives(tuple(single), _more_cards(plan, build, kinds, possible))


def _together(
    plan: Plan,
    build: Callable[[Sequence[str]], Setting],
    kinds: list[list[tuple[str, ...]]],
    count: int,
    possible: set[tuple[str, ...]],
) -> Iterator[Alternative]:
    for chosen in itertools.combinations(kinds, count):
        for parts in itertools.product(*chosen):
            if possible.issuperset(parts):
                found = _fitting(plan, build, tuple(itertools.chain.from_iterable(parts)))
                if found is not None:
                    yield found


def _more_cards(
    plan: Plan,
    build: Callable[[Sequence[str]], Setting],
    kinds: list[list[tuple[str, ...]]],
    possible: set[tuple[str, ...]],
) -> Alternative | None:
    """The fewest cards, by doubling, on which all that saves memory without another layout fits, or a larger layout
    does.
    """
    savings = [kind[-1] for kind in kinds if kind and kind[-1] in possible and not _is_layout(kind[-1])]
    words = tuple(itertools.chain.from_iterable(savings))
    cards = plan.setting.topology.processes
    for _ in range(6):
        cards *= 2
        fitting = []
        for tensor, pipeline in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16)):
            if tensor * pipeline > cards:
                continue
            stage = "stage1" if pipeline > 1 else "stage3"
            layout = [f"cards={cards}", f"tensor_parallel_degree={tensor}", f"pipeline_parallel_degree={pipeline}"]
            if cards > tensor * pipeline:
                layout += [f"sharding={stage}", f"sharding_parallel_degree={cards // (tensor * pipeline)}"]
            found = _fitting(plan, build, (*layout, *words))
            if found is not None:
                fitting.append(found)
        if fitting:
            return min(fitting, key=lambda found: found.plan.seconds_per_row())
    return None


def _is_layout(words: tuple[str, ...]) -> bool:
    return any("parallel_degree" in word or word.startswith(("sharding", "cards")) for word in words)


def _try(plan: Plan, build: Callable[[Sequence[str]], Setting], words: tuple[str, ...]) -> Alternative | None:
    try:
        return Alternative(words, predict(build(words), plan.card))
    except AlignmentError:
        return None


def _fitting(plan: Plan, build: Callable[[Sequence[str]], Setting], words: tuple[str, ...]) -> Alternative | None:
    """The alternative if it fits; times are predicted only then."""
    try:
        setting = build(words)
    except AlignmentError:
        return None
    found = Plan(setting, plan.card, memory_everywhere(setting), [])
    return Alternative(words, replace(found, times=times_of(setting, plan.card))) if found.fits else None


def _changes(setting: Setting, args: Any) -> list[list[tuple[str, ...]]]:
    """Changes by kind, each kind from mild to strong."""
    kinds = [_recompute(setting), _offload(setting), _micro_batches(setting, args), _cache(setting), _layouts(setting)]
    if setting.item == 2 and not setting.flash:
        kinds.append([("use_flash_attention=true",)])
    return [kind for kind in kinds if kind]


def _recompute(setting: Setting) -> list[tuple[str, ...]]:
    if all(role.recompute for role in setting.roles if role.trained):
        return []
    return [("recompute=true", "critic_recompute=true") if setting.stage == "ppo" else ("recompute=true",)]


def _offload(setting: Setting) -> list[tuple[str, ...]]:
    if setting.stage != "ppo":
        return []
    have = set(setting.offload_level.split())
    steps = {" ".join(sorted(have | set(words.split()))): None for words in _OFFLOADING}
    return [(f"offload_level={words}",) for words in steps if set(words.split()) != have]


def _micro_batches(setting: Setting, args: Any) -> list[tuple[str, ...]]:
    """Fewer rows (tokens) at a time, the same optimizer step; what was not given follows (forwards)."""
    if setting.max_tokens:
        budgets = (setting.max_tokens // 2**times for times in range(1, 5))
        least = setting.width * setting.rows_of_item
        return [(f"max_tokens_per_micro_batch={budget}",) for budget in budgets if budget >= least]
    found, rows, times = [], setting.micro_rows, setting.accumulation
    while rows % 2 == 0:
        rows, times = rows // 2, times * 2
        words = [f"per_device_train_batch_size={rows}", f"gradient_accumulation_steps={times}"]
        if setting.stage == "ppo":
            for key in ("per_device_rollout_batch_size", "rollout_logprob_batch_size"):
                if key in args.given and getattr(args, key) > rows:
                    words.append(f"{key}={rows}")
        found.append(tuple(words))
    return found


def _cache(setting: Setting) -> list[tuple[str, ...]]:
    """A quarter of the rollout engine's cache."""
    if setting.stage != "ppo" or not setting.engine_generates:
        return []
    tokens = rollout_of(setting, *setting.rollout_topology()).tokens
    return [(f"rollout_token_budget={tokens // 4}",)]


def _layouts(setting: Setting) -> list[tuple[str, ...]]:
    """The same cards shared out otherwise."""
    topology, found = setting.topology, []
    cards = topology.processes
    for tensor, pipeline in itertools.product((1, 2, 4, 8), (1, 2, 4, 8)):
        if tensor * pipeline > cards or cards % (tensor * pipeline):
            continue
        data = cards // (tensor * pipeline)
        for stage in (1, 2, 3) if data > 1 else (0,):
            if (tensor, pipeline, stage) == (topology.tensor, topology.pipeline, topology.sharding_stage):
                continue
            if stage == 3 and pipeline > 1:
                continue
            shared = f"sharding=stage{stage}" if stage else "sharding="
            degree = data if stage else -1
            found.append(
                (
                    f"tensor_parallel_degree={tensor}",
                    f"pipeline_parallel_degree={pipeline}",
                    shared,
                    f"sharding_parallel_degree={degree}",
                )
            )
    return found
