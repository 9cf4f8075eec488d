"""Every call of a fused GPU operator, built as a static graph: Paddle's own shape inference checks the arguments.

The graphs are built in a forked process: there the list of kernels is told of kernels that this build does not have
(gpu_kernel_names.cc), which nothing else may see. Nothing is computed.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import subprocess
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import Tensor

from alignment.kernels.build import compilers
from alignment.kernels.ops import LayerShape
from alignment.ppo.models.decoder import Decoder
from alignment.rollout.gpu_operators import BLOCK, KERNELS, CachedRows, GpuOperators
from alignment.rollout.gpu_ops import GpuOps
from alignment.rollout.layers import CachedBatch, PackedBatch
from alignment.rollout.sampler import SamplingSettings

HIDDEN, INTERMEDIATE, HEAD_DIM, QUERY_HEADS, VOCAB = 96, 160, 32, 4, 50
LENGTHS = np.array([3, BLOCK + 5, BLOCK])
# Kernels that a GPU build has and this one has not, in 16 bits and, where True, in float32. The last ones belong to
# Paddle's plain operators around the fused ones.
MISSING = {
    "block_multihead_attention": False,
    "flash_attn_unpadded": False,
    "fused_rotary_position_embedding": True,
    "fused_rms_norm_quant": True,
    "swiglu": True,
    "scatter": False,
    "matmul": False,
    "add": False,
}


@pytest.fixture(scope="session")
def kernel_names(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, made = Path(__file__).with_name("gpu_kernel_names.cc"), tmp_path_factory.mktemp("names") / "names.so"
    root = Path(paddle.__file__).parent
    includes = [f"-I{root / 'include'}", f"-I{root / 'include/third_party'}", "-DPADDLE_WITH_CUSTOM_KERNEL"]
    libraries = [f"-L{root / 'libs'}", "-l:libphi_core.so", "-l:libphi.so"]
    command = [*compilers()[0], "-std=c++17", "-shared", "-fPIC", *includes, str(source), "-o", str(made), *libraries]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return made


@dataclass
class Call:
    """Shapes and dtypes that went into an operator and came out."""

    step: str
    given: list[tuple[list[int], str]]
    made: list[tuple[list[int], str]]


def facts(values: Any) -> list[tuple[list[int], str]]:
    return [([int(size) for size in x.shape], str(x.dtype).rsplit(".", 1)[-1].lower()) for x in values]


@dataclass
class Recording(GpuOperators):
    """Paddle's operators, with a note of every call."""

    calls: list[Call] = field(default_factory=list)

    def _note(self, step: str, given: tuple[Tensor, ...], out: Any) -> Any:
        self.calls.append(Call(step, facts(given), facts(out if isinstance(out, tuple) else (out,))))
        return out

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return self._note("norm", (x, weight), super().norm(x, weight, epsilon))

    def rotary(self, q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        return self._note("rotary", (q, k, cosine, sine), super().rotary(q, k, cosine, sine))

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return self._note("swiglu", (gate, up), super().swiglu(gate, up))

    def prompt_attention(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float) -> Tensor:
        return self._note(
            "prompt attention", (q, k, v, starts), super().prompt_attention(q, k, v, starts, longest, scale)
        )

    def cached_attention(self, qkv: Tensor, keys: Tensor, values: Tensor, rows: CachedRows) -> Tensor:
        given = (qkv, keys, values, *vars(rows).values())
        return self._note("cached attention", given, super().cached_attention(qkv, keys, values, rows))


def in_a_fork(library: Path, build: Callable[..., Any], *args: Any) -> Any:
    """What ``build`` returns in a process of its own, in static-graph mode."""

    def work(end: Any) -> None:
        try:
            allow = ctypes.CDLL(str(library)).allow_kernel
            for name, float32 in MISSING.items():
                allow(name.encode(), int(float32))
            paddle.enable_static()
            with paddle.static.program_guard(paddle.static.Program()):
                end.send((True, build(*args)))
        except BaseException:
            end.send((False, traceback.format_exc()))

    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=work, args=(there,))
    process.start()
    sound, result = here.recv() if here.poll(60) else (False, "no answer")
    process.join(10)
    if not sound:
        raise RuntimeError(result)
    return result


