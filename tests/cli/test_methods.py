"""Methods by name: the registry, ``alignment run``, ``alignment methods``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from alignment import cli, methods
from alignment.arguments import from_dict
from alignment.errors import ArgumentsError
from alignment.methods import start

#: A user's method in one file outside the package.
MINE = """
from dataclasses import dataclass
from alignment.arguments import argument
from alignment.methods import register_method


@dataclass
class Keys:
    GROUP = "Mine"

    pace: float = argument(0.5, "How fast the moving average follows.", gt=0, le=1)
    bold: bool = argument(False, "Whether to be bold.")


@register_method
class Mine:
    name = "mine"
    title = "Mine"
    summary = "a method of my own"
    base = "online"
    Keys = Keys
    changes = {"num_return_sequences": {"default": 4}}
    presets = {"slow_mine": {"pace": 0.125}}

    @staticmethod
    def run(args, world, argv):
        print(f"{args.STAGE} pace={args.pace} samples={args.num_return_sequences} of {world.processes}: {argv}")
        return 0
"""
GIVEN = {"output_dir": "out", "actor_model_name_or_path": "m", "reward_model_name_or_path": "r", "train_datasets": "a"}


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(methods, "_REGISTERED", {})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "mine.py").write_text(MINE)
    (tmp_path / "conf" / "mine.json").write_text(json.dumps({**GIVEN, "plugins": "mine.py"}))


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = cli.main(argv)
    out, err = capsys.readouterr()
    return status, out, err


def test_a_users_method_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """One file, named by the argument file beside it; nothing of the package is touched."""
    status, out, err = run(capsys, "run", "mine", "conf/mine.json", "pace=0.25")
    assert status == 0, err
    assert "mine pace=0.25 samples=4 of 1: ['conf/mine.json', 'pace=0.25']" in out


def test_it_may_be_named_by_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"{key}={value}" for key, value in GIVEN.items()]
    status, out, err = run(capsys, "run", "conf/mine.py:Mine", *words, "--bold")
    assert status == 0, err
    assert "mine pace=0.5" in out


def test_plugins_on_the_command_line_win_over_those_of_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("conf/mine.json").write_text(json.dumps({**GIVEN, "plugins": "missing.py"}))
    status, out, err = run(capsys, "run", "mine", "conf/mine.json", "--bold", "plugins=conf/mine.py")
    assert status == 0, err
    assert "mine pace=0.5" in out


def test_its_keys_stand_in_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "run", "mine", "plugins=conf/mine.py", "--help")
    assert status == 0
    assert "\nMine\n  pace  (default: 0.5) [> 0 and <= 1]\n      How fast the moving average follows." in out
    assert "      slow_mine: pace 0.125" in out
    assert "gae_lambda" not in out


def test_its_keys_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "run", "mine", "conf/mine.json", "pace=2", "pase=1", "gae_lambda=1")
    assert status == 2 and "Traceback" not in err
    assert "pace: must be > 0 and <= 1, not 2.0" in err
    assert "pase: unknown argument; did you mean 'pace'?" in err
    assert "gae_lambda: is an argument of methods with a critic, not of Mine" in err


def test_a_key_of_it_given_to_another_method_is_told_whose_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "methods", "plugins=conf/mine.py")
    status, _, err = run(capsys, "ppo", *(f"{key}={value}" for key, value in GIVEN.items()), "pace=1")
    assert status == 2 and "pace: is an argument of Mine, not of PPO" in err


def test_all_methods_are_listed_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "methods", "plugins=conf/mine.py")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert status == 0 and {"sft", "ppo", "run", "slow_mine"} <= set(lines)
    assert lines["run"].split(maxsplit=2)[1:] == ["mine", "Mine: a method of my own"]
    assert lines["slow_mine"].endswith("mine with pace 0.125")


def test_an_unknown_method_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "run", "mime", "conf/mine.json")
    assert status == 2 and err.startswith("error: unknown method 'mime'; did you mean 'mine'?\nKnown: ")
    status, _, err = run(capsys, "dapoo", "conf/mine.json")
    assert status == 2 and "unknown task 'dapoo'; did you mean 'dapo'?" in err
    status, _, err = run(capsys, "run", "conf/mine.json")
    assert status == 2 and "'conf/mine.json' is no method's name\nusage: alignment run NAME [FILE]" in err


def test_run_takes_a_preset_too(capsys: pytest.CaptureFixture[str]) -> None:
    """`alignment methods` shows a user's presets, and no command started one; the command's replaced a given one."""
    status, out, err = run(capsys, "run", "slow_mine", "conf/mine.json")
    assert status == 0 and "mine pace=0.125 samples=4" in out, err
    status, _, err = run(capsys, "run", "dr_grpo", "conf/mine.json", "preset=dapo")
    assert status == 2 and "preset dapo, but the command is `dr_grpo`, a preset too: name one of them" in err
    assert run(capsys, "run", "slow_mine", "conf/mine.json", "preset=slow_mine")[0] == 0


@pytest.mark.parametrize("words", [["run", "sft"], ["run", "rm"], ["run", "ppo"], ["rm"], ["reward"]])
def test_the_toolkits_own_run_either_way(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, *words, "there_is_no_such_file.json")
    assert status == 2 and "there_is_no_such_file.json does not exist" in err


def test_the_command_names_a_method_or_a_preset_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend("conf")
    monkeypatch.setitem(methods.BUILT_IN, "mine", "mine:Mine")
    try:
        words = [f"{key}={value}" for key, value in GIVEN.items()]
        assert "mine pace=0.5 samples=4" in run(capsys, "mine", *words)[1]
        status, out, _ = run(capsys, "slow-mine", *words)
        assert status == 0 and "mine pace=0.125 samples=4" in out
        assert "preset" not in out.splitlines()[-1], "how to resume starts with the command's own words"
        assert "did you mean 'mine'?" in run(capsys, "mines")[2]
    finally:
        sys.modules.pop("mine", None)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("name = 'x y'; title = summary = 't'; run = print", "a method's name is letters, digits and _, not 'x y'"),
        ("name = 'mine'", "it has no text as title and summary"),
        ("name = title = summary = 'mine'", "it has no run(args, world, argv)"),
        ("name = title = summary = 'mine'; run = print", "it needs Arguments, or Keys (a dataclass, or None) and base"),
        ("name = title = summary = 'mine'; run = print; Arguments = int", "its Arguments do not derive from"),
        ("name = title = summary = 'mine'; run = print; Keys = None; base = 'online'; presets = [1]", "presets is a"),
    ],
)
def test_what_is_no_method_is_said(body: str, message: str) -> None:
    namespace: dict = {}
    exec(f"class Mine:\n    {body}", namespace)
    with pytest.raises(ArgumentsError) as caught:
        methods.register_method(namespace["Mine"])
    assert message in str(caught.value)


def test_a_method_without_its_roles_or_flow_is_said_before_anything_is_read() -> None:
    from alignment.api import OnlineMethod

    class Half(OnlineMethod):
        name = title = summary = "half"
        Keys = None

        def roles(self) -> list:
            return []

    with pytest.raises(ArgumentsError, match=r"Half.* is no method yet: it does not say its flow \(docs/methods.md\)"):
        methods.register_method(Half)


def test_the_toolkits_methods_keep_the_contract() -> None:
    for name, method in methods.known_methods().items():
        assert methods.register_method(method) is method
        assert (method.name, method.summary[-1] == ".") == (name, False)
        assert methods.arguments_of(method).TITLE


def test_two_methods_of_one_name_are_refused() -> None:
    def made(text: str) -> type:
        namespace: dict = {"__name__": text}
        exec("class M:\n    name = title = summary = 'twin'; run = print; Keys = None; base = 'online'", namespace)
        return namespace["M"]

    methods.register_method(made("one"))
    methods.register_method(made("one"))
    with pytest.raises(ArgumentsError, match="registered twice: by M in one and by M in two"):
        methods.register_method(made("two"))


def test_methods_are_found_without_paddle(repo: Path) -> None:
    code = (
        "import sys\n"
        "from alignment import methods\n"
        "from alignment.methods.start import list_command\n"
        "methods.known_methods()\n"
        "assert not {'paddle', 'paddlenlp'} & set(sys.modules), 'a method loads Paddle when it is imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


LOSSES = """
from alignment.losses.policy import POLICY_LOSSES

