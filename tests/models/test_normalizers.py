"""Score normalisers against NumPy on streams."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from alignment.errors import ModelError
from alignment.ppo.models import ExponentialMovingAverage, RunningMeanStd, make_normalizer


@pytest.mark.parametrize("sizes", [[5], [1, 1, 1], [1, 7, 2, 64], [3] * 20])
@pytest.mark.parametrize("score_dim", [1, 3])
def test_running_mean_std_equals_numpy_over_the_whole_stream(sizes: list[int], score_dim: int) -> None:
    stream = np.random.default_rng(0).normal(3.0, 2.0, [sum(sizes), score_dim])
    normalizer = RunningMeanStd(score_dim)
    for part in np.split(stream, np.cumsum(sizes)[:-1]):
        normalizer.update(part)
    np.testing.assert_allclose(normalizer.mean.numpy(), stream.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(normalizer.var.numpy(), stream.var(axis=0, ddof=1), rtol=1e-5)
    assert int(normalizer.count) == len(stream)


def test_running_mean_std_does_not_depend_on_how_the_stream_is_cut() -> None:
    stream = np.random.default_rng(1).normal(-100.0, 0.1, [40])
    whole, parts = RunningMeanStd(), RunningMeanStd()
    whole.update(stream)
    for row in stream:
        parts.update(row[None])
    np.testing.assert_allclose(parts.mean.numpy(), whole.mean.numpy(), rtol=1e-6)
    np.testing.assert_allclose(
        parts.var.numpy(), whole.var.numpy(), rtol=2e-2
    )  # buffers are float32: 1e-7 of 100 against a spread of 0.1


@pytest.mark.parametrize("name", ["RunningMeanStd", "ExponentialMovingAverage"])
def test_one_row_gives_no_nan(name: str) -> None:
    normalizer = make_normalizer(name)
    normalizer.update(np.array([2.5]))
    assert float(normalizer.var[0]) == 1.0
    scores = normalizer.standardise(paddle.to_tensor([[2.5], [4.0]]), shift=True)
    assert np.isfinite(scores.numpy()).all()


def test_moving_average_equals_its_recurrence() -> None:
    rng = np.random.default_rng(2)
    normalizer = ExponentialMovingAverage(momentum=0.7)
    mean, var = 0.0, 1.0
    for _ in range(6):
        batch = rng.normal(5.0, 3.0, [9])
        normalizer.update(paddle.to_tensor(batch.astype(np.float32)))
        mean, var = 0.7 * mean + 0.3 * batch.mean(), 0.7 * var + 0.3 * batch.var(ddof=1)
    np.testing.assert_allclose([float(normalizer.mean[0]), float(normalizer.var[0])], [mean, var], rtol=1e-5)
    assert int(normalizer.count) == 54


def test_default_momentum_is_0_9() -> None:
    assert ExponentialMovingAverage().momentum == 0.9


def test_nothing_changes_in_evaluation_mode_or_for_an_empty_batch() -> None:
    normalizer = RunningMeanStd()
    normalizer.update(np.zeros([0]))
    normalizer.eval()
    normalizer.update(np.array([7.0, 8.0]))
    assert (float(normalizer.mean[0]), float(normalizer.var[0]), int(normalizer.count)) == (0.0, 1.0, 0)


def test_without_a_type_scores_are_only_counted() -> None:
    normalizer = make_normalizer(None)
    normalizer.update(np.array([7.0, 8.0]))
    assert int(normalizer.count) == 2
    assert float(normalizer.standardise(paddle.to_tensor([[3.0]]), shift=True)) == 3.0


def test_standardise_shifts_rewards_and_only_scales_costs() -> None:
    normalizer = make_normalizer("RunningMeanStd", mean=[2.0], var=[4.0])
    scores = paddle.to_tensor([[6.0]])
    assert float(normalizer.standardise(scores, shift=True)) == pytest.approx(2.0)
    assert float(normalizer.standardise(scores, shift=False)) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_normalizer("MeanStd"), "'RunningMeanStd', 'ExponentialMovingAverage' or null"),
        (lambda: make_normalizer("ExponentialMovingAverage", momentum=1.0), "at least 0 and below 1"),
        (lambda: make_normalizer("RunningMeanStd", mean=[0.0, 1.0]), "must be 1 finite number"),
        (lambda: RunningMeanStd(2).update(np.zeros([3])), "shape \\[rows, 2\\]"),
        (lambda: RunningMeanStd().update(np.array([1.0, np.nan])), "NaN or infinite"),
    ],
)
def test_bad_settings_are_refused(make: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make()
