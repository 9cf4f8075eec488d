"""The pure parts of ``benchmarks/peers``: shapes, prompts, schedules, ratios, the table, and the driver's plan."""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from benchmarks.peers import models, run
from benchmarks.peers.demo_clock import LOOP, steps_done
from benchmarks.peers.table import Comparison, best_of_both, render, summary
from benchmarks.peers.workloads import (
    ANSWERS,
    EOS_ID,
    GSM8K_LENGTHS,
    HEADER,
    LENGTHS,
    PAD_ID,
    TEMPLATE,
    W1,
    W2,
    W3,
    WORKLOADS,
    gemm_shapes,
    parameters,
    prompt_ids,
    prompt_lengths,
    prompt_texts,
    response_lengths,
    training_rows,
)

# ---- workloads --------


def test_the_workloads_are_those_that_the_figures_name() -> None:
    shapes = [(w.vocab, w.hidden, w.intermediate, w.layers, w.heads, w.kv_heads) for w in (W1, W2, W3)]
    assert shapes == [(8192, 256, 704, 8, 8, 4), (32000, 512, 1408, 8, 8, 4), (8192, 256, 704, 8, 8, 4)]
    assert [(w.prompts, w.new_tokens, w.micro_batch) for w in (W1, W2, W3)] == [(64, 64, 16), (32, 64, 8), (64, 64, 16)]
    assert W1.model == W3.model != W2.model
    assert not any(w.shape["tie_word_embeddings"] for w in WORKLOADS.values())
    assert all(w.prompts % w.micro_batch == w.prompts % ANSWERS == 0 for w in WORKLOADS.values())


def test_parameters_are_those_of_paddlenlps_model() -> None:
    import paddle
    from paddlenlp.transformers import Qwen2Config, Qwen2ForCausalLM

    w = WORKLOADS["tiny"]
    paddle.set_device("cpu")
    model = Qwen2ForCausalLM(Qwen2Config(**w.shape))
    assert sum(int(p.size) for p in model.parameters()) == parameters(w, "language")
    head = w.vocab * w.hidden - w.hidden
    assert parameters(w, "score") == parameters(w, "language") - head


@pytest.mark.parametrize("w", WORKLOADS.values(), ids=list(WORKLOADS))
def test_prompts_have_the_lengths_that_were_drawn_and_differ(w) -> None:
    rows = [prompt_ids(text) for text in prompt_texts(w)]
    assert [len(row) for row in rows] == prompt_lengths(w, w.prompts)
    assert w.shortest_prompt <= min(map(len, rows)) and max(map(len, rows)) <= w.longest_prompt
    assert len({tuple(row) for row in rows}) == w.prompts
    assert all(PAD_ID < token < w.vocab for row in rows for token in row)


def test_prompt_lengths_of_w3_fill_their_range() -> None:
    lengths = prompt_lengths(W3, 5000)
    assert (min(lengths), max(lengths)) == (16, 240)
    assert statistics.mean(lengths) == pytest.approx(128, abs=3)
    assert prompt_lengths(W3, 64) == prompt_lengths(W3, 64) != prompt_lengths(W3, 64, seed=1)


def test_response_lengths_are_geometric_and_cut() -> None:
    lengths = response_lengths(W1, 20000)
    assert (min(lengths), max(lengths)) == (1, 64)
    # the mean of a geometric distribution of mean 24 that is cut at 64: 24 * (1 - (23/24)^64)
    assert statistics.mean(lengths) == pytest.approx(24 * (1 - (23 / 24) ** 64), rel=0.03)
    assert sum(length == 64 for length in lengths) / len(lengths) == pytest.approx((23 / 24) ** 63, rel=0.2)
    assert response_lengths(W1, 64) == lengths[:64]


@pytest.mark.parametrize("kind", LENGTHS)
def test_training_rows_have_the_lengths_that_were_asked_for(kind: str) -> None:
    lengths = LENGTHS[kind]
    rows = training_rows(lengths)
    assert len(rows) % 16 == 0
    assert [tuple(map(len, row.supervised())) for row in rows] == list(lengths)
    prompts = [prompt for prompt, _ in lengths]
    pairs = [row.pair() for row in rows]
    assert [len(better) for better, _ in pairs] == [sum(pair) for pair in lengths]
    others = [len(worse) - prompt for (_, worse), prompt in zip(pairs, prompts, strict=True)]
    assert sorted(others) == sorted(answer for _, answer in lengths)
    assert all(better != worse and better[-1] == worse[-1] == EOS_ID for better, worse in pairs)


