"""NLPO through the public command, and its functions against the peers' numbers."""

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
from alignment.methods import arguments_of
from alignment.methods.nlpo import NLPO
from alignment.rollout.rollout import Experience, Rollout
from tests.ppo.conftest import assert_same_metrics, metric_rows
from tests.precision import BF16, read_weights

REPO = Path(__file__).resolve().parents[2]


def nlpo(**keys: Any) -> NLPO:
    """The method with its arguments, without a run."""
    given = {"actor_model_name_or_path": "a", "output_dir": "o", "reward": "gsm8k", "train_datasets": "t", **keys}
    return NLPO(from_dict(arguments_of(NLPO), given))


def updates(folder: Path) -> list[dict[str, Any]]:
    return [row for row in metric_rows(folder) if "train/reward" in row]


def weights_of(out: Path) -> dict[str, np.ndarray]:
    return {f"{name}/{key}": value for name in ("policy", "value") for key, value in read_weights(out / name).items()}


def test_it_learns_under_a_mask_that_follows_the_policy(online_json: Callable[..., Path], tmp_path: Path) -> None:
    """The copy reaches generation: behind an update it is the policy, so its nucleus has 0.9 of the next one's; from a
    copy that rests the policy moves away.
    """
    keys = {"max_steps": 30, "learning_rate": 1e-2, "num_train_epochs": 100, "per_device_train_batch_size": 16}
    assert main(["nlpo", str(online_json("fresh", mask_update_rollouts=1, **keys))]) == 0
    assert main(["nlpo", str(online_json("rests", mask_update_rollouts=1000, **{**keys, "max_steps": 6}))]) == 0
    fresh, rests = updates(tmp_path / "fresh"), updates(tmp_path / "rests")
    rewards = [row["train/reward"] for row in fresh]
    assert np.mean(rewards[-8:]) > np.mean(rewards[:8]) + 0.3
    rounding = 0.02 if BF16 else 1e-4
    assert all(row["train/mask_kept_mass"] >= 0.9 - rounding for row in fresh)
    assert all(row["train/mask_kept_mass"] < 0.85 for row in rests[1:])
    first = fresh[0]
    assert first["train/mask_tokens"] > 10 and first["train/approx_kl"] == pytest.approx(0, abs=1e-9)
    # of the whole policies: the generator's, the training network's and the reference's are one at first
    assert first["train/rollout_logprob_gap"] < (0.5 if BF16 else 1e-4)
    assert first["train/kl_divergence"] == pytest.approx(0, abs=0.05 if BF16 else 1e-4)


def test_without_a_mask_it_is_ppo_bit_by_bit(online_json: Callable[..., Path], tmp_path: Path) -> None:
    assert main(["ppo", str(online_json("ppo"))]) == 0
    assert main(["nlpo", str(online_json("nlpo")), "top_mask=-1"]) == 0
    ppo, ours = weights_of(tmp_path / "ppo"), weights_of(tmp_path / "nlpo")
    assert all((ours[name] == weight).all() for name, weight in ppo.items())
    assert_same_metrics(metric_rows(tmp_path / "ppo"), metric_rows(tmp_path / "nlpo"), 0.0)


def test_a_resume_in_the_middle_of_an_update_changes_no_bit(online_json: Callable[..., Path], tmp_path: Path) -> None:
    """Step 3 is the first of the second rollout's two; the copy is then the policy of step 2, in the checkpoint too."""
    keys = {"save_strategy": "steps", "save_steps": 1, "mask_update_rollouts": 1}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["nlpo", str(online_json("whole", **keys))]) == 0
    copied, policy = read_weights(whole / "checkpoint-3" / "masking"), read_weights(whole / "checkpoint-2" / "policy")
    moved = read_weights(whole / "checkpoint-3" / "policy")
    assert all((copied[name] == policy[name]).all() for name in policy)
    assert any((copied[name] != moved[name]).any() for name in policy)
    shutil.copytree(whole, parts)
    for step in (4, 5, 6):
        shutil.rmtree(parts / f"checkpoint-{step}")
    assert (parts / "checkpoint-3" / "trainer" / "rollout.json").is_file()
    assert main(["nlpo", str(online_json("parts", **keys)), "resume_from_checkpoint=true"]) == 0
    one, other = weights_of(whole), weights_of(parts)
    for name, weight in one.items():
        np.testing.assert_array_equal(other[name], weight, err_msg=name)
    assert_same_metrics(metric_rows(whole), metric_rows(parts), 0.0)


