"""SFT through its runner: it learns, packs, resumes, stops and explains itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from alignment.errors import AlignmentError, ArgumentsError, CheckpointError, DataError, NonFiniteError
from alignment.flow.checkpoint import CheckpointStore, verify
from alignment.flow.metrics import read_metrics
from alignment.sft.run_sft import main
from tests.precision import ARGUMENTS, read_weights, within
from tests.tiny import copy_rows, tiny_model_dir, write_jsonl

COMMON = {
    "learning_rate": 5e-3,
    "max_length": 64,
    "src_length": 48,
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
    values = {"model_name_or_path": model, "dataset_name_or_path": data, "output_dir": out, **COMMON, **changes}
    return [
        f"{key}={json.dumps(value) if isinstance(value, (bool, list, dict)) else value}"
        for key, value in values.items()
    ]


def train(model: Path, data: Path, out: Path, **changes: object) -> list[dict]:
    assert main(command(model, data, out, **changes)) == 0
    return read_metrics(out)


def losses(rows: list[dict]) -> list[float]:
    return [row["train/loss"] for row in rows if "train/loss" in row]


def weights(folder: Path) -> dict[str, np.ndarray]:
    return read_weights(folder)


@pytest.fixture(scope="module")
def reference(model_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 8 steps that saved at step 4 and 8."""
    out = tmp_path_factory.mktemp("reference") / "run"
    train(model_dir, data_dir, out, save_strategy="steps", save_steps=4)
    return out


