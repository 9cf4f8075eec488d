"""One process of a run that is to be killed: it runs the ordinary command, and a thread beside it pulls the trigger
at the moment that was drawn.

The thread looks up where the main thread stands in :class:`~alignment.flow.loop.Loop`, so a kill hits the phase that it
was meant for, at any instruction inside.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

# What each function of the loop, of its flow and of its method is called here; the innermost one on the stack counts.
PHASES = {
    ("online.py", "generate"): "rollout",
    ("flow.py", "_infer"): "scoring",
    ("loop.py", "_update"): "update",
    ("loop.py", "save_checkpoint"): "saving",
    ("loop.py", "_evaluate"): "evaluation",
    ("loop.py", "_finish"): "finish",
}
KILLS_FILE = "kills.jsonl"
_LOOK = 0.0005


@dataclass(frozen=True)
class Shot:
    """A kill that is planned.

    Attributes:
        phase: one of the values of :data:`PHASES`.
        entry: in the how-manieth time that the process gets into the phase.
        delay: seconds after that; halved each time that the phase was over before.
        rank: whose thread shoots.
        everyone: whether all processes die, or that rank alone.
    """

    phase: str
    entry: int
    delay: float
    rank: int
    everyone: bool


def run(method: str, words: list[str], output: str, shot: Shot | None) -> int:
    """The command ``alignment METHOD WORDS``; returns its exit status, if it lives to see it."""
    import paddle

    from tests.parallel.layouts import started

    paddle.set_device("cpu")
    if shot is not None and int(os.environ["PADDLE_TRAINER_ID"]) == shot.rank:
        main_thread = threading.get_ident()
        threading.Thread(target=_shoot, args=(main_thread, Path(output), shot), daemon=True).start()
    code = started(method, words)
    assert code == 0, code
    return code


def phase_of(thread: int) -> tuple[str, str]:
    """The phase that a thread of this process is in, and the line it stands at; two empty strings outside of all."""
    frame = sys._current_frames().get(thread)
    line = f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else ""
    while frame is not None:
        code = frame.f_code
        phase = PHASES.get((os.path.basename(code.co_filename), code.co_name))
        if phase is not None:
            return phase, line
        frame = frame.f_back
    return "", ""


def _shoot(thread: int, output: Path, shot: Shot) -> None:
    entries, inside, delay = 0, False, shot.delay
    while True:
        now = phase_of(thread)[0] == shot.phase
        entries, inside = entries + (now and not inside), now
        if entries >= shot.entry and inside:
            time.sleep(delay)
            delay /= 2
            phase, line = phase_of(thread)
            if phase == shot.phase and (phase != "saving" or _half_written(output)):
                _kill(output, shot, line)
        time.sleep(_LOOK)


def _half_written(output: Path) -> bool:
    return any(output.glob(".writing-checkpoint-*"))


def _kill(output: Path, shot: Shot, line: str) -> None:
    half_written = [path.name for path in output.glob(".writing-checkpoint-*")]
    with open(output.parent / KILLS_FILE, "a", encoding="utf-8") as file:
        record = {**asdict(shot), "line": line, "half_written": half_written, "time": time.time()}
        file.write(json.dumps(record) + "\n")
    if shot.everyone:
        for beat in (output / "heartbeat").glob("rank-*.json"):
            pid = json.loads(beat.read_text())["pid"]
            if pid != os.getpid():
                os.kill(pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
