"""Rewards by NAME."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from alignment.errors import RewardError, nearest

MODEL = "model"

Registered = TypeVar("Registered", bound=Callable)

_REWARDS: dict[str, Callable] = {}


def register_reward(name: str) -> Callable[[Registered], Registered]:
    """Make a function, or a :class:`~alignment.rollout.rewards.reward_source.RewardSource` class, known by ``name``.

    Example::

        @register_reward("politeness")
        def politeness(prompts, responses, **row):
            return [float("please" in response.lower()) for response in responses]

    Args:
        name: what the JSON's ``reward`` calls it.

    Raises:
        RewardError: the name cannot be used (empty, ``"model"``, with a colon or comma) or belongs to another function.
    """
    if not name or name == MODEL or set(":,") & set(name) or name != name.strip():
        raise RewardError(
            f"a reward cannot be registered as {name!r}: {MODEL!r} means the reward model, "
            "and a name is not empty and has no colon, comma or outer space"
        )

    def register(reward: Registered) -> Registered:
        known = _REWARDS.get(name)
        if known is not None and _origin(known) != _origin(reward):
            raise RewardError(f"reward {name!r} is registered twice: by {_origin(known)} and by {_origin(reward)}")
        _REWARDS[name] = reward
        return reward

    return register


def known_rewards() -> list[str]:
    """The registered names, sorted."""
    return sorted(_REWARDS)


def registered_reward(name: str) -> Callable:
    """Return what is registered as ``name``.

    Raises:
        RewardError: nothing is; the message lists the known names.
    """
    if name not in _REWARDS:
        known = [MODEL, *known_rewards()]
        raise RewardError(
            f"unknown reward {name!r}{nearest(name, known)}\nKnown: {', '.join(known)}. A Python function is given as "
            '"file.py:function" or "package.module:function"; `plugins` names files that register rewards.'
        )
    return _REWARDS[name]


def _origin(reward: Callable) -> str:
    """Where it was defined: the same after its file is loaded a second time."""
    code = getattr(reward, "__code__", None)
    file = code.co_filename if code else getattr(reward, "__module__", "?")
    return f"{getattr(reward, '__qualname__', repr(reward))} in {file}"
