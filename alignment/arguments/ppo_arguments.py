"""Arguments of PPO."""

from __future__ import annotations

from dataclasses import dataclass

from alignment.arguments import foreign
from alignment.arguments.critic_keys import CriticKeys
from alignment.arguments.online_arguments import OnlineArguments


@dataclass
class PPOArguments(CriticKeys, OnlineArguments):
    """Arguments of ``run_ppo.py``; see :class:`~alignment.arguments.stage_arguments.Arguments`."""

    STAGE = "ppo"
    TITLE = "PPO"
    FOREIGN = {**foreign.ONLINE, **foreign.PPO}
