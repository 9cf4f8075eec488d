"""``docs/plan.md``: how a plan is made, how far it was from measurements, and the table of scaling."""

from __future__ import annotations

from pathlib import Path

from alignment.plan import simulate
from alignment.plan.hardware import CARDS


def markdown() -> str:
    """Return the whole page."""
    text = (Path(__file__).parent / "page.txt").read_text(encoding="utf-8")
    return text.format(
        cards="\n".join(_cards()),
        table=simulate.markdown(),
        card=simulate.CARD,
        samples=simulate.SAMPLES,
        prompt=simulate.PROMPT,
        response=simulate.RESPONSE,
    )


def _cards() -> list[str]:
    return [
        f"| {card.name} | {card.memory:g} | {card.reserved:g} | {card.tflops:g}, {card.tflops_float32:g} | "
        f"{card.bandwidth:g} | {card.link:g}, {card.network:g}, {card.host_link:g} | {card.gemm_efficiency:g}, "
        f"{card.attention_efficiency:g}, {card.memory_efficiency:g}, {card.link_efficiency:g} |"
        for card in CARDS.values()
    ]
