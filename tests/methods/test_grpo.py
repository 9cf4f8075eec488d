"""GRPO and its family through the public command, and against what the peers return."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from alignment.arguments import from_dict
from alignment.arguments.foreign import RL_ALGORITHMS
from alignment.cli import main
from alignment.errors import ArgumentsError
from alignment.flow.feeds import PromptFeed
from alignment.flow.refill import sample_with_spread
from alignment.losses.compat import COMPAT
from alignment.losses.estimators import ADVANTAGES, AdvantageInputs
from alignment.losses.groups import groups_with_spread
from alignment.losses.policy import POLICY_LOSSES
from alignment.methods import arguments_of
from alignment.methods.grpo import GRPO
from alignment.parallel import World
from alignment.rollout.rewards import RewardResult
from tests.parallel.forked import run_ranks
from tests.parallel.layouts import LAYOUTS, Layout, make_files
from tests.ppo.conftest import assert_same_metrics, make_rollout, metric_rows
from tests.precision import ARGUMENTS, BF16, read_weights

REPO = Path(__file__).resolve().parents[2]
GIVEN = {"actor_model_name_or_path": "a", "output_dir": "o", "reward": "gsm8k", "train_datasets": "t"}

#: Rewards: the answers of half of the prompts score alike; those of all do; one that does not apply to some prompts.
FLAT = """
def flat(prompts, responses, **row):
    return [0.5 if p.split()[3] in "bd" else float(sum(map(ord, r)) % 47) for p, r in zip(prompts, responses)]
def constant(prompts, responses, **row):
    return [1.0] * len(responses)
def polite(prompts, responses, **row):
    return [None if "a" == p.split()[3] else float(len(r) % 3) for p, r in zip(prompts, responses)]
"""
DYNAMIC = {"dynamic_sampling": True, "num_return_sequences": 4, "per_device_prompt_batch_size": 4}


def arguments(**keys: Any) -> Any:
    return from_dict(arguments_of(GRPO), {**GIVEN, **keys})


def refusal(**keys: Any) -> str:
    with pytest.raises(ArgumentsError) as caught:
        arguments(**keys)
    return str(caught.value)


@pytest.fixture
def flat(tmp_path: Path) -> str:
    file = tmp_path / "flat.py"
    file.write_text(FLAT)
    return str(file)


def trained(out: Path) -> dict[str, np.ndarray]:
    return read_weights(out / "policy")


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = trained(one), trained(other)
    assert first.keys() == second.keys() and first
    for name in first:
        np.testing.assert_array_equal(second[name], first[name], err_msg=name)


def on_two_processes(argv: Sequence[str], folder: Path) -> None:
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", str(folder)]
    command += [str(REPO / "alignment" / "__main__.py"), *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("preset", ["grpo", "dr_grpo", "cispo"])
def test_it_learns_what_is_rewarded(preset: str, online_json: Callable[..., Path], tmp_path: Path) -> None:
    """The reward asks for vowels in short answers; 40 steps raise it by far more than its noise."""
    file = online_json("run", max_steps=40, learning_rate=1e-2, num_return_sequences=4, per_device_prompt_batch_size=4)
    assert main([preset, str(file), "num_train_epochs=100"]) == 0
    rows = [row for row in metric_rows(tmp_path / "run") if "train/reward" in row]
    rewards = [row["train/reward"] for row in rows]
    assert np.mean(rewards[-8:]) > np.mean(rewards[:8]) + 0.3
    assert rows[0]["train/rollout_logprob_gap"] < (0.5 if BF16 else 1e-4)
    assert rows[0]["train/reward_group_std"] > 0
    assert "train/kl_divergence" not in rows[0], "at kl_coeff 0 there is no reference"


@pytest.mark.parametrize("keys", [{"policy_loss": "gspo"}, {"kl_coeff": 0.1}, {"kl_coeff": 0.1, "kl_in": "reward"}])
def test_a_resume_in_the_middle_of_an_update_changes_no_bit(
    keys: dict[str, Any], online_json: Callable[..., Path], tmp_path: Path
) -> None:
    """Step 3 is the first of the second rollout's two."""
    keys = {"save_strategy": "steps", "save_steps": 3, **keys}
    assert main(["grpo", str(online_json("whole", **keys))]) == 0
    file = online_json("parts", **keys)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoint-6")
    assert (tmp_path / "parts" / "checkpoint-3" / "trainer" / "rollout.json").is_file()
    assert main(["grpo", str(file), "resume_from_checkpoint=true"]) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    assert_same_metrics(metric_rows(tmp_path / "whole"), metric_rows(tmp_path / "parts"), 0.0)


