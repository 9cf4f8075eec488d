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
from alignment.flow.method import Window
from alignment.flow.statistics import Statistics
from alignment.losses.kl import FixedKLController
from alignment.methods import arguments_of, find_method, with_preset
from alignment.rollout.rewards import RewardResult
from alignment.rollout.rollout import Experience, Rollout
from tests.ppo.conftest import assert_same_metrics, metric_rows
from tests.precision import BF16, read_weights

REPO = Path(__file__).resolve().parents[2]
METHODS = ("rloo", "reinforce", "reinforce_baseline", "remax", "a2c")


def class_of(name: str) -> Any:
    """The method of a name, or of a preset's."""
    return with_preset(name) or find_method(name)


def method_of(name: str, **keys: Any) -> Any:
    """A method as after ``begin``, without a run; ``finish`` leaves the experience as it is."""
    method = find_method(name)
    keys = {"actor_model_name_or_path": "a", "output_dir": "o", "reward": "gsm8k", "train_datasets": "t", **keys}
    made = method(from_dict(arguments_of(method), keys))
    made.kl_controller = FixedKLController(made.args.kl_coeff)
    made.finish = lambda experience, scores: (experience, Statistics())
    made.count_tokens = lambda rollout, name: None
    return made


def rollout_of(actions: np.ndarray, prompts: np.ndarray | list[int], tail: int = 0) -> Rollout:
    """Answers of which the policy chose the tokens ``actions`` ``[B, R]``; behind its last one come ``tail`` others."""
    mask = np.pad(np.asarray(actions) > 0, ((0, 0), (0, tail)))
    lengths = mask.shape[1] - mask[:, ::-1].argmax(axis=1) + tail
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
    """The reward asks for vowels in short answers; 32 steps raise it by far more than its noise."""
    file = online_json("run", max_steps=32, learning_rate=1e-2, num_train_epochs=100)
    assert main([name, str(file), "evaluation_strategy=steps", "eval_steps=32"]) == 0
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


@pytest.mark.parametrize("name", ["reinforce_baseline", "remax"])
def test_two_processes_give_the_single_processs_run(
    name: str, online_json: Callable[..., Path], tmp_path: Path, prompt_file: Path
) -> None:
    """The second rollout has one prompt: the second process has none, and generates nothing, greedily neither."""
    data = {"train_datasets": f"jsonl:9/-1:{prompt_file}", "max_steps": 5}
    assert main([name, str(online_json("one", **data))]) == 0
    file = online_json("two", **data, per_device_prompt_batch_size=4, per_device_train_batch_size=4)
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
    roles = class_of(name)(SimpleNamespace(kl_coeff=0.0, reward="gsm8k", critic_warmup_steps=0)).roles()
    assert [spec.name for spec in roles if not spec.present] == ["reference", "reward"]


@pytest.mark.parametrize("name", METHODS)
def test_dry_run_and_help_show_its_keys(
    name: str, online_json: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, str(online_json("run")), "--dry_run"]) == 0
    assert "optimizer steps per rollout" in capsys.readouterr().out
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    own = [*getattr(class_of(name).Keys, "__dataclass_fields__", {}), *getattr(class_of(name), "changes", {})]
    assert all(f"  {key}  (default: " in shown for key in own) and class_of(name).title in shown


# ----------------------------------------------------------------------------------------------- the peers' own numbers


@pytest.fixture(scope="module")
def vectors(shared_data: Path) -> dict[str, Any]:
    return json.loads((shared_data.parent / "vectors" / "preference_and_rl.json").read_text())


def entry_of(vectors: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in vectors["entries"] if entry["name"] == name)


def advantages_of(method: Any, vectors: dict[str, Any], groups: np.ndarray, kl: float, *more: Any) -> Experience:
    """What a method's own step makes of the vectors' scores, masks and log-probs."""
    inputs = {name: np.asarray(values) for name, values in vectors["inputs"]["rl"].items() if name != "group"}
    method.kl_controller = FixedKLController(kl)
    logprobs = inputs["old_logprobs"].astype(np.float32)
    ref_logprobs = inputs["ref_logprobs"].astype(np.float32) if kl else None
    return method.advantages(
        rollout_of(inputs["mask"], groups), logprobs, ref_logprobs, scores_of(inputs["scores"]), *more
    )[0]


