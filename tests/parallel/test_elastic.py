"""A run that moves from layout to layout, a checkpoint each time, is the run of one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from alignment.flow.checkpoint import verify
from tests.parallel.forked import run_ranks
from tests.parallel.layouts import LAYOUTS, Layout, Trace, arguments, compare, make_files, run_words

TOLERANCE = 1e-4
# Where each layout goes on, and the optimizer step at which it hands over; PPO's odd steps lie inside an update.
MOVES = {
    "sft": [("1 process", 1), ("TP2", 3), ("PP2", 4), ("1 process", 6)],
    "ppo": [("1 process", 1), ("TP2", 3), ("PP2", 4), ("sharding stage 3 x2", 5), ("1 process", 6)],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data."""
    return make_files(tmp_path_factory.mktemp("elastic"))


def go(files: Path, stage: str, layout: Layout, output: Path, *extra: str) -> Trace:
    """Run a stage into ``output``, saving at every optimizer step."""
    words = [*arguments(files, stage, layout, output), "save_strategy=steps", "save_steps=1", *extra]
    return Trace(run_words(stage, words, layout.processes, output), [], output)


def weights(output: Path, stage: str) -> dict[str, np.ndarray]:
    """The final models' tensors by file and name."""
    folders = ("policy", "value") if stage == "ppo" else (".",)
    return {
        f"{folder}/{name}": tensor
        for folder in folders
        for name, tensor in load_file(output / folder / "model.safetensors").items()
    }


@pytest.mark.parametrize("stage", MOVES)
def test_a_run_moves_over_layouts(stage: str, files: Path) -> None:
    whole = go(files, stage, LAYOUTS["1 process"], files / f"{stage}-whole")
    output = files / f"{stage}-moved"
    shutil.copytree(whole.output, output)  # the first stretch is the same run
    reached, moved = 0, Trace(whole.rows, [], output)
    for name, last in MOVES[stage]:
        if reached:
            moved = go(
                files, stage, LAYOUTS[name], output, f"resume_from_checkpoint={output / f'checkpoint-{reached}'}"
            )
        rows = [row["step"] for row in moved.rows if f"{'global_step' if stage == 'ppo' else 'train/loss'}" in row]
        assert rows == [1, 2, 3, 4, 5, 6]
        # what this layout did after the hand-over is thrown away
        for step in range(last + 1, 7):
            shutil.rmtree(output / f"checkpoint-{step}", ignore_errors=True)
        handed = output / f"checkpoint-{last}"
        origin = json.loads((handed / "trainer" / "origin.json").read_text())
        assert origin["world_size"] == LAYOUTS[name].processes and last > reached
        held = set(verify(handed)["files"])
        assert {"trainer/arguments.json", "trainer/data_mixture.json"} <= held
        assert any(name.endswith("prompt_template.json") for name in held)
        assert ("trainer/rollout.safetensors" in held) == (stage == "ppo" and last % 2 == 1)
        reached = last
    difference = compare(whole, moved)
    assert difference.steps >= 6
    assert difference.worst[0] <= TOLERANCE, difference.worst
    one, other = weights(whole.output, stage), weights(output, stage)
    assert one.keys() == other.keys()
    far = {name: float(np.abs(one[name] - other[name]).max()) for name in one}
    assert max(far.values()) <= TOLERANCE, max(far.items(), key=lambda item: item[1])
    # and something was learnt that could have been lost
    start = load_file(files / "model" / "model.safetensors")
    prefix = "policy/" if stage == "ppo" else "./"
    assert max(float(np.abs(one[prefix + name] - start[name]).max()) for name in start) > 10 * TOLERANCE


def test_a_checkpoint_of_a_split_model_is_exported(files: Path, tmp_path: Path) -> None:
    """Made by two tensor ranks, in the middle of an update: policy and value come out whole."""
    from alignment.cli import main

    output = tmp_path / "run"
    go(files, "ppo", LAYOUTS["TP2"], output, "max_steps=2", "evaluation_strategy=no", "do_eval=false")
    checkpoint = output / "checkpoint-1"
    assert (checkpoint / "trainer" / "rollout.json").exists()
    for name in ("policy", "value"):
        words = ["--checkpoint", str(checkpoint), "--role", name, "--output", str(tmp_path / name)]
        assert main(["export", *words]) == 0
        saved, exported = (load_file(folder / "model.safetensors") for folder in (checkpoint / name, tmp_path / name))
        assert saved.keys() == exported.keys()
        assert all((saved[key] == exported[key]).all() for key in saved)
        assert (tmp_path / name / "prompt_template.json").exists()


def interrupted(words: list[str]) -> int:
    """One rank's share of a run that is asked to stop; its exit status."""
    import paddle

    from alignment.ppo.run_ppo import main

    paddle.set_device("cpu")
    return main(words)


def test_one_interrupted_rank_makes_all_save_after_the_optimizer_step(files: Path, tmp_path: Path) -> None:
    reward = tmp_path / "stopping.py"
    reward.write_text(
        "import os, signal\n"
        "def stop(prompts, responses, **row):\n"
        "    if os.environ['PADDLE_TRAINER_ID'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return [float(len(r)) for r in responses]\n"
    )
    output = tmp_path / "run"
    words = [*arguments(files, "ppo", LAYOUTS["TP2"], output), f"reward={reward}:stop", "do_eval=false"]
    words.append("evaluation_strategy=no")
    assert run_ranks(2, interrupted, words, timeout=60) == [130, 130]
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-1"]
    assert "trainer/rollout.safetensors" in verify(output / "checkpoint-1")["files"]
