"""A user's method in one file outside the package: ReMax written anew, with a reference that follows the actor."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from alignment import methods
from alignment.cli import main
from tests.ppo.conftest import assert_same_metrics, metric_rows
from tests.precision import read_weights

REPO = Path(__file__).resolve().parents[2]

MINE = """
from dataclasses import dataclass, replace

import numpy as np

from alignment.api import (
    ACTOR, REFERENCE, Average, Call, Experience, Flow, OnlineMethod, PolicyOptions, Train, argument, discounted_returns,
    kl_estimate, logprobs, register_method, shape_rewards,
)


@dataclass
class Keys:
    pace: float = argument(0.01, "How much of the actor the reference takes over after each rollout.", gt=0, le=1)


@register_method
class Mine(OnlineMethod):
    name, title, summary = "mine", "Mine", "ReMax whose reference follows the actor"
    Keys = Keys
    presets = {"hasty": {"pace": 0.5}}

    def roles(self):
        return [ACTOR, replace(REFERENCE, folder="reference"), self.reward_model]

    def flow(self):
        rows = ("rollout", "greedy", "logprobs", "ref_logprobs", "scores", "greedy_scores")
        follow = Average("actor", "reference", self.args.pace)
        update = Train({"actor": self.loss})
        return Flow(
            [
                Call("generate", "generate", ("actor",), ("prompts",), "rollout", self.generate),
                Call("greedy_generate", "generate", ("actor",), ("prompts",), "greedy", self.greedily),
                Call("actor_logprobs", "infer", ("actor",), ("rollout",), "logprobs", logprobs),
                Call("reference_logprobs", "infer", ("reference",), ("rollout",), "ref_logprobs", logprobs),
                Call("reward_scores", "infer", ("reward",), ("rollout",), "scores", self.score),
                Call("greedy_reward_scores", "infer", ("reward",), ("greedy",), "greedy_scores", self.score),
                Call("advantages", "host", (), rows, ("experience", "figures"), self.advantages),
                Call("update", "train", ("actor",), ("experience",), "stats", update, after=(follow,)),
            ],
            inputs=("prompts",),
        )

    def greedily(self, actor, prompts):
        return self.answer(prompts, self.sampling.as_greedy())

    def advantages(self, rollout, greedy, logprobs, ref_logprobs, scores, greedy_scores):
        args, mask = self.args, rollout.actions
        shaped = self.shape_scores(rollout, scores.total)
        kl = kl_estimate(logprobs, ref_logprobs, args.kl_estimator) * mask
        rewards = shape_rewards(shaped, kl, rollout.response_len, args.kl_coeff, args.clip_range_score, None, mask)
        of_prompt = dict(zip(greedy.prompt_index.tolist(), greedy_scores.total, strict=True))
        baseline = np.array([of_prompt[prompt] for prompt in rollout.prompt_index.tolist()])
        returns = discounted_returns(rewards, mask, args.gamma)
        columns = {
            "logprobs": logprobs, "ref_logprobs": ref_logprobs, "scores": scores.total, "shaped_scores": shaped,
            "rewards": rewards, "advantages": (returns - baseline[:, None]) * mask,
        }
        columns = {name: column.astype(np.float32) for name, column in columns.items()}
        return self.finish(Experience(rollout, scores.parts, **columns), scores)

    def loss(self, logprobs, entropy, batch, window):
        inputs = self.policy_inputs(logprobs, batch, window, self.policy_options())
        return self.policy_loss("ppo", inputs, entropy, batch, window)
"""

#: A reward that presses Ctrl-C when it scores the second rollout.
STOPPER = """
import os, signal
calls = []
def vowels(prompts, responses, **row):
    calls.append(len(responses))
    if len(calls) == 3 and not os.path.exists({flag!r}):
        open({flag!r}, "w").close()
        os.kill(os.getpid(), signal.SIGINT)
    texts = [r.replace("<|pad|>", "") for r in responses]
    return [sum(c in "aeiou" for c in r) - 0.1 * len(r) for r in texts]