def groups_of(vectors: dict[str, Any], entry: dict[str, Any]) -> np.ndarray:
    given = entry["inputs"].get("group", "")
    names = vectors["inputs"]["rl"][given[4:]] if given.startswith("@") else [0, 0, 0, 1, 1, 1]
    return np.unique(names, return_inverse=True)[1]


WHOLE = {"advantage": "reinforce_plus_plus_baseline", "num_return_sequences": 3}
PEERS = {
    "adv/verl/rloo": ("rloo", "verl", {}),
    "adv/trl1.x/rloo": ("rloo", "trl", {}),
    "adv/trl1.x/rloo normalized": ("rloo", "trl", {"normalize_advantage": True, "normalize_over": "sequences"}),
    "adv/openrlhf/rloo": ("rloo", "openrlhf", {}),
    "adv/verl/reinforce++ gamma 1.0": ("reinforce", "verl", {}),
    "adv/verl/reinforce++ gamma 0.9": ("reinforce", "verl", {"gamma": 0.9}),
    "adv/verl/reinforce++ with KL in the reward": ("reinforce", "verl", {}),
    "adv/verl/reinforce++_baseline": ("reinforce", "verl", WHOLE),
    "adv/openrlhf/reinforce (REINFORCE++)": ("reinforce", "openrlhf", {}),
    "adv/openrlhf/reinforce gamma .9 clipped": (
        "reinforce", "openrlhf", {"gamma": 0.9, "clip_range_score": 0.5},
    ),
    "adv/openrlhf/reinforce_baseline": ("reinforce", "openrlhf", WHOLE),
    "adv/verl/remax": ("remax", "verl", {}),
}  # fmt: skip


@pytest.mark.parametrize("entry", PEERS)
def test_the_methods_own_step_gives_the_peers_numbers(vectors: dict[str, Any], entry: str) -> None:
    name, compat, keys = PEERS[entry]
    found = entry_of(vectors, entry)
    options, groups = found["options"], groups_of(vectors, found)
    more: list[Any] = []
    if name == "remax":  # the peer's baselines are one a row: so is our greedy answer here
        groups = np.arange(6)[::-1]
        more = [rollout_of(np.ones((6, 1)), groups), scores_of(vectors["inputs"]["rl"]["seq_advantages"])]
    kl = options.get("init_kl_coef", options.get("kl_ratio", 0.0))
    got = advantages_of(method_of(name, compat=compat, **keys), vectors, groups, kl, *more)
    for column in set(found["expected"]) & {"advantages", "returns"}:
        wanted = np.asarray(found["expected"][column], float)
        np.testing.assert_allclose(got[column] if wanted.ndim == 2 else got[column][:, 0], wanted, rtol=2e-5, atol=2e-5)


def test_rloo_has_trls_loss_of_the_whole_answers_ratio(vectors: dict[str, Any]) -> None:
    """With a tool's token in the middle, which changes nothing and gets no gradient."""
    import paddle

    found, inputs = entry_of(vectors, "loss/trl1.x/rloo"), vectors["inputs"]["rl"]
    method, hole = method_of("rloo", compat="trl"), 2
    column = {
        name: np.insert(np.asarray(inputs[name], np.float32), hole, value, axis=1)
        for name, value in {"mask": 0.0, "old_logprobs": -9.0, "new_logprobs": -0.5}.items()
    }
    rollout = rollout_of(column["mask"], np.arange(6))
    advantages = np.asarray(inputs["seq_advantages"], np.float32)[:, None] * column["mask"]
    batch = Experience(rollout, logprobs=column["old_logprobs"], advantages=advantages)
    window = Window(batch, int(rollout.actions.sum()), 6, 0, 6, True, None)
    logprobs = paddle.to_tensor(column["new_logprobs"], stop_gradient=False)
    loss = method.actor_loss(logprobs, paddle.zeros_like(logprobs), batch, window)
    loss.total.backward()
    assert float(loss.total) == pytest.approx(float(found["expected"]["loss"]), abs=1e-5)
    wanted = np.insert(np.asarray(found["expected"]["grad_logprobs"], float), hole, 0.0, axis=1)
    np.testing.assert_allclose(logprobs.grad.numpy(), wanted, atol=1e-6)


