"""Whole PPO runs through the public command."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignment.cli import main
from tests.precision import BF16, DTYPE, read_weights, within

from .conftest import assert_same_metrics, metric_rows, write_tokenizer

REPO = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_a_run_leaves_models_metrics_and_samples(ppo_json: Callable[..., Path], tmp_path: Path, capsys) -> None:
    assert main(["ppo", str(ppo_json(save_strategy="epoch", save_total_limit=1))]) == 0
    out = tmp_path / "ppo"
    for name in ("policy", "value"):
        assert {"config.json", "tokenizer_config.json", "prompt_template.json"} <= {
            f.name for f in (out / name).iterdir()
        }
    from paddlenlp.transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(str(out / "policy")) is not None
    rows = metric_rows(out)
    # 24 prompts, 8 a rollout, 4 a step, 2 passes: 3 rollouts of 4 steps an epoch
    assert [row["step"] for row in rows if "train/reward" in row] == list(range(1, 25))
    assert [row["step"] for row in rows if "eval/reward" in row] == [0, 12, 24]
    names = {
        "train/actor_loss", "train/ptx_loss", "train/reward_critic_loss", "train/reward", "train/kl_divergence",
        "train/mean_generated_length", "train/max_generated_length", "train/actor_lr", "train/reward_critic_lr",
        "train/clip_fraction", "train/approx_kl", "train/entropy", "train/explained_variance", "train/ratio_mean",
        "train/ratio_max", "train/actor_grad_norm", "train/reward_critic_grad_norm",
        "train/truncation_rate", "global_step",
    }  # fmt: skip
    assert names <= set(rows[1])
    timed = next(row for row in rows if "time/generate_seconds" in row)
    assert timed["tokens_per_second/generate"] > 0
    first = rows[1]
    assert first["train/approx_kl"] == pytest.approx(0, abs=1e-9)
    assert first["train/kl_divergence"] == pytest.approx(0, abs=1e-5)
    assert first["train/rollout_logprob_gap"] < 1e-4
    best = json.loads((out / "best_checkpoint.json").read_text())["step"]
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-24", f"checkpoint-{best}"}
    assert {path.name for path in (out / "checkpoint-24").iterdir()} == {"manifest.json", "policy", "value", "trainer"}
    samples = [json.loads(line) for line in (out / "eval_samples.jsonl").read_text().splitlines()]
    assert len(samples) == 3 * 2 * 6
    assert {sample["mode"] for sample in samples} == {"sampled", "greedy"}
    by_step = {step: [s["prompt"] for s in samples if s["step"] == step] for step in (0, 12, 24)}
    assert by_step[0] == by_step[12] == by_step[24]
    assert json.loads((out / "data_mixture.json").read_text())["train"]
    assert "evaluation samples at step 24" in capsys.readouterr().out


def test_resuming_goes_on_as_if_nothing_had_happened(ppo_json: Callable[..., Path], tmp_path: Path) -> None:
    changes = {
        "save_strategy": "steps",
        "save_steps": 4,
        "adaptive_kl": True,
        "kl_target": 0.1,
        "num_return_sequences": 2,
    }
    changes.update(per_device_prompt_batch_size=4)
    assert main(["ppo", str(ppo_json("whole", **changes))]) == 0
    assert main(["ppo", str(ppo_json("parts", **changes))]) == 0
    import shutil

    parts = tmp_path / "parts"
    for checkpoint in parts.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > 12:
            shutil.rmtree(checkpoint)
    assert main(["ppo", str(ppo_json("parts", **changes)), "resume_from_checkpoint=true"]) == 0
    assert_same_metrics(metric_rows(tmp_path / "whole"), metric_rows(parts), 1e-6)
    whole, resumed = read_weights(tmp_path / "whole" / "policy"), read_weights(parts / "policy")
    for name, weight in whole.items():
        np.testing.assert_allclose(resumed[name], weight, atol=1e-6, err_msg=name)
    assert (tmp_path / "whole" / "eval_samples.jsonl").read_text() == (parts / "eval_samples.jsonl").read_text()


@pytest.mark.parametrize("name", ["train", "ptx"])
def test_a_resume_whose_data_changed_is_refused(
    ppo_json: Callable[..., Path], tmp_path: Path, prompt_file: Path, supervised_file: Path, name: str, capsys: Any
) -> None:
    """D11: in PPO the rows of the ptx loss are data, too."""
    source = {"train": prompt_file, "ptx": supervised_file}[name]
    path = tmp_path / "own.jsonl"
    rows = source.read_text().splitlines(keepends=True)
    path.write_text("".join(rows))
    how = {f"{name}_datasets": f"jsonl::{path}", "max_steps": 2, "save_steps": 1, "save_strategy": "steps"}
    file = ppo_json(**how, evaluation_strategy="no")
    assert main(["ppo", str(file)]) == 0
    path.write_text("".join(reversed(rows)))
    assert main(["ppo", str(file), "resume_from_checkpoint=true", "max_steps=3"]) == 2
    said = capsys.readouterr().err
    assert "was trained on other rows than the data sets give now" in said and f"  {name} (jsonl (" in said


def test_several_prompt_batches_make_one_rollout_and_accumulation_changes_nothing(
    ppo_json: Callable[..., Path], tmp_path: Path
) -> None:
    plain = {"per_device_prompt_batch_size": 8, "per_device_train_batch_size": 8, "num_train_epochs": 1}
    assert main(["ppo", str(ppo_json("plain", **plain))]) == 0
    split = {"per_device_prompt_batch_size": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert main(["ppo", str(ppo_json("split", num_train_epochs=1, **split))]) == 0
    assert_same_metrics(metric_rows(tmp_path / "plain"), metric_rows(tmp_path / "split"), within(1e-4, "run"))


def test_a_tokenizer_whose_pad_is_its_eos_changes_nothing(
    ppo_json: Callable[..., Path], tmp_path: Path, policy_dir: Path
) -> None:
    import shutil

    same = tmp_path / "pad_is_eos"
    shutil.copytree(policy_dir, same)
    write_tokenizer(same)
    config = json.loads((same / "tokenizer_config.json").read_text())
    config["pad_token"] = config["eos_token"]
    (same / "tokenizer_config.json").write_text(json.dumps(config))
    assert main(["ppo", str(ppo_json("own_pad", num_train_epochs=1))]) == 0
    assert main(["ppo", str(ppo_json("eos_pad", num_train_epochs=1, actor_model_name_or_path=str(same)))]) == 0
    assert_same_metrics(metric_rows(tmp_path / "own_pad"), metric_rows(tmp_path / "eos_pad"), 1e-6)


def test_a_reward_model_scores_and_starts_the_critic(
    ppo_json: Callable[..., Path], tmp_path: Path, policy_dir: Path
) -> None:
    from alignment.ppo.models import load_score_model, load_tokenizer, save_model, save_tokenizer

    reward = tmp_path / "reward"
    save_model(load_score_model(str(policy_dir), score_type="reward", dtype=DTYPE), reward)
    save_tokenizer(load_tokenizer(policy_dir), reward)
    file = ppo_json(
        reward=None,
        reward_model_name_or_path=str(reward),
        num_train_epochs=1,
    )
    assert main(["ppo", str(file)]) == 0
    row = metric_rows(tmp_path / "ppo")[1]
    assert np.isfinite(row["train/reward"]) and row["train/reward"] != 0
    value_config = json.loads((tmp_path / "ppo" / "value" / "config.json").read_text())
    assert value_config["score_type"] == "critic"


def test_weighted_rewards_are_logged_apart(ppo_json: Callable[..., Path], tmp_path: Path, reward_file: Path) -> None:
    spec = {f"{reward_file}:vowels": 1.0, f"{reward_file}:wanted": 2.0}
    assert main(["ppo", str(ppo_json(reward=spec, num_train_epochs=1))]) == 0
    for row in metric_rows(tmp_path / "ppo"):
        if "train/reward" in row:
            parts = row["train/reward/vowels"] + 2.0 * row["train/reward/wanted"]
            assert row["train/reward"] == pytest.approx(parts, abs=1e-5)


def test_dry_run_prints_the_sizes_and_loads_nothing(ppo_json: Callable[..., Path], tmp_path: Path, capsys) -> None:
    assert main(["ppo", str(ppo_json()), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "optimizer steps per rollout" in printed
    assert "learning_rate" in printed
    assert not (tmp_path / "ppo" / "metrics.jsonl").exists()


BAD_RUNS = {
    "reward raises": ({"reward": "{rewards}:broken"}, ["broken", "ZeroDivisionError", "say the word"]),
    "no such reward function": ({"reward": "{rewards}:nothing"}, ["nothing", "vowels"]),
    "no such reward file": ({"reward": "nowhere.py:f"}, ["nowhere.py"]),
    "no reward model": ({"reward": None}, ["reward_model_name_or_path"]),
    "no such actor": ({"actor_model_name_or_path": "/nonexistent/model"}, ["/nonexistent/model"]),
    "no such data": ({"train_datasets": "PKU-SafeRLFH/train"}, ["PKU-SafeRLFH/train", "PKU-SafeRLHF/train"]),
    "limits beyond the context": ({"max_src_len": 100, "max_dec_len": 100}, ["200", "128", "max_src_len"]),
    "no plug-in": ({"plugins": ["nowhere_plugin"]}, ["nowhere_plugin"]),
    "batches that do not divide": ({"per_device_train_batch_size": 3}, ["per_device_train_batch_size", "3"]),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_bad_input_gives_one_clear_message(
    name: str, ppo_json: Callable[..., Path], reward_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, words = BAD_RUNS[name]
    filled = {
        key: value.replace("{rewards}", str(reward_file)) if isinstance(value, str) else value
        for key, value in changes.items()
    }
    assert main(["ppo", str(ppo_json(**filled))]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    for word in words:
        assert word in captured.err


def test_ctrl_c_saves_and_says_how_to_resume(ppo_json: Callable[..., Path], tmp_path: Path) -> None:
    file = ppo_json(num_train_epochs=2000)
    command = [sys.executable, "-m", "alignment", "ppo", str(file)]
    process = subprocess.Popen(
        command, cwd=REPO, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    metrics = tmp_path / "ppo" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 5):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "resume_from_checkpoint=true" in errors
    (checkpoint,) = (tmp_path / "ppo").glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert main(["ppo", str(file), "resume_from_checkpoint=true", f"max_steps={step + 4}"]) == 0
    assert metric_rows(tmp_path / "ppo")[-1]["step"] == step + 4


def test_two_processes_give_the_single_processs_run(ppo_json: Callable[..., Path], tmp_path: Path) -> None:
    """Through the real launcher, from the runner's own folder, as the reference's README starts it."""
    assert main(["ppo", str(ppo_json("one", num_train_epochs=1))]) == 0
    file = ppo_json("two", num_train_epochs=1, per_device_prompt_batch_size=4, per_device_train_batch_size=2)
    command = [sys.executable, "-u", "-m", "paddle.distributed.launch", "--nproc_per_node", "2"]
    command += ["--log_dir", str(tmp_path / "log"), "run_ppo.py", str(file)]
    folder = REPO / "alignment" / "ppo"
    result = subprocess.run(
        command, cwd=folder, env={**environment(), "PYTHONPATH": "../../"}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    if BF16:  # rounding decides between close tokens once it has decided how to learn: the first rollout is the same
        assert_same_metrics(metric_rows(tmp_path / "one")[:5], metric_rows(tmp_path / "two")[:5], within(1e-4, "run"))
        return
    assert_same_metrics(metric_rows(tmp_path / "one"), metric_rows(tmp_path / "two"), 1e-4)
    one, two = (
        [json.loads(line)["response"] for line in (tmp_path / name / "eval_samples.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert one == two


def test_the_best_policy_is_loaded_at_the_end(ppo_json: Callable[..., Path], tmp_path: Path) -> None:
    file = ppo_json(
        evaluation_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4, load_best_model_at_end=True,
        save_total_limit=1, metric_for_best_model="reward_greedy", learning_rate=1e-2, ptx_coeff=0.0, ptx_datasets=None,
    )  # fmt: skip
    assert main(["ppo", str(file)]) == 0
    out = tmp_path / "ppo"
    rewards = {row["step"]: row["eval/reward_greedy"] for row in metric_rows(out) if row.get("eval/reward_greedy")}
    best = json.loads((out / "best_checkpoint.json").read_text())["step"]
    assert rewards[best] == max(value for step, value in rewards.items() if step > 0)
    kept, final = read_weights(out / f"checkpoint-{best}" / "policy"), read_weights(out / "policy")
    assert all((kept[name] == final[name]).all() for name in kept)


def test_without_do_train_the_actor_is_only_evaluated(ppo_json: Callable[..., Path], tmp_path: Path) -> None:
    assert main(["ppo", str(ppo_json(do_train=False))]) == 0
    rows = metric_rows(tmp_path / "ppo")
    assert [row["step"] for row in rows] == [0]
    assert "eval/reward" in rows[0]
    assert not (tmp_path / "ppo" / "policy").exists()


@pytest.fixture(scope="module")
def foreign_reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model whose tokenizer is not the actor's."""
    from alignment.ppo.models import load_score_model, load_tokenizer, save_model, save_tokenizer
    from tests.tiny import tiny_model_dir

    base, folder = tiny_model_dir(tmp_path_factory.mktemp("base"), "llama"), tmp_path_factory.mktemp("foreign")
    save_model(load_score_model(str(base), score_type="reward", dtype=DTYPE), folder)
    save_tokenizer(load_tokenizer(base), folder)
    return folder


