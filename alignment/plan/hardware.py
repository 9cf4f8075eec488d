"""Cards and what they can do, as data. Every figure is a data sheet's or a stated assumption, and can be replaced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

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
        gemm_efficiency: share of the peak that large matrix products reach. Narayanan et al. 2021
            (arXiv:2104.04473, section 5) report 44-52 % of the peak for whole training steps on A100; what the rest of
            such a step costs is counted by itself here, so products alone are taken to reach more.
        memory_efficiency: share of the bandwidth that elementwise kernels and reading weights reach.
        link_efficiency: share of the links that collectives reach.
        launch: seconds of one operator's start in eager mode.
        hop: seconds of one message's start.
        kernels: GB/s of elementwise kernels that do not reach the bandwidth, by kind (those of
            :class:`alignment.plan.work.Op`); on a CPU Paddle's kernels are single-threaded and far from it.
        attention_efficiency: share of the peak of the small products of attention.
        kernel_efficiency: CPU: share of the peak that the CPU kernels' large products reach.
        causal_efficiency: CPU: the same of their attention.
        step: seconds of one decoding step on the host, whatever it decodes.
        reserved: GiB that the context, the allocator and the communication buffers take.
        node: cards of one node.
        collectives: ``"ring"`` (NCCL) or ``"mailbox"`` (this toolkit's CPU back end).
        half: whether it computes in half precision.
    """

    name: str
    memory: float
    tflops: float
    tflops_float32: float
    bandwidth: float
    link: float
    network: float
    host_link: float
    gemm_efficiency: float = 0.6
    memory_efficiency: float = 0.8
    link_efficiency: float = 0.7
    launch: float = 6e-6
    hop: float = 1e-5
    kernels: Mapping[str, float] = field(default_factory=dict)
    attention_efficiency: float = 0.35
    kernel_efficiency: float = 1.0
    causal_efficiency: float = 0.35
    step: float = 0.0
    reserved: float = 2.0
    node: int = 8
    collectives: str = "ring"
    half: bool = True

    @property
    def is_cpu(self) -> bool:
        """Whether it is no accelerator."""
        return self.collectives == "mailbox"

    @property
    def cache_bytes(self) -> float:
        """Of a rollout's cache without a budget (:func:`alignment.rollout.generate.cache_bytes`)."""
        return float(GIB) if self.is_cpu else self.memory * GIB / 8

    def gemm_rate(self, item: int) -> float:
        """Multiply-adds counted as two, per second, of large products of numbers of ``item`` bytes."""
        return 1e12 * (self.tflops if item == 2 else self.tflops_float32) * self.gemm_efficiency

    def computing_rate(self, kind: str, item: int) -> float:
        """The same of products of a kind of :class:`alignment.plan.work.Op`."""
        shares = {
            "attention": self.attention_efficiency,
            "kernel": self.kernel_efficiency,
            "weights": self.kernel_efficiency,
            "causal": self.causal_efficiency,
            "cache": self.causal_efficiency,
        }
        return self.gemm_rate(item) / self.gemm_efficiency * shares.get(kind, self.gemm_efficiency)

    def moving_rate(self, kind: str) -> float:
        """Bytes per second that elementwise kernels of a kind read and write."""
        return 1e9 * self.kernels.get(kind, self.bandwidth * self.memory_efficiency)

    def link_rate(self, inside_node: bool) -> float:
        """Bytes per second from one card to another."""
        return 1e9 * (self.link if inside_node else self.network) * self.link_efficiency


#: Memory, peaks and bandwidths: NVIDIA's data sheets of the SXM cards (dense, without sparsity). Networks: what is
#: usual beside each (200 Gb/s, 400 Gb/s or 100 Gb/s per card). float32 without TF32.
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
        # One core of an AMD EPYC, beside other work, by `benchmarks/plan.py` (float32; efficiencies are in the rates):
        # the peak is what the CPU kernels' products reach. Paddle's own products (of divided models) are the share that
        # gemm_efficiency says. For another machine run it, and give --tflops and --bandwidth.
        Card(
            "cpu",
            memory=16,
            tflops=0.21,
            tflops_float32=0.21,
            bandwidth=36,
            link=1,
            network=1,
            host_link=1,
            gemm_efficiency=0.6,
            memory_efficiency=1.0,
            link_efficiency=1.0,
            launch=2e-6,
            hop=2e-4,
            kernels={
                "stream": 43,
                "broadcast": 3.4,
                "reduction": 8.8,
                "power": 0.77,
                "exponential": 8.8,
                "turn": 1.1,
                "pad": 5.6,
                "fold": 1.8,
                "far": 36,
                "adamw": 54,
                "squares": 27,
                "weights": 19,
                "normed": 53,
                "gate": 31,
                "cache": 17,
                "scan": 12,
                "slope": 15,
                "choice": 4.2,
                "nucleus": 0.5,
            },
            attention_efficiency=0.12,
            causal_efficiency=0.4,
            step=2.7e-4,
            reserved=0.4,
            node=1 << 20,
            collectives="mailbox",
            half=False,
        ),
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