def test_the_lengths_of_gsm8k_are_those_that_the_file_states() -> None:
    questions, answers = zip(*GSM8K_LENGTHS, strict=True)
    assert (round(statistics.mean(questions), 1), round(statistics.mean(answers), 1)) == (58.5, 92.2)
    assert max(q + a for q, a in GSM8K_LENGTHS) == 360


def test_texts_become_the_same_ids_in_the_toolkit(tmp_path: Path) -> None:
    from alignment.ppo.data import PromptTemplate
    from alignment.ppo.data.encode import Encoder, Limits
    from alignment.ppo.models import load_tokenizer

    models.write_tokenizer(tmp_path, 512)
    tokenizer = load_tokenizer(tmp_path)
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id) == (512, EOS_ID, PAD_ID)
    encoder = Encoder(tokenizer, PromptTemplate.resolve(TEMPLATE, tokenizer), Limits(512))
    text = prompt_texts(WORKLOADS["tiny"])[0]
    assert encoder.prompt_ids([text]) == prompt_ids(text)
    row = training_rows(((9, 5),))[0]
    segments = encoder.template.format_turns([row.prompt, row.answer])
    ids, trained = encoder.segment_ids(segments)
    prompt, answer = row.supervised()
    assert (ids, trained) == (prompt + answer, [False] * len(prompt) + [True] * len(answer))
    assert HEADER in TEMPLATE


def test_gemm_shapes_are_a_forward_and_a_step() -> None:
    assert gemm_shapes(W2) == [(1024, 512, 1408), (1024, 512, 32000), (8, 512, 1408), (8, 512, 32000)]