def test_a_reward_model_with_another_tokenizer_gets_the_answers_tokenised_anew(
    ppo_json: Callable[..., Path], tmp_path: Path, policy_dir: Path, foreign_reward: Path
) -> None:
    file = ppo_json(
        reward=None,
        reward_model_name_or_path=str(foreign_reward),
        reward_critic_model_name_or_path=str(policy_dir),
        num_train_epochs=1,
    )
    assert main(["ppo", str(file)]) == 0
    samples = [json.loads(line) for line in (tmp_path / "ppo" / "eval_samples.jsonl").read_text().splitlines()]
    from alignment.ppo.data import PromptTemplate
    from alignment.ppo.models import end_scores, load_score_model, load_tokenizer
    from alignment.rollout.rewards.reward_model import build_reward_inputs

    tokenizer = load_tokenizer(foreign_reward)
    ids, lengths, _ = build_reward_inputs(
        [sample["prompt"] for sample in samples],
        [sample["response"] for sample in samples],
        [sample["finished"] for sample in samples],
        tokenizer,
        PromptTemplate.resolve(None, tokenizer),
        512,
    )
    import paddle

    with paddle.no_grad():
        scores = end_scores(load_score_model(str(foreign_reward), dtype=DTYPE), paddle.to_tensor(ids), lengths).numpy()
    np.testing.assert_allclose([sample["score"] for sample in samples], scores, atol=1e-4)


