"""Rows never see pads or each other, packed or not."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest

from alignment.errors import ModelError
from alignment.ppo.models import (
    causal_logits,
    end_scores,
    final_hidden_states,
    lm_logits,
    packed_causal_logits,
    score_tokens,
    take_end,
)

LENGTHS = [3, 11, 1, 7]


@pytest.fixture(scope="module")
def model(kit: Any, model_type: str) -> Any:
    window = {"sliding_window": 5} if model_type == "mistral" else {}
    return kit.causal(model_type, **window)


def test_a_row_depends_on_its_own_tokens_only(kit: Any, model: Any) -> None:
    rows = kit.ids(len(LENGTHS), 11).numpy()
    rows[:, 0] = 7  # the second pad id is an ordinary token of the rows too, as eos would be
    real = np.arange(11)[None] < np.array(LENGTHS)[:, None]

    def logits(ids: np.ndarray) -> np.ndarray:
        return causal_logits(model, paddle.to_tensor(ids), np.array(LENGTHS)).numpy()

    reference = logits(np.where(real, rows, 0))
    for pad in (7, 119):
        np.testing.assert_array_equal(logits(np.where(real, rows, pad))[real], reference[real])
    other_mates = np.where(real, (rows + 1) % kit.vocab, 0)
    for row, length in enumerate(LENGTHS):
        other_mates_here = other_mates.copy()
        other_mates_here[row] = np.where(real, rows, 0)[row]
        np.testing.assert_array_equal(logits(other_mates_here)[row, :length], reference[row, :length])
        alone = causal_logits(model, paddle.to_tensor(rows[row : row + 1, :length]), [length])[0].numpy()
        assert np.abs(alone).max() > 0.1
        # Another width makes the matrix products round differently, by some 1e-7 of logits of about 3.
        np.testing.assert_allclose(reference[row, :length], alone, atol=1e-5)


def test_logits_equal_the_architectures_own_forward(kit: Any, model: Any, model_type: str) -> None:
    width = 5 if model_type == "mistral" else 9  # its own forward ignores the sliding window; see the test below
    ids = kit.ids(2, width)
    own = model(ids, attention_mask=paddle.ones([2, width], dtype="int64"))
    np.testing.assert_allclose(
        causal_logits(model, ids).numpy(), (own[0] if isinstance(own, tuple) else own).numpy(), atol=1e-6
    )


def test_mistrals_window_is_kept(kit: Any) -> None:
    wide, narrow = (
        kit.causal("mistral", num_hidden_layers=1),
        kit.causal("mistral", num_hidden_layers=1, sliding_window=4),
    )
    ids = kit.ids(1, 10).numpy()
    far = ids.copy()
    far[0, 0] = (far[0, 0] + 1) % kit.vocab

    def change(model: Any) -> np.ndarray:
        difference = causal_logits(model, paddle.to_tensor(ids)) - causal_logits(model, paddle.to_tensor(far))
        return difference.abs().max(axis=-1)[0].numpy()

    assert (change(narrow)[:4] > 1e-4).all()  # a token is seen by itself and the next three
    np.testing.assert_array_equal(change(narrow)[4:], 0.0)
    assert (change(wide) > 1e-6).all()


def test_packed_rows_equal_separate_rows(kit: Any, model: Any) -> None:
    pieces = [kit.ids(1, length, seed=length).numpy()[0] for length in (5, 1, 8)]
    pads = 4
    ids = np.concatenate([*pieces, np.zeros(pads, dtype=np.int64)])[None]
    segments = np.concatenate([np.full(len(p), i + 1) for i, p in enumerate(pieces)] + [np.zeros(pads)]).astype(
        np.int64
    )[None]
    positions = np.concatenate([np.arange(len(p)) for p in pieces] + [np.arange(pads)]).astype(np.int64)[None]
    # A second row, cut otherwise, shows that each row has a mask of its own.
    ids = np.concatenate([ids, ids[:, ::-1]])
    segments = np.concatenate([segments, np.ones_like(segments)])
    positions = np.concatenate([positions, np.arange(ids.shape[1])[None]])
    packed = packed_causal_logits(
        model, paddle.to_tensor(ids), paddle.to_tensor(segments), paddle.to_tensor(positions)
    ).numpy()
    start = 0
    for piece in pieces:
        alone = causal_logits(model, paddle.to_tensor(piece[None]))[0].numpy()
        np.testing.assert_allclose(packed[0, start : start + len(piece)], alone, atol=1e-5)
        start += len(piece)
    np.testing.assert_allclose(packed[1], causal_logits(model, paddle.to_tensor(ids[1:]))[0].numpy(), atol=1e-5)


def test_packing_gives_the_same_gradients(kit: Any, model: Any) -> None:
    first, second = kit.ids(1, 6, seed=3), kit.ids(1, 4, seed=4)
    segments = paddle.to_tensor([[1] * 6 + [2] * 4])
    positions = paddle.to_tensor([list(range(6)) + list(range(4))])

    def gradients(logits: paddle.Tensor) -> list[np.ndarray]:
        logits.square().sum().backward()
        found = [p.grad.numpy().copy() for p in model.parameters() if p.grad is not None]
        model.clear_gradients()
        return found

    packed = gradients(packed_causal_logits(model, paddle.concat([first, second], axis=1), segments, positions))
    separate = gradients(paddle.concat([causal_logits(model, first), causal_logits(model, second)], axis=1))
    assert len(packed) == len(separate) > 10
    for a, b in zip(packed, separate, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1.0, np.abs(b).max()))


def test_logits_can_be_made_at_chosen_positions_only(kit: Any, model: Any) -> None:
    ids = kit.ids(2, 6)
    hidden = final_hidden_states(model, ids)
    np.testing.assert_allclose(
        lm_logits(model, hidden[:, 2:4]).numpy(), causal_logits(model, ids)[:, 2:4].numpy(), atol=1e-6
    )


def test_scores_are_float32_and_read_at_the_last_real_token(kit: Any, model_type: str) -> None:
    model = kit.score(model_type)
    ids = kit.ids(4, 11)
    scores = score_tokens(model, ids, LENGTHS)
    assert scores.shape == [4, 11] and scores.dtype == paddle.float32
    ends = end_scores(model, ids, paddle.to_tensor(LENGTHS))
    np.testing.assert_array_equal(ends.numpy(), [scores.numpy()[row, length - 1] for row, length in enumerate(LENGTHS)])
    output = model(ids, lengths=np.array(LENGTHS))
    assert output.scores.shape == [4, 11, 1] and output.end_scores.shape == [4, 1]
    np.testing.assert_array_equal(output.end_scores.numpy()[:, 0], ends.numpy())


def test_take_end_passes_the_gradient_to_the_end_only() -> None:
    scores = paddle.to_tensor(np.arange(12.0).reshape(3, 4).astype(np.float32), stop_gradient=False)
    take_end(scores, [1, 4, 2]).sum().backward()
    np.testing.assert_array_equal(scores.grad.numpy(), [[1, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]])


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([0, 3], "row 0 has length 0"),
        ([3, 6], "row 1 has length 6; it must be from 1 to the rows' width 5"),
        ([2], "2 rows but 1 lengths"),
    ],
)
def test_wrong_lengths_are_named(kit: Any, lengths: list[int], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        causal_logits(kit.causal("llama"), kit.ids(2, 5), lengths)


def test_packed_shapes_must_agree(kit: Any) -> None:
    with pytest.raises(ModelError, match="of one shape"):
        packed_causal_logits(kit.causal("llama"), kit.ids(2, 5), kit.ids(2, 4), kit.ids(2, 5))


def test_rows_beyond_the_context_are_refused(kit: Any) -> None:
    # paddlenlp's Llama would read beyond its table of positions and give NaN
    with pytest.raises(ModelError, match="rows of 65 tokens, but the model's positions reach 64"):
        causal_logits(kit.causal("llama"), kit.ids(1, 65))


def test_recompute_gives_the_same_gradients(kit: Any, model: Any) -> None:
    ids = kit.ids(2, 9)

    def gradients() -> dict[str, np.ndarray]:
        causal_logits(model, ids).square().sum().backward()
        found = {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}
        model.clear_gradients()
        return found

    model.train()
    plain = gradients()
    model.recompute_enable()
    try:
        again = gradients()
    finally:
        model.recompute_disable()
    assert list(plain) == list(again) and len(plain) > 10
    for name, gradient in plain.items():
        np.testing.assert_allclose(again[name], gradient, atol=1e-5 * max(1.0, np.abs(gradient).max()), err_msg=name)
