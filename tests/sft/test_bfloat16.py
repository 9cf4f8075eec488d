"""SFT with ``bf16`` on a CPU, and checkpoints that change their precision."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from alignment import log
from alignment.flow.metrics import read_metrics
from alignment.sft.run_sft import main
from tests.precision import TOLERANCE, read_weights, stored_codes


def command(model: Path, data: Path, out: Path, **changes: Any) -> list[str]:
    values = {
        "model_name_or_path": model,
        "dataset_name_or_path": data,
        "output_dir": out,
        "learning_rate": 5e-3,
        "max_length": 64,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 4,
        "disable_tqdm": True,
        "report_to": "none",
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "max_steps": 8,
        **changes,
    }
    return [f"{key}={json.dumps(value) if isinstance(value, bool) else value}" for key, value in values.items()]


def losses(out: Path) -> list[float]:
    return [row["train/loss"] for row in read_metrics(out)]


def masters(checkpoint: Path) -> dict[str, np.ndarray]:
    """The float32 masters of a checkpoint, by parameter."""
    slots = load_file(str(checkpoint / "trainer" / "optimizer.safetensors"))
    return {key.rsplit("|", 1)[0]: value for key, value in slots.items() if key.endswith("|master_weight")}


@pytest.fixture(scope="module")
def runs(model_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """By ``bf16``: 8 steps, saved at step 4 and 8."""
    out = {bf16: tmp_path_factory.mktemp("precision") / f"bf16-{bf16}" for bf16 in (True, False)}
    for bf16, folder in out.items():
        assert main(command(model_dir, data_dir, folder, bf16=bf16)) == 0
    return out


def test_weights_are_bfloat16_and_masters_float32(runs: dict[bool, Path]) -> None:
    for folder in (runs[True], runs[True] / "checkpoint-4"):
        assert stored_codes(folder) == {"BF16"}
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    kept, weights = masters(runs[True] / "checkpoint-4"), read_weights(runs[True] / "checkpoint-4")
    assert kept.keys() == weights.keys()
    differing = 0.0
    for name, master in kept.items():
        assert master.dtype == np.float32
        assert np.abs(master - weights[name]).max() <= np.abs(weights[name]).max() * 2**-8, "the nearest number"
        differing += (master != weights[name]).mean() / len(kept)
    assert differing > 0.9, "masters keep what the weights cannot hold"
    assert stored_codes(runs[False]) == {"F32"} and masters(runs[False] / "checkpoint-4") == {}


def test_it_learns_as_in_float32(runs: dict[bool, Path]) -> None:
    assert losses(runs[True]) == pytest.approx(losses(runs[False]), abs=TOLERANCE["loss"])
    assert losses(runs[True]) != losses(runs[False])
    assert losses(runs[True])[-1] < losses(runs[True])[0] - 1


def resumed(source: Path, out: Path, model: Path, data: Path, **changes: Any) -> Path:
    shutil.copytree(source, out)
    shutil.rmtree(out / "checkpoint-8")
    assert main(command(model, data, out, resume_from_checkpoint=True, **changes)) == 0
    return out


def test_resume_is_bit_exact(runs: dict[bool, Path], model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    out = resumed(runs[True], tmp_path / "run", model_dir, data_dir, bf16=True)
    assert losses(out) == losses(runs[True])
    for name, value in read_weights(runs[True]).items():
        np.testing.assert_array_equal(read_weights(out)[name], value, err_msg=name)
    for name, value in masters(runs[True] / "checkpoint-8").items():
        np.testing.assert_array_equal(masters(out / "checkpoint-8")[name], value, err_msg=name)


@pytest.mark.parametrize("after", [True, False])
def test_a_checkpoint_may_change_its_precision(
    runs: dict[bool, Path],
    after: bool,
    model_dir: Path,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A18: float32 -> bfloat16 was refused, bfloat16 -> float32 dropped the masters without a word."""
    monkeypatch.setattr(log, "_SAID", set())
    # with a rate of 0 the weights stay what the change has made of them
    out = resumed(
        runs[not after],
        tmp_path / "run",
        model_dir,
        data_dir,
        bf16=after,
        learning_rate=0.0,
        lr_scheduler_type="constant",
    )
    before = runs[not after] / "checkpoint-4"
    text = caplog.text
    if after:
        assert text.count("its weights are the float32 masters") == 1
        wide, kept = read_weights(before), masters(out / "checkpoint-8")
        for name, value in wide.items():
            np.testing.assert_array_equal(kept[name], value, err_msg=name)
        assert stored_codes(out) == {"BF16"}
    else:
        assert text.count("its float32 masters are the weights now") == 1
        for name, value in masters(before).items():
            np.testing.assert_array_equal(read_weights(out)[name], value, err_msg=name)
        assert stored_codes(out) == {"F32"}
    assert losses(out)[4] == pytest.approx(losses(runs[not after])[4], abs=TOLERANCE["loss"])
