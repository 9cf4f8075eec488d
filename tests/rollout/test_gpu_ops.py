"""The engine's GPU layers without a GPU: with the fused operators' semantics in numpy, and without the operators."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paddle import Tensor

from alignment.errors import ModelError
from alignment.ppo.models.decoder import Decoder, decoder_of
from alignment.rollout.generate import GenerationEngine
from alignment.rollout.gpu_cache import Burst, block_tables, padded, slots
from alignment.rollout.gpu_check import sound_steps
from alignment.rollout.gpu_operators import BLOCK, KERNELS, UNSEEN, CachedRows, GpuOperators
from alignment.rollout.gpu_ops import GpuOps
from alignment.rollout.gpu_sampling import choose_on_device, truncated_probabilities
from alignment.rollout.layers import PackedBatch
from alignment.rollout.rollout import Rollout
from alignment.rollout.sampler import SamplingSettings, choose_tokens
from alignment.rollout.sampler import truncated_probabilities as on_the_host
from tests.rollout.conftest import EOS, MODELS, IdTokenizer, engine_for, make_model, make_prompts
from tests.rollout.gpu_reference import ReferenceOperators

LONG = 256  # positions: rows of several blocks
LENGTHS = [3, 70, BLOCK, 1, 33]
SAMPLING = SamplingSettings(70, seed=3, top_p=0.95, top_k=30, repetition_penalty=1.1, min_new_tokens=9)


def gpu_engine(
    model: paddle.nn.Layer, steps: Collection[str], token_budget: int = 0
) -> tuple[GenerationEngine, ReferenceOperators]:
    engine = engine_for(model, "paddle", context=LONG, token_budget=token_budget)
    operators, decoder = ReferenceOperators(), decoder_of(model)
    assert isinstance(decoder, Decoder)
    engine.ops = GpuOps(model, decoder, operators, steps)
    return engine, operators


def assert_same(got: Rollout, wanted: Rollout) -> None:
    np.testing.assert_array_equal(got.tokens, wanted.tokens)
    np.testing.assert_array_equal(got.response_len, wanted.response_len)
    np.testing.assert_allclose(got.logprobs, wanted.logprobs, atol=1e-4)


@pytest.fixture(scope="module")
def expected() -> Callable[[str], tuple[paddle.nn.Layer, Rollout]]:
    """A model of the name and what :class:`LayerOps` generates with it."""
    made: dict[str, tuple[paddle.nn.Layer, Rollout]] = {}

    def get(name: str) -> tuple[paddle.nn.Layer, Rollout]:
        if name not in made:
            model = make_model(name, max_position_embeddings=LONG)
            wanted = engine_for(model, "paddle", context=LONG).generate(make_prompts(LENGTHS), SAMPLING, 2)
            made[name] = model, wanted
        return made[name]

    return get


@pytest.mark.parametrize("name", list(MODELS))
def test_plain_steps_over_the_cache_of_blocks_give_the_same_tokens(
    expected: Callable[[str], tuple[paddle.nn.Layer, Rollout]], name: str
) -> None:
    model, wanted = expected(name)
    engine, operators = gpu_engine(model, [])
    assert_same(engine.generate(make_prompts(LENGTHS), SAMPLING, 2), wanted)
    assert operators.calls == {}


@pytest.mark.parametrize("name", ["llama", "llama, multi-head", "qwen2", "gemma"])
def test_fused_steps_give_the_same_tokens(
    expected: Callable[[str], tuple[paddle.nn.Layer, Rollout]], name: str
) -> None:
    model, wanted = expected(name)
    engine, operators = gpu_engine(model, KERNELS)
    assert_same(engine.generate(make_prompts(LENGTHS), SAMPLING, 2), wanted)
    unused = {"swiglu"} if name == "gemma" else set()
    assert set(operators.calls) == set(KERNELS) - unused
    assert engine.figures is not None
    assert operators.calls["cached attention"] == 2 * engine.figures.steps


def test_rows_that_wait_and_take_each_others_blocks(
    expected: Callable[[str], tuple[paddle.nn.Layer, Rollout]],
) -> None:
    """Blocks that were used before hold other rows' keys: in the gap behind a prompt they must not be seen."""
    model, wanted = expected("llama")
    engine, _ = gpu_engine(model, KERNELS, token_budget=6 * BLOCK)
    assert_same(engine.generate(make_prompts(LENGTHS), SAMPLING, 2), wanted)
    assert engine.figures is not None and engine.figures.capacity == 6 * BLOCK


