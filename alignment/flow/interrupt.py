"""Ctrl-C and SIGTERM: finish the step, save, say how to go on, exit with 130.

with Interrupt() as interrupt:
    for step in ...:
        if world.any(interrupt.requested): save(); return 130
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from types import FrameType, TracebackType

EXIT_INTERRUPTED = 130
RESUME_WORD = "resume_from_checkpoint"
OVERWRITE_WORD = "overwrite_output_dir"
_LAUNCHER = ("paddle.distributed.launch", "paddle/distributed/launch", "paddle/distributed/launch/__main__.py")


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
            _tell(f"{name}: finishing this step, then saving (a second signal stops at once, unsaved)")
        elif now - self._when > 1.0:
            raise KeyboardInterrupt


def resume_command(argv: list[str] | None = None, *, world_size: int = 1, overwrites: bool = False) -> str:
    """The shell command that continues this run from its latest checkpoint; with several hosts, the one to give on
    each of them.

    Args:
        argv: the stage's arguments (JSON file and overrides); by default those of ``sys.argv``.
        world_size: number of processes, for the launcher's part of the line.
        overwrites: whether this run was to start afresh (overwrite_output_dir), which a resumed one must not.
    """
    arguments = [a for a in (sys.argv[1:] if argv is None else argv)]
    kept, former, changed = [], "", [f"{RESUME_WORD}=true"]
    for argument in arguments:
        name, given, _ = argument.removeprefix("--").partition("=")
        # Is it the value of the key before it? A bare --overwrite_output_dir has none.
        is_value = former == RESUME_WORD or (former and not given and not argument.startswith("--"))
        former = name if name in (RESUME_WORD, OVERWRITE_WORD) and argument == f"--{name}" and not is_value else ""
        if is_value:
            continue
        if name == OVERWRITE_WORD:
            overwrites = False
        elif name != RESUME_WORD:
            kept.append(argument)
    if overwrites:  # the argument file says so
        changed.append(f"{OVERWRITE_WORD}=false")
    script = sys.argv[0]
    python = os.path.basename(sys.executable) or "python"
    comment = ""
    if world_size > 1:
        words = _launcher_words(script) or _launch_options(world_size)
        start = [python, "-m", "paddle.distributed.launch", *words, script]
        if _hosts(world_size) > 1:
            own = [name for name in ("--host", "--rank") if name in {word.split("=")[0] for word in words}]
            comment = "  # on every host" + (f", each with its own {' and '.join(own)}" if own else "")
    elif script.endswith("__main__.py"):
        start = [python, "-m", os.path.basename(os.path.dirname(script))]
    else:
        start = [script] if not script.endswith(".py") else [python, script]
    if argv is not None and sys.argv[1:] != argv:
        # Called through `alignment STAGE ...`: the words before the stage's own arguments belong to the command.
        head = sys.argv[1 : len(sys.argv) - len(argv)] if sys.argv[1:][-len(argv) :] == argv else []
        start += head
    return shlex.join([*start, *kept, *changed]) + comment


def _launcher_words(script: str) -> list[str]:
    """The options that this host's launcher was started with; empty where its command line cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode().rstrip("\0").split("\0")
        module = next((i for i, word in enumerate(words) if word.endswith(_LAUNCHER)), None)
        if module is not None:
            return words[module + 1 : words.index(script, module)]
    return []


def _launch_options(processes: int) -> list[str]:
    """The same as the launcher tells its processes."""
    local = os.environ.get("PADDLE_LOCAL_SIZE") or str(processes)
    if _hosts(processes) == 1:
        return ["--nproc_per_node", local]
    master = os.environ.get("PADDLE_MASTER") or "HOST:PORT"
    return ["--nnodes", str(_hosts(processes)), "--nproc_per_node", local, "--master", master]


def _hosts(processes: int) -> int:
    nodes, local = os.environ.get("PADDLE_NNODES", ""), os.environ.get("PADDLE_LOCAL_SIZE", "")
    if nodes.isdigit():
        return max(1, int(nodes))
    return max(1, processes // max(1, int(local))) if local.isdigit() else 1


def _tell(text: str) -> None:
    """Print a line past Python's streams and logging: a signal may come while they are in the middle of a line, and
    then refuse to be entered again.
    """
    rank = os.environ.get("PADDLE_TRAINER_ID", "0") or "0"
    with contextlib.suppress(OSError):
        os.write(2, f"{f'[rank {rank}] ' if rank != '0' else ''}{text}\n".encode())