@POLICY_LOSSES.register("my_loss")
def my_loss(inputs):
    ...
"""


def test_a_registry_may_be_the_choices_of_a_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names that plug-ins register are values too: they are imported before the arguments are read."""
    from alignment.losses.policy import POLICY_LOSSES

    monkeypatch.setattr(POLICY_LOSSES, "_things", dict(POLICY_LOSSES._things))
    Path("conf/losses.py").write_text(LOSSES)
    text = MINE.replace(
        "    bold: bool", '    policy_loss: str = argument("ppo", "The loss.", choices=POLICY_LOSSES)\n    bold: bool'
    ).replace("pace={args.pace}", "loss={args.policy_loss}")
    Path("conf/mine.py").write_text("from alignment.losses.policy import POLICY_LOSSES\n" + text)
    status, out, err = run(
        capsys, "run", "mine", "conf/mine.json", "plugins=conf/mine.py,conf/losses.py", "policy_loss=my_loss"
    )
    assert status == 0 and "mine loss=my_loss" in out, err
    status, _, err = run(capsys, "run", "mine", "conf/mine.json", "policy_loss=my_los")
    assert status == 2 and "policy_loss: 'my_los' is not one of 'ppo', " in err and "did you mean 'my_loss'?" in err


# ---- paddlenlp's rl_algorithm --------


