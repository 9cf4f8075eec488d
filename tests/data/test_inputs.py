"""Rows as they are published, one of each layout: what the model reads of them and learns from them, or the error.

A row is shown as text: ``[...]`` is trained, ``$`` is the end of an answer; of a pair the better answer comes first.
"""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignment.errors import DataError
from alignment.ppo.data import Encoder, Limits, PreferenceDataset, PromptOnlyDataset, PromptTemplate, SupervisedDataset
from alignment.ppo.data.encode import Encoded, prompt_key
from alignment.ppo.data.rows import sample_from_row

from .test_datasets import make, warnings_said  # noqa: F401  (a fixture)

BEGIN = "BEGINNING OF CONVERSATION: "


def msg(role: str, content: object, **more: object) -> dict:
    return {"role": role, "content": content, **more}


def said(role: str, value: str) -> dict:
    return {"from": role, "value": value}


Q, A, B, S = msg("user", "q"), msg("assistant", "a"), msg("assistant", "b"), msg("system", "s")
Q2, A2 = msg("user", "q2"), msg("assistant", "a2")


def shown(dataset, tokenizer) -> list[str]:
    """Each row as text, see above."""

    def text(ids) -> str:
        return tokenizer.decode(ids).removeprefix(BEGIN).replace("<|endoftext|>", "$")

    found = []
    for row in dataset:
        if isinstance(dataset, PreferenceDataset):
            better, worse, at = row["better_input_ids"], row["worse_input_ids"], row["prompt_len"]
            found.append(f"{text(better[:at])}[{text(better[at:])}] > [{text(worse[at:])}]")
        elif isinstance(dataset, PromptOnlyDataset):
            found.append(text(row["input_ids"]))
        else:
            pieces, ids, labels = [], row["input_ids"], row["labels"]
            start = 0
            for i in range(1, len(ids) + 1):
                if i == len(ids) or (labels[i] >= 0) != (labels[start] >= 0):
                    pieces.append(f"[{text(ids[start:i])}]" if labels[start] >= 0 else text(ids[start:i]))
                    start = i
            found.append("".join(pieces))
    return found


