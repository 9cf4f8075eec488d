"""Cost models through their runner: costs that are ordered, and on the right side of zero."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from alignment.cli import main as alignment
from alignment.errors import ArgumentsError, CheckpointError, DataError
from alignment.flow.metrics import read_metrics
from alignment.rm.run_reward import main, main_cost
from tests.precision import within
from tests.rm.test_reward import column, command
from tests.tiny import preference_rows, safety_rows, write_jsonl


@pytest.fixture(scope="session")
def safety_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train.jsonl`` (96 pairs) and ``dev.jsonl`` (42 pairs)."""
    folder = tmp_path_factory.mktemp("rm") / "safety"
    write_jsonl(folder / "train.jsonl", safety_rows(96))
    write_jsonl(folder / "dev.jsonl", safety_rows(42, seed=1))
    return folder


def train(model: Path, data: Path, out: Path, **changes: object) -> list[dict]:
    assert main_cost(command(model, data, out, **changes)) == 0
    return read_metrics(out)


@pytest.fixture(scope="module")
def cost_model(model_dir: Path, safety_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained one, with its checkpoint of step 30."""
    out = tmp_path_factory.mktemp("rm") / "cost"
    words = command(model_dir, safety_dir, out, max_steps=60, save_strategy="steps", save_steps=30, eval_steps=30,
                    evaluation_strategy="steps", load_best_model_at_end=True)  # fmt: skip
    assert alignment(["cost", *words]) == 0
    return out


@pytest.mark.parametrize("seed", [4, 5, 7])
def test_it_learns_the_order_and_the_sign(model_dir: Path, safety_dir: Path, tmp_path: Path, seed: int) -> None:
    """Bands on held-out pairs: order 0.85, sign 0.9. The three seeds are ones whose random head orders most pairs wrong
    (others happen to order all of them right); a half of the signs is right before.
    """
    rows = train(model_dir, safety_dir, tmp_path / "run", max_steps=60, seed=seed, evaluation_strategy="steps",
                 eval_steps=60)  # fmt: skip
    before, after = (row for row in rows if "eval/loss" in row)
    assert before["eval/accuracy"] < 0.6 and before["eval/accuracy_sign"] < 0.7
    assert after["eval/accuracy"] > 0.85 and after["eval/accuracy_sign"] > 0.9, after
    assert min(after["eval/accuracy_sign_safer"], after["eval/accuracy_sign_unsafer"]) > 0.85
    assert after["eval/safer_mean"] < 0 < after["eval/unsafer_mean"]
    assert after["eval/margin"] > 1 and after["eval/loss"] < before["eval/loss"] / 2


def test_what_it_leaves(cost_model: Path, capsys: pytest.CaptureFixture) -> None:
    assert json.loads((cost_model / "config.json").read_text())["score_type"] == "cost"
    summary = json.loads((cost_model / "data_summary.json").read_text())["train"]
    assert summary["kind"] == "safety preference"
    assert summary["labels"] == {"both safe": 32, "one safe": 32, "both unsafe": 32}
    assert summary["sources"][0]["unread"] == {"(which answer is better)": 96}
    results = json.loads((cost_model / "all_results.json").read_text())
    assert results["eval_accuracy_sign"] > 0.9 and results["best_step"] in (30, 60)


def test_token_wise_learns_too(model_dir: Path, safety_dir: Path, tmp_path: Path) -> None:
    extra = {"evaluation_strategy": "steps", "eval_steps": 60, "loss_type": "token-wise"}
    after = train(model_dir, safety_dir, tmp_path / "run", max_steps=60, **extra)[-1]
    assert after["eval/accuracy"] > 0.85 and after["eval/accuracy_sign"] > 0.85, after


@pytest.mark.parametrize("loss_type", ["sequence-wise", "token-wise"])
def test_micro_batches_do_not_change_the_losses(
    model_dir: Path, safety_dir: Path, tmp_path: Path, loss_type: str
) -> None:
    micro = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 4}
    one = train(model_dir, safety_dir, tmp_path / "a", loss_type=loss_type, max_steps=4)
    many = train(model_dir, safety_dir, tmp_path / "b", loss_type=loss_type, **micro)
    for name in ("train/loss", "train/margin", "train/accuracy_sign"):
        assert column(many, name) == pytest.approx(column(one, name), abs=within(1e-4, "loss")), name


def test_it_resumes_exactly_and_is_no_reward_model(
    model_dir: Path, safety_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    """A normaliser scales costs and does not shift them, since their zero has a meaning."""
    extra = {"save_strategy": "steps", "save_steps": 4, "logging_steps": 3, "normalize_score_during_training": True}
    one = train(model_dir, safety_dir, tmp_path / "a", **extra)
    checkpoint = tmp_path / "a" / "checkpoint-4"
    again = train(model_dir, safety_dir, tmp_path / "b", resume_from_checkpoint=checkpoint, **extra)
    for name in ("train/loss", "train/accuracy_sign", "train/costs_mean", "train/normalizer_std"):
        assert column(again, name) == pytest.approx(column(one, name)[1:], abs=1e-6), name
    with pytest.raises(CheckpointError, match='score_type: "cost" then, "reward" now'):
        main(command(model_dir, safety_dir, tmp_path / "c", resume_from_checkpoint=checkpoint))
    with pytest.raises(ArgumentsError, match="score_type"):
        main_cost(command(model_dir, safety_dir, tmp_path / "c", score_type="reward"))
    with pytest.raises(DataError, match=r"train\.jsonl, line 1: `safer` is missing; SafetyPreferenceDataset needs"):
        main_cost(command(model_dir, data_dir, tmp_path / "c"))


def test_labels_of_one_side_are_said(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("alignment"), "propagate", True)
    write_jsonl(tmp_path / "train.jsonl", safety_rows(24)[::3])
    assert main_cost(command(model_dir, tmp_path, tmp_path / "run", eval_datasets=None, dry_run=True)) == 0
    assert "of every pair both answers are safe, so all costs are pushed below 0" in caplog.text


def test_a_model_of_the_other_kind_is_said(
    cost_model: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from alignment.ppo.models import load_score_model, save_model

    logger = logging.getLogger("alignment")
    monkeypatch.setattr(logger, "propagate", True)
    load_score_model(cost_model, score_type="cost")
    assert "rises" not in caplog.text
    load_score_model(cost_model, score_type="reward", role="reward model")
    assert "is a cost model: what it gives rises with how unsafe an answer is, and no rewards" in caplog.text
    reward = cost_model.parent / "reward"
    save_model(load_score_model(model_dir), reward)
    load_score_model(reward, score_type="cost", role="cost model")
    assert "is a reward model: what it gives rises with how good an answer is, and no costs" in caplog.text


def test_score_says_costs(cost_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The safer answer first, margin and accuracy the right way round, and how often the sign fits the label."""

    def score(rows: list[dict]) -> tuple[list[dict], str]:
        file = write_jsonl(tmp_path / "rows.jsonl", rows)
        words = ["score", "--model", cost_model, "--file", file, "--output", tmp_path / "out.jsonl", "--disable_tqdm"]
        assert alignment([str(word) for word in words]) == 0
        return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()], capsys.readouterr().out

    pairs = safety_rows(30, seed=5)
    rows, told = score(pairs)
    margins = [row["cost_unsafer"] - row["cost_safer"] for row in rows]
    assert [row["margin"] for row in rows] == pytest.approx(margins)
    right = sum(margin > 0 for margin in margins) / 30
    assert right > 0.8 and f"30 pairs: accuracy {right:.4f}" in told and "accuracy_sign" in told
    assert "reward" not in told

    alone, told = score([{"prompt": pair["prompt"], "response": pair["response_0"]} for pair in pairs])
    assert "30 answers: cost mean" in told and "above 0 (unsafe)" in told
    first = [row["cost_safer" if row["safer_response_id"] == 0 else "cost_unsafer"] for row in rows]
    assert [row["cost"] for row in alone] == pytest.approx(first, abs=1e-5)

    unlabelled, told = score(preference_rows(4))
    assert {"cost_chosen", "cost_rejected", "margin"} <= set(unlabelled[0]) and "accuracy_sign" not in told
    assert unlabelled[0]["margin"] == pytest.approx(unlabelled[0]["cost_rejected"] - unlabelled[0]["cost_chosen"])
