"""RFT through the public command, and against what trlX selects."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from alignment.cli import main
from alignment.flow.method import Train
from alignment.flow.update import split_windows
from alignment.losses.selection import selection_percentile
from alignment.methods.rft import RFT, rounds_of
from alignment.parallel import World
from alignment.rollout.rollout import Experience, Rollout
from tests.ppo.conftest import assert_same_metrics, metric_rows
from tests.precision import BF16, read_weights

REPO = Path(__file__).resolve().parents[2]


def pool_of(pools: dict[str, list[tuple[str, float]]]) -> tuple[Experience, list[tuple[str, str]]]:
    """Prompts and answers as rows (each text one token), and the texts of each row."""
    pairs = [(prompt, answer, score) for prompt, pool in pools.items() for answer, score in pool]
    ids = {text: number for number, text in enumerate(dict.fromkeys(t for p, a, _ in pairs for t in (p, a)))}
    rows, ones = len(pairs), np.ones(len(pairs), np.int64)
    tokens = np.array([[ids[prompt], ids[answer]] for prompt, answer, _ in pairs])
    rollout = Rollout(
        tokens, ones, ones, ones > 0, np.zeros((rows, 1)), np.zeros((rows, 1)), np.arange(rows), 0 * ones,
        ["p"] * rows, ["r"] * rows, [{}] * rows,
    )  # fmt: skip
    made = Experience(rollout, pool_scores=np.array([score for _, _, score in pairs], np.float64))
    return made, [(prompt, answer) for prompt, answer, _ in pairs]


# ------------------------------------------------------------------------------------------------------------ selection


def test_each_round_learns_from_what_trlx_selects(shared_data: Path) -> None:
    """Of the rounds of one generation; their thresholds only rise, so an answer takes part in the first rounds."""
    vectors = json.loads((shared_data.parent / "vectors" / "preference_and_rl.json").read_text())
    entries = [entry for entry in vectors["entries"] if entry["name"].startswith("rft/trlx/selection")]
    assert len(entries) >= 3
    for entry in entries:
        given = entry["options"]
        pool, pairs = pool_of(vectors["inputs"]["rft"]["pool"])
        rounds = given["n_improve_steps"]
        taken, thresholds = rounds_of(pool, rounds, given["start_percentile"], given["end_percentile"])
        number = given["epoch_count"] % rounds
        np.testing.assert_allclose(thresholds[number], entry["expected"]["thresholds"], atol=1e-12)
        found = sorted(list(pair) for pair, count in zip(pairs, taken, strict=True) if count > number)
        assert found == entry["expected"]["selected"]
        assert selection_percentile(
            number, given["start_percentile"], given["end_percentile"], rounds
        ) == pytest.approx(entry["expected"]["percentile"])


def test_equal_answers_are_learnt_once_and_count_in_their_quantile() -> None:
    pools = {"p": [("good", 1.0), ("good", 1.0), ("good", 1.0), ("bad", 0.0)], "q": [("a", 0.2), ("b", 0.6)]}
    taken, thresholds = rounds_of(pool_of(pools)[0], 1, 0.5, 0.9)
    assert taken.tolist() == [1, 0, 0, 0, 0, 1]
    assert thresholds == [[pytest.approx(0.999), pytest.approx(0.401)]]


def test_a_row_takes_part_in_its_first_passes() -> None:
    """Windows hold the rows of their pass alone, whatever is left of it begins a restart, and empty passes end it."""
    pool = pool_of({"p": [(str(number), 0.0) for number in range(7)]})[0]
    batch = pool.add(rounds=np.array([3, 1, 2, 1, 3, 2, 1]))
    args = SimpleNamespace(update_iters=5, per_device_train_batch_size=2, gradient_accumulation_steps=1, seed=0)
    train = Train({}, takes_part="rounds")
    windows = list(split_windows(batch, args, World(), 0, train=train))
    assert [len(window.mine) for window in windows] == [2, 2, 2, 1, 2, 2, 2]
    seen = [sorted(int(row) for window in part for row in window.mine.prompt_index) for part in
            (windows[:4], windows[4:6], windows[6:])]  # fmt: skip
    assert seen == [[0, 1, 2, 3, 4, 5, 6], [0, 2, 4, 5], [0, 4]] and windows[-1].after is None
    rest = split_windows(batch, args, World(), 0, windows[4].after, train)
    assert [w.mine.prompt_index.tolist() for w in rest] == [w.mine.prompt_index.tolist() for w in windows[5:]]


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def rft_json(online_json: Callable[..., Path]) -> Callable[..., Path]:
    """A short run: 24 prompts, 8 an iteration with 4 answers each, 3 iterations an epoch; 2 rounds."""

    def write(name: str = "run", **changes: Any) -> Path:
        keys = {"max_steps": None, "num_train_epochs": 2, "num_return_sequences": 4, "update_iters": 2}
        return online_json(name, **{**keys, "per_device_train_batch_size": 4, "start_percentile": 0.4, **changes})

    return write


def test_a_run_imitates_the_best_answers_of_growing_pools(rft_json: Callable[..., Path], tmp_path: Path) -> None:
    file = rft_json(save_strategy="epoch", evaluation_strategy="epoch", eval_on_start=False)
    assert main(["rft", str(file)]) == 0
    out = tmp_path / "run"
    rows = [row for row in metric_rows(out) if "train/actor_loss" in row]
    names = {"reward", "chosen_score", "chosen_answers", "chosen_answers_last_round", "pool_answers", "entropy",
             "threshold_first_round", "threshold_last_round", "mean_generated_length", "actor_lr"}  # fmt: skip
    assert {f"train/{name}" for name in names} <= rows[0].keys()
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert {row["train/pool_answers"] for row in rows[:3]} == {32} and rows[-1]["train/pool_answers"] == 64
    for row in rows:
        assert row["train/chosen_score"] > row["train/reward"]
        assert row["train/chosen_answers_last_round"] < row["train/chosen_answers"] < row["train/pool_answers"]
        assert row["train/threshold_last_round"] >= row["train/threshold_first_round"]
    assert sum("eval/reward" in row for row in metric_rows(out)) == 2
    assert (out / "policy" / "model.safetensors").is_file() and not (out / "value").exists()


def test_it_learns_what_is_rewarded(rft_json: Callable[..., Path], tmp_path: Path) -> None:
    """The reward asks for vowels in short answers; ten epochs raise it by far more than its noise."""
    keys = {
        "num_train_epochs": 10,
        "num_return_sequences": 8,
        "per_device_train_batch_size": 16,
        "start_percentile": 0.7,
    }
    assert main(["rft", str(rft_json(learning_rate=3e-3, evaluation_strategy="no", **keys))]) == 0
    rows = [row for row in metric_rows(tmp_path / "run") if "train/reward" in row]
    rewards = [row["train/reward"] for row in rows]
    assert np.mean(rewards[-10:]) > np.mean(rewards[:10]) + 0.5


def test_pools_of_one_iteration_alone(rft_json: Callable[..., Path], tmp_path: Path) -> None:
    assert main(["rft", str(rft_json(keep_pools=False, save_strategy="epoch"))]) == 0
    assert {row["train/pool_answers"] for row in metric_rows(tmp_path / "run") if "train/reward" in row} == {32}
    assert not list((tmp_path / "run").glob("checkpoint-*/trainer/pools.*"))


def test_a_resume_in_the_middle_of_an_update_changes_no_bit(rft_json: Callable[..., Path], tmp_path: Path) -> None:
    """The checkpoint lies in the second epoch: its pools have the first epoch's answers, too."""
    keys = {"save_strategy": "steps", "save_steps": 1, "evaluation_strategy": "no", "per_device_train_batch_size": 8}
    assert main(["rft", str(rft_json("whole", **keys))]) == 0
    file = rft_json("parts", **keys)
    parts = tmp_path / "parts"
    shutil.copytree(tmp_path / "whole", parts)
    steps = sorted(int(path.name.split("-")[1]) for path in parts.glob("checkpoint-*"))
    second = [row["step"] for row in metric_rows(parts) if row.get("train/pool_answers") == 64]
    halfway = next(s for s in steps if s > second[0] and (parts / f"checkpoint-{s}/trainer/rollout.json").is_file())
    for step in steps:
        if step > halfway:
            shutil.rmtree(parts / f"checkpoint-{step}")
    trainer = parts / f"checkpoint-{halfway}" / "trainer"
    assert (trainer / "pools.safetensors").is_file() and (trainer / "pools.json").is_file()
    assert main(["rft", str(file), "resume_from_checkpoint=true"]) == 0
    whole, resumed = read_weights(tmp_path / "whole" / "policy"), read_weights(parts / "policy")
    for name, weight in whole.items():
        np.testing.assert_array_equal(resumed[name], weight, err_msg=name)
    assert_same_metrics(metric_rows(tmp_path / "whole"), metric_rows(parts), 0.0)


