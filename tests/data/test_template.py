"""The three kinds of prompt template."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from alignment.errors import DataError
from alignment.ppo.data import PromptTemplate, check_same
from alignment.ppo.data.template import PROMPT_INPUT, Segment

from .conftest import CHATML, load, make_bpe

LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'system' %}<<{{ m.content }}>>{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
FAKE = SimpleNamespace(eos_token="</s>", bos_token="<s>", name_or_path="")


def test_beaver_is_the_references_template():
    template = PromptTemplate.resolve("beaver", FAKE)
    assert PROMPT_INPUT == "BEGINNING OF CONVERSATION: USER: {input} ASSISTANT:"
    assert template.format_prompt("Hi {there}") == "BEGINNING OF CONVERSATION: USER: Hi {there} ASSISTANT:"
    assert template.format_prompt(["a", "b", "c"], "</s>") == (
        "BEGINNING OF CONVERSATION: USER: a ASSISTANT:b</s>USER: c ASSISTANT:"
    )
    assert (
        template.format_prompt("a", system=" Be brief. ") == "BEGINNING OF CONVERSATION: Be brief. USER: a ASSISTANT:"
    )
    assert template.assistant_header() == " ASSISTANT:"


def test_beaver_segments():
    segments = PromptTemplate().format_turns(["a", "b", "c", "d"])
    assert segments == [
        Segment("BEGINNING OF CONVERSATION: USER: a ASSISTANT:"),
        Segment("b", is_answer=True, add_eos=True),
        Segment("USER: c ASSISTANT:"),
        Segment("d", is_answer=True, add_eos=True),
    ]


def test_chat_segments_learn_the_answer_and_its_end():
    template = PromptTemplate("jinja", CHATML, eos_token="<|im_end|>")
    segments = template.format_turns(["a", "b", "c", "d"], system="S")
    assert segments == [
        Segment("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"),
        Segment("b<|im_end|>", is_answer=True),
        Segment("\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"),
        Segment("d<|im_end|>", is_answer=True, add_eos=True),  # the end is there already: not doubled (test_encode)
    ]
    assert template.assistant_header() == "<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_whose_turns_end_otherwise_than_the_model_stops():
    template = PromptTemplate("jinja", CHATML, eos_token="<|endoftext|>")
    assert template.format_turns(["a", "b"])[-1] == Segment("b<|im_end|>", is_answer=True, add_eos=True)


def test_a_template_without_generation_prompt_of_its_own():
    template = PromptTemplate.resolve(LLAMA2, FAKE)
    assert template.format_prompt(["a", "b", "c"]) == "<s>[INST] a [/INST] b</s>[INST] c [/INST]"
    assert template.format_turns(["a", "b"]) == [
        Segment("<s>[INST] a [/INST]"),
        Segment(" b</s>", is_answer=True, add_eos=True),
    ]


@pytest.mark.parametrize("source", [CHATML, LLAMA2])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_segments_of_a_jinja_template_are_the_rendered_text(source, count):
    template = PromptTemplate.resolve(source, FAKE)
    turns = [f"turn {number}" for number in range(count)]
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]
    rendered = template.renderer.render(messages, prompt=count % 2 == 1)
    text = "".join(segment.text for segment in template.format_turns(turns))
    assert rendered.startswith(text) and not rendered[len(text) :].strip()  # but for space after the last end


def test_a_prompt_is_the_beginning_of_its_conversation():
    for source in ("beaver", CHATML, LLAMA2):
        template = PromptTemplate.resolve(source, FAKE)
        assert template.format_turns(["a", "b", "c"]) == template.format_turns(["a", "b", "c", "d"])[:-1]


def test_a_generation_prompt_that_opens_the_reasoning():
    """D9: an answer without reasoning closes what the prompt opened; earlier answers stand as the template has them."""
    source = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    template = PromptTemplate.resolve(source, FAKE)
    assert template.format_turns(["a", "b"])[-1] == Segment("\n</think>\n\nb<|im_end|>", is_answer=True, add_eos=True)
    assert template.format_turns(["a", "b", "c", "d"])[1] == Segment("b<|im_end|>", is_answer=True)


def test_a_template_that_rewrites_earlier_turns():
    source = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.role }}: {{ m.content }}\n{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    template = PromptTemplate.resolve(source, FAKE)
    assert template.format_turns(["a", "b"])[-1].text == "b"
    with pytest.raises(DataError, match="message 2: the chat template rewrites the conversation"):
        template.format_turns(["a", "b", "c", "d"])
    assert "".join(piece.text for piece in template.format_turns(["a", "b", "c"])) == "user: a\nuser: c\nassistant: "


def test_chat_is_read_from_the_tokenizer(chat_tokenizer):
    template = PromptTemplate.resolve("chat", chat_tokenizer)
    assert (template.kind, template.source, template.eos_token) == ("chat", CHATML, "<|im_end|>")


def test_chat_template_beside_the_tokenizer_or_as_attribute(tmp_path):
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert PromptTemplate.resolve("chat", SimpleNamespace(name_or_path=str(tmp_path), eos_token="e")).source == CHATML
    assert PromptTemplate.resolve("chat", SimpleNamespace(chat_template=CHATML, eos_token="e")).source == CHATML
    named = {"chat_template": [{"name": "tool", "template": "x"}, {"name": "default", "template": CHATML}]}
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    assert PromptTemplate.resolve("chat", SimpleNamespace(name_or_path=str(tmp_path), eos_token="e")).source == CHATML


@pytest.mark.parametrize("place", ["config", "files"])
def test_a_row_with_tools_takes_the_template_that_is_named_for_them(tmp_path, place):
    """As transformers does, in both places where it keeps several; saved, they are one that other programs read."""
    from alignment.ppo.models import load_tokenizer, save_tokenizer

    with_tools = "{% for t in tools %}\n  <tool>{{ t.function.name }}</tool>{% endfor %}" + CHATML + "\n"
    folder = make_bpe(tmp_path / "model", eos="<|im_end|>", chat_template=CHATML if place == "files" else None)
    if place == "config":
        file = folder / "tokenizer_config.json"
        named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": with_tools}]
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": named}))
    else:
        (folder / "chat_template.jinja").write_text(CHATML)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(with_tools)
    tokenizer = load_tokenizer(folder)
    template = PromptTemplate.resolve("auto", tokenizer)
    save_tokenizer(tokenizer, tmp_path / "saved", template)
    row = [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3"}]
    tools = [{"type": "function", "function": {"name": "add"}}]
    for found in (template, PromptTemplate.resolve("chat", load_tokenizer(tmp_path / "saved"))):
        plain = "".join(piece.text for piece in found.format_messages(row))
        assert plain == "".join(piece.text for piece in make_chatml(tokenizer).format_messages(row))
        text = "".join(piece.text for piece in found.format_messages(row, tools))
        assert text == "  <tool>add</tool>" + plain


def make_chatml(tokenizer):
    return PromptTemplate.resolve(PromptTemplate("chat", CHATML), tokenizer)


def test_a_templates_last_line_break_is_written_as_transformers_does(tmp_path):
    """A file ends with a line break that is no part of the prompt; one that a user gave as text is."""
    source = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}{{ 'Answer:' if add_generation_prompt else '' }}\n"
    for template in (
        PromptTemplate.resolve("chat", SimpleNamespace(chat_template=source, eos_token="e")),
        PromptTemplate.resolve(str(_written(tmp_path / "t.jinja", source)), FAKE),
    ):
        assert template.format_prompt("a") == "a\nAnswer:" and template.as_jinja() == source[:-1]
    given = PromptTemplate.resolve(source, FAKE)
    assert given.format_prompt("a") == "a\nAnswer:\n" and given.as_jinja() == source + "\n"


def _written(path, text):
    path.write_text(text)
    return path


def test_a_jinja_file(tmp_path):
    (tmp_path / "t.jinja").write_text(LLAMA2)
    assert PromptTemplate.resolve(str(tmp_path / "t.jinja"), FAKE) == PromptTemplate.resolve(LLAMA2, FAKE)


@pytest.mark.parametrize("spec", ["beaver", "chat", LLAMA2])
def test_saved_and_loaded_again(tmp_path, chat_tokenizer, spec):
    template = PromptTemplate.resolve(spec, chat_tokenizer)
    assert template.save(tmp_path / "new").name == "prompt_template.json"
    loaded = PromptTemplate.load(tmp_path / "new")
    assert loaded.to_dict() == template.to_dict()
    assert PromptTemplate.resolve(loaded, chat_tokenizer) == template
    check_same(loaded, template, "a", "b")


@pytest.mark.parametrize("spec", [None, "auto"])
def test_auto_means_the_saved_one_else_the_tokenizers_else_beaver(tmp_path, spec):
    """D8: and it says why."""
    plain = load(make_bpe(tmp_path / "bpe"))
    assert PromptTemplate.resolve(spec, plain).kind == "beaver"
    assert "no chat template" in PromptTemplate.for_model(spec, plain, tmp_path / "bpe")[2]
    folder = make_bpe(tmp_path / "chat", chat_template=LLAMA2)
    assert PromptTemplate.resolve(spec, load(folder)).source == LLAMA2
    template, saved, why = PromptTemplate.for_model(spec, load(folder), folder)
    assert (template.source, saved) == (LLAMA2, None) and "its tokenizer has a chat template" in why
    PromptTemplate().save(folder)  # of a model trained before chat templates were chosen by themselves
    template, saved, why = PromptTemplate.for_model(spec, load(folder), folder)
    assert template.kind == saved.kind == "beaver" and "saved with the model" in why
    PromptTemplate("chat", CHATML).save(folder)
    assert PromptTemplate.resolve(spec, load(folder)).source == CHATML
    # The tokenizer of an old checkpoint has lost its chat template; the saved one stands in for it.
    assert PromptTemplate.resolve("chat", load(folder)).source == CHATML


def test_a_model_keeps_its_day_and_its_choice(tmp_path):
    """D10, D18: what a run fixed holds for the stages that follow, also where the same template is given by name."""
    dated = "{{ strftime_now('%Y') }}" + CHATML
    folder = make_bpe(tmp_path / "chat", eos="<|im_end|>", chat_template=dated)
    PromptTemplate("chat", dated, date="2001-01-01", enable_thinking=True).save(folder)
    for given in ("auto", "chat", dated):
        template, _, _ = PromptTemplate.for_model(given, load(folder), folder)
        assert (template.date, template.enable_thinking) == ("2001-01-01", True)
    assert PromptTemplate.for_model("auto", load(folder), folder, enable_thinking=False)[0].enable_thinking is False
    assert PromptTemplate.for_model(CHATML, load(folder), folder)[0].date == ""


def test_nothing_saved():
    assert PromptTemplate.load("no/such/folder") is None


def test_mismatch_names_both_unless_allowed(caplog):
    beaver, jinja = PromptTemplate(), PromptTemplate("jinja", CHATML)
    with pytest.raises(
        DataError, match="differ: the SFT model has beaver.*the reward model has Jinja.*allow_template_mismatch"
    ):
        check_same(beaver, jinja, "the SFT model", "the reward model")
    check_same(beaver, jinja, "a", "b", allow=True)
    check_same(beaver, None, "a", "b")
    check_same(PromptTemplate("chat", CHATML, "e1"), PromptTemplate("jinja", CHATML, "e2"), "a", "b")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vicuna", "'vicuna' is no prompt template"),
        ("", "not ''"),
        (7, "not 7"),
        ("missing.jinja", "missing.jinja cannot be read"),
        ("chat", "has no chat template"),
        ("{% for m in messages %}", "not valid Jinja: line 1"),
        ("{{ prompt }}", "cannot be rendered: 'prompt' is undefined"),
        ("{{ messages[3].content }}", "cannot be rendered"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ raise_exception('no system') }}", "no system"),
        ("{{ ''.__class__.__mro__ }}", "cannot be rendered"),
        ("Q: {{ messages[0].role }}", "leaves out the user's text"),
        ("Q: {{ messages[0].content }} A:", "leaves out the assistant's answer"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "writes 'assistant: ' before an answer"),
    ],
)
def test_templates_that_cannot_be_used(spec, message):
    with pytest.raises(DataError, match=message):
        PromptTemplate.resolve(spec, FAKE)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"format": 2, "kind": "beaver"}',
        '{"format": 1, "kind": "jinja"}',
        '{"format": 1, "kind": "beaver"}',
    ],
)
def test_a_damaged_or_foreign_file(tmp_path, text):
    (tmp_path / "prompt_template.json").write_text(text)
    with pytest.raises(DataError, match=r"prompt_template\.json"):
        PromptTemplate.load(tmp_path)


def test_old_paddle_chat_template_is_refused_with_a_way_out(tmp_path):
    (tmp_path / "chat_template.json").write_text('{"conversation": ["{{user}}", "{{bot}}"], "query": "{{query}}"}')
    with pytest.raises(DataError, match="older form.*write it as one Jinja string"):
        PromptTemplate.resolve("chat", SimpleNamespace(name_or_path=str(tmp_path), eos_token="e"))


def test_prompts_end_with_the_user():
    with pytest.raises(DataError, match="odd number of turns, not 2"):
        PromptTemplate().format_prompt(["a", "b"])
    with pytest.raises(DataError, match="without turns"):
        PromptTemplate().format_turns([])


def test_a_resumed_run_keeps_its_day(tmp_path):
    """D10: the tokens of a resumed run are those of the run that it goes on from, on whatever day it goes on."""
    from alignment.flow.runner import stage_template

    source = "{{ strftime_now('%d') }}" + CHATML
    folder = make_bpe(tmp_path / "model", eos="<|im_end|>", chat_template=source)
    args = SimpleNamespace(prompt_template="auto", enable_thinking=None, allow_template_mismatch=False)
    fresh = stage_template(args, load(folder), str(folder))
    for place in ("checkpoint-1", "checkpoint-2/policy"):  # of SFT and reward models, of PPO
        PromptTemplate("chat", source, date="2001-02-03").save(tmp_path / place)
        resumed = stage_template(args, load(folder), str(folder), tmp_path / place.split("/")[0])
        assert resumed.date == "2001-02-03" != fresh.date and resumed.source == fresh.source
        assert resumed.to_dict() != fresh.to_dict()  # so the cache of another day is not read


def test_a_saved_beaver_template_is_itself_also_in_jinja(tmp_path):
    """The tokenizer of a saved folder has it as its chat template, which `chat` then called another one."""
    folder = make_bpe(tmp_path / "model", chat_template=PromptTemplate().as_jinja())
    for spec in ("chat", "auto"):
        assert PromptTemplate.resolve(spec, load(folder)).kind == "beaver"


def test_a_resumed_run_keeps_its_template_where_none_is_given(tmp_path):
    """What `auto` finds may change between versions (one that wrote null took Beaver): the checkpoint knows better."""
    from alignment.flow.runner import stage_template

    folder = make_bpe(tmp_path / "model", eos="<|im_end|>", chat_template=CHATML)
    args = SimpleNamespace(prompt_template="auto", enable_thinking=None, allow_template_mismatch=False)
    assert stage_template(args, load(folder), str(folder)).kind == "chat"
    for place in ("checkpoint-1", "checkpoint-2/policy"):  # of SFT and reward models, of PPO
        PromptTemplate().save(tmp_path / place)
        resumed = stage_template(args, load(folder), str(folder), tmp_path / place.split("/")[0])
        assert resumed.kind == "beaver" and resumed.eos_token == "<|im_end|>"
