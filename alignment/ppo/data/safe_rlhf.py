"""PKU-SafeRLHF: preference pairs with separate judgements of helpfulness (``better``) and harmlessness (``safer``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignment.ppo.data.base import RawSample
from alignment.ppo.data.hub import HubDataset
from alignment.ppo.data.rows import paired_responses


class SafeRLHFDataset(HubDataset):
    """The family's common row: ``prompt``, ``response_0/1``, ``better_response_id``, ``safer_response_id``,
    ``is_response_0/1_safe``.
    """

    def convert(self, row: Mapping[str, Any]) -> RawSample:
        return paired_responses(row)


class SafeRLHFTrain(SafeRLHFDataset):
    NAME = "PKU-SafeRLHF/train"
    ALIASES = ("PKU-Alignment/PKU-SafeRLHF/train",)
    REPO = "PKU-Alignment/PKU-SafeRLHF"


class SafeRLHFTest(SafeRLHFDataset):
    NAME = "PKU-SafeRLHF/test"
    ALIASES = ("PKU-Alignment/PKU-SafeRLHF/test",)
    REPO = "PKU-Alignment/PKU-SafeRLHF"
    SPLIT = "test"


class SafeRLHF30KTrain(SafeRLHFDataset):
    NAME = "PKU-SafeRLHF-30K/train"
    ALIASES = ("PKU-Alignment/PKU-SafeRLHF-30K/train",)
    REPO = "PKU-Alignment/PKU-SafeRLHF-30K"


class SafeRLHF30KTest(SafeRLHFDataset):
    NAME = "PKU-SafeRLHF-30K/test"
    ALIASES = ("PKU-Alignment/PKU-SafeRLHF-30K/test",)
    REPO = "PKU-Alignment/PKU-SafeRLHF-30K"
    SPLIT = "test"


class SafeRLHF10KTrain(SafeRLHFDataset):
    NAME = "PKU-SafeRLHF-10K/train"
    ALIASES = ("PKU-Alignment/PKU-SafeRLHF-10K/train",)
    REPO = "PKU-Alignment/PKU-SafeRLHF-10K"