@pytest.mark.parametrize("steps", [[], list(KERNELS)], ids=["plain", "fused"])
@pytest.mark.parametrize("window", [5, BLOCK + 6])
def test_a_sliding_window_is_kept(window: int, steps: list[str]) -> None:
    model = make_model("mistral", max_position_embeddings=LONG)
    model.config.sliding_window = window
    wanted = engine_for(model, "paddle", context=LONG).generate(make_prompts(LENGTHS), SAMPLING)
    engine, operators = gpu_engine(model, steps)
    assert_same(engine.generate(make_prompts(LENGTHS), SAMPLING), wanted)
    if steps:  # a prompt is longer than the first window, none than the second
        assert ("prompt attention" in operators.calls) == (window > max(LENGTHS) - 1)
        assert "cached attention" in operators.calls


def test_the_engine_takes_the_gpu_layers_where_paddle_computes_on_a_gpu(
    expected: Callable[[str], tuple[paddle.nn.Layer, Rollout]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, wanted = expected("llama")
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    engine = GenerationEngine(model, IdTokenizer(), [EOS], LONG, 8)
    monkeypatch.undo()
    assert isinstance(engine.ops, GpuOps) and not engine.ops.steps  # this build has no operator for a GPU
    assert_same(engine.generate(make_prompts(LENGTHS), SAMPLING, 2), wanted)


def test_nan_logits_in_the_middle_of_a_burst_are_reported() -> None:
    model = make_model("llama", max_position_embeddings=LONG)
    engine, _ = gpu_engine(model, KERNELS)

    class Broken(GpuOps):
        """From the third step on a row's logits are NaN."""

        def logits(self, hidden: Tensor) -> Tensor:
            self.count = getattr(self, "count", 0) + 1
            return super().logits(hidden) * (float("nan") if self.count > 2 else 1.0)

    assert isinstance(engine.ops, GpuOps)
    engine.ops = Broken(model, engine.ops.decoder, engine.ops.operators, engine.ops.steps)
    with pytest.raises(ModelError, match="NaN"):
        engine.generate(make_prompts([5, 9]), SamplingSettings(20, min_new_tokens=20))
    assert not engine.ops.keys, "the cache was to be given back"


def test_a_prefill_writes_into_the_cache_that_is_there() -> None:
    ops = gpu_engine(make_model("llama", max_position_embeddings=LONG), [])[0].ops
    assert isinstance(ops, GpuOps)
    ops.allocate(4 * BLOCK)
    before = [cache.data_ptr() for cache in (*ops.keys, *ops.values)]
    ops.prefill(np.arange(70) % 64, PackedBatch(np.arange(70), BLOCK + np.arange(70), np.array([0, 70])))
    assert [cache.data_ptr() for cache in (*ops.keys, *ops.values)] == before
    kept = ops.keys[1].numpy()
    assert kept[1].all() and kept[2, :, :6].all() and not kept[2, :, 6:].any() and not kept[[0, 3]].any()


# -- the operators of a build, and the check before use


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "wanted"),
    [
        ("bfloat16", 128, (8, 0), list(KERNELS)),
        ("float16", 64, (9, 0), list(KERNELS)),
        ("bfloat16", 96, (9, 0), list(KERNELS)[:4]),
        ("bfloat16", 20, (9, 0), list(KERNELS)[:3]),
        ("float16", 64, (7, 0), list(KERNELS)[:3]),
        ("float32", 64, (9, 0), list(KERNELS)[:3]),
        ("float64", 64, (9, 0), []),
    ],
)
def test_what_a_gpu_build_has(dtype: str, head_dim: int, capability: tuple[int, int], wanted: list[str]) -> None:
    types = ("float16", "bfloat16", "float32", "float64")
    kernels = [f"({place}, Undefined(AnyLayout), {name})" for place in ("GPU", "CPU") for name in types]
    build = GpuOperators(dict.fromkeys(KERNELS.values(), kernels), capability)
    assert [step for step in KERNELS if build.has(step, getattr(paddle, dtype), head_dim)] == wanted


