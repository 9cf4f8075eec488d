"""Argument files in YAML: the same keys, values and errors as in JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignment.arguments import PPOArguments, from_dict, parse_ppo
from alignment.arguments.sources import read_file
from alignment.cli import main
from alignment.errors import ArgumentsError
from tests.tiny import tiny_model_dir, write_jsonl

PPO = {"output_dir": "out", "actor_model_name_or_path": "m", "reward_model_name_or_path": "r", "train_datasets": "a"}
HEAD = "".join(f"{key}: {value}\n" for key, value in PPO.items())


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def values_in(text: str, name: str = "ppo.yaml") -> dict[str, Any]:
    Path(name).write_text(text)
    return {item.key: item.value for item in read_file(name)}


def refused(text: str, name: str = "ppo.yaml") -> str:
    Path(name).write_text(text)
    with pytest.raises(ArgumentsError) as caught:
        parse_ppo([name])
    return str(caught.value)


def test_values_are_those_of_json() -> None:
    content = {
        **PPO,
        "learning_rate": 1e-5,
        "seed": 3,
        "bf16": True,
        "reward": {"model": 0.5, "file.py:f": -1},
        "stop_strings": ["a: b", "#", "\n", "null", "1"],
        "dual_clip": None,
        "train_datasets": {"a": 0.5, "b": {"proportion": 1, "path": "x/y.jsonl", "deep": [[1, [2.5, "t"]], {}]}},
    }
    Path("ppo.json").write_text(json.dumps(content))
    as_yaml = """
output_dir: out          # comments are allowed here
actor_model_name_or_path: m
reward_model_name_or_path: r
learning_rate: 1e-5
seed: 3
bf16: true
reward: {model: 0.5, "file.py:f": -1}
stop_strings: ["a: b", '#', "\\n", 'null', "1"]
dual_clip:
train_datasets:
  a: 0.5
  b:
    proportion: 1
    path: x/y.jsonl
    deep:
      - [1, [2.5, t]]
      - {}