def test_broken_pools_are_an_error_in_words(
    rft_json: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rft", str(rft_json(save_strategy="epoch", num_train_epochs=1))]) == 0
    (pools,) = (tmp_path / "run").glob("checkpoint-*/trainer/pools.json")
    pools.write_text("{")
    assert main(["rft", str(rft_json(save_strategy="epoch")), f"resume_from_checkpoint={pools.parents[1]}"]) == 2
    said = capsys.readouterr().err
    assert "pools.json" in said and "Traceback" not in said


def test_two_processes_give_the_single_processs_run(rft_json: Callable[..., Path], tmp_path: Path) -> None:
    assert main(["rft", str(rft_json("one"))]) == 0
    file = rft_json("two", per_device_prompt_batch_size=4, per_device_train_batch_size=2)
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2"]
    command += ["--log_dir", str(tmp_path / "log"), str(REPO / "alignment" / "__main__.py"), "rft", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    rows = {place: metric_rows(tmp_path / place) for place in ("one", "two")}
    if BF16:  # rounding decides between close tokens once it has decided how to learn: the first rollout is the same
        assert_same_metrics(rows["one"][:2], rows["two"][:2], 0.1)
        return
    assert_same_metrics(rows["one"], rows["two"], 1e-4)


# -------------------------------------------------------------------------------------------------- keys and refusals


def test_laxer_rounds_are_refused(rft_json: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rft", str(rft_json(start_percentile=0.9, end_percentile=0.5))]) == 2
    error = capsys.readouterr().err
    assert "start_percentile 0.9 is above end_percentile 0.5: rounds become stricter" in error


def test_dry_run_and_help_show_its_keys(
    rft_json: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """trlX's names mean the same."""
    file = rft_json(num_return_sequences=None, update_iters=None, n_generations_per_prompt=4, n_improve_steps=3)
    assert main(["rft", str(file), "kl_coeff=0.1", "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "samples per rollout" in shown and "kl_coeff: not used by RFT" in shown
    assert "32" in shown.split("samples per rollout")[1].splitlines()[0]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert main(["rft", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {key}  (default: " in shown for key in RFT.Keys.__dataclass_fields__)