def test_an_interruption_in_the_middle_of_an_update_leaves_the_copy_for_its_end(
    online_json: Callable[..., Path], tmp_path: Path, reward_file: Path
) -> None:
    """What comes behind the update must not happen before it is done."""
    file, flag = tmp_path / "stops.py", tmp_path / "stopped"
    file.write_text(
        "import os, pathlib, signal, sys\n"
        f"sys.path.insert(0, {str(reward_file.parent)!r})\n"
        f"from {reward_file.stem} import vowels\n"
        "calls = []\n"
        "def stops(prompts, responses):\n"
        "    calls.append(1)\n"
        f"    flag = pathlib.Path({str(flag)!r})\n"
        "    if len(calls) == 2 and not flag.exists():\n"
        "        flag.touch()\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return vowels(prompts, responses)\n"
    )
    keys = {"save_strategy": "steps", "save_steps": 100, "mask_update_rollouts": 1, "reward": f"{file}:stops"}
    keys |= {"evaluation_strategy": "no", "eval_datasets": None}
    assert main(["nlpo", str(online_json("parts", **keys))]) == 130
    parts = tmp_path / "parts"
    copied, stopped = (read_weights(parts / "checkpoint-3" / name) for name in ("masking", "policy"))
    assert any((copied[name] != stopped[name]).any() for name in stopped)
    assert main(["nlpo", str(tmp_path / "parts.json"), "resume_from_checkpoint=true"]) == 0
    assert main(["nlpo", str(online_json("whole", **keys))]) == 0
    one, other = weights_of(tmp_path / "whole"), weights_of(parts)
    for name, weight in one.items():
        np.testing.assert_array_equal(other[name], weight, err_msg=name)


def test_offloading_changes_no_bit(online_json: Callable[..., Path], tmp_path: Path) -> None:
    """The copy is there while answers are generated, and when it is brought up to date."""
    keys = {"mask_update_rollouts": 1, "evaluation_strategy": "steps", "eval_steps": 2}
    assert main(["nlpo", str(online_json("stay", **keys))]) == 0
    levels = "freeze_model optimizer train_model"
    assert main(["nlpo", str(online_json("leave", offload_level=levels, **keys))]) == 0
    stay, leave = weights_of(tmp_path / "stay"), weights_of(tmp_path / "leave")
    assert all((leave[name] == weight).all() for name, weight in stay.items())
    assert_same_metrics(metric_rows(tmp_path / "stay"), metric_rows(tmp_path / "leave"), 0.0)
    assert any(row.get("offload/mask_update_bytes_in", 0) > 0 for row in metric_rows(tmp_path / "leave"))


