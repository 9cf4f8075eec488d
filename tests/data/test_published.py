"""Chat rows of the published families: our ids are those that the ``tokenizers`` library gives on the folder's file."""

from __future__ import annotations

import datetime

import pytest
from tokenizers import Tokenizer

from alignment.errors import DataError
from alignment.ppo.data import Encoder, Limits, PromptTemplate
from alignment.ppo.models import load_tokenizer, save_tokenizer
from alignment.rollout.rewards.reward_model import build_reward_inputs
from tests.published import FAMILIES, render, write_tokenizer

TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds <a> & 'b' é", "parameters": {}}}]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"b": 2, "a": "1 é"}}}
SYSTEM = {"role": "system", "content": "Be brief 🙂."}
CHAT = [
    {"role": "user", "content": " How many?\n\n 12 🙂"},
    {"role": "assistant", "content": "the dog 👩‍👩‍👧 answers\n\n- one\n- two"},
    {"role": "user", "content": "And the fox, e\u0301?\n"},
    {"role": "assistant", "content": "It is 3. 漢字"},
]
CALLS = [
    CHAT[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"sum": 3}', "tool_call_id": "abcdefghi", "name": "add"},
    CHAT[3],
]
REASONING = [CHAT[0], {"role": "assistant", "content": "<think>\nso the 🙂\n</think>\n\nIt is 3."}]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    name = request.param
    folder = write_tokenizer(tmp_path_factory.mktemp("published") / name, name)
    tokenizer = load_tokenizer(folder)
    return name, folder, tokenizer, PromptTemplate.resolve("auto", tokenizer)


def ours(family, messages, tools=None):
    """Text, ids and which of them are learnt."""
    _, _, tokenizer, template = family
    segments = template.format_messages(messages, tools)
    ids, trained = Encoder(tokenizer, template, Limits()).segment_ids(segments)
    return "".join(segment.text for segment in segments), ids, trained


def conversations(name):
    kind = FAMILIES[name]
    start = [SYSTEM] if kind.has_system else []
    found = [([*start, *CHAT[:2]], None), ([*start, *CHAT], None), ([*start, *CHAT[:3]], None)]
    if name == "mistral":  # it writes the system prompt into a last turn of the user, and nowhere else
        start = []
    return found + ([([*start, *CALLS], TOOLS), ([*start, *CALLS[:3]], TOOLS)] if kind.has_tools else [])


def test_ids_are_those_of_the_folders_own_file(family):
    """D1, D2, D18: multi-turn, with system, tools and emoji; the text is what the template gives for the whole."""
    name, folder, tokenizer, template = family
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    today = datetime.date.fromisoformat(template.date) if template.date else None
    for messages, tools in conversations(name):
        given = {"tools": tools, "enable_thinking": False, "add_generation_prompt": messages[-1]["role"] != "assistant"}
        whole = render(name, messages, **given, **({"strftime_now": today.strftime} if today else {}))
        text, ids, trained = ours(family, messages, tools)
        if name == "mistral" and messages[0] == SYSTEM and messages[-1]["role"] == "assistant":
            # So it stands in every prompt, and in the training row that begins with the prompt.
            start = render(name, messages[:-1], **{**given, "add_generation_prompt": True})
            whole = start + f" {messages[-1]['content']}</s>"
        if name == "deepseek" and messages[-1]["role"] == "assistant":  # its prompts open the reasoning
            head, _, answer = whole.rpartition("<｜Assistant｜>")
            whole = f"{head}<｜Assistant｜><think>\n\n</think>\n\n{answer}"
        if name == "qwen3" and messages[-1]["role"] == "assistant":
            assert "<think>\n\n</think>\n\n" + messages[-1]["content"] in whole
        assert whole.startswith(text) and not whole[len(text) :].strip()
        expected = file.encode(text, add_special_tokens=False).ids
        if name == "gemma" and messages[-1]["role"] == "assistant":
            expected = [*expected, tokenizer.eos_token_id]  # its turns end with another token than its texts
        assert ids == expected
        learnt = tokenizer.decode([i for i, mark in zip(ids, trained, strict=True) if mark])
        for message in messages:
            if message["role"] == "assistant":
                assert message["content"].strip() in learnt and (not message.get("tool_calls") or '"add"' in learnt)
            else:
                assert message["content"].strip() not in learnt
        assert messages[-1]["role"] != "assistant" or (trained[-1] and ids[-1] == tokenizer.eos_token_id)


def test_reasoning_is_learnt_whole(family):
    """D9, P6."""
    name, folder, tokenizer, _ = family
    text, ids, trained = ours(family, REASONING)
    assert text.count("<think>") == 1 and "so the 🙂\n</think>\n\nIt is 3." in text
    learnt = tokenizer.decode([i for i, mark in zip(ids, trained, strict=True) if mark])
    assert "so the 🙂\n</think>\n\nIt is 3." in learnt and ("<think>" in learnt) == (name != "deepseek")
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    whole = file.encode(text, add_special_tokens=False).ids
    assert ids == whole + [tokenizer.eos_token_id] * (name == "gemma")


def test_prompts_begin_their_conversations(family):
    """A prompt has the ids that it has in a training row, and in the rows that are written anew for a reward model."""
    name, _, tokenizer, template = family
    turns = [message["content"] for message in CHAT]
    encoder = Encoder(tokenizer, template, Limits())
    prompt = encoder.prompt_ids(turns[:3])
    row = encoder.supervised({"input": turns[:3], "answer": turns[3]})
    assert row.rows[0][: row.prompt_len] == prompt
    ids, lengths, _ = build_reward_inputs([turns[:3]] * 2, [turns[3]] * 2, [True, False], tokenizer, template, 4096)
    assert ids[0, : lengths[0]].tolist() == row.rows[0]
    assert ids[1, : lengths[1]].tolist() == row.rows[0][: lengths[1]] and lengths[1] < lengths[0]


def test_what_a_family_has_no_place_for_is_refused(family):
    name, *_ = family
    if not FAMILIES[name].has_tools:
        with pytest.raises(DataError, match="tools|role 'tool'|roles must alternate"):
            ours(family, CALLS, TOOLS)
    if not FAMILIES[name].has_system:
        with pytest.raises(DataError, match="System role not supported"):
            ours(family, [SYSTEM, *CHAT])


def test_a_saved_folder_gives_the_same(family, tmp_path):
    """D2, D28: the saved tokenizer.json is the published one, byte for byte, and the template is in the form that
    others read.
    """
    name, folder, tokenizer, template = family
    save_tokenizer(tokenizer, tmp_path, template)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == FAMILIES[name].template
    again = load_tokenizer(tmp_path)
    resolved = PromptTemplate.resolve("auto", again)
    assert resolved == template
    assert ours((name, tmp_path, again, resolved), CHAT) == ours(family, CHAT)