@pytest.mark.parametrize("entry", ["a2c/rl4lms", "a2c/rl4lms normalized advantage + entropy"])
def test_a2c_has_rl4lms_losses_and_gradients(vectors: dict[str, Any], entry: str) -> None:
    """With a tool's token in the middle, which changes nothing and gets no gradient."""
    import paddle

    found, inputs = entry_of(vectors, entry), vectors["inputs"]["ac"]
    options, hole = found["options"], 3
    method = method_of("a2c", entropy_coeff=options["ent_coef"], value_coeff=options["vf_coef"])
    actions = np.insert(np.ones((1, 6)), hole, 0, axis=1)
    column = {name: np.insert(np.asarray([inputs[name]], np.float32), hole, 7.0, axis=1) for name in inputs}
    advantages = column["advantages"]
    if options["normalize_advantage"]:
        inside = np.asarray(inputs["advantages"])
        advantages = (advantages - inside.mean()) / (inside.std(ddof=1) + 1e-8)
    batch = Experience(
        rollout_of(actions, [0]), logprobs=column["old_log_prob"], advantages=advantages.astype(np.float32),
        returns=column["returns"], values=column["old_values"],
    )  # fmt: skip
    window = Window(batch, tokens=6, answers=1, all_tokens=8, rows=1, first_pass=True, after=None)
    tensors = {name: paddle.to_tensor(column[name]) for name in ("log_prob", "entropy", "values")}
    for tensor in tensors.values():
        tensor.stop_gradient = False
    actor = method.actor_loss(tensors["log_prob"], tensors["entropy"], batch, window)
    critic = method.critic_loss(tensors["values"], batch, window)
    total = actor.total + critic.total
    total.backward()
    assert float(actor.sums["train/actor_loss"][0]) == pytest.approx(float(found["expected"]["policy_loss"]), abs=1e-5)
    assert float(critic.sums["train/reward_critic_loss"][0]) == pytest.approx(
        float(found["expected"]["value_loss"]), abs=1e-5
    )
    assert float(total) == pytest.approx(float(found["expected"]["total"]), abs=1e-5)
    for name, tensor in tensors.items():
        if tensor.grad is None:  # an entropy without weight
            assert not np.any(np.asarray(found["expected"][f"grad_{name}"], float))
            continue
        wanted = np.insert(np.asarray([found["expected"][f"grad_{name}"]], float), hole, 0.0, axis=1)
        np.testing.assert_allclose(tensor.grad.numpy(), wanted, atol=1e-6, err_msg=name)


def test_trls_rloo_has_the_ratio_of_the_whole_answer() -> None:
    args = method_of("rloo", compat="trl").args
    assert (args.policy_loss, args.policy_loss_mean) == ("rloo", "sequence")
    assert method_of("rloo", policy_loss="rloo").args.policy_loss_mean == "sequence"
    assert method_of("rloo", policy_loss="rloo", policy_loss_mean="token").args.policy_loss_mean == "token"
    assert method_of("rloo").args.policy_loss_mean == "token"


