"""Bad input, each with the message that the user sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignment.arguments import PPOArguments, RewardArguments, SFTArguments, from_dict, parse, parse_ppo
from alignment.arguments.checks import evaluation_metrics
from alignment.errors import ArgumentsError

TUNE = {"output_dir": "out", "model_name_or_path": "m", "train_datasets": "a"}
PPO = {"output_dir": "out", "actor_model_name_or_path": "m", "reward_model_name_or_path": "r", "train_datasets": "a"}
BASE = {SFTArguments: TUNE, RewardArguments: TUNE, PPOArguments: PPO}
SFT, RM = SFTArguments, RewardArguments


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def message(cls: type, values: dict[str, Any]) -> str:
    merged = {key: value for key, value in {**BASE[cls], **values}.items() if value != "(absent)"}
    with pytest.raises(ArgumentsError) as caught:
        from_dict(cls, merged, "args.json")
    return str(caught.value)


CASES: list[tuple[type, dict[str, Any], list[str]]] = [
    # unknown keys
    (PPOArguments, {"kl_coef": 1}, ["args.json: kl_coef: unknown argument", "did you mean 'kl_coeff'?"]),
    (PPOArguments, {"xyzzy": 1}, ["xyzzy: unknown argument"]),
    (
        SFTArguments,
        {"gradient_checkpointing": True},
        ["gradient_checkpointing: unknown argument; here that is 'recompute'"],
    ),
    (PPOArguments, {"eval_strategy": "steps"}, ["unknown argument; here that is 'evaluation_strategy'"]),
    (PPOArguments, {"max_new_tokens": 9}, ["unknown argument; here that is 'max_dec_len'"]),
    (SFT, {"learning_rat": 1}, ["did you mean 'learning_rate'?"]),
    (RM, {"kl_coeff": 1}, ["kl_coeff: is an argument of methods that generate, not of Reward model"]),
    (PPOArguments, {"regularization": 1}, ["is an argument of Reward model", "not of PPO"]),
    (
        PPOArguments,
        {"lora": True},
        ["LoRA is trained in SFT, reward models and other methods on given", "merge_lora"],
    ),
    # wrong types
    (PPOArguments, {"seed": "x"}, ['seed: must be a whole number, not "x"']),
    (PPOArguments, {"seed": 2.0}, ["seed: must be a whole number, not 2.0"]),
    (PPOArguments, {"seed": True}, ["seed: must be a whole number, not true"]),
    (PPOArguments, {"learning_rate": "fast"}, ['learning_rate: must be a number, not "fast"']),
    (PPOArguments, {"learning_rate": [1]}, ["learning_rate: must be a number, not [1]"]),
    (PPOArguments, {"recompute": "maybe"}, ['recompute: must be true or false, not "maybe"']),
    (PPOArguments, {"recompute": 2}, ["recompute: must be true or false, not 2"]),
    (PPOArguments, {"output_dir": 3}, ["output_dir: must be a string, not 3"]),
    (PPOArguments, {"plugins": {"a": 1}}, ["plugins: must be a list of strings"]),
    (PPOArguments, {"train_datasets": 5}, ["train_datasets: must be a string such as"]),
    (PPOArguments, {"train_datasets": {"a": [1]}}, ["'a': a mixture maps NAME to its proportion"]),
    # range and choices
    (PPOArguments, {"temperature": 0}, ["temperature: must be > 0, not 0.0"]),
    (PPOArguments, {"top_p": 1.5}, ["top_p: must be > 0 and <= 1, not 1.5"]),
    (PPOArguments, {"top_p": 0}, ["top_p: must be > 0 and <= 1"]),
    (PPOArguments, {"gamma": 1.1}, ["gamma: must be 0 to 1, not 1.1"]),
    (PPOArguments, {"dual_clip": 1.0}, ["dual_clip: must be > 1, not 1.0"]),
    (PPOArguments, {"kl_coeff": -0.1}, ["kl_coeff: must be >= 0, not -0.1"]),
    (PPOArguments, {"learning_rate": "inf"}, ["learning_rate: must be a finite number"]),
    (PPOArguments, {"kl_estimator": "k4"}, ["kl_estimator: 'k4' is not one of 'k1', 'k2', 'k3'"]),
    (PPOArguments, {"lr_scheduler_type": "cosin"}, ["'cosin' is not one of 'linear', 'cosine'"]),
    (PPOArguments, {"num_train_epochs": 0}, ["num_train_epochs: must be > 0, not 0.0"]),
    (PPOArguments, {"save_steps": 0}, ["save_steps: must be >= 1, not 0"]),
    (PPOArguments, {"eval_steps": 0}, ["eval_steps: must be >= 1, not 0"]),
    (PPOArguments, {"save_total_limit": 0}, ["save_total_limit: must be >= 1, not 0"]),
    (PPOArguments, {"eval_split_ratio": 1.0}, ["eval_split_ratio: must be > 0 and < 1, not 1.0"]),
    (PPOArguments, {"report_to": "mlflow"}, ["report_to: 'mlflow' is not one of 'visualdl', 'tensorboard', 'wandb'"]),
    (PPOArguments, {"offload_level": "actor"}, ["offload_level: 'actor' is not one of 'freeze_model'"]),
    (PPOArguments, {"eval_mode": "double"}, ["eval_mode: 'double' is not one of '', 'single', 'tensor_parallel'"]),
    (PPOArguments, {"sharding": "stage4"}, ["sharding: must be stage1, stage2, stage3"]),
    (PPOArguments, {"sharding": "offload"}, ["offload works with stage2 or stage3 only"]),
    (RM, {"normalizer_type": "Median"}, ["'Median' is not one of 'ExponentialMovingAverage', 'RunningMeanStd'"]),
    (RM, {"normalizer_momentum": 1.0}, ["normalizer_momentum: must be >= 0 and < 1, not 1.0"]),
    (RM, {"loss_type": "pairwise"}, ["loss_type: 'pairwise' is not one of 'sequence-wise', 'token-wise'"]),
    (SFT, {"lora_rank": 0}, ["lora_rank: must be >= 1, not 0"]),
    # missing
    (PPOArguments, {"output_dir": "(absent)"}, ["output_dir is missing"]),
    (PPOArguments, {"actor_model_name_or_path": "(absent)"}, ["actor_model_name_or_path is missing"]),
    (PPOArguments, {"train_datasets": "(absent)"}, ["there are no training prompts: give train_datasets"]),
    (SFT, {"train_datasets": "(absent)"}, ["there are no training data: give dataset_name_or_path or train_datasets"]),
    (RM, {"model_name_or_path": ""}, ["model_name_or_path is missing"]),
    (
        PPOArguments,
        {"reward_model_name_or_path": "(absent)"},
        ["there is no reward: give reward_model_name_or_path", "file.py:function"],
    ),
    (
        PPOArguments,
        {"reward_model_name_or_path": "(absent)", "reward": ["model", "brevity"]},
        ["reward asks for the reward model: give reward_model_name_or_path"],
    ),
    # not available
    (SFT, {"weight_quantize_algo": "nf4"}, ["'nf4' cannot be used: training of quantised models is not available"]),
    (SFT, {"prefix_tuning": True}, ["prefix_tuning: True cannot be used", "lora is"]),
    (SFT, {"eval_with_do_generation": True}, ["evaluation by generation is not available yet in this version"]),
    (SFT, {"continue_training": False}, ["training always starts from model_name_or_path's weights"]),
    (PPOArguments, {"rl_algorithm": "grpo"}, ["rl_algorithm is grpo, but this is PPO", "`alignment grpo`"]),
    (PPOArguments, {"use_rm_server": True}, ["write the call as a Python reward"]),
    (PPOArguments, {"chat_template": "x.json"}, ["use prompt_template"]),
    # contradictions
    (
        PPOArguments,
        {"per_device_prompt_batch_size": 6, "per_device_train_batch_size": 4},
        [
            "per_device_prompt_batch_size 6 x num_return_sequences 1 = 6 samples per rollout",
            "per_device_train_batch_size 4 x gradient_accumulation_steps 1 = 4 per optimizer step",
            "for instance per_device_prompt_batch_size 8",
        ],
    ),
    (PPOArguments, {"ptx_coeff": 16}, ["ptx_coeff is 16, but there are no ptx_datasets", "set ptx_coeff to 0"]),
    (PPOArguments, {"max_dec_len": 4, "min_dec_len": 5}, ["min_dec_len 5 is above max_dec_len 4"]),
    (PPOArguments, {"adaptive_kl": True, "kl_coeff": 0}, ["adaptive_kl multiplies kl_coeff, which is 0"]),
    (PPOArguments, {"min_learning_rate": 1.0}, ["min_learning_rate 1 is above learning_rate 5e-05"]),
    (
        PPOArguments,
        {"critic_min_learning_rate": 1e-4, "critic_learning_rate": 1e-5},
        ["critic_min_learning_rate 0.0001 is above critic_learning_rate 1e-05"],
    ),
    # B1: float16 gradients are divided by the global number of tokens and underflow without a loss scale
    (PPOArguments, {"fp16": True}, ["fp16 is not offered", "without a loss scale", "bf16 to true"]),
    (PPOArguments, {"max_steps": 0}, ["max_steps is 0, which trains nothing"]),
    (PPOArguments, {"do_train": False}, ["do_train and do_eval are both false"]),
    (PPOArguments, {"do_eval": True}, ["do_eval is true, but there are no evaluation data", "eval_split_ratio"]),
    (RM, {"evaluation_strategy": "epoch"}, ["evaluation_strategy is epoch, but there are no evaluation data"]),
    (SFT, {"load_best_model_at_end": True}, ["load_best_model_at_end needs evaluations"]),
    (
        SFT,
        {"load_best_model_at_end": True, "evaluation_strategy": "epoch", "eval_datasets": "b"},
        ["needs equal strategies", "evaluation_strategy is epoch and save_strategy is steps"],
    ),
    (
        SFT,
        {
            "load_best_model_at_end": True,
            "evaluation_strategy": "steps",
            "eval_datasets": "b",
            "eval_steps": 100,
            "save_steps": 150,
        },
        ["needs save_steps to be a multiple of eval_steps", "150 and 100"],
    ),
    (SFT, {"src_length": 512, "max_length": 512}, ["src_length 512 leaves no token for the answer in max_length 512"]),
    (RM, {"max_src_len": 512, "max_length": 512}, ["max_src_len 512 leaves no token for the answer"]),
    (SFT, {"dataset_name_or_path": "b"}, ["dataset_name_or_path and train_datasets are both given"]),
    (SFT, {"train_datasets": None, "dataset_name_or_path": "./data"}, ["./data does not exist (looked in "]),
    # paths
    (PPOArguments, {"resume_from_checkpoint": "nope"}, ["resume_from_checkpoint: nope is not a folder"]),
    (
        PPOArguments,
        {"resume_from_checkpoint": True, "overwrite_output_dir": True},
        ["resume_from_checkpoint continues a run and overwrite_output_dir starts afresh"],
    ),
    (PPOArguments, {"plugins": ["mine.py"]}, ["plugins: mine.py does not exist (looked in "]),
    (PPOArguments, {"reward": "mine.py:f"}, ["reward: mine.py does not exist (looked in "]),
    (PPOArguments, {"reward": "mine.py"}, ["names a file but no function; write mine.py:FUNCTION"]),
    (SFT, {"lora": True, "lora_path": "nope"}, ["lora_path: nope is not a folder"]),
    # rewards
    (PPOArguments, {"reward": {"model": "much"}}, ["weight of 'model' must be a finite number, not 'much'"]),
    (PPOArguments, {"reward": {"model": 0}}, ["gives every reward the weight 0"]),
    (PPOArguments, {"reward": ["a", "a"]}, ["names a reward twice"]),
    (PPOArguments, {"reward": 5}, ["reward: must be"]),
]


@pytest.mark.parametrize(("cls", "values", "parts"), CASES, ids=[" ".join(map(str, case[1])) for case in CASES])
def test_bad_input(cls: type, values: dict[str, Any], parts: list[str]) -> None:
    text = message(cls, values)
    for part in parts:
        assert part in text
    assert "problems with" not in text, "one mistake gives one message"


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "ppo.json"
    file.write_text(
        '{\n  "output_dir": "out",\n  "actor_model_name_or_path": "m",\n  "train_datasets": "a",\n'
        '  "kl_coef": 1,\n  "top_p": 7\n}\n'
    )
    with pytest.raises(ArgumentsError) as caught:
        parse_ppo(["ppo.json", "temperature=hot"])
    lines = str(caught.value).splitlines()
    assert lines == [
        "4 problems with the arguments in ppo.json:",
        "  - ppo.json, line 5: kl_coef: unknown argument; did you mean 'kl_coeff'?",
        "  - ppo.json, line 6: top_p: must be > 0 and <= 1, not 7.0",
        '  - command line: temperature: must be a number, not "hot"',
        '  - there is no reward: give reward_model_name_or_path, or reward as "file.py:function"',
    ]


FILES: list[tuple[str, list[str]]] = [
    ('{"seed": 1,\n}', ["bad.json, line 2, column 1: not valid JSON", "comma before the closing '}'"]),
    ('{"seed": 1\n "top_p": 1}', ["line 2, column 2", "is a comma missing"]),
    ("{'seed': 1}", ["line 1, column 2", "double quotes"]),
    ('{"seed": 1, // one\n "top_p": 1}', ["line 1", "JSON has no comments"]),
    ("", ["bad.json, line 1, column 1: not valid JSON: the file is empty"]),
    ('{"seed": ', ["bad.json, line 1"]),
    ("[1, 2]", ["must hold one JSON object", "not a list"]),
    ('{"seed": NaN}', ["NaN is not a JSON value (line 1)"]),
    ('{"seed": 1,\n"top_p": 1,\n"seed": 2}', ["key 'seed' is given twice (lines 1 and 3)"]),
    ('{"reward": {"a": 1, "a": 2}}', ["key 'a' is given twice"]),
]


@pytest.mark.parametrize(("text", "parts"), FILES)
def test_bad_files(text: str, parts: list[str], tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ArgumentsError) as caught:
        parse_ppo(["bad.json"])
    for part in ["bad.json", *parts]:
        assert part in str(caught.value)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(b'{"seed": "\xff"}')
    with pytest.raises(ArgumentsError, match="bad.json: not a UTF-8 text file"):
        parse_ppo(["bad.json"])


def test_a_byte_order_mark_is_harmless(tmp_path: Path) -> None:
    (tmp_path / "ppo.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(PPO).encode())
    assert parse_ppo(["ppo.json"]).train_datasets == "a"


def test_a_missing_file_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ArgumentsError) as caught:
        parse_ppo(["config/nope.json"])
    assert str(caught.value) == f"argument file config/nope.json does not exist (looked in {tmp_path})"
    with pytest.raises(ArgumentsError, match="is a folder, not an argument file"):
        parse_ppo([str(tmp_path)])


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["seed=1", "oops"], "command line: 'oops' is not understood; write key=value, --key value or --key=value"),
        (["seed=1", "-seed"], "'-seed' is not understood"),
        (["seed=1", "--kl_coeff"], "--kl_coeff needs a value (--kl_coeff VALUE or kl_coeff=VALUE)"),
        (["seed=1", "--kl_coeff", "--seed", "2"], "--kl_coeff needs a value"),
        (["seed=1", "other.json"], "only one argument file can be given, and it must come first"),
        (["--kl_coef", "1"], "did you mean 'kl_coeff'?"),
        (['reward={"a": }'], "is not valid JSON"),
        (["seed="], "output_dir is missing"),
    ],
)
def test_bad_command_lines(words: list[str], part: str) -> None:
    with pytest.raises(ArgumentsError) as caught:
        parse_ppo(words)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("content", "ok"),
    [
        (["checkpoint-10/"], False),
        (["policy/"], False),
        (["notes.txt"], False),
        ([], True),
        ([".cache/", "runs/", "log/", "heartbeat/", "train.log", "arguments.json"], True),
        (["data_mixture.json", "data_summary.json", "metrics.jsonl", "eval_samples.jsonl", ".lock"], True),
    ],
)
def test_an_output_dir_of_an_earlier_run(content: list[str], ok: bool, tmp_path: Path) -> None:
    """D13: what a start leaves that fails before its first step blocks no other."""
    (tmp_path / "out").mkdir()
    for name in content:
        path = tmp_path / "out" / name
        if name.endswith("/"):
            path.mkdir()
        else:
            path.write_text("")
    if ok:
        from_dict(PPOArguments, PPO)
        return
    text = message(PPOArguments, {})
    assert "output_dir out is not empty" in text
    assert content[0].rstrip("/") in text
    assert "resume_from_checkpoint=true" in text
    assert "overwrite_output_dir=true" in text
    from_dict(PPOArguments, {**PPO, "overwrite_output_dir": True})
    from_dict(PPOArguments, {**PPO, "resume_from_checkpoint": True})
    assert "is not empty" in from_dict(PPOArguments, {**PPO, "dry_run": True}).notes[0]


def test_metrics_of_a_trained_step_are_an_earlier_run(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text('{"step": 0}\n')
    from_dict(PPOArguments, PPO)
    (tmp_path / "out" / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert "it holds metrics.jsonl" in message(PPOArguments, {})


def test_a_folder_that_a_run_may_be_using_is_left_to_its_lock(tmp_path: Path) -> None:
    """A second start was told to overwrite the first one's folder, and only then that it is in use."""
    from alignment.paths import LOCK

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "policy").mkdir()
    assert "overwrite_output_dir=true" in message(PPOArguments, {})
    (tmp_path / "out" / LOCK).write_text("{}")
    from_dict(PPOArguments, PPO)