def test_it_learns_and_leaves_everything_behind(model_dir: Path, data_dir: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    rows = train(
        model_dir,
        data_dir,
        out,
        max_steps=-1,
        num_train_epochs=16,
        learning_rate=2e-2,
        adam_beta2=0.95,
        evaluation_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        report_to="visualdl",
    )
    seen = losses(rows)
    assert len(seen) == 192
    assert seen[0] > 5
    evaluations = [row for row in rows if "eval/loss" in row]
    assert [row["step"] for row in evaluations] == list(range(0, 193, 12)), "P16: before the first step too"
    last = evaluations[-1]
    # Knowing the eight words but not which one the prompt names gives 0.65.
    assert last["eval/loss"] < within(0.3, "learnt loss") and last["eval/accuracy"] > within(0.9, "learnt accuracy")
    assert last["eval/perplexity"] == pytest.approx(np.exp(last["eval/loss"]), rel=1e-5)

    for name in (
        "model.safetensors",
        "config.json",
        "tokenizer_config.json",
        "vocab.json",
        "prompt_template.json",
        "arguments.json",
        "data_mixture.json",
        "data_summary.json",
        "all_results.json",
        "runs",
    ):
        assert (out / name).exists(), name
    best = min(evaluations, key=lambda row: row["eval/loss"])["step"]
    assert CheckpointStore(out).steps() == ([180, 192] if best == 192 else [best, 192])
    assert {p.name for p in (out / "checkpoint-192" / "trainer").iterdir()} == {
        "arguments.json",
        "data_mixture.json",
        "optimizer.safetensors",
        "origin.json",
        "trainer_state.json",
    }
    assert all((value == weights(out / "checkpoint-192")[name]).all() for name, value in weights(out).items())
    results = json.loads((out / "all_results.json").read_text())
    assert results["global_step"] == 192 and results["epoch"] == 16.0
    assert results["eval_loss"] == last["eval/loss"]
    assert results["train_tokens_per_second"] > 0
    samples = [json.loads(line) for line in (out / "eval_samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [row["step"] for row in evaluations for _ in range(24)]
    tokens = [row["answer_tokens"] for row in samples[-24:]]
    mean = sum(row["loss"] * count for row, count in zip(samples[-24:], tokens, strict=True)) / sum(tokens)
    assert mean == pytest.approx(last["eval/loss"], rel=1e-5) and all(row["text"] for row in samples)
    shown = capsys.readouterr().out
    assert "Derived sizes" in shown and "train (supervised)" in shown

    from paddlenlp.transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(str(out)).config.hidden_size == 32


@pytest.mark.parametrize(("micro", "accumulation"), [(2, 4), (3, 3)])
def test_micro_batches_do_not_change_the_losses(
    model_dir: Path, data_dir: Path, tmp_path: Path, micro: int, accumulation: int
) -> None:
    whole = micro * accumulation
    one = train(model_dir, data_dir, tmp_path / "a", per_device_train_batch_size=whole, max_steps=6)
    many = train(
        model_dir,
        data_dir,
        tmp_path / "b",
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        max_steps=6,
    )
    assert losses(many) == pytest.approx(losses(one), abs=within(1e-5, "loss"))
    norms = [[row["train/grad_norm"] for row in rows] for rows in (one, many)]
    assert norms[1] == pytest.approx(norms[0], rel=within(1e-4, "gradient"))


@pytest.mark.parametrize("packed", [False, True])
def test_a_budget_of_tokens_does_not_change_the_losses(
    model_dir: Path, data_dir: Path, tmp_path: Path, packed: bool
) -> None:
    extra = {"max_steps": 4, "zero_padding": packed, "evaluation_strategy": "steps", "eval_steps": 4}
    one = train(model_dir, data_dir, tmp_path / "a", **extra)
    many = train(model_dir, data_dir, tmp_path / "b", max_tokens_per_micro_batch=90, **extra)
    assert losses(many) == pytest.approx(losses(one), abs=within(1e-5, "loss"))
    found = [[row["eval/loss"] for row in rows if "eval/loss" in row] for rows in (one, many)]
    assert found[0] and found[1] == pytest.approx(found[0], abs=within(1e-5, "loss"))


def test_logging_several_steps_at_once_averages_them(
    reference: Path, model_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    single = losses(read_metrics(reference))
    together = losses(train(model_dir, data_dir, tmp_path / "run", logging_steps=3))
    assert together == pytest.approx([np.mean(single[:3]), np.mean(single[3:6]), np.mean(single[6:])], rel=1e-6)


def test_resume_continues_exactly(reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    shutil.rmtree(out / "checkpoint-8")
    arguments = json.loads((reference / "checkpoint-4" / "trainer" / "arguments.json").read_text())
    arguments.update(output_dir=str(out), resume_from_checkpoint=True)
    (tmp_path / "again.json").write_text(json.dumps(arguments))
    assert main([str(tmp_path / "again.json")]) == 0
    before, after = read_metrics(reference), read_metrics(out)
    assert [row["step"] for row in after] == list(range(1, 9))
    assert losses(after) == pytest.approx(losses(before), abs=1e-6)
    assert after[6]["train/learning_rate"] == before[6]["train/learning_rate"]
    expected = weights(reference)
    assert all((value == expected[name]).all() for name, value in weights(out).items())


def test_a_resume_whose_data_changed_is_refused(model_dir: Path, tmp_path: Path) -> None:
    """D11: 16 rows exchanged for 16 others, and the run went on from step 2 as if nothing had happened."""
    data, out = tmp_path / "data", tmp_path / "run"
    write_jsonl(data / "train.json", copy_rows(16))
    how = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "resume_from_checkpoint": True}
    train(model_dir, data, out, **how)
    shutil.rmtree(out / "checkpoint-4")
    write_jsonl(data / "train.json", copy_rows(16, seed=9))
    before = sorted(out.rglob("*"))
    with pytest.raises(
        CheckpointError, match=r"other rows .*\n  train \(.*16 token rows with hash \w{8} then, 16 with"
    ):
        main(command(model_dir, data, out, **how))
    assert (out / "checkpoint-2").is_dir() and [file for file in before if not file.exists()] == []
    write_jsonl(data / "train.json", copy_rows(16))
    train(model_dir, data, out, **how)
    assert (out / "checkpoint-4").is_dir()


def test_resume_skips_a_damaged_checkpoint(reference: Path, model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    file = out / "checkpoint-8" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    train(model_dir, data_dir, out, resume_from_checkpoint=True, save_strategy="steps", save_steps=4)
    assert losses(read_metrics(out)) == pytest.approx(losses(read_metrics(reference)), abs=1e-6)
    verify(out / "checkpoint-8")
    with pytest.raises(CheckpointError, match="8 rows per optimizer step, this one has 4"):
        main(command(model_dir, data_dir, out, resume_from_checkpoint=True, per_device_train_batch_size=4))


def test_an_earlier_run_is_not_overwritten_by_accident(
    reference: Path, model_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    with pytest.raises(ArgumentsError, match="overwrite_output_dir=true"):
        main(command(model_dir, data_dir, out))
    train(model_dir, data_dir, out, overwrite_output_dir=True, max_steps=2)
    assert CheckpointStore(out).steps() == []
    assert len(read_metrics(out)) == 2


def test_eval_on_start_can_be_left_out(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    """P16: evaluation before the first step is a key of all stages."""
    rows = train(model_dir, data_dir, tmp_path / "run", do_eval=True, eval_on_start=False, max_steps=2)
    assert [row["step"] for row in rows if "eval/loss" in row] == [2]


def test_the_best_model_is_the_final_one(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    rows = train(
        model_dir,
        data_dir,
        out,
        evaluation_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    evaluations = {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row and row["step"]}
    # The loss falls, so with greater_is_better the first one evaluated is the "best".
    best = max(evaluations, key=evaluations.get)
    assert best == 2
    assert CheckpointStore(out).steps() == [best, 8]
    final, kept = weights(out), weights(out / f"checkpoint-{best}")
    assert all((value == kept[name]).all() for name, value in final.items())
    results = json.loads((out / "all_results.json").read_text())
    assert results["best_step"] == best and results["eval_loss"] == evaluations[best]


def test_offloading_changes_no_bit(model_dir: Path, data_dir: Path, reference: Path, tmp_path: Path) -> None:
    out, offload = tmp_path / "run", tmp_path / "offload"
    rows = train(
        model_dir,
        data_dir,
        out,
        save_strategy="steps",
        save_steps=4,
        evaluation_strategy="steps",
        eval_steps=4,
        offload_level="optimizer train_model",
        offload_dir=offload,
    )
    assert any(row.get("offload/evaluation_bytes_out", 0) > 0 for row in rows), "evaluation needs no optimizer"
    assert all((value == weights(out)[name]).all() for name, value in weights(reference).items())


def test_a_run_ends_when_it_has_not_improved(
    model_dir: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """early_stopping_patience: the rate is 0, so no evaluation is better than the first."""
    out = tmp_path / "run"
    changes = {"learning_rate": 0.0, "max_steps": 100, "evaluation_strategy": "steps", "eval_steps": 2}
    changes |= {"early_stopping_patience": 3, "checks": "off", "logging_steps": 5}
    rows = train(model_dir, data_dir, out, **changes)
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 2, 4, 6, 8]
    assert [row["step"] for row in rows if "train/loss" in row] == [5, 8], "what waited for a row is written"
    said = capsys.readouterr().err
    assert "early_stopping_patience: loss has not improved for 3 evaluations" in said and "step 8 of 100" in said
    assert (out / "model.safetensors").exists()


@pytest.mark.parametrize("greedy", [False, True])
def test_packed_loss_is_the_unpacked_loss(model_dir: Path, data_dir: Path, greedy: bool) -> None:
    from alignment.engine.engine import Engine
    from alignment.methods.sft import SFT
    from alignment.parallel import World
    from alignment.ppo.data import SupervisedDataset, pack_supervised
    from alignment.ppo.models import load_causal_lm, load_tokenizer

    tokenizer = load_tokenizer(model_dir)
    rows = list(SupervisedDataset({"jsonl": {"path": str(data_dir / "dev.json")}}, tokenizer, show_progress=False))[:10]
    engine = Engine("model", load_causal_lm(model_dir), World())

    def method(**changes: Any) -> SFT:
        usual = {"zero_padding": False, "pad_to_max_length": False, "max_length": 70, "pad_to_multiple_of": None}
        made = SFT(SimpleNamespace(**{**usual, **changes}))
        made.engine, made.tokenizer = engine, tokenizer
        return made

    plain, packed = method(), method(zero_padding=True)
    packs = pack_supervised(rows, 150, greedy=greedy)
    assert len(packs) < len(rows) / 2
    first, second = plain.collate(rows), packed.collate(packs)
    assert plain.count(first) == packed.count(second) > 20

    def loss_of(stage: SFT, batch: dict) -> tuple:
        return engine.infer_pass([batch], stage.rows, stage.loss)[0]

    loss, stats = loss_of(plain, first)
    packed_loss, packed_stats = loss_of(packed, second)
    assert float(packed_loss) == pytest.approx(float(loss), rel=1e-5)
    assert packed_stats["correct"] == stats["correct"]

    wider = method(pad_to_max_length=True, pad_to_multiple_of=16)
    batch = wider.collate(rows)
    assert batch["input_ids"].shape[1] == 80 and float(loss_of(wider, batch)[0]) == pytest.approx(float(loss), rel=1e-5)


def test_zero_padding_trains(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    rows = train(
        model_dir,
        data_dir,
        tmp_path / "run",
        zero_padding=True,
        greedy_zero_padding=True,
        max_length=128,
        per_device_train_batch_size=2,
        num_train_epochs=4,
        max_steps=-1,
        evaluation_strategy="epoch",
        learning_rate=1e-2,
    )
    assert losses(rows)[-1] < 2.0 < losses(rows)[0]
    assert [row["eval/loss"] for row in rows if "eval/loss" in row][-1] < 2.0


def test_lora_trains_and_resumes(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    rows = train(
        model_dir, data_dir, out, lora=True, lora_rank=4, learning_rate=2e-2, save_strategy="steps", save_steps=4
    )
    assert losses(rows)[-1] < losses(rows)[0] - 0.1
    assert (out / "lora_config.json").exists() and not (out / "model.safetensors").exists()
    again = tmp_path / "again"
    resumed = train(
        model_dir,
        data_dir,
        again,
        lora=True,
        lora_rank=4,
        learning_rate=2e-2,
        save_strategy="no",
        resume_from_checkpoint=out / "checkpoint-4",
    )
    assert losses(resumed) == pytest.approx(losses(rows)[4:], abs=1e-6)


def test_recompute_changes_nothing(reference: Path, model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    rows = train(model_dir, data_dir, tmp_path / "run", recompute=True, max_steps=8)
    assert losses(rows) == pytest.approx(losses(read_metrics(reference)), abs=within(1e-5, "loss"))


def test_a_nan_loss_stops_and_keeps_the_batch(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(NonFiniteError, match=r"nonfinite_batch_step\d+\.npz") as caught:
        main(command(model_dir, data_dir, out, learning_rate=1e25, max_grad_norm=0))
    (file,) = out.glob("nonfinite_batch_step*.npz")
    assert str(file) in str(caught.value)
    arrays = np.load(file)
    assert set(arrays) == {"input_ids", "labels", "lengths"} and arrays["input_ids"].shape[0] == 8
    readable = json.loads(file.with_suffix(".json").read_text())
    assert len(readable["texts"][0]) == 8 and "ASSISTANT:" in readable["texts"][0][0]


def test_dry_run_loads_and_writes_nothing(model_dir: Path, data_dir: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    assert main(command(model_dir, data_dir, out, dry_run=True, data_cache_dir=tmp_path / "cache")) == 0
    shown = capsys.readouterr().out
    assert "learning_rate" in shown and "rows per optimizer step" in shown
    assert not out.exists()


def test_evaluation_only(reference: Path, data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(command(reference, data_dir, out, do_train=False, do_eval=True)) == 0
    results = json.loads((out / "all_results.json").read_text())
    assert 1.0 < results["eval_perplexity"] < 300 and "train_loss" not in results


def test_eval_split_ratio(model_dir: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "all.jsonl", copy_rows(60))
    rows = train(model_dir, file, tmp_path / "run", evaluation_strategy="steps", eval_steps=4, eval_split_ratio=0.2)
    assert any("eval/loss" in row for row in rows)
    summary = json.loads((tmp_path / "run" / "data_summary.json").read_text())
    assert summary["train"]["kept"] > 3 * summary["eval"]["kept"] > 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {
                "metric_for_best_model": "rouge",
                "load_best_model_at_end": True,
                "evaluation_strategy": "steps",
                "save_strategy": "steps",
                "save_steps": 1,
                "eval_steps": 1,
            },
            ArgumentsError,
            "metric_for_best_model rouge.*perplexity",
        ),
        ({"max_length": 4096, "src_length": 100}, ArgumentsError, "context of 512"),
        ({"model_name_or_path": "/nowhere/model"}, AlignmentError, "/nowhere/model"),
        ({"prompt_template": "{{ oops"}, DataError, "template"),
        ({"lr_scheduler_type": "cosin"}, ArgumentsError, "cosine"),
    ],
)
def test_mistakes_are_explained(
    model_dir: Path, data_dir: Path, tmp_path: Path, changes: dict, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        main(command(model_dir, data_dir, tmp_path / "run", **changes))


def test_another_template_than_the_models_is_refused(reference: Path, data_dir: Path, tmp_path: Path) -> None:
    other = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    with pytest.raises(DataError, match="prompt templates differ.*allow_template_mismatch"):
        main(command(reference, data_dir, tmp_path / "run", prompt_template=other))
    train(reference, data_dir, tmp_path / "run", prompt_template=other, allow_template_mismatch=True, max_steps=1)


def test_real_gsm8k(shared_data: Path, tmp_path: Path) -> None:
    model = tiny_model_dir(tmp_path / "model", "llama")
    rows = train(
        model,
        f"gsm8k/train:48/-1:{shared_data / 'gsm8k_train.jsonl.gz'}",
        tmp_path / "run",
        max_length=512,
        src_length=384,
        per_device_train_batch_size=4,
        max_steps=6,
        eval_split_ratio=0.2,
        evaluation_strategy="steps",
        eval_steps=6,
    )
    assert losses(rows)[-1] < losses(rows)[0] - 0.5
    assert rows[-1]["eval/perplexity"] < 300


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PADDLE_")}
    root = str(Path(__file__).resolve().parents[2])
    return {**kept, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


def test_ctrl_c_saves_and_says_how_to_resume(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = command(model_dir, data_dir, out, max_steps=100000)
    process = subprocess.Popen(
        [sys.executable, "-m", "alignment", "sft", *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert time.monotonic() < deadline and process.poll() is None, "the run did not start"
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 130, shown
    path = CheckpointStore(out).latest()
    assert path is not None and f"saved {path}; go on with:" in shown
    assert f"-m alignment sft model_name_or_path={model_dir}" in shown and "resume_from_checkpoint=true" in shown
    done = int(path.name.removeprefix("checkpoint-"))
    assert json.loads((path / "trainer" / "trainer_state.json").read_text())["global_step"] == done
    rows = train(model_dir, data_dir, out, resume_from_checkpoint=True, max_steps=done + 2)
    assert [row["step"] for row in rows if "train/loss" in row][-2:] == [done + 1, done + 2]


def test_two_processes_give_the_losses_of_one(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    settings = {"evaluation_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    # 96 rows in steps of 10: the last step of an epoch has 6, so that the ranks' shares are uneven too.
    one = train(model_dir, data_dir, tmp_path / "one", per_device_train_batch_size=10, max_steps=12, **settings)
    script = Path(__file__).resolve().parents[2] / "alignment" / "sft" / "run_sft.py"
    finished = subprocess.run(
        [
            sys.executable,
            "-m",
            "paddle.distributed.launch",
            "--nproc_per_node",
            "2",
            "--log_dir",
            str(tmp_path / "log"),
            script.name,
            *command(model_dir, data_dir, tmp_path / "two", per_device_train_batch_size=5, max_steps=12, **settings),
        ],
        cwd=script.parent,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert finished.returncode == 0, (tmp_path / "log" / "workerlog.0").read_text()[-3000:]
    two = read_metrics(tmp_path / "two")
    assert losses(two) == pytest.approx(losses(one), abs=within(1e-4, "loss"))
    assert [r["eval/loss"] for r in two if "eval/loss" in r] == pytest.approx(
        [r["eval/loss"] for r in one if "eval/loss" in r], abs=within(1e-4, "loss")
    )
    assert CheckpointStore(tmp_path / "two").steps() == [4, 8, 12]
    # One process goes on from what two have saved.
    shutil.rmtree(tmp_path / "two" / "checkpoint-12")
    more = train(
        model_dir,
        data_dir,
        tmp_path / "two",
        per_device_train_batch_size=10,
        max_steps=12,
        resume_from_checkpoint=True,
        **settings,
    )
    assert losses(more) == pytest.approx(losses(one), abs=within(1e-4, "loss"))


def test_evaluation_shows_its_progress(
    model_dir: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Evaluation of a real model takes minutes: it says how far it is, how fast, and how long it will take."""
    from alignment import tally

    monkeypatch.setattr(tally, "EVERY", 0.0)
    with caplog.at_level("INFO", "alignment"):
        train(model_dir, data_dir, tmp_path / "run", do_eval=True, max_steps=1, per_device_eval_batch_size=8)
    told = [line for line in caplog.messages if line.startswith("evaluation: ")]
    assert [line.split(",")[0] for line in dict.fromkeys(told)][:3] == [
        f"evaluation: {done} of 3 batches" for done in (1, 2, 3)
    ]
    assert all(" batches/s, " in line and line.endswith(" left") for line in told)
