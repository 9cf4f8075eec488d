"""A program of several ranks for the launcher's tests. It works in short steps and saves when it is interrupted.

It does everything but load Paddle, which would take most of the time: the ranks find each other through a file.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from alignment.cli import run_main
from alignment.flow.interrupt import EXIT_INTERRUPTED, Interrupt
from alignment.parallel import ControlChannel, Topology, World
from alignment.parallel.monitor import Monitor


def join(folder: Path) -> World:
    """Meet the other ranks through ``folder/port``."""
    rank, size = int(os.environ["PADDLE_TRAINER_ID"]), int(os.environ["PADDLE_TRAINERS_NUM"])
    port = folder / "port"
    if rank == 0:
        channel = ControlChannel(0, size, "127.0.0.1", "token")
        (folder / "port.new").write_text(str(channel.port))
        os.replace(folder / "port.new", port)
    else:
        while not port.exists():
            time.sleep(0.02)
        channel = ControlChannel(rank, size, "127.0.0.1", "token", int(port.read_text()))
    return World(Topology(size, rank), rank, channel)


def main(argv: list[str]) -> int:
    """Work for ever in ``argv[0]``; with a second word ``busy`` never come to the end of the first step."""
    folder = Path(argv[0])
    world = join(folder)
    with world.guard(), Monitor(world, folder / "heartbeat", interval=0.5, orphan_grace=2.0), Interrupt() as interrupt:
        (folder / f"pid-{world.rank}").write_text(str(os.getpid()))
        while not world.any(interrupt.requested):
            world.phase("train", 1)
            time.sleep(0.05)
            while argv[1:] == ["busy"]:
                sum(range(1000))
        (folder / f"saved-{world.rank}").write_text("")
    world.close()
    return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(run_main(main))