def test_the_peers_side_needs_the_standard_library_alone(repo: Path) -> None:
    code = (
        "import sys; import benchmarks.peers.workloads, benchmarks.peers.measure, benchmarks.peers.table,"
        "benchmarks.peers.peer_rollout, benchmarks.peers.peer_ppo, benchmarks.peers.peer_training;"
        "print([n for n in ('alignment', 'paddle', 'numpy', 'torch') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=repo, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- table --------


def test_a_ratio_says_how_many_times_better_ours_is() -> None:
    rate = Comparison("rollout", "tokens/s", True, (100.0, 300.0, 200.0), (50.0, 100.0)).figures()
    assert rate["ours"] == {"best": 300.0, "median": 200.0, "count": 3}
    assert rate["ratio"] == {"median": pytest.approx(200 / 75), "best": 3.0}
    seconds = Comparison("iteration", "s", False, (2.0, 4.0), (8.0, 6.0)).figures()
    assert seconds["ratio"] == {"median": pytest.approx(7 / 3), "best": 3.0}
    alone = Comparison("import", "s", False, (0.1,), ()).figures()
    assert alone["peer"] is None and alone["ratio"] == {"median": None, "best": None}
    assert summary((), True) is None


def test_each_side_is_compared_at_the_setting_that_suits_it() -> None:
    small = Comparison("batch 16", "tokens/s", True, (300.0,), (100.0,))
    large = Comparison("batch 64", "tokens/s", True, (200.0,), (150.0,))
    best = best_of_both("best", [small, large])
    assert best is not None and (best.ours, best.peer) == ((300.0,), (150.0,))
    assert best_of_both("best", [Comparison("x", "s", False, (), (1.0,))]) is None


def test_the_table_shows_what_is_missing_and_why() -> None:
    lines = render(
        [
            Comparison("a", "tokens/s", True, (1234.0,), (411.3,)),
            Comparison("b", "s", False, (), (0.0123,), why="cannot"),
            Comparison("c", "s", False, (1.5,), ()),
        ]
    ).splitlines()
    assert lines[1].split() == ["a", "tokens/s", "1234", "(1234)", "411", "(411)", "3.00x", "(3.00x)"]
    assert lines[2].split() == ["b", "s", "cannot", "0.0123", "(0.0123)"]
    assert lines[3].split() == ["c", "s", "1.5", "(1.5)", "-"]


# ---- driver --------


def options(**changes: object) -> argparse.Namespace:
    values = {"workloads": ["W1", "W3"], "only": list(run.TASKS), "iterations": 3}
    empty = {f"{name}_arguments": {} for name in ("engine", "ppo", "grpo", "sft", "rm")}
    return argparse.Namespace(**{**values, **empty, **changes})


def test_a_round_measures_everything_and_later_rounds_what_varies(tmp_path: Path) -> None:
    driver = run.Driver(options(ppo_arguments={"seed": 7}, grpo_arguments={"seed": 8}), tmp_path)
    first, second = [dict(driver.tasks(number)) for number in (0, 1)]
    kinds = ("rollout", "ppo", "grpo")
    assert list(first)[:6] == [(task, w) for w in ("W1", "W3") for task in kinds]
    assert set(first) - set(second) == {("growth", "W1"), ("limits", ""), ("start", "")}
    assert {("sft", "equal"), ("sft", "gsm8k"), ("rm", "equal"), ("rm", "gsm8k")} <= set(second)
    assert [first[task, "W1"]["arguments"] for task in ("ppo", "grpo")] == [{"seed": 7}, {"seed": 8}]
    assert {run["batch"] for run in first["rollout", "W1"]["runs"]} == {16, 64}
    assert len(first["growth", "W1"]["runs"]) == 12
    assert list(dict(run.Driver(options(only=["ppo"]), tmp_path).tasks(0))) == [("ppo", "W1"), ("ppo", "W3")]


def test_the_time_of_other_processes_leaves_out_our_children(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text("cpu  700 100 150 9000 50 20 30 0 0 0\ncpu0 0 0 0 0 0 0 0 0 0 0\n")
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    before = run.busy_seconds(tmp_path)
    busy = 1000 / os.sysconf("SC_CLK_TCK")  # neither idle nor waiting for a disk
    assert before == pytest.approx(busy - children.ru_utime - children.ru_stime)
    subprocess.run([sys.executable, "-c", "while __import__('time').process_time() < 0.3: pass"], check=True)
    assert 0.3 <= before - run.busy_seconds(tmp_path) < 30
    assert run.busy_seconds(tmp_path / "nothing") == 0.0


def rollout_result(seconds: float | None, tokens: int = 4096) -> dict:
    one = {"batch": 16, "lengths": "fixed", "seconds": seconds, "tokens": None if seconds is None else tokens}
    return {"runs": [one if seconds is not None else {**one, "why": "no schedule"}], "parameters": 1}


def test_unequal_work_is_refused() -> None:
    results = {("rollout", "W1", "ours"): [rollout_result(1.0)], ("rollout", "W1", "peer"): [rollout_result(2.0)]}
    first, best = run.compare(results)
    assert first.figures()["ratio"]["median"] == best.figures()["ratio"]["median"] == 2.0
    results["rollout", "W1", "peer"] = [rollout_result(2.0, tokens=4000)]
    with pytest.raises(AssertionError, match="tokens is 4000 and 4096"):
        run.compare(results)


def test_what_our_engine_cannot_do_is_said() -> None:
    results = {("rollout", "W1", "ours"): [rollout_result(None)], ("rollout", "W1", "peer"): [rollout_result(2.0)]}
    (line,) = run.compare(results)
    assert line.figures()["ours"] is None and line.why == "no schedule"


def test_the_watch_reads_the_step_of_the_loop_that_runs(tmp_path: Path) -> None:
    from alignment.flow.loop import Loop

    file = Path(Loop.train.__code__.co_filename)
    assert file.as_posix().endswith(Path(LOOP).as_posix()) and Loop.train.__name__ == "train"
    copy = tmp_path / LOOP  # a loop that stands where the real one does
    copy.parent.mkdir(parents=True)
    copy.write_text("class Loop:\n    def train(self, look):\n        return look()\n")
    names: dict = {}
    exec(compile(copy.read_text(), str(copy), "exec"), names)
    loop, here = names["Loop"](), threading.get_ident()
    loop.state = argparse.Namespace(global_step=3)
    assert loop.train(lambda: steps_done(here)) == 3
    assert steps_done(here) == 0
