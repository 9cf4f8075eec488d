"""Rules that are rewards of their own right: the truth is in the data set's row, so they cannot be talked round."""

from __future__ import annotations

import re

from alignment.errors import RewardError
from alignment.rollout.rewards.registry import register_reward

FINAL_ANSWER = re.compile(r"####\s*((?:[-+]\$?|\$[-+]?)?[\d,]*\.?\d+)")  # one sign, before or behind a "$"


def gsm8k_number(text: str) -> float | None:
    """The number behind the last ``####`` of a GSM8K solution (Cobbe et al. 2021, section 2), or None."""
    found = FINAL_ANSWER.findall(text)
    try:
        return float(found[-1].replace(",", "").replace("$", "")) if found else None
    except ValueError:  # the policy writes this text: whatever it is, it is an answer, right or wrong
        return None


@register_reward("gsm8k")
def gsm8k(prompts: list[str], responses: list[str], answer: list[str]) -> list[float]:
    """1 where the response's number behind ``####`` equals that of the row's ``answer``, else 0.

    Raises:
        RewardError: a row's ``answer`` has no such number, so that nothing could be right.
    """
    scores = []
    for prompt, response, solution in zip(prompts, responses, answer, strict=True):
        right = gsm8k_number(solution) if isinstance(solution, str) else None
        if right is None:
            raise RewardError(
                f'reward \'gsm8k\': the row\'s "answer" has no number behind "####": {solution!r} (prompt: {prompt!r})'
            )
        scores.append(float(gsm8k_number(response) == right))
    return scores


@register_reward("exact_match")
def exact_match(prompts: list[str], responses: list[str], answer: list[str]) -> list[float]:
    """1 where the response equals the row's ``answer`` but for outer white space, else 0.

    Raises:
        RewardError: a row's ``answer`` is not a text.
    """
    for prompt, right in zip(prompts, answer, strict=True):
        if not isinstance(right, str):
            raise RewardError(
                f"reward 'exact_match': the row's \"answer\" is {right!r}, not a text (prompt: {prompt!r})"
            )
    return [float(response.strip() == right.strip()) for response, right in zip(responses, answer, strict=True)]


@register_reward("regex")
def regex(prompts: list[str], responses: list[str], pattern: list[str]) -> list[float]:
    """1 where the row's ``pattern`` (Python's syntax) is found in the response, else 0.

    Raises:
        RewardError: a row's ``pattern`` is not a regular expression.
    """
    scores = []
    for prompt, response, expression in zip(prompts, responses, pattern, strict=True):
        try:
            scores.append(float(re.search(expression, response) is not None))
        except (re.error, TypeError) as error:
            raise RewardError(
                f"reward 'regex': the row's \"pattern\" {expression!r} is not a regular expression: {error} (prompt: "
                f"{prompt!r})"
            ) from error
    return scores


@register_reward("words")
def words(prompts: list[str], responses: list[str]) -> list[float]:
    """How many words the response has; with a negative weight, a price on length."""
    return [float(len(response.split())) for response in responses]
