"""The update: windows, global normalisation, invariants, and what stops it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.engine.engine import Engine, OptimizerSettings
from alignment.errors import InvariantError, NonFiniteError
from alignment.flow.invariants import FirstStepCheck, Guard
from alignment.flow.method import Window
from alignment.flow.online import describe_experience
from alignment.flow.statistics import Statistics
from alignment.flow.update import Position, Updater, split_windows
from alignment.losses.advantages import RunningMoments
from alignment.losses.kl import FixedKLController
from alignment.methods.ppo import PPO
from alignment.parallel import Topology, World
from alignment.ppo.models import load_causal_lm, load_score_model
from alignment.rollout.rewards import RewardResult
from alignment.rollout.roles import PolicyRole, ValueRole
from alignment.rollout.rollout import Experience, Rollout
from tests.precision import DTYPE, within

from .conftest import experience_with, make_rollout

LENGTHS = [(5, 4), (2, 1), (7, 6), (3, 0), (1, 6), (4, 2), (2, 2), (6, 5)]


def make_args(**changes: Any) -> SimpleNamespace:
    values: dict[str, Any] = {
        "update_iters": 1, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "seed": 3,
        "clip_range_value": 5.0, "value_coeff": 1.0, "clip_range_ratio_low": 0.2, "clip_range_ratio_high": 0.2,
        "dual_clip": None, "policy_loss_mean": "token", "entropy_coeff": 0.0, "target_kl": None,
        "critic_warmup_steps": 0, "ptx_coeff": 0.0, "output_dir": "unused", "max_tokens_per_micro_batch": 0,
        "normalize_advantage": True, "reward": "model",
        "checks": "strict", "missing_eos_rule": "none", "missing_eos_score": -1.0,
        "missing_eos_penalty": 1.0, "kl_estimator": "k1", "clip_range_score": 50.0, "gamma": 1.0, "gae_lambda": 0.95,
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def make_experience(rollout: Rollout, actor: PolicyRole, critic: ValueRole, args: Any) -> Experience:
    logprobs = actor.logprobs(rollout)
    scores = np.random.default_rng(0).normal(size=len(rollout)).astype(np.float32)
    method = PPO(args)
    method.kl_controller = FixedKLController(0.1)
    result = RewardResult(scores, {"model": scores})
    return method.experience(rollout, logprobs, logprobs - 0.1 * rollout.mask, result, critic.values(rollout))


class Setup:
    """A fresh actor and critic; learning rate and the rest as given."""

    def __init__(self, folder: Path, args: Any, learning_rate: float = 1e-3) -> None:
        settings_ = OptimizerSettings(learning_rate=learning_rate, lr_scheduler_type="constant", total_steps=100)
        self.args, self.tokens = args, list[int]()
        self.actor_engine = Engine("actor", load_causal_lm(str(folder), dtype=DTYPE), World(), settings_)
        self.critic_engine = Engine(
            "critic", load_score_model(str(folder), score_type="critic", dtype=DTYPE), World(), settings_
        )
        size, method = args.per_device_train_batch_size, PPO(args)
        self.actor = PolicyRole(self.actor_engine, 1.0, size, entropy_grad=args.entropy_coeff != 0.0)
        self.critic = ValueRole(self.critic_engine, size)
        decode = lambda ids: " ".join(map(str, ids))  # noqa: E731
        specs, roles = {spec.name: spec for spec in method.roles()}, {"actor": self.actor, "critic": self.critic}
        train = method.flow()["update"].run
        self.updater = Updater(args, World(), train, specs, roles, None, decode, Guard(args.checks))

    def run(self, experience: Experience, global_step: int = 0) -> list[dict[str, float]]:
        rows: list[dict[str, float]] = []

        def keep(stats: Statistics, after: Position | None, tokens: int) -> bool:
            self.tokens.append(tokens)
            rows.append(stats.result())
            return True

        self.updater.run(experience, 0, global_step, keep)
        return rows


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_windows_cover_every_row_once_a_pass_and_ranks_share_them(
    rows: int, size: int, accumulation: int, passes: int, ranks: int
) -> None:
    args = make_args(update_iters=passes, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
    rollout = make_rollout([(2, 1 + i % 3) for i in range(rows)])
    zeros = np.zeros((rows, rollout.width), np.float32)
    flat = np.zeros(rows, np.float32)
    experience = experience_with(rollout, zeros, flat)
    single = list(split_windows(experience, make_args(
        update_iters=passes, per_device_train_batch_size=size * ranks, gradient_accumulation_steps=accumulation
    ), World(), 5))  # fmt: skip
    shares = [list(split_windows(experience, args, World(Topology(ranks, rank)), 5)) for rank in range(ranks)]
    for windows in zip(single, *shares, strict=True):
        whole, parts = windows[0], windows[1:]
        assert [i for part in parts for i in part.mine.rollout.prompt_index] == whole.mine.rollout.prompt_index.tolist()
        assert {part.tokens for part in parts} == {whole.tokens} == {int(whole.mine.rollout.response_len.sum())}
    seen = [int(i) for window in single for i in window.mine.rollout.prompt_index]
    assert sorted(seen) == sorted(list(range(rows)) * passes)
    assert [window.first_pass for window in single].count(True) == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 7), st.integers(1, 7), st.integers(1, 3), st.data())
def test_an_update_goes_on_where_it_was_left(
    rows: int, size: int, other: int, passes: int, data: st.DataObject
) -> None:
    rollout = make_rollout([(2, 1 + i % 3) for i in range(rows)])
    zeros, flat = np.zeros((rows, rollout.width), np.float32), np.zeros(rows, np.float32)
    experience = experience_with(rollout, zeros, flat)

    def windows(size: int, begin: Position | None = None) -> list[Window]:
        args = make_args(update_iters=passes, per_device_train_batch_size=size)
        return list(split_windows(experience, args, World(), 5, begin))

    def indices(parts: list[Window]) -> list[list[int]]:
        return [part.mine.rollout.prompt_index.tolist() for part in parts]

    whole = windows(size)
    assert whole[-1].after is None
    left = data.draw(st.integers(0, len(whole) - 1))
    begin = whole[left - 1].after if left else Position()
    assert indices(windows(size, begin)) == indices(whole[left:])
    assert [part.first_pass for part in windows(size, begin)] == [part.first_pass for part in whole[left:]]
    # with another batch size the rows that are left and their order stay the same
    assert sum(indices(windows(other, begin)), []) == sum(indices(whole[left:]), [])


def test_passes_are_shuffled_afresh() -> None:
    rollout = make_rollout([(2, 2)] * 16)
    zeros, flat = np.zeros((16, 2), np.float32), np.zeros(16, np.float32)
    experience = experience_with(rollout, zeros, flat)
    windows = list(split_windows(experience, make_args(update_iters=2, per_device_train_batch_size=16), World(), 0))
    orders = [window.mine.rollout.prompt_index.tolist() for window in windows]
    assert orders[0] != orders[1] != list(range(16))


@pytest.mark.parametrize("mean", ["token", "sequence"])
def test_micro_batch_size_changes_nothing(policy_dir: Path, mean: str) -> None:
    results = []
    for size, accumulation in ((8, 1), (4, 2), (3, 3), (1, 8)):
        args = make_args(
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            policy_loss_mean=mean,
            update_iters=2,
        )
        setup = Setup(policy_dir, args)
        experience = make_experience(make_rollout(LENGTHS), setup.actor, setup.critic, args)
        results.append(setup.run(experience))
    for rows in results[1:]:
        for one, other in zip(results[0], rows, strict=True):
            assert one.keys() == other.keys()
            for key in one:
                assert other[key] == pytest.approx(one[key], abs=2e-5, rel=1e-4), key


def test_a_budget_of_tokens_changes_no_update(policy_dir: Path) -> None:
    """Grouped by length, in any number of micro batches, in any order of the rows: the same weights afterwards."""
    results = []
    for budget, order in ((0, range(8)), (1, range(8)), (30, range(8)), (30, range(7, -1, -1)), (1000, range(8))):
        args = make_args(max_tokens_per_micro_batch=budget)
        setup = Setup(policy_dir, args, learning_rate=1e-4)
        rollout = make_rollout(LENGTHS)
        experience = make_experience(rollout.select(list(range(len(rollout)))[:8]), setup.actor, setup.critic, args)
        setup.run(experience.select(order))
        weights = [p.numpy() for e in (setup.actor_engine, setup.critic_engine) for p in e.parameters.values()]
        results.append(weights)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_first_pass_has_ratio_one_and_the_next_one_moves(policy_dir: Path) -> None:
    setup = Setup(policy_dir, make_args(update_iters=3))
    check = FirstStepCheck({"actor": setup.actor_engine, "critic": setup.critic_engine}, Guard())
    setup.updater.first_step = check
    rows = setup.run(make_experience(make_rollout(LENGTHS), setup.actor, setup.critic, setup.args))
    assert rows[0]["train/approx_kl"] == pytest.approx(0, abs=1e-9)
    assert rows[0]["train/ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert rows[0]["train/clip_fraction"] == 0
    assert rows[2]["train/approx_kl"] > 1e-7
    assert check.done
    assert rows[2]["train/reward_critic_loss"] < rows[0]["train/reward_critic_loss"]


def test_a_network_that_scores_and_trains_differently_is_caught(policy_dir: Path) -> None:
    setup = Setup(policy_dir, make_args())
    experience = make_experience(make_rollout(LENGTHS), setup.actor, setup.critic, setup.args)
    experience = experience.add("response", logprobs=experience.logprobs + within(0.01, "caught gap"))
    with pytest.raises(InvariantError, match="on the first pass the importance ratio must be 1"):
        setup.run(experience)


@pytest.mark.parametrize("rate", [0.0, 1.6e-8, 1e-3])
def test_a_small_first_rate_is_no_fault(policy_dir: Path, rate: float) -> None:
    """rl 1, 2, A1: a weight of 1.0 cannot move by 1e-8, nor a bfloat16 one by 1e-5; the gradient reaches it."""
    setup = Setup(policy_dir, make_args(), learning_rate=rate)
    check = setup.updater.first_step = FirstStepCheck(
        {"actor": setup.actor_engine, "critic": setup.critic_engine}, Guard()
    )
    setup.run(make_experience(make_rollout(LENGTHS), setup.actor, setup.critic, setup.args))
    assert check.done
    check.frozen_tensors()


def test_a_tensor_that_the_loss_does_not_reach_is_caught(policy_dir: Path, capsys) -> None:
    setup = Setup(policy_dir, make_args())
    check = FirstStepCheck({"actor": setup.actor_engine}, Guard())
    check.after_step("actor", 0.0)  # advantages of 0 teach nothing, rightly
    assert not check.done
    head = setup.actor_engine.parameters["lm_head.weight"]
    head.grad = paddle.ones_like(head)
    setup.actor_engine.step()
    with pytest.raises(InvariantError, match=r"actor: .* no gradient reached 2\d of 2\d trainable tensors: \['qwen2"):
        check.after_step("actor", 1.0)
    check = FirstStepCheck({"actor": setup.actor_engine}, Guard("warn"))
    check.after_step("actor", 1.0)
    assert "no gradient reached" in capsys.readouterr().err


def test_a_frozen_model_that_moves_is_caught(policy_dir: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        model = load_causal_lm(str(policy_dir), dtype=DTYPE)
        check = FirstStepCheck({"reference": Engine("reference", model.astype(dtype), World())}, Guard())
        check.frozen_tensors()
        weight = next(iter(model.parameters()))
        values = weight.numpy()
        values.view(f"uint{8 * values.itemsize}").reshape(-1)[-1] += 1  # the smallest step there is
        weight.set_value(values)
        with pytest.raises(InvariantError, match="reference: these tensors are frozen, but changed"):
            check.frozen_tensors()


def test_one_tensor_rank_may_get_nothing_of_a_tensor(policy_dir: Path) -> None:
    """With a divided vocabulary a rank's rows of the embedding may rightly get no gradient in a batch."""

    class Two(World):
        def all_processes(self, value: Any, label: str = "") -> list[Any]:
            reached, missed = value
            return [value, (reached | missed - {"lm_head.weight"}, set())]

    setup = Setup(policy_dir, make_args())
    setup.actor_engine.world = Two()
    for parameter in list(setup.actor_engine.parameters.values())[1:]:
        parameter.grad = paddle.ones_like(parameter)
    setup.actor_engine.step()
    FirstStepCheck({"actor": setup.actor_engine}, Guard()).after_step("actor", 1.0)


