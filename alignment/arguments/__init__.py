"""Typed arguments for all methods: JSON or YAML files and command lines, strict and cross-checked.

:func:`parse` reads ``[FILE] [key=value ...]`` for a class of arguments and returns them resolved, or raises one
:class:`~alignment.errors.ArgumentsError` that names every mistake. A method's class is made by :func:`compose` from its
own keys, each declared by :func:`argument`. Nothing here imports Paddle.
"""

from alignment.arguments.compose import compose
from alignment.arguments.critic_keys import CriticKeys
from alignment.arguments.online_arguments import OnlineArguments
from alignment.arguments.parser import from_dict, parse, parse_cost, parse_ppo, parse_reward, parse_sft
from alignment.arguments.ppo_arguments import PPOArguments
from alignment.arguments.reward_arguments import CostArguments, RewardArguments
from alignment.arguments.row_arguments import RowArguments
from alignment.arguments.sft_arguments import SFTArguments
from alignment.arguments.sizes import Sizes
from alignment.arguments.spec import argument
from alignment.arguments.stage_arguments import Arguments

__all__ = [
    "Arguments",
    "CostArguments",
    "CriticKeys",
    "OnlineArguments",
    "PPOArguments",
    "RewardArguments",
    "RowArguments",
    "SFTArguments",
    "Sizes",
    "argument",
    "compose",
    "from_dict",
    "markdown_table",
    "parse",
    "parse_cost",
    "parse_ppo",
    "parse_reward",
    "parse_sft",
]


def markdown_table() -> str:
    """Return the text of ``docs/arguments.md``, made from the declarations."""
    from alignment.arguments import arguments_page

    return arguments_page.markdown()
