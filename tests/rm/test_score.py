"""``alignment score``: a user's own texts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from alignment.cli import main
from tests.tiny import preference_rows, tiny_model_dir, write_jsonl


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model with a random head, saved as the runner saves one."""
    from alignment.ppo.models import load_score_model, load_tokenizer, save_model, save_tokenizer

    folder = tmp_path_factory.mktemp("score")
    base = tiny_model_dir(folder / "base")
    save_model(load_score_model(base), folder / "rm")
    save_tokenizer(load_tokenizer(base), folder / "rm")
    return folder / "rm"


def score(model: Path, file: Path, *options: object, capsys: pytest.CaptureFixture) -> tuple[list[dict], str]:
    output = file.with_suffix(".scored")
    command = ["score", "--model", model, "--file", file, "--output", output, "--disable_tqdm", *options]
    assert main([str(part) for part in command]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()], capsys.readouterr().out


def test_pairs_and_answers(reward_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """P17: both scores, the margin and the accuracy of pairs; the same numbers as the answers alone; any batch."""
    pairs = preference_rows(20)
    file = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    rows, told = score(reward_model, file, capsys=capsys)
    assert len(rows) == 20 and all(row["chosen"] == pair["chosen"] for row, pair in zip(rows, pairs, strict=True))
    margins = np.array([row["margin"] for row in rows])
    assert np.allclose(margins, [row["score_chosen"] - row["score_rejected"] for row in rows])
    assert f"20 pairs: accuracy {(margins > 0).mean():.4f}" in told

    single = write_jsonl(tmp_path / "single.jsonl", [{"prompt": p["prompt"], "response": p["chosen"]} for p in pairs])
    alone, told = score(reward_model, single, "--batch_size", 1, capsys=capsys)
    assert np.allclose([row["score"] for row in alone], [row["score_chosen"] for row in rows], atol=1e-6)
    assert "20 answers: score mean" in told


def test_it_agrees_with_the_model(reward_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The score is the head's value at the end token of the text in the folder's template."""
    import paddle

    from alignment.ppo.data import Encoder, Limits, PromptTemplate
    from alignment.ppo.models import end_scores, load_score_model, load_tokenizer

    tokenizer = load_tokenizer(reward_model)
    encoder = Encoder(tokenizer, PromptTemplate.resolve("beaver", tokenizer), Limits(max_length=64))
    ids = encoder.supervised({"input": "the cat", "answer": "is red"}).rows[0]
    assert ids[-1] == tokenizer.eos_token_id
    expected = float(end_scores(load_score_model(reward_model), paddle.to_tensor([ids]), [len(ids)]))
    file = write_jsonl(tmp_path / "one.jsonl", [{"src": "the cat", "tgt": "is red"}])
    rows, _ = score(reward_model, file, "--prompt_template", "beaver", capsys=capsys)
    assert rows[0]["score"] == pytest.approx(expected, abs=1e-6)


def test_a_full_disk_is_an_error_in_words(reward_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Closing the file failed once more, with a traceback."""
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "q", "response": "a"}])
    command = ["score", "--model", str(reward_model), "--file", str(rows), "--output", "/dev/full", "--disable_tqdm"]
    assert main(command) == 2
    assert "error: --output: cannot write /dev/full: No space left on device" in capsys.readouterr().err


def test_rows_with_reasons_of_their_own_do_not_fill_the_screen() -> None:
    from alignment.rm.run_score import Summary

    summary = Summary()
    for number in range(40):
        summary.add({"reason": f"the text holds half a surrogate pair: {number}"})
    for _ in range(3):
        summary.add({"reason": "empty answer"})
    lines = summary.lines()
    assert len(lines) == 9 and lines[0] == "3 rows without a score: empty answer"
    assert lines[-1] == "33 rows without a score for 33 other reasons (`reason` says which)"


def test_rows_that_cannot_be_scored(reward_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """No row is lost: each comes back, with null and the reason; a malformed one stops, or is skipped on request."""
    rows = [
        {"prompt": "the cat", "response": "is red"},
        {"prompt": "the cat", "response": "  "},
        {"prompt": "the dog " * 300, "response": "is blue"},
    ]
    found, told = score(reward_model, write_jsonl(tmp_path / "rows.jsonl", rows), capsys=capsys)
    assert [row["score"] is None for row in found] == [False, True, False]
    assert found[1]["reason"] == "empty answer" and "1 rows without a score: empty answer" in told
    assert "prompt" in found[2]["cut"] and "1 rows were cut" in told
    bad_answer = {"prompt": "the cat", "completion": "is red", "label": False}  # KTO: never trained, but scored
    found, _ = score(reward_model, write_jsonl(tmp_path / "kto.jsonl", [bad_answer]), capsys=capsys)
    assert found[0]["score"] is not None

    bad = write_jsonl(tmp_path / "bad.jsonl", [*rows, {"prompt": "only a prompt"}])
    assert main(["score", "--model", str(reward_model), "--file", str(bad), "--disable_tqdm"]) == 2
    assert "line 4" in capsys.readouterr().err
    found, _ = score(reward_model, bad, "--skip_bad_rows", capsys=capsys)
    assert len(found) == 4 and found[3]["score"] is None and "answer" in found[3]["reason"]

    bad.write_text(
        json.dumps({"prompt": "cut \ud83d", "response": "a"}) + "\n" + json.dumps({"prompt": "q", "response": "a"})
    )
    found, _ = score(reward_model, bad, "--skip_bad_rows", capsys=capsys)  # its own text cannot be written as UTF-8
    assert found[0]["score"] is None and found[0]["prompt"] == "cut \ud83d" and found[1]["score"] is not None