def test_critic_warm_up_leaves_the_actor_alone(policy_dir: Path) -> None:
    setup = Setup(policy_dir, make_args(critic_warmup_steps=2, update_iters=3))
    before = setup.actor_engine.parameter_fingerprints()
    experience = make_experience(make_rollout(LENGTHS), setup.actor, setup.critic, setup.args)
    rows = setup.run(experience)
    assert ["train/actor_loss" in row for row in rows] == [False, False, True]
    assert setup.actor_engine.steps == 1
    assert setup.critic_engine.steps == 3
    assert setup.actor_engine.parameter_fingerprints() != before


def test_an_update_stops_when_the_policy_has_moved_too_far(policy_dir: Path) -> None:
    setup = Setup(policy_dir, make_args(update_iters=50, target_kl=1e-3), learning_rate=3e-3)
    rows = setup.run(make_experience(make_rollout(LENGTHS), setup.actor, setup.critic, setup.args))
    assert 1 < len(rows) < 50
    assert rows[-1]["train/early_stopped"] == 1.0
    assert rows[-1]["train/approx_kl"] > 1.5e-3
    assert all(row["train/approx_kl"] <= 1.5e-3 for row in rows[:-1])
    assert setup.actor_engine.steps == len(rows) - 1
    # rl 22: what an early stop left out is not counted
    assert setup.tokens == [int(make_rollout(LENGTHS).lengths.sum())] * len(rows)


