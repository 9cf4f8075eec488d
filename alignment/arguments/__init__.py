"""Typed arguments for all runners: JSON files and command lines, strict and cross-checked.

``parse_sft``, ``parse_reward`` and ``parse_ppo`` read ``[FILE.json] [key=value ...]`` and return resolved arguments,
or raise one :class:`~alignment.errors.ArgumentsError` that names every mistake. Nothing here imports Paddle.
"""

from alignment.arguments.parser import from_dict, parse, parse_cost, parse_ppo, parse_reward, parse_sft
from alignment.arguments.ppo_arguments import PPOArguments
from alignment.arguments.reward_arguments import CostArguments, RewardArguments
from alignment.arguments.sft_arguments import SFTArguments
from alignment.arguments.sizes import Sizes
from alignment.arguments.stage_arguments import Arguments

__all__ = [
    "Arguments",
    "CostArguments",
    "PPOArguments",
    "RewardArguments",
    "SFTArguments",
    "Sizes",
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
