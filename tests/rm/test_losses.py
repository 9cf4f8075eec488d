"""Preference losses against other projects' values, NumPy, and finite differences."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.losses.reward import first_differences, sequence_losses, token_losses
from alignment.rm.reward_metrics import calibration, pair_metrics


def tensor(values: object, dtype: str = "float64") -> paddle.Tensor:
    return paddle.to_tensor(np.asarray(values), dtype=dtype, stop_gradient=False)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-8)])
def test_other_projects_values(vectors: dict, dtype: str, tolerance: float) -> None:
    inputs, results = vectors["inputs"]["rm"], vectors["results"]
    chosen, rejected, margin = (tensor(inputs[name], dtype) for name in ("chosen", "rejected", "margin"))
    cases = {
        results["OpenRLHF HEAD"]["PairWiseLoss"]: sequence_losses(chosen, rejected),
        results["OpenRLHF HEAD"]["PairWiseLoss+margin"]: sequence_losses(chosen, rejected, margin),
        results["Compose-RL pairwise_loss"]["bt"]: sequence_losses(chosen, rejected),
        results["safe-rlhf (transcribed)"][
            "rm sequence-wise + reg .001 (mean lower^2 + mean higher^2)"
        ]: sequence_losses(chosen, rejected, regularization=0.001),
    }
    for expected, losses in cases.items():
        # The stored values have nine digits.
        assert float(losses.mean()) == pytest.approx(expected, abs=max(tolerance, 1e-9))


def test_extreme_differences_stay_finite_with_the_right_gradient() -> None:
    chosen = tensor([1000.0, -1000.0, 0.0, -70.0])
    losses = sequence_losses(chosen, tensor([0.0] * 4))
    np.testing.assert_allclose(losses.numpy(), [0.0, 1000.0, np.log(2), 70.0], rtol=1e-12)
    losses.sum().backward()
    np.testing.assert_allclose(chosen.grad.numpy(), [0.0, -1.0, -0.5, -1.0], rtol=1e-12, atol=1e-300)


def numpy_token_losses(scores: np.ndarray, lengths: np.ndarray, first: np.ndarray, regularization: float) -> np.ndarray:
    pairs = len(lengths) // 2
    result = []
    for i in range(pairs):
        values = []
        for t in range(first[i], max(lengths[i], lengths[pairs + i])):
            better = scores[i, min(t, lengths[i] - 1)]
            worse = scores[pairs + i, min(t, lengths[pairs + i] - 1)]
            values.append(np.log1p(np.exp(worse - better)) + regularization * (better**2 + worse**2))
        result.append(np.mean(values))
    return np.array(result)


LENGTHS, FIRST = np.array([5, 3, 6, 4, 6, 2]), np.array([2, 1, 1])


def test_token_losses_and_their_gradient() -> None:
    scores = np.random.default_rng(0).standard_normal((6, 7))
    leaf = tensor(scores)
    losses = token_losses(leaf, LENGTHS, FIRST, 0.01)
    np.testing.assert_allclose(losses.numpy(), numpy_token_losses(scores, LENGTHS, FIRST, 0.01), rtol=1e-12)
    losses.sum().backward()
    numeric = np.zeros_like(scores)
    for place in np.ndindex(scores.shape):
        moved = [scores.copy(), scores.copy()]
        moved[0][place] += 1e-5
        moved[1][place] -= 1e-5
        up, down = (numpy_token_losses(s, LENGTHS, FIRST, 0.01).sum() for s in moved)
        numeric[place] = (up - down) / 2e-5
    np.testing.assert_allclose(leaf.grad.numpy(), numeric, atol=1e-8)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 5), st.floats(-1e4, 1e4))
def test_scores_of_pads_change_nothing(more: int, junk: float) -> None:
    scores = np.random.default_rng(1).standard_normal((6, 6))
    wider = np.pad(scores, ((0, 0), (0, more)))
    for row, length in enumerate(LENGTHS):
        wider[row, length:] = junk
    plain = token_losses(tensor(scores), LENGTHS, FIRST)
    np.testing.assert_allclose(token_losses(tensor(wider), LENGTHS, FIRST).numpy(), plain.numpy(), rtol=1e-12)


def test_first_differences() -> None:
    ids = np.array([[7, 8, 9, 1], [7, 8, 0, 0], [7, 8, 9, 0], [7, 8, 9, 2], [7, 8, 9, 0], [7, 8, 9, 0]])
    lengths = np.array([4, 2, 3, 4, 3, 3])
    # One differs at 3, one is the beginning of the other (pad 0 or not), one pair is equal.
    assert first_differences(ids, lengths).tolist() == [3, 2, 2]


def test_pair_metrics() -> None:
    metrics = pair_metrics(np.array([1.0, 2.0, 0.0, 1.0]), np.array([0.0, 3.0, 0.0, -1.0]))
    assert metrics["accuracy"] == 0.5  # a tie is wrong
    assert metrics["margin"] == pytest.approx(0.5)
    assert metrics["rewards_mean"] == pytest.approx(0.75)
    assert metrics["rewards_std"] == pytest.approx(np.std([1, 2, 0, 1, 0, 3, 0, -1]))


def test_calibration() -> None:
    draw = np.random.default_rng(0)
    sizes = draw.uniform(0, 5, 200_000)
    right = draw.uniform(size=sizes.size) < 1 / (1 + np.exp(-sizes))
    honest = calibration(np.where(right, sizes, -sizes))
    assert honest["calibration_error"] < 0.01
    assert sum(value for name, value in honest.items() if name.endswith("count")) == 200_000
    boastful = calibration(np.where(right, 3 * sizes, -3 * sizes))
    assert boastful["calibration_error"] > 0.05
    one = calibration(np.array([0.7, -0.7, 0.7, 0.7]))
    assert one["calibration/0.5-1/predicted"] == pytest.approx(1 / (1 + np.exp(-0.7)))
    assert one["calibration/0.5-1/accuracy"] == 0.75 and one["calibration/0.5-1/count"] == 4
    assert one["calibration_error"] == pytest.approx(abs(0.75 - 1 / (1 + np.exp(-0.7))))