def test_what_was_cut_for_the_reward_model_is_in_the_metrics_and_said(
    ppo_json: Callable[..., Path], tmp_path: Path, policy_dir: Path, foreign_reward: Path, capsys
) -> None:
    """rl 10: the counts of the scorer did not reach the run that used it."""
    import shutil

    folder = tmp_path / "short"
    shutil.copytree(foreign_reward, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 24}))
    models = {"reward_model_name_or_path": str(folder), "reward_critic_model_name_or_path": str(policy_dir)}
    assert main(["ppo", str(ppo_json(reward=None, max_steps=1, **models))]) == 0
    cut = [
        row[key] for row in metric_rows(tmp_path / "ppo") for key in row if key.endswith("reward/truncated_fraction")
    ]
    assert cut and min(cut) > 0
    assert "longer than the reward model's context and were cut for it" in capsys.readouterr().err


def test_prompts_that_the_reward_models_template_cannot_write_are_found_at_the_start(
    ppo_json: Callable[..., Path], tmp_path: Path, policy_dir: Path, foreign_reward: Path, capsys
) -> None:
    """A run ended when the first such prompt was scored, however many steps later."""
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"say {number}"} for number in range(7)]
    rows.append({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "say it"}]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = {"reward_model_name_or_path": str(foreign_reward), "reward_critic_model_name_or_path": str(policy_dir)}
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ '[' + m.role + '] ' + m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    changes = {"reward": None, "train_datasets": f"jsonl::{file}", "reward_prompt_template": template, **models}
    assert main(["ppo", str(ppo_json(allow_template_mismatch=True, dry_run=True, **changes))]) == 2
    said = capsys.readouterr().err
    assert "reward model's template (reward_prompt_template) cannot write a prompt of 'train' ('say it')" in said
    assert "no system role" in said