def symbolic_ops(key_heads: int, biases: bool, dtype: str, **more: Any) -> GpuOps:
    """Layers whose weights are inputs of a static graph."""
    shape = LayerShape(HIDDEN, INTERMEDIATE, QUERY_HEADS, key_heads, HEAD_DIM, 0, 0, 1e-6, 0.0, biases)
    q, kv = QUERY_HEADS * HEAD_DIM, key_heads * HEAD_DIM
    sizes = [[HIDDEN], [HIDDEN, q], [HIDDEN, kv], [HIDDEN, kv], [q, HIDDEN]]
    sizes += [[HIDDEN], [HIDDEN, INTERMEDIATE], [HIDDEN, INTERMEDIATE], [INTERMEDIATE, HIDDEN]]
    sizes += [[q], [kv], [kv]] if biases else []
    weights = [paddle.static.data(f"w{i}", size, dtype) for i, size in enumerate(sizes)]
    backbone = SimpleNamespace(norm=SimpleNamespace(weight=weights[0]))
    decoder = Decoder(backbone, replace(shape, **more), [weights], 1.0, None)
    ops = GpuOps(None, decoder, Recording(), KERNELS)
    ops.allocate(12 * BLOCK)
    return ops


def batches() -> tuple[PackedBatch, CachedBatch]:
    """Three prompts; one new token behind each."""
    positions = np.concatenate([np.arange(length) for length in LENGTHS])
    prompt = np.arange(3) * 4 * BLOCK
    packed = PackedBatch(positions, np.repeat(prompt, LENGTHS) + positions, np.concatenate([[0], np.cumsum(LENGTHS)]))
    spans = np.stack([prompt, LENGTHS, prompt + 2 * BLOCK, np.ones(3, dtype=np.int64)], axis=1)
    return packed, CachedBatch(LENGTHS, prompt + 2 * BLOCK, spans)


