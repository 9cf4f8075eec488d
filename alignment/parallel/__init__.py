"""Processes of a run and what they do together: who they are (``topology``), how they meet (``world``, ``control``),
what they share (``group_collectives``, ``sharding``, ``pipeline``, ``whole``), and what CPUs lack (``cpu_backend``).
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULE_OF = {
    "ControlChannel": "control",
    "RankFailure": "control",
    "Topology": "topology",
    "World": "world",
    "init_world": "world",
    "layers_of_stage": "topology",
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    # A topology is needed where arguments are read, which must not wait for NumPy.
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{module}", __name__), name)


def __dir__() -> list[str]:
    return __all__
