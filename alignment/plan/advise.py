"""A plan of memory and time, what else the run could be, and a change that makes it fit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.errors import AlignmentError
from alignment.plan.cards import GIB, Card
from alignment.plan.memory import PhaseMemory, memory_of, telling_processes
from alignment.plan.rollout_memory import rollout_of
from alignment.plan.roofline import PhaseTime, times_of
from alignment.plan.setting import Setting

#: Orders in which offload levels are added: what is cheapest to move first.
_OFFLOADING = ("freeze_model", "freeze_model optimizer", "freeze_model optimizer train_model")
#: At most so many changes of different kinds are made together.
MOST_CHANGES = 3


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        setting: the run.
        card: what it runs on.
        memory: of each kind of process, its phases: ``[(process, [PhaseMemory, ...]), ...]``.
        times: of the phases.
    """

    setting: Setting
    card: Card
    memory: list[tuple[int, list[PhaseMemory]]]
    times: list[PhaseTime]

    @property
    def reserved(self) -> float:
        """Bytes that are taken before any tensor is."""
        return self.card.reserved * GIB

    @property
    def worst(self) -> tuple[int, PhaseMemory]:
        """The process and the phase that hold most."""
        return max(self.worst_of_phases(), key=lambda item: item[1].total)

    @property
    def peak(self) -> float:
        """Bytes of the fullest process at its fullest phase, with what is reserved."""
        return self.reserved + self.worst[1].total

    def worst_of_phases(self) -> list[tuple[int, PhaseMemory]]:
        """For each phase the fullest process."""
        found = [[(process, phase) for phase in phases] for process, phases in self.memory]
        return [max(column, key=lambda item: item[1].total) for column in zip(*found, strict=True)]

    @property
    def fits(self) -> bool:
        """Whether the peak is within the card's memory."""
        return self.peak <= self.card.memory * GIB

    @property
    def seconds(self) -> float:
        """Of an iteration (PPO) or an optimizer step."""
        return sum(phase.seconds for phase in self.times)

    @property
    def rows(self) -> int:
        """Rows (PPO: samples; reward model: pairs) of all data ranks that this time is for."""
        setting = self.setting
        own = setting.samples if setting.online else setting.step_rows
        return own * setting.topology.data_size

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all processes per second of the iteration or step."""
        return self.rows * self.setting.mean_width * self.setting.rows_of_item / self.seconds

    def seconds_per_row(self) -> float:
        """What two plans are compared by."""
        return self.seconds / self.rows


def predict(setting: Setting, card: Card) -> Plan:
    """Predict memory and times of a setting on a card."""
    memory = [(topology.process, memory_of(setting, topology)) for topology in telling_processes(setting)]
    return Plan(setting, card, memory, times_of(setting, card))


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
        advice: a change, or set of changes, that fits; None where the plan fits, or nothing does.
    """

    single: tuple[Alternative, ...]
    advice: Alternative | None


def alternatives(plan: Plan, build: Callable[[Sequence[str]], Setting], args: Any) -> Alternatives:
    """Try changes one by one. Where the plan does not fit, the advice is the fastest that does; if none does, the
    change that saves most, and on top of it the next; then more cards.

    Args:
        plan: of the run as it is.
        build: the setting with further ``key=value`` words; raises :class:`AlignmentError` where that cannot be.
        args: the resolved arguments of the run as it is.
    """

    def attempt(changes: Iterable[tuple[str, ...]]) -> list[Alternative]:
        found = []
        for words in changes:
            try:
                found.append(Alternative(words, predict(build(words), plan.card)))
            except AlignmentError:
                continue
        return found

    kinds = _changes(plan.setting, args)
    single = tried = attempt(itertools.chain.from_iterable(kinds))
    if plan.fits:
        return Alternatives(tuple(single), None)
    chosen: tuple[str, ...] = ()
    for count in range(1, MOST_CHANGES + 1):
        if best := _fastest_that_fits(tried):
            return Alternatives(tuple(single), best)
        if not tried:
            break
        chosen = min(tried, key=lambda found: found.plan.peak).words
        if count < MOST_CHANGES:
            kinds = [kind for kind in kinds if not any(set(words) <= set(chosen) for words in kind)]
            tried = attempt((*chosen, *words) for kind in kinds for words in kind)
    cards = plan.setting.topology.processes
    savings = tuple(word for word in chosen if not _is_layout(word))
    for more in (cards << doubling for doubling in range(1, 7)):
        layouts = _layouts(plan.setting, more)
        if best := _fastest_that_fits(attempt((f"cards={more}", *layout, *savings) for layout in layouts)):
            return Alternatives(tuple(single), best)
    return Alternatives(tuple(single), None)


def _fastest_that_fits(tried: Sequence[Alternative]) -> Alternative | None:
    fitting = [found for found in tried if found.plan.fits]
    return min(fitting, key=lambda found: found.plan.seconds_per_row(), default=None)


def _is_layout(word: str) -> bool:
    return "parallel_degree" in word or word.startswith("sharding")


def _changes(setting: Setting, args: Any) -> list[list[tuple[str, ...]]]:
    """Changes by kind, each kind from mild to strong."""
    kinds = [
        _recompute(setting),
        _offload(setting),
        _micro_batches(setting, args),
        _cache(setting),
        _layouts(setting, setting.topology.processes),
        [("use_flash_attention=true",)] if setting.item == 2 and not setting.flash else [],
    ]
    return [kind for kind in kinds if kind]


def _recompute(setting: Setting) -> list[tuple[str, ...]]:
    if all(role.recompute for role in setting.roles if role.trained):
        return []
    critic = ("critic_recompute=true",) if setting.role("critic") else ()
    return [("recompute=true", *critic)]


def _offload(setting: Setting) -> list[tuple[str, ...]]:
    if not setting.online:
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
        if setting.online:
            for key in ("per_device_rollout_batch_size", "rollout_logprob_batch_size"):
                if key in args.given and getattr(args, key) > rows:
                    words.append(f"{key}={rows}")
        found.append(tuple(words))
    return found


def _cache(setting: Setting) -> list[tuple[str, ...]]:
    """A quarter of the rollout engine's cache."""
    if not setting.online or not setting.engine_generates:
        return []
    tokens = rollout_of(setting, *setting.rollout_topology()).tokens
    return [(f"rollout_token_budget={tokens // 4}",)]


def _layouts(setting: Setting, cards: int) -> list[tuple[str, ...]]:
    """So many cards shared out otherwise."""
    now, found = setting.topology, []
    for tensor, pipeline in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16)):
        data, rest = divmod(cards, tensor * pipeline)
        if rest or not data:
            continue
        for stage in (1, 2, 3) if data > 1 else (0,):
            same = (cards, tensor, pipeline, stage) == (now.processes, now.tensor, now.pipeline, now.sharding_stage)
            if same or (stage == 3 and pipeline > 1):
                continue
            degrees = (f"tensor_parallel_degree={tensor}", f"pipeline_parallel_degree={pipeline}")
            shared = f"sharding=stage{stage}" if stage else "sharding="
            found.append((*degrees, shared, f"sharding_parallel_degree={data if stage else -1}"))
    return found
