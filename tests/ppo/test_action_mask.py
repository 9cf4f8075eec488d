"""Answers with tokens that the policy did not choose (a tool's reply): nothing is learnt from them, nothing is counted.

Two answers; ``.`` is a token that a tool put in::

    a a . . a      score 4
    a a a . .      score 2: its last token is no action
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from alignment.arguments import from_dict
from alignment.cli import main
from alignment.flow.method import Window
from alignment.flow.online import describe_experience
from alignment.losses.kl import FixedKLController
from alignment.methods import arguments_of
from alignment.methods.ppo import PPO
from alignment.rollout.rewards import RewardResult
from alignment.rollout.rollout import Experience

from .conftest import make_rollout, metric_rows

ACTIONS = np.array([[1, 1, 0, 0, 1], [1, 1, 1, 0, 0]], bool)
LOGPROBS = np.array([[-1.0, -1.0, -50.0, -50.0, -1.0], [-2.0, -2.0, -2.0, -50.0, -50.0]], np.float32)
KL = np.array([[0.1, 0.2, 9.0, 9.0, 0.3], [0.2, 0.4, 0.6, 9.0, 9.0]], np.float32)
VALUES = np.array([[1.0, 2.0, 7.0, 7.0, 3.0], [1.0, 1.0, 2.0, 7.0, 7.0]], np.float32)


def ppo(**keys: Any) -> PPO:
    given = {"actor_model_name_or_path": "a", "output_dir": "o", "reward": "gsm8k", "train_datasets": "t"}
    method = PPO(from_dict(arguments_of(PPO), {**given, "kl_coeff": 0.1, "gae_lambda": 0.5, **keys}))
    method.kl_controller = FixedKLController(method.args.kl_coeff)
    return method


def experience(**keys: Any) -> Experience:
    rollout = make_rollout([(3, 5), (2, 5)]).add("response", action_mask=ACTIONS, rollout_logprobs=LOGPROBS)
    scores = RewardResult(np.array([4.0, 2.0], np.float32), {})
    return ppo(**keys).experience(rollout, LOGPROBS, LOGPROBS - KL, scores, VALUES)


def test_advantages_are_carried_over_the_hole_and_the_score_is_at_the_last_action() -> None:
    """gamma 1, lambda 0.5, beta 0.1: row 1 from its end: 3.97 - 3 = 0.97; -0.02 + 3 - 2 + 0.97 / 2 = 1.465;
    -0.01 + 2 - 1 + 1.465 / 2 = 1.7225. Row 2: 1.94 - 2 = -0.06; -0.04 + 2 - 1 - 0.03 = 0.93; -0.02 + 0.93 / 2 = 0.445.
    """
    made = experience()
    rewards = [[-0.01, -0.02, 0, 0, 3.97], [-0.02, -0.04, 1.94, 0, 0]]
    advantages = np.array([[1.7225, 1.465, 0, 0, 0.97], [0.445, 0.93, -0.06, 0, 0]])
    np.testing.assert_allclose(made["rewards"], rewards, atol=1e-6)
    np.testing.assert_allclose(made["advantages"], advantages, atol=1e-6)
    np.testing.assert_allclose(made["returns"], advantages + VALUES * ACTIONS, atol=1e-6)
    normal = experience(normalize_advantage=True)["advantages"]
    six = advantages[ACTIONS]
    np.testing.assert_allclose(normal[ACTIONS], (six - six.mean()) / six.std(ddof=1), atol=1e-5)
    assert (normal[~ACTIONS] == 0).all()


def test_figures_count_what_the_policy_chose() -> None:
    """3 tokens of each answer; KL 0.6 and 1.2."""
    figures = describe_experience(experience(), 0.1, 50.0).result()
    assert figures["train/mean_generated_length"] == figures["train/max_generated_length"] == 3.0
    assert figures["train/kl_divergence"] == pytest.approx(0.9)
    assert figures["train/kl_divergence_per_token"] == pytest.approx(0.3)
    assert figures["train/values"] == pytest.approx(10 / 6)
    assert figures["train/advantages"] == pytest.approx((1.7225 + 1.465 + 0.97 + 0.445 + 0.93 - 0.06) / 6)
    assert figures["train/rollout_logprob_gap"] == 0.0


@pytest.mark.parametrize("mean", ["token", "sequence"])
def test_losses_are_over_actions_and_nothing_else_has_a_gradient(mean: str) -> None:
    """Six tokens; what the network says of the others may be anything."""
    method, batch = ppo(entropy_coeff=0.01, policy_loss_mean=mean), experience()
    window = Window(batch, tokens=6, answers=2, all_tokens=15, rows=2, first_pass=True, after=None)
    found = []
    for elsewhere in (0.0, 80.0):
        moved = np.where(ACTIONS, 0.05, elsewhere).astype(np.float32)
        leaves = [paddle.to_tensor(part + moved, stop_gradient=False) for part in (LOGPROBS, KL * 0 + 1, VALUES)]
        actor = method.actor_loss(leaves[0], leaves[1], batch, window)
        critic = method.critic_loss(leaves[2], batch, window)
        (actor.total + critic.total).backward()
        gradients = [leaf.grad.numpy() for leaf in leaves]
        assert all((part[~ACTIONS] == 0).all() and np.isfinite(part).all() for part in gradients)
        assert (gradients[0][ACTIONS] != 0).all()
        sums = {**actor.sums, **critic.sums}
        assert all(sums[f"train/{name}"][1] == 6 for name in ("entropy", "approx_kl", "reward_critic_loss"))
        assert sums["train/actor_loss"][1] == (6 if mean == "token" else 2)
        assert float(actor.maxima["train/ratio_max"]) == pytest.approx(np.exp(0.05), rel=1e-5)
        found.append((float(actor.total), float(critic.total)))
    assert found[0] == found[1]
    ratio, bonus = np.exp(0.05), 0.01 * 1.05
    advantages = batch["advantages"]
    each = -(advantages * ratio) * ACTIONS
    wanted = each.sum() / 6 if mean == "token" else (each.sum(axis=1) / 3).mean()
    assert found[0][0] == pytest.approx(wanted - bonus, rel=1e-5)
    squares = 0.5 * np.square(VALUES + 0.05 - batch["returns"]) * ACTIONS
    assert found[0][1] == pytest.approx(squares.sum() / 6, rel=1e-5)


HOLED = '''
from alignment.arguments.critic_keys import CriticKeys
from alignment.methods.ppo import PPO

class Holed(PPO):
    """Every third token is a tool's, and all of every fourth answer."""

    name, title, summary = "holed", "Holed", "PPO with tools' tokens"
    Arguments, Keys = None, CriticKeys

    def generate(self, actor, prompts):
        rollout = super().generate(actor, prompts)
        if rollout is None:
            return None
        mask = rollout["action_mask"].copy()
        mask[:, 2::3] = False
        mask[rollout.prompt_index % 4 == 3] = False
        return rollout.add("response", action_mask=mask)
'''


def test_a_run_counts_and_learns_from_actions_alone(ppo_json: Callable[..., Path], tmp_path: Path) -> None:
    """Micro batches of one row: some have nothing to teach."""
    (tmp_path / "holed.py").write_text(HOLED)
    keys = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "rollout_correction": "tis"}
    keys |= {"evaluation_strategy": "no", "eval_datasets": None, "do_eval": None, "ptx_datasets": None, "ptx_coeff": 0}
    keys |= {"num_train_epochs": 1, "min_dec_len": 10, "policy_loss_mean": "sequence"}
    assert main(["run", f"{tmp_path / 'holed.py'}:Holed", str(ppo_json("run", **keys))]) == 0
    rows = [row for row in metric_rows(tmp_path / "run") if "train/reward" in row]
    assert len(rows) == 12
    for row in rows:  # of 10 tokens 7 are the policy's, in three of four answers
        assert row["train/mean_generated_length"] == pytest.approx(0.75 * 7)
        assert row["train/max_generated_length"] == 7
        assert all(np.isfinite(value) for key, value in row.items() if key.startswith("train/"))
    assert rows[0]["train/approx_kl"] == pytest.approx(0, abs=1e-9)