def test_a_policy_that_has_gone_far_away_gives_finite_gradients(policy_dir: Path) -> None:
    """rl 24: a log-ratio beyond 88 has an infinite exponential, whose gradient is NaN though the loss is finite."""
    setup = Setup(policy_dir, make_args(checks="off"))
    experience = make_experience(make_rollout(LENGTHS), setup.actor, setup.critic, setup.args)
    experience = experience.add("response", logprobs=experience.logprobs - 200.0 * experience.mask)
    (row,) = setup.run(experience)
    assert np.isfinite(row["train/actor_grad_norm"])


def test_entropy_bonus_raises_entropy(policy_dir: Path) -> None:
    final = []
    for coefficient in (0.0, 1.0):
        setup = Setup(policy_dir, make_args(update_iters=10, entropy_coeff=coefficient))
        rows = setup.run(make_experience(make_rollout(LENGTHS), setup.actor, setup.critic, setup.args))
        final.append(rows[-1]["train/entropy"])
    assert final[1] > final[0]


@pytest.mark.parametrize("array", ["advantages", "returns"])
def test_a_non_finite_loss_stops_with_the_batch_dumped(policy_dir: Path, tmp_path: Path, array: str) -> None:
    setup = Setup(policy_dir, make_args(output_dir=str(tmp_path)))
    experience = make_experience(make_rollout(LENGTHS), setup.actor, setup.critic, setup.args)
    broken = experience[array].copy()
    broken[2, 1] = np.nan
    experience = experience.add("response", **{array: broken})
    before = setup.actor_engine.parameter_fingerprints()
    with pytest.raises(NonFiniteError, match=rf"loss became nan in step 1.*non-finite values in: {array}"):
        setup.run(experience)
    dump = np.load(tmp_path / "nonfinite_batch_step1.npz")
    assert np.isnan(dump[array]).sum() == 1
    assert (tmp_path / "nonfinite_batch_step1.json").read_text().count("\n") > 5
    assert setup.actor_engine.parameter_fingerprints() == before


