"""The engine against paddlenlp's own ``generate`` and the full forward, and what must not depend on batching."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.errors import ModelError
from alignment.ppo.models import final_hidden_states, lm_logits, round_weights
from alignment.rollout import layers
from alignment.rollout.generate import GenerationEngine, GenerationPrompt, cache_bytes
from alignment.rollout.layers import LayerOps, PackedBatch
from alignment.rollout.rollout import Rollout
from alignment.rollout.sampler import SamplingSettings, apply_repetition_penalty, truncated_probabilities
from alignment.rollout.stopping import StopRule
from tests.precision import BF16, same_answers, within
from tests.rollout.conftest import (
    EOS,
    MODELS,
    PAD,
    VOCAB,
    IdTokenizer,
    engine_for,
    make_model,
    make_prompts,
    sampled_from,
)

ModelOf = Callable[[str], paddle.nn.Layer]


def responses(rollout: Rollout) -> list[list[int]]:
    return [rollout.tokens[i, rollout.prompt_len[i] : rollout.lengths[i]].tolist() for i in range(len(rollout))]


def exact_logits(model: paddle.nn.Layer, rows: np.ndarray) -> np.ndarray:
    """``[B, T, V]`` float64 by the training network."""
    with paddle.no_grad():
        return lm_logits(model, final_hidden_states(model, paddle.to_tensor(rows))).numpy().astype(np.float64)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def greedy_by_paddlenlp(model: paddle.nn.Layer, prompt: np.ndarray, count: int) -> list[int]:
    ids = paddle.to_tensor(prompt[None])
    wanted = model.generate(
        ids,
        attention_mask=paddle.ones_like(ids),
        max_new_tokens=count,
        decode_strategy="greedy_search",
        eos_token_id=EOS,
        pad_token_id=PAD,
    )[0][0].tolist()
    return wanted[: wanted.index(EOS) + 1] if EOS in wanted else wanted


@pytest.mark.parametrize("name", list(MODELS))
def test_greedy_equals_paddlenlps_generate(model_of: ModelOf, name: str, way: str) -> None:
    model, prompts = model_of(name), make_prompts([3, 9, 5, 1, 21])
    rollout = engine_for(model, way).generate(prompts, SamplingSettings(30, greedy=True))
    assert same_answers(responses(rollout), [greedy_by_paddlenlp(model, p.input_ids, 30) for p in prompts])


def test_greedy_is_the_same_while_rows_wait_leave_and_take_each_others_place(llama: paddle.nn.Layer) -> None:
    prompts = make_prompts([3, 30, 5, 1, 17, 40, 2, 11])
    engine = engine_for(llama, token_budget=64)
    rollout = engine.generate(prompts, SamplingSettings(20, greedy=True), 2)
    assert engine.figures is not None
    assert engine.figures.capacity < 16 * 20, "the cache was to hold a part of the rows only"
    wanted = [greedy_by_paddlenlp(llama, prompt.input_ids, 20) for prompt in prompts]
    assert same_answers(responses(rollout)[::2], wanted)
    assert responses(rollout)[::2] == responses(rollout)[1::2]


@pytest.mark.parametrize("name", list(MODELS))
def test_logprobs_equal_the_full_forward(model_of: ModelOf, name: str, way: str) -> None:
    model, how = model_of(name), SamplingSettings(20, temperature=0.7, seed=3, min_new_tokens=9)
    rollout = engine_for(model, way).generate(make_prompts([4, 2, 33]), how, 3)
    logprobs = log_softmax(exact_logits(model, rollout.tokens) / 0.7)
    for i in range(len(rollout)):
        start, length = int(rollout.prompt_len[i]), int(rollout.lengths[i])
        wanted = logprobs[i, np.arange(start - 1, length - 1), rollout.tokens[i, start:length]]
        np.testing.assert_allclose(rollout.logprobs[i, : length - start], wanted, atol=within(1e-4, "logprob"))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.8, "min_new_tokens": 0},
        {"top_k": 5},
        {"top_p": 0.7, "temperature": 1.5},
        {"top_k": 30, "top_p": 0.9, "repetition_penalty": 1.3, "temperature": 0.7},
    ],
    ids=str,
)
def test_the_rollout_keeps_the_logprobs_of_the_distribution_that_was_drawn_from(
    llama: paddle.nn.Layer, way: str, options: dict
) -> None:
    how = SamplingSettings(**{"max_new_tokens": 20, "seed": 3, "min_new_tokens": 9, **options})
    rollout = engine_for(llama, way, token_budget=128).generate(make_prompts([4, 2, 33, 11]), how, 3)
    logits, gaps = exact_logits(llama, rollout.tokens), []
    for i in range(len(rollout)):
        start = int(rollout.prompt_len[i])
        for position in range(int(rollout.response_len[i])):
            seen = np.isin(np.arange(VOCAB), rollout.tokens[i, : start + position])
            banned = (EOS,) if position < how.min_new_tokens else ()
            probs = sampled_from(logits[i, start + position - 1], how, banned, seen)
            chance = max(probs[rollout.tokens[i, start + position]], 1e-30)
            gaps.append(abs(rollout.sampler_logprobs[i, position] - np.log(chance)))
    # rounding may put a token at the border of the nucleus on its other side
    assert len(gaps) > 60 and np.mean(np.array(gaps) < within(1e-4, "logprob")) > within(0.98, "learnt accuracy")
    if not how.min_new_tokens:  # nothing changed the distribution
        np.testing.assert_array_equal(rollout.sampler_logprobs, rollout.logprobs)


def test_a_sliding_window_is_kept_in_prefill_and_decoding(way: str) -> None:
    windowed = make_model("mistral")
    windowed.config.sliding_window = 5
    rollout = engine_for(windowed, way).generate(
        make_prompts([9, 3, 6, 50]), SamplingSettings(10, seed=2, min_new_tokens=10)
    )
    logprobs = log_softmax(exact_logits(windowed, rollout.tokens))
    for i in range(4):
        start, length = int(rollout.prompt_len[i]), int(rollout.lengths[i])
        wanted = logprobs[i, np.arange(start - 1, length - 1), rollout.tokens[i, start:length]]
        np.testing.assert_allclose(rollout.logprobs[i, : length - start], wanted, atol=within(1e-4, "logprob"))


def test_the_rollout_does_not_depend_on_batching_or_the_order(llama: paddle.nn.Layer, way: str) -> None:
    prompts, how = make_prompts([3, 9, 5, 1, 7]), SamplingSettings(10, seed=5)
    reference = engine_for(llama, way, batch_size=64, token_budget=4096).generate(prompts, how, 2)
    for size in (1, 2, 3, 7):
        same = engine_for(llama, way, batch_size=size, token_budget=16 * size).generate(prompts, how, 2)
        assert same_answers(responses(same), responses(reference))
        if way == "kernels":  # not a bit differs
            np.testing.assert_array_equal(same.logprobs, reference.logprobs)
    backwards = responses(engine_for(llama, way, batch_size=4).generate(prompts[::-1], how, 2))
    pairs = [backwards[i : i + 2] for i in range(0, 10, 2)][::-1]
    assert same_answers([row for pair in pairs for row in pair], responses(reference))


def test_the_ways_sample_the_same_tokens(llama: paddle.nn.Layer) -> None:
    prompts, how = make_prompts([3, 9, 5, 1, 7]), SamplingSettings(12, seed=9, top_p=0.9, repetition_penalty=1.1)
    by_kernels, by_paddle, plain = (
        responses(engine_for(llama, way).generate(prompts, how, 2)) for way in ("kernels", "paddle", "plain")
    )
    assert same_answers(by_kernels, by_paddle) and same_answers(by_paddle, plain)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_bursts_of_steps_change_nothing(llama: paddle.nn.Layer, penalty: float) -> None:
    """A device looks at what was sampled every few steps only; what lies behind an end is dropped."""
    prompts = make_prompts([3, 9, 5, 1, 7])
    how = SamplingSettings(13, seed=5, temperature=2.0, repetition_penalty=penalty)
    reference = engine_for(llama, "paddle", token_budget=100).generate(prompts, how, 3)
    assert reference.finished.any()
    engine = engine_for(llama, "paddle", token_budget=100)
    assert engine.ops is not None
    engine.ops.burst = 4
    bursts = engine.generate(prompts, how, 3)
    assert responses(bursts) == responses(reference)
    assert bursts.finished.tolist() == reference.finished.tolist()
    np.testing.assert_allclose(bursts.logprobs, reference.logprobs, atol=1e-5)


def test_a_prompt_is_read_once_for_all_its_answers(llama: paddle.nn.Layer) -> None:
    class Counting(LayerOps):
        read = 0

        def prefill(self, tokens: np.ndarray, batch: PackedBatch) -> paddle.Tensor:
            type(self).read += len(tokens)
            return super().prefill(tokens, batch)

    prompts = make_prompts([3, 30, 5])
    for budget in (4096, 64):  # with the small one a prompt's answers do not begin together
        engine = engine_for(llama, "paddle", token_budget=budget)
        assert engine.ops is not None
        Counting.read, engine.ops = 0, Counting(llama, engine.ops.decoder)
        engine.generate(prompts, SamplingSettings(8, seed=1), 6)
        assert Counting.read == 38


def test_steps_follow_the_tokens_that_are_produced(llama: paddle.nn.Layer) -> None:
    """Four answers of 1 to 4 tokens and twelve that wait: no step is made for rows that have ended."""
    base = make_prompts([4] * 16)
    lengths = [1, 2, 3, 4] * 4
    prompts = [
        GenerationPrompt(p.input_ids, p.prompt_index, p.prompt, p.row, n) for p, n in zip(base, lengths, strict=True)
    ]
    engine = engine_for(llama, token_budget=4 * 32)  # four rows at a time
    rollout = engine.generate(prompts, SamplingSettings(20, min_new_tokens=20, seed=1))
    assert rollout.response_len.tolist() == lengths
    assert engine.figures is not None
    assert engine.figures.most_used == 4 * 32
    # 24 tokens come from decoding (the first ones come from prefill), at least 6 and in lockstep batches 12 steps
    assert 6 <= engine.figures.steps <= 9


def test_a_restart_between_two_parts_changes_nothing(llama: paddle.nn.Layer, way: str) -> None:
    prompts, how = make_prompts([3, 9, 5, 1, 7, 12]), SamplingSettings(14, seed=5, temperature=1.3)
    together = responses(engine_for(llama, way).generate(prompts, how, 2))
    parts = [responses(engine_for(llama, way).generate(some, how, 2)) for some in (prompts[:2], prompts[2:])]
    assert [row for part in parts for row in part] == together


def test_what_the_engine_cannot_compute_takes_the_plain_way_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    scaled = make_model("llama", rope_scaling_type="dynamic_ntk", rope_scaling_factor=2.0)
    engine = GenerationEngine(scaled, IdTokenizer(), [EOS], 64, 8)
    prompts = make_prompts([3, 9])
    for _ in range(2):
        rollout = engine.generate(prompts, SamplingSettings(10, greedy=True))
    assert engine.ops is None
    assert same_answers(responses(rollout), [greedy_by_paddlenlp(scaled, p.input_ids, 10) for p in prompts])
    said = capsys.readouterr().err
    assert said.count("paddlenlp's own layers, which is slower: dynamic NTK positions depend on the batch") == 1


def test_the_cache_is_an_eighth_of_a_gpus_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_bytes() == 1 << 30
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    monkeypatch.setattr(paddle.device.cuda, "get_device_properties", lambda: SimpleNamespace(total_memory=80 << 30))
    assert cache_bytes() == 10 << 30


def test_samples_of_one_prompt_differ_and_another_seed_gives_others(llama: paddle.nn.Layer) -> None:
    prompts = make_prompts([4])
    first = responses(engine_for(llama).generate(prompts, SamplingSettings(12, seed=1), 4))
    assert len({tuple(row) for row in first}) > 1
    assert responses(engine_for(llama).generate(prompts, SamplingSettings(12, seed=2), 4)) != first


def test_lengths_and_finished_say_what_happened(llama: paddle.nn.Layer, way: str) -> None:
    how = SamplingSettings(20, seed=8, temperature=2.0)
    rollout = engine_for(llama, way).generate(make_prompts([3, 6, 2, 5]), how, 8)
    ended = 0
    for i, tokens in enumerate(responses(rollout)):
        assert len(tokens) == rollout.response_len[i] >= 1
        assert (tokens[-1] == EOS) == rollout.finished[i]
        assert EOS not in tokens[:-1]
        shown = tokens[:-1] if rollout.finished[i] else tokens
        assert rollout.responses[i] == " ".join(str(token) for token in shown)
        assert rollout.finished[i] or len(tokens) == 20
        ended += int(rollout.finished[i])
        assert (rollout.tokens[i, rollout.lengths[i] :] == PAD).all()
        assert rollout.rows[i] == {"i": i // 8}
    assert 0 < ended < 32
    assert rollout.sample_index.tolist() == list(range(8)) * 4


def test_several_eos_ids_end_an_answer(llama: paddle.nn.Layer, way: str) -> None:
    engine = engine_for(llama, way)
    engine.eos_ids = (EOS, 5, 9)
    rollout = engine.generate(make_prompts([3, 6]), SamplingSettings(30, seed=8, temperature=2.0), 16)
    last = {row[-1] for row, finished in zip(responses(rollout), rollout.finished, strict=True) if finished}
    assert last == {EOS, 5, 9}
    assert not any({EOS, 5, 9} & set(row[:-1]) for row in responses(rollout))


def test_stop_strings_end_an_answer_and_are_cut_from_its_text(llama: paddle.nn.Layer, way: str) -> None:
    plain = engine_for(llama, way).generate(make_prompts([3, 6]), SamplingSettings(20, seed=8), 4)
    row = next(row for row in responses(plain) if len(row) > 6 and EOS not in row)
    stop = f"{row[3]} {row[4]}"
    rollout = engine_for(llama, way).generate(make_prompts([3, 6]), SamplingSettings(20, seed=8, stop=(stop,)), 4)
    stopped = responses(rollout)[responses(plain).index(row)]
    i = responses(rollout).index(stopped)
    assert stopped == row[:5]
    assert rollout.finished[i]
    assert rollout.responses[i] == " ".join(str(token) for token in row[:3]) + " "


def test_pad_equal_to_eos_changes_nothing(llama: paddle.nn.Layer, way: str) -> None:
    prompts, how = make_prompts([3, 9, 5]), SamplingSettings(15, seed=4, temperature=1.5)
    plain = engine_for(llama, way).generate(prompts, how, 3)
    engine = engine_for(llama, way)
    engine.tokenizer = type("PadIsEos", (IdTokenizer,), {"pad_token_id": EOS})()
    same = engine.generate(prompts, how, 3)
    assert responses(same) == responses(plain)
    assert same.response_len.tolist() == plain.response_len.tolist()
    assert same.finished.tolist() == plain.finished.tolist()


def test_the_context_bounds_answers_and_refuses_prompts_that_fill_it(llama: paddle.nn.Layer, way: str) -> None:
    how = SamplingSettings(30, min_new_tokens=30)
    rollout = engine_for(llama, way, context=12).generate(make_prompts([9, 2, 11]), how)
    assert rollout.lengths.tolist() == [12, 12, 12]
    assert not rollout.finished.any()
    with pytest.raises(ModelError, match=r"prompt 100 has 12 tokens, and the model's context is 12"):
        engine_for(llama, way, context=12).generate(make_prompts([12]), SamplingSettings(3))
    with pytest.raises(ModelError, match="has no token"):
        engine_for(llama, way).generate(make_prompts([0]), SamplingSettings(3))


def test_a_row_that_ends_at_the_context_does_not_stop_the_others(llama: paddle.nn.Layer, way: str) -> None:
    """rl 6: on the plain way it rides along for a while; its positions must not pass the model's table."""
    how = SamplingSettings(40, min_new_tokens=40)
    prompts = make_prompts([62, 3, 4, 5, 3, 4, 5, 6])
    together = engine_for(llama, way, context=64).generate(prompts, how)
    assert together.response_len.tolist() == [2] + [40] * 7
    alone = engine_for(llama, way, context=64).generate(prompts[1:], how)
    assert responses(together)[1:] == responses(alone)


