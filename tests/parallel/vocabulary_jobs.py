"""A job of forked ranks: log-probs over a vocabulary that is cut, against the whole."""

from __future__ import annotations

import numpy as np


def differences(masked: bool = False) -> dict[str, float]:
    """The largest differences between this rank's share and the whole, with a loss on log-probs and entropy; with
    ``masked`` over sets of allowed tokens, of which two are on one rank alone.
    """
    import paddle
    import paddle.distributed as dist

    from alignment.losses.logprobs import score_labels
    from alignment.parallel import cpu_backend
    from alignment.parallel.tensor_ranks import VocabularyShard

    paddle.set_device("cpu")
    cpu_backend.apply()
    dist.init_parallel_env()
    rank, size = dist.get_rank(), dist.get_world_size()
    draw = np.random.default_rng(0)
    values = (draw.standard_normal((5, 12)) * [[1], [3], [60], [0.1], [10]]).astype(np.float32)
    labels = paddle.to_tensor(np.array([0, 11, 3, 6, int(values[4].argmax())]))
    allowed = draw.random((5, 12)) < 0.4
    allowed[1] = np.arange(12) > 9
    allowed[2] = np.arange(12) == 3
    allowed[np.arange(5), labels.numpy()] = True
    weights = paddle.to_tensor(draw.standard_normal((2, 5)).astype(np.float32))

    def scored(logits: paddle.Tensor, shard: VocabularyShard | None) -> list[np.ndarray]:
        logits.stop_gradient = False
        here = allowed if shard is None else allowed[:, mine]
        mask = paddle.to_tensor(np.ascontiguousarray(here)) if masked else None
        scores = score_labels(logits, labels, 0.7, entropy_grad=True, shard=shard, keep=mask)
        (scores.logprobs * weights[0] + scores.entropy * weights[1]).sum().backward()
        return [scores.logprobs.numpy(), scores.entropy.numpy(), scores.greedy.numpy(), logits.grad.numpy()]

    width = 12 // size
    mine = slice(width * rank, width * (rank + 1))
    whole = scored(paddle.to_tensor(values), None)
    whole[3] = whole[3][:, mine]
    shard = VocabularyShard(dist.get_group(0), width * rank, width)
    part = scored(paddle.to_tensor(np.ascontiguousarray(values[:, mine])), shard)
    names = ("logprobs", "entropy", "greedy", "gradient")
    return {name: float(np.abs(a - b).max()) for name, a, b in zip(names, whole, part, strict=True)}
