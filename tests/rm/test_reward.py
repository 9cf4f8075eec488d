"""Reward modelling through its runner."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from alignment.errors import ArgumentsError, DataError
from alignment.flow.checkpoint import CheckpointStore
from alignment.flow.metrics import read_metrics
from alignment.rm.run_reward import main
from tests.precision import ARGUMENTS, within
from tests.tiny import tiny_model_dir

COMMON = {
    "learning_rate": 5e-3,
    "max_length": 64,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "max_steps": 8,
    **ARGUMENTS,
}


def command(model: Path, data: Path, out: Path, **changes: object) -> list[str]:
    values = {
        "model_name_or_path": model,
        "train_datasets": f"jsonl::{data / 'train.jsonl'}",
        "eval_datasets": f"jsonl::{data / 'dev.jsonl'}",
        "output_dir": out,
        **COMMON,
        **changes,
    }
    return [
        f"{key}={json.dumps(value) if isinstance(value, (bool, list, dict)) else value}"
        for key, value in values.items()
        if value is not None
    ]


def train(model: Path, data: Path, out: Path, **changes: object) -> list[dict]:
    assert main(command(model, data, out, **changes)) == 0
    return read_metrics(out)


def column(rows: list[dict], name: str) -> list[float]:
    return [row[name] for row in rows if name in row]


@pytest.mark.parametrize("loss_type", ["sequence-wise", "token-wise"])
def test_it_learns(model_dir: Path, data_dir: Path, tmp_path: Path, loss_type: str) -> None:
    out = tmp_path / "run"
    rows = train(
        model_dir, data_dir, out, loss_type=loss_type, max_steps=40, evaluation_strategy="steps", eval_steps=20
    )
    evaluations = [row for row in rows if "eval/loss" in row]
    assert [row["step"] for row in evaluations] == [0, 20, 40], "evaluation before training comes first"
    before, after = evaluations[0], evaluations[-1]
    assert abs(before["eval/loss"] - np.log(2)) < 0.3
    assert after["eval/accuracy"] > 0.95 and after["eval/margin"] > 1.0 and after["eval/loss"] < 0.3
    assert after["eval/rewards_std"] > before["eval/rewards_std"]
    assert sum(value for name, value in after.items() if name.endswith("/count")) == 40
    assert 0 <= after["eval/calibration_error"] < 1
    trained = column(rows, "train/accuracy")
    assert len(trained) == 40 and np.mean(trained[-5:]) > 0.95

    samples = [json.loads(line) for line in (out / "eval_samples.jsonl").read_text().splitlines()]
    last = [row for row in samples if row["step"] == 40]
    assert [row["index"] for row in last] == list(range(40)) and len(samples) == 120
    assert np.mean([row["score_better"] > row["score_worse"] for row in last]) == after["eval/accuracy"]

    results = json.loads((out / "all_results.json").read_text())
    assert results["eval_accuracy"] == after["eval/accuracy"]
    from alignment.ppo.models import AutoModelForScore

    model = AutoModelForScore.from_pretrained(out)
    assert model.config.score_type == "reward"
    for name in ("tokenizer_config.json", "prompt_template.json", "data_mixture.json", "arguments.json"):
        assert (out / name).exists()


@pytest.mark.parametrize("loss_type", ["sequence-wise", "token-wise"])
def test_micro_batches_do_not_change_the_losses(
    model_dir: Path, data_dir: Path, tmp_path: Path, loss_type: str
) -> None:
    one = train(model_dir, data_dir, tmp_path / "a", loss_type=loss_type)
    many = train(
        model_dir,
        data_dir,
        tmp_path / "b",
        loss_type=loss_type,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    assert column(many, "train/loss") == pytest.approx(column(one, "train/loss"), abs=within(1e-5, "loss"))
    assert column(many, "train/accuracy") == column(one, "train/accuracy")
    assert column(many, "train/margin") == pytest.approx(column(one, "train/margin"), abs=within(1e-4, "loss"))


def test_a_budget_of_tokens_does_not_change_the_losses(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    evaluated = {"evaluation_strategy": "steps", "eval_steps": 4, "max_steps": 4}
    one = train(model_dir, data_dir, tmp_path / "a", **evaluated)
    many = train(model_dir, data_dir, tmp_path / "b", max_tokens_per_micro_batch=110, **evaluated)
    for name in ("train/loss", "train/margin", "eval/loss", "eval/margin"):
        assert column(many, name) == pytest.approx(column(one, name), abs=within(1e-5, "loss")), name


@pytest.mark.parametrize("kind", ["ExponentialMovingAverage", "RunningMeanStd"])
def test_normalised_training(model_dir: Path, data_dir: Path, tmp_path: Path, kind: str) -> None:
    """The normaliser learns from the step's scores whatever the micro batches, is saved, and resumes."""
    extra = {
        "normalize_score_during_training": True,
        "normalizer_type": kind,
        "save_strategy": "steps",
        "save_steps": 4,
    }
    one = train(model_dir, data_dir, tmp_path / "a", **extra)
    many = train(
        model_dir, data_dir, tmp_path / "b", per_device_train_batch_size=4, gradient_accumulation_steps=2, **extra
    )
    for name in ("train/loss", "train/normalizer_mean", "train/normalizer_std"):
        assert column(many, name) == pytest.approx(column(one, name), rel=2e-4, abs=within(1e-4, "loss")), name
    assert len(set(column(one, "train/normalizer_mean"))) == 8

    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["do_normalize"] and config["normalizer_type"] == kind and config["normalizer_count"] == 8 * 16
    assert config["mean"][0] == pytest.approx(column(one, "train/normalizer_mean")[-1], rel=1e-6)
    resumed = train(
        model_dir, data_dir, tmp_path / "c", resume_from_checkpoint=tmp_path / "a" / "checkpoint-4", **extra
    )
    for name in ("train/loss", "train/normalizer_std"):
        assert column(resumed, name) == pytest.approx(column(one, name)[4:], abs=1e-6), name