def test_a_token_that_the_model_does_not_know_is_refused(llama: paddle.nn.Layer) -> None:
    prompt = GenerationPrompt(np.array([3, 64]), 7, "strange", {})
    with pytest.raises(ModelError, match=r"prompt 7 has the token 64, and the model knows 64 tokens; does the tokeni"):
        engine_for(llama).generate([prompt], SamplingSettings(3))


def test_a_broken_model_is_named(way: str) -> None:
    broken = make_model("llama")
    broken.lm_head.weight.set_value(paddle.full_like(broken.lm_head.weight, float("nan")))
    with pytest.raises(ModelError, match="NaN or infinite logits"):
        engine_for(broken, way).generate(make_prompts([3]), SamplingSettings(3))


def test_weights_are_the_models_own(llama: paddle.nn.Layer) -> None:
    """A change of the parameters is seen by the next rollout without anything being told."""
    model = make_model("llama")
    engine, prompts, how = engine_for(model), make_prompts([3, 5]), SamplingSettings(10, greedy=True)
    before = responses(engine.generate(prompts, how))
    for parameter in model.parameters():
        parameter.set_value(parameter * 1.0 + 0.1 * paddle.randn(parameter.shape))
    if BF16:
        round_weights(model.parameters())
    after = responses(engine.generate(prompts, how))
    assert same_answers(after, [greedy_by_paddlenlp(model, prompt.input_ids, 10) for prompt in prompts])
    assert after != before


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.7},
        {"repetition_penalty": 1.5},
        {"min_new_tokens": 3},
        {"top_k": 6, "top_p": 0.8, "temperature": 1.5, "repetition_penalty": 0.8, "min_new_tokens": 1},
    ],
    ids=str,
)
def test_answers_follow_the_exact_distribution(options: dict, way: str) -> None:
    """Chi-square at p = 1e-4 of the first token and, behind the commonest first token, of the second one."""
    model = make_model("llama", vocab_size=10)
    prompt = GenerationPrompt(np.array([3, 7, 4]), 1, "", {})
    how = SamplingSettings(2, seed=11, **options)
    count = 6000
    engine = engine_for(model, way, batch_size=count, token_budget=1 << 18)
    tokens = engine.generate([prompt], how, count).tokens

    def check(prefix: list[int], position: int, drawn: np.ndarray) -> None:
        logits = exact_logits(model, np.array([prefix]))[:, -1].astype(np.float32)
        seen = np.isin(np.arange(10), prefix)[None]
        apply_repetition_penalty(logits, seen, how.repetition_penalty)
        if position < how.min_new_tokens:
            logits[:, EOS] = -np.inf
        exact = truncated_probabilities(logits, how)[0]
        counts, kept = np.bincount(drawn, minlength=10), exact > 0
        assert not counts[~kept].any()
        expected = len(drawn) * exact[kept]
        # the 0.9999 quantiles of chi-square for 0 to 9 degrees of freedom
        bound = [1e-9, 15.2, 18.5, 21.2, 23.6, 25.8, 27.9, 29.9, 31.9, 33.8][int(kept.sum()) - 1]
        assert ((counts[kept] - expected) ** 2 / expected).sum() <= bound

    first = tokens[:, 3]
    check([3, 7, 4], 0, first)
    commonest = int(np.bincount(first[first != EOS]).argmax())
    check([3, 7, 4, commonest], 1, tokens[first == commonest, 4])


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=7),
    copies=st.integers(1, 3),
    budget=st.integers(1, 300),
    longest=st.integers(1, 24),
    least=st.integers(0, 6),
    temperature=st.sampled_from([0.7, 3.0]),
    seed=st.integers(0, 1000),
    context=st.sampled_from([41, 44, 64]),
)
def test_any_lengths_and_budgets(
    llama: paddle.nn.Layer,
    lengths: Sequence[int],
    copies: int,
    budget: int,
    longest: int,
    least: int,
    temperature: float,
    seed: int,
    context: int,
) -> None:
    """Whatever the sizes: the same rows as with room for all, within their limits, eos at the end and nowhere else."""
    prompts = make_prompts(list(lengths), seed)
    how = SamplingSettings(longest, min_new_tokens=min(least, longest), temperature=temperature, seed=seed)
    rollout = engine_for(llama, context=context, token_budget=budget).generate(prompts, how, copies)
    roomy = engine_for(llama, context=context).generate(prompts, how, copies)
    assert responses(rollout) == responses(roomy)
    np.testing.assert_array_equal(rollout.logprobs, roomy.logprobs)
    for i, tokens in enumerate(responses(rollout)):
        limit = min(longest, context - lengths[i // copies])
        assert 1 <= len(tokens) <= limit
        assert EOS not in tokens[:-1]
        assert rollout.finished[i] == (tokens[-1] == EOS)
        assert rollout.finished[i] or len(tokens) == limit
        assert not rollout.finished[i] or len(tokens) > how.min_new_tokens


def test_the_quick_look_at_a_stop_strings_last_character_misses_none(llama: paddle.nn.Layer) -> None:
    """rl 12: only rows whose newest token can complete a stop string are decoded."""

    class Slow(StopRule):
        def _may_complete(self, token: int) -> bool:
            return True

    class Counting(IdTokenizer):
        calls = 0

        def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
            self.calls += 1
            return super().decode(ids)

    prompts, counts = make_prompts([3, 5, 4, 6]), []
    how = SamplingSettings(40, seed=3, temperature=1.5, stop=("3 1", "27"))
    ends = []
    for rule in (StopRule, Slow):
        engine = engine_for(llama)
        engine.tokenizer = Counting()
        engine._stop = rule(engine.eos_ids, how.stop, engine.tokenizer)
        rollout = engine.generate(prompts, how, 4)
        ends.append((responses(rollout), rollout.finished.tolist(), rollout.responses))
        counts.append(engine.tokenizer.calls)
    assert ends[0] == ends[1] and any(ends[0][1])
    assert counts[0] < counts[1]


@pytest.mark.parametrize("stop", ["\n\n", "é", "漢", "🙂", "st op", "END", " "])
def test_every_completed_stop_string_is_found(stop: str, tmp_path: Path) -> None:
    """rl 12: characters of several bytes come in several tokens."""
    from alignment.ppo.models import load_tokenizer
    from tests.ppo.conftest import write_tokenizer

    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer(f"say the word{stop} and more", add_special_tokens=False)["input_ids"]
    rule = StopRule((0,), (stop,), tokenizer)
    assert any(rule.ends(ids[i], np.array(ids[: i + 1])) for i in range(len(ids)))


def test_special_tokens_stay_in_the_text_where_they_are_asked_for(tmp_path: Path) -> None:
    """P9: all but end and padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from alignment.ppo.models import load_tokenizer

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|pad|>", "<tool>"]
    made.train_from_iterator(["say the word"], trainers.BpeTrainer(special_tokens=special, show_progress=False))
    made.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special[0], "pad_token": special[1]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    ids = [2, *tokenizer("say", add_special_tokens=False)["input_ids"], 1, 0]
    rule = StopRule((0,), (), tokenizer)
    assert rule.text(ids, True) == "say"
    assert rule.text(ids, True, special=True) == "<tool>say"


def test_what_top_k_and_top_p_leave_of_the_policy_is_looked_at(llama: paddle.nn.Layer, way: str) -> None:
    engine = engine_for(llama, way)
    engine.generate(make_prompts([3, 5]), SamplingSettings(12, temperature=1.0))
    assert engine.kept.mean is None
    engine.generate(make_prompts([3, 5]), SamplingSettings(12, min_new_tokens=12, top_k=3))
    narrow = engine.kept.mean
    assert narrow is not None and 3 / 64 < narrow < 1.0
    engine = engine_for(llama, way)
    engine.generate(make_prompts([3, 5]), SamplingSettings(12, min_new_tokens=12, top_p=0.8))
    assert engine.kept.mean >= 0.8


@pytest.mark.parametrize("tied", [False, True])
def test_a_row_of_the_model_that_is_no_token_is_never_sampled(tied: bool, way: str) -> None:
    """P7: the answers are those of a model without such rows, sampled, greedy and with a repetition penalty."""
    cut, padded = make_model("llama", tie_word_embeddings=tied), make_model("llama", tie_word_embeddings=tied, **WIDE)
    state, wide = cut.state_dict(), padded.state_dict()
    for name, tensor in wide.items():
        values = tensor.numpy()
        values[tuple(slice(0, size) for size in state[name].shape)] = state[name].numpy()
        tensor.set_value(values)
    prompts = make_prompts([3, 5, 2])
    for how in (
        SamplingSettings(20, seed=3, temperature=2.0),
        SamplingSettings(20, seed=3, temperature=2.0, top_p=0.9, repetition_penalty=1.2),
        SamplingSettings(20).as_greedy(),
    ):
        mine = engine_for(padded, way, tokens=64).generate(prompts, how, 4)
        theirs = engine_for(cut, way).generate(prompts, how, 4)
        assert responses(mine) == responses(theirs)
        np.testing.assert_allclose(mine.logprobs, theirs.logprobs, atol=1e-5)
    with pytest.raises(ModelError, match="prompt 9 has the token 70, and the model knows 64 tokens"):
        engine_for(padded, way, tokens=64).generate([GenerationPrompt(np.array([70]), 9, "", {})], SamplingSettings(3))


WIDE = {"vocab_size": 83}


def test_an_end_token_that_the_model_does_not_have_is_refused() -> None:
    """rl 8: no answer could end, and the kernel would write behind its buffer."""
    with pytest.raises(ModelError, match="ends answers with token 64, and the model predicts 64 tokens"):
        GenerationEngine(make_model("llama"), IdTokenizer(), [64], 64, 8)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_an_unknown_context_is_the_models_own(model_of: ModelOf, name: str, way: str) -> None:
    """rl 17: without a limit, rows went on behind llama's table of positions (NaN from the kernels)."""
    model = model_of(name)
    reach = model.config.max_position_embeddings
    engine = engine_for(model, way, context=None)
    rollout = engine.generate(make_prompts([3, reach - 5]), SamplingSettings(reach + 50, min_new_tokens=reach + 50))
    assert rollout.lengths.tolist() == [reach, reach]
    with pytest.raises(ModelError, match="no room for an answer"):
        engine.generate(make_prompts([reach]), SamplingSettings(4))


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    tokens=st.integers(1, 120),
)
def test_prompts_are_read_in_groups(lengths: list[int], tokens: int) -> None:
    """rl 21: a prefill's memory grew with the number of prompts."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.concatenate([np.arange(n) for n in lengths])
    batch = PackedBatch(positions, np.arange(starts[-1]) + 7, starts)
    parts = list(batch.parts(tokens))
    assert [first for _, first, _ in parts] == [0, *(last for *_, last in parts[:-1])] and parts[-1][2] == starts[-1]
    np.testing.assert_array_equal(np.concatenate([part.places for part, *_ in parts]), batch.places)
    np.testing.assert_array_equal(np.concatenate([part.positions for part, *_ in parts]), positions)
    assert np.concatenate([np.diff(part.starts) for part, *_ in parts]).tolist() == lengths
    for part, *_ in parts:
        widths = np.diff(part.starts)
        assert len(widths) == 1 or len(widths) * widths.max() <= tokens


def test_groups_of_prompts_are_answered_as_one(model_of: ModelOf, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """rl 21: the answers and their probabilities do not depend on the groups."""
    prompts = make_prompts([3, 9, 5, 1, 21, 12, 7])
    whole = engine_for(model_of("qwen2"), way).generate(prompts, SamplingSettings(10, seed=3))
    monkeypatch.setattr(layers, "PREFILL_TOKENS", 20)
    parts = engine_for(model_of("qwen2"), way).generate(prompts, SamplingSettings(10, seed=3))
    assert responses(parts) == responses(whole)
    np.testing.assert_allclose(parts.logprobs, whole.logprobs, atol=1e-5)
