"""PPO by the names that its users know: the algorithm is :class:`alignment.methods.ppo.PPO`, what runs it is
:class:`alignment.flow.loop.Loop`.
"""

from __future__ import annotations

from typing import Any

from alignment.flow import online_run
from alignment.flow.loop import Loop as PPOTrainer
from alignment.methods.ppo import PPO
from alignment.parallel import World

__all__ = ["PPOTrainer", "build_trainer", "load_data"]


def load_data(args: Any, show_progress: bool = True) -> online_run.RunData:
    """Tokenizer, template and data sets of a run of PPO; see :func:`alignment.flow.online_run.load_data`."""
    return online_run.load_data(PPO(args), show_progress)


def build_trainer(args: Any, world: World, data: online_run.RunData, sizes: Any, argv: list[str]) -> PPOTrainer:
    """PPO's models in its loop; see :func:`alignment.flow.online_run.build_loop`."""
    return online_run.build_loop(PPO(args), world, data, sizes, argv)