def test_this_build_has_none_for_a_gpu() -> None:
    build = GpuOperators()
    assert not any(build.has(step, paddle.float32, 64) or build.has(step, paddle.bfloat16, 64) for step in KERNELS)


def decoder_for(name: str = "qwen2") -> Decoder:
    decoder = decoder_of(make_model(name, max_position_embeddings=LONG))
    assert isinstance(decoder, Decoder)
    return decoder


class Wrong(ReferenceOperators):
    """One operator computes something else, or raises."""

    def __init__(self, step: str, raises: bool) -> None:
        super().__init__()
        self.step, self.raises = step, raises

    def _count(self, name: str) -> None:
        if name == self.step and self.raises:
            raise RuntimeError("(Unimplemented) not on this device")
        super()._count(name)

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        out = super().norm(x, weight, epsilon)
        return out * 1.01 if self.step == "norm" else out

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return super().swiglu(up, gate) if self.step == "swiglu" else super().swiglu(gate, up)

    def rotary(self, q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        return super().rotary(q, k, cosine, -sine if self.step == "rotary" else sine)

    def prompt_attention(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float) -> Tensor:
        return super().prompt_attention(q, k, v, starts, longest, 1.0 if self.step == "prompt attention" else scale)

    def cached_attention(self, qkv: Tensor, keys: Tensor, values: Tensor, rows: CachedRows) -> Tensor:
        if self.step == "cached attention":  # as if the operator took no notice of the mask
            rows = CachedRows(**{**vars(rows), "mask": paddle.zeros_like(rows.mask)})
        return super().cached_attention(qkv, keys, values, rows)


@pytest.mark.parametrize("name", list(MODELS))
def test_sound_operators_are_used(model_of: Callable[[str], paddle.nn.Layer], name: str) -> None:
    """Also for a model whose context is shorter than a block."""
    decoder = decoder_of(model_of(name))
    assert isinstance(decoder, Decoder)
    assert sound_steps(decoder, ReferenceOperators()) == list(KERNELS)


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("step", list(KERNELS))
def test_an_operator_that_differs_or_raises_is_not_used(step: str, raises: bool) -> None:
    assert sound_steps(decoder_for(), Wrong(step, raises)) == [other for other in KERNELS if other != step]


# -- places


@st.composite
def spans_of_rows(draw: st.DrawFn) -> np.ndarray:
    """Regions one after the other in an order that is drawn; ``[B, 4]``."""
    rows = draw(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 150)), min_size=1, max_size=5))
    sizes = [size for row in rows for size in (padded(np.array(row[0])), padded(np.array(row[1] + 3)))]
    places, at = [0] * len(sizes), 0
    for number in draw(st.permutations(range(len(sizes)))):
        places[number], at = at, at + int(sizes[number])
    return np.array([[places[2 * i], p, places[2 * i + 1], own] for i, (p, own) in enumerate(rows)])


