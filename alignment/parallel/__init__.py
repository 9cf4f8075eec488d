"""The processes of a run: who they are, how they meet, how they share gradients (data parallelism)."""

from alignment.parallel.control import ControlChannel, RankFailure
from alignment.parallel.world import World, init_world

__all__ = ["ControlChannel", "RankFailure", "World", "init_world"]
