"""Training jobs that forked ranks run: a tiny causal model for a few AdamW steps in a given layout of fleet's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BATCH, LENGTH, VOCAB = 8, 16, 128
MICRO_BATCHES = 2  # of pipelines


@dataclass(frozen=True)
class Layout:
    """Degrees of the parallel axes, as in fleet's ``hybrid_configs``.

    Attributes:
        dp, tp, pp, sharding: degrees.
        stage: of the sharding optimizer.
        split_param: stage 1 with fused, split parameters (``DygraphShardingOptimizerV2``).
        sequence_parallel: activations between tensor-parallel layers are split along the sequence.
        recompute: activations are computed again in the backward.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    sharding: int = 1
    stage: int = 1
    split_param: bool = False
    sequence_parallel: bool = False
    recompute: bool = False

    @property
    def ranks(self) -> int:
        return self.dp * self.tp * self.pp * self.sharding


def make_model(folder: str, arch: str) -> None:
    """Write a random model of 4 layers, 4 heads and 2 key-value heads into ``folder``."""
    import paddle
    from paddlenlp import transformers

    paddle.seed(7)
    config = getattr(transformers, f"{arch}Config")(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    getattr(transformers, f"{arch}ForCausalLM")(config).save_pretrained(folder, safe_serialization=True)


def batches(steps: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and labels of the global batches, int64 ``[BATCH, LENGTH]``: two batches in turn, so that the loss falls."""
    rows = np.random.default_rng(3).integers(0, VOCAB, (2, BATCH, LENGTH + 1))
    return [(rows[step % 2, :, :-1], rows[step % 2, :, 1:]) for step in range(steps)]


def train(folder: str, arch: str, layout: Layout, steps: int = 5) -> list[float]:
    """Train for ``steps`` and return the loss of each global batch before its update, the same on every rank."""
    return _Run(folder, arch, layout).losses(steps)


def train_both(folders: dict[str, str], layout: Layout, steps: int = 5) -> dict[str, list[float]]:
    """:func:`train` for several models in one process group: arch -> losses."""
    return {arch: train(folder, arch, layout, steps) for arch, folder in folders.items()}


class _Run:
    def __init__(self, folder: str, arch: str, layout: Layout) -> None:
        import paddle
        from paddle.distributed import fleet

        from alignment.parallel import cpu_backend

        self.layout = layout
        self.hcg: Any = None
        if layout.ranks > 1:
            cpu_backend.apply()
            if not paddle.distributed.is_initialized():
                init_fleet(layout)
            self.hcg = fleet.get_hybrid_communicate_group()
        model = load(folder, arch, layout)
        optimizer = paddle.optimizer.AdamW(
            learning_rate=1e-2,
            parameters=model.parameters(),
            weight_decay=0.01,
            grad_clip=paddle.nn.ClipGradByGlobalNorm(1.0),
        )
        self.criterion = None if layout.pp > 1 else model.criterion
        if layout.sequence_parallel:
            from paddle.distributed.fleet.utils.sequence_parallel_utils import (
                register_sequence_parallel_allreduce_hooks,
            )

            register_sequence_parallel_allreduce_hooks(model, MICRO_BATCHES if layout.pp > 1 else 1, False)
        self.model, self.optimizer = wrap(model, optimizer, layout, self.hcg)

    def losses(self, steps: int) -> list[float]:
        return [self.step(*self.share(ids, labels)) for ids, labels in batches(steps)]

    def share(self, ids: np.ndarray, labels: np.ndarray) -> Any:
        """This rank's rows of a global batch: split over data and sharding ranks."""
        import paddle

        parts = self.layout.dp * self.layout.sharding
        part = 0
        if self.hcg is not None:
            part = self.hcg.get_data_parallel_rank() * self.layout.sharding + self.hcg.get_sharding_parallel_rank()
        rows = slice(BATCH // parts * part, BATCH // parts * (part + 1))
        return paddle.to_tensor(ids[rows]), paddle.to_tensor(labels[rows])

    def step(self, ids: Any, labels: Any) -> float:
        if self.layout.pp > 1:
            loss = self.model.train_batch([ids, labels], self.optimizer)
        else:
            logits = self.model(ids)
            loss = self.criterion(logits[0] if isinstance(logits, tuple) else logits, labels)
            loss.backward()
            self.optimizer.step()
            self.optimizer.clear_grad()
        return self.mean(float(loss))

    def mean(self, loss: float) -> float:
        """The mean over the ranks that had other rows."""
        import paddle
        import paddle.distributed as dist

        if self.layout.ranks == 1:
            return loss
        total = paddle.to_tensor(loss, dtype="float64")
        dist.all_reduce(total)
        return float(total) / self.layout.ranks


def init_fleet(layout: Layout) -> None:
    """Start fleet with the layout's degrees; pipelines get two micro batches."""
    from paddle.distributed import fleet

    strategy = fleet.DistributedStrategy()
    rows = BATCH // (layout.dp * layout.sharding)
    strategy.pipeline_configs = {
        "accumulate_steps": MICRO_BATCHES,
        "micro_batch_size": rows // MICRO_BATCHES,
        "enable_partial_send_recv": not layout.sequence_parallel,
    }
    strategy.hybrid_configs = {
        "dp_degree": layout.dp,
        "mp_degree": layout.tp,
        "pp_degree": layout.pp,
        "sharding_degree": layout.sharding,
        "sep_degree": 1,
        "order": ["dp", "pp", "sharding", "sep", "mp"],
    }
    if layout.split_param:
        strategy.hybrid_configs["sharding_configs"].split_param = True
    fleet.init(is_collective=True, strategy=strategy)


def load(folder: str, arch: str, layout: Layout) -> Any:
    """Load this rank's part of the model."""
    from paddlenlp import transformers

    kind = f"{arch}ForCausalLMPipe" if layout.pp > 1 else f"{arch}ForCausalLM"
    options: dict[str, Any] = {"dtype": "float32"}
    if layout.tp > 1:
        import paddle.distributed.fleet as fleet

        rank = fleet.get_hybrid_communicate_group().get_model_parallel_rank()
        options |= {
            "tensor_parallel_degree": layout.tp,
            "tensor_parallel_rank": rank,
            "tensor_parallel_output": True,
            "sequence_parallel": layout.sequence_parallel,
            "seq_length": LENGTH,
        }
    model = getattr(transformers, kind).from_pretrained(str(Path(folder)), **options)
    if layout.recompute:
        model.recompute_enable()
    model.train()
    return model


def wrap(model: Any, optimizer: Any, layout: Layout, hcg: Any) -> tuple[Any, Any]:
    """Give model and optimizer to fleet, or to group_sharded_parallel for the stages 2 and 3."""
    from paddle.distributed import fleet
    from paddle.distributed.sharding import group_sharded_parallel

    if layout.ranks == 1:
        return model, optimizer
    if layout.sharding > 1 and layout.stage > 1:
        if layout.tp > 1:
            model = fleet.meta_parallel.TensorParallel(model, hcg, strategy=None)
        level = {2: "os_g", 3: "p_g_os"}[layout.stage]
        # Stage 3 leaves parameters of up to segment_size elements whole; 256 makes it split the matrices here.
        model, optimizer, _ = group_sharded_parallel(
            model, optimizer, level, group=hcg.get_sharding_parallel_group(), segment_size=256
        )
        return model, optimizer
    if layout.split_param:
        # The fused buffers keep their own float32 gradients ("main grads"), as with amp_master_grad.
        from paddle.distributed.fleet.utils import mix_precision_utils

        mix_precision_utils.MixPrecisionLayer(model, dtype="bfloat16")
        optimizer = mix_precision_utils.MixPrecisionOptimizer(optimizer)
    return fleet.distributed_model(model), fleet.distributed_optimizer(optimizer)
