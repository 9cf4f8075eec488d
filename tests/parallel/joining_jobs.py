"""Jobs of forked ranks that do not all come into the run."""

from __future__ import annotations

import os
import socket
import time


def come_or_not(how: str, join_timeout: float) -> str:
    """Join the run; rank 1 does what ``how`` says.

    Args:
        how: ``"stays away"``, ``"is silent"`` (answers the roll, but goes no further), ``"fails"`` while it joins, or
            ``"comes"``.
        join_timeout: of the run.
    """
    import paddle

    from alignment.parallel import init_world
    from alignment.parallel.cpu_backend import mailbox
    from alignment.parallel.joining import Joining

    paddle.set_device("cpu")
    if os.environ["PADDLE_TRAINER_ID"] == "1":
        if how == "stays away":
            time.sleep(join_timeout + 6)
            return "never came"
        if how == "is silent":
            with Joining(1, 3, join_timeout):
                time.sleep(60)
        if how == "fails":

            def refuse(*address: object, **options: object) -> socket.socket:
                raise OSError(111, "Connection refused")

            mailbox.socket.create_server = refuse  # a process of its own: nobody else sees it
    world = init_world(join_timeout=join_timeout)
    total = world.sum(1)
    world.close()
    return f"met {total}"


def without_rank_0(join_timeout: float) -> str:
    """Rank 0 never opens the store."""
    import paddle

    from alignment.parallel import init_world

    paddle.set_device("cpu")
    if os.environ["PADDLE_TRAINER_ID"] == "0":
        time.sleep(join_timeout + 6)
        return "never came"
    init_world(join_timeout=join_timeout)
    return "met"
