"""Checkpoints in the middle of an update: a run goes on from them bit by bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from alignment.cli import main
from alignment.errors import CheckpointError
from alignment.flow.checkpoint import verify
from alignment.flow.halfway import ARRAYS_FILE, TEXTS_FILE, HalfUsed, load_half_used, save_half_used
from alignment.flow.statistics import Statistics
from alignment.flow.update import Position
from alignment.rollout.rollout import Experience

from .conftest import make_rollout

# 8 prompts x 2 answers, 4 rows a step, 2 passes: 8 steps a rollout. Rows, evaluations and saves fall in between.
RUN: dict[str, Any] = {
    "num_return_sequences": 2, "max_steps": 19, "save_strategy": "steps", "save_steps": 1, "logging_steps": 3,
    "evaluation_strategy": "steps", "eval_steps": 5, "adaptive_kl": True, "kl_target": 0.1, "kl_horizon": 100,
    "lr_scheduler_type": "cosine",
}  # fmt: skip
# Models, optimizers (their step counts are the schedules' state), controllers and positions, arguments, template, data.
EVERYTHING = {
    *(f"{model}/{name}" for model in ("policy", "value") for name in ("model.safetensors", "prompt_template.json")),
    *(f"trainer/{model}_optimizer.safetensors" for model in ("actor", "critic")),
    *(f"trainer/{name}.json" for name in ("trainer_state", "arguments", "origin", "data_mixture")),
}


def comparable(folder: Path) -> dict[str, Any]:
    """What must be equal: metrics without times, samples, and the bytes of the final weights."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timeless = [{key: value for key, value in row.items() if key != "time" and "second" not in key} for row in rows]
    weights = {name: (folder / name / "model.safetensors").read_bytes() for name in ("policy", "value")}
    return {"metrics": timeless, "samples": (folder / "eval_samples.jsonl").read_text(), **weights}


def assert_equal(one: Path, other: Path) -> None:
    """Bit by bit."""
    first, second = comparable(one), comparable(other)
    assert first["metrics"] == second["metrics"]
    assert [name for name in first if first[name] != second[name]] == []


@pytest.fixture(scope="module")
def kept_runs() -> dict[str, Path]:
    """The uninterrupted run, once."""
    return {}


def uninterrupted(write: Callable[..., Path], tmp_path: Path, kept: dict[str, Path], factory: Any) -> Path:
    """The folder of the uninterrupted run, with a checkpoint of each optimizer step."""
    if not kept:
        assert main(["ppo", str(write("whole", **RUN))]) == 0
        kept["whole"] = Path(shutil.move(tmp_path / "whole", factory.mktemp("kept") / "whole"))
    return kept["whole"]


@pytest.mark.parametrize("step", [1, 8, 10, 18])
def test_a_run_goes_on_from_any_optimizer_step(
    step: int, ppo_json: Callable[..., Path], tmp_path: Path, kept_runs: dict[str, Path], tmp_path_factory: Any
) -> None:
    whole, parts = uninterrupted(ppo_json, tmp_path, kept_runs, tmp_path_factory), tmp_path / "parts"
    shutil.copytree(whole, parts, ignore=lambda _, names: [name for name in names if name.startswith("checkpoint-")])
    shutil.copytree(whole / f"checkpoint-{step}", parts / f"checkpoint-{step}")
    files = set(verify(parts / f"checkpoint-{step}")["files"])
    assert files >= EVERYTHING
    half = {f"trainer/{name}" for name in (TEXTS_FILE, ARRAYS_FILE)}
    assert half & files == (half if step % 8 else set())
    assert main(["ppo", str(ppo_json("parts", **RUN)), "resume_from_checkpoint=true"]) == 0
    assert_equal(whole, parts)
    for later in range(step + 1, 19):
        trainers = [folder / f"checkpoint-{later}" / "trainer" for folder in (whole, parts)]
        states = [json.loads((trainer / "trainer_state.json").read_text()) for trainer in trainers]
        for state in states:
            timer = state.pop("timer")
            assert set(timer) == {"seconds", "tokens"} and all(value >= 0 for value in timer["seconds"].values())
        assert states[0] == states[1]


