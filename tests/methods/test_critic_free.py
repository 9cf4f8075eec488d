"""RLOO, REINFORCE++, ReMax and A2C through the public command, and against what the peers return."""

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

from alignment.arguments import from_dict
from alignment.cli import main
from alignment.losses.kl import FixedKLController
from alignment.methods import arguments_of, find_method
from alignment.rollout.rewards import RewardResult
from alignment.rollout.rollout import Rollout
from tests.ppo.conftest import assert_same_metrics, metric_rows
from tests.precision import BF16, read_weights

REPO = Path(__file__).resolve().parents[2]
METHODS = ("rloo",)


def method_of(name: str, **keys: Any) -> Any:
    """A method as after ``begin``, without a run; ``finish`` leaves the experience as it is."""
    method = find_method(name)
    keys = {"actor_model_name_or_path": "a", "output_dir": "o", "reward": "gsm8k", "train_datasets": "t", **keys}
    made = method(from_dict(arguments_of(method), keys))
    made.kl_controller = FixedKLController(made.args.kl_coeff)
    made.finish = lambda experience, scores: (experience, None)
    return made


def rollout_of(actions: np.ndarray, prompts: np.ndarray | list[int]) -> Rollout:
    """Answers of which the policy chose the tokens ``actions`` ``[B, R]``; those behind its last one are no tokens."""
    mask = np.asarray(actions) > 0
    lengths = mask.shape[1] - mask[:, ::-1].argmax(axis=1)
    rows = len(mask)
    zeros = np.zeros(mask.shape, np.float32)
    return Rollout(
        np.full((rows, mask.shape[1] + 1), 5), np.ones(rows, np.int64), lengths, np.ones(rows, bool), zeros, zeros,
        np.asarray(prompts), np.zeros(rows, np.int64), ["p"] * rows, ["r"] * rows, [{}] * rows, action_mask=mask,
    )  # fmt: skip


def scores_of(total: Any) -> RewardResult:
    return RewardResult(np.asarray(total, np.float32), {})


def trained(out: Path) -> dict[str, np.ndarray]:
    """All weights that a run has left."""
    return {f"{folder.name}/{name}": weight for folder in sorted(out.iterdir()) if (folder / "config.json").is_file()
            for name, weight in read_weights(folder).items()}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("name", METHODS)
