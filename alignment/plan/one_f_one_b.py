"""A pipeline's schedule, simulated micro batch by micro batch."""

from __future__ import annotations

from collections.abc import Sequence


def one_forward_one_backward(
    forward: Sequence[float], backward: Sequence[float], micro_batches: int, hop: float = 0.0
) -> float:
    """Seconds from the first forward to the last backward of the schedule that fleet's ``PipelineParallel`` runs.

    Every stage runs as many forwards as there are stages behind it, then one forward and one backward in turn, then
    the backwards that are left (Narayanan et al. 2021, arXiv:2104.04473, section 2.2.1). With equal stages and no hop
    the result is ``(m + p - 1) (f + b)``: a bubble of ``(p - 1) / m`` of the useful time.

    Args:
        forward, backward: seconds of one micro batch on each stage.
        micro_batches: at least 1.
        hop: seconds of handing a micro batch to a neighbour.
    """
    stages = len(forward)
    orders = [_order(stages - 1 - stage, micro_batches) for stage in range(stages)]
    ended: dict[tuple[str, int, int], float] = {}
    clock, place = [0.0] * stages, [0] * stages
    left = sum(len(order) for order in orders)
    while left:
        for stage, order in enumerate(orders):
            while place[stage] < len(order):
                kind, number = order[place[stage]]
                ready = _ready(kind, stage, number, stages, ended, hop)
                if ready is None:
                    break
                seconds = (forward if kind == "F" else backward)[stage]
                clock[stage] = max(clock[stage], ready) + seconds
                ended[kind, stage, number] = clock[stage]
                place[stage] += 1
                left -= 1
    return max(clock)


def forward_only(forward: Sequence[float], micro_batches: int, hop: float = 0.0) -> float:
    """Seconds of the forwards of ``micro_batches`` through all stages, one after the other without gaps: the way
    through, and then the slowest stage for each further micro batch.
    """
    return sum(forward) + hop * (len(forward) - 1) + (micro_batches - 1) * max(forward)


def _order(behind: int, micro_batches: int) -> list[tuple[str, int]]:
    first = min(behind, micro_batches)
    order = [("F", number) for number in range(first)]
    for number in range(micro_batches - first):
        order += [("F", first + number), ("B", number)]
    return order + [("B", number) for number in range(micro_batches - first, micro_batches)]


def _ready(
    kind: str, stage: int, number: int, stages: int, ended: dict[tuple[str, int, int], float], hop: float
) -> float | None:
    if kind == "F":
        return 0.0 if stage == 0 else _later(ended.get(("F", stage - 1, number)), hop)
    if stage == stages - 1:
        return ended.get(("F", stage, number))
    return _later(ended.get(("B", stage + 1, number)), hop)


def _later(moment: float | None, hop: float) -> float | None:
    return None if moment is None else moment + hop