@pytest.mark.parametrize(("name", "answers"), [("rloo", 1), ("reinforce_baseline", 1), ("reinforce", 0), ("a2c", 0)])
def test_one_answer_a_prompt_is_refused_where_the_baseline_needs_others(
    name: str, answers: int, online_json: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    refused = main([name, str(online_json("run", num_return_sequences=1)), "--dry_run"])
    said = capsys.readouterr().err
    assert (refused, "num_return_sequences" in said, "Traceback" in said) == (
        (2, True, False) if answers else (0, False, False)
    )


def test_a2c_refuses_a_second_pass_and_says_what_lies_between_steps(
    online_json: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(online_json("run", update_iters=2))
    assert main(["a2c", file, "--dry_run"]) == 2
    assert "update_iters is 2, but A2C goes over a rollout once" in capsys.readouterr().err
    assert main(["a2c", file, "update_iters=1", "--dry_run"]) == 0, "a file for PPO, and what is otherwise"
    assert main(["a2c", str(online_json("run", clip_range_value=3.0)), "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "a rollout has 16 rows on each process and an optimizer step 8" in said
    assert "clip_range_value: A2C has no ratio and clips nothing" in said


# ---------------------------------------------------------------------------- tokens that the policy did not choose

HOLE = np.array([[1, 1, 0, 1], [1, 0, 0, 1], [1, 1, 1, 0], [1, 1, 0, 0]])  # a tool's reply inside two answers
KL = np.array([[0.1, 0.2, 9.0, 0.3], [0.4, 9.0, 9.0, 0.5], [0.6, 0.7, 0.8, 9.0], [0.9, 1.0, 9.0, 9.0]], np.float32)


def hand_made(name: str, total: list[float], actions: np.ndarray = HOLE, *more: Any, **keys: Any) -> np.ndarray:
    method = method_of(name, kl_coeff=0.5, **keys)
    rollout = rollout_of(actions, [3, 3, 8, 8])
    zeros = np.zeros(actions.shape, np.float32)
    return method.advantages(rollout, KL, zeros, scores_of(total), *more)[0]["advantages"]


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


#: Scores 1, 2, 3 and 10 at the last chosen token, half the KL off each, summed from behind.
RETURNS = np.array([[0.7, 0.75, 0, 0.85], [1.55, 0, 0, 1.75], [1.95, 2.25, 2.6, 0], [9.05, 9.5, 0, 0]])


def test_reinforce_goes_on_over_what_a_tool_wrote_and_clips_the_score_at_10() -> None:
    chosen = RETURNS[HOLE > 0]
    wanted = np.where(HOLE > 0, (RETURNS - chosen.mean()) / chosen.std(ddof=1), 0.0)
    np.testing.assert_allclose(hand_made("reinforce", [1.0, 2.0, 3.0, 50.0]), wanted, atol=1e-6)
    np.testing.assert_allclose(
        hand_made("reinforce", [1.0, 2.0, 3.0, 50.0], normalize_advantage=False), RETURNS, atol=1e-6
    )


def test_reinforce_with_a_baseline_whitens_over_the_chosen_tokens() -> None:
    rows = np.array([0.7 - 1.125, 1.55 - 1.125, 1.95 - 5.5, 9.05 - 5.5])[:, None] * HOLE
    chosen = rows[HOLE > 0]
    got = hand_made("reinforce", [1.0, 2.0, 3.0, 10.0], preset="reinforce_baseline")
    np.testing.assert_allclose(got, np.where(HOLE > 0, (rows - chosen.mean()) / chosen.std(ddof=1), 0.0), atol=1e-6)


def test_remax_takes_off_the_greedy_answer_of_the_same_prompt() -> None:
    greedy = rollout_of(np.ones((2, 3)), [8, 3])
    got = hand_made("remax", [1.0, 2.0, 3.0, 10.0], HOLE, greedy, scores_of([1.5, 0.25]))
    np.testing.assert_allclose(got, (RETURNS - np.array([0.25, 0.25, 1.5, 1.5])[:, None]) * HOLE, atol=1e-6)


def test_a2c_discounts_from_one_chosen_token_to_the_next() -> None:
    values = np.full(HOLE.shape, 0.5, np.float32)
    values[HOLE == 0] = 99.0
    got = hand_made("a2c", [1.0, 2.0, 3.0, 10.0], HOLE, values, gamma=0.9)
    first = [-0.05 + 0.9 * (-0.1 + 0.9 * 0.85) - 0.5, -0.1 + 0.9 * 0.85 - 0.5, 0, 0.85 - 0.5]
    np.testing.assert_allclose(got[0], first, atol=1e-6)
    np.testing.assert_allclose(got[1], [-0.2 + 0.9 * 1.75 - 0.5, 0, 0, 1.75 - 0.5], atol=1e-6)


@pytest.mark.parametrize("name", ["rloo", "reinforce", "remax", "a2c", "ppo"])
def test_a_score_is_not_lost_behind_what_a_tool_wrote_last(name: str) -> None:
    """The answers end with a tool's token: the score goes to the last token that the policy chose."""
    total = [1.0, 2.0, 3.0, 5.0]
    greedy = [rollout_of(np.ones((2, 3)), [8, 3]), scores_of([1.5, 0.25])]
    more = greedy if name == "remax" else []
    method = method_of(name, kl_coeff=0.5)
    short, long = rollout_of(HOLE, [3, 3, 8, 8]), rollout_of(HOLE, [3, 3, 8, 8], tail=1)
    found = []
    for rollout in (short, long):
        kl, zeros = np.pad(KL, ((0, 0), (0, rollout.width - 4))), np.zeros(rollout.mask.shape, np.float32)
        given = [zeros] if name in ("a2c", "ppo") else more
        found.append(method.advantages(rollout, kl, zeros, scores_of(total), *given)[0]["advantages"])
    np.testing.assert_array_equal(found[1][:, :4], found[0])
