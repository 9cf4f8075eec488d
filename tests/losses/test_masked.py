"""Log-probs over a set of allowed tokens: NLPO's masked policy."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from alignment.losses.logprobs import score_labels
from alignment.losses.token_sets import TokenSets
from tests.losses.test_properties import check_gradient


def masked_case(seed: int = 0) -> tuple[np.ndarray, np.ndarray, paddle.Tensor]:
    """Logits ``[4, 9]``, a mask with sets of every size, labels inside."""
    rng = np.random.default_rng(seed)
    logits, mask = rng.normal(size=(4, 9)) * 3, rng.random((4, 9)) < 0.5
    labels = rng.integers(0, 9, 4)
    mask[0], mask[1] = True, np.arange(9) == labels[1]
    mask[np.arange(4), labels] = True
    return logits, mask, paddle.to_tensor(labels)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_against_finite_differences(temperature: float) -> None:
    logits, mask, labels = masked_case()
    allowed, weights = paddle.to_tensor(mask), paddle.to_tensor(np.random.default_rng(1).normal(size=(2, 4)))

    def both(x: paddle.Tensor) -> paddle.Tensor:
        scores = score_labels(x, labels, temperature, entropy_grad=True, keep=allowed)
        return (scores.logprobs * weights[0]).sum() + (scores.entropy * weights[1]).sum()

    check_gradient(both, logits)
    tensor = paddle.to_tensor(logits, stop_gradient=False)
    both(tensor).backward()
    assert (tensor.grad.numpy()[~mask] == 0).all(), "what is cut off learns nothing"


def test_all_tokens_allowed_are_the_same_bits_as_no_mask() -> None:
    logits, _, labels = masked_case()
    logits = paddle.to_tensor(logits.astype(np.float32))
    for how in ({}, {"entropy": True}):
        plain = score_labels(logits, labels, 0.7, **how)
        masked = score_labels(logits, labels, 0.7, **how, keep=paddle.ones([4, 9], dtype="bool"))
        for name in ("logprobs", "entropy", "greedy"):
            np.testing.assert_array_equal(getattr(masked, name).numpy(), getattr(plain, name).numpy())


def test_sets_are_what_a_mask_shows() -> None:
    mask = np.random.default_rng(3).random((6, 40)) < 0.3
    mask[2] = False
    sets = TokenSets.of(mask)
    assert sets.ids.dtype == sets.counts.dtype == np.int32 and len(sets) == 6
    np.testing.assert_array_equal(sets.mask(40), mask)
    position, token = sets.entries(1, 4)
    found = np.zeros((3, 40), dtype=bool)
    found[position, token] = True
    np.testing.assert_array_equal(found, mask[1:4])
