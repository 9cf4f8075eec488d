"""The command line: finding the task, printing errors, and leaving."""

from __future__ import annotations

import errno
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignment import __version__, cli
from alignment.errors import AlignmentError, ArgumentsError


def run(repo: Path, *command: str, cwd: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PADDLE_") and k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd or repo,
        env={**clean, **environ},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )


# ---- tasks --------


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_task(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 0
    text = capsys.readouterr().out
    for name, task in cli.TASKS.items():
        assert f"  {name} " in text
        assert task.summary in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"alignment {__version__}\n"


def test_as_a_module(repo: Path) -> None:
    done = run(repo, "-m", "alignment", "--version")
    assert (done.returncode, done.stdout) == (0, f"alignment {__version__}\n")


def test_unknown_task_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generte"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: unknown task 'generte'; did you mean 'generate'?\n")
    assert "demo, sft, rm, cost, ppo, methods, run, generate, score, merge_lora" in said


@pytest.mark.parametrize("name", cli.TASKS)
def test_every_task_exists(name: str) -> None:
    module, _, function = cli.TASKS[name].target.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("name", ["merge_lora", "merge-lora"])
def test_merge_lora_says_what_it_needs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--lora_path", "somewhere"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the following arguments are required: --output_path\nusage: alignment merge_lora")


def test_merge_lora_of_a_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "nothing"
    assert cli.main(["merge_lora", "--lora_path", str(missing), "--output_path", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert str(missing) in said
    assert "Traceback" not in said


def test_the_launchers_script_takes_every_task(repo: Path) -> None:
    """A method without a script of its own starts on several processes, too."""
    done = run(repo, "__main__.py", "run", "nobody", cwd=repo / "alignment")
    assert done.returncode == 2 and "unknown method 'nobody'" in done.stderr, done.stderr


@pytest.mark.parametrize("script", ["sft/run_sft.py", "rm/run_reward.py", "ppo/run_ppo.py"])
def test_scripts_start_from_their_own_folder(repo: Path, script: str) -> None:
    folder, name = (repo / "alignment" / script).parent, Path(script).name
    done = run(repo, name, "there_is_no_such_file.json", cwd=folder)
    assert done.returncode == 2, done.stderr
    assert "there_is_no_such_file.json" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("task", ["sft", "rm", "ppo"])
def test_tasks_report_a_missing_file(repo: Path, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([task, "there_is_no_such_file.json"]) == 2
    said = capsys.readouterr().err
    assert "there_is_no_such_file.json" in said


# ---- run_main --------


def raising(error: BaseException):
    def main(argv: list[str]) -> int:
        raise error

    return main


def test_status_and_arguments_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def main(argv: list[str]) -> int:
        seen.append(argv)
        return 7

    assert cli.run_main(main, ["a", "b=1"]) == 7
    monkeypatch.setattr(sys, "argv", ["run_ppo.py", "c"])
    assert cli.run_main(main) == 7
    assert seen == [["a", "b=1"], ["c"]]
    assert cli.run_main(lambda argv: None, []) == 0


def test_an_error_for_the_user_is_its_message_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_main(raising(ArgumentsError("config.json: unknown key 'lr'\nuse learning_rate")), []) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: config.json: unknown key 'lr'\nuse learning_rate\n")


def test_a_file_that_may_not_be_read_is_no_bug(capsys: pytest.CaptureFixture[str]) -> None:
    """Weights, tokenizers and folders that belong to somebody else ended in tracebacks."""
    error = PermissionError(errno.EACCES, "Permission denied", "/m/model.safetensors")
    assert cli.run_main(raising(error), []) == 2
    assert capsys.readouterr().err.startswith("error: /m/model.safetensors: permission denied; give this user")
    with pytest.raises(PermissionError):
        cli.run_main(raising(PermissionError(errno.EPERM, "of no file")), [])


def test_output_that_nobody_reads_any_more(repo: Path) -> None:
    """`alignment ... | head` ended in a traceback."""
    many = "lambda argv: [print('line') for _ in range(99999)]"
    code = f"import sys; from alignment import cli; sys.exit(cli.run_main({many}, []))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=repo, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "line\n"
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 141)


def test_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_main(raising(KeyboardInterrupt()), []) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(("code", "status", "said"), [(None, 0, ""), (3, 3, ""), ("no", 1, "no\n"), (True, 1, "")])
def test_system_exit(code: object, status: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_main(raising(SystemExit(code)), []) == status
    assert capsys.readouterr().err == said


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        cli.run_main(lambda argv: 1 // 0, [])


@pytest.mark.parametrize(("package", "name"), [("paddle", "PaddlePaddle"), ("paddlenlp", "PaddleNLP")])
def test_missing_paddle_is_explained(
    package: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # what Python itself does for a module that must not be found
    (tmp_path / f"needs_{package}.py").write_text(f"import {package}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cli.run_main(lambda argv: cli.load_task(f"needs_{package}:main")(argv), []) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {name} is not installed in this environment")
    assert "pip install" in said


def test_another_missing_module_stays_a_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_other.py").write_text("import there_is_no_such_module\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="there_is_no_such_module"):
        cli.load_task("needs_other:main")


SEVERAL = """
import atexit, sys, threading
from alignment.cli import run_main
from alignment.errors import AlignmentError
atexit.register(print, "exit handlers ran")
def main(argv):
    print("work", end="")
    if argv[0] == "user":
        raise AlignmentError("row 3 is empty")
    if argv[0] == "bug":
        1 // 0
    return int(argv[0])
sys.exit(run_main(main))
"""


@pytest.mark.parametrize(
    ("argument", "status", "said"),
    [("0", 0, ""), ("130", 130, ""), ("user", 2, "[rank 1] error: row 3 is empty\n"), ("bug", 1, "ZeroDivisionError")],
)
def test_a_process_of_several_leaves_at_once(repo: Path, argument: str, status: int, said: str) -> None:
    done = run(repo, "-c", SEVERAL, argument, PADDLE_TRAINERS_NUM="2", PADDLE_TRAINER_ID="1", PYTHONPATH=str(repo))
    assert done.returncode == status
    assert done.stdout == "work"  # flushed, and no exit handler ran
    assert said in done.stderr
    assert ("Traceback" in done.stderr) == (argument == "bug")


def test_one_process_leaves_in_the_usual_way(repo: Path) -> None:
    done = run(repo, "-c", SEVERAL, "user", PYTHONPATH=str(repo))
    assert (done.returncode, done.stdout) == (2, "workexit handlers ran\n")
    assert done.stderr == "error: row 3 is empty\n"


def test_errors_of_the_package_are_alignment_errors() -> None:
    assert issubclass(ArgumentsError, AlignmentError)
