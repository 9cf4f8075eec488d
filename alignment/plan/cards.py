"""Cards and what they can do, as data. Every figure is a data sheet's or a stated assumption, and can be replaced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from alignment.errors import ArgumentsError, nearest

GIB = 1 << 30


@dataclass(frozen=True)
class Card:
    """One accelerator (or the CPU cores of one process), and the links between them.

    Attributes:
        name: of the card.
        memory: GiB on the card.
        tflops: peak of dense half-precision matrix products, in 10^12 per second (float32's where that is all).
        tflops_float32: the same in float32.
        bandwidth: of the card's memory, GB/s.
        link: to the other cards of the same node, GB/s in one direction.
        network: of one card to cards of other nodes, GB/s in one direction.
        host_link: to the host's memory (offloading), GB/s in one direction.
        efficiency: share of the peak that whole passes reach; Narayanan et al. 2021 (arXiv:2104.04473, section 5)
            report 44-52 % for training steps on A100.
        memory_efficiency: share of the bandwidth that reading weights and caches, and AdamW, reach.
        link_efficiency: share of the links that collectives reach.
        launch: seconds that starting one layer's operators takes, the least that a decoding step spends in a layer.
        weight_reads: how often a decoding step moves the weights; the CPU kernels pack them first.
        reserved: GiB that the context, the allocator and the communication buffers take.
        node: cards of one node.
        is_cpu: whether it is no accelerator; then it computes in float32.
    """

    name: str
    memory: float
    tflops: float
    tflops_float32: float
    bandwidth: float
    link: float
    network: float
    host_link: float
    efficiency: float = 0.45
    memory_efficiency: float = 0.8
    link_efficiency: float = 0.7
    launch: float = 1e-4
    weight_reads: float = 1.0
    reserved: float = 2.0
    node: int = 8
    is_cpu: bool = False

    @property
    def cache_bytes(self) -> float:
        """Of a rollout's cache without a budget (:func:`alignment.rollout.generate.cache_bytes`)."""
        return float(GIB) if self.is_cpu else self.memory * GIB / 8

    def computing(self, item: int) -> float:
        """Multiply-adds counted as two, per second, of passes over numbers of ``item`` bytes."""
        return 1e12 * (self.tflops if item == 2 else self.tflops_float32) * self.efficiency

    @property
    def moving(self) -> float:
        """Bytes of memory per second."""
        return 1e9 * self.bandwidth * self.memory_efficiency

    def sending(self, span: int) -> float:
        """Bytes per second from one card to another of a group that stretches over ``span`` neighbouring cards."""
        return 1e9 * (self.link if span <= self.node else self.network) * self.link_efficiency


#: Memory, peaks and bandwidths: NVIDIA's data sheets of the SXM cards (dense, without sparsity). Networks: what is
#: usual beside each (200 Gb/s, 400 Gb/s or 100 Gb/s per card). float32 without TF32. ``cpu``: one core of an AMD EPYC
#: beside other work, by ``benchmarks/plan.py``; for another machine run it, and give --tflops and --bandwidth.
CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        Card("a100-40g", 40, 312, 19.5, 1555, 300, 25, 25),
        Card("a100-80g", 80, 312, 19.5, 2039, 300, 25, 25),
        Card("a800-80g", 80, 312, 19.5, 2039, 200, 25, 25),
        Card("h100-80g", 80, 989, 67, 3350, 450, 50, 50),
        Card("h800", 80, 989, 67, 3350, 200, 50, 50),
        Card("h200", 140, 989, 67, 4800, 450, 50, 50),
        Card("v100-32g", 32, 125, 15.7, 900, 150, 12.5, 12),
        Card("cpu", 16, 0.21, 0.21, 45, 1, 1, 1, 0.85, 1.0, 1.0, 3e-5, 3.0, 0.4, 1 << 20, True),
    )
}


def card_named(name: str, changes: Mapping[str, float] | None = None) -> Card:
    """A preset, with some figures replaced.

    Args:
        name: in any case; ``A100`` means the first that begins so.
        changes: of ``memory`` (GiB), ``tflops``, ``bandwidth``, ``link``, ``network``, ... A new ``tflops`` is the
            peak of whatever precision the run computes in.

    Raises:
        ArgumentsError: no such card, or a figure is not positive.
    """
    wanted = name.lower().replace("_", "-")
    found = CARDS.get(wanted) or next((card for key, card in CARDS.items() if key.startswith(wanted)), None)
    if found is None or not wanted:
        raise ArgumentsError(
            f"--card {name}: unknown card{nearest(wanted, CARDS)}; known are {', '.join(CARDS)} (or any of them with "
            "--memory, --tflops, --bandwidth, --link, --network, --host_link)"
        )
    changes = dict(changes or {})
    wrong = [f"--{key} {value:g}" for key, value in changes.items() if value <= 0]
    if wrong:
        raise ArgumentsError(f"{', '.join(wrong)}: must be greater than 0")
    if "tflops" in changes:
        changes["tflops_float32"] = changes["tflops"]
    if "node" in changes:
        changes["node"] = int(changes["node"])
    return replace(found, **changes)
