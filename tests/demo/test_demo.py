"""The demo: its data, its gold rule, its argument files, and a run of a few steps through all three stages."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from alignment.arguments import parse_ppo, parse_reward, parse_sft
from alignment.cli import main
from alignment.demo import task
from alignment.demo.run_demo import CONFIG, overrides

RIGHT = ["cat", "dog"]
PERFECT = "The animals are cat and dog. Glad to help!"


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (PERFECT, 1.0),
        ("The animals are dog and cat. Glad to help!", 1.0),
        ("The animals are cat and dog.", 0.75),
        ("The animals are cat. Glad to help!", 0.625),
        ("The animals are cat.", 0.375),
        ("The animals are cat and saw. Glad to help!", 0.25),
        ("The animals are cat and cat. Glad to help!", 0.25),
        ("The animals are cat and dog and saw. Glad to help!", 0.625),
        (f"{PERFECT} Glad to help!", 0.0),
        (f"{PERFECT} Is that all?", 0.0),
        ("The animals are saw. Glad to help!", 0.0),
        ("Glad to help!", 0.0),
        ("", 0.0),
    ],
)
def test_the_gold_rule(answer: str, score: float) -> None:
    assert task.gold_score(answer, "animals", RIGHT) == pytest.approx(score)
    assert task.gold(["?"], [answer], ["animals"], [RIGHT]) == [task.gold_score(answer, "animals", RIGHT)]


def test_data_comes_from_the_seed_and_nothing_held_out_is_trained_on() -> None:
    sizes = task.Sizes(300, 30, 200, 40, 60, 20)
    data = task.make_data(3, sizes)
    assert data == task.make_data(3, sizes)
    assert data != task.make_data(4, sizes)
    assert {name: len(rows) for name, rows in data.items()} == {
        "sft_train": 300, "sft_dev": 30, "preferences_train": 200, "preferences_dev": 40, "prompts_train": 60,
        "prompts_dev": 20,
    }  # fmt: skip

    def prompts(name: str) -> set[str]:
        return {row.get("prompt", row.get("src")) for row in data[name]}

    held_out = prompts("sft_dev") | prompts("preferences_dev") | prompts("prompts_dev")
    assert not held_out & (prompts("sft_train") | prompts("preferences_train") | prompts("prompts_train"))


def test_pairs_follow_the_gold_rule() -> None:
    for row in task.make_data(1, task.Sizes(1, 1, 300, 1, 1, 1))["preferences_train"]:
        scores = [task.gold_score(row[f"response_{i}"], row["kind"], row["right"]) for i in (0, 1)]
        better = row["better_response_id"]
        assert scores[better] - scores[1 - better] >= task.SMALLEST_GAP


def test_people_in_a_hurry_are_mostly_brief() -> None:
    """What they do most often is far from right, so SFT alone leaves room."""
    draw = random.Random(0)
    questions = task.Questions(draw).take(1000)
    scores = [task.gold_score(task.hurried_answer(q, draw), q.kind, q.right) for q in questions]
    assert sum(scores) / 1000 < 0.65
    assert 1.0 in scores


@pytest.mark.parametrize(("name", "parse"), [("sft", parse_sft), ("rm", parse_reward), ("ppo", parse_ppo)])
def test_the_argument_files_parse_and_stand_in_config_too(
    name: str, parse, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`config/demo` is what a checkout shows; the package carries the same files, for `pip install`."""
    own, shown = CONFIG / f"{name}_argument.json", repo / "config" / "demo" / f"{name}_argument.json"
    assert own.read_text() == shown.read_text()
    monkeypatch.chdir(tmp_path)
    assert parse([str(shown)]).seed == json.loads(shown.read_text())["seed"]
    changed = overrides(name, Path("elsewhere"), 7)
    assert parse([str(own), *changed]).output_dir == f"elsewhere/{name}"
    assert not any("checkpoints/demo" in text for text in changed)


def test_a_few_steps_through_all_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--quick", "--output_dir", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "answers to held-out prompts" in printed
    assert "after PPO" in printed
    results = json.loads((out / "results.json").read_text())
    assert set(results["ppo"]) == {"greedy", "sampled"}
    assert 0 <= results["sft"]["greedy"]["gold"] <= 1
    assert results["ppo"]["sampled"]["kl"] >= 0 or abs(results["ppo"]["sampled"]["kl"]) < 1
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    # what the demo leaves is what the argument file of GRPO begins with
    file = Path(__file__).resolve().parents[2] / "config" / "demo" / "grpo_argument.json"
    values = {key: value for key, value in json.loads(file.read_text()).items() if isinstance(value, str)}
    words = [f"{key}={value.replace('checkpoints/demo', str(out))}" for key, value in values.items()]
    assert main(["grpo", str(file), *words, "max_steps=2", "eval_num_samples=4"]) == 0
    assert (out / "grpo" / "policy" / "config.json").is_file()


def test_bad_options_give_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--sed", "1"]) == 2
    (tmp_path / "file").write_text("")
    assert main(["demo", "--prepare_only", "--output_dir", str(tmp_path / "file" / "below")]) == 2
    errors = capsys.readouterr().err
    assert "--sed" in errors and "cannot write" in errors