def test_a_kl_that_is_asked_for_in_the_middle_of_an_update_holds_from_the_next_rollout(
    online_json: Callable[..., Path], tmp_path: Path
) -> None:
    """The half-used rows have no reference's log-probs: the run ended with a traceback."""
    keys = {"save_strategy": "steps", "save_steps": 3}
    assert main(["grpo", str(online_json("run", **keys))]) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    assert main(["grpo", str(online_json("run", **keys, kl_coeff=0.1)), "resume_from_checkpoint=true"]) == 0
    seen = {row["step"]: "train/kl_loss" in row for row in metric_rows(tmp_path / "run") if "train/reward" in row}
    assert [step for step, there in seen.items() if there] == [5, 6]


def test_a_kl_in_the_loss_pulls_back_and_is_measured(online_json: Callable[..., Path], tmp_path: Path) -> None:
    common = {"max_steps": 20, "learning_rate": 1e-2, "num_train_epochs": 100}
    for name, coeff in (("free", 1e-9), ("held", 2.0)):
        assert main(["grpo", str(online_json(name, kl_coeff=coeff, kl_estimator="k3+", **common))]) == 0
    free, held = (
        [row for row in metric_rows(tmp_path / name) if "train/kl_loss" in row][-1] for name in ("free", "held")
    )
    assert 0 <= held["train/kl_loss"] < 0.5 * free["train/kl_loss"]


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant", "prompt"])
def test_micro_batches_do_not_change_the_step(
    aggregation: str, online_json: Callable[..., Path], tmp_path: Path
) -> None:
    keys = {"aggregation": aggregation, "max_steps": 2, "per_device_train_batch_size": 8}
    assert main(["grpo", str(online_json("whole", **keys))]) == 0
    keys |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert main(["grpo", str(online_json("split", **keys))]) == 0
    assert_same_metrics(metric_rows(tmp_path / "whole"), metric_rows(tmp_path / "split"), 0.1 if BF16 else 1e-4)


def test_a_users_loss_and_estimator_are_values_of_the_keys(
    online_json: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for registry in (ADVANTAGES, POLICY_LOSSES):
        monkeypatch.setattr(registry, "_things", dict(registry._things))
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from alignment.losses.estimators import ADVANTAGES\n"
        "from alignment.losses.policy import POLICY_LOSSES\n"
        "@ADVANTAGES.register('test_grpo_twice')\n"
        "def twice(inputs):\n"
        "    print('my advantages', len(inputs.scores))\n"
        "    return ADVANTAGES['grpo'](inputs)\n"
        "@POLICY_LOSSES.register('test_grpo_loss')\n"
        "def loss(inputs):\n"
        "    return POLICY_LOSSES['ppo'](inputs)\n"
    )
    words = [f"plugins={plugin}", "advantage=test_grpo_twice", "policy_loss=test_grpo_loss", "max_steps=2"]
    assert main(["grpo", str(online_json("mine")), *words]) == 0
    assert main(["grpo", str(online_json("ours")), "max_steps=2"]) == 0
    assert_same_weights(tmp_path / "mine", tmp_path / "ours")


# ----------------------------------------------------------------------------------------------------- dynamic sampling