SFT = [
    ("alpaca", {"instruction": "i", "input": "x", "output": "o", "text": "t"}, "USER: i x ASSISTANT:[o$]", ["text"]),
    ("alpaca without input", {"instruction": "i", "input": "", "output": "o"}, "USER: i ASSISTANT:[o$]", []),
    (
        "alpaca with history",
        {"instruction": "i", "input": "", "output": "o", "system": "s", "history": [["q", "a"]]},
        "s USER: q ASSISTANT:[a$]USER: i ASSISTANT:[o$]",
        [],
    ),
    ("alpaca, empty history", {"instruction": "i", "output": "o", "history": []}, "USER: i ASSISTANT:[o$]", []),
    (
        "dolly",
        {"instruction": "i", "context": "c", "response": "r", "category": "qa"},
        "USER: i\n\nc ASSISTANT:[r$]",
        ["category"],
    ),
    (
        "openorca",
        {"id": "1", "system_prompt": "s", "question": "q", "response": "r"},
        "s USER: q ASSISTANT:[r$]",
        ["id"],
    ),
    (
        "metamath",
        {"type": "GSM", "query": "q", "original_question": "o", "response": "r"},
        "USER: q ASSISTANT:[r$]",
        ["type", "original_question"],
    ),
    (
        "numinamath",
        {"source": "x", "problem": "q", "solution": "a", "messages": [Q, A]},
        "USER: q ASSISTANT:[a$]",
        ["source"],
    ),
    (
        "numinamath without messages",
        {"problem": "q", "solution": "so 3", "answer": "3"},
        "USER: q ASSISTANT:[so 3$]",
        ["answer"],
    ),
    (
        "lmsys",
        {"conversation_id": "1", "conversation": [Q, A], "redacted": False},
        "USER: q ASSISTANT:[a$]",
        ["conversation_id", "redacted"],
    ),
    ("ultrachat", {"prompt": "q", "prompt_id": "1", "messages": [Q, A]}, "USER: q ASSISTANT:[a$]", ["prompt_id"]),
    (
        "sharegpt",
        {"id": "1", "conversations": [said("human", "q"), said("gpt", "a")]},
        "USER: q ASSISTANT:[a$]",
        ["id"],
    ),
    (
        "speaker and text",
        {"messages": [{"speaker": "human", "text": "q"}, said("gpt", "a")]},
        "USER: q ASSISTANT:[a$]",
        [],
    ),
    (
        "helpsteer 1",
        {"prompt": "q", "response": "a", "helpfulness": 3},
        "USER: q ASSISTANT:[a$]",
        ["helpfulness"],
    ),
    ("stack", {"question": "q", "answer": "a", "votes": 3}, "USER: q ASSISTANT:[a$]", ["votes"]),
    ("trl, messages", {"prompt": [S, Q], "completion": [A]}, "s USER: q ASSISTANT:[a$]", []),
    (
        "trl, several messages",
        {"prompt": [Q, A, Q2], "completion": [A2, Q, A]},
        "USER: q ASSISTANT:a$USER: q2 ASSISTANT:[a2$]USER: q ASSISTANT:[a$]",
        [],
    ),
    ("trl, text", {"prompt": "q", "completion": "a"}, "USER: q ASSISTANT:[a$]", []),
    ("kto, good", {"prompt": [Q], "completion": [A], "label": True}, "USER: q ASSISTANT:[a$]", []),
    ("plain text", {"text": "once upon a time"}, "[once upon a time$]", []),
    ("a whole number", {"question": "q", "answer": 42}, "USER: q ASSISTANT:[42$]", []),
    ("a pair", {"prompt": "q", "chosen": "a", "rejected": "b"}, "USER: q ASSISTANT:[a$]", ["(the worse answer)"]),
    (
        "a pair, the second better",
        {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1},
        "USER: q ASSISTANT:[b$]",
        ["(the worse answer)"],
    ),
    (
        "several turns",
        {"messages": [S, Q, A, Q2, A2]},
        "s USER: q ASSISTANT:[a$]USER: q2 ASSISTANT:[a2$]",
        [],
    ),
    (
        "weight 0",
        {"messages": [Q, A | {"weight": 0}, Q2, A2 | {"weight": 1}]},
        "USER: q ASSISTANT:a$USER: q2 ASSISTANT:[a2$]",
        [],
    ),
    (
        "train: false",
        {"messages": [Q | {"train": False}, A, Q2, A2 | {"train": False}]},
        "USER: q ASSISTANT:[a$]USER: q2 ASSISTANT:a2$",
        [],
    ),
    ("loss_mask", {"messages": [Q, A | {"loss_mask": 0}, Q2, A2]}, "USER: q ASSISTANT:a$USER: q2 ASSISTANT:[a2$]", []),
    (
        "an empty turn",
        {"messages": [Q, A | {"content": ""}, Q2, A2]},
        "USER: q ASSISTANT:$USER: q2 ASSISTANT:[a2$]",
        [],
    ),
    ("the same in texts", {"dialogue": ["q", " ", "q2", "a2"]}, "USER: q ASSISTANT: $USER: q2 ASSISTANT:[a2$]", []),
    ("one speaker twice", {"messages": [Q, Q2, A, A2]}, "USER: q\n\nq2 ASSISTANT:[a\n\na2$]", []),
    (
        "content in parts",
        {"messages": [msg("user", [{"type": "text", "text": "q"}, {"type": "text", "text": "!"}]), A]},
        "USER: q! ASSISTANT:[a$]",
        [],
    ),
    ("developer", {"messages": [msg("developer", "s"), Q, A]}, "s USER: q ASSISTANT:[a$]", []),
    (
        "unknown keys of messages",
        {"messages": [Q | {"id": 7}, A | {"mood": "sour"}], "parallel_tool_calls": False},
        "USER: q ASSISTANT:[a$]",
        ["parallel_tool_calls", "messages.id", "messages.mood"],
    ),
    (
        "nulls, as tables have them",
        {"messages": [Q | {"weight": None}, A | {"tool_calls": None}], "tools": None},
        "USER: q ASSISTANT:[a$]",
        [],
    ),
    ("the system prompt twice", {"system": "s", "messages": [S, Q, A]}, "s USER: q ASSISTANT:[a$]", []),
    ("hh prompt", {"prompt": "\n\nHuman: q\n\nAssistant:", "response": "a"}, "USER: q ASSISTANT:[a$]", []),
]
PAIRS = [
    ("hh", {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, []),
    (
        "hh, the prompt repeated",
        {
            "prompt": "\n\nHuman: q\n\nAssistant:",
            "chosen": "\n\nHuman: q\n\nAssistant: a",
            "rejected": "\n\nHuman: q\n\nAssistant: b",
        },
        [],
    ),
    ("two answers", {"prompt": [Q], "chosen": [A], "rejected": [B]}, []),
    ("two transcripts", {"chosen": [Q, A], "rejected": [Q, B]}, []),
    ("the prompt repeated", {"prompt": [Q], "chosen": [Q, A], "rejected": [Q, B]}, []),
    (
        "ultrafeedback",
        {
            "prompt": "q",
            "prompt_id": "1",
            "chosen": [Q, A],
            "rejected": [Q, B],
            "messages": [Q, A],
            "score_chosen": 8.0,
            "score_rejected": 5.0,
        },
        ["prompt_id", "score_chosen", "score_rejected"],
    ),
    ("sharegpt", {"conversations": [said("human", "q")], "chosen": said("gpt", "a"), "rejected": said("gpt", "b")}, []),
    ("argilla", {"instruction": "q", "chosen_response": "a", "rejected_response": "b"}, []),
    (
        "openai",
        {
            "input": {"messages": [Q], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [A],
            "non_preferred_output": [B],
        },
        ["parallel_tool_calls"],
    ),
    ("stack, paired", {"qid": 1, "question": "q", "response_j": "a", "response_k": "b"}, ["qid"]),
    (
        "pku",
        {"prompt": "q", "response_0": "b", "response_1": "a", "better_response_id": 1, "safer_response_id": 0},
        ["safer_response_id"],
    ),
    ("helpsteer 2", {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": -2}, []),
    (
        "helpsteer 3",
        {"domain": "x", "context": [Q], "response1": "b", "response2": "a", "overall_preference": 3},
        ["domain"],
    ),
    ("shp", {"post_id": "1", "history": "q", "human_ref_A": "b", "human_ref_B": "a", "labels": 0}, ["post_id"]),
    (
        "lmsys, a battle",
        {"model_a": "m", "winner": "model_b", "conversation_a": [Q, B], "conversation_b": [Q, A], "turn": 1},
        ["model_a", "turn"],
    ),
    ("paddlenlp", {"src": ["q"], "tgt": [], "response": ["b", "a"], "sort": [0, 1]}, []),
    (
        "ultrafeedback, the source",
        {
            "instruction": "q",
            "completions": [
                {"response": "c", "overall_score": 5.0},
                {"response": "a", "overall_score": 8.0},
                {"response": "b", "overall_score": 2.0},
            ],
        },
        ["completions (all but the best and the worst)"],
    ),
    (
        "nectar",
        {
            "prompt": "\n\nHuman: q\n\nAssistant: ",
            "answers": [{"answer": "a", "rank": 1.0}, {"answer": "b", "rank": 2}],
        },
        [],
    ),
    (
        "stack exchange",
        {"question": "q", "answers": [{"text": "b", "pm_score": 1}, {"text": "a", "pm_score": 4, "selected": True}]},
        [],
    ),
    ("scores", {"prompt": "q", "responses": ["b", "a"], "scores": [0.1, 0.7]}, []),
]
PROMPTS = [
    ("a number as answer", {"prompt": "q", "answer": 42}, "USER: q ASSISTANT:", {"answer": 42}),
    ("the same, gsm8k's names", {"question": "q", "answer": 4.5}, "USER: q ASSISTANT:", {"answer": 4.5}),
    ("a list as answer", {"prompt": "q", "answer": ["a", 3]}, "USER: q ASSISTANT:", {"answer": ["a", 3]}),
    ("messages and a number", {"prompt": [Q], "answer": 42}, "USER: q ASSISTANT:", {"answer": 42}),
    ("an integer label", {"prompt": "q", "label": 3}, "USER: q ASSISTANT:", {"label": 3}),
    (
        "verl",
        {
            "data_source": "openai/gsm8k",
            "prompt": [Q],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "72"},
            "extra_info": {"index": 0, "answer": "..."},
        },
        "USER: q ASSISTANT:",
        {"reward_model": {"style": "rule", "ground_truth": "72"}},
    ),
    ("alpaca", {"instruction": "i", "input": "x", "output": "o"}, "USER: i x ASSISTANT:", {"output": "o"}),
    ("dolly", {"instruction": "i", "context": "c", "response": "r"}, "USER: i\n\nc ASSISTANT:", {"context": "c"}),
    ("openorca", {"system_prompt": "s", "question": "q", "response": "r"}, "s USER: q ASSISTANT:", {"response": "r"}),
    (
        "history",
        {"instruction": "i", "history": [["q", "a"]], "answer": 3},
        "USER: q ASSISTANT:a$USER: i ASSISTANT:",
        {"answer": 3},
    ),
    ("a whole conversation", {"messages": [Q, A, Q2, A2]}, "USER: q ASSISTANT:a$USER: q2 ASSISTANT:", {}),
    (
        "a column is the file's own",
        {"problem": "q", "solution": "s", "answer": "3"},
        "USER: q ASSISTANT:",
        {"answer": "3"},
    ),
    ("half a pair", {"prompt": "q", "chosen": "a", "rejected": None}, "USER: q ASSISTANT:", {"chosen": "a"}),
    ("no label", {"prompt": [Q], "response_0": "a", "response_1": "b"}, "USER: q ASSISTANT:", {"response_1": "b"}),
    ("kto, bad", {"prompt": "q", "completion": "a", "label": False}, "USER: q ASSISTANT:", {"label": False}),
]


@pytest.mark.parametrize(("row", "text", "unread"), [case[1:] for case in SFT], ids=[case[0] for case in SFT])
def test_supervised(tokenizer, write_rows, row, text, unread):
    """D14-D17, P1, P2, P5: each layout as its data set is published."""
    dataset = make(SupervisedDataset, f"jsonl::{write_rows('a.jsonl', row)}", tokenizer)
    assert shown(dataset, tokenizer) == [text]
    assert list(dataset.summary.sources[0].unread) == unread


@pytest.mark.parametrize(("row", "unread"), [case[1:] for case in PAIRS], ids=[case[0] for case in PAIRS])
def test_pairs(tokenizer, write_rows, row, unread):
    """P1, P3, P4: each layout as its data set is published; ``a`` is always the better answer to ``q``."""
    dataset = make(PreferenceDataset, f"jsonl::{write_rows('a.jsonl', row)}", tokenizer)
    assert shown(dataset, tokenizer) == ["USER: q ASSISTANT:[a$] > [b$]"]
    assert list(dataset.summary.sources[0].unread) == unread


@pytest.mark.parametrize(("row", "text", "columns"), [case[1:] for case in PROMPTS], ids=[case[0] for case in PROMPTS])
def test_prompts(tokenizer, write_rows, row, text, columns, warnings_said):  # noqa: F811
    """D14, D16: the prompt is read alone; all else reaches rewards as it stands in the file."""
    dataset = make(PromptOnlyDataset, f"jsonl::{write_rows('a.jsonl', row)}", tokenizer)
    assert shown(dataset, tokenizer) == [text]
    assert dataset[0]["row"].items() >= columns.items()
    assert "not read" not in warnings_said.text


def test_a_column_that_looks_like_a_part_of_the_prompt_is_warned_about(tokenizer, write_rows, warnings_said):  # noqa: F811
    """D16: nothing of a prompt is left out without a word; other columns are rewards' material."""
    path = write_rows("a.jsonl", {"prompt": "q", "context": "c", "level": 3}, {"prompt": "r", "level": 4})
    dataset = make(PromptOnlyDataset, f"jsonl::{path}", tokenizer)
    assert dataset.summary.sources[0].unread == {"context": 1}
    assert f"({path}), as prompt only data: 'context' looks like a part of the prompt" in warnings_said.text
    assert "level" not in warnings_said.text


def test_what_is_not_read_is_in_the_table(tokenizer, write_rows):
    """P1: the rule above all, in the data table and in data_summary.json."""
    rows = [{"prompt": "q", "response": f"a{n}", "annotator": n, "input": "x", "empty": ""} for n in range(3)]
    dataset = make(SupervisedDataset, f"jsonl::{write_rows('a.jsonl', *rows)}", tokenizer)
    summary = json.loads(json.dumps(dataset.summary.to_dict()))
    assert summary["sources"][0]["unread"] == {"annotator": 3, "input": 3}
    import rich

    console = rich.console.Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(dataset.summary.render())
    assert "not read: annotator, input" in console.export_text()


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        (SupervisedDataset, {"prompt": "q", "completion": "a", "label": False}, "not a good answer"),
        (SupervisedDataset, {"prompt": [Q], "completion": [A], "label": False}, "not a good answer"),
        (SupervisedDataset, {"messages": [Q, A | {"weight": 0}]}, "no turn to train"),
        (
            PreferenceDataset,
            {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": 0},
            "tied answers",
        ),
    ],
)
def test_rows_that_teach_nothing_are_dropped_for_a_reason(tokenizer, write_rows, kind, row, reason):
    """KTO's bad answers and turns of weight 0 are never learnt (P5)."""
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    dataset = make(kind, f"jsonl::{write_rows('a.jsonl', good, row)}", tokenizer)
    assert dataset.summary.dropped == {reason: 1} and len(dataset) == 1


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (SupervisedDataset, {"prompt": "q", "response": 0.5}, "`answer` must be text, not float 0.5"),
        (SupervisedDataset, {"prompt": "q", "answer": ["a"]}, "`answer` must be text, not list"),
        (SupervisedDataset, {"prompt": "q"}, "`answer` is missing"),
        (SupervisedDataset, {"prompt": "q", "answer": None}, r"`answer` is missing.*null in this row: 'answer'"),
        (
            SupervisedDataset,
            {"kind": "x", "input": "q", "target": "a"},
            r"`answer` is missing.*not read in this row: kind, target",
        ),
        (SupervisedDataset, {"prompt": None, "response": "a"}, "the column 'prompt' is null"),
        (SupervisedDataset, {"messages": [Q, A, Q2]}, "the conversation ends with the user and has no answer to train"),
        (SupervisedDataset, {"messages": None, "tools": None}, "the column 'messages' is null"),
        (SupervisedDataset, {"prompt": ["q", "r"], "response": ["a", "b"]}, "both lists of texts. Is this a table"),
        (
            SupervisedDataset,
            {"instruction": "i", "output": "o", "history": ["q", "a"]},
            "list of .question, answer. pairs",
        ),
        (SupervisedDataset, {"instruction": "i", "output": "o", "history": [["q", 3]]}, "must hold pairs of texts"),
        (SupervisedDataset, {"messages": [msg("user", [IMAGE]), A]}, "message 1 has a part of type 'image_url'"),
        (SupervisedDataset, {"messages": [Q, A | {"weight": 0.5}]}, "'weight' must be 0 .not trained. or 1, not 0.5"),
        (SupervisedDataset, {"messages": [Q, A | {"weight": 0}, B]}, "message 3 goes on with the assistant's turn"),
        (SupervisedDataset, {"messages": [Q, msg("robot", "x")]}, "message 2 has the role 'robot'; known are user"),
        (SupervisedDataset, {"messages": [{"content": "q"}, A]}, "message 1 has no role; its keys are 'content'"),
        (SupervisedDataset, {"messages": [Q, msg("assistant", None)]}, "message 2: the content must be text, not null"),
        (SupervisedDataset, {"system": "t", "messages": [S, Q, A]}, "'system' and the first message are different"),
        (SupervisedDataset, {"prompt": "q", "response": "a", "tools": "{"}, "'tools' must be a list of tools"),
        (
            PreferenceDataset,
            {"prompt": "q", "completion": "a", "label": True},
            "KTO. is no pair.*prompt, chosen, rejected",
        ),
        (PreferenceDataset, {"chosen": [S, Q, A], "rejected": [Q, B]}, "different system prompts"),
        (
            PreferenceDataset,
            {"chosen": [Q, A, Q2], "rejected": [Q, B]},
            "'chosen' must end with the assistant's answer",
        ),
        (
            PreferenceDataset,
            {"prompt": [Q], "chosen": [Q2, A], "rejected": [Q2, B]},
            "'prompt' and 'chosen' together are no",
        ),
        (PreferenceDataset, {"prompt": [Q], "chosen": [A, Q2, Q2], "rejected": [B]}, "'chosen' must end with"),
        (PreferenceDataset, {"chosen": [A], "rejected": [B]}, "there is no prompt column"),
        (PreferenceDataset, {"text": "t"}, "plain `text` has no prompt"),
        (PromptOnlyDataset, {"prompt": ["q", "r", "s"], "response": ["a", "b", "c"]}, "both lists of texts"),
        (PromptOnlyDataset, {"src": ["q", "r", "s"], "tgt": ["a"]}, "'src' has 3 turns and 'tgt' 1"),
        (PromptOnlyDataset, {"text": "t"}, "plain `text` has no prompt; call the column `prompt`"),
    ],
)
def test_rows_that_cannot_be_read(tokenizer, write_rows, kind, row, message):
    """D15, D17, D23, D24, D25, P4: one line with the file, the line and what would be right."""
    path = write_rows("a.jsonl", row)
    with pytest.raises(DataError, match=f"a.jsonl, line 1: .*{message}"):
        make(kind, f"jsonl::{path}", tokenizer)


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        (SupervisedDataset, '{"src": "one \\ud83d", "tgt": "a"}'),
        (SupervisedDataset, '{"src": "q", "tgt": "one \\ud83d"}'),
        (PreferenceDataset, '{"prompt": "one \\ud83d", "chosen": "a", "rejected": "b"}'),
        (PromptOnlyDataset, '{"prompt": "one \\ud83d", "tgt": "a"}'),
    ],
)
def test_half_a_surrogate_pair(tokenizer, write_rows, kind, row, warnings_said):  # noqa: F811
    """D12, P11: said with file and line, skippable; a whole pair, escaped, is a character like others."""
    whole = '{"prompt": "cow \\ud83d\\udc04", "chosen": "a \\ud83d\\udc04", "rejected": "b"}'
    path = write_rows("a.jsonl", whole, row)
    with pytest.raises(DataError, match=r"a.jsonl, line 2: the text holds half a surrogate pair.*one \\ud83d"):
        make(kind, f"jsonl::{path}", tokenizer)
    dataset = make(kind, f"jsonl::{path}", tokenizer, skip_bad_rows=True)
    assert len(dataset) == 1 and dataset.summary.dropped == {"malformed": 1}
    assert "\N{COW}" in shown(dataset, tokenizer)[0]
    warnings_said.text.encode()  # the message itself can be written
    with pytest.raises(DataError, match="no known layout|no prompt column|the transcript has text") as err:
        make(kind, f"jsonl::{write_rows('b.jsonl', row.replace('src', 'x').replace('prompt', 'x'))}", tokenizer)
    str(err.value).encode()