def build_layers(cached: bool, key_heads: int, biases: bool, dtype: str, more: dict[str, Any]) -> Any:
    ops = symbolic_ops(key_heads, biases, dtype, **more)
    batch = batches()[cached]
    angles = tuple(paddle.static.data(name, [256, HEAD_DIM // 2], "float32") for name in ("cosine", "sine"))
    x = paddle.static.data("x", [len(batch.positions), HIDDEN], dtype)
    out = ops.final_norm(ops.layers(x, batch, angles))
    return facts([out]), ops.operators.calls, facts([ops.keys[0], ops.values[0]])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("biases", [False, True], ids=["no bias", "biases"])
@pytest.mark.parametrize("key_heads", [1, 2, QUERY_HEADS], ids=["multi-query", "grouped", "multi-head"])
@pytest.mark.parametrize("cached", [False, True], ids=["prefill", "decode"])
def test_a_layer_fits_together(kernel_names: Path, cached: bool, key_heads: int, biases: bool, dtype: str) -> None:
    out, calls, cache = in_a_fork(kernel_names, build_layers, cached, key_heads, biases, dtype, {})
    tokens, q, kv = 3 if cached else int(LENGTHS.sum()), QUERY_HEADS * HEAD_DIM, key_heads * HEAD_DIM
    assert out == [([tokens, HIDDEN], dtype)]
    assert cache == [([12, key_heads, BLOCK, HEAD_DIM], dtype)] * 2
    attention = "cached attention" if cached else "prompt attention"
    assert [call.step for call in calls] == ["norm", "rotary", attention, "norm", "swiglu", "norm"]
    turned = [([1, tokens, heads, HEAD_DIM], dtype) for heads in (QUERY_HEADS, key_heads)]
    assert calls[0].given == [([tokens, HIDDEN], dtype), ([HIDDEN], dtype)]
    assert calls[0].made == [([tokens, HIDDEN], dtype)]
    assert calls[1].given == [*turned, *[([1, tokens, 1, HEAD_DIM], dtype)] * 2]
    assert calls[1].made == turned
    assert calls[4].given == [([tokens, INTERMEDIATE], dtype)] * 2
    assert calls[4].made == [([tokens, INTERMEDIATE], dtype)]
    if cached:
        width = 3  # a prompt of BLOCK + 5 tokens and an answer
        assert calls[2].given == [
            ([3, q + 2 * kv], dtype),
            *cache,
            ([3, width], "int32"),
            ([3, 1], "int32"),
            ([3, 1, 1, width * BLOCK], dtype),
            ([3, 1], "int32"),
            ([3, 1], "int32"),
            ([3], "int32"),
            ([4], "int32"),
            ([1], "int32"),
            ([1], "int32"),
        ]
        assert calls[2].made == [([3, q], dtype)]
    else:
        heads = [([tokens, count, HEAD_DIM], dtype) for count in (QUERY_HEADS, key_heads, key_heads)]
        assert calls[2].given == [*heads, ([4], "int32")]
        assert calls[2].made == heads[:1]


@pytest.mark.parametrize("cached", [False, True], ids=["prefill", "decode"])
def test_windows_gelu_and_offset_norms_fit_together(kernel_names: Path, cached: bool) -> None:
    more = {"window": 40, "activation": 1, "norm_offset": 1.0}
    out, calls, _ = in_a_fork(kernel_names, build_layers, cached, 2, False, "bfloat16", more)
    assert out == [([3 if cached else int(LENGTHS.sum()), HIDDEN], "bfloat16")]
    # GELU is plain, and so is a prefill with prompts beyond the window
    assert [call.step for call in calls] == ["norm", "rotary", *["cached attention"] * cached, "norm", "norm"]


def build_wrong(what: str) -> None:
    ops, (_, cached) = symbolic_ops(2, False, "bfloat16"), batches()
    angles = tuple(paddle.static.data(name, [256, HEAD_DIM // 2], "float32") for name in ("cosine", "sine"))
    q, k = (paddle.static.data(f"new{heads}", [3, heads * HEAD_DIM], "bfloat16") for heads in (QUERY_HEADS, 2))
    if what == "heads":
        ops.attend(q, k[:, :HEAD_DIM], k, 0, ops.prepare(cached, angles))
    elif what == "cache":
        ops.keys[0] = paddle.zeros([12, 3, BLOCK, HEAD_DIM], dtype="bfloat16")
        ops.attend(q, k, k, 0, ops.prepare(cached, angles))
    elif what == "dtype":
        ops.attend(*(x.astype("float32") for x in (q, k, k)), 0, ops.prepare(cached, angles))
    elif what == "norm":
        ops.norm(paddle.static.data("y", [3, HIDDEN], "bfloat16"), paddle.static.data("z", [HIDDEN - 1], "bfloat16"))


@pytest.mark.parametrize("what", ["heads", "cache", "dtype", "norm"])
def test_the_inference_refuses_what_does_not_fit(kernel_names: Path, what: str) -> None:
    """That the checks above can fail."""
    with pytest.raises(RuntimeError, match="InvalidArgument|InvalidType"):
        in_a_fork(kernel_names, build_wrong, what)


def build_choice(how: SamplingSettings) -> Any:
    ops = symbolic_ops(2, False, "bfloat16")
    logits = paddle.static.data("logits", [3, VOCAB], "float32")
    uniforms, early = ops.stage(np.zeros([4, 3]), np.zeros([4, 3], dtype=bool))
    seen = paddle.static.data("seen", [3, VOCAB], "uint8")
    return facts(ops.choose(logits, how, uniforms[0], early[0], (1, 2), seen))


def test_the_choice_is_a_graph_without_a_look_from_the_host(kernel_names: Path) -> None:
    """A step that read a value on the host could not be built from symbols."""
    how = SamplingSettings(9, temperature=0.7, top_k=5, top_p=0.9, repetition_penalty=1.2, min_new_tokens=2)
    for settings in (how, how.as_greedy()):
        assert in_a_fork(kernel_names, build_choice, settings) == [([3], "int64"), ([3], "float32"), ([3], "float32")]
