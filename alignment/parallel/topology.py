"""`Topology`: how the processes of a run share its models and its data.

Four axes, as in fleet's ``hybrid_configs``: data replicas, pipeline stages, sharding (of optimizer states, gradients
and parameters) and tensor parallelism, counted in this order, tensor fastest. A *data rank* is a group of ``pipeline *
tensor`` processes that hold one whole model together and work on the same rows; replicas and sharding ranks are all
data ranks.

    topology = Topology(processes=8, process=3, tensor=2, sharding=4, sharding_stage=1)
    topology.data_rank, topology.data_size      # 1, 4
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from alignment.errors import ArgumentsError

#: float32 elements of one bucket in which gradients and parameters travel: 64 MiB.
BUCKET_ELEMENTS = 16 * 1024 * 1024


@dataclass(frozen=True)
class Topology:
    """Degrees of the axes, and where this process stands.

    Attributes:
        processes: of the run.
        process: this one, 0-based.
        tensor: processes that share each layer's matrices.
        pipeline: stages, each of which holds some of the layers.
        sharding: data ranks that share one optimizer.
        sharding_stage: what they share: 1 optimizer states, 2 gradients too, 3 parameters too; 0 nothing.
        sequence_parallel: whether activations between the tensor-parallel layers are split along the sequence.
    """

    processes: int = 1
    process: int = 0
    tensor: int = 1
    pipeline: int = 1
    sharding: int = 1
    sharding_stage: int = 0
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        """Check that the degrees fit.

        Raises:
            ArgumentsError: they do not divide the number of processes.
        """
        model = self.tensor * self.pipeline
        if self.processes % (model * self.sharding):
            raise ArgumentsError(
                f"tensor_parallel_degree {self.tensor} x pipeline_parallel_degree {self.pipeline} x "
                f"sharding_parallel_degree {self.sharding} = {model * self.sharding} processes (or a multiple of it) "
                f"are needed, but the run has {self.processes}"
            )

    @property
    def tensor_rank(self) -> int:
        """Which part of each matrix this process holds."""
        return self.process % self.tensor

    @property
    def sharding_rank(self) -> int:
        """Which part of the optimizer this process holds."""
        return self.process // self.tensor % self.sharding

    @property
    def stage(self) -> int:
        """Which pipeline stage this process is."""
        return self.process // (self.tensor * self.sharding) % self.pipeline

    @property
    def replica(self) -> int:
        """Which of the data replicas (of the whole sharded model) this process belongs to."""
        return self.process // (self.tensor * self.sharding * self.pipeline)

    @property
    def data_rank(self) -> int:
        """Which rows this process works on."""
        return self.replica * self.sharding + self.sharding_rank

    @property
    def data_size(self) -> int:
        """Number of data ranks."""
        return self.processes // (self.tensor * self.pipeline)

    @property
    def splits_model(self) -> bool:
        """Whether one model is spread over several processes."""
        return self.tensor * self.pipeline > 1

    @property
    def first_stage(self) -> bool:
        """Whether this process reads token ids."""
        return self.stage == 0

    @property
    def last_stage(self) -> bool:
        """Whether this process has the final hidden states."""
        return self.stage == self.pipeline - 1

    def process_at(self, data_rank: int, stage: int, tensor_rank: int) -> int:
        """The process with these coordinates."""
        replica, sharding_rank = divmod(data_rank, self.sharding)
        return ((replica * self.pipeline + stage) * self.sharding + sharding_rank) * self.tensor + tensor_rank

    def representatives(self) -> list[int]:
        """One process of each data rank, in order."""
        return [self.process_at(rank, 0, 0) for rank in range(self.data_size)]

    def data_peers(self) -> list[int]:
        """The processes that hold the same part of the model as this one, in the order of their data ranks."""
        return [self.process_at(rank, self.stage, self.tensor_rank) for rank in range(self.data_size)]

    def model_peers(self) -> list[int]:
        """The processes of this data rank, stage by stage, in each stage by tensor rank."""
        return [self.process_at(self.data_rank, s, t) for s in range(self.pipeline) for t in range(self.tensor)]

    def describe(self) -> str:
        """The layout in words: ``"tensor 2 x pipeline 2 (4 processes)"``."""
        sharded = f"sharding stage {self.sharding_stage} of" if self.sharding_stage else "sharding"
        axes = [("tensor", self.tensor), ("pipeline", self.pipeline), (sharded, self.sharding)]
        axes.append(("data", self.data_size // self.sharding))
        used = [f"{name} {degree}" for name, degree in axes if degree > 1] or ["one process"]
        more = ", sequence parallel" if self.sequence_parallel else ""
        return " x ".join(used) + (f" ({self.processes} processes{more})" if self.processes > 1 else "")


def layers_of_stage(layers: int, stages: int, stage: int) -> range:
    """The layers of a pipeline stage: as even as can be, the later stages (which lack the embedding) take what is over.

    Args:
        layers: of the model, at least ``stages``.
        stages: of the pipeline.
        stage: 0-based.
    """
    base, over = divmod(layers, stages)
    counts = [base + (number >= stages - over) for number in range(stages)]
    first = sum(counts[:stage])
    return range(first, first + counts[stage])


def assign_owners(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Which rank of a sharding group owns which parameter: the largest first, each to the rank that has least.

    Args:
        sizes: elements of each tensor.
        ranks: to share them over.

    Returns:
        the owner of each.
    """
    load = [0] * ranks
    owners = {}
    for name in sorted(sizes, key=lambda key: (-sizes[key], key)):
        rank = load.index(min(load))
        owners[name] = rank
        load[rank] += sizes[name]
    return owners
