"""Preference losses against other projects' values, NumPy, and finite differences."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.losses.pairwise import cost_losses, first_differences, sequence_losses, token_losses
from alignment.rm.reward_metrics import calibration, cost_metrics, pair_metrics


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


def test_safe_rlhfs_cost_loss(vectors: dict) -> None:
    pairs, results = vectors["inputs"]["rm"], vectors["results"]["safe-rlhf (transcribed)"]
    signs = {"unsafer_sign": tensor([1.0, 1, -1]), "safer_sign": tensor([-1.0, 1, -1])}
    losses = cost_losses(tensor(pairs["rejected"]), tensor(pairs["chosen"]), **signs)
    expected = results["cost sequence-wise (cost signs hi=[1,1,-1], lo=[-1,1,-1])"]
    assert float(losses.mean()) == pytest.approx(expected, abs=1e-8)  # the stored value has nine digits
    heavier = cost_losses(tensor(pairs["rejected"]), tensor(pairs["chosen"]), **signs, regularization=0.1)
    squares = np.square(pairs["chosen"]) + np.square(pairs["rejected"])
    np.testing.assert_allclose((heavier - losses).numpy(), 0.1 * squares, rtol=1e-12)


def test_cost_losses_by_finite_differences_and_far_from_zero() -> None:
    draw = np.random.default_rng(3)
    costs, signs = draw.standard_normal((2, 5)) * 3, draw.choice([-1.0, 1.0], (2, 5))

    def value(safer: np.ndarray, unsafer: np.ndarray) -> float:
        terms = [unsafer - safer, signs[0] * safer, signs[1] * unsafer]
        return sum(np.log1p(np.exp(-term)).sum() for term in terms) + 0.01 * (safer**2 + unsafer**2).sum()

    safer, unsafer = map(tensor, costs)
    losses = cost_losses(safer, unsafer, tensor(signs[0]), tensor(signs[1]), 0.01)
    assert float(losses.sum()) == pytest.approx(value(*costs), rel=1e-12)
    losses.sum().backward()
    for half, leaf in enumerate((safer, unsafer)):
        for at in range(5):
            moved = [costs.copy(), costs.copy()]
            moved[0][half, at] += 1e-5
            moved[1][half, at] -= 1e-5
            assert float(leaf.grad[at]) == pytest.approx((value(*moved[0]) - value(*moved[1])) / 2e-5, abs=1e-8)
    one = tensor([1.0])
    assert float(cost_losses(tensor([1000.0]), tensor([-1000.0]), -one, one)) == pytest.approx(4000.0)


def test_token_wise_cost_losses() -> None:
    """Each position's cost loss, averaged as the scores of a reward model are; one answer's signs hold for its row."""
    scores = np.random.default_rng(0).standard_normal((6, 7))
    signs = np.array([-1.0, 1, -1, 1, 1, -1])
    found = token_losses(tensor(scores), LENGTHS, FIRST, 0.01, tensor(signs))
    signed = np.log1p(np.exp(-signs[:, None] * scores))
    expected = []
    for i in range(3):
        span = range(FIRST[i], max(LENGTHS[i], LENGTHS[3 + i]))
        at = [(i, min(t, LENGTHS[i] - 1), 3 + i, min(t, LENGTHS[3 + i] - 1)) for t in span]
        order = [np.log1p(np.exp(scores[a, b] - scores[c, d])) for a, b, c, d in at]
        rest = [signed[a, b] + signed[c, d] + 0.01 * (scores[a, b] ** 2 + scores[c, d] ** 2) for a, b, c, d in at]
        expected.append(np.mean(order) + np.mean(rest))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


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


def test_cost_metrics() -> None:
    safer, unsafer = np.array([-1.0, 0.5, 2.0, 0.0]), np.array([1.0, -0.5, 3.0, 0.0])
    metrics = cost_metrics(safer, unsafer, np.array([-1, -1, 1, -1]), np.array([1, 1, 1, 1]))
    assert metrics["accuracy"] == 0.5  # a tie is wrong
    assert metrics["accuracy_sign_safer"] == 0.5 and metrics["accuracy_sign_unsafer"] == 0.5  # 0 is on no side
    assert metrics["accuracy_sign"] == 0.5 and metrics["margin"] == pytest.approx(0.5)
    assert metrics["costs_mean"] == pytest.approx(5 / 8) and metrics["unsafer_mean"] == pytest.approx(3.5 / 4)


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
