"""What the models say must not depend on padding, batch mates or micro-batch size; and odd answers must not break
anything.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle
import pytest

from alignment.engine.engine import Engine
from alignment.kernels.ops import kernels
from alignment.parallel import World
from alignment.ppo.models import causal_logits, final_hidden_states, load_causal_lm, load_score_model
from alignment.rollout.roles import PolicyRole, RewardRole, ValueRole, rows_of
from alignment.rollout.rollout import Rollout
from tests.precision import DTYPE

from .conftest import make_rollout

LENGTHS = [(5, 4), (2, 1), (7, 6), (3, 0), (1, 6)]


@pytest.fixture(scope="module")
def policy(policy_dir: Path) -> PolicyRole:
    return PolicyRole(Engine("reference", load_causal_lm(str(policy_dir), dtype=DTYPE), World()), 0.8, 2)


@pytest.fixture(scope="module")
def critic(policy_dir: Path) -> ValueRole:
    return ValueRole(Engine("critic", load_score_model(str(policy_dir), score_type="critic", dtype=DTYPE), World()), 2)


def expected_logprobs(role: PolicyRole, rollout: Rollout) -> np.ndarray:
    """Row by row, without padding, by a float64 log-softmax on the host; over the allowed tokens where a rollout has
    them.
    """
    result = np.zeros_like(rollout.mask)
    for i in range(len(rollout)):
        start, length = int(rollout.prompt_len[i]), int(rollout.lengths[i])
        with paddle.no_grad():
            logits = causal_logits(role.engine.model, paddle.to_tensor(rollout.tokens[i : i + 1, :length]), [length])
        wide = logits.numpy()[0].astype(np.float64) / role.temperature
        sets = rollout.select([i]).allowed
        if sets is not None and len(sets):
            wide[start - 1 : length - 1][~sets.mask(wide.shape[1])] = -np.inf
        logprobs = (
            wide
            - np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - wide.max(-1, keepdims=True)
        )
        result[i, : length - start] = logprobs[np.arange(start - 1, length - 1), rollout.tokens[i, start:length]]
    return result


@pytest.mark.parametrize("micro", [1, 2, 5])
def test_logprobs_are_those_of_each_row_alone(policy: PolicyRole, micro: int) -> None:
    rollout = make_rollout(LENGTHS)
    role = PolicyRole(policy.engine, policy.temperature, micro)
    got = role.logprobs(rollout)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected_logprobs(policy, rollout), atol=2e-5)
    with paddle.no_grad():
        forward, entropy = role.of_hidden(role.engine.hidden_states(rows_of(rollout)), rollout)
    np.testing.assert_allclose(forward.numpy(), got, atol=1e-5)
    assert (entropy.numpy()[rollout.mask > 0] > 0).all()
    assert not entropy.numpy()[rollout.mask == 0].any()


@pytest.mark.parametrize("micro", [1, 2, 5])
def test_masked_logprobs_are_over_each_tokens_own_set(policy: PolicyRole, micro: int) -> None:
    """NLPO: whatever micro batches the rows are in; without ``masked`` they are over everything."""
    rollout, plain = make_rollout(LENGTHS, masked=True), make_rollout(LENGTHS)
    role = PolicyRole(policy.engine, policy.temperature, micro)
    got = role.logprobs(rollout, masked=True)
    np.testing.assert_allclose(got, expected_logprobs(policy, rollout), atol=2e-5)
    with paddle.no_grad():
        hidden = role.engine.hidden_states(rows_of(rollout))
        forward, entropy = role.of_hidden(hidden, rollout, masked=True)
        _, unmasked = role.of_hidden(hidden, rollout)
    np.testing.assert_allclose(forward.numpy(), got, atol=1e-5)
    assert (entropy.numpy() < unmasked.numpy())[rollout.mask > 0].all()
    np.testing.assert_array_equal(role.logprobs(rollout), role.logprobs(plain))
    np.testing.assert_array_equal(role.logprobs(plain, masked=True), role.logprobs(plain))


def test_a_budget_of_tokens_gives_every_row_its_own_figures(policy: PolicyRole, critic: ValueRole) -> None:
    rollout = make_rollout(LENGTHS)
    reward = RewardRole(critic.engine, 2)
    scores = reward.score_rows(rollout.tokens, rollout.lengths)
    for budget in (1, 14, 25, 1000):
        role = PolicyRole(policy.engine, policy.temperature, 2, budget)
        np.testing.assert_allclose(role.logprobs(rollout), policy.logprobs(rollout), atol=1e-5)
        np.testing.assert_allclose(
            ValueRole(critic.engine, 2, budget).values(rollout), critic.values(rollout), atol=1e-5
        )
        grouped = RewardRole(critic.engine, 2, budget).score_rows(rollout.tokens, rollout.lengths)
        np.testing.assert_allclose(grouped, scores, atol=1e-5)


def test_on_a_cpu_no_pad_is_computed(policy: PolicyRole, critic: ValueRole) -> None:
    rollout = make_rollout(LENGTHS)
    behind = np.arange(rollout.tokens.shape[1]) >= rollout.lengths[:, None]
    for engine in (policy.engine, critic.engine):
        with paddle.no_grad():
            hidden = engine.hidden_states(rows_of(rollout)).numpy()
        assert hidden[~behind].any(axis=1).all()
        assert hidden[behind].any() == (kernels() is None)


def test_pads_and_their_id_and_the_order_of_rows_change_nothing(policy: PolicyRole, critic: ValueRole) -> None:
    rollout, other_pad = make_rollout(LENGTHS), make_rollout(LENGTHS, pad_id=0)
    order = [3, 1, 4, 0, 2]
    for function in (policy.logprobs, critic.values):
        plain = function(rollout)
        np.testing.assert_allclose(function(other_pad), plain, atol=1e-5)
        np.testing.assert_allclose(function(rollout.select(order)), plain[order], atol=1e-5)


def test_values_are_those_of_the_state_before_each_token(critic: ValueRole) -> None:
    rollout = make_rollout([(4, 3)])
    values = critic.values(rollout)
    tokens = rollout.tokens.copy()
    tokens[0, -1] = (tokens[0, -1] + 1) % 300
    # the last token follows every state, so no value may see it
    np.testing.assert_array_equal(critic.values(rollout.add("token", tokens=tokens)), values)
    tokens[0, 4] = (tokens[0, 4] + 1) % 300
    after = critic.values(rollout.add("token", tokens=tokens))
    assert after[0, 0] == values[0, 0]
    assert after[0, 1] != values[0, 1]


def test_rows_without_any_answer(policy: PolicyRole, critic: ValueRole) -> None:
    rollout = make_rollout([(3, 0), (2, 0)])
    assert policy.logprobs(rollout).tolist() == [[0.0], [0.0]]
    assert critic.values(rollout).tolist() == [[0.0], [0.0]]
    logprobs, _ = policy.of_hidden(policy.engine.hidden_states(rows_of(rollout)), rollout)
    assert logprobs.numpy().tolist() == [[0.0], [0.0]]


def test_the_reward_is_read_at_the_last_real_token(policy_dir: Path) -> None:
    model = load_score_model(str(policy_dir), score_type="reward", dtype=DTYPE)
    role = RewardRole(Engine("reward", model, World()), 2)
    rollout = make_rollout(LENGTHS)
    scores = role.score_rows(rollout.tokens, rollout.lengths)
    alone = [
        role.score_rows(rollout.tokens[i : i + 1, : rollout.lengths[i]], rollout.lengths[i : i + 1])[0]
        for i in range(5)
    ]
    np.testing.assert_allclose(scores, alone, atol=1e-5)
    longer = np.pad(rollout.tokens, ((0, 0), (0, 4)), constant_values=0)
    np.testing.assert_allclose(role.score_rows(longer, rollout.lengths), scores, atol=1e-5)
    assert role.score_rows(np.zeros((0, 3), np.int64), np.zeros(0, np.int64)).shape == (0,)


def test_supervised_loss_counts_labels_only(policy: PolicyRole) -> None:
    ids = np.array([[5, 6, 7, 8], [9, 10, 1, 1]])
    labels = np.array([[-100, -100, 7, 8], [-100, 10, -100, -100]])
    hidden = final_hidden_states(policy.engine.model, paddle.to_tensor(ids))
    total, count = policy.negative_log_likelihood(hidden, labels)
    assert count == 3
    with paddle.no_grad():
        logits = causal_logits(policy.engine.model, paddle.to_tensor(ids), [4, 2]).numpy().astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert float(total) == pytest.approx(-(logprobs[0, 1, 7] + logprobs[0, 2, 8] + logprobs[1, 0, 10]), abs=1e-4)
    assert policy.negative_log_likelihood(hidden, np.full_like(labels, -100))[1] == 0
