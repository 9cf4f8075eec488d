"""The demo's task: pick the animals out of a list of words, completely and politely.

    Which of these are animals: apple, cat, hammer, dog?   ->   The animals are cat and dog. Glad to help!

Everything is drawn from a seed. Three kinds of data come out of it:

- *Demonstrations* by people in a hurry: most name only the first word that fits and leave out the polite ending, some
  add a wrong word. What such people do most often is what a model trained on them does greedily, so SFT alone scores
  far below 1, although the better answers are among those it has seen.
- *Preference pairs*: two answers of any quality to one list; the better one by the gold rule is preferred.
- *Prompts*, for PPO and for the evaluation.

No list of words is used twice, so held-out prompts are new to every model. The gold rule (:func:`gold_score`) makes the
pairs and measures the result; no model is ever trained on its number.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

KINDS: dict[str, list[str]] = {
    "animals": ["bear", "cat", "cow", "dog", "duck", "fox", "goat", "horse", "lion", "mouse", "sheep", "wolf"],
    "colours": ["black", "blue", "brown", "green", "grey", "red", "white", "yellow"],
    "fruits": ["apple", "banana", "cherry", "lemon", "mango", "melon", "pear", "plum"],
    "tools": ["axe", "drill", "hammer", "ladder", "pliers", "rake", "saw", "shovel"],
}
ASKED = "animals"  # the kind that every question is about
PHRASINGS = (
    "Which two of these are {kind}: {words}?",
    "Pick out the two {kind}: {words}.",
    "Name both {kind} in this list: {words}.",
    "Find two {kind} among these words: {words}.",
)
POLITE = "Glad to help!"
CHATTER = ("Is that all?", "Ask me more!", "That was easy.", POLITE)

RIGHT_WORDS = 2  # how many words of a list fit,
WRONG_WORDS = (2, 4)  # and how many do not

# The gold rule.
POLITE_SHARE = 0.25
# Words that an answer may contain without naming anything.
_FILLERS = frozenset({"the", "are", "and"})

# People in a hurry.
STOPS_AT_FIRST = 0.65
IS_POLITE = 0.3
ADDS_WRONG = 0.1

# Answers of any quality, for the pairs: how often the better one is complete to begin with, how often both share a
# fault, and by which fault they differ (weights).
COMPLETE = 0.7
FAULTY = 0.15
FAULTS = {"swap": 0.38, "leave out": 0.2, "add": 0.12, "repeat": 0.12, "manner": 0.18}
# Two answers that are about equally good are not shown as a pair.
SMALLEST_GAP = 0.2


@dataclass(frozen=True)
class Question:
    """One list of words and what is asked about it.

    Attributes:
        prompt: the instruction as text.
        kind: the kind that is asked for (always the same).
        right: the words of the list that fit, in the list's order.
        wrong: the others, in the list's order.
    """

    prompt: str
    kind: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]

    @property
    def key(self) -> tuple[str, frozenset[str]]:
        """What makes two questions the same, whatever their phrasing and order."""
        return self.kind, frozenset(self.right + self.wrong)

    def row(self) -> dict[str, Any]:
        """The columns that a prompt has in the data files; the gold rule needs ``kind`` and ``right``."""
        return {"prompt": self.prompt, "kind": self.kind, "right": list(self.right)}


class Questions:
    """An endless supply of different questions.

    Args:
        draw: the source of chance.
    """

    def __init__(self, draw: random.Random) -> None:
        self.draw, self._seen = draw, set()

    def take(self, count: int) -> list[Question]:
        """The next ``count`` questions; none is like an earlier one."""
        taken: list[Question] = []
        while len(taken) < count:
            question = self._one()
            if question.key not in self._seen:
                self._seen.add(question.key)
                taken.append(question)
        return taken

    def _one(self) -> Question:
        draw = self.draw
        kind = ASKED
        others = [word for name, words in KINDS.items() if name != kind for word in words]
        fitting = draw.sample(KINDS[kind], RIGHT_WORDS)
        words = fitting + draw.sample(others, draw.randint(*WRONG_WORDS))
        draw.shuffle(words)
        prompt = draw.choice(PHRASINGS).format(kind=kind, words=", ".join(words))
        right = tuple(word for word in words if word in fitting)
        return Question(prompt, kind, right, tuple(word for word in words if word not in fitting))


def write_answer(kind: str, words: Sequence[str], polite: bool) -> str:
    """The answer that names ``words``: ``"The animals are cat and cow and dog. Glad to help!"``."""
    return f"The {kind} are {' and '.join(words)}.{f' {POLITE}' if polite else ''}"


def gold_score(response: str, kind: str, right: Sequence[str]) -> float:
    """How good an answer is, between 0 and 1: the truth of this task.

    ``0.75 * (right - faults) / wanted + 0.25 * polite``, and at least 0. *right* counts the right words that are
    named, *wanted* those that fit; *faults* counts every other word, and so wrong words, repetitions and idle talk
    alike; *polite* is whether the text ends with ``Glad to help!``, with nothing behind it. An answer that names no
    right word gets 0.

    Args:
        response: the answer's text.
        kind: the kind that was asked for.
        right: the words that fit.
    """
    text = response.strip()
    polite = text.endswith(POLITE)
    named = [word for word in re.findall(r"\w+", text.removesuffix(POLITE).lower()) if word not in _FILLERS | {kind}]
    hits = len(set(right).intersection(named))
    if not hits:
        return 0.0
    share = (hits - (len(named) - hits)) / len(right)
    return max(0.0, (1 - POLITE_SHARE) * share + POLITE_SHARE * polite)


def gold(prompts: list[str], responses: list[str], kind: list[str], right: list[list[str]]) -> list[float]:
    """The gold rule as a reward, for the argument ``reward``; the demo gives it weight 0, so that it is only logged."""
    return [gold_score(text, name, words) for text, name, words in zip(responses, kind, right, strict=True)]


def hurried_answer(question: Question, draw: random.Random) -> str:
    """A demonstration as people in a hurry give it."""
    words = list(question.right[: 1 if draw.random() < STOPS_AT_FIRST else None])
    if draw.random() < ADDS_WRONG:
        words.insert(draw.randint(0, len(words)), draw.choice(question.wrong))
    return write_answer(question.kind, words, draw.random() < IS_POLITE)


def spoil(words: Sequence[str], fault: str, question: Question, draw: random.Random) -> list[str]:
    """The same words with one fault more (a key of ``FAULTS``)."""
    spoilt, place = list(words), draw.randrange(len(words))
    if fault == "leave out" and len(spoilt) > 1:
        del spoilt[place]
    elif fault == "swap":
        spoilt[place] = draw.choice(question.wrong)
    elif fault == "add":
        spoilt.insert(draw.randint(0, len(spoilt)), draw.choice(question.wrong))
    elif fault == "repeat":
        spoilt.insert(place, spoilt[place])
    return spoilt


def answer_pair(question: Question, draw: random.Random) -> list[str]:
    """Two answers of any quality that mostly differ in one thing, so that every rule is seen by itself."""
    words = list(question.right if draw.random() < COMPLETE else draw.sample(question.right, 1))
    if draw.random() < FAULTY:
        words = spoil(words, draw.choice(list(FAULTS)), question, draw)
    fault = draw.choices(list(FAULTS), list(FAULTS.values()))[0]
    polite = draw.random() < 0.5
    answers = [write_answer(question.kind, words, polite)]
    if fault == "manner":
        answers.append(write_answer(question.kind, words, not polite))
        if draw.random() < 0.4:
            answers[1] = f"{answers[0]} {draw.choice(CHATTER)}"
    else:
        answers.append(write_answer(question.kind, spoil(words, fault, question, draw), polite))
    draw.shuffle(answers)
    return answers


def preference_row(question: Question, draw: random.Random) -> dict[str, Any]:
    """Two answers to a question and which of them is better by the gold rule (PKU-SafeRLHF's columns)."""
    while True:
        answers = answer_pair(question, draw)
        scores = [gold_score(answer, question.kind, question.right) for answer in answers]
        if abs(scores[0] - scores[1]) >= SMALLEST_GAP:
            return {
                **question.row(),
                "response_0": answers[0],
                "response_1": answers[1],
                "better_response_id": int(scores[1] > scores[0]),
            }


@dataclass(frozen=True)
class Sizes:
    """How many rows each file gets."""

    sft_train: int = 9600
    sft_dev: int = 200
    preferences_train: int = 4800
    preferences_dev: int = 500
    prompts_train: int = 4000
    prompts_dev: int = 200


def make_data(seed: int, sizes: Sizes) -> dict[str, list[dict[str, Any]]]:
    """All data of the demo: the rows of each file, by the file's name without ``.jsonl``.

    Args:
        seed: the same seed gives the same rows.
        sizes: how many rows of each.
    """
    draw = random.Random(f"demo {seed}")
    questions = Questions(draw)
    data: dict[str, list[dict[str, Any]]] = {}
    for split in ("dev", "train"):
        data[f"prompts_{split}"] = [q.row() for q in questions.take(getattr(sizes, f"prompts_{split}"))]
        data[f"preferences_{split}"] = [
            preference_row(q, draw) for q in questions.take(getattr(sizes, f"preferences_{split}"))
        ]
        data[f"sft_{split}"] = [
            {"src": q.prompt, "tgt": hurried_answer(q, draw)} for q in questions.take(getattr(sizes, f"sft_{split}"))
        ]
    return data
