"""Signals become a flag; the line that says how to go on."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from alignment.training.interrupt import Interrupt, resume_command


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
