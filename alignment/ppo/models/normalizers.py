"""Running statistics that bring scores to zero mean and unit variance.

A normaliser keeps three buffers, ``mean [score_dim]``, ``var [score_dim]`` and ``count []``, and learns from the
scores of the whole batch over all data ranks; the caller gathers them. In evaluation mode nothing changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle
from paddle import nn

from alignment.errors import ModelError

DEFAULT_MOMENTUM = 0.9
_EPSILON = 1e-8


class Normalizer(nn.Layer):
    """Counts scores and leaves them as they are; the base of both estimators.

    Args:
        score_dim: width of a score.
        mean, var, count: statistics to start from; 0, 1 and 0 if not given.

    Attributes:
        mean: ``[score_dim]`` float32.
        var: ``[score_dim]`` float32.
        count: int64 scalar, the number of scores seen.
    """

    NAME: str | None = None

    def __init__(
        self,
        score_dim: int = 1,
        *,
        mean: Sequence[float] | None = None,
        var: Sequence[float] | None = None,
        count: int = 0,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", paddle.to_tensor(_vector(mean, score_dim, 0.0, "mean")))
        self.register_buffer("var", paddle.to_tensor(_vector(var, score_dim, 1.0, "var")))
        self.register_buffer("count", paddle.to_tensor(np.int64(count)))

    def update(self, scores: paddle.Tensor | np.ndarray) -> None:
        """Learn from a batch. Does nothing in evaluation mode or for an empty batch.

        Args:
            scores: ``[rows]`` or ``[rows, score_dim]``, the raw scores of one batch over all data ranks.

        Raises:
            ModelError: the scores have another width, or one of them is not finite.
        """
        if not self.training:
            return
        batch = np.asarray(
            scores.detach().astype("float32") if isinstance(scores, paddle.Tensor) else scores, dtype=np.float64
        )
        width = self.mean.shape[0]
        if batch.ndim == 1 and width == 1:
            batch = batch[:, None]
        if batch.ndim != 2 or batch.shape[1] != width:
            raise ModelError(f"the score normaliser needs scores of shape [rows, {width}], got {list(batch.shape)}")
        if not np.isfinite(batch).all():
            raise ModelError(
                "the score normaliser was given a score that is NaN or infinite; it learns from finite scores only"
            )
        if not len(batch):
            return
        mean, var = self._merge(batch)
        self.mean.set_value(mean.astype(np.float32))
        self.var.set_value(var.astype(np.float32))
        self.count.set_value(np.array(int(self.count) + len(batch), dtype=np.int64))

    def _merge(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the new mean and variance after ``batch`` (``[rows, score_dim]`` float64, at least one row)."""
        return self.mean.numpy(), self.var.numpy()

    def standardise(self, scores: paddle.Tensor, *, shift: bool) -> paddle.Tensor:
        """Return ``(scores - mean) / (std + 1e-8)``, or without the shift ``scores / (std + 1e-8)``; any shape
        ``[..., score_dim]``.
        """
        if self.NAME is None:
            return scores
        centred = scores - self.mean if shift else scores
        return centred / (paddle.sqrt(self.var) + _EPSILON)


class RunningMeanStd(Normalizer):
    """Mean and variance of all scores ever seen.

    Batches are merged by the parallel formula of Chan, Golub and LeVeque (1979): with ``d = mean_b - mean`` and ``n =
    n_a + n_b``, ``mean += d * n_b / n`` and ``M2 = M2_a + M2_b + d^2 * n_a * n_b / n``. The variance is ``M2 / (n -
    1)``, as NumPy's ``ddof=1`` over the whole stream; before the second score it stays 1, because one score says
    nothing about a spread.
    """

    NAME = "RunningMeanStd"

    def _merge(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seen, new = int(self.count), len(batch)
        total = seen + new
        delta = batch.mean(axis=0) - self.mean.numpy().astype(np.float64) * (seen > 0)
        mean = self.mean.numpy().astype(np.float64) * (seen > 0) + delta * new / total
        if total < 2:
            return mean, np.ones_like(mean)
        m2_seen = self.var.numpy().astype(np.float64) * max(seen - 1, 0)
        m2_new = ((batch - batch.mean(axis=0)) ** 2).sum(axis=0)
        return mean, (m2_seen + m2_new + delta**2 * seen * new / total) / (total - 1)


class ExponentialMovingAverage(Normalizer):
    """``mean = momentum * mean + (1 - momentum) * batch_mean``, the same for the (unbiased) variance.

    A batch of one row moves the mean only: it has no variance.
    """

    NAME = "ExponentialMovingAverage"

    def __init__(self, score_dim: int = 1, *, momentum: float | None = None, **start: object) -> None:
        super().__init__(score_dim, **start)  # type: ignore[arg-type]
        self.momentum = DEFAULT_MOMENTUM if momentum is None else float(momentum)
        if not 0.0 <= self.momentum < 1.0:
            raise ModelError(f"normalizer momentum must be at least 0 and below 1, got {self.momentum}")

    def _merge(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        keep = self.momentum
        mean = keep * self.mean.numpy().astype(np.float64) + (1.0 - keep) * batch.mean(axis=0)
        var = self.var.numpy().astype(np.float64)
        if len(batch) > 1:
            var = keep * var + (1.0 - keep) * batch.var(axis=0, ddof=1)
        return mean, var


def make_normalizer(
    normalizer_type: str | None,
    score_dim: int = 1,
    *,
    momentum: float | None = None,
    mean: Sequence[float] | None = None,
    var: Sequence[float] | None = None,
    count: int = 0,
) -> Normalizer:
    """Return the normaliser of that name; ``None`` gives one that only counts.

    Raises:
        ModelError: no such normaliser; the message lists the names.
    """
    start = {"mean": mean, "var": var, "count": count}
    if normalizer_type is None:
        return Normalizer(score_dim, **start)
    if normalizer_type == RunningMeanStd.NAME:
        return RunningMeanStd(score_dim, **start)
    if normalizer_type == ExponentialMovingAverage.NAME:
        return ExponentialMovingAverage(score_dim, momentum=momentum, **start)
    raise ModelError(
        f"normalizer_type {normalizer_type!r} is unknown; it is {RunningMeanStd.NAME!r}, "
        f"{ExponentialMovingAverage.NAME!r} or null"
    )


def _vector(values: Sequence[float] | float | None, width: int, default: float, name: str) -> np.ndarray:
    if values is None:
        return np.full([width], default, dtype=np.float32)
    vector = np.asarray(values, dtype=np.float32).reshape([-1])
    if vector.shape[0] != width or not np.isfinite(vector).all():
        raise ModelError(f"the score normaliser's {name} must be {width} finite number(s), got {values!r}")
    return vector