def test_only_the_first_process_judges_the_output_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out" / "policy").mkdir(parents=True)
    monkeypatch.setenv("PADDLE_TRAINER_ID", "1")
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    from_dict(PPOArguments, PPO)


def test_an_output_dir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    assert "output_dir out is a file, not a folder" in message(PPOArguments, {})


def test_a_checkpoint_may_be_named_within_the_output_dir(tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoint-5").mkdir(parents=True)
    args = from_dict(PPOArguments, {**PPO, "resume_from_checkpoint": "checkpoint-5"})
    assert args.resume_from_checkpoint == "out/checkpoint-5"


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["train.json"], "do_eval=false"),
        (["train.json"], "no file of split 'validation or test'; it holds: train (1)"),
        (
            ["rows.json"],
            "holds no file of split 'validation or test'; evaluation needs one, or eval_split_ratio, or do_eval=false",
        ),
        (["dev.json"], "no file of split 'train'; it holds: dev (1)"),
        (["readme.md"], "holds no data file"),
        (["train.jsonl", "dev.json.gz"], ""),
        (["train/a.json", "dev/a.json"], ""),
    ],
)
def test_data_folders_of_sft(names: list[str], part: str, tmp_path: Path) -> None:
    for name in names:
        path = tmp_path / "data" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("")
    values = {"train_datasets": "(absent)", "dataset_name_or_path": "data", "do_eval": True}
    if part:
        assert part in message(SFT, values)
    else:
        parse(SFT, [f"{key}={value}" for key, value in {**TUNE, **values}.items() if value != "(absent)"])


