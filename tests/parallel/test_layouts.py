"""One run on several layouts: the same losses, rewards, gradient norms, evaluations, and the same answers.

The whole matrix is ``make parallel``; here are the layouts of two processes and the one of four.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.parallel.layouts import (
    LAYOUTS,
    ROLLOUT_LAYOUTS,
    Layout,
    Trace,
    compare,
    make_files,
    one_batch,
    run,
    run_words,
)
from tests.precision import TOLERANCE, stored_codes


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data."""
    return make_files(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def llama_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a Llama whose embedding is tied; its stages are unequal, and so are the owners of their tensors."""
    shape = {"tie_word_embeddings": True, "layers": 5, "intermediate_size": 512}
    return make_files(tmp_path_factory.mktemp("layouts"), "llama", **shape)


@pytest.fixture(scope="module")
def wide_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with twice as many rows as their tokenizer has tokens."""
    return make_files(tmp_path_factory.mktemp("layouts"), vocab_size=700)


@cache
def single(files: Path, stage: str) -> Trace:
    """The run of one process."""
    return run(files, stage, Layout())


@pytest.mark.parametrize("name", ["TP2, sequence parallel", "PP2", "sharding stage 2 x2"])
@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_sft_and_rm(stage: str, name: str, files: Path) -> None:
    difference = compare(single(files, stage), run(files, stage, LAYOUTS[name]))
    assert difference.steps >= 6
    assert difference.worst[0] <= 1e-4, difference.worst


@pytest.mark.parametrize("name", ["TP2", "PP2"])
def test_cost(name: str, files: Path) -> None:
    difference = compare(single(files, "cost"), run(files, "cost", LAYOUTS[name]))
    assert difference.steps >= 6
    assert difference.worst[0] <= 1e-4, difference.worst


@pytest.mark.parametrize("name", ["DP2", "sharding stage 3 x2", "TP2", "PP2", "TP2 x PP2"])
def test_ppo(name: str, files: Path) -> None:
    difference = compare(single(files, "ppo"), run(files, "ppo", LAYOUTS[name]))
    assert difference.steps >= 6 and difference.answers >= 17 + 2 * 3 * 7
    assert difference.same_answers
    assert difference.worst[0] <= 1e-4, difference.worst


@pytest.mark.parametrize("name", ["TP2, eval_mode single", "PP2, eval_mode tensor_parallel"])
def test_ppo_with_a_rollout_layout(name: str, files: Path) -> None:
    trace = run(files, "ppo", ROLLOUT_LAYOUTS[name])
    difference = compare(single(files, "ppo"), trace)
    assert difference.same_answers
    assert difference.worst[0] <= 1e-4, difference.worst
    moved = [row["reshard/bytes"] for row in trace.rows if "reshard/bytes" in row]
    assert len(moved) == 3 and sum(moved) > 0


@pytest.mark.parametrize("name", ["TP2", "PP2", "TP2, eval_mode single"])
def test_ppo_with_more_rows_than_tokens(name: str, wide_files: Path) -> None:
    """P7: with tensor parallelism the second rank has no token at all; the rows are neither sampled nor counted."""
    difference = compare(single(wide_files, "ppo"), run(wide_files, "ppo", (LAYOUTS | ROLLOUT_LAYOUTS)[name]))
    assert difference.same_answers
    assert difference.worst[0] <= 1e-4, difference.worst


@pytest.mark.parametrize("name", ["1 process", "TP2 x PP2"])
def test_packed_rows(name: str, files: Path) -> None:
    """``zero_padding`` changes nothing: here every step reads all eight rows, two to a pack."""
    padded = run(files, "sft", Layout(), one_batch(files))
    difference = compare(padded, run(files, "sft", LAYOUTS[name], one_batch(files, packed=True)))
    assert difference.worst[0] <= 1e-4, difference.worst


@pytest.mark.parametrize("name", ["TP2 x PP2", "PP2 x sharding stage 2 x2"])
def test_a_tied_llama(name: str, llama_files: Path) -> None:
    """The first and the last stage share the embedding's gradient, whoever owns it."""
    for stage in ("sft", "ppo"):
        difference = compare(single(llama_files, stage), run(llama_files, stage, LAYOUTS[name]))
        assert difference.same_answers
        assert difference.worst[0] <= 1e-4, (stage, difference.worst)


@pytest.mark.parametrize("name", ["DP2", "TP2"])
def test_layouts_agree_in_bfloat16(name: str, files: Path) -> None:
    """Where a sum in another order rounds to the neighbour, layers behind carry it on: the tolerance is bfloat16's."""
    one = run(files, "sft", Layout(), ["bf16=true"])
    other = run(files, "sft", LAYOUTS[name], ["bf16=true"])
    assert compare(one, other).worst[0] <= TOLERANCE["loss"], compare(one, other).worst
    assert 1e-4 < compare(one, single(files, "sft")).worst[0] < 0.1, "and it is not float32"


def test_the_shipped_llama_layout(tmp_path: Path) -> None:
    """``config/llama/ppo_argument.json`` as it is (bf16, TP2 x sharding 4, recompute, ptx, offloading), with tiny
    models.
    """
    files = make_files(tmp_path, "llama")
    words = [
        str(REPO / "config" / "llama" / "ppo_argument.json"),
        f"actor_model_name_or_path={files / 'model'}",
        f"reward_model_name_or_path={files / 'reward'}",
        f"train_datasets=jsonl::{files / 'prompts_1.jsonl'}",
        f"eval_datasets=jsonl::{files / 'prompts_dev.jsonl'}",
        f"ptx_datasets=jsonl::{files / 'sft.jsonl'}",
        f"output_dir={tmp_path / 'run'}",
        "max_length=64",
        "per_device_prompt_batch_size=2",
        "per_device_train_batch_size=2",
        "save_strategy=no",
        "report_to=none",
    ]
    trace = run_words("ppo", words, 8, tmp_path / "run")
    steps = [row for row in trace if "train/actor_loss" in row]
    assert len(steps) == 3 and all("train/ptx_loss" in row for row in steps)
    assert all(abs(row["train/ratio_mean"] - 1) < TOLERANCE["loss"] for row in steps)
    for name in ("policy", "value"):
        assert stored_codes(tmp_path / "run" / name) == {"BF16"}