"""
    theirs = {item.key: item.value for item in read_file("ppo.json")}
    assert values_in(as_yaml) == theirs
    assert json.dumps(values_in(as_yaml), sort_keys=True) == json.dumps(theirs, sort_keys=True)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("5E3", 5000.0),
        ("-.5", -0.5),
        ("2.", 2.0),
        ("12", 12),
        ("-0", 0),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
        # what YAML 1.1 makes something else of
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("No", "No"),
        ("1:30", "1:30"),
        ("010", "010"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("2026-11-25", "2026-11-25"),
        (".inf", ".inf"),
        ("=", "="),
        ('"1e-5"', "1e-5"),
        ("'true'", "true"),
        ("!!str 12", "12"),
        ("C:/data", "C:/data"),
    ],
)
def test_plain_words(text: str, value: Any) -> None:
    found = values_in(f"key: {text}\n")["key"]
    assert (found, type(found)) == (value, type(value))


def test_on_and_off_are_truth_values_where_the_key_is_one() -> None:
    Path("ppo.yaml").write_text(HEAD + "bf16: on\nshuffle: off\nrecompute: Yes\nprompt_template: on\n")
    args = parse_ppo(["ppo.yaml"])
    assert (args.bf16, args.shuffle, args.recompute, args.prompt_template) == (True, False, True, "on")


def test_keys_are_text() -> None:
    assert values_in("train_datasets: {yes: 1, 12: 2, null: 3}")["train_datasets"] == {"yes": 1, "12": 2, "null": 3}


@pytest.mark.parametrize("name", ["ppo.yaml", "ppo.yml"])
def test_errors_name_the_line(name: str) -> None:
    text = refused(HEAD + "\n# a comment\nkl_coef: 1\ntemperature: hot\nseed: 2.0\n", name)
    assert f"{name}, line 7: kl_coef: unknown argument; did you mean 'kl_coeff'?" in text
    assert f'{name}, line 8: temperature: must be a number, not "hot"' in text
    assert f"{name}, line 9: seed: must be a whole number, not 2.0" in text


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["ppo.yaml: the file is empty"]),
        ("# nothing\n", ["the file is empty"]),
        ("- a\n- b\n", ["line 1: must hold keys and values"]),
        ("seed: 1\n\tseed: 2\n", ["line 2, column 1: not valid YAML", "indented by spaces"]),
        ("seed: 1\ntop_p: 1\nseed: 2\n", ["key 'seed' is given twice (lines 1 and 3)"]),
        ("reward:\n  a: 1\n  a: 2\n", ["key 'a' is given twice (lines 2 and 3)"]),
        ("prompt_template: a: b\n", ["line 1, column 19: not valid YAML", "stands in quotes"]),
        ("reward: [a, b\n", ["not valid YAML", "line 2"]),
        ("seed: 1\n---\nseed: 2\n", ["not valid YAML", "one file holds one set of arguments"]),
        ("a: &x 1\nb: *x\n", ["anchors and aliases (&, *) are not read"]),
        ("a: &x [*x]\n", ["anchors and aliases (&, *) are not read"]),
        ("<<: {a: 1}\n", ["line 1, column 1: merge keys (<<) are not read"]),
        ("a: !!python/object/apply:os.system [ls]\n", ["the tag 'tag:yaml.org,2002:python/object/apply:os.system' is"]),
        ("a: !!int x\n", ["'x' is not what its tag says"]),
        ("? [a, b]\n: 1\n", ["a key is one word"]),
        ("a: \x07\n", ["not valid YAML"]),
        ("a: " + "[" * 3000, ["nested too deeply"]),
    ],
)
def test_bad_files(text: str, parts: list[str]) -> None:
    said = refused(text)
    for part in ["ppo.yaml", *parts]:
        assert part in said


def test_json_that_is_nested_too_deeply_is_said() -> None:
    assert refused('{"a": ' + "[" * 100_000, "ppo.json") == "ppo.json: its brackets are nested too deeply"


def test_only_one_file_whatever_its_kind() -> None:
    Path("ppo.yaml").write_text(HEAD)
    with pytest.raises(ArgumentsError, match="'more.yaml': only one argument file can be given"):
        parse_ppo(["ppo.yaml", "more.yaml"])


def test_what_is_saved_is_json() -> None:
    Path("ppo.yaml").write_text(HEAD + "learning_rate: 2e-6\n")
    args = parse_ppo(["ppo.yaml"])
    saved = json.loads(args.save("arguments.json").read_text())
    assert (saved["learning_rate"], args.raw["learning_rate"]) == (2e-6, 2e-6)
    assert from_dict(PPOArguments, saved).to_dict() == saved


def test_the_shipped_twin_is_the_same_run(repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """config/demo/ppo_argument.yaml and .json: the same keys, and the same words of --dry_run."""
    model = tiny_model_dir(tmp_path / "model", max_position_embeddings=256)
    train, dev = (write_jsonl(tmp_path / f"{i}.jsonl", [{"prompt": f"say {i} {k}"} for k in range(8)]) for i in "ab")
    words = [f"{role}_model_name_or_path={model}" for role in ("actor", "reward")]
    words += [f"train_datasets=jsonl::{train}", f"eval_datasets=jsonl::{dev}", "output_dir=out", "--dry_run"]
    said = {}
    for ending in ("json", "yaml"):
        assert main(["ppo", str(repo / "config" / "demo" / f"ppo_argument.{ending}"), *words]) == 0
        said[ending] = capsys.readouterr().out
    assert said["yaml"] == said["json"] and "PPO: resolved arguments" in said["yaml"]
    as_json, as_yaml = (read_file(str(repo / "config" / "demo" / f"ppo_argument.{ending}")) for ending in said)
    assert [(item.key, item.value) for item in as_yaml] == [(item.key, item.value) for item in as_json]
