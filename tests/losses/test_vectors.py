"""Conformance with the numbers that the peers' own functions return on one fixed input (shared/vectors/losses.json)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import paddle
import pytest

from alignment.losses.advantages import gae, whiten
from alignment.losses.estimators import ADVANTAGES, AdvantageInputs, AdvantageOptions
from alignment.losses.kl import AdaptiveKLController, FixedKLController, kl_estimate, shape_rewards
from alignment.losses.lagrange import LagrangeMultiplier, safe_advantages
from alignment.losses.policy import aggregate, policy_loss, value_loss

TOLERANCE = {np.float32: 1e-6, np.float64: 1e-8}


@pytest.fixture(scope="module")
def vectors(shared_data: Path) -> dict:
    return json.loads((shared_data.parent / "vectors" / "losses.json").read_text())


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def case(request: pytest.FixtureRequest, vectors: dict) -> dict:
    inputs = vectors["inputs"]
    arrays = {
        key: np.asarray(inputs[key], dtype=request.param)
        for key in ("logprobs", "ref_logprobs", "new_logprobs", "values", "new_values", "mask", "scores")
    }
    arrays["response_len"] = arrays["mask"].sum(-1).astype(int)
    return {**arrays, "inputs": inputs, "results": vectors["results"], "atol": TOLERANCE[request.param]}


def tensors(*arrays: np.ndarray) -> list[paddle.Tensor]:
    return [paddle.to_tensor(array) for array in arrays]


def rewards_of(case: dict) -> np.ndarray:
    kl = kl_estimate(case["logprobs"], case["ref_logprobs"], "k1") * case["mask"]
    return shape_rewards(case["scores"], kl, case["response_len"], case["inputs"]["kl_coef"], None)


def advantages_of(case: dict) -> tuple[np.ndarray, np.ndarray]:
    return gae(rewards_of(case), case["values"], case["mask"], case["inputs"]["gamma"], case["inputs"]["lam"])


def close(got: object, wanted: object, case: dict) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), np.asarray(wanted, np.float64), rtol=0, atol=case["atol"])


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimators_are_verls(case: dict, kind: str) -> None:
    close(
        kl_estimate(case["logprobs"], case["ref_logprobs"], kind) * case["mask"],
        case["results"]["verl HEAD core_algos"][f"kl_penalty/{kind}"],
        case,
    )


def test_rewards_with_the_score_at_the_last_token_are_trl_v1s(case: dict) -> None:
    wanted = case["results"]["TRL v0.11.4 PPOTrainer"]["rewards(score at last unmasked token)"]
    close(rewards_of(case), wanted, case)


def test_raw_advantages_and_returns(case: dict) -> None:
    advantages, returns = advantages_of(case)
    close(advantages, case["results"]["shared"]["gae_raw_advantages(no whitening)"], case)
    close(returns, case["results"]["shared"]["gae_raw_returns"], case)


def test_whitened_advantages_are_verls(case: dict) -> None:
    advantages, _ = advantages_of(case)
    wanted = case["results"]["verl HEAD core_algos"]["gae_advantages_whitened"]
    close(whiten(advantages, case["mask"]), wanted, case)


def test_whitened_rewards_keep_their_mean_as_in_trl_v1(case: dict) -> None:
    """TRL v1 gives the padded slots a whitened reward too, which then leaks into its advantages; put there, ours give
    its numbers.
    """
    raw, inside = rewards_of(case), case["mask"].astype(bool)
    scale = 1.0 / np.sqrt(raw[inside].var(ddof=1) + 1e-8)
    pad_value = raw[inside].mean() * (1.0 - scale)
    rewards = np.where(inside, whiten(raw, case["mask"]) + raw[inside].mean(), pad_value).astype(raw.dtype)
    everywhere = np.ones_like(case["mask"])
    advantages, returns = gae(rewards, case["values"], everywhere, case["inputs"]["gamma"], case["inputs"]["lam"])
    trl = case["results"]["TRL v0.11.4 PPOTrainer"]
    close(returns, trl["returns_whiten_rewards=True"], case)
    close(whiten(advantages, case["mask"])[inside], np.asarray(trl["advantages_whiten_rewards=True"])[inside], case)


def loss_inputs(case: dict) -> list[paddle.Tensor]:
    advantages = whiten(advantages_of(case)[0], case["mask"])
    return tensors(case["new_logprobs"], case["logprobs"], advantages, case["mask"])


def test_policy_loss_token_mean_is_that_of_seven_peers(case: dict) -> None:
    result = policy_loss(*loss_inputs(case))
    close(result.loss, case["results"]["TRL v0.11.4 PPOTrainer"]["policy_loss(token mean)"], case)
    stats = case["results"]["TRL v0.11.4 PPOTrainer"]["stats"]
    count = case["mask"].sum()
    close(float(result.approx_kl) / count, stats["policy/approxkl"], case)
    close(float(result.clip_fraction) / count, stats["policy/clipfrac"], case)


def test_policy_loss_sequence_mean_is_openrlhfs(case: dict) -> None:
    close(
        policy_loss(*loss_inputs(case), mean="sequence").loss,
        case["results"]["OpenRLHF HEAD"]["PolicyLoss sample-mean"][0],
        case,
    )


def test_policy_loss_sequence_mean_on_raw_advantages_is_safe_rlhfs(case: dict) -> None:
    new, old, _, mask = loss_inputs(case)
    raw = paddle.to_tensor(advantages_of(case)[0])
    wanted = case["results"]["safe-rlhf (transcribed)"]["ppo actor_loss (per-sequence masked mean, then batch mean)"]
    close(policy_loss(new, old, raw, mask, mean="sequence").loss, wanted, case)


def test_policy_loss_clip_higher_is_verls(case: dict) -> None:
    result = policy_loss(*loss_inputs(case), 0.2, 0.28)
    close(result.loss, case["results"]["verl HEAD core_algos"]["policy_loss clip-higher 0.2/0.28"][0], case)


@pytest.mark.parametrize(
    ("peer", "key", "bound"),
    [
        ("OpenRLHF HEAD", "PolicyLoss dual_clip=1.1", 1.1),
        ("verl HEAD core_algos", "policy_loss dual-clip c=3 (loss, clipfrac, ppo_kl, clipfrac_lower)", 3.0),
    ],
)
def test_policy_loss_dual_clip(case: dict, peer: str, key: str, bound: float) -> None:
    close(policy_loss(*loss_inputs(case), dual_clip=bound).loss, case["results"][peer][key][0], case)


def test_value_loss(case: dict) -> None:
    returns = advantages_of(case)[1]
    arguments = tensors(case["new_values"], case["values"], returns, case["mask"])
    loss, clipped = value_loss(*arguments, clip_range_value=0.2)
    close(loss, case["results"]["verl HEAD core_algos"]["value_loss(token-mean, 0.5*)"], case)
    close(float(clipped) / case["mask"].sum(), case["results"]["verl HEAD core_algos"]["value_clipfrac"], case)
    close(value_loss(*arguments)[0], case["results"]["OpenRLHF HEAD"]["ValueLoss noclip"], case)
    wanted = case["results"]["safe-rlhf (transcribed)"]["critic_loss clip .2"]
    close(value_loss(*arguments, clip_range_value=0.2, mean="sequence")[0], wanted, case)


@pytest.mark.parametrize(
    ("mean", "key", "scale"),
    [
        ("token", "agg_loss/token-mean of (new-old)^2", 1.0),
        ("sequence", "agg_loss/seq-mean-token-mean of (new-old)^2", 1.0),
    ],
)
def test_aggregation(case: dict, mean: str, key: str, scale: float) -> None:
    squared = np.square(case["new_logprobs"] - case["logprobs"])
    losses, mask = tensors(squared, case["mask"])
    close(scale * float(aggregate(losses, mask, mean)), case["results"]["verl HEAD core_algos"][key], case)


def test_adaptive_kl_controller(vectors: dict) -> None:
    wanted = next(value for key, value in vectors["results"].items() if key.startswith("AdaptiveKL"))
    controller, got = AdaptiveKLController(0.2, target=6.0, horizon=1e4), []
    for current in (0, 3, 6, 7, 12, -1):
        controller.update(current, 256)
        got.append(controller.kl_coeff)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12)
    fixed = FixedKLController(0.2)
    fixed.update(100.0, 256)
    assert fixed.kl_coeff == 0.2


def cost_advantages_of(case: dict) -> tuple[np.ndarray, np.ndarray]:
    """The cost's token stream, with the KL added, and its advantages (the vectors' cost critic says ``new_values``)."""
    safe = case["inputs"]["safe_rlhf"]
    costs = np.asarray(safe["cost"], case["scores"].dtype)
    kl = kl_estimate(case["logprobs"], case["ref_logprobs"], "k1") * case["mask"]
    stream = shape_rewards(costs, kl, case["response_len"], -case["inputs"]["kl_coef"], safe["clip_range_score"])
    return stream, gae(stream, case["new_values"], case["mask"], case["inputs"]["gamma"], case["inputs"]["lam"])[0]


def test_streams_and_advantages_of_reward_and_cost_are_safe_rlhfs(case: dict) -> None:
    wanted = case["results"]["safe-rlhf (transcribed)"]
    stream, advantages = cost_advantages_of(case)
    close(rewards_of(case), wanted["reward stream"], case)
    close(stream, wanted["cost stream (+beta*KL)"], case)
    close(advantages_of(case)[0], wanted["reward_adv(no whitening)"], case)
    close(advantages, wanted["cost_adv"], case)


def test_policy_loss_on_safe_advantages_is_ppo_lags(case: dict) -> None:
    wanted = case["results"]["safe-rlhf (transcribed)"]["ppo_lag actor_loss, A=(Ar-lam*Ac)/(1+lam)"]
    mixed = safe_advantages(
        advantages_of(case)[0], cost_advantages_of(case)[1], case["inputs"]["safe_rlhf"]["lambda"]
    ).astype(case["mask"].dtype)
    new, old, advantages, mask = tensors(case["new_logprobs"], case["logprobs"], mixed, case["mask"])
    close(policy_loss(new, old, advantages, mask, mean="sequence").loss, wanted, case)


def test_lagrange_multiplier_is_safe_rlhfs(vectors: dict) -> None:
    (wanted,) = (value for key, value in vectors["results"]["safe-rlhf (transcribed)"].items() if "lambda" in key)
    multiplier, got = LagrangeMultiplier(1.0, learning_rate=0.1, limit=0.0, largest=5.0), []
    for cost in (0.5, 0.5, -0.2, 2.0):
        resumed = LagrangeMultiplier(1.0, learning_rate=0.1, limit=0.0, largest=5.0)
        resumed.load_state_dict(multiplier.state_dict())
        multiplier = resumed
        multiplier.update(cost)
        got.append(multiplier.value)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-8)
    for _ in range(100):
        multiplier.update(2.0)
    assert multiplier.value == 5.0


@pytest.mark.parametrize(
    ("key", "name", "options"),
    [
        ("grpo(norm by std)", "grpo", {}),
        ("dr_grpo(no std)", "grpo", {"scale": "none"}),
        ("rloo", "rloo", {}),
        ("reinforce++", "reinforce_plus_plus", {}),
        ("reinforce++_baseline", "reinforce_plus_plus_baseline", {}),
    ],
)
def test_group_estimators_are_verls(vectors: dict, key: str, name: str, options: dict) -> None:
    group = vectors["inputs"]["group"]
    inputs = AdvantageInputs(
        scores=np.asarray(group["scores_at_last_token"], np.float64),
        mask=np.asarray(group["mask"]),
        groups=np.unique(group["prompt_index"], return_inverse=True)[1],
        options=AdvantageOptions(**options),
    )
    wanted = vectors["results"]["verl HEAD core_algos"][key]
    np.testing.assert_allclose(ADVANTAGES[name](inputs).advantages, wanted, rtol=0, atol=1e-8)
