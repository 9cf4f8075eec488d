"""Token rows: masks by construction, ends kept, cuts and drops reported."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignment.errors import DataError
from alignment.ppo.data import Encoder, Limits, PromptTemplate
from alignment.ppo.data.encode import Encoded

from .conftest import CHATML

TURNS = st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=6)
RELAXED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def encoder(tokenizer, spec="beaver", max_length=2048, **limits) -> Encoder:
    return Encoder(tokenizer, PromptTemplate.resolve(spec, tokenizer), Limits(max_length, **limits))


def trained_ids(row: Encoded) -> list[int]:
    return [token for token, trained in zip(row.rows[0], row.trained, strict=True) if trained]


def test_answer_and_end_are_learned_and_nothing_else(tokenizer):
    row = encoder(tokenizer).supervised({"input": "hello", "answer": "the lazy dog"})
    assert tokenizer.decode(row.rows[0]) == "BEGINNING OF CONVERSATION: USER: hello ASSISTANT:the lazy dog<|endoftext|>"
    assert tokenizer.decode(trained_ids(row)) == "the lazy dog<|endoftext|>"
    assert row.trained == [False] * row.prompt_len + [True] * (len(row.rows[0]) - row.prompt_len)


def test_every_answer_of_a_dialogue_is_learned_but_of_an_input_only_the_last(tokenizer):
    turns = ["one", "two", "three", "four"]
    dialogue = encoder(tokenizer).supervised({"dialogue": turns})
    context = encoder(tokenizer).supervised({"input": turns[:3], "answer": turns[3]})
    assert dialogue.rows == context.rows
    assert tokenizer.decode(trained_ids(dialogue)) == "two<|endoftext|>four<|endoftext|>"
    assert tokenizer.decode(trained_ids(context)) == "four<|endoftext|>"


def test_chat_template_learns_its_own_end_once(chat_tokenizer):
    row = encoder(chat_tokenizer, "chat").supervised({"dialogue": ["a", "b", "c", "d"], "system": "S"})
    assert chat_tokenizer.decode(trained_ids(row)) == "b<|im_end|>d<|im_end|>"
    assert row.rows[0].count(chat_tokenizer.eos_token_id) == 5 and row.rows[0][-1] == chat_tokenizer.eos_token_id


def test_exactly_one_beginning(bos_tokenizer):
    written = "{{ bos_token }}" + CHATML
    for spec in ("beaver", CHATML, written):
        coder = encoder(bos_tokenizer, spec)
        for row in (
            coder.supervised({"dialogue": ["the fox", "the dog", "quick", "brown"]}).rows[0],
            *coder.preference({"input": "fox", "answer": "dog", "other_answer": "lazy", "better": True}).rows,
            coder.prompt({"input": "the quick fox"}).rows[0],
        ):
            assert row[0] == bos_tokenizer.bos_token_id and row.count(bos_tokenizer.bos_token_id) == 1


def test_no_beginning_where_the_tokenizer_adds_none(tokenizer):
    assert encoder(tokenizer).bos_id is None


@pytest.mark.parametrize("spec", ["beaver", CHATML])
def test_the_prompt_has_the_same_ids_in_every_stage(tokenizer, bos_tokenizer, spec):
    for one in (tokenizer, bos_tokenizer):
        coder = encoder(one, spec)
        for question in ("hello", "  spaced  ", ["a", "b", "c"]):
            sample = {"input": question, "answer": "yes", "other_answer": "no", "better": False}
            prompt = coder.prompt(sample).rows[0]
            for row in (coder.supervised(sample), coder.preference(sample)):
                assert row.prompt_len == len(prompt)
                assert all(ids[: len(prompt)] == prompt for ids in row.rows)


@RELAXED
@given(TURNS)
def test_masks_follow_from_construction_whatever_the_text(tokenizer, turns):
    turns = turns[: len(turns) // 2 * 2]
    coder = encoder(tokenizer, max_length=100_000)
    row = coder.supervised({"dialogue": turns})
    expected = []
    for answer in turns[1::2]:
        ids = coder.text_ids(answer)
        expected += ids if ids[-1] == coder.eos_id else [*ids, coder.eos_id]
    assert trained_ids(row) == expected
    assert row.rows[0][-1] == coder.eos_id


TEMPLATES = {
    "beaver": "beaver",
    "chatml": CHATML,
    "trims": CHATML.replace("m['content']", "m['content'] | trim"),
    "drops the reasoning": CHATML.replace("m['content']", "m['content'].split('</think>')[-1]"),
    "opens the reasoning": CHATML.replace("m['content']", "m['content'].split('</think>')[-1]").replace(
        "<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>\n{% endif"
    ),
    "always a header": CHATML.replace("{% if add_generation_prompt %}", "").replace(
        "assistant\n{% endif %}", "assistant\n"
    ),
}
ANSWERS = st.builds(
    lambda reasoning, rest: f"<think>{reasoning}</think>{rest}" if reasoning is not None else rest,
    st.one_of(st.none(), st.text()),
    st.text(min_size=1).filter(str.strip),
)


@RELAXED
@given(ANSWERS, st.sampled_from(sorted(TEMPLATES)))
def test_every_character_of_an_answer_is_learned_in_any_template(chat_tokenizer, answer, name):
    """P6, D9: no template takes a part of what is to be learnt; white space at the ends may go, as templates trim."""

    def bare(text: str) -> str:
        return "".join(text.split()).replace("<think>", "", 1)  # a prompt may have opened it

    def learned(ids: list[int]) -> str:
        return bare(chat_tokenizer.decode(ids))

    coder = encoder(chat_tokenizer, TEMPLATES[name], max_length=100_000)
    row = coder.supervised({"input": "the fox?", "answer": answer})
    assert bare(chat_tokenizer.decode(coder.text_ids(answer))) in learned(trained_ids(row))
    pair = coder.preference({"input": "the fox?", "answer": answer, "other_answer": answer + "x", "better": True})
    for ids, text in zip(pair.rows, (answer, answer + "x"), strict=True):
        assert bare(chat_tokenizer.decode(coder.text_ids(text))) in learned(ids[pair.prompt_len :])


@RELAXED
@given(st.text(min_size=1).filter(str.strip), st.text(min_size=1).filter(str.strip), st.integers(20, 90))
def test_rows_keep_to_their_limit(tokenizer, bos_tokenizer, question, answer, limit):
    for one in (tokenizer, bos_tokenizer):
        coder = encoder(one, max_length=limit)
        header = coder.text_ids(" ASSISTANT:")
        row = coder.supervised({"input": question, "answer": answer})
        ids, prompt = row.rows[0], row.rows[0][: row.prompt_len]
        assert row.prompt_len < len(ids) <= limit
        assert prompt[-len(header) :] == header[-len(prompt) :]
        assert ("answer cut on the right" in row.cuts) == (ids[-1] != coder.eos_id)
        assert coder.bos_id is None or ids[0] == coder.bos_id
        whole = encoder(one, max_length=100_000).supervised({"input": question, "answer": answer})
        assert row.cuts or ids == whole.rows[0]


def test_a_long_prompt_is_cut_on_the_left(tokenizer):
    text = " ".join(str(number) for number in range(200))
    coder = encoder(tokenizer, max_length=80, max_src_len=40)
    row = coder.prompt({"input": text})
    assert len(row.rows[0]) == 40 and row.cuts == ["prompt cut on the left"]
    assert tokenizer.decode(row.rows[0]).endswith(" 198 199 ASSISTANT:")
    assert encoder(tokenizer, max_src_len=40, overlong_prompts="drop").prompt({"input": text}) == "prompt too long"
    both = {"input": text, "answer": "yes", "other_answer": "no", "better": True}
    for method in ("supervised", "preference"):
        kept = getattr(coder, method)(both)
        assert kept.prompt_len == 40 and kept.rows[0][:40] == row.rows[0]
        assert getattr(encoder(tokenizer, max_src_len=40, overlong_prompts="drop"), method)(both) == "prompt too long"


def test_without_a_prompt_limit_the_answer_claims_up_to_half(tokenizer):
    long = " ".join(["question"] * 300)
    coder = encoder(tokenizer, max_length=100)
    short = coder.supervised({"input": long, "answer": "yes"})
    assert short.prompt_len == 100 - len(coder.text_ids("yes")) - 1 and short.cuts == ["prompt cut on the left"]
    both = coder.supervised({"input": long, "answer": long})
    assert both.prompt_len == 50 and len(both.rows[0]) == 100
    assert both.cuts == ["prompt cut on the left", "answer cut on the right"]


def test_an_answer_that_lost_its_question_is_not_learned(tokenizer):
    """Of a conversation that is cut on the left, the rest of an answer was trained as the beginning of a row."""
    turns = ["a question " * 5, "one two three four five six", "b", "seven"]
    whole = encoder(tokenizer).supervised({"dialogue": turns})
    learned = [index for index, learnt in zip(whole.rows[0], whole.trained, strict=True) if learnt]
    assert tokenizer.decode(learned) == "one two three four five six<|endoftext|>seven<|endoftext|>"
    first = whole.trained.index(True)
    for lost in (first, first + 3):  # the question alone, and some of the answer
        row = encoder(tokenizer, max_length=len(whole.rows[0]) - lost).supervised({"dialogue": turns})
        assert row.cuts == ["prompt cut on the left"] and row.rows[0] == whole.rows[0][lost:]
        learned = [index for index, learnt in zip(row.rows[0], row.trained, strict=True) if learnt]
        assert tokenizer.decode(learned) == "seven<|endoftext|>"


def test_a_cut_answer_has_no_end(tokenizer):
    coder = encoder(tokenizer, max_length=100)
    row = coder.supervised({"input": "a", "answer": "word " * 100})
    assert len(row.rows[0]) == 100 and coder.eos_id not in row.rows[0] and row.cuts == ["answer cut on the right"]


def test_an_overlong_answer_is_cut_or_dropped(tokenizer):
    """A cut answer is trained without its end; overlong_answers=drop leaves such rows out, of every kind."""
    long, short = "word " * 100, {"input": "a", "answer": "yes"}
    drop = encoder(tokenizer, max_length=60, overlong_answers="drop")
    cut = encoder(tokenizer, max_length=60)
    for method, sample in (
        ("supervised", {"input": "a", "answer": long}),
        ("supervised", {"dialogue": ["a", "b", "c", long]}),
        ("supervised", {"text": long}),
        ("preference", {"input": "a", "answer": "b", "other_answer": long, "better": True}),
    ):
        assert getattr(drop, method)(sample) == "answer too long"
        row = getattr(cut, method)(sample)
        assert "answer cut on the right" in row.cuts and max(map(len, row.rows)) == 60
        assert row.rows[-1][-1] != cut.eos_id
    assert drop.supervised(short).rows == cut.supervised(short).rows
    assert drop.prompt({"input": long}).cuts == ["prompt cut on the left"]


def test_an_end_that_the_text_brings_is_not_doubled(tokenizer):
    row = encoder(tokenizer).supervised({"input": "a", "answer": "b<|endoftext|>"})
    assert row.rows[0].count(tokenizer.eos_token_id) == 1


def test_the_better_answer_comes_first(tokenizer):
    sample = {"input": "q", "answer": "one", "other_answer": "two"}
    for better in (True, False):
        row = encoder(tokenizer).preference(sample | {"better": better})
        texts = [tokenizer.decode(ids[row.prompt_len :]) for ids in row.rows]
        assert texts == [f"{'one' if better else 'two'}<|endoftext|>", f"{'two' if better else 'one'}<|endoftext|>"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"answer": "same", "other_answer": "same"}, "identical answers"),
        ({"answer": "same", "other_answer": "same<|endoftext|>"}, "identical answers"),
        ({"answer": "word " * 90 + "x", "other_answer": "word " * 90 + "y"}, "identical after truncation"),
        ({"answer": " ", "other_answer": "b"}, "empty answer"),
        ({"answer": "a", "other_answer": ""}, "empty answer"),
        ({"input": " \n", "answer": "a", "other_answer": "b"}, "empty prompt"),
    ],
)
def test_pairs_that_teach_nothing_are_dropped_for_a_reason(tokenizer, fields, reason):
    sample = {"input": "question", "better": True} | fields
    assert encoder(tokenizer, max_length=60).preference(sample) == reason


def test_empty_questions_and_answers(tokenizer):
    coder = encoder(tokenizer)
    assert coder.supervised({"input": "a", "answer": " "}) == "empty answer"
    assert coder.supervised({"input": " ", "answer": "a"}) == "empty prompt"
    assert coder.prompt({"input": ""}) == "empty prompt"
    assert coder.prompt({"dialogue": ["a", "b"]}).rows == coder.prompt({"input": "a"}).rows


@pytest.mark.parametrize(
    ("method", "sample", "message"),
    [
        ("supervised", {}, "neither `input` nor `dialogue`"),
        ("supervised", {"input": "a", "dialogue": ["a", "b"], "answer": "b"}, "both `input` and `dialogue`"),
        ("supervised", {"input": "a"}, "`answer` is missing"),
        ("supervised", {"input": "a", "answer": 3.5}, "`answer` must be text, not float 3.5"),
        ("supervised", {"dialogue": ["a", "b", "c"]}, "`dialogue` must end with the assistant's answer"),
        ("supervised", {"dialogue": "ab"}, "`dialogue` must be a non-empty list of texts"),
        ("supervised", {"input": ["a", "b"], "answer": "c"}, "`input` must end with the user's turn"),
        ("supervised", {"input": "a", "answer": "b", "system": 3}, "`system` must be text"),
        ("preference", {"input": "a", "answer": "b"}, "`other_answer` is missing"),
        ("preference", {"input": "a", "answer": "b", "other_answer": "c"}, "`better` is missing"),
        (
            "preference",
            {"input": "a", "answer": "b", "other_answer": "c", "better": "yes"},
            "`better` must be true or false",
        ),
        ("prompt", {"answer": "b"}, "`input` is missing"),
        ("prompt", {"input": []}, "`input` must be text or a non-empty list"),
        ("prompt", {"input": ["a", None, "b"]}, "`input` must be text or a non-empty list"),
    ],
)
def test_malformed_samples(tokenizer, method, sample, message):
    with pytest.raises(DataError, match=message):
        getattr(encoder(tokenizer), method)(sample)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_length": 0}, "max_length must be a whole number"),
        ({"max_length": 12.5}, "max_length must be a whole number"),
        ({"max_src_len": -1}, "max_src_len must be a whole number"),
        ({"max_length": 10}, "max_length=10 leaves no room for a prompt: the template's own ' ASSISTANT:' takes"),
        ({"max_src_len": 5}, "max_src_len=5 leaves no room"),
        ({"overlong_prompts": "cut"}, 'overlong_prompts must be "truncate" or "drop"'),
        ({"overlong_answers": "cut"}, 'overlong_answers must be "truncate" or "drop"'),
    ],
)
def test_limits_that_cannot_be_kept(tokenizer, limits, message):
    with pytest.raises(DataError, match=message):
        encoder(tokenizer, **limits)


def test_a_tokenizer_without_end():
    class NoEnd:
        eos_token_id = None

    with pytest.raises(DataError, match="no end-of-sequence token"):
        Encoder(NoEnd(), PromptTemplate(), Limits())
