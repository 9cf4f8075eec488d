"""GSM8K: grade-school sums with worked answers; the final answer (after ``####``) goes to Python rewards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignment.ppo.data.base import RawSample
from alignment.ppo.data.hub import HubDataset
from alignment.ppo.data.rows import question_row


class GSM8KTrain(HubDataset):
    """``question`` -> input; ``answer`` (the worked solution) -> answer; ``extra["final_answer"]``: the number, without
    commas.
    """

    NAME = "gsm8k/train"
    ALIASES = ("gsm8k", "openai/gsm8k", "openai/gsm8k/train")
    FIELDS = ("input", "answer")
    REPO = "openai/gsm8k"
    CONFIG = "main"

    def convert(self, row: Mapping[str, Any]) -> RawSample:
        sample = question_row(row)
        _, mark, final = sample["answer"].rpartition("####")
        sample["extra"]["final_answer"] = final.strip().replace(",", "") if mark else ""
        return sample


class GSM8KTest(GSM8KTrain):
    NAME = "gsm8k/test"
    ALIASES = ("openai/gsm8k/test",)
    SPLIT = "test"
