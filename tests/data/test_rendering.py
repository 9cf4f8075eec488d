"""What of a chat template's text the assistant says, in templates of the published kinds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from alignment.errors import DataError
from alignment.ppo.data import PromptTemplate

from .conftest import CHATML

SPECIALS = SimpleNamespace(eos_token="<|im_end|>", bos_token="<s>", name_or_path="")
# Keeps only what follows </think>, everywhere, and opens the reasoning in its prompt (the kind of R1 distills).
DROPS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% elif m.role == 'system' %}"
    "{{ m.content }}{% else %}<A>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<A>{% endif %}"
)
OPENS = DROPS.replace("<A>{% endif %}", "<A><think>\n{% endif %}")
# Drops the reasoning of answers that a later question follows (the kind of Qwen3).
HYBRID = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set said = m.content %}{% set why = m.reasoning_content or '' %}{% if '</think>' in said %}"
    "{% set why = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or why) %}<think>\n{{ why.strip('\n') }}\n</think>\n\n{% endif %}"
    "{{ said }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The system prompt stands in the last user turn, and answers follow a space (the kind of Mistral).
MOVES_SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set sys = messages[0].content %}{% set rest = messages[1:] %}{% else %}"
    "{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}{% if (m.role == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and sys is defined %}{{ sys }}\n\n{% endif %}{{ m.content }} [/INST]{% else %}"
    " {{ m.content.strip() }}{{ eos_token }}{% endif %}{% endfor %}"
)
ALL = {"chatml": CHATML, "drops": DROPS, "opens": OPENS, "hybrid": HYBRID, "marked": MARKED, "moves": MOVES_SYSTEM}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def make(source, **fields):
    template = PromptTemplate.resolve(source, SPECIALS)
    return PromptTemplate.resolve(PromptTemplate(**{**vars(template), **fields}), SPECIALS)


def marked(segments):
    """The text, with what is learnt in double brackets."""
    return "".join(f"[[{s.text}]]" if s.is_answer else s.text for s in segments)


@pytest.mark.parametrize("name", ["beaver", *ALL])
@pytest.mark.parametrize("answer", ["4", "<think>2 and\n2</think>4", "<think>\nx\n</think>\n\n- a\n- b", "assistant"])
def test_the_whole_answer_is_learnt(name, answer):
    """D9, P6: every character of the answer (but white space at line ends that a template sets) is in the learnt part,
    and no opening tag stands twice.
    """
    template = PromptTemplate.resolve(ALL.get(name, name), SPECIALS)
    segments = template.format_turns(["What is 2 + 2?", answer])
    text, learnt = marked(segments), segments[-1]
    assert learnt.is_answer and learnt.add_eos
    bare = "".join(segments[-2].text.rpartition("<think>")[1:]) + learnt.text if name == "opens" else learnt.text
    assert "".join(answer.split()) in "".join(bare.split())
    assert text.count("<think>") == text.count("</think>") <= 1


def test_reasoning_in_a_field_of_its_own():
    """D9: ``reasoning_content`` is learnt, written as the template writes it, else in tags."""
    row = [user("q"), assistant("a", reasoning_content="why")]
    assert PromptTemplate().format_messages(row)[-1].text == "<think>\nwhy\n</think>\n\na"
    assert marked(make(DROPS).format_messages(row)) == "<s><U>q<A>[[<think>\nwhy\n</think>\n\na<|im_end|>]]"
    assert marked(make(OPENS).format_messages(row)) == "<s><U>q<A><think>\n[[why\n</think>\n\na<|im_end|>]]"
    end = "<|im_start|>assistant\n[[<think>\nwhy\n</think>\n\na<|im_end|>]]"
    assert marked(make(HYBRID).format_messages(row)).endswith(end)


def test_hybrid_thinking():
    """D18: answers without reasoning follow an empty block, as their prompts do; ``enable_thinking`` changes both."""
    quiet = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    template = make(HYBRID)
    assert marked(template.format_turns(["q"])) == quiet + "<think>\n\n</think>\n\n"
    assert marked(template.format_turns(["q", "a"])) == quiet + "<think>\n\n</think>\n\n[[a<|im_end|>]]"
    assert marked(template.format_turns(["q", "a", "r", "b"])) == (
        quiet + "[[a<|im_end|>]]" + "\n" + quiet.replace("q", "r") + "<think>\n\n</think>\n\n[[b<|im_end|>]]"
    )
    thinking = make(HYBRID, enable_thinking=True)
    assert marked(thinking.format_turns(["q"])) == quiet
    assert marked(thinking.format_turns(["q", "a"])) == quiet + "[[<think>\n\n</think>\n\na<|im_end|>]]"


@pytest.mark.parametrize("source", [DROPS, HYBRID])
def test_reasoning_of_an_earlier_answer_cannot_be_learnt_where_the_template_drops_it(source):
    row = [user("q"), assistant("<think>x</think>a"), user("r"), assistant("b")]
    with pytest.raises(DataError, match=r"message 2: the chat template drops the reasoning of earlier answers.*weight"):
        make(source).format_messages(row)
    row[1]["weight"] = 0
    text = marked(make(source).format_messages(row))
    assert "x" not in text and text.endswith("[[b<|im_end|>]]")
    assert make(source).format_messages(row[:3])  # in a prompt it is context as well


def test_a_turn_of_weight_zero_is_read_but_not_learnt():
    """P5, D16: the turn stays, outside what is learnt."""
    row = [user("q"), assistant("bad", weight=0), user("r"), assistant("good", weight=1)]
    assert marked(make(CHATML).format_messages(row)) == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nbad<|im_end|>\n<|im_start|>user\nr<|im_end|>\n"
        "<|im_start|>assistant\n[[good<|im_end|>]]"
    )
    assert marked(PromptTemplate().format_messages(row)) == (
        "BEGINNING OF CONVERSATION: USER: q ASSISTANT:badUSER: r ASSISTANT:[[good]]"
    )
    assert [s.add_eos for s in PromptTemplate().format_messages(row)] == [False, True, False, True]


def test_generation_blocks_say_what_is_learnt():
    """D18."""
    template = make(MARKED)
    four = ["q", "a", "r", "b"]
    assert marked(template.format_turns(four)) == marked(make(CHATML).format_turns(four))
    assert template.format_turns(["q", "a", "r"]) == template.format_turns(["q", "a", "r", "b"])[:-1]
    without_end = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    assert make(without_end).format_turns(["q", "a"])[-1].text == "a<|im_end|>"
    with pytest.raises(DataError, match="not valid Jinja"):
        make("{% generation %}{{ messages[0].content }}")


def test_a_system_prompt_in_the_last_user_turn():
    row = [{"role": "system", "content": "S"}, user("q"), assistant("a"), user("r"), assistant("b")]
    assert marked(make(MOVES_SYSTEM).format_messages(row)) == (
        "<s>[INST] q [/INST][[ a<|im_end|>]][INST] S\n\nr [/INST][[ b<|im_end|>]]"
    )


def test_a_template_that_always_ends_with_a_header():
    """D29: the header is not learnt."""
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]"
    assert marked(make(source).format_turns(["q", "a", "r", "b"])) == (
        "[user]q\n[assistant][[a]]\n[user]r\n[assistant][[b]]"
    )


def test_the_day_is_fixed(tmp_path):
    """D10: a template that asks for the day is told the day on which the run began, now and in later stages."""
    source = "Today is {{ strftime_now('%d %b %Y') }}.\n" + CHATML
    template = make(source, date="2024-02-20")
    assert template.format_prompt("q").startswith("Today is 20 Feb 2024.")
    template.save(tmp_path)
    again = PromptTemplate.resolve(PromptTemplate.load(tmp_path), SPECIALS)
    assert again == template and again.to_dict()["date"] == "2024-02-20"
    assert PromptTemplate.resolve(source, SPECIALS).date and not make(CHATML).date


def test_tools():
    """D16, D17: tools and calls go through the template, or the row is refused."""
    source = "{% if tools %}Tools: {% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}" + CHATML.replace(
        "{{ m['content'] }}",
        "{{ m['content'] }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}"
        "{{ c.function.arguments | tojson }}</call>{% endfor %}",
    )
    tools = [{"type": "function", "function": {"name": "add", "description": "a & b, <é>"}}]
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"b": 2, "a": 1}'}}
    row = [user("1 + 2?"), assistant("", tool_calls=[call]), {"role": "tool", "content": "3"}, assistant("It is 3.")]
    assert marked(make(source).format_messages(row, tools)) == (
        'Tools: {"type": "function", "function": {"name": "add", "description": "a & b, <é>"}}\n'
        "<|im_start|>user\n1 + 2?<|im_end|>\n"
        '<|im_start|>assistant\n[[<call>add{"b": 2, "a": 1}</call><|im_end|>]]\n'
        "<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n[[It is 3.<|im_end|>]]"
    )
    with pytest.raises(DataError, match="no place for tools: it leaves out the tool 'add'"):
        make(CHATML).format_messages([user("1 + 2?"), assistant("3")], tools)
    with pytest.raises(DataError, match="leaves out the tool calls"):
        make(CHATML).format_messages(row)
    with pytest.raises(DataError, match="Beaver template has no place for tools"):
        PromptTemplate().format_messages(row, tools)
    with pytest.raises(DataError, match="message 2: the Beaver template has no place for tool calls"):
        PromptTemplate().format_messages(row)
    with pytest.raises(DataError, match="message 3: the Beaver template has no place for the role 'tool'"):
        PromptTemplate().format_messages([*row[:1], assistant("x"), row[2], row[3]])


def test_what_a_template_leaves_out_is_refused():
    source = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    with pytest.raises(DataError, match="message 1: .*leaves out the text of the role 'system'"):
        make(source).format_turns(["q", "a"], "Be brief.")
    knows_none = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    with pytest.raises(DataError, match="no system role"):
        make(knows_none).format_turns(["q", "a"], "Be brief.")


def test_a_developer_speaks_as_the_system_unless_the_template_knows_the_role():
    row = [{"role": "developer", "content": "D"}, user("q")]
    assert marked(make(CHATML).format_messages(row)).startswith("<|im_start|>system\nD<|im_end|>")
    knows = "{# developer #}" + CHATML
    assert marked(make(knows).format_messages(row)).startswith("<|im_start|>developer\nD<|im_end|>")