CALLS = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ADD = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}
ASKED = msg("assistant", None, tool_calls=[CALL])
TOLD = '<tools>{"type": "function", "function": {"name": "add", "parameters": {}}}</tools>'
CALLED = '<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[<call>add {"x": 1}</call><|im_end|>]\n'
ENDED = "<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n[a<|im_end|>]"


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        (
            {
                "messages": [Q, ASKED, msg("tool", "3", tool_call_id="1"), A],
                "tools": [ADD],
                "parallel_tool_calls": True,
            },
            ["parallel_tool_calls"],
        ),
        ({"messages": [Q, ASKED, msg("tool", "3"), A], "tools": json.dumps([ADD])}, []),
        ({"prompt": [Q], "completion": [ASKED, msg("tool", "3"), A], "tools": [ADD]}, []),
        (
            {
                "messages": [
                    Q,
                    msg("assistant", None, function_call=CALL["function"]),
                    msg("function", "3", name="add"),
                    A,
                ],
                "functions": [ADD["function"]],
            },
            [],
        ),
        (
            {
                "conversations": [
                    said("human", "q"),
                    said("function_call", '{"name": "add", "arguments": {"x": 1}}'),
                    said("observation", "3"),
                    said("gpt", "a"),
                ],
                "tools": json.dumps([ADD]),
            },
            [],
        ),
        (
            {
                "messages": [Q, msg("assistant", None, tool_calls=[CALL]), msg("ipython", "3"), A],
                "tools": [ADD],
            },
            [],
        ),
    ],
    ids=["openai", "tools as text", "trl", "openai's older form", "sharegpt", "llama 3"],
)
def test_tools(chat_tokenizer, write_rows, row, unread):
    """D16, D17: tools, calls and results reach a template that has a place for them, in all spellings."""
    path = write_rows("a.jsonl", row)
    dataset = make(SupervisedDataset, f"jsonl::{path}", chat_tokenizer, template=CALLS)
    assert shown(dataset, chat_tokenizer) == [TOLD + CALLED + ENDED]
    assert list(dataset.summary.sources[0].unread) == unread
    with pytest.raises(DataError, match=r"a.jsonl, (line|row) 1: the Beaver template has no place for tools"):
        make(SupervisedDataset, f"jsonl::{path}", chat_tokenizer, template="beaver")