@settings(max_examples=60, deadline=None)
@given(spans_of_rows(), st.sampled_from([0, 1, 7, 90]))
def test_every_token_of_a_row_is_found_where_the_arena_keeps_it(spans: np.ndarray, window: int) -> None:
    blocks = 100
    tables = block_tables(spans, 4, blocks)
    assert tables.min() >= 0 and tables.max() < blocks
    prompt, prompt_len, own, own_len = spans.T
    burst = Burst.start(prompt_len + own_len - 1, own + own_len - 1, spans, 4, blocks)
    for step in range(4):
        if step:
            burst.advance()
        rows = burst.rows(window, paddle.float32)
        mask, lengths = rows.mask.numpy()[:, 0, 0], rows.lengths.numpy()[:, 0]
        assert (lengths < mask.shape[1]).all() and int(rows.longest) >= lengths.max()
        for b in range(len(spans)):
            total = int(prompt_len[b] + own_len[b] + step)
            places = np.concatenate([prompt[b] + np.arange(prompt_len[b]), own[b] + np.arange(own_len[b] + step)])
            if window:
                places = places[max(0, total - window) :]
            column = np.arange(lengths[b] + 1)
            column = column[mask[b, column] == 0]
            assert set(np.unique(mask[b])) <= {0.0, UNSEEN}
            np.testing.assert_array_equal(tables[b, column // BLOCK] * BLOCK + column % BLOCK, places)
            assert int(burst.places[b]) == places[-1] and int(burst.positions[b]) == total - 1


def test_slots_are_the_places_of_the_heads_in_the_cache() -> None:
    cache = np.arange(5 * 3 * BLOCK).reshape(5, 3, BLOCK)
    places = np.array([0, BLOCK - 1, BLOCK, 4 * BLOCK + 7])
    wanted = cache[places // BLOCK, :, places % BLOCK].reshape(-1)
    np.testing.assert_array_equal(slots(paddle.to_tensor(places), 3).numpy(), wanted)


# -- the choice of a token

CHOICES = {
    "plain": SamplingSettings(9),
    "greedy": SamplingSettings(9, greedy=True, repetition_penalty=1.4, min_new_tokens=3),
    "temperature": SamplingSettings(9, temperature=0.3),
    "top-k": SamplingSettings(9, top_k=5),
    "top-k of all": SamplingSettings(9, top_k=500),
    "top-p": SamplingSettings(9, top_p=0.8),
    "tiny top-p": SamplingSettings(9, top_p=1e-9),
    "everything": SamplingSettings(9, temperature=1.7, top_k=40, top_p=0.9, repetition_penalty=1.3, min_new_tokens=3),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", list(CHOICES))
def test_the_device_chooses_as_the_host_does(name: str, masked: bool) -> None:
    how, rng = CHOICES[name], np.random.default_rng(4)
    logits = rng.normal(0, 3, (300, 101)).astype(np.float32)
    logits[:40] = logits[:40].round()  # equal ones too
    uniforms, early = rng.random(300), rng.random(300) < 0.5
    uniforms[:20], uniforms[20:40] = 0.0, np.nextafter(1.0, 0.0)
    logits[50, 3], logits[51, 4], logits[52, 5] = np.nan, np.inf, -np.inf
    seen = rng.random(logits.shape) < 0.2
    eos = np.isin(np.arange(101), (1, 7))
    allowed = rng.random(logits.shape) < 0.3 if masked else None
    if allowed is not None:
        allowed[:, 2], allowed[60:90] = True, True
        allowed[50] = False
    soon = early & (how.min_new_tokens > 0)
    tokens, *logprobs = choose_tokens(logits, how, uniforms, soon, (1, 7), seen, allowed)
    uniform, soon, ends = (paddle.to_tensor(x) for x in (uniforms, early, eos))
    got = choose_on_device(
        paddle.to_tensor(logits),
        how,
        uniform,
        soon,
        ends if how.min_new_tokens else None,
        None if how.repetition_penalty == 1.0 else paddle.to_tensor(seen.astype(np.uint8)),
        None if allowed is None else paddle.to_tensor(allowed),
    )
    assert (tokens[50:53] == -1).all() and (tokens < 0).sum() == 3
    np.testing.assert_array_equal(got[0].numpy(), tokens)
    assert [part.dtype for part in got] == [paddle.int64, paddle.float32, paddle.float32]
    for found, wanted in zip(got[1:], logprobs, strict=True):  # the policy's and the sampler's
        np.testing.assert_allclose(found.numpy()[tokens >= 0], wanted[tokens >= 0], atol=1e-6)
    if name in ("plain", "temperature", "top-k of all"):  # nothing changes the distribution
        same = np.full(300, True) if allowed is None else allowed.all(axis=1)
        np.testing.assert_array_equal(got[1].numpy()[same], got[2].numpy()[same])
    if not how.greedy:
        clean = np.delete(logits, [50, 51, 52], axis=0)
        np.testing.assert_allclose(
            truncated_probabilities(paddle.to_tensor(clean), how).numpy(), on_the_host(clean, how), atol=1e-12
        )