def test_two_processes_give_the_single_processs_run(online_json: Callable[..., Path], tmp_path: Path) -> None:
    keys = {"max_steps": 4, "mask_update_rollouts": 1, "num_return_sequences": 1}
    assert main(["nlpo", str(online_json("one", **{**keys, "per_device_train_batch_size": 4}))]) == 0
    file = online_json("two", **keys, per_device_prompt_batch_size=4, per_device_train_batch_size=2)
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2"]
    command += ["--log_dir", str(tmp_path / "log"), str(REPO / "alignment" / "__main__.py"), "nlpo", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    one, two = metric_rows(tmp_path / "one"), metric_rows(tmp_path / "two")
    if BF16:  # rounding decides between close tokens once it has decided how to learn: the first rollout is the same
        assert_same_metrics(one[:2], two[:2], 0.1)
        return
    assert_same_metrics(one, two, 1e-4)


def test_evaluation_answers_under_the_mask(online_json: Callable[..., Path], tmp_path: Path) -> None:
    """With one token (and the end) allowed, a sampled answer is the greedy one or a beginning of it."""
    file = online_json("run", do_train=False, do_eval=True, mask_type="learned_top_k", top_mask=1)
    assert main(["nlpo", str(file)]) == 0
    lines = (tmp_path / "run" / "eval_samples.jsonl").read_text().splitlines()
    answers: dict[str, dict[str, str]] = {"sampled": {}, "greedy": {}}
    for sample in map(json.loads, lines):
        answers[sample["mode"]][sample["prompt"]] = sample["response"]
    assert answers["sampled"] and all(
        answers["greedy"][prompt].startswith(text) for prompt, text in answers["sampled"].items()
    )


def test_topk_masks_by_the_policy_itself_without_a_copy(online_json: Callable[..., Path], tmp_path: Path) -> None:
    keys = {"mask_type": "topk", "top_mask": 5, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    assert main(["nlpo", str(online_json("run", **keys))]) == 0
    assert not (tmp_path / "run" / "checkpoint-2" / "masking").exists()
    assert all(5 <= row["train/mask_tokens"] <= 6 for row in updates(tmp_path / "run"))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"top_mask": 1.5}, "top_mask 1.5 is no probability: learned_top_p takes one above 0"),
        ({"mask_type": "learned_top_k"}, "top_mask 0.9 is no number of tokens: learned_top_k takes a whole one"),
        ({"mask_type": "nucleus"}, "'nucleus' is not one of 'learned_top_p', 'learned_top_k', 'topk'"),
        ({"mask_update_rollouts": 0}, "mask_update_rollouts"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(
    keys: dict[str, Any], said: str, online_json: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["nlpo", str(online_json("run", **keys))]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_dry_run_and_help_show_its_keys(online_json: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nlpo", str(online_json("run")), "--dry_run", "target_update_iterations=7"]) == 0
    assert "mask_update_rollouts" in capsys.readouterr().out
    assert main(["nlpo", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {key}  (default: " in shown for key in ("mask_type", "top_mask", "mask_min_tokens", "gae_lambda"))


# ----------------------------------------------------------------------------------------------- the peers' own numbers


@pytest.fixture(scope="module")
def vectors(shared_data: Path) -> dict[str, Any]:
    return json.loads((shared_data.parent / "vectors" / "preference_and_rl.json").read_text())


def entry_of(vectors: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in vectors["entries"] if entry["name"] == name)


@pytest.mark.parametrize(
    "name", ["learned_top_p 0.9 keep 1", "learned_top_p 0.5 keep 3", "learned_top_k 3 keep 1", "topk 2 keep 1"]
)
def test_its_masks_are_rl4lms(vectors: dict[str, Any], name: str) -> None:
    entry, inputs = entry_of(vectors, f"nlpo/rl4lms/mask {name}"), vectors["inputs"]["nlpo"]
    options = entry["options"]
    method = nlpo(
        mask_type=options["mask_type"], top_mask=options["top_mask"], mask_min_tokens=options["min_tokens_to_keep"]
    )
    copy = SimpleNamespace(engine=SimpleNamespace(model="the copy"))
    masking = method.masking({} if name.startswith("topk") else {"masking": copy})
    assert masking is not None and masking.model == (None if name.startswith("topk") else "the copy")
    logits = inputs["policy_logits" if masking.model is None else "mask_model_logits"]
    got = masking.allow(np.array(logits, np.float32), 1.0, np.zeros(3, bool), inputs["special_ids"])
    np.testing.assert_array_equal(got, np.array(entry["expected"]["keep"], bool))


def test_its_loss_is_rl4lms(vectors: dict[str, Any]) -> None:
    import paddle

    entry, given = entry_of(vectors, "nlpo/rl4lms/loss"), vectors["inputs"]["ac"]
    columns = {name: np.array(given[name], np.float32)[None] for name in given if np.ndim(given[name]) == 1}
    advantages = columns["advantages"].astype(np.float64)
    advantages = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-8)
    size = advantages.size
    zeros = np.zeros((1, size), np.float32)
    rollout = Rollout(
        np.full((1, size + 1), 5), np.ones(1, np.int64), np.full(1, size), np.ones(1, bool), zeros, zeros,
        np.zeros(1, np.int64), np.zeros(1, np.int64), ["p"], ["r"], [{}],
    )  # fmt: skip
    batch = Experience(
        rollout, logprobs=columns["old_log_prob"], advantages=advantages.astype(np.float32),
        values=columns["old_values"], returns=columns["returns"],
    )  # fmt: skip
    window = Window(batch, size, 1, size + 1, 1, True, None)
    method = nlpo(entropy_coeff=entry["options"]["ent_coef"], clip_range_value=1e6)
    leaves = {name: paddle.to_tensor(columns[name], stop_gradient=False) for name in ("log_prob", "entropy", "values")}
    actor = method.actor_loss(leaves["log_prob"], leaves["entropy"], batch, window)
    critic = method.critic_loss(leaves["values"], batch, window)
    (actor.total + critic.total).backward()
    expected = entry["expected"]
    close = {"rtol": 1e-4, "atol": 1e-6}
    np.testing.assert_allclose(float(actor.total + critic.total), expected["total"], **close)
    np.testing.assert_allclose(float(actor.sums["train/actor_loss"][0]), expected["policy_loss"], **close)
    np.testing.assert_allclose(leaves["log_prob"].grad.numpy()[0], expected["grad_log_prob"], **close)
    np.testing.assert_allclose(leaves["values"].grad.numpy()[0], expected["grad_values"], **close)
    np.testing.assert_allclose(leaves["entropy"].grad.numpy()[0], expected["grad_entropy"], **close)


def test_a_mask_that_a_checkpoint_does_not_have_is_said(
    online_json: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"save_strategy": "steps", "save_steps": 1}
    assert main(["nlpo", str(online_json("run", **{**keys, "max_steps": 1, "top_mask": -1}))]) == 0
    assert main(["nlpo", str(online_json("run", **keys)), "resume_from_checkpoint=true"]) == 2
    assert "checkpoint-1 has no masking: it was saved by a run without that model" in capsys.readouterr().err