def test_rl_algorithm_chooses_the_method(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(methods, "find_method", lambda name: chosen.append(name) or name)
    monkeypatch.setattr(start, "run_method", lambda method, argv: chosen.append(argv[-1]) or 7)
    Path("ppo.json").write_text(json.dumps({**GIVEN, "rl_algorithm": "reinforce_plus_plus"}))
    assert cli.main(["ppo", "ppo.json"]) == 7
    assert cli.main(["ppo", "ppo.json", "rl_algorithm=grpo"]) == 7
    assert chosen == ["reinforce", "ppo.json", "grpo", "rl_algorithm=grpo"]
    assert start.chosen_method(["ppo.json", "rl_algorithm=ppo"]) is None
    words = ["ppo.json", "--stop_strings", "a", "b", "--adaptive_kl", "--rl_algorithm", "ppo"]
    assert start.chosen_method(words) is None, "keys of a method may have forms that are not known before it is"


def test_rl_algorithm_must_be_the_method_that_was_started(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "run", "mine", "conf/mine.json", "rl_algorithm=grpo")
    assert status == 2 and "rl_algorithm is grpo, but this is Mine: start it with `alignment grpo`" in err
    status, _, err = run(capsys, "run", "mine", "conf/mine.json", "rl_algorithm=ppo")
    assert status == 2 and err.rstrip().endswith("but this is Mine: start it with `alignment ppo`")


def test_a_file_of_paddlenlps_script_may_have_the_critics_keys(capsys: pytest.CaptureFixture[str]) -> None:
    """paddlenlp has one set of keys for its algorithms with a critic and without."""
    keys = {"critic_learning_rate": 1e-5, "clip_range_value": 3.0}
    made = from_dict(
        methods.arguments_of(methods.find_method("reinforce")), {**GIVEN, **keys, "rl_algorithm": "reinforce_plus_plus"}
    )
    assert "clip_range_value, critic_learning_rate: there is no critic" in made.unused_lines()
    assert made.kl_coeff == 0.02, "paddlenlp's"