def test_all_rows_identical_and_one_token_answers(policy_dir: Path) -> None:
    setup = Setup(policy_dir, make_args())
    rollout = make_rollout([(3, 1)]).select([0] * 8)
    rows = setup.run(make_experience(rollout, setup.actor, setup.critic, setup.args))
    assert np.isfinite(list(rows[0].values())).all()


def test_a_window_of_empty_answers_teaches_nothing(policy_dir: Path) -> None:
    setup = Setup(policy_dir, make_args())
    rollout = make_rollout([(3, 0), (2, 0)])
    experience = make_experience(rollout, setup.actor, setup.critic, setup.args)
    rows = setup.run(experience)
    assert rows[0]["train/actor_grad_norm"] == rows[0]["train/reward_critic_grad_norm"] == 0.0
    described = describe_experience(experience, 0.1, 50.0).result()
    assert described["train/mean_generated_length"] == 0.0


def test_the_scores_way_into_the_rewards() -> None:
    """Normalised, then the missing-EOS rule, then clipped, then at the last token."""
    rollout = make_rollout([(2, 3), (2, 1)])
    rollout = rollout.add(finished=np.array([True, False]))
    zeros = np.zeros((2, 3), np.float32)
    args = make_args(missing_eos_rule="score", missing_eos_score=-7.0, clip_range_score=5.0)
    args.normalize_advantage = False
    scores = np.array([3.0, 1.0], np.float32)
    method = PPO(args)
    method.kl_controller, method.moments = FixedKLController(0.1), RunningMoments()
    experience = method.experience(rollout, zeros, zeros, RewardResult(scores, {"model": scores}), zeros)
    np.testing.assert_allclose(experience.shaped_scores, [1.0, -7.0], atol=1e-6)
    np.testing.assert_allclose(experience.rewards, [[0, 0, 1.0], [-5.0, 0, 0]], atol=1e-6)
    assert experience.scores.tolist() == [3.0, 1.0]
