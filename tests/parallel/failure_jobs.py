"""Jobs that forked ranks run to test what happens when one of them fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignment.errors import DataError
from alignment.parallel import RankFailure, World, init_world
from alignment.parallel.monitor import Monitor


def watched(
    body: str,
    folder: str,
    *words: Any,
    hang_timeout: float = 60.0,
    backend: bool = True,
    shared: bool = True,
) -> dict[str, Any]:
    """Join the run, enter a monitor and call the function named ``body`` with the world and ``words``.

    Args:
        body: a function of this module.
        folder: of the test: heartbeats go to ``heartbeat/`` in it, the time of a process's end to ``ended-R``.
        hang_timeout: of the monitor.
        backend: use the CPU backend; without it gloo's own collectives, and ranks may find each other 3 s later.
        shared: whether the ranks see each other's heartbeats.

    Returns:
        ``{"message": the RankFailure's text or None, "time": when it came}``; a process that the monitor ends returns
        nothing.
    """
    import paddle

    from alignment.parallel import cpu_backend

    paddle.set_device("cpu")
    if backend:
        cpu_backend.apply()
    world = init_world()
    beats = Path(folder) / ("heartbeat" if shared else f"heartbeat-{world.rank}")
    rank = world.rank

    def end(status: int) -> None:
        Path(folder, f"ended-{rank}").write_text(f"{time.time()} {status}")
        os._exit(status)

    try:
        with world.guard(), Monitor(world, beats, hang_timeout=hang_timeout, interval=0.2, end=end):
            globals()[body](world, Path(folder), *words)
    except RankFailure as failure:
        return {"message": str(failure), "time": time.time()}
    world.close()
    return {"message": None, "time": time.time()}


def wait_somewhere(world: World, how: str) -> None:
    """Wait for the other ranks, or be busy, as ``how`` says."""
    if how == "exchange":
        world.sum(1)
    elif how == "collective":
        import paddle
        import paddle.distributed as dist

        dist.all_reduce(paddle.ones([4]))
    elif how == "compute":
        while True:
            sum(range(1000))
    raise AssertionError(f"{how} came to an end")


def die(world: World, folder: Path, how: str) -> None:
    """Rank 1 is killed in its seventh update; the others wait as ``how`` says."""
    world.phase("update", 7)
    if world.rank == 1:
        in_update(lambda: time.sleep(0.8))
        (folder / "began").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    wait_somewhere(world, how)


def in_update(action: Callable[[], None]) -> None:
    """A frame with a name."""
    action()


def hang(world: World, folder: Path, how: str, kind: str = "sleep") -> None:
    """Rank 1 stays in ``generate`` for ever; the others wait as ``how`` says."""
    world.phase("generate", 3)
    (folder / "began").write_text(str(time.time()))
    if world.rank != 1:
        wait_somewhere(world, how)
    if kind == "stop":
        # A stopped process cannot end itself: somebody must clear it away after the test.
        time.sleep(0.5)
        pid = os.getpid()
        subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(4.5); os.kill({pid}, 9)"])
        os.kill(pid, signal.SIGSTOP)
    time.sleep(60)


def stand_still(world: World, folder: Path) -> None:
    """No rank waits for another, and none does anything."""
    world.phase("update", 1)
    (folder / "began").write_text(str(time.time()))
    time.sleep(60)


def be_slow(world: World, folder: Path) -> None:
    """Rank 1 keeps the others waiting, but it works: at the data without a change of place, then in short steps."""
    for phase in ("data", "train"):
        world.phase(phase, 0)
        until = time.monotonic() + 2.2
        while world.rank == 1 and time.monotonic() < until:
            if phase == "train":
                world.phase(phase, 0)
            in_update(lambda: time.sleep(0.05))
        assert world.sum(1) == world.size


def save(world: World, folder: Path, how: str) -> None:
    """Rank 0 writes a checkpoint for twice ``hang_timeout`` without a change of place; or hangs while it does."""
    world.phase("save", 4)
    (folder / "began").write_text(str(time.time()))
    if world.is_main and how == "hangs":
        time.sleep(60)
    if world.is_main:
        with open(folder / "weights", "wb", buffering=0) as file:
            in_update(lambda: [(file.write(b"half"), time.sleep(0.1)) for _ in range(25)])
    world.barrier()


def one_computes_while_others_are_blocked(world: World, folder: Path) -> None:
    """Rank 1 is busy for ever; the others wait where no frame tells that they do, as in a read from a GPU."""
    world.phase("update", 5)
    (folder / "began").write_text(str(time.time()))
    if world.rank != 1:
        in_update(lambda: time.sleep(60))
    while True:
        time.sleep(0.02)
        sum(range(10000))
        in_update(lambda: time.sleep(0.02))


def raise_error(world: World, folder: Path, how: str) -> None:
    """Rank 1 fails with an error of its own."""
    world.phase("data")
    if world.rank == 1:
        time.sleep(0.5)
        (folder / "began").write_text(str(time.time()))
        raise DataError("shard 7 has no rows")
    wait_somewhere(world, how)


def lose_step(world: World, folder: Path) -> None:
    """The ranks come to different places of the program."""
    world.phase("train", 2)
    if world.rank == 1:
        world.phase("evaluate")
    time.sleep(0.5)  # a phase that has just begun may not be in the heartbeat yet
    if world.rank == 1:
        world.barrier()
    world.sum(1)


def die_while_another_saves(world: World, folder: Path) -> None:
    """Rank 1 is killed while rank 0 writes its second checkpoint."""
    from alignment.flow.checkpoint import CheckpointStore

    store = CheckpointStore(folder / "run")
    if world.is_main:
        with store.writing(1) as target:
            (target / "weights").write_text("whole")
    world.phase("save", 2)
    if world.rank == 1:
        time.sleep(0.5)
        (folder / "began").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    with store.writing(2) as target:
        for _ in range(1000):
            with open(target / "weights", "a") as file:
                file.write("half")
            time.sleep(0.01)


def work(world: World, folder: Path) -> None:
    """All goes well; rank 0 takes longer at the end."""
    for step in range(3):
        world.phase("train", step)
        assert world.sum(step) == world.size * step
    if world.is_main:
        world.phase("save", 3)
        time.sleep(0.5)


HANGING_REWARD = """import os
import time


def wait_for_a_service(prompts, responses, **row):
    if os.environ["PADDLE_TRAINER_ID"] == "1":
        time.sleep(60)
    return [float(len(response)) for response in responses]
"""


def ppo_with_a_reward_that_hangs(folder: str) -> None:
    """A whole PPO run whose reward function never returns on rank 1."""
    import paddle

    from alignment.ppo.run_ppo import main
    from tests.flow.disk_jobs import write_arguments

    paddle.set_device("cpu")
    ready, reward = Path(folder, "ready"), Path(folder, "hanging_reward.py")
    if os.environ["PADDLE_TRAINER_ID"] == "0":
        write_arguments("ppo", Path(folder))
        reward.write_text(HANGING_REWARD)
        ready.write_text("")
    while not ready.exists():
        time.sleep(0.05)
    main([str(Path(folder, "ppo.json")), f"reward={reward}:wait_for_a_service", "hang_timeout=3"])
