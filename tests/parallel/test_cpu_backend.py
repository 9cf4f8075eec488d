"""The CPU backend: collectives, kernels and layers on 2 and 4 forked ranks against NumPy and single-process layers."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignment.errors import AlignmentError
from alignment.parallel import cpu_backend
from alignment.parallel.cpu_backend.patches import Patch, install
from alignment.parallel.cpu_backend.raw_bytes import reduce_parts
from tests.parallel import cpu_backend_cases as cases
from tests.parallel import cpu_backend_jobs as jobs
from tests.parallel.forked import JobResult, RankError, run_ranks, try_ranks


@functools.cache
def communicated(size: int) -> JobResult:
    return try_ranks(size, cases.communicate, timeout=60)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", list(cases.CASES))
def test_communication(name: str, size: int) -> None:
    for rank, results in enumerate(communicated(size).check()):
        expected = cases.CASES[name].expected(rank, size)
        exact = name.startswith("all_reduce") and name.endswith(("small", "large"))
        assert results[name].dtype == expected.dtype or not exact
        if exact:  # the order of the sum is fixed, so the bits are
            np.testing.assert_array_equal(results[name], expected)
        else:
            np.testing.assert_allclose(results[name], expected, rtol=1e-6, atol=1e-6)


KERNEL_ROWS, KERNEL_WIDTH, KERNEL_VOCAB = 6, 8, 16


def kernel_inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    logits = rng.standard_normal((KERNEL_ROWS, KERNEL_VOCAB)).astype(np.float32)
    logits[0, 3] = 200.0  # row 0: the label's log-probability is about -200
    logits[1] -= 500.0
    labels = rng.integers(0, KERNEL_VOCAB, (KERNEL_ROWS, 1))
    labels[0] = 9
    labels[2] = -100
    return {
        "logits": logits,
        "labels": labels,
        "weights": rng.standard_normal((KERNEL_ROWS, 1)).astype(np.float32),
        "x": rng.standard_normal((KERNEL_ROWS, KERNEL_WIDTH)).astype(np.float32),
    }


@functools.cache
def kernel_results(size: int) -> list[dict[str, np.ndarray]]:
    return run_ranks(size, jobs.kernels, **kernel_inputs())


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["identity", "legacy identity", "split", "concat"])
def test_kernels(name: str, size: int) -> None:
    x = kernel_inputs()["x"]
    width = KERNEL_WIDTH // size
    ramp = np.arange(x.size, dtype=np.float32).reshape(x.shape)
    narrow = np.arange(KERNEL_ROWS * width, dtype=np.float32).reshape(KERNEL_ROWS, width)
    for rank, results in enumerate(kernel_results(size)):
        mine = slice(width * rank, width * (rank + 1))
        value, gradient = {
            # every rank's gradient of the copy, added up
            "identity": (x, ramp * sum(range(1, size + 1))),
            "legacy identity": (x, ramp * sum(range(1, size + 1))),
            # the parts' gradients side by side
            "split": (x[:, mine], np.concatenate([narrow * (r + 1) for r in range(size)], axis=-1)),
            # what belongs to this rank's part of this rank's gradient
            "concat": (x, (rank + 1) * ramp[:, mine]),
        }[name]
        np.testing.assert_array_equal(results[name], value)
        np.testing.assert_allclose(results[f"{name} gradient"], gradient, rtol=1e-6)


@pytest.mark.parametrize("size", [2, 4])
def test_cross_entropy_is_exact(size: int) -> None:
    inputs = kernel_inputs()
    logits, labels, weights = inputs["logits"].astype(np.float64), inputs["labels"][:, 0], inputs["weights"]
    shifted = logits - logits.max(-1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    valid = labels != -100
    rows = np.arange(len(labels))
    loss = np.where(valid, -logprobs[rows, np.where(valid, labels, 0)], 0.0)[:, None]
    onehot = np.zeros_like(logits)
    onehot[rows[valid], labels[valid]] = 1
    gradient = (np.exp(logprobs) - onehot) * weights * valid[:, None]
    assert loss[0] > 190  # far beyond where Paddle's own CPU softmax stops
    width = KERNEL_VOCAB // size
    for rank, results in enumerate(kernel_results(size)):
        mine = slice(width * rank, width * (rank + 1))
        np.testing.assert_allclose(results["loss"], loss, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(results["loss of int32 labels"], results["loss"])
        np.testing.assert_allclose(results["softmax"], np.exp(logprobs)[:, mine], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(results["loss gradient"], gradient[:, mine], rtol=1e-5, atol=1e-6)
        assert results["loss"][2] == 0 and not results["loss gradient"][2].any()


@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_layers(size: int) -> None:
    for differences in run_ranks(size, jobs.layers):
        assert set(differences) == {
            "loss",
            "table gradient",
            "column gradient",
            "row gradient",
            "head gradient",
            "whole column, input gradient",
            "whole row, input gradient",
        }
        assert max(differences.values()) < 3e-6, differences


def test_through_the_real_launcher(tmp_path: Path, repo: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import json, os, sys\n"
        "from pathlib import Path\n"
        "from tests.parallel import cpu_backend_jobs as jobs\n"
        "result = jobs.layers()\n"
        f"Path({str(tmp_path)!r}, os.environ['PADDLE_TRAINER_ID'] + '.json').write_text(json.dumps(result))\n"
    )
    command = [
        "-m",
        "paddle.distributed.launch",
        "--nproc_per_node",
        "2",
        "--log_dir",
        str(tmp_path / "log"),
        str(script),
    ]
    environ = {**os.environ, "PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environ, capture_output=True, timeout=120)
    logs = "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(tmp_path.glob("log/workerlog.*")))
    assert done.returncode == 0, logs
    for rank in range(2):
        assert max(json.loads((tmp_path / f"{rank}.json").read_text()).values()) < 3e-6


def test_the_worlds_gradients() -> None:
    assert run_ranks(2, jobs.world_of_the_toolkit) == [[3.0, 3.0, 3.0]] * 2


# --- when it acts ---


def test_a_run_of_one_process_is_left_alone() -> None:
    assert run_ranks(1, jobs.on_one_process) == [False]


def test_variables_that_are_no_numbers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "two")
    with pytest.raises(AlignmentError, match="PADDLE_TRAINERS_NUM must be a whole number, not 'two'"):
        cpu_backend.apply()


def test_applying_twice_is_applying_once() -> None:
    assert run_ranks(2, jobs.apply_twice) == [(False, True, True, "")] * 2


def test_applying_too_late_is_an_error() -> None:
    for message in run_ranks(2, jobs.apply_late):
        assert "before paddle.distributed.init_parallel_env()" in message


def test_every_row_of_the_table_is_exchanged() -> None:
    (seen, _) = run_ranks(2, jobs.exchanged)
    assert all(seen.values()), [name for name, there in seen.items() if not there]


def test_an_untested_version_is_named() -> None:
    first, second = run_ranks(2, jobs.other_version)
    for said in (first, second):
        assert "tested with PaddlePaddle 3.3.1; this is 9.9.9" in said
        assert "which has no paddle._C_ops.c_concat" in said


def test_the_table_can_be_read() -> None:
    table = cpu_backend.patch_table()
    assert table.count("\n") == len(cpu_backend.PATCHES) + 2
    for patch in cpu_backend.PATCHES:
        assert patch.name in table and patch.reason in table and patch.seen_in in cpu_backend.TESTED_VERSIONS
        assert all(f"`{name}`" in table for name in patch.exchanges)
    names = [name for patch in cpu_backend.PATCHES for name in patch.exchanges]
    assert len(names) == len(set(names))


def test_a_missing_name_is_reported() -> None:
    rows = {"json.no_such_name": "device_names:first_device", "no_such_module.x": "device_names:first_device"}
    assert install(Patch("x", "x", "0", rows)) == list(rows)


# --- when something goes wrong ---


def test_a_late_rank_is_waited_for() -> None:
    assert run_ranks(2, jobs.late, 0.5, 0.5) == [3.0, 3.0]


@pytest.mark.slow
def test_a_rank_may_be_later_than_gloos_own_limit() -> None:
    assert run_ranks(2, jobs.late, 0.0, 33.0, timeout=120) == [3.0, 3.0]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("is killed", ["because rank 1 ended without a word (killed, or out of memory?)"]),
        ("raises", ["because rank 1 failed: ValueError: no data in shard 7"]),
        ("prints a traceback", ["because rank 1 failed: ValueError: no data in shard 8"]),
        ("hangs", ["because rank 1 did not get there within 1 s"]),
        ("leaves", ["because rank 1 has finished while other ranks still work"]),
        ("is at another step", ["lost step", "'all_reduce float32 4 SUM'", "rank 1 at 'broadcast float32 4 from 1'"]),
        (
            "has another shape",
            ["lost step", "at 'all_reduce float32 4 SUM'", "rank 1", "at 'all_reduce float32 5 SUM'"],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_failure_names_the_rank(how: str, words: list[str]) -> None:
    result = try_ranks(3, jobs.failing, how, timeout=60)
    for rank in (0, 2):
        assert "RankFailure: rank" in result.errors[rank] or "RankFailure: the ranks" in result.errors[rank]
        assert all(word in result.errors[rank] for word in words), result.errors[rank]


def test_a_dead_rank_is_noticed_though_its_child_lives() -> None:
    result = try_ranks(2, jobs.fork_and_die, timeout=30)
    seconds, told = result.values[0]
    assert seconds < 1.5 and "rank 1 ended without a word" in told


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("average of integers", "a reduction AVG of int64 tensors is not possible"),
        ("complex sum", "a reduction SUM of complex64 tensors is not possible"),
        ("label", "a label is 8; it must be in 0..7 or the ignored label -100"),
        ("split", "the last axis of a tensor of shape [2, 5] cannot be split over 2 ranks"),
        ("list", "needs a list of 2 tensors, not of 1"),
        ("rows", "all_to_all was given 2 rows, but sizes [1, 2]"),
        ("output", "the output tensor float32 3 has 12 bytes; needed: 16"),
        ("message", "expected 8 bytes from rank 0 in recv"),
    ],
    ids=lambda text: text if len(text) < 20 else "",
)
def test_a_call_that_cannot_be_is_refused(what: str, message: str) -> None:
    told = run_ranks(2, jobs.wrong, what)
    assert message in told[1]
    assert what == "message" or message in told[0]


def test_the_forked_ranks_tell_their_errors() -> None:
    with pytest.raises(RankError, match="rank 1 of 3"):
        run_ranks(3, jobs.failing, "raises", timeout=30)


# --- arithmetic on bytes ---


def reduce_values(values: list[Any], dtype: str, op: str = "SUM") -> np.ndarray:
    return reduce_parts([np.asarray(value, dtype).view(np.uint8) for value in values], dtype, op).view(dtype)


def test_float16_is_added_in_float32() -> None:
    # In float16, 2048 + 1 + 1 + ... stays 2048.
    assert reduce_values([[2048.0]] + [[1.0]] * 8, "float16") == [2056.0]
    assert np.isinf(reduce_values([[60000.0], [60000.0]], "float16")).all()


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        ([0x3F80, 0x3B80], 0x3F80),  # 1 + 2^-8: half way, to even (down)
        ([0x3F81, 0x3B80], 0x3F82),  # 1 + 2^-7 + 2^-8: half way, to even (up)
        ([0x3F80, 0x3B81], 0x3F81),  # just above half way
        ([0x7F80, 0x3F80], 0x7F80),  # infinity
        ([0xFF80, 0x7F80], 0x7FC0),  # infinity minus infinity
        ([0x7FFF, 0x3F80], 0x7FC0),  # a NaN with all bits set must not round to zero
        ([0x7F7F, 0x7F7F], 0x7F80),  # the largest number twice
    ],
)
def test_bfloat16_rounds_to_even(bits: list[int], expected: int) -> None:
    parts = [np.array([each], np.uint16).view(np.uint8) for each in bits]
    assert reduce_parts(parts, "bfloat16", "SUM").view(np.uint16)[0] == expected
