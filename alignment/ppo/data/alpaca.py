"""Stanford Alpaca: instructions with answers, for SFT and for the ptx loss of PPO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignment.ppo.data.base import RawSample
from alignment.ppo.data.hub import HubDataset
from alignment.ppo.data.rows import instruction_row


class AlpacaDataset(HubDataset):
    """``instruction`` (+ a space and ``input``, if there is one) -> input; ``output`` -> answer."""

    NAME = "alpaca"
    ALIASES = ("tatsu-lab/alpaca", "stanford-alpaca", "alpaca/train", "tatsu-lab/alpaca/train")
    FIELDS = ("input", "answer")
    REPO = "tatsu-lab/alpaca"

    def convert(self, row: Mapping[str, Any]) -> RawSample:
        return instruction_row(row)