"""


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_REGISTERED", {})


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(MINE)
    return f"{tmp_path / 'mine.py'}:Mine"


def test_it_runs_by_its_file_and_is_remax_where_the_kl_has_no_weight(
    mine: str, online_json: Callable[..., Path], tmp_path: Path
) -> None:
    keys = {"kl_coeff": 0.0, "bf16": False}
    assert main(["remax", str(online_json("theirs", **keys))]) == 0
    assert main(["run", mine, str(online_json("own", **keys))]) == 0
    theirs, own = metric_rows(tmp_path / "theirs"), metric_rows(tmp_path / "own")
    keep = [{key: row[key] for key in mate if key != "train/returns" and key in row}
            for row, mate in zip(own, theirs, strict=True)]  # fmt: skip
    names = [{key: row[key] for key in mate} for row, mate in zip(theirs, keep, strict=True)]
    assert "train/actor_loss" in names[0]
    assert_same_metrics(names, keep, 1e-6)


def test_the_reference_is_the_moving_average(
    mine: str, online_json: Callable[..., Path], tmp_path: Path, policy_dir: Path
) -> None:
    keys = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "pace": 0.25, "bf16": False}
    assert main(["run", mine, str(online_json("own", **keys))]) == 0
    checkpoint = tmp_path / "own" / "checkpoint-2"
    start, actor, moved = (
        read_weights(folder) for folder in (policy_dir, checkpoint / "policy", checkpoint / "reference")
    )
    assert moved.keys() == actor.keys()
    for name, weight in moved.items():
        np.testing.assert_allclose(weight, 0.75 * start[name] + 0.25 * actor[name], atol=1e-6, err_msg=name)
    assert any((moved[name] != start[name]).any() for name in moved)


def whole_and_resumed(tmp_path: Path) -> None:
    """The last checkpoints are equal bit by bit: the actor, its optimizer, and the reference."""
    whole, parts = tmp_path / "whole" / "checkpoint-6", tmp_path / "parts" / "checkpoint-6"
    for folder in ("policy", "reference"):
        one, other = read_weights(whole / folder), read_weights(parts / folder)
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(other[name], one[name], err_msg=f"{folder}/{name}")
    optimizer = Path("trainer") / "actor_optimizer.safetensors"
    one, other = load_file(str(whole / optimizer)), load_file(str(parts / optimizer))
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(other[name], one[name], err_msg=name)
    assert_same_metrics(metric_rows(tmp_path / "whole"), metric_rows(tmp_path / "parts"), 0.0)


def test_it_resumes_in_the_middle_of_an_update(mine: str, online_json: Callable[..., Path], tmp_path: Path) -> None:
    keys = {"save_strategy": "steps", "save_steps": 3, "pace": 0.3, "bf16": False}
    assert main(["run", mine, str(online_json("whole", **keys))]) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoint-6")
    assert (tmp_path / "parts" / "checkpoint-3" / "trainer" / "rollout.json").is_file()
    assert main(["run", mine, str(online_json("parts", **keys)), "resume_from_checkpoint=true"]) == 0
    whole_and_resumed(tmp_path)


def test_an_interrupted_update_averages_once(
    mine: str, online_json: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An interruption between two steps of an update moved the reference there, and again at the update's end."""
    flag = tmp_path / "pressed"
    (tmp_path / "stopper.py").write_text(STOPPER.format(flag=str(flag)))
    keys = {
        "save_strategy": "steps", "save_steps": 6, "pace": 0.3, "reward": f"{tmp_path / 'stopper.py'}:vowels",
        "bf16": False,
    }  # fmt: skip
    assert main(["run", mine, str(online_json("parts", **keys))]) == 130
    assert (tmp_path / "parts" / "checkpoint-3" / "trainer" / "rollout.json").is_file()
    assert main(["run", mine, str(online_json("parts", **keys)), "resume_from_checkpoint=true"]) == 0
    assert flag.is_file()
    assert main(["run", mine, str(online_json("whole", **keys))]) == 0
    whole_and_resumed(tmp_path)


def test_a_reference_that_would_stand_still_is_refused_at_the_start(
    mine: str, online_json: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was found behind the first update."""
    assert main(["run", mine, str(online_json("run", bf16=True))]) == 2
    assert "bf16: the reference follows the actor by a share of 0.01" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_flow_that_cannot_be_meant_is_refused_in_words_and_early(
    online_json: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback told it, when the models had been loaded; --dry_run did not see it."""
    slips = [
        ('("reference",), ("rollout",)', '("referense",), ("rollout",)', "there is no role 'referense'; did you mean"),
        ('("rollout",), "scores"', '("rolout",), "scores"', "reward_scores needs rolout; did you mean 'rollout'"),
    ]
    for number, (right, wrong, words) in enumerate(slips):
        assert right in MINE
        file = tmp_path / f"mine_{number}.py"
        file.write_text(MINE.replace(right, wrong).replace('"mine"', f'"mine_{number}"'))
        assert main(["run", f"{file}:Mine", str(online_json("run")), "--dry_run"]) == 2
        assert words in capsys.readouterr().err


def test_two_processes_give_the_single_processs_run(
    mine: str, online_json: Callable[..., Path], tmp_path: Path
) -> None:
    keys = {"max_steps": 4, "pace": 0.3, "save_strategy": "steps", "save_steps": 4, "bf16": False}
    assert main(["run", mine, str(online_json("one", **keys))]) == 0
    file = online_json("two", **keys, per_device_prompt_batch_size=4, per_device_train_batch_size=4)
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2"]
    command += ["--log_dir", str(tmp_path / "log"), str(REPO / "alignment" / "__main__.py"), "run", mine, str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert_same_metrics(metric_rows(tmp_path / "one"), metric_rows(tmp_path / "two"), 1e-4)
    one, two = (read_weights(tmp_path / name / "checkpoint-4" / "reference") for name in ("one", "two"))
    for name, weight in one.items():
        np.testing.assert_allclose(two[name], weight, atol=1e-4, err_msg=name)


def test_help_and_the_list_of_methods_have_it(mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", mine, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "  pace  (default: 0.01) [> 0 and <= 1]" in shown and "kl_coeff" in shown and "hasty: pace 0.5" in shown
    assert main(["methods", f"plugins={tmp_path / 'mine.py'}"]) == 0
    shown = capsys.readouterr().out
    assert "run mine" in shown and "Mine: ReMax whose reference follows the actor" in shown
    assert "  hasty" in shown and "mine with pace 0.5" in shown


def test_the_page_about_methods_has_one_that_runs(online_json: Callable[..., Path], tmp_path: Path) -> None:
    page = (REPO / "docs" / "methods.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.S)
    (tmp_path / "mine.py").write_text(example)
    file = online_json("run", plugins="mine.py", bf16=False, max_steps=4)
    assert main(["run", "mine", str(file), "preset=slow", "save_strategy=steps", "save_steps=4"]) == 0
    assert (tmp_path / "run" / "checkpoint-4" / "reference" / "model.safetensors").is_file()


def test_the_public_names_load_no_paddle() -> None:
    code = "import sys; from alignment.api import *; OnlineMethod, Average; print('paddle' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
