"""The reward of both sides' GRPO runs: how many different characters an answer has. Standard library only."""

from __future__ import annotations

from typing import Any


def variety(completions: list[str], **_: Any) -> list[float]:
    """One number per answer."""
    return [len(set(text)) / max(1, len(text)) for text in completions]
