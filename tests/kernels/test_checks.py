"""rl 7: the operators check what they are given; they read out of bounds, or wrote behind a buffer, before."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from alignment.kernels.ops import ATTENTION, LayerShape

SHAPE = LayerShape(
    hidden=8,
    intermediate=12,
    query_heads=4,
    key_heads=2,
    head_dim=2,
    window=0,
    activation=0,
    epsilon=1e-6,
    norm_offset=0.0,
    biases=False,
)
SIZES = [[8], [8, 8], [8, 4], [8, 4], [8, 8], [8], [8, 12], [8, 12], [12, 8]]
TOKENS = 5


def zeros(*shape: int) -> Any:
    return paddle.zeros(list(shape))


def ids(*values: int) -> Any:
    return paddle.to_tensor(np.array(values, dtype=np.int64))


def weights(layers: int = 1, **changed: list[int]) -> list[Any]:
    return [zeros(*changed.get(f"w{i}", size)) for _ in range(layers) for i, size in enumerate(SIZES)]


def packed(k: Any, **changed: Any) -> Any:
    given = {
        "x": zeros(TOKENS, 8),
        "weights": weights(2),
        "angles": (zeros(16, 1), zeros(16, 1)),
        "cache": zeros(2, 2, 32, 4),
        "positions": [0, 1, 2, 0, 1],
        "places": [0, 1, 2, 16, 17],
        "starts": [0, 3, 5],
        "shape": SHAPE,
        **changed,
    }
    plan = ids(*given["positions"], *given["places"], *given["starts"])
    more = {name: given[name] for name in ("part", "first_layer") if name in given}
    sequences = len(given["starts"]) - 1
    tensors = (given[name] for name in ("x", "weights", "angles", "cache"))
    return k.stack(*tensors, plan, given["shape"], sequences, cached=False, **more)


def cached(k: Any, **changed: Any) -> Any:
    given = {"positions": [3, 2], "places": [17, 18], "spans": [0, 3, 16, 2, 0, 0, 16, 3], **changed}
    plan = ids(*given["positions"], *given["places"], *given["spans"])
    angles = zeros(16, 1), zeros(16, 1)
    return k.stack(zeros(2, 8), weights(), angles, given.get("cache", zeros(1, 2, 32, 4)), plan, SHAPE, 0, cached=True)


def backward(k: Any, **changed: Any) -> Any:
    x, angles, plan = zeros(TOKENS, 8), (zeros(16, 1), zeros(16, 1)), ids(0, 1, 2, 0, 1, 0, 3, 5)
    _, *saved = k.layer_forward(x, weights(), angles, plan, SHAPE, 2)
    saved = changed.get("saved", lambda kept: kept)(saved)
    return k.layer_backward(x, weights(), angles, plan, saved, changed.get("grad", zeros(TOKENS, 8)), SHAPE, 2)


def labels(k: Any, *values: int, hidden: int = 8, sets: Any = (None, None)) -> Any:
    return k.label_logprobs(zeros(2, hidden), zeros(8, 20), ids(*values), 1.0, tied=False, entropy=False, sets=sets)


def choose(k: Any, banned_ids: list[int] = [1], **changed: Any) -> Any:  # noqa: B006
    given = {"uniforms": [2], "seen": [0], "banned": [2], "allowed": [2, 20], **changed}
    return k.choose(
        zeros(2, 20),
        zeros(*given["uniforms"]).astype("float64"),
        zeros(*given["seen"]).astype("uint8"),
        paddle.ones(given["banned"], dtype="uint8"),
        paddle.ones(given["allowed"], dtype="uint8"),
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        penalty=1.0,
        greedy=False,
        banned_ids=banned_ids,
    )


def adamw(k: Any, *, grad: int = 4, power: int = 1, decay: int = 1) -> Any:
    one = [zeros(4)]
    powers = [paddle.full([power], 0.9)], [paddle.full([power], 0.9)]
    settings = {"rate": 0.1, "betas": (0.9, 0.9), "epsilon": 1e-8, "scale": 1.0, "decay": [0.0] * decay}
    return k.adamw(one, [zeros(grad)], ([zeros(4)], [zeros(4)]), powers, **settings)


#: what is given -> what the message says; the first of each kind is right.
RIGHT: list[Callable[[Any], Any]] = [
    packed,
    cached,
    backward,
    lambda k: labels(k, 0, 19),
    lambda k: labels(k, 0, 19, sets=(ids(0, 1, 19), ids(0, 2, 3))),
    choose,
    adamw,
    lambda k: packed(k, weights=weights(), part=ATTENTION, first_layer=1),
    lambda k: packed(k, cache=zeros(0), places=[-1] * 5),
    lambda k: k.embed(ids(0, 19), zeros(20, 8), 1.0),
]
WRONG: list[tuple[Callable[[Any], Any], str]] = [
    (lambda k: k.project(zeros(3, 5), zeros(8, 20), tied=False), r"x must be \[rows, 8\], got 5 columns"),
    (lambda k: k.project(zeros(3, 8), zeros(8, 20), tied=True), r"x must be \[rows, 20\], got 8"),
    (lambda k: k.embed(ids(3, 20), zeros(20, 8), 1.0), r"id 20 \(number 1\) must be at least 0 and below 20"),
    (lambda k: k.embed(ids(-1), zeros(20, 8), 1.0), "id -1"),
    (lambda k: k.rms_norm(zeros(3, 7), zeros(8), SHAPE), "rows of 7 numbers and a norm of 8"),
    (lambda k: labels(k, 0, 20), "label 20 "),
    (lambda k: labels(k, 0, -100), "label -100 "),
    (lambda k: labels(k, 0), "labels has 1 numbers; 2 are wanted"),
    (lambda k: labels(k, 0, 1, sets=(ids(0, 20), ids(0, 1, 2))), "allowed id 20 "),
    (lambda k: labels(k, 0, 1, sets=(ids(0, 1), ids(0, 2))), "the starts of the sets has 2 numbers; 3"),
    (lambda k: labels(k, 0, 1, sets=(ids(0, 1), ids(0, 1, 3))), "begin at 0 and end at 3 of 2"),
    (lambda k: labels(k, 0, 1, sets=(ids(0, 1), ids(0, 2, 2))), "the set of row 1 is empty"),
    (lambda k: labels(k, 0, 1, sets=(ids(0, 3, 1), ids(0, 1, 3))), "the ids of row 1's set do not rise"),
    (lambda k: labels(k, 0, 1, sets=(ids(0, 1), None)), "ids and starts"),
    (lambda k: labels(k, 0, 1, hidden=6), r"x must be \[rows, 8\]"),
    (lambda k: choose(k, [20]), "banned id 20 "),
    (lambda k: choose(k, [-1]), "banned id -1 "),
    (lambda k: choose(k, uniforms=[1]), "uniforms has 1"),
    (lambda k: choose(k, seen=[2, 19]), "seen has 38 numbers; 40"),
    (lambda k: choose(k, banned=[1]), "banned has 1"),
    (lambda k: choose(k, allowed=[2, 19]), "allowed has 38 numbers; 40"),
    (lambda k: packed(k, x=zeros(TOKENS, 7)), r"x must be \[rows, 8\]"),
    (lambda k: packed(k, weights=weights(2, w3=[8, 3])), "tensor 3 of layer 0 has 24 numbers; 32"),
    (lambda k: packed(k, weights=weights()[:8]), "8 tensors are no layers of 9"),
    (lambda k: packed(k, positions=[0, 1, 2, 0, 16]), "position 16 "),
    (lambda k: packed(k, positions=[0, 1]), "the plan has"),
    (lambda k: packed(k, places=[0, 1, 2, 16, 32]), "place 32 "),
    (lambda k: packed(k, cache=zeros(0)), "place 0 "),
    (lambda k: packed(k, cache=zeros(1, 2, 32, 4)), "layers 0 to 2 have no place in a cache of 1"),
    (lambda k: packed(k, cache=zeros(2, 2, 30, 4)), "no whole blocks"),
    (lambda k: packed(k, first_layer=1), "layers 1 to 3 have no place"),
    (lambda k: packed(k, starts=[0, 3, 6]), "end at 6 of 5 tokens"),
    (lambda k: packed(k, starts=[0, 6, 5]), "sequence 1 ends before it begins"),
    (lambda k: packed(k, angles=(zeros(16, 2), zeros(16, 2))), "the table of cosines"),
    (lambda k: packed(k, angles=(zeros(16, 1), zeros(15, 1))), "the table of sines"),
    (lambda k: packed(k, part=3), "there is no part 3"),
    (lambda k: packed(k, shape=replace(SHAPE, key_heads=3)), "no multiple of 3 key heads"),
    (lambda k: packed(k, shape=replace(SHAPE, activation=2)), "no activation 2"),
    (lambda k: cached(k, places=[17, 32]), "place 32 "),
    (lambda k: cached(k, spans=[0, 3, 16, 17, 0, 0, 16, 3]), "span 1 of row 0 is 17 tokens from place 16"),
    (lambda k: cached(k, spans=[0, 3, 16, 2, 8, 2, 16, 3]), "begins at a multiple of 16"),
    (lambda k: cached(k, spans=[0, 3, 16, 2]), "the plan has"),
    (lambda k: cached(k, cache=zeros(0)), "place 17 "),
    (lambda k: backward(k, grad=zeros(TOKENS, 7)), "the output's gradient"),
    (lambda k: backward(k, saved=lambda kept: kept[:9]), "9 tensors were kept"),
    (lambda k: backward(k, saved=lambda kept: [*kept[:9], zeros(3)]), "what the forward kept has 3"),
    (lambda k: adamw(k, grad=3), "weight 0 has 4 numbers, its gradient or a moment 3"),
    (lambda k: adamw(k, power=2), "a power of beta is one number"),
    (lambda k: adamw(k, decay=2), "2 decays"),
]


@pytest.mark.parametrize("call", RIGHT)
def test_what_is_right_passes(operators: Any, call: Callable[[Any], Any]) -> None:
    call(operators)


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
def test_what_does_not_fit_is_named(operators: Any, call: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(operators)


MEMORY = """
import resource
import paddle
from alignment.kernels.ops import kernels
k = kernels()
logits = paddle.zeros([2, 1 << 24])
how = dict(temperature=1.0, top_k=0, top_p=0.9, penalty=1.0, greedy=False, banned_ids=[])
given = logits, paddle.zeros([2], dtype="float64"), paddle.zeros([0], dtype="uint8"), paddle.zeros([2], dtype="uint8")
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (64 << 20),) * 2)
try:
    k.choose(*given, **how)
except MemoryError as error:
    print(error)
"""


def test_too_little_memory_is_an_error(operators: Any, repo: Path) -> None:
    """It ended the process: an exception left OpenMP's threads, or was none that Paddle knows."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", MEMORY], capture_output=True, text=True, cwd=repo)
    assert "alignment_choose: CPU kernels: no memory for 134217728 bytes" in done.stdout, done.stderr[-500:]
