"""P10: a reward that does not come back is said, and ends the run at its limit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from alignment.errors import RewardError
from alignment.rollout.rewards import RewardBatch, RewardSource, WeightedRewards
from alignment.rollout.rewards.patience import patience

BATCH = RewardBatch(["q"], ["a"], [{}])


class Judge(RewardSource):
    NAME = "judge"

    def __init__(self, wait) -> None:
        self.wait = wait

    def score(self, batch: RewardBatch) -> list[float]:
        self.wait()
        return [1.0] * len(batch)


def stubborn() -> None:
    """As users' code that tries again whatever happens."""
    while True:
        with contextlib.suppress(Exception):
            time.sleep(60)


@pytest.mark.parametrize("wait", [stubborn, lambda: threading.Event().wait(60)])
def test_the_limit_ends_a_reward_that_hangs(wait) -> None:
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"reward 'judge' has not come back within reward_timeout, 0\.2 s"):
        WeightedRewards([("judge", 1.0, Judge(wait))], timeout=0.2).score(BATCH)
    assert time.monotonic() - began < 10


def test_a_reward_in_time_is_left_alone_and_may_use_signals_itself() -> None:
    def alarm() -> None:
        before = signal.signal(signal.SIGALRM, signal.SIG_IGN)  # raises outside the main thread
        signal.signal(signal.SIGALRM, before)

    before = signal.getsignal(signal.SIGUSR2)
    assert WeightedRewards([("judge", 1.0, Judge(alarm))], timeout=30).score(BATCH).total.tolist() == [1.0]
    assert signal.getsignal(signal.SIGUSR2) == before


def test_a_wait_is_said_again_and_again(capsys: pytest.CaptureFixture[str]) -> None:
    with patience("judge", notice=0.1):
        time.sleep(0.35)
    said = capsys.readouterr().err
    assert said.count("waiting for reward 'judge' for") >= 2


def test_a_reward_that_no_signal_wakes_ends_the_process() -> None:
    code = (
        "import threading, time\n"
        "from alignment.rollout.rewards.patience import patience\n"
        "def wait():\n"
        "    while True:\n"
        "        try: time.sleep(60)\n"
        "        except BaseException: pass\n"
        "with patience('judge', 0.2, grace=0.3): wait()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "reward 'judge' has not come back within 0.2 s and cannot be woken" in result.stderr


def test_a_second_signal_ends_a_run_inside_a_reward() -> None:
    """P10: one SIGTERM is a wish to end after the step; the second does not wait for the judge."""
    from alignment.flow.interrupt import Interrupt

    def judge() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        interrupt._when -= 2.0  # as if that had been two seconds ago
        os.kill(os.getpid(), signal.SIGTERM)
        stubborn()

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        WeightedRewards([("judge", 1.0, Judge(judge))]).score(BATCH)
    assert time.monotonic() - began < 10
