"""What every method has without code of its own: resume in the middle of an update, offloading, other layouts, early
stopping, samples of each evaluation, a dump where a loss is not finite, ``--dry_run`` and ``--help``.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignment import methods
from alignment.cli import main
from tests.parallel.forked import run_ranks
from tests.parallel.layouts import LAYOUTS, Trace, compare, started
from tests.ppo.conftest import metric_rows
from tests.precision import ARGUMENTS, read_weights
from tests.small_methods import METHODS
from tests.tiny import tiny_model_dir, write_jsonl

ANSWERS = 8  # of a rollout
HALF_WAY = 3  # an optimizer step inside an update: a rollout has four, A2C's two


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, one that judges costs, prompts and a reward."""
    folder = tmp_path_factory.mktemp("methods")
    for seed, name in enumerate(("model", "cost")):
        tiny_model_dir(folder / name, seed=seed, initializer_range=0.1)
    for answers in {method.answers for method in METHODS.values()}:
        prompts = [{"prompt": f"say the word {i}"} for i in range(2 * ANSWERS // answers)]
        write_jsonl(folder / f"prompts_{answers}.jsonl", prompts)
    write_jsonl(folder / "dev.jsonl", [{"prompt": f"say the letter {i}"} for i in range(3)])
    (folder / "rewards.py").write_text(
        "def letters(prompts, responses, **row):\n    return [r.count('e') - 0.05 * len(r) for r in responses]\n"
    )
    return folder


def words(files: Path, method: str, output: Path, ranks: int = 1, **changes: Any) -> list[str]:
    """A command line; the same global batches on any number of data ranks."""
    row = METHODS[method]
    values: dict[str, Any] = {
        "actor_model_name_or_path": files / "model", "reward": f"{files / 'rewards.py'}:letters",
        "train_datasets": f"jsonl::{files}/prompts_{row.answers}.jsonl", "eval_datasets": f"jsonl::{files}/dev.jsonl",
        "output_dir": output, "max_src_len": 48, "max_dec_len": 8, "top_p": 1.0, "max_steps": 6, "learning_rate": 1e-3,
        "per_device_train_batch_size": ANSWERS // 2 // ranks, "lr_scheduler_type": "constant",
        "evaluation_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": HALF_WAY,
        "logging_steps": 1, "report_to": "none", "disable_tqdm": "true", "device": "cpu", "seed": 3, **ARGUMENTS,
    }  # fmt: skip
    given = [f"{key}={value}" for key, value in values.items()]
    return [*given, *row.words(files, ANSWERS // ranks), *(f"{key}={value}" for key, value in changes.items())]


@cache
def whole(files: Path, method: str) -> Path:
    """The folder of a run of one process without interruption."""
    output = files / f"{method}-whole"
    assert main([method, *words(files, method, output)]) == 0
    return output


def part(files: Path, method: str, output: Path) -> Path:
    """A copy of the whole run as a kill behind ``HALF_WAY`` would have left it."""
    shutil.copytree(whole(files, method), output)
    for later in output.glob("checkpoint-*"):
        if int(later.name.partition("-")[2]) > HALF_WAY:
            shutil.rmtree(later)
    for model in models(output):
        shutil.rmtree(output / model)
    return output


def models(output: Path) -> list[str]:
    """The folders of the models that a run has left."""
    return sorted(file.parent.name for file in output.glob("*/model.safetensors"))


def timeless(output: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl`` but for what depends on time or memory."""
    passing = ("time", "tokens_per_second", "offload/", "reshard/", "memory")
    return [
        {key: value for key, value in row.items() if not key.startswith(passing) and "second" not in key}
        for row in metric_rows(output)
    ]


def assert_same_bits(one: Path, other: Path) -> None:
    """Metrics, samples, final weights."""
    assert timeless(other) == timeless(one)
    assert (other / "eval_samples.jsonl").read_text() == (one / "eval_samples.jsonl").read_text()
    assert models(one) == models(other) != []
    for model in models(one):
        first, second = read_weights(one / model), read_weights(other / model)
        assert first.keys() == second.keys()
        for name in first:
            np.testing.assert_array_equal(second[name], first[name], err_msg=f"{model}/{name}")


def assert_agrees(one: Path, other: Path) -> None:
    """Metrics within the tolerance of layouts, and the answers of the evaluations word for word."""
    difference = compare(*(Trace(metric_rows(output), [], output) for output in (one, other)))
    assert difference.steps >= 8 and difference.worst[0] <= 1e-4, difference.worst
    answers = [
        [json.loads(line)["response"] for line in (output / "eval_samples.jsonl").read_text().splitlines()]
        for output in (one, other)
    ]
    assert answers[0] == answers[1] != []


def test_every_method_that_answers_prompts_has_its_row() -> None:
    """Of the tables of layouts and kills, and of the cells below."""
    online = {name for name, method in methods.known_methods().items() if method.base == "online"}
    assert online.intersection(methods.BUILT_IN) == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_it_trains_and_shows_what_it_answers(method: str, files: Path) -> None:
    output = whole(files, method)
    rows = metric_rows(output)
    assert [row["step"] for row in rows if "train/actor_loss" in row] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    evaluated = [row["step"] for row in rows if "eval/reward" in row]
    assert evaluated[0] == 0 and evaluated[-1] == 6
    samples = [json.loads(line) for line in (output / "eval_samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [step for step in evaluated for _ in range(2 * 3)]
    assert {sample["mode"] for sample in samples} == {"sampled", "greedy"}
    start, end = read_weights(files / "model"), read_weights(output / "policy")
    assert all(np.abs(end[name] - start[name]).max() > 0 for name in start)


@pytest.mark.parametrize("method", METHODS)
def test_a_resume_in_the_middle_of_an_update_changes_no_bit(method: str, files: Path, tmp_path: Path) -> None:
    output = part(files, method, tmp_path / "run")
    assert (output / f"checkpoint-{HALF_WAY}" / "trainer" / "rollout.json").is_file()
    assert main([method, *words(files, method, output, resume_from_checkpoint="true")]) == 0
    assert_same_bits(whole(files, method), output)


def test_a_run_that_is_killed_behind_its_last_checkpoint_evaluates_nothing_twice(files: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole(files, "ppo"), output)
    for model in models(output):
        shutil.rmtree(output / model)
    assert main(["ppo", *words(files, "ppo", output, resume_from_checkpoint="true")]) == 0
    assert_same_bits(whole(files, "ppo"), output)


@pytest.mark.parametrize("method", METHODS)
def test_offloading_changes_no_bit(method: str, files: Path, tmp_path: Path) -> None:
    levels = "freeze_model optimizer train_model"
    assert main([method, *words(files, method, tmp_path / "run", offload_level=levels, save_strategy="no")]) == 0
    assert_same_bits(whole(files, method), tmp_path / "run")
    rows = metric_rows(tmp_path / "run")
    assert any(value > 0 for row in rows for key, value in row.items() if key.endswith("_bytes_in"))


@pytest.mark.parametrize("method", METHODS)
def test_two_data_ranks_do_the_same(method: str, files: Path, tmp_path: Path) -> None:
    line = words(files, method, tmp_path / "run", ranks=2, save_strategy="no")
    run_ranks(2, started, method, line, timeout=120)
    assert_agrees(whole(files, method), tmp_path / "run")


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_in_the_middle_of_an_update_goes_on_split_by_tensors(
    method: str, files: Path, tmp_path: Path
) -> None:
    output = part(files, method, tmp_path / "run")
    line = [*words(files, method, output, resume_from_checkpoint="true"), *LAYOUTS["TP2"].arguments]
    run_ranks(2, started, method, line, timeout=120)
    assert_agrees(whole(files, method), output)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_gets_no_better_ends_early_and_stays_ended(
    method: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is learnt at a learning rate of 0, so that the greedy answers stay what they are."""
    line = words(
        files, method, tmp_path / "run", learning_rate=0, max_steps=-1, num_train_epochs=9, early_stopping_patience=2,
        evaluation_strategy="epoch", metric_for_best_model="reward_greedy", save_strategy="epoch", logging_steps=100,
    )  # fmt: skip
    assert main([method, *line]) == 0
    told = "early_stopping_patience: reward_greedy has not improved for 2 evaluations"
    assert told in capsys.readouterr().err
    rows = timeless(tmp_path / "run")
    assert [row["epoch"] for row in rows if "eval/reward" in row] == [0, 1, 2, 3], "the second and third are no better"
    assert [row["epoch"] for row in rows if "train/actor_loss" in row] == [3], "what was learnt is written at the end"
    assert main([method, *line, "resume_from_checkpoint=true"]) == 0
    assert told not in capsys.readouterr().err
    assert timeless(tmp_path / "run") == rows


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_not_finite_leaves_its_batch(
    method: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate that is far too high: the second step of an update has weights that overflow."""
    line = words(files, method, tmp_path / "run", learning_rate=1e30, checks="off", do_eval="false")
    assert main([method, *line, "evaluation_strategy=no", "save_strategy=no"]) == 2
    said = capsys.readouterr().err
    assert "became nan in step 2; no weight was changed by it" in said and "Traceback" not in said
    dump = tmp_path / "run" / "nonfinite_batch_step2.npz"
    assert "tokens" in np.load(dump)
    assert "say the word" in json.loads(dump.with_suffix(".json").read_text())["texts"][0][0]


@pytest.mark.parametrize("method", METHODS)
def test_dry_run_and_help(method: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([method, *words(files, method, tmp_path / "run"), "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "optimizer steps per rollout" in shown and "learning_rate" in shown
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert main([method, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{methods.find_method(method).title}: FILE")
    own = getattr(methods.find_method(method), "Keys", None)
    assert all(name in text for name in getattr(own, "__annotations__", {}))