def test_a_mixture_by_name_has_no_evaluation_data_of_its_own() -> None:
    values = {"train_datasets": "(absent)", "dataset_name_or_path": "alpaca", "do_eval": True}
    assert "do_eval is true, but there are no evaluation data" in message(SFT, values)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"tensor_parallel_degree": 3}, "= 3 processes (or a multiple of it) are needed, but the run has 4"),
        ({"tensor_parallel_degree": 2, "pipeline_parallel_degree": 4}, "= 8 processes"),
        ({"sharding": "stage1", "sharding_parallel_degree": 3}, "sharding_parallel_degree 3 = 3 processes"),
        ({"sharding_parallel_degree": 2}, "sharding says nothing to share; set sharding to stage1, stage2 or stage3"),
        ({"sequence_parallel": True}, "set tensor_parallel_degree to 2 or more"),
        (
            {"sharding": "stage3", "pipeline_parallel_degree": 2},
            "sharding stage3 with a pipeline would gather every stage's parameters",
        ),
    ],
)
def test_layouts_that_cannot_be(values: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "4")
    assert text in message(PPOArguments, values)


@pytest.mark.parametrize("cls", list(BASE))
def test_a_metric_that_no_evaluation_gives_is_refused_where_it_is_needed(cls: type) -> None:
    """rl 3: at the first evaluation it would cost all that was trained until then."""
    evaluated = {"evaluation_strategy": "steps", "save_strategy": "steps", "eval_datasets": "b", "eval_steps": 500}
    wrong = {**evaluated, "metric_for_best_model": "eval_acuracy", "load_best_model_at_end": True}
    text = message(cls, wrong)
    assert "metric_for_best_model eval_acuracy: no such metric" in text and "there are" in text
    args = from_dict(cls, {**BASE[cls], **wrong, "load_best_model_at_end": False})
    assert args.metric_for_best_model in evaluation_metrics(args)
    assert any("no such metric" in note for note in args.notes)


def test_the_metrics_that_may_be_named_are_those_of_evaluations() -> None:
    """rl 3: the list that a wrong name is compared with is the one that evaluations give."""
    from alignment.rm.reward_metrics import cost_metrics, pair_metrics

    given = pair_metrics(np.arange(4.0), np.arange(4.0)[::-1])
    reward = from_dict(RM, BASE[RM])
    assert {name for name in given if "/" not in name} | {"loss"} == set(evaluation_metrics(reward))
    signs = np.array([1, -1, 1, -1])
    costs = cost_metrics(np.arange(4.0), np.arange(4.0)[::-1], signs, signs)
    cost = from_dict(RM, {**BASE[RM], "score_type": "cost"})
    assert {name for name in costs if "/" not in name} | {"loss"} == set(evaluation_metrics(cost))
    greedy = from_dict(PPOArguments, {**BASE[PPOArguments], "eval_temperature": 0, "reward": {"words": 1, "model": 2}})
    assert "reward_greedy/words" in evaluation_metrics(greedy) and "reward" not in evaluation_metrics(greedy)
    assert greedy.metric_for_best_model == "reward_greedy" and greedy.greater_is_better
