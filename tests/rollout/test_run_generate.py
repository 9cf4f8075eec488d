"""``alignment generate`` as a user calls it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from alignment.cli import main
from alignment.errors import DataError
from alignment.rollout import run_generate
from tests.tiny import tiny_model_dir


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model_dir(tmp_path_factory.mktemp("model"), "qwen2"))


def run(*argv: str) -> int:
    return main(["generate", *argv])


def test_prompts_from_files_give_records(model: str, tmp_path: Path) -> None:
    rows, lines = tmp_path / "prompts.jsonl", tmp_path / "prompts.txt"
    rows.write_text('{"prompt": "say a word"}\n{"question": "say two words"}\n')
    lines.write_text("say a word\n\nsay two words\n")
    written = []
    for name, file in (("rows", rows), ("lines", lines)):
        out = tmp_path / "out" / f"{name}.jsonl"
        options = ["--max_new_tokens", "6", "--num_return_sequences", "2", "--output", str(out)]
        assert run("--model", model, "--prompts", str(file), *options) == 0
        written.append([json.loads(line) for line in out.read_text().splitlines()])
    assert written[0] == written[1]
    assert [record["prompt"] for record in written[0]] == ["say a word"] * 2 + ["say two words"] * 2
    assert all(1 <= record["tokens"] <= 6 for record in written[0])


def test_prompts_on_the_command_line_are_printed(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", model, "--prompt", "hello", "--greedy", "--max_new_tokens", "3") == 0
    assert capsys.readouterr().out.startswith("> hello\n")


def test_typed_prompts_are_answered_line_by_line(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nhow are you\n"))
    assert run("--model", model, "--max_new_tokens", "3") == 0
    assert capsys.readouterr().out.count("\n") >= 2


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prompt", "x"], ["--model"]),
        (["--model", "/nonexistent", "--prompt", "x"], ["/nonexistent"]),
        (["--model", "{model}", "--prompts", "/nowhere.txt"], ["/nowhere.txt"]),
        (["--model", "{model}", "--prompt", "x", "--temperature", "0"], ["--temperature", "--greedy"]),
        (["--model", "{model}", "--prompt", "x", "--top_p", "2", "--top_k", "-1"], ["--top_p", "--top_k"]),
        (["--model", "{model}", "--prompt", "x", "--max_new_tokens", "100000"], ["--max_new_tokens", "context"]),
        (["--model", "{model}", "--prompt", "x", "--temprature", "1"], ["--temprature"]),
    ],
)
def test_bad_options_give_a_message(
    model: str, argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*(word.replace("{model}", model) for word in argv)) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    for word in words:
        assert word in errors


def test_a_row_without_a_prompt_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "fine"}\n{"text": "no prompt"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl.*2.*plain `text` has no prompt"):
        list(run_generate.read_prompts(str(file)))


def test_a_prompt_that_the_template_cannot_write_is_named(model: str, tmp_path: Path, capsys) -> None:
    rows = [{"prompt": "q"}, {"prompt": "weather?", "tools": [{"type": "function", "function": {"name": "f"}}]}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["generate", "--model", model, "--prompts", str(tmp_path / "p.jsonl")]) == 2
    assert "error: prompt 2 ('weather?'): the Beaver template has no place for tools" in capsys.readouterr().err


def test_rows_are_read_as_in_training(model: str, tmp_path: Path) -> None:
    """P1, P2: instruction and input, history, system prompt and messages make the prompt that training would."""
    rows = [
        {"instruction": "Name it", "input": "the cat", "output": "x"},
        {"instruction": "and this?", "history": [["q", "a"]], "system": "Be brief."},
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answerer = run_generate.Answerer(run_generate.make_parser().parse_args(["--model", model]))
    samples = list(run_generate.read_prompts(str(file)))
    texts = [answerer.encoder.tokenizer.decode(answerer.prompt_ids(sample)) for sample in samples]
    begin = "BEGINNING OF CONVERSATION: "
    assert [text.removeprefix(begin) for text in texts] == [
        "USER: Name it the cat ASSISTANT:",
        "Be brief. USER: q ASSISTANT:a<|endoftext|>USER: and this? ASSISTANT:",
        "USER: hello ASSISTANT:",
    ]
    assert [record["prompt"] for record in answerer.answer(samples[1:])] == ["q\n\na\n\nand this?", "hello"]


def test_a_short_context_leaves_room_for_a_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_model_dir(tmp_path / "model", max_position_embeddings=64)
    assert run("--model", str(folder), "--prompt", "hello", "--greedy") == 0
    assert capsys.readouterr().out.startswith("> hello\n")