def test_offloading_may_begin_in_the_middle_of_an_update(
    ppo_json: Callable[..., Path], tmp_path: Path, kept_runs: dict[str, Path], tmp_path_factory: Any
) -> None:
    whole, parts = uninterrupted(ppo_json, tmp_path, kept_runs, tmp_path_factory), tmp_path / "parts"
    shutil.copytree(whole, parts, ignore=lambda _, names: [name for name in names if name.startswith("checkpoint-")])
    shutil.copytree(whole / "checkpoint-10", parts / "checkpoint-10")
    changes = {**RUN, "offload_level": "freeze_model optimizer train_model", "offload_dir": str(tmp_path / "offload")}
    assert main(["ppo", str(ppo_json("parts", **changes)), "resume_from_checkpoint=true"]) == 0
    rows = {folder: comparable(folder)["metrics"] for folder in (whole, parts)}
    assert any(key.startswith("offload/") for row in rows[parts] for key in row)
    for row in rows[parts]:
        for key in [key for key in row if key.startswith("offload/")]:
            del row[key]
    assert rows[parts] == rows[whole]
    for name in ("policy", "value"):
        one, other = ((folder / name / "model.safetensors").read_bytes() for folder in (whole, parts))
        assert one == other


def test_ctrl_c_saves_after_the_optimizer_step(
    ppo_json: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = tmp_path / "stopping.py"
    reward.write_text(
        "import os, signal\n"
        "def stop(prompts, responses, **row):\n"
        "    if os.path.exists(os.environ.get('STOP_NOW', '')):\n"
        "        os.unlink(os.environ['STOP_NOW'])\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return [float(len(r) % 5) for r in responses]\n"
    )
    changes = {**RUN, "save_strategy": "no", "reward": f"{reward}:stop", "logging_steps": 1, "eval_steps": 100}
    assert main(["ppo", str(ppo_json("whole", **changes))]) == 0
    flag = tmp_path / "now"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STOP_NOW", str(flag))
        flag.touch()
        # the first evaluation asks the reward twice; it must be a rollout's turn
        file = ppo_json("parts", do_eval=False, **changes)
        assert main(["ppo", str(file)]) == 130
    parts = tmp_path / "parts"
    assert [path.name for path in parts.glob("checkpoint-*")] == ["checkpoint-1"]
    assert len((parts / "metrics.jsonl").read_text().splitlines()) == 1, "the unfinished update's row is there"
    assert "resume_from_checkpoint=true" in capsys.readouterr().err
    assert main(["ppo", str(file), "resume_from_checkpoint=true"]) == 0
    rows = {name: comparable_rows(tmp_path / name) for name in ("whole", "parts")}
    assert rows["parts"] == rows["whole"]
    weights = [(tmp_path / name / "policy" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]


def comparable_rows(folder: Path) -> list[dict[str, Any]]:
    """Training rows without times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if key != "time" and "second" not in key}
        for row in rows
        if "train/reward" in row
    ]


def make_half_used() -> HalfUsed:
    """Two rows of figures that cannot be mistaken for each other."""
    rollout = make_rollout([(3, 2), (2, 0)]).add(
        finished=np.array([True, False]),
        prompts=["say \u00fc", "say\nnothing"],
        responses=["\u65e5\u672c", ""],
        rows=[{"want": "a", "score": np.float32(0.5), "on": date(2020, 1, 2)}, {"ids": np.arange(3)}],
    )
    rollout = rollout.add(
        "response", sampler_logprobs=rollout.logprobs + 0.5, action_mask=np.array([[1, 0], [1, 1]]) > 0
    )
    draw = np.random.default_rng(0)
    names = ("logprobs", "ref_logprobs", "values", "kl", "rewards", "advantages", "returns")
    figures = {name: draw.normal(size=(2, 2)).astype(np.float32) for name in names}
    figures |= {name: draw.normal(size=2).astype(np.float32) for name in ("scores", "shaped_scores")}
    experience = Experience(rollout, score_parts={"a/b|c": figures["scores"] + 1}, **figures)
    stats, row = Statistics(), Statistics()
    stats.add("train/reward", 1 / 3, 2)
    row.maximum("train/ratio_max", 1.1)
    row.set("train/actor_lr", 1e-3)
    return HalfUsed(experience, Position(1, 4), 7, stats, [(8, row)])


def test_a_half_used_rollout_comes_back_as_it_was(tmp_path: Path) -> None:
    half = make_half_used()
    assert load_half_used(tmp_path) is None
    save_half_used(tmp_path, half)
    back = load_half_used(tmp_path)
    assert back is not None
    assert (back.position, back.first_step, back.figures, back.rows) == (
        half.position, half.first_step, half.figures, half.rows,
    )  # fmt: skip
    assert back.batch.columns.keys() == half.batch.columns.keys()
    for name, column in half.batch.columns.items():
        if column.kind != "list":
            found, value = back.batch[name], half.batch[name]
            assert found.dtype == value.dtype and (found == value).all(), name
    assert (back.batch.score_parts["a/b|c"] == half.batch.score_parts["a/b|c"]).all()
    assert (back.batch.rollout.prompts, back.batch.rollout.responses) == (
        half.batch.rollout.prompts, half.batch.rollout.responses,
    )  # fmt: skip
    assert back.batch.rollout.rows == [{"want": "a", "score": 0.5, "on": "2020-01-02"}, {"ids": [0, 1, 2]}]


def test_one_from_before_the_samplers_logprobs_were_kept_is_read(tmp_path: Path) -> None:
    """They are the policy's log-probs then, which its run used in their place; every token was the policy's."""
    half = make_half_used()
    experience, rollout = half.batch, half.batch.rollout
    rollout = rollout.add("response", rollout_logprobs=rollout.logprobs - 1.5)
    names = ("tokens", "prompt_len", "response_len", "finished", "prompt_index", "sample_index")
    arrays = {f"rollout/{name}": rollout[name] for name in names} | {"rollout/logprobs": rollout.logprobs}
    figures = (
        "logprobs",
        "ref_logprobs",
        "values",
        "kl",
        "rewards",
        "advantages",
        "returns",
        "scores",
        "shaped_scores",
    )
    arrays |= {name: experience[name] for name in figures}
    arrays |= {f"score_parts/{name}": part for name, part in experience.score_parts.items()}
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, tmp_path / ARRAYS_FILE)
    (tmp_path / "now").mkdir()
    save_half_used(tmp_path / "now", half)
    texts = json.loads((tmp_path / "now" / TEXTS_FILE).read_text())
    del texts["kinds"]
    texts |= texts.pop("lists")
    (tmp_path / TEXTS_FILE).write_text(json.dumps(texts))
    back = load_half_used(tmp_path)
    assert back is not None
    assert (back.position, back.first_step, back.figures, back.rows) == (
        half.position, half.first_step, half.figures, half.rows,
    )  # fmt: skip
    read = back.batch
    assert read.columns.keys() == experience.columns.keys()
    for name in figures:
        np.testing.assert_array_equal(read[name], experience[name])
    assert (read.score_parts["a/b|c"] == experience.score_parts["a/b|c"]).all()
    assert read.responses == experience.responses and (read.flat("tokens") == rollout.flat("tokens")).all()
    assert (read.sampler_logprobs == rollout.logprobs).all() and (read.actions == read.mask).all()


@pytest.mark.parametrize("missing", [TEXTS_FILE, ARRAYS_FILE])
def test_a_missing_half_of_it_is_named(tmp_path: Path, missing: str) -> None:
    save_half_used(tmp_path, make_half_used())
    (tmp_path / missing).unlink()
    with pytest.raises(CheckpointError, match="half-used rollout"):
        load_half_used(tmp_path)
