"""A plan: memory and time of every phase of a run on a card."""

from __future__ import annotations

from dataclasses import dataclass

from alignment.plan.hardware import GIB, Card
from alignment.plan.memory import PhaseMemory, memory_of, telling_processes
from alignment.plan.setting import Setting
from alignment.plan.times import PhaseTime, times_of


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
    def peak(self) -> float:
        """Bytes of the fullest process at its fullest phase, with what is reserved."""
        return self.reserved + max(phase.total for _, phases in self.memory for phase in phases)

    @property
    def worst(self) -> tuple[int, PhaseMemory]:
        """The process and the phase of :attr:`peak`."""
        return max(
            ((process, phase) for process, phases in self.memory for phase in phases), key=lambda item: item[1].total
        )

    def worst_of_phases(self) -> list[tuple[int, PhaseMemory]]:
        """For each phase the fullest process."""
        count = len(self.memory[0][1])
        return [
            max(((process, phases[i]) for process, phases in self.memory), key=lambda item: item[1].total)
            for i in range(count)
        ]

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
        own = setting.samples if setting.stage == "ppo" else setting.micro_rows * setting.accumulation
        return own * setting.topology.data_size

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all processes per second of the iteration or step."""
        width = self.setting.mean_width * (2 if self.setting.stage == "reward" else 1)
        return self.rows * width / self.seconds

    def seconds_per_row(self) -> float:
        """What two plans are compared by."""
        return self.seconds / self.rows


def predict(setting: Setting, card: Card) -> Plan:
    """Predict memory and times of a setting on a card."""
    return Plan(setting, card, memory_everywhere(setting), times_of(setting, card))


def memory_everywhere(setting: Setting) -> list[tuple[int, list[PhaseMemory]]]:
    """The phases' memory on the processes among which the fullest is."""
    return [(topology.process, memory_of(setting, topology)) for topology in telling_processes(setting)]
