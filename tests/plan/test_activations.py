"""What a layer and a head keep and take, against what Paddle's allocator reports."""

from __future__ import annotations

import gc

import numpy as np
import paddle
import pytest
from paddlenlp import transformers

from alignment.engine import label_scores
from alignment.engine.engine import enable_recompute
from alignment.losses.logprobs import score_labels
from alignment.parallel.topology import Topology
from alignment.plan.activations import LABELS_AT_ONCE, ChunkedHead, FusedHead, FusedLayer, PlainLayer, WholeHead
from alignment.plan.shapes import ModelShape, buffer_bytes, part_tensors, shape_of_config
from alignment.ppo.models import Rows, final_hidden_states
from alignment.ppo.models.fused import FusedDecoder
from tests.plan.plan_jobs import allocated, peak_above

NAMES = {"qwen2": "Qwen2", "llama": "Llama", "mistral": "Mistral", "gemma": "Gemma"}
# Two of the four are what differs most; the others are slow tests.
KINDS = [pytest.param(kind, marks=[pytest.mark.slow] * (kind in ("llama", "mistral"))) for kind in NAMES]
ROWS, TOKENS = 2, 128


def build(kind: str, layers: int, **changes: int) -> tuple[paddle.nn.Layer, ModelShape]:
    values = {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        **changes,
    }
    if kind == "gemma":
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    config = getattr(transformers, f"{NAMES[kind]}Config")(**values)
    model = getattr(transformers, f"{NAMES[kind]}ForCausalLM")(config)
    model.train()
    return model, shape_of_config(config.to_dict(), kind)


def kept(model: paddle.nn.Layer) -> tuple[int, int]:
    """Bytes between a forward and its backward, and at the peak of both; the second time, when all caches are made."""
    ids = paddle.to_tensor(np.ones([ROWS, TOKENS], dtype=np.int64))
    for _ in range(2):
        gc.collect()
        before = allocated()
        with peak_above() as peak:
            hidden = final_hidden_states(model, ids)
            between = allocated() - before
            hidden.sum().backward()
        for parameter in model.parameters():
            parameter.grad = None
        del hidden
    return between, peak[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_keeps_what_is_planned(kind: str) -> None:
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16} if kind == "llama" else {}
    few, shape = build(kind, 1, **heads)
    many, _ = build(kind, 2, **heads)
    measured = kept(many)[0] - kept(few)[0]
    planned = ROWS * TOKENS * PlainLayer(shape).kept(TOKENS)
    assert planned == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_without_gradient_takes_what_is_planned(kind: str) -> None:
    model, shape = build(kind, 3)
    ids = paddle.to_tensor(np.ones([ROWS, TOKENS], dtype=np.int64))
    with paddle.no_grad():
        final_hidden_states(model, ids)
        with peak_above() as peak:
            final_hidden_states(model, ids)
    assert ROWS * TOKENS * PlainLayer(shape).running(TOKENS) == pytest.approx(peak[0], rel=0.1)


def test_recompute_keeps_inputs() -> None:
    few, shape = build("llama", 2)
    many, _ = build("llama", 4)
    for model in (few, many):
        enable_recompute(model)
    measured = (kept(many)[0] - kept(few)[0]) / 2
    assert ROWS * TOKENS * PlainLayer(shape).input() == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy", [False, True])
def test_a_head_takes_what_is_planned(entropy: bool, temperature: float) -> None:
    labels, vocab, hidden = 256, 2048, 64
    shape = ModelShape("llama", vocab, hidden, 1, 1, 1, 1, hidden)
    states = paddle.rand([labels, hidden])
    weight = paddle.rand([hidden, vocab])
    weight.stop_gradient = False
    targets = paddle.zeros([labels], dtype="int64")

    def score() -> paddle.Tensor:
        # the states that a head gathers are its own
        own = paddle.assign(states)
        return score_labels(paddle.matmul(own, weight), targets, temperature, entropy=entropy).logprobs

    score().sum().backward()
    weight.grad = None
    gc.collect()
    before = allocated()
    with peak_above() as peak:
        logprobs = score()
    between = allocated() - before
    head = WholeHead(shape, temperature=temperature)
    assert labels * head.kept() == pytest.approx(between, rel=0.05)
    assert labels * head.running() == pytest.approx(peak[0], rel=0.1)
    del logprobs


@pytest.mark.parametrize("kind", NAMES)
def test_a_model_has_the_planned_tensors_and_buffers(kind: str) -> None:
    gc.collect()
    before = allocated()
    model, shape = build(kind, 2)
    gc.collect()
    named = {name: int(p.size) for name, p in model.named_parameters()}
    planned = {name: tensor.elements for name, tensor in part_tensors(shape, "lm").items()}
    assert planned == named
    assert allocated() - before == 4 * sum(named.values()) + buffer_bytes(shape, Topology())


@pytest.mark.parametrize("kind", ["qwen2", "gemma"])
def test_a_layer_of_the_kernels_keeps_and_takes_what_is_planned(kind: str) -> None:
    few, shape = build(kind, 1)
    many, _ = build(kind, 3)
    rows = Rows(np.ones([ROWS, TOKENS], dtype=np.int64))

    def measured(model: paddle.nn.Layer) -> tuple[int, int]:
        decoder = FusedDecoder.of(model)
        assert decoder is not None
        for _ in range(2):
            gc.collect()
            before = allocated()
            with peak_above() as peak:
                hidden = decoder.hidden_states(rows)
                between = allocated() - before
                hidden.sum().backward()
            for parameter in model.parameters():
                parameter.grad = None
            del hidden
        with paddle.no_grad(), peak_above() as peak:
            decoder.hidden_states(rows)
        return between, peak[0]

    layer = FusedLayer(shape)
    kept_by_many, running = measured(many)
    each = (kept_by_many - measured(few)[0]) / 2
    assert ROWS * TOKENS * layer.kept(TOKENS) == pytest.approx(each, rel=0.01)
    assert ROWS * TOKENS * layer.running(TOKENS) == pytest.approx(running, rel=0.1)


@pytest.mark.parametrize("fused", [False, True])
def test_label_scores_take_what_is_planned(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of Paddle's operators, and by the kernels: never all labels' logits."""
    if not fused:
        monkeypatch.setattr(label_scores, "kernels", lambda: None)
    model, shape = build("llama", 1, vocab_size=2048, hidden_size=64)
    labels = 4 * LABELS_AT_ONCE
    targets = paddle.zeros([labels], dtype="int64")
    states = paddle.rand([labels, shape.hidden])
    states.stop_gradient = False

    def score() -> paddle.Tensor:
        return label_scores.label_scores(model, states * 1.0, targets, entropy=True).logprobs

    score().sum().backward()
    gc.collect()
    before = allocated()
    with peak_above() as peak:
        logprobs = score()
    head = FusedHead(shape) if fused else ChunkedHead(WholeHead(shape))
    assert head.kept(labels) == pytest.approx(allocated() - before, rel=0.15)
    assert head.running(labels) == pytest.approx(peak[0], rel=0.15)
    assert peak[0] < labels * WholeHead(shape).running() / 3
    del logprobs