def test_it_learns_what_is_rewarded(name: str, online_json: Callable[..., Path], tmp_path: Path) -> None:
    """The reward asks for vowels in short answers; 40 steps raise it by far more than its noise."""
    file = online_json("run", max_steps=40, learning_rate=1e-2, num_train_epochs=100, logging_steps=1)
    assert main([name, str(file), "evaluation_strategy=steps", "eval_steps=40"]) == 0
    rows = metric_rows(tmp_path / "run")
    rewards = [row["train/reward"] for row in rows if "train/reward" in row]
    assert np.mean(rewards[-8:]) > np.mean(rewards[:8]) + 0.3
    first = next(row for row in rows if "train/reward" in row)
    assert first["train/rollout_logprob_gap"] < (0.5 if BF16 else 1e-4)
    assert any("eval/reward_greedy" in row for row in rows)
    assert (tmp_path / "run" / "policy" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", METHODS)
def test_a_resume_in_the_middle_of_an_update_changes_no_bit(
    name: str, online_json: Callable[..., Path], tmp_path: Path
) -> None:
    """Step 3 is the first of the second rollout's two."""
    keys = {"save_strategy": "steps", "save_steps": 3, "normalize_reward": True}
    assert main([name, str(online_json("whole", **keys))]) == 0
    file = online_json("parts", **keys)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoint-6")
    assert (tmp_path / "parts" / "checkpoint-3" / "trainer" / "rollout.json").is_file()
    assert main([name, str(file), "resume_from_checkpoint=true"]) == 0
    whole, parts = trained(tmp_path / "whole"), trained(tmp_path / "parts")
    assert whole.keys() == parts.keys() and whole
    for weight in whole:
        np.testing.assert_array_equal(parts[weight], whole[weight], err_msg=weight)
    assert_same_metrics(metric_rows(tmp_path / "whole"), metric_rows(tmp_path / "parts"), 0.0)


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_give_the_single_processs_run(
    name: str, online_json: Callable[..., Path], tmp_path: Path
) -> None:
    assert main([name, str(online_json("one", max_steps=4))]) == 0
    file = online_json("two", max_steps=4, per_device_prompt_batch_size=4, per_device_train_batch_size=4)
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2"]
    command += ["--log_dir", str(tmp_path / "log"), str(REPO / "alignment" / "__main__.py"), name, str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    rows = {place: metric_rows(tmp_path / place) for place in ("one", "two")}
    if BF16:  # rounding decides between close tokens once it has decided how to learn: the first rollout is the same
        assert_same_metrics(rows["one"][:2], rows["two"][:2], 0.1)
        return
    assert_same_metrics(rows["one"], rows["two"], 1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_without_a_kl_no_reference_is_loaded(
    name: str, online_json: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, str(online_json("run", max_steps=2, kl_coeff=0.0))]) == 0
    rows = metric_rows(tmp_path / "run")
    assert all("train/kl_divergence" not in row for row in rows) and any("train/reward" in row for row in rows)
    assert (
        not find_method(name)(SimpleNamespace(kl_coeff=0.0, reward="gsm8k", critic_warmup_steps=0)).roles()[1].present
    )


@pytest.mark.parametrize("name", METHODS)
def test_dry_run_and_help_show_its_keys(
    name: str, online_json: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, str(online_json("run")), "--dry_run"]) == 0
    assert "optimizer steps per rollout" in capsys.readouterr().out
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    own = find_method(name).Keys.__dataclass_fields__
    assert own and all(f"  {key}  (default: " in shown for key in own)


# ----------------------------------------------------------------------------------------------- the peers' own numbers


@pytest.fixture(scope="module")
def vectors(shared_data: Path) -> dict[str, Any]:
    return json.loads((shared_data.parent / "vectors" / "preference_and_rl.json").read_text())


def entry_of(vectors: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in vectors["entries"] if entry["name"] == name)


GROUPS = np.array([0, 0, 0, 1, 1, 1])


def advantages_of(method: Any, vectors: dict[str, Any], kl: float = 0.0, **more: Any) -> np.ndarray:
    """What a method's own step makes of the vectors' scores, masks and log-probs; ``[B, R]``."""
    inputs = {name: np.asarray(values) for name, values in vectors["inputs"]["rl"].items() if name != "group"}
    rollout = rollout_of(inputs["mask"], GROUPS)
    method.kl_controller = FixedKLController(kl)
    logprobs = inputs["old_logprobs"].astype(np.float32)
    ref_logprobs = inputs["ref_logprobs"].astype(np.float32) if kl else None
    experience, _ = method.advantages(rollout, logprobs, ref_logprobs, scores_of(inputs["scores"]), **more)
    return experience["advantages"]


@pytest.mark.parametrize(
    ("entry", "compat", "keys"),
    [
        ("adv/verl/rloo", "verl", {}),
        ("adv/trl1.x/rloo", "trl", {}),
        ("adv/trl1.x/rloo normalized", "trl", {"normalize_advantage": True, "normalize_over": "sequences"}),
        ("adv/openrlhf/rloo", "openrlhf", {}),
    ],
)
def test_rloo_is_the_peers(vectors: dict[str, Any], entry: str, compat: str, keys: dict[str, Any]) -> None:
    found = entry_of(vectors, entry)
    method = method_of("rloo", compat=compat, **keys)
    got = advantages_of(method, vectors, found["options"].get("init_kl_coef", 0.0))
    wanted = np.asarray(found["expected"]["advantages"], float)
    np.testing.assert_allclose(got if wanted.ndim == 2 else got[:, 0], wanted, atol=1e-5)


def test_trls_rloo_has_the_ratio_of_the_whole_answer() -> None:
    args = method_of("rloo", compat="trl").args
    assert (args.policy_loss, args.policy_loss_mean) == ("rloo", "sequence")
    assert method_of("rloo", policy_loss="rloo").args.policy_loss_mean == "sequence"
    assert method_of("rloo", policy_loss="rloo", policy_loss_mean="token").args.policy_loss_mean == "token"
    assert method_of("rloo").args.policy_loss_mean == "token"


def test_one_answer_a_prompt_is_refused_where_the_baseline_needs_others(
    online_json: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rloo", str(online_json("run", num_return_sequences=1))]) == 2
    said = capsys.readouterr().err
    assert "num_return_sequences" in said and "Traceback" not in said


# ---------------------------------------------------------------------------- tokens that the policy did not choose

HOLE = np.array([[1, 1, 0, 1], [1, 0, 0, 1], [1, 1, 1, 0], [1, 1, 0, 0]])  # a tool's reply inside two answers
KL = np.array([[0.1, 0.2, 9.0, 0.3], [0.4, 9.0, 9.0, 0.5], [0.6, 0.7, 0.8, 9.0], [0.9, 1.0, 9.0, 9.0]], np.float32)


def hand_made(name: str, total: list[float], **keys: Any) -> np.ndarray:
    method = method_of(name, kl_coeff=0.5, **keys)
    zeros = np.zeros(HOLE.shape, np.float32)
    rollout = rollout_of(HOLE, [3, 3, 8, 8])
    experience, _ = method.advantages(rollout, KL[:, : rollout.width], zeros, scores_of(total))
    return experience["advantages"]


def test_rloo_leaves_out_what_a_tool_wrote() -> None:
    """KL of the chosen tokens alone: 0.6, 0.9, 2.1, 1.9; R = 1 - .3, 2 - .45, 3 - 1.05, 5 - .95."""
    got = hand_made("rloo", [1.0, 2.0, 3.0, 5.0])
    rows = np.array([0.7 - 1.55, 1.55 - 0.7, 1.95 - 4.05, 4.05 - 1.95])
    np.testing.assert_allclose(got, rows[:, None] * HOLE, atol=1e-6)


def test_rloo_with_the_kl_at_its_tokens_goes_on_over_what_a_tool_wrote() -> None:
    got = hand_made("rloo", [1.0, 2.0, 3.0, 5.0], token_rewards="tokens")
    wanted = [
        [-1 - 0.3, -1 - 0.25, 0, -1 - 0.15],
        [1 - 0.45, 0, 0, 1 - 0.25],
        [-2 - 1.05, -2 - 0.75, -2 - 0.4, 0],
        [2 - 0.95, 2 - 0.5, 0, 0],
    ]
    np.testing.assert_allclose(got, wanted, atol=1e-6)
