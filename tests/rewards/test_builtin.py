"""The rules that come with the toolkit."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.errors import RewardError
from alignment.rollout.rewards import RewardBatch, resolve_rewards
from alignment.rollout.rewards.builtin import gsm8k_number


def score(name: str, responses: list[str], **columns: list) -> list[float]:
    rows = [{key: values[i] for key, values in columns.items()} for i in range(len(responses))]
    return resolve_rewards(name).score(RewardBatch(["q"] * len(responses), responses, rows)).total.tolist()


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so\n#### 42", 42),
        ("#### 1,234", 1234),
        ("#### -3.5", -3.5),
        ("#### $18", 18),
        ("#### -$18", -18),
        ("#### .5", 0.5),
        ("#### 7.", 7),
        ("#### 1 then #### 2", 2),
        ("42", None),
        ("####", None),
        ("#### none", None),
    ],
)
def test_final_number(text: str, number: float | None) -> None:
    assert gsm8k_number(text) == number


def test_gsm8k_compares_numbers() -> None:
    answers = ["5+7=12\n#### 12"] * 4
    assert score("gsm8k", ["#### 12", "#### 12.0", "#### 13", "12"], answer=answers) == [1, 1, 0, 0]


@pytest.mark.parametrize("answer", ["twelve", None, 12])
def test_gsm8k_without_a_right_answer_is_an_error(answer: object) -> None:
    with pytest.raises(RewardError, match='no number behind "####"'):
        score("gsm8k", ["#### 12"], answer=[answer])


def test_gsm8k_needs_the_column() -> None:
    with pytest.raises(RewardError, match=r"needs the column 'answer', .* they have: 'solution'"):
        score("gsm8k", ["#### 12"], solution=["#### 12"])


def test_gsm8k_on_the_real_file(shared_data) -> None:
    import gzip
    import itertools
    import json

    with gzip.open(shared_data / "gsm8k_train.jsonl.gz", "rt", encoding="utf-8") as file:
        answers = [json.loads(line)["answer"] for line in itertools.islice(file, 500)]
    assert len(answers) == 500
    assert score("gsm8k", answers, answer=answers) == [1.0] * 500
    assert score("gsm8k", ["#### 123456789"] * 500, answer=answers) == [0.0] * 500


def test_exact_match() -> None:
    assert score("exact_match", [" Paris\n", "paris", ""], answer=["Paris", "Paris", "Paris"]) == [1, 0, 0]
    with pytest.raises(RewardError, match='"answer" is 3, not a text'):
        score("exact_match", ["3"], answer=[3])


def test_regex() -> None:
    assert score("regex", ["the cat", "the dog"], pattern=[r"\bcat\b", r"\bcat\b"]) == [1, 0]
    with pytest.raises(RewardError, match="is not a regular expression"):
        score("regex", ["x"], pattern=["("])
    with pytest.raises(RewardError, match="is not a regular expression"):
        score("regex", ["x"], pattern=[None])


def test_words() -> None:
    assert score("words", ["", "one", "two  words\n"]) == [0, 1, 2]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*"-+$,.7x \n\u0663", "####", "e9"]), max_size=12).map("".join) | st.text())
def test_no_answer_of_a_policy_makes_a_grader_fail(answer: str) -> None:
    """rl 4: the policy writes the text; whatever it writes is an answer, right or wrong."""
    assert score("gsm8k", [answer], answer=["#### 7"])[0] in (0.0, 1.0)
    assert score("exact_match", [answer], answer=["7"])[0] in (0.0, 1.0)
    assert score("regex", [answer], pattern=["7$"])[0] in (0.0, 1.0)
    assert score("words", [answer])[0] >= 0


def test_signs_of_a_final_number() -> None:
    """rl 4: one sign, before or behind a dollar; two are no number."""
    texts = ["#### -2", "#### -$2", "#### $-2", "#### --2", "#### +-2", "#### -$-2"]
    assert [gsm8k_number(text) for text in texts] == [-2.0, -2.0, -2.0, None, None, None]