def test_a_reward_that_there_is_not_is_found_before_the_data_are_read(
    ppo_json: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ppo", str(ppo_json(reward="gsm8", train_datasets="jsonl::absent.jsonl"))]) == 2
    assert "unknown reward 'gsm8'; did you mean 'gsm8k'?" in capsys.readouterr().err


def test_a_critic_of_other_tokens_is_refused(
    ppo_json: Callable[..., Path], foreign_reward: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ppo", str(ppo_json(reward=None, reward_model_name_or_path=str(foreign_reward)))]) == 2
    assert "set reward_critic_model_name_or_path" in capsys.readouterr().err


def test_another_template_than_the_models_is_refused_unless_allowed(
    ppo_json: Callable[..., Path], tmp_path: Path, policy_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    from alignment.ppo.data import PromptTemplate
    from alignment.ppo.models import load_tokenizer

    actor, template = (
        tmp_path / "actor",
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant] ",
    )
    shutil.copytree(policy_dir, actor)
    PromptTemplate.resolve(template, load_tokenizer(actor)).save(actor)
    changes = {"actor_model_name_or_path": str(actor), "num_train_epochs": 1, "ptx_datasets": None, "ptx_coeff": 0.0}
    assert main(["ppo", str(ppo_json(prompt_template="beaver", **changes))]) == 2
    message = capsys.readouterr().err
    assert "[{{ m['role'] }}]" in message and "BEGINNING OF CONVERSATION" in message
    assert main(["ppo", str(ppo_json(**changes))]) == 0
    saved = json.loads((tmp_path / "ppo" / "policy" / "prompt_template.json").read_text())
    assert saved["template"] == template
    file = ppo_json("allowed", prompt_template="beaver", allow_template_mismatch=True, **changes)
    assert main(["ppo", str(file)]) == 0


def test_greedy_only_evaluation_runs_to_the_end(ppo_json: Callable[..., Path], tmp_path: Path, capsys) -> None:
    """rl 3: `eval_temperature: 0` is documented; rl 28: a table of no rows is not printed."""
    file = ppo_json(eval_temperature=0, evaluation_strategy="steps", eval_steps=4, max_steps=8, sample_table_rows=0)
    assert main(["ppo", str(file), "save_strategy=steps", "load_best_model_at_end=true", "save_steps=4"]) == 0
    assert all("eval/reward" not in row for row in metric_rows(tmp_path / "ppo"))
    assert "evaluation samples" not in capsys.readouterr().out


def test_a_metric_that_there_is_not_is_refused_at_the_start_where_it_is_needed(
    ppo_json: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """rl 3: found at the first evaluation after training it would cost all that was trained."""
    best = {"load_best_model_at_end": True, "save_strategy": "epoch", "metric_for_best_model": "rewrad"}
    assert main(["ppo", str(ppo_json(**best))]) == 2
    message = capsys.readouterr().err
    assert "did you mean 'reward'" in message and "truncation_rate_greedy" in message
    assert main(["ppo", str(ppo_json(metric_for_best_model="rewrad", max_steps=4))]) == 0
    assert "metric_for_best_model rewrad: no such metric" in capsys.readouterr().err


def test_the_last_figures_are_written_when_prompts_end_the_run(ppo_json: Callable[..., Path], tmp_path: Path) -> None:
    """rl 13: early stops make fewer steps than planned, so the last step is no multiple of logging_steps."""
    file = ppo_json(target_kl=1e-9, learning_rate=1e-2, update_iters=4, logging_steps=100, num_train_epochs=1)
    assert main(["ppo", str(file)]) == 0
    rows = [row for row in metric_rows(tmp_path / "ppo") if "train/reward" in row]
    assert len(rows) == 1 and rows[0]["train/early_stopped"] == 1.0
    assert rows[0]["step"] < 24 and "time/generate_seconds" in rows[0]


def test_without_do_train_a_checkpoint_is_evaluated_again(
    ppo_json: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """rl 14: whatever was evaluated at that step before; and only what generates and scores is loaded."""
    assert main(["ppo", str(ppo_json(num_train_epochs=1, save_strategy="epoch"))]) == 0
    samples = tmp_path / "ppo" / "eval_samples.jsonl"
    before = len(samples.read_text().splitlines())
    (checkpoint,) = (tmp_path / "ppo").glob("checkpoint-*")
    again = ppo_json(do_train=False, eval_temperature=0.5, reward_critic_model_name_or_path=str(tmp_path / "none"))
    assert main(["ppo", str(again), f"resume_from_checkpoint={checkpoint}", "offload_level=freeze_model"]) == 0
    assert len(samples.read_text().splitlines()) == before + 12


def test_the_kl_coefficient_waits_for_the_actor(ppo_json: Callable[..., Path], tmp_path: Path) -> None:
    """rl 15: while only the critic learns the KL is exactly 0, which says nothing about the coefficient.
    rl 16: and the actor's schedule ends at 0 with the actor's last step.
    """
    file = ppo_json(
        adaptive_kl=True, kl_coeff=0.1, kl_target=1.0, kl_horizon=100, critic_warmup_steps=12,
        lr_scheduler_type="linear", evaluation_strategy="no", eval_datasets=None, do_eval=False,
    )  # fmt: skip
    assert main(["ppo", str(file)]) == 0
    rows = [row for row in metric_rows(tmp_path / "ppo") if "train/kl_coeff" in row]
    assert [row["train/kl_coeff"] for row in rows if row["step"] <= 16] == [0.1] * 16
    assert rows[-1]["train/kl_coeff"] != 0.1
    rates = [row["train/actor_lr"] for row in rows if "train/actor_lr" in row]
    assert len(rates) == 12 and rates[0] == 1e-3 and rates[-1] == pytest.approx(1e-3 / 12)


def test_rates_count_what_was_made_on_all_ranks(ppo_json: Callable[..., Path], tmp_path: Path) -> None:
    """rl 22: `tokens_per_second/x * time/x_seconds` is the same count of tokens for every pass over a rollout."""
    assert main(["ppo", str(ppo_json(num_train_epochs=1, update_iters=1))]) == 0
    row = next(row for row in metric_rows(tmp_path / "ppo") if "time/update_seconds" in row)
    counts = {
        name: row[f"tokens_per_second/{name}"] * row[f"time/{name}_seconds"]
        for name in ("generate", "actor_logprobs", "reference_logprobs", "critic_values", "update")
    }
    passes = {round(counts[name]) for name in counts if name != "generate"}
    assert len(passes) == 1 and round(counts["generate"]) < passes.pop()


def test_a_reward_models_context_is_checked_at_the_start(
    ppo_json: Callable[..., Path], tmp_path: Path, policy_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """rl 9: one that reads the actor's tokens must have room for them."""
    from alignment.ppo.models import load_score_model, load_tokenizer, save_model, save_tokenizer

    reward, model = tmp_path / "reward", load_score_model(str(policy_dir), score_type="reward")
    model.config.max_position_embeddings = 24
    save_model(model, reward)
    save_tokenizer(load_tokenizer(policy_dir), reward)
    changes = {"reward_model_name_or_path": str(reward), "reward_critic_model_name_or_path": str(policy_dir)}
    assert main(["ppo", str(ppo_json(reward=None, **changes))]) == 2
    message = capsys.readouterr().err
    assert "reward_model_name_or_path" in message and "24" in message and "max_src_len" in message


def test_a_rewards_missing_column_is_found_before_models_load(
    ppo_json: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """rl 19: by the data set's columns, with what was meant."""
    file = tmp_path / "mine.py"
    file.write_text("def f(prompts, responses, wants):\n    return [0.0] * len(prompts)\n")
    assert main(["ppo", str(ppo_json(reward=f"{file}:f"))]) == 2
    message = capsys.readouterr().err
    assert "needs the column 'wants'" in message and "did you mean 'want'" in message
    assert "score head" not in message  # which a critic's loading says


def test_a_reward_of_rows_of_two_kinds_gets_none_where_a_row_has_no_such_column(
    ppo_json: Callable[..., Path], tmp_path: Path, prompt_file: Path
) -> None:
    """rl 19: whichever rows a batch happens to hold."""
    other, file = tmp_path / "other.jsonl", tmp_path / "mine.py"
    other.write_text("".join(json.dumps({"prompt": f"tell me more {i}", "level": i}) + "\n" for i in range(24)))
    file.write_text(
        "def f(prompts, responses, want, level):\n"
        "    return [float((w is None) != (n is None)) for w, n in zip(want, level)]\n"
    )
    mixed = f"jsonl::{prompt_file},jsonl::{other}"
    changes = {"per_device_prompt_batch_size": 1, "per_device_train_batch_size": 1, "num_return_sequences": 1}
    assert main(["ppo", str(ppo_json(reward=f"{file}:f", train_datasets=mixed, max_steps=12, **changes))]) == 0
    assert {row["train/reward"] for row in metric_rows(tmp_path / "ppo") if "train/reward" in row} == {1.0}


def test_a_reward_sees_special_tokens_where_it_is_asked_for(ppo_json: Callable[..., Path], tmp_path: Path) -> None:
    """P9: a policy's own markers, which the plain text leaves out."""
    file = tmp_path / "mine.py"
    file.write_text(
        "def f(prompts, responses, response_ids):\n"
        "    assert all('<|pad|>' not in text and '<|endoftext|>' not in text for text in responses)\n"
        "    return [float(len(ids)) for ids in response_ids]\n"
    )
    assert main(["ppo", str(ppo_json(reward=f"{file}:f", reward_sees_special_tokens=True, max_steps=4))]) == 0
    row = metric_rows(tmp_path / "ppo")[1]
    assert row["train/reward"] == pytest.approx(row["train/mean_generated_length"])


def test_a_reward_that_hangs_ends_the_run_with_a_clear_error(
    ppo_json: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """P10"""
    file = tmp_path / "mine.py"
    file.write_text("import time\ndef judge(prompts, responses):\n    time.sleep(600)\n")
    assert main(["ppo", str(ppo_json(reward=f"{file}:judge", reward_timeout=0.2))]) == 2
    assert "reward 'judge' has not come back within reward_timeout" in capsys.readouterr().err


def test_an_actor_with_more_rows_than_its_tokenizer_has_tokens(
    ppo_json: Callable[..., Path], tmp_path: Path, policy_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """P7: the run is that of the same actor without the rows, with a reward model and a critic that do not have them
    (the 7B actor with the 0.5B reward model of one family), and the saved policy still has them all.
    """
    from alignment.ppo.models import load_causal_lm, load_score_model, load_tokenizer, save_model, save_tokenizer

    tokenizer, reward, padded = load_tokenizer(policy_dir), tmp_path / "reward", tmp_path / "padded"
    save_model(load_score_model(str(policy_dir), score_type="reward"), reward)
    model = load_causal_lm(str(policy_dir))
    rows = int(model.config.vocab_size)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    config = copy.deepcopy(model.config)
    config.vocab_size = rows + 40
    wide = type(model)(config)
    for name, tensor in wide.state_dict().items():
        values = np.full(tensor.shape, 0.5, dtype=np.float32)
        values[tuple(slice(0, size) for size in state[name].shape)] = state[name]
        tensor.set_value(values)
    save_model(wide, padded)
    for folder in (reward, padded):
        save_tokenizer(tokenizer, folder)
    common = {
        "reward": None, "reward_model_name_or_path": str(reward), "num_train_epochs": 1, "max_grad_norm": 0.0,
        "ptx_datasets": None, "ptx_coeff": 0.0, "learning_rate": 1e-4,
    }  # fmt: skip
    assert main(["ppo", str(ppo_json("whole", **common))]) == 0
    assert "never sampled" not in capsys.readouterr().err
    assert main(["ppo", str(ppo_json("wide", actor_model_name_or_path=str(padded), **common))]) == 0
    assert "has 344 rows, its tokenizer 304 tokens; the other rows are never sampled" in capsys.readouterr().err
    assert_same_metrics(metric_rows(tmp_path / "whole"), metric_rows(tmp_path / "wide"), 1e-5)
    texts = [(tmp_path / name / "eval_samples.jsonl").read_text() for name in ("whole", "wide")]
    assert [json.loads(line)["response"] for line in texts[0].splitlines()] == [
        json.loads(line)["response"] for line in texts[1].splitlines()
    ]
    saved = read_weights(tmp_path / "wide" / "policy")
    assert saved["qwen2.embed_tokens.weight"].shape[0] == rows + 40


def test_generating_shows_its_progress(
    ppo_json: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A rollout or evaluation of a real model takes a minute: it says how far it is, and how long it will take."""
    from alignment import tally

    monkeypatch.setattr(tally, "EVERY", 0.0)
    with caplog.at_level("INFO", "alignment"):
        main(["ppo", str(ppo_json(max_steps=1, disable_tqdm=True))])
    told = [line for line in caplog.messages if line.startswith("generating: ")]
    assert told and all(" answers/s, " in line and line.endswith(" left") for line in told)