def test_prompts_without_spread_are_sampled_anew(
    online_json: Callable[..., Path], tmp_path: Path, flat: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the prompts teach nothing; each step has 4 that do, so rounds are made and the stream is read further."""
    keys = {**DYNAMIC, "reward": f"{flat}:flat", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    assert main(["grpo", str(online_json("run", **keys))]) == 0
    rows = [row for row in metric_rows(tmp_path / "run") if "train/sampling_rounds" in row]
    assert all(row["train/sampling_groups"] == 4 for row in rows)
    assert max(row["train/sampling_rounds"] for row in rows) > 1
    assert all(0 < row["train/groups_without_spread"] < 1 for row in rows if row["train/sampling_rounds"] > 1)
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer" / "trainer_state.json").read_text())
    assert state["position"] == 4 * sum(row["train/sampling_rounds"] for row in rows[1::2])
    assert "dynamic_sampling:" not in capsys.readouterr().err


def test_dynamic_sampling_resumes_in_the_middle_of_an_update(
    online_json: Callable[..., Path], tmp_path: Path, flat: str
) -> None:
    keys = {
        **DYNAMIC,
        "reward": f"{flat}:flat",
        "save_strategy": "steps",
        "save_steps": 3,
        "evaluation_strategy": "epoch",
    }
    assert main(["grpo", str(online_json("whole", **keys, max_steps=8))]) == 0
    file = online_json("parts", **keys, max_steps=8)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoint-6")
    shutil.rmtree(tmp_path / "parts" / "checkpoint-8", ignore_errors=True)
    assert main(["grpo", str(file), "resume_from_checkpoint=true"]) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    assert_same_metrics(metric_rows(tmp_path / "whole"), metric_rows(tmp_path / "parts"), 0.0)
    assert len([row for row in metric_rows(tmp_path / "whole") if "eval/reward" in row]) > 2, "an epoch's end is seen"


def test_dynamic_sampling_on_two_processes_is_that_of_one(
    online_json: Callable[..., Path], tmp_path: Path, flat: str
) -> None:
    """Ranks keep different numbers of groups; these are shared out anew, in the order that one process has."""
    keys = {**DYNAMIC, "reward": f"{flat}:flat", "max_steps": 4}
    assert main(["dapo", str(online_json("one", **keys))]) == 0
    keys |= {"per_device_prompt_batch_size": 2, "per_device_train_batch_size": 4}
    on_two_processes(["dapo", str(online_json("two", **keys))], tmp_path)
    one, two = metric_rows(tmp_path / "one"), metric_rows(tmp_path / "two")
    assert_same_metrics(one[:2] if BF16 else one, two[:2] if BF16 else two, 0.1 if BF16 else 1e-4)


@pytest.mark.parametrize("drop_last", [False, True])
def test_an_epoch_that_ends_inside_an_iteration_is_seen_once(drop_last: bool) -> None:
    """10 prompts in batches of 4: the second iteration's three rounds go beyond the end."""
    rows = [{"input_ids": [1], "prompt": str(i), "row": {}} for i in range(10)]
    settings = SimpleNamespace(seed=1, shuffle=True, dataloader_drop_last=drop_last)
    feed = PromptFeed(rows, settings, SimpleNamespace(prompts_per_rollout=4), World())
    ended = []
    for rounds in (1, 3, 1):
        feed.next()
        for _ in range(rounds - 1):
            feed.next(within=True)
        ended.append(feed.epoch_ended)
    assert ended == [False, True, False]


def run_on_a_rank(words: list[str]) -> int:
    """One rank's share; runs in a forked process."""
    import paddle

    from alignment.methods.start import main

    paddle.set_device("cpu")
    return main(words)


HALF = """
def half(prompts, responses, **row):
    return [sum(map(ord, r)) % 47 * float(len(p) % 2) for p, r in zip(prompts, responses)]
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of four layers, data, and a reward by rule that tells the answers to half of the prompts apart."""
    made = make_files(tmp_path_factory.mktemp("layouts"))
    (made / "half.py").write_text(HALF)
    return made


@cache
def dapo_on(files: Path, layout: Layout, *extra: str) -> list[dict[str, Any]]:
    """The rows of a run whose reward model is read in every round and decides nothing."""
    output, per_rank = Path(tempfile.mkdtemp(dir=files)) / "run", 4 // layout.data_ranks
    words = [
        "dapo",
        f"actor_model_name_or_path={files / 'model'}",
        f"reward_model_name_or_path={files / 'reward'}",
        'reward={"model": 0.0, "' + str(files / "half.py") + ':half": 1.0}',
        f"train_datasets=jsonl::{files / 'prompts_1'}.jsonl",
        f"output_dir={output}",
        f"per_device_prompt_batch_size={per_rank}",
        f"per_device_train_batch_size={2 * per_rank}",
        "num_return_sequences=4",
        "kl_coeff=0.1",
        "max_src_len=48",
        "max_dec_len=10",
        "overlong_filter=false",
        "max_steps=4",
        "logging_steps=1",
        "learning_rate=0.0005",
        "save_strategy=no",
        "disable_tqdm=true",
        "report_to=none",
        "device=cpu",
        *(f"{key}={json.dumps(value)}" for key, value in ARGUMENTS.items()),
        *layout.arguments,
        *extra,
    ]
    run_ranks(layout.processes, run_on_a_rank, words, timeout=120.0)
    return metric_rows(output)


@pytest.mark.parametrize("name", ["TP2", "PP2", "sharding stage 3 x2", "1 process"])
def test_dynamic_sampling_with_a_reward_model_on_any_layout(name: str, files: Path) -> None:
    """The reward model reads between the rounds, while the actor generates; on one process it is offloaded."""
    extra = ["offload_level=freeze_model optimizer train_model"] if name == "1 process" else []
    one, other = dapo_on(files, Layout()), dapo_on(files, LAYOUTS[name], *extra)
    assert max(row["train/sampling_rounds"] for row in one) > 1
    assert_same_metrics(one[:2] if BF16 else one, other[:2] if BF16 else other, 0.1 if BF16 else 1e-4)


@pytest.mark.parametrize(("reward", "groups"), [("constant", 0), ("flat", 2)])
def test_a_batch_that_is_not_filled_is_said_and_trained_on(
    reward: str, groups: int, online_json: Callable[..., Path], tmp_path: Path, flat: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    keys = {**DYNAMIC, "reward": f"{flat}:{reward}", "max_steps": 1, "shuffle": False, "max_gen_batches": 1}
    assert main(["grpo", str(online_json("run", **keys))]) == 0
    said = capsys.readouterr()
    text = said.out + said.err
    assert f"of 4 prompts in 1 round (max_gen_batches 1) the answers to {groups} differ in their scores, and 4" in text
    row = next(row for row in metric_rows(tmp_path / "run") if "train/sampling_groups" in row)
    assert row["train/sampling_groups"] == groups and row["train/groups_without_spread"] == 1 - groups / 4


def test_rounds_end_when_the_batch_is_full_and_the_surplus_is_left_out() -> None:
    """Of each round's 3 prompts those with an odd number have spread: 1, 3, 5 in two rounds, and 7 is not asked for."""
    asked: list[list[int]] = []

    def generate(prompts: Sequence[int]) -> Any:
        asked.append(list(prompts))
        rollout = make_rollout([(2, 3)] * 2 * len(prompts))
        return rollout.add(prompt_index=np.repeat(np.asarray(prompts), 2), sample_index=np.tile([0, 1], len(prompts)))

    def score(rollout: Any) -> RewardResult:
        return RewardResult((rollout.prompt_index % 2 * rollout.sample_index).astype(np.float32), {})

    stream = iter([[3, 4, 5], [6, 7, 8]])
    found = sample_with_spread(
        [0, 1, 2], lambda: next(stream), generate, score,
        lambda rollout, scores: groups_with_spread(scores.total, rollout.prompt_index), World(), most=10,
    )  # fmt: skip
    assert asked == [[0, 1, 2], [3, 4, 5]]
    assert found.rollout.prompt_index.tolist() == [1, 1, 3, 3, 5, 5] and found.message == ""
    assert found.scores.total.tolist() == [0, 1] * 3 and found.dropped_tokens == 18
    stream = iter([[3, 5, 7]])
    found = sample_with_spread(
        [0, 1, 2], lambda: next(stream), generate, score,
        lambda rollout, scores: groups_with_spread(scores.total, rollout.prompt_index), World(), most=10,
    )  # fmt: skip
    assert found.rollout.prompt_index.tolist() == [1, 1, 3, 3, 5, 5], "the first in the stream's order"


# ------------------------------------------------------------------------------------------------- lengths and rewards


def test_answers_that_were_cut_teach_nothing_and_count_in_the_mean(
    online_json: Callable[..., Path], tmp_path: Path
) -> None:
    """A tiny random model never ends in 3 tokens, so with the filter no weight moves (there is no decay)."""
    keys = {"max_dec_len": 3, "min_dec_len": 3, "max_steps": 2, "save_strategy": "no"}
    assert main(["grpo", str(online_json("all", **keys))]) == 0
    assert main(["grpo", str(online_json("filtered", **keys)), "overlong_filter=true"]) == 0
    rows = {name: metric_rows(tmp_path / name)[0] for name in ("all", "filtered")}
    assert rows["filtered"]["train/truncation_rate"] == 1
    assert (rows["filtered"]["train/actor_grad_norm"], rows["all"]["train/actor_grad_norm"] > 0) == (0, True)
    assert rows["filtered"]["train/advantages"] == rows["all"]["train/advantages"]


def test_the_overlong_penalty_is_part_of_the_score(online_json: Callable[..., Path], tmp_path: Path) -> None:
    keys = {"max_steps": 1, "min_dec_len": 8, "enable_overlong_reward_buffer": True, "overlong_penalty_factor": 0.5}
    assert main(["grpo", str(online_json("run", **keys))]) == 0
    row = metric_rows(tmp_path / "run")[0]
    assert row["train/norm_reward"] == pytest.approx(row["train/reward"] - 0.5, abs=1e-5)
    assert arguments(max_dec_len=100).overlong_reward_buffer == 20


def test_gdpo_takes_rewards_that_do_not_apply(
    online_json: Callable[..., Path], tmp_path: Path, flat: str, reward_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """None of an answer: nothing in the sum, in no mean; with any other estimator it is a mistake."""
    rewards = {f"{flat}:polite": 0.5, f"{reward_file}:vowels": 1.0}
    keys = {"reward": rewards, "max_steps": 2, "evaluation_strategy": "steps", "eval_steps": 2}
    assert main(["gdpo", str(online_json("run", **keys))]) == 0
    rows = metric_rows(tmp_path / "run")
    assert all(np.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    assert all(0 <= row["train/reward/polite"] <= 2 for row in rows if "train/reward" in row)
    assert main(["grpo", str(online_json("plain", **keys))]) == 2
    assert "gave None instead of a number" in capsys.readouterr().err


def test_gdpo_normalises_each_reward() -> None:
    method = GRPO(arguments(preset="gdpo", reward={"gsm8k": 1.0, "words": 0.5}))
    scores = RewardResult(
        np.zeros(4, np.float32), {"one": np.array([0, 1, 0, 1.0]), "two": np.array([np.nan, np.nan, 0, 100.0])}
    )
    rewards, weights = method.rewards_of(scores)
    assert weights.tolist() == [1.0, 0.5]
    inputs = AdvantageInputs(
        scores.total, np.ones((4, 1)), np.array([0, 0, 1, 1]), rewards=rewards, reward_weights=weights,
        options=method.advantage_options(),
    )  # fmt: skip
    got = ADVANTAGES[method.args.advantage](inputs).advantages[:, 0]
    half = np.sqrt(0.5)
    raw = np.array([-half, half, -1.5 * half, 1.5 * half])
    np.testing.assert_allclose(got, raw / raw.std(ddof=1), rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------- keys


def test_presets_set_their_papers_constants_and_say_so(online_json: Callable[..., Path], capsys: Any) -> None:
    chosen = {name: arguments(preset=name, max_dec_len=64) for name in GRPO.presets}
    assert (chosen["dr_grpo"].scale, chosen["dr_grpo"].aggregation) == ("none", "constant")
    assert chosen["dr_grpo"].length_constant == 64
    dapo = chosen["dapo"]
    assert (dapo.clip_range_ratio_low, dapo.clip_range_ratio_high, dapo.aggregation) == (0.2, 0.28, "token")
    assert dapo.dynamic_sampling and dapo.enable_overlong_reward_buffer and dapo.overlong_filter
    gspo = chosen["gspo"]
    assert (gspo.policy_loss, gspo.aggregation, gspo.clip_range_ratio_high) == ("gspo", "sequence", 4e-4)
    assert (chosen["cispo"].policy_loss, chosen["cispo"].cispo_high) == ("cispo", 5.0)
    assert main(["dapo", str(online_json("run")), "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "- preset dapo sets clip_range_ratio_low 0.2, clip_range_ratio_high 0.28" in shown
    assert "samples per rollout" in shown


def test_a_policy_loss_brings_its_papers_clips() -> None:
    args = arguments(policy_loss="gmpo")
    assert (args.aggregation, args.clip_range_ratio_low, args.clip_range_ratio_high) == ("sequence", 0.4, 0.4)
    assert arguments(policy_loss="gspo", aggregation="token").aggregation == "token"
    given = arguments(policy_loss="gspo", clip_range_ratio=0.01)
    assert (given.clip_range_ratio_low, given.clip_range_ratio_high) == (0.01, 0.01)


def test_what_cannot_be_computed_is_refused_in_words() -> None:
    assert "an answer is judged by the others to its prompt: set it to 2 or more" in refusal(num_return_sequences=1)
    assert "needs a critic: use ppo" in refusal(advantage="gae")
    assert "set aggregation" in refusal(policy_loss_mean="sequence")
    assert "cispo_low 6 is not below cispo_high 5" in refusal(cispo_low=6)
    assert "overlong_reward_buffer 99 is above max_dec_len 9" in refusal(
        enable_overlong_reward_buffer=True, overlong_reward_buffer=99, max_dec_len=9
    )
    assert "kl_in reward has no sum to change" in refusal(preset="gdpo", kl_in="reward", kl_coeff=0.1)
    assert "did you mean 'grpo'?" in refusal(advantage="grpoo")
    text = refusal(num_return_sequences=8, per_device_prompt_batch_size=3, per_device_train_batch_size=16)
    assert "x num_return_sequences 8 = 24 samples per rollout" in text and "per_device_prompt_batch_size 4" in text


def test_what_does_nothing_is_said() -> None:
    assert arguments(kl_in="reward").notes == ["kl_in: not used, because kl_coeff is 0"]
    (note,) = arguments(kl_coeff=0.1, kl_estimator="k1").notes
    assert "has a gradient of 0 on average: k3+ has that of the KL" in note
    assert not arguments(kl_coeff=0.1, kl_estimator="k1", kl_in="reward").notes
    assert arguments(max_gen_batches=3).notes == ["max_gen_batches is not used, because dynamic_sampling is false"]


def test_paddlenlps_file_is_taken_as_it_is(
    online_json: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`alignment ppo` with rl_algorithm grpo, its KL in the loss, its names, and PPO's critic keys beside them."""
    assert RL_ALGORITHMS["grpo"] == "grpo"
    keys = {"rl_algorithm": "grpo", "num_return_sequences": None, "rollout_n": 4, "kl_coeff": 0.02}
    keys |= {"kl_loss_coeff": 0.001, "pg_loss_coeff": 1.0, "entropy_coeff": 0.0, "dynamic_sampling": False}
    keys |= {"enable_overlong_reward_buffer": True, "overlong_reward_buffer": 4, "overlong_penalty_factor": 1.0}
    keys |= {"critic_learning_rate": 1e-5, "clip_range_value": 5.0, "per_device_prompt_batch_size": 4, "max_steps": 2}
    assert main(["ppo", str(online_json("run", **keys))]) == 0
    said = "".join(capsys.readouterr())
    assert "kl_coeff 0.02 is not used: kl_loss_coeff weighs the KL in the loss" in said
    assert "critic_learning_rate" in said and "there is no critic" in said
    row = metric_rows(tmp_path / "run")[0]
    assert row["train/kl_coeff"] == 0.001 and "train/kl_loss" in row
    args = arguments(rl_algorithm="grpo")
    assert (args.kl_coeff, args.max_gen_batches, args.overlong_reward_buffer) == (0.001, 32, 256)


# ----------------------------------------------------------------------------------------------- the peers' own numbers


@pytest.fixture(scope="module")
def vectors(shared_data: Path) -> dict[str, Any]:
    return json.loads((shared_data.parent / "vectors" / "preference_and_rl.json").read_text())


@pytest.mark.parametrize(
    ("entry", "compat", "keys"),
    [
        ("adv/trl1.x/grpo scale group", "trl", {}),
        ("adv/trl1.x/grpo scale group", "trl0.24", {}),
        ("adv/trl1.x/grpo scale batch", "trl", {"scale": "batch"}),
        ("adv/trl1.x/grpo scale none (Dr.GRPO)", "trl", {"preset": "dr_grpo"}),
        ("adv/trl1.x/grpo tied group", "trl", {}),
        ("adv/verl/grpo", "verl", {}),
        ("adv/verl/grpo ragged groups", "verl", {}),
        ("adv/verl/dr_grpo", "verl", {"preset": "dr_grpo"}),
        ("adv/openrlhf/group_norm (GRPO)", "openrlhf", {}),
        ("adv/openrlhf/dr_grpo", "openrlhf", {"preset": "dr_grpo"}),
    ],
)
def test_grpo_is_the_peers_with_compat(vectors: dict[str, Any], entry: str, compat: str, keys: dict[str, Any]) -> None:
    """Through the options that the method's keys make, in float64, to the entry's own tolerance."""
    found = next(e for e in vectors["entries"] if e["name"] == entry)
    given = vectors["inputs"]["rl"]
    method = GRPO(arguments(compat=compat, gamma=found["options"].get("gamma", 1.0), **keys))
    name = found["inputs"].get("scores", "@rl.scores").partition(".")[2]
    scores = np.asarray(given["scores" if compat == "verl" else name], np.float64)  # verl's lie at the last tokens
    group = found["inputs"].get("group", "")
    groups = [0, 0, 0, 1, 1, 1]
    if group.startswith("@"):
        groups = np.unique(given[group.partition(".")[2]], return_inverse=True)[1]
    kl = found["options"].get("init_kl_coef", 0.0) * (np.array(given["old_logprobs"]) - np.array(given["ref_logprobs"]))
    inputs = AdvantageInputs(
        scores,
        np.asarray(given["mask"], np.float64),
        np.asarray(groups),
        token_rewards=-kl if found["options"].get("init_kl_coef") else None,
        options=method.advantage_options(),
    )
    got = ADVANTAGES[method.args.advantage](inputs).advantages
    wanted = np.asarray(found["expected"]["advantages"], np.float64)
    np.testing.assert_allclose(got if wanted.ndim == 2 else got[:, 0], wanted, **found["tolerance"])


def test_compose_and_nemo_differ_where_they_say(vectors: dict[str, Any]) -> None:
    """Compose divides by n; NeMo takes mean and deviation of the others: by hand, for 1, 2, 6."""
    scores = np.array([1.0, 2.0, 6.0])
    others = np.array([(2 + 6) / 2, (1 + 6) / 2, 1.5]), np.array([np.sqrt(8), np.sqrt(12.5), np.sqrt(0.5)])
    wanted = {
        "compose": (scores - 3) / (scores.std() + 1e-4),
        "nemo": (scores - others[0]) / (others[1] + 1e-6),
    }
    for peer, rows in wanted.items():
        options = GRPO(arguments(compat=peer)).advantage_options()
        inputs = AdvantageInputs(scores, np.ones((3, 1)), np.zeros(3, int), options=options)
        np.testing.assert_allclose(ADVANTAGES["grpo"](inputs).advantages[:, 0], rows, rtol=1e-8)


@pytest.mark.parametrize("peer", [peer for peer, methods in COMPAT.items() if "grpo" in methods])
def test_every_setting_of_a_peer_has_its_key(peer: str) -> None:
    args = arguments(compat=peer)
    assert not any("there is no key" in remark for remark in args.remarks)
    assert args.aggregation == COMPAT[peer]["grpo"]["aggregation"]
    assert arguments(compat=peer, policy_loss="gspo").aggregation == "sequence", "each loss keeps its own paper's"
