"""Log-probs of labels from hidden states: by the kernel, in chunks, and all at once, are one thing."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from alignment.engine import label_scores as module
from alignment.losses.logprobs import _Whole, score_labels
from alignment.losses.token_sets import TokenSets
from alignment.ppo.models import keep_tokens, lm_logits
from alignment.ppo.models.loading import CAUSAL_MODELS, CONFIGS

VOCAB, HIDDEN = 45, 24


def make_model(family="qwen2", tied=False, vocab=VOCAB):
    config = CONFIGS[family](
        vocab_size=vocab,
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        **({"head_dim": 12} if family == "gemma" else {}),
    )
    model = CAUSAL_MODELS[family](config)
    draw = np.random.default_rng(0)
    weight = model.lm_head.weight
    weight.set_value(draw.standard_normal(weight.shape).astype(np.float32))
    return model


def outcome(model, score, count, entropy_grad, temperature=0.8):
    draw = np.random.default_rng(1)
    states = paddle.to_tensor(draw.standard_normal([count, HIDDEN]).astype(np.float32), stop_gradient=False)
    labels = paddle.to_tensor(draw.integers(0, VOCAB, count))
    weights = paddle.to_tensor(draw.standard_normal([2, count]).astype(np.float32))
    scores = score(states, labels, temperature, entropy=True, entropy_grad=entropy_grad)
    loss = (scores.logprobs * weights[0]).sum()
    if entropy_grad:
        loss = loss + (scores.entropy * weights[1]).sum()
    else:
        assert scores.entropy.stop_gradient
    assert scores.greedy.stop_gradient
    loss.backward()
    of_weight = model.lm_head.weight.grad
    result = [scores.logprobs, scores.entropy, scores.greedy, states.grad, of_weight]
    result = [None if tensor is None else tensor.numpy().copy() for tensor in result]
    model.lm_head.weight.grad = None
    return result


def all_at_once(model):
    return lambda states, *more, **how: score_labels(lm_logits(model, states), *more, **how)


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("way", ["kernel", "chunks"])
@pytest.mark.parametrize(
    ("family", "tied"), [("qwen2", False), ("qwen2", True), ("gemma", True), ("gemma", False), ("mistral", False)]
)
def test_every_way_gives_the_same(monkeypatch, family, tied, way, entropy_grad):
    if way == "chunks":
        monkeypatch.setattr(module, "kernels", lambda: None)
        monkeypatch.setattr(module, "LABELS_AT_ONCE", 10)
    model = make_model(family, tied)
    for count in (1, 10, 37):
        mine = outcome(model, lambda *a, **k: module.label_scores(model, *a, **k), count, entropy_grad)
        theirs = outcome(model, all_at_once(model), count, entropy_grad)
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(a, b, atol=3e-5 * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize("way", ["kernel", "chunks"])
def test_a_frozen_head_hands_the_gradient_on(monkeypatch, way):
    if way == "chunks":
        monkeypatch.setattr(module, "kernels", lambda: None)
        monkeypatch.setattr(module, "LABELS_AT_ONCE", 10)
    model = make_model()
    model.lm_head.weight.stop_gradient = True
    mine = outcome(model, lambda *a, **k: module.label_scores(model, *a, **k), 23, False)
    theirs = outcome(model, all_at_once(model), 23, False)
    assert mine[4] is None
    np.testing.assert_allclose(mine[3], theirs[3], atol=3e-5)


@pytest.mark.parametrize("way", ["kernel", "chunks"])
def test_the_head_learns_over_a_frozen_decoder(monkeypatch, way):
    if way == "chunks":
        monkeypatch.setattr(module, "kernels", lambda: None)
        monkeypatch.setattr(module, "LABELS_AT_ONCE", 10)
    model = make_model()
    states = paddle.to_tensor(np.random.default_rng(1).standard_normal([23, HIDDEN]).astype(np.float32))
    labels = paddle.arange(23)
    gradients = []
    for score in (lambda *a: module.label_scores(model, *a), all_at_once(model)):
        score(states, labels).logprobs.sum().backward()
        gradients.append(model.lm_head.weight.grad.numpy().copy())
        model.lm_head.weight.grad = None
    np.testing.assert_allclose(gradients[0], gradients[1], atol=3e-5)


def test_no_more_rows_of_logits_than_a_chunk_exist_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "kernels", lambda: None)
    seen = []

    def watched(model, states, **how):
        seen.append(int(states.shape[0]))
        return lm_logits(model, states, **how)

    monkeypatch.setattr(module, "lm_logits", watched)
    model = make_model()
    outcome(model, lambda *a, **k: module.label_scores(model, *a, **k), 2 * module.LABELS_AT_ONCE + 3, False)
    assert sorted(seen) == sorted([module.LABELS_AT_ONCE] * 4 + [3] * 2)  # forward, and again in the backward


def test_no_labels(monkeypatch):
    model = make_model()
    for _ in range(2):
        states = paddle.zeros([0, HIDDEN])
        states.stop_gradient = False
        scores = module.label_scores(model, states, paddle.zeros([0], dtype="int64"), entropy=True)
        assert list(scores.logprobs.shape) == [0]
        scores.logprobs.sum().backward()
        monkeypatch.setattr(module, "kernels", lambda: None)


@pytest.mark.parametrize("way", ["kernel", "chunks", "shard"])
@pytest.mark.parametrize("tied", [False, True])
def test_rows_beyond_the_tokenizer_count_for_nothing(monkeypatch, tied, way):
    """P7: the figures are those of a model without such rows, and they get no gradient; likewise where tensor ranks
    have columns of their own (here the one rank has all of them).
    """
    if way == "chunks":
        monkeypatch.setattr(module, "kernels", lambda: None)
        monkeypatch.setattr(module, "LABELS_AT_ONCE", 10)
    kept, axis = VOCAB, int(not tied)
    cut, padded = make_model(tied=tied), make_model(tied=tied, vocab=VOCAB + 19)
    weight = np.random.default_rng(5).standard_normal(padded.lm_head.weight.shape).astype(np.float32) * 3
    weight[(slice(None), slice(0, VOCAB)) if axis else slice(0, VOCAB)] = cut.lm_head.weight.numpy()
    padded.lm_head.weight.set_value(weight)
    keep_tokens(padded, kept)
    more = {"shard": _Whole(VOCAB + 19)} if way == "shard" else {}
    mine = outcome(padded, lambda *a, **k: module.label_scores(padded, *a, **k, **more), 23, True)
    theirs = outcome(cut, lambda *a, **k: module.label_scores(cut, *a, **k), 23, True)
    beyond = np.split(mine[4], [kept], axis=axis)[1]
    mine[4] = np.split(mine[4], [kept], axis=axis)[0]
    assert not beyond.any()
    for a, b in zip(mine, theirs, strict=True):
        if way == "kernel":
            np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, b, atol=3e-5 * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize("way", ["kernel", "at once", "chunks", "shard"])
@pytest.mark.parametrize("kept", [None, VOCAB - 6])
def test_a_softmax_over_allowed_tokens_is_that_of_the_model_without_the_others(monkeypatch, way, kept):
    """NLPO: log-probs, entropy and gradients, whichever way the labels go; the sets are ragged."""
    if way != "kernel":
        monkeypatch.setattr(module, "kernels", lambda: None)
    if way == "chunks":
        monkeypatch.setattr(module, "LABELS_AT_ONCE", 10)
    model, count = make_model(), 23
    vocabulary = kept or VOCAB
    if kept:
        keep_tokens(model, kept)
    draw = np.random.default_rng(1)
    draw.standard_normal([count, HIDDEN])
    labels = draw.integers(0, VOCAB, count)  # those of `outcome`
    mask = np.random.default_rng(2).random((count, VOCAB)) < 0.3
    mask[np.arange(count), labels] = True
    mask[3] = True
    mask[4] = np.arange(VOCAB) == labels[4]
    mask[:, vocabulary:] = False
    sets, inside = TokenSets.of(mask), labels < vocabulary
    more = {"shard": _Whole(VOCAB)} if way == "shard" else {}

    def mine(states, targets, *rest, **how):
        return module.label_scores(
            model, states, targets.clip(max=vocabulary - 1), *rest, **how, allowed=allowed, **more
        )

    def theirs(states, targets, temperature, **how):
        logits = lm_logits(model, states)
        outside = paddle.to_tensor(np.where(shown[:, : logits.shape[-1]], 0.0, -1e30).astype(np.float32))
        return score_labels(logits + outside, targets.clip(max=vocabulary - 1), temperature, **how)

    shown = mask.copy()
    shown[~inside, vocabulary - 1] = True
    allowed = TokenSets.of(shown)
    assert len(sets) == count
    for entropy_grad in (False, True):
        for a, b in zip(
            outcome(model, mine, count, entropy_grad), outcome(model, theirs, count, entropy_grad), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=3e-5 * max(1.0, np.abs(b).max()))