def test_tools_in_pairs_and_prompts(chat_tokenizer, write_rows):
    """D16: the call of an answer is a part of it; a prompt may end with the result of a tool."""
    start = TOLD + "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    pair = {"prompt": [Q], "chosen": [ASKED], "rejected": [A], "tools": [ADD]}
    dataset = make(PreferenceDataset, f"jsonl::{write_rows('a.jsonl', pair)}", chat_tokenizer, template=CALLS)
    assert shown(dataset, chat_tokenizer) == [start + '[<call>add {"x": 1}</call><|im_end|>] > [a<|im_end|>]']
    prompts = [{"prompt": [Q, ASKED, msg("tool", "3")], "tools": [ADD]}, {"prompt": [Q], "tools": []}]
    dataset = make(PromptOnlyDataset, f"jsonl::{write_rows('b.jsonl', *prompts)}", chat_tokenizer, template=CALLS)
    whole = (TOLD + CALLED + ENDED).replace("[", "").replace("]", "").removesuffix("a<|im_end|>")
    assert shown(dataset, chat_tokenizer) == [whole, start.removeprefix(TOLD)]


def test_reasoning(chat_tokenizer, write_rows):
    """D9, P6: reasoning beside the content is trained, under each of its names; pairs may differ in it alone."""
    start = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    for key in ("reasoning_content", "reasoning", "thinking"):
        path = write_rows("a.jsonl", {"messages": [Q, A | {key: "hm"}]})
        dataset = make(SupervisedDataset, f"jsonl::{path}", chat_tokenizer, template=CALLS)
        assert shown(dataset, chat_tokenizer) == [start + "[<think>hm</think>a<|im_end|>]"]
    pair = {"prompt": [Q], "chosen": [A | {"reasoning_content": "hm"}], "rejected": [A]}
    dataset = make(PreferenceDataset, f"jsonl::{write_rows('b.jsonl', pair)}", chat_tokenizer, template=CALLS)
    assert shown(dataset, chat_tokenizer) == [start + "[<think>hm</think>a<|im_end|>] > [a<|im_end|>]"]


