"""Column layouts."""

from __future__ import annotations

import pytest

from alignment.errors import DataError
from alignment.ppo.data.rows import sample_from_row, split_transcript

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
HH = "\n\nHuman: q\n\nAssistant: a\n\nHuman: q2\n\nAssistant:"
PAIR = {"answer": "a", "other_answer": "b", "better": True}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # answers
        ({"src": "q", "tgt": "a"}, {"input": "q", "answer": "a"}),
        ({"src": ["q"], "tgt": ["a"]}, {"input": "q", "answer": "a"}),
        ({"src": ["q", "q2"], "tgt": ["a", "a2"]}, {"dialogue": ["q", "a", "q2", "a2"]}),
        ({"src": ["q", "q2"], "tgt": ["a"]}, {"input": ["q", "a", "q2"]}),
        ({"src": ["q", "q2"], "tgt": "a"}, {"input": ["q", "a", "q2"]}),
        ({"input": "q", "answer": "a"}, {"input": "q", "answer": "a"}),
        ({"input": ["q", "a", "q2"], "answer": "a2"}, {"input": ["q", "a", "q2"], "answer": "a2"}),
        ({"question": "q", "answer": "a"}, {"input": "q", "answer": "a"}),
        ({"prompt": "q", "response": "a"}, {"input": "q", "answer": "a"}),
        ({"prompt": "q", "completion": "a"}, {"input": "q", "answer": "a"}),
        ({"prompt": [SYSTEM, USER], "completion": "a"}, {"system": "s", "input": "q", "answer": "a"}),
        ({"instruction": "i", "input": "x", "output": "o"}, {"input": "i x", "answer": "o"}),
        ({"instruction": "i", "input": "", "output": "o"}, {"input": "i", "answer": "o"}),
        ({"instruction": "i", "output": "o"}, {"input": "i", "answer": "o"}),
        ({"dialogue": ["q", "a"]}, {"dialogue": ["q", "a"]}),
        ({"messages": [USER, ASSISTANT]}, {"dialogue": ["q", "a"]}),
        ({"messages": [SYSTEM, USER, ASSISTANT]}, {"system": "s", "dialogue": ["q", "a"]}),
        ({"messages": [USER]}, {"input": "q"}),
        ({"messages": [USER, ASSISTANT, USER]}, {"input": ["q", "a", "q"]}),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            {"dialogue": ["q", "a"]},
        ),
        ({"src": "q", "tgt": "a", "system": "s"}, {"input": "q", "answer": "a", "system": "s"}),
        # pairs
        (
            {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 0},
            {"input": "q", **PAIR},
        ),
        (
            {
                "prompt": "q",
                "response_0": "a",
                "response_1": "b",
                "better_response_id": 1,
                "safer_response_id": 0,
                "is_response_0_safe": True,
                "is_response_1_safe": False,
            },
            {"input": "q", **PAIR, "better": False, "safer": True, "is_safe": True, "is_other_safe": False},
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"input": "q", **PAIR}),
        ({"question": "q", "chosen": "a", "rejected": "b", "system": "s"}, {"input": "q", **PAIR, "system": "s"}),
        ({"prompt": HH, "chosen": "a", "rejected": "b"}, {"input": ["q", "a", "q2"], **PAIR}),
        ({"chosen": HH + " a", "rejected": HH + " b"}, {"input": ["q", "a", "q2"], **PAIR}),
        (
            {"prompt": [SYSTEM, USER], "chosen": [ASSISTANT], "rejected": [{"role": "assistant", "content": "b"}]},
            {"system": "s", "input": "q", **PAIR},
        ),
        (
            {"prompt": "q", "chosen": [USER, ASSISTANT], "rejected": [USER, {"role": "assistant", "content": "b"}]},
            {"input": "q", **PAIR},
        ),
        ({"src": ["q"], "tgt": [], "response": ["a", "b"], "sort": [1, 0]}, {"input": "q", **PAIR}),
        (
            {"src": ["q", "q2"], "tgt": ["x"], "response": ["a", "b"], "sort": [1, 2]},
            {"input": ["q", "x", "q2"], **PAIR, "better": False},
        ),
        # prompts
        ({"prompt": "q"}, {"input": "q"}),
        ({"input": "q", "label": 7}, {"input": "q"}),
        ({"src": "q"}, {"input": "q"}),
        ({"question": "q", "answer": None}, {"input": "q"}),
    ],
)
def test_layouts(row, expected):
    sample = sample_from_row(row)
    assert sample.pop("extra") == row
    sample.pop("unread", None)
    assert sample == expected


def test_hh_transcripts():
    assert split_transcript("\n\nHuman: a\n\nAssistant: b") == ["a", "b"]
    assert split_transcript("Human: a\n\nAssistant:  b\n\nmore\n\nHuman: c") == ["a", "b\n\nmore", "c"]
    # the same speaker twice, an empty answer, a speaker's name inside a line
    assert split_transcript("\n\nHuman: a\n\nAssistant: b\n\nAssistant: c") == ["a", "b\n\nc"]
    assert split_transcript("\n\nHuman: a\n\nAssistant: ") == ["a", ""]
    assert split_transcript("\n\nHuman: a Human: x\n\nAssistant: b") == ["a Human: x", "b"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, r"columns \(none\)"),
        ({"level": "x"}, "no known layout has the columns 'level'; known are for example prompt"),
        ({"src": ["a"], "tgt": ["b", "c"]}, "'src' has 1 turns and 'tgt' 2"),
        ({"prompt": "q", "response_0": "a", "better_response_id": 0}, "'response_1' is missing; the row has 'prompt'"),
        ({"prompt": "q", "response_0": "a", "response_1": "b"}, "'better_response_id' must be 0 or 1, not None"),
        ({"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 2}, "must be 0 or 1, not 2"),
        ({"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": "0"}, "must be 0 or 1, not '0'"),
        ({"prompt": "q", "chosen": "a"}, "'rejected' is missing; a pair needs both"),
        ({"prompt": "q", "chosen": "a", "rejected": 3.5}, "'rejected' must be text, not float 3.5"),
        ({"chosen": "a", "rejected": "b"}, "text before its first 'Human:'"),
        ({"chosen": "", "rejected": "b"}, "a transcript needs turns"),
        ({"chosen": "\n\nAssistant: a", "rejected": "b"}, "must begin with 'Human:'"),
        ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"}, "'chosen' must end with the assistant's answer"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: x\n\nAssistant: b"},
            "differ before their last answers",
        ),
        ({"src": ["q"], "response": ["a", "b"], "sort": [1, 1]}, "'sort' must tell the answers apart"),
        ({"src": ["q"], "response": ["a"], "sort": [1]}, "'response' must hold two texts"),
        ({"src": ["q", "r"], "response": ["a", "b"], "sort": [1, 2]}, "'src' must have one more"),
        ({"messages": []}, "non-empty list of messages"),
        ({"messages": "hello"}, "non-empty list of messages, not str"),
        ({"messages": [SYSTEM]}, "no turn beside the system prompt"),
        ({"messages": [USER, SYSTEM, ASSISTANT]}, "message 2 is a system prompt; it must be the first"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1: the content must be text, not null"),
        ({"messages": [USER, "hello"]}, "message 2 must be an object"),
    ],
)
def test_rows_that_fit_no_layout(row, message):
    """A row is refused, or has a prompt that can be used and says what is wrong with the rest."""
    with pytest.raises(DataError, match=message):
        raise DataError(sample_from_row(row)["unusable"])