def test_normaliser_sees_each_pair_of_scores_once(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    rows = train(
        model_dir,
        data_dir,
        tmp_path / "run",
        normalize_score_during_training=True,
        normalizer_type="RunningMeanStd",
        max_steps=1,
    )
    # The first step is not normalised yet: its own scores are what the normaliser learns from.
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["mean"][0] == pytest.approx(rows[0]["train/rewards_mean"], rel=1e-5)
    assert config["var"][0] == pytest.approx(rows[0]["train/rewards_std"] ** 2 * 16 / 15, rel=1e-4)


def test_regularisation_enters_the_loss(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    plain = train(model_dir, data_dir, tmp_path / "a", regularization=0.0, max_steps=1)[0]
    heavy = train(model_dir, data_dir, tmp_path / "b", regularization=10.0, max_steps=1)[0]
    mean_square = plain["train/rewards_mean"] ** 2 + plain["train/rewards_std"] ** 2
    assert heavy["train/loss"] - plain["train/loss"] == pytest.approx(10.0 * 2 * mean_square, rel=1e-4)


def test_resume_continues_exactly(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    extra = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 2}
    before = train(model_dir, data_dir, out, **extra)
    shutil.copytree(out, tmp_path / "copy")
    for step in (6, 8):
        shutil.rmtree(tmp_path / "copy" / f"checkpoint-{step}")
    after = train(model_dir, data_dir, tmp_path / "copy", resume_from_checkpoint=True, **extra)
    # Step 3 lies in the middle of a logged window: its sums were saved too.
    assert [row["step"] for row in after] == [2, 4, 6, 8]
    for name in ("train/loss", "train/margin", "train/rewards_std"):
        assert column(after, name) == pytest.approx(column(before, name), abs=1e-6), name


def test_lora_with_normaliser_resumes(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    extra = {"lora": True, "lora_rank": 4, "learning_rate": 2e-2, "normalize_score_during_training": True}
    one = train(model_dir, data_dir, tmp_path / "a", save_strategy="steps", save_steps=4, **extra)
    assert column(one, "train/loss")[-1] < 0.6
    again = train(model_dir, data_dir, tmp_path / "b", resume_from_checkpoint=tmp_path / "a" / "checkpoint-4", **extra)
    for name in ("train/loss", "train/normalizer_mean"):
        assert column(again, name) == pytest.approx(column(one, name)[4:], abs=1e-6), name


def test_another_template_than_the_sft_models_is_refused(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    from alignment.ppo.data import PromptTemplate
    from alignment.ppo.models import load_tokenizer

    sft = tmp_path / "sft"
    shutil.copytree(model_dir, sft)
    source = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    PromptTemplate.resolve(source, load_tokenizer(model_dir)).save(sft)
    with pytest.raises(DataError, match="prompt templates differ"):
        main(command(sft, data_dir, tmp_path / "run", prompt_template="beaver"))
    # Without an argument the model's own is used.
    train(sft, data_dir, tmp_path / "run", max_steps=1)
    assert json.loads((tmp_path / "run" / "prompt_template.json").read_text())["template"] == source


def test_mistakes_are_explained(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentsError, match="token-wise"):
        main(command(model_dir, data_dir, tmp_path / "run", loss_type="tokenwise"))
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        main(command(model_dir, data_dir, tmp_path / "run", train_datasets="jsonl::nowhere.jsonl"))


def test_real_hh(shared_data: Path, tmp_path: Path) -> None:
    model = tiny_model_dir(tmp_path / "model", "llama")
    source = shared_data / "hh_harmless.jsonl.gz"
    rows = train(
        model,
        tmp_path,
        tmp_path / "run",
        train_datasets=f"jsonl:40/-1:{source}",
        eval_datasets=None,
        eval_split_ratio=0.25,
        max_length=256,
        per_device_train_batch_size=4,
        max_steps=5,
        evaluation_strategy="steps",
        eval_steps=5,
    )
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 5]
    assert all(np.isfinite(column(rows, "train/loss")))


def test_two_processes_give_the_losses_of_one(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    extra = {"normalize_score_during_training": True, "evaluation_strategy": "steps", "eval_steps": 4, "max_steps": 10}
    # Adam's first steps have the size of the rate whatever the gradient: a large one blows rounding up at once.
    extra["learning_rate"] = 1e-3
    one = train(model_dir, data_dir, tmp_path / "one", per_device_train_batch_size=10, **extra)
    script = Path(__file__).resolve().parents[2] / "alignment" / "rm" / "run_reward.py"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PADDLE_")}
    finished = subprocess.run(
        [
            sys.executable,
            "-u",
            "-m",
            "paddle.distributed.launch",
            "--nproc_per_node",
            "2",
            "--log_dir",
            str(tmp_path / "log"),
            script.name,
            *command(model_dir, data_dir, tmp_path / "two", per_device_train_batch_size=5, **extra),
        ],
        cwd=script.parent,
        env={**kept, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert finished.returncode == 0, (tmp_path / "log" / "workerlog.0").read_text()[-3000:]
    two = read_metrics(tmp_path / "two")
    for name in ("train/loss", "train/margin", "train/normalizer_mean", "eval/loss", "eval/margin", "eval/rewards_std"):
        assert column(two, name) == pytest.approx(column(one, name), rel=1e-4, abs=within(1e-4, "loss")), name
    assert column(two, "train/loss") == pytest.approx(column(one, "train/loss"), abs=within(1e-4, "loss"))
    assert column(two, "train/accuracy") == column(one, "train/accuracy")
    assert CheckpointStore(tmp_path / "two").steps() == []
