"""The command line: its forms, and that it wins over the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignment.arguments import PPOArguments, from_dict, parse_ppo, parse_sft
from alignment.errors import ArgumentsError

BASE = {"output_dir": "out", "actor_model_name_or_path": "m", "reward_model_name_or_path": "r", "train_datasets": "a"}


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "ppo.json"
    path.write_text(json.dumps({**BASE, "kl_coeff": 0.1, "seed": 1, "recompute": True}, indent=2))
    return str(path)


@pytest.mark.parametrize("words", [["kl_coeff=0.5"], ["--kl_coeff", "0.5"], ["--kl_coeff=0.5"], ["--kl-coeff", "0.5"]])
def test_each_form_wins_over_the_file(file: str, words: list[str]) -> None:
    args = parse_ppo([file, *words])
    assert args.kl_coeff == 0.5
    assert args.seed == 1
    assert args.raw["kl_coeff"] == "0.5"


def test_the_last_word_wins(file: str) -> None:
    assert parse_ppo([file, "seed=2", "--seed", "3", "seed=4"]).seed == 4


def test_an_alias_on_the_command_line_wins_over_the_files_name(file: str) -> None:
    assert parse_ppo([file, "rollout_n=3"]).num_return_sequences == 3


@pytest.mark.parametrize("word", ["yes", "true", "t", "y", "1", "True", "YES"])
def test_words_for_true(file: str, word: str) -> None:
    assert parse_ppo([file, f"adaptive_kl={word}"]).adaptive_kl is True
    assert from_dict(PPOArguments, {**BASE, "adaptive_kl": word}).adaptive_kl is True


@pytest.mark.parametrize("word", ["no", "false", "f", "n", "0", "False", "NO"])
def test_words_for_false(file: str, word: str) -> None:
    assert parse_ppo([file, f"recompute={word}"]).recompute is False
    assert parse_ppo([file, "--recompute", word]).recompute is False


@pytest.mark.parametrize(("value", "wanted"), [(1, True), (0, False), (True, True), (False, False)])
def test_json_truth_values(value: object, wanted: bool) -> None:
    assert from_dict(PPOArguments, {**BASE, "normalize_advantage": value}).normalize_advantage is wanted


def test_a_flag_may_stand_alone(file: str) -> None:
    args = parse_ppo([file, "--dry_run", "--skip_bad_rows", "seed=9", "--normalize_advantage"])
    assert (args.dry_run, args.skip_bad_rows, args.normalize_advantage, args.seed) == (True, True, True, 9)


def test_negative_numbers_and_scientific_notation(file: str) -> None:
    args = parse_ppo([file, "--max_steps", "-1", "missing_eos_score=-2.5", "learning_rate=1e-3"])
    assert (args.max_steps, args.missing_eos_score, args.learning_rate) == (-1, -2.5, 1e-3)


def test_numbers_in_strings_as_the_reference_takes_them() -> None:
    args = from_dict(PPOArguments, {**BASE, "learning_rate": "1e-5", "seed": "7"})
    assert (args.learning_rate, args.seed) == (1e-5, 7)


@pytest.mark.parametrize(
    "words",
    [["plugins=a,b"], ["--plugins", "a", "b"], ['plugins=["a", "b"]'], ["--plugins=a,b"], ["--plugins", "a, b"]],
)
def test_lists(file: str, words: list[str]) -> None:
    assert parse_ppo([file, *words, "seed=5"]).plugins == ["a", "b"]


def test_a_value_may_hold_an_equals_sign(file: str) -> None:
    assert parse_ppo([file, "prompt_template={{ a == 'b=c' }}"]).prompt_template == "{{ a == 'b=c' }}"


def test_null_means_not_given(file: str) -> None:
    args = parse_ppo([file, "kl_coeff=null"])
    assert args.kl_coeff == 0.02
    assert "kl_coeff" not in args.given
    assert from_dict(PPOArguments, {**BASE, "critic_learning_rate": None}).critic_learning_rate == 5e-5


def test_an_empty_string_switches_a_data_set_off(file: str) -> None:
    assert parse_ppo([file, "ptx_datasets="]).ptx_datasets is None


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("a:0.5,b", "a:0.5,b"),
        ('{"a": 0.5, "b": {"proportion": 1, "path": "x"}}', {"a": 0.5, "b": {"proportion": 1, "path": "x"}}),
        ('["a:0.5", "b"]', "a:0.5,b"),
        ("jsonl::/data/x.jsonl", "jsonl::/data/x.jsonl"),
    ],
)
def test_mixtures(file: str, word: str, wanted: object) -> None:
    assert parse_ppo([file, f"train_datasets={word}"]).train_datasets == wanted


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("brevity", "brevity"),
        ("brevity,model", {"brevity": 1.0, "model": 1.0}),
        ('{"model": 1, "brevity": -0.5}', {"model": 1.0, "brevity": -0.5}),
        ('["model"]', {"model": 1.0}),
    ],
)
def test_rewards(file: str, word: str, wanted: object) -> None:
    assert parse_ppo([file, f"reward={word}"]).reward == wanted


def test_aliases() -> None:
    words = ["output_dir=out", "model_name_or_path=m"]
    args = parse_sft([*words, "dataset=a", "intokens=true", "max_src_len=100"])
    assert (args.dataset_name_or_path, args.zero_padding, args.src_length) == ("a", True, 100)
    assert {"dataset_name_or_path", "zero_padding", "src_length"} <= args.given


def test_two_names_of_one_argument_must_agree() -> None:
    assert from_dict(PPOArguments, {**BASE, "rollout_n": 4, "num_return_sequences": 4}).num_return_sequences == 4
    with pytest.raises(ArgumentsError, match="rollout_n and num_return_sequences are two names of one argument"):
        from_dict(PPOArguments, {**BASE, "num_return_sequences": 2, "rollout_n": 4})


def test_everything_without_a_file() -> None:
    args = parse_ppo([f"{key}={value}" for key, value in BASE.items()])
    assert args.file is None
    assert args.train_datasets == "a"


def test_a_saved_file_gives_the_same_arguments(file: str, tmp_path: Path) -> None:
    words = [
        'reward={"model": 2}',
        "report_to=wandb",
        "dataloader_num_workers=2",
        "wandb_api_key=secret",
        "max_length=64",
    ]
    args = parse_ppo([file, *words])
    saved = args.save(tmp_path / "run" / "arguments.json")
    again = parse_ppo([str(saved)])
    assert again.to_dict() == args.to_dict()
    assert "secret" not in saved.read_text()
    assert args.passthrough["wandb_api_key"] == "secret"


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_ppo(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert [name for name in PPOArguments.specs() if f"\n  {name}  (default" not in text] == []
