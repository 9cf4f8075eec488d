"""GSM8K: grade-school sums with worked answers; the final answer (after ``####``) goes to Python rewards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignment.ppo.data.base import RawSample
from alignment.ppo.data.hub import HubDataset
from alignment.ppo.data.rows import text_field


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
        answer = text_field(row, "answer")
        _, mark, final = answer.rpartition("####")
        return RawSample(
            input=text_field(row, "question"),
            answer=answer,
            extra={**row, "final_answer": final.strip().replace(",", "") if mark else ""},
        )


class GSM8KTest(GSM8KTrain):
    NAME = "gsm8k/test"
    ALIASES = ("openai/gsm8k/test",)
    SPLIT = "test"
