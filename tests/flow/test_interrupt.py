"""Signals become a flag; the line that says how to go on."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignment.flow.interrupt import Interrupt, resume_command

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_sets_the_flag_and_the_old_handler_comes_back(number: int) -> None:
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        assert not interrupt.requested
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert interrupt.requested
        os.kill(os.getpid(), number)  # the launcher repeats its signal: nothing more happens
        time.sleep(0.01)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_of_any_sort_stops_at_once(first: int, second: int) -> None:
    """P10: also where the run waits for something that does not come."""
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        os.kill(os.getpid(), first)
        time.sleep(0.01)
        interrupt._when -= 2.0  # as if it had come two seconds ago
        os.kill(os.getpid(), second)
        time.sleep(60)


def test_a_signal_may_come_in_the_middle_of_a_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """C9: the handler touches no stream of Python's; the line is on the terminal at once all the same."""

    class Busy(io.TextIOBase):
        def write(self, text: str) -> int:
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    monkeypatch.setattr(sys, "stderr", Busy())
    monkeypatch.setenv("PADDLE_TRAINER_ID", "3")
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert interrupt.requested
    assert capfd.readouterr().err.startswith("[rank 3] SIGTERM: finishing this step, then saving")


@pytest.mark.parametrize(
    ("environment", "options", "comment"),
    [
        ({}, "--nproc_per_node 4", ""),
        ({"PADDLE_NNODES": "1", "PADDLE_LOCAL_SIZE": "4"}, "--nproc_per_node 4", ""),
        (
            {"PADDLE_NNODES": "2", "PADDLE_LOCAL_SIZE": "2", "PADDLE_MASTER": "10.0.0.1:6000"},
            "--nnodes 2 --nproc_per_node 2 --master 10.0.0.1:6000",
            "  # on every host",
        ),
        ({"PADDLE_LOCAL_SIZE": "2"}, "--nnodes 2 --nproc_per_node 2 --master HOST:PORT", "  # on every host"),
    ],
)
def test_resume_command_of_several_hosts(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], options: str, comment: str
) -> None:
    """A14: each host starts its own processes, not those of all."""
    monkeypatch.setattr(sys, "argv", ["run_sft.py", "a.json"])
    for name in ("PADDLE_NNODES", "PADDLE_LOCAL_SIZE", "PADDLE_MASTER"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert resume_command(["a.json"], world_size=4) == (
        f"{os.path.basename(sys.executable)} -m paddle.distributed.launch {options} run_sft.py a.json "
        f"resume_from_checkpoint=true{comment}"
    )


LAUNCHER = """import os, subprocess, sys
script = sys.argv[-2]
sys.exit(subprocess.run([sys.executable, script, sys.argv[-1]], env={**os.environ, "PADDLE_NNODES": "2"}).returncode)
"""
RANK = """import sys
from alignment.flow.interrupt import resume_command
print(resume_command(sys.argv[1:], world_size=4))
"""


def test_resume_command_repeats_the_launchers_own_words(tmp_path: Path) -> None:
    """A14: with --master, --devices and what else was given on this host."""
    package = tmp_path / "paddle" / "distributed" / "launch"
    package.mkdir(parents=True)
    (package / "__main__.py").write_text(LAUNCHER)
    (tmp_path / "run_it.py").write_text(RANK)
    words = ["--nnodes", "2", "--master", "a host:6000", "--host", "b", "--rank=1", "--devices", "0,3"]
    done = subprocess.run(
        [sys.executable, str(package / "__main__.py"), *words, "run_it.py", "a.json"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == (
        f"{os.path.basename(sys.executable)} -m paddle.distributed.launch --nnodes 2 --master 'a host:6000' --host b "
        "--rank=1 --devices 0,3 run_it.py a.json resume_from_checkpoint=true  # on every host, each with its own "
        "--host and --rank"
    )


@pytest.mark.parametrize(
    ("argv", "stage_argv", "world_size", "expected"),
    [
        (["run_sft.py", "a.json", "seed=1"], None, 1, "{python} run_sft.py a.json seed=1 resume_from_checkpoint=true"),
        (
            ["run_sft.py", "a.json", "resume_from_checkpoint=x"],
            None,
            1,
            "{python} run_sft.py a.json resume_from_checkpoint=true",
        ),
        (
            ["run_sft.py", "a.json", "--resume_from_checkpoint", "x", "--seed", "1"],
            None,
            1,
            "{python} run_sft.py a.json --seed 1 resume_from_checkpoint=true",
        ),
        (
            ["/x/alignment/__main__.py", "sft", "my file.json"],
            ["my file.json"],
            1,
            "{python} -m alignment sft 'my file.json' resume_from_checkpoint=true",
        ),
        (["/bin/alignment", "rm", "a.json"], ["a.json"], 1, "/bin/alignment rm a.json resume_from_checkpoint=true"),
        (
            ["run_sft.py", "a.json"],
            ["a.json"],
            2,
            "{python} -m paddle.distributed.launch --nproc_per_node 2 run_sft.py a.json resume_from_checkpoint=true",
        ),
    ],
)
def test_resume_command(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], stage_argv: list[str] | None, world_size: int, expected: str
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    python = os.path.basename(sys.executable)
    assert resume_command(stage_argv, world_size=world_size) == expected.format(python=python)


@pytest.mark.parametrize(
    ("argv", "overwrites", "expected"),
    [
        (["a.json", "overwrite_output_dir=true", "seed=1"], True, "a.json seed=1 resume_from_checkpoint=true"),
        (["a.json", "--overwrite_output_dir", "--seed", "1"], True, "a.json --seed 1 resume_from_checkpoint=true"),
        (["a.json", "--overwrite_output_dir", "true", "seed=1"], True, "a.json seed=1 resume_from_checkpoint=true"),
        (["a.json", "--overwrite_output_dir", "seed=1"], True, "a.json seed=1 resume_from_checkpoint=true"),
        (["a.json"], True, "a.json resume_from_checkpoint=true overwrite_output_dir=false"),
    ],
)
def test_the_resume_command_of_a_run_that_overwrote_is_not_refused(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], overwrites: bool, expected: str
) -> None:
    """The two keys exclude each other, so the printed command must not carry both."""
    monkeypatch.setattr(sys, "argv", ["run_sft.py", *argv])
    assert resume_command(argv, overwrites=overwrites).endswith(f"run_sft.py {expected}")
