"""A verifiable reward of one's own: is the sum right?"""

from __future__ import annotations

import re

_NUMBER = re.compile(r"\d+")


def right_sum(prompts: list[str], responses: list[str], answer: list[str]) -> list[float]:
    """1 where the last number of a response is the row's ``answer``, else 0.

    Args:
        prompts: the questions, unused.
        responses: what the policy wrote.
        answer: the sums, as text: a column of the data set.
    """
    found = [_NUMBER.findall(response) for response in responses]
    return [float(bool(numbers) and numbers[-1] == right) for numbers, right in zip(found, answer, strict=True)]