def test_the_assistant_first(chat_tokenizer, write_rows):
    """D17: a greeting is written where the template can."""
    path = write_rows("a.jsonl", {"messages": [B, Q, A]})
    dataset = make(SupervisedDataset, f"jsonl::{path}", chat_tokenizer, template=CALLS)
    assert shown(dataset, chat_tokenizer)[0].startswith("<|im_start|>assistant\n[b<|im_end|>]\n<|im_start|>user\nq")
    with pytest.raises(
        DataError, match="a.jsonl, line 1: message 1: in the Beaver template a conversation begins with"
    ):
        make(SupervisedDataset, f"jsonl::{path}", chat_tokenizer, template="beaver")


TEXT = st.one_of(st.sampled_from(["", "q", "a", " ", "\n\nHuman: q\n\nAssistant: a"]), st.text(max_size=3))
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-2, 2), st.floats(-2, 2), TEXT)
MESSAGES = st.dictionaries(
    st.sampled_from(["role", "from", "content", "value", "weight", "tool_calls", "reasoning_content", "name", "train"]),
    st.one_of(SCALARS, st.sampled_from(["user", "assistant", "system", "tool", "function_call"]), st.lists(SCALARS)),
)
VALUES = st.one_of(SCALARS, st.lists(st.one_of(SCALARS, MESSAGES, st.lists(SCALARS, max_size=2)), max_size=3), MESSAGES)
NAMES = (
    "messages conversations dialogue context prompt instruction input src question problem system history tools "
    "functions chosen rejected response_0 response_1 response_2 better_response_id preference_strength sort response "
    "human_ref_A human_ref_B labels completions answers scores ranks output completion solution answer tgt label text x"
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(NAMES.split()), VALUES, max_size=5))
def test_whatever_a_row_holds_it_is_read_or_refused(tokenizer, row):
    """D12-D17, D25: no row ends in a traceback."""
    coder = Encoder(tokenizer, PromptTemplate(), Limits(200))
    try:
        sample = sample_from_row(row)
    except DataError:
        return
    assert sample["extra"] == row
    for encode in (coder.supervised, coder.preference, coder.prompt, prompt_key):
        with contextlib.suppress(DataError):
            assert isinstance(encode(sample), (Encoded, str))


@settings(max_examples=300, deadline=None)
@given(st.sets(st.sampled_from([*NAMES.split(), "query", "system_prompt", "kto_tag"]), max_size=6), st.data())
def test_every_column_is_read_or_named(names, data):
    """P1, P2, D16: whatever columns come together, each one's text is in the sample, or its name among the unread."""
    row = {}
    for name in names:
        word = f"<{name}>"
        forms = [
            word,
            [[word, "x"]],
            [msg("user", word), msg("assistant", word)],
            [msg("assistant", word)],
            [msg("user", word)],
        ]
        row[name] = data.draw(st.sampled_from(forms))
    try:
        sample = sample_from_row(row)
    except DataError:
        return
    unread = sample.get("unread", [])
    read = json.dumps({key: value for key, value in sample.items() if key not in ("extra", "unread")})
    if "unusable" not in sample:
        assert [name for name in names if name not in unread and f"<{name}>" not in read] == []
