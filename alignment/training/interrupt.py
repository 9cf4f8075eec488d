"""Ctrl-C and SIGTERM: finish the step, save, say how to go on, exit with 130.

with Interrupt() as interrupt:
    for step in ...:
        if world.any(interrupt.requested): save(); return 130
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from types import FrameType, TracebackType

from alignment.log import get_logger

EXIT_INTERRUPTED = 130
RESUME_WORD = "resume_from_checkpoint"


class Interrupt:
    """Turns SIGINT and SIGTERM into a flag for as long as it is entered; the former handlers come back afterwards.

    A second signal of either sort, at least a second after the first, stops at once (``KeyboardInterrupt``), wherever
    the run waits. The second counts because launchers repeat a SIGTERM within some tenths of it.

    Attributes:
        requested: whether a signal has come.
    """

    def __init__(self) -> None:
        self.requested = False
        self._when = 0.0
        self._former: dict[int, object] = {}

    def __enter__(self) -> Interrupt:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._handle)
        except ValueError:
            # Signals belong to the main thread; elsewhere (a notebook's worker) the caller's own handling stays.
            self._former.clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, former in self._former.items():
            signal.signal(number, former if former is not None else signal.SIG_DFL)  # type: ignore[arg-type]
        self._former.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._when = True, now
            name = signal.Signals(number).name
            get_logger().warning("%s: finishing this step, then saving (a second signal stops at once, unsaved)", name)
        elif now - self._when > 1.0:
            raise KeyboardInterrupt


def resume_command(argv: list[str] | None = None, *, world_size: int = 1) -> str:
    """The shell command that continues this run from its latest checkpoint.

    Args:
        argv: the stage's arguments (JSON file and overrides); by default those of ``sys.argv``.
        world_size: number of processes, for the launcher's part of the line.
    """
    arguments = [a for a in (sys.argv[1:] if argv is None else argv)]
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--" + RESUME_WORD:
            skip = True
        elif argument.removeprefix("--").split("=", 1)[0] != RESUME_WORD:
            kept.append(argument)
    script = sys.argv[0]
    python = os.path.basename(sys.executable) or "python"
    if world_size > 1:
        start = [python, "-m", "paddle.distributed.launch", "--nproc_per_node", str(world_size), script]
    elif script.endswith("__main__.py"):
        start = [python, "-m", os.path.basename(os.path.dirname(script))]
    else:
        start = [script] if not script.endswith(".py") else [python, script]
    if argv is not None and sys.argv[1:] != argv:
        # Called through `alignment STAGE ...`: the words before the stage's own arguments belong to the command.
        head = sys.argv[1 : len(sys.argv) - len(argv)] if sys.argv[1:][-len(argv) :] == argv else []
        start += head
    return shlex.join([*start, *kept, f"{RESUME_WORD}=true"])
