"""``alignment generate``: answer prompts from a file, the command line or the keyboard, in the saved template."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from alignment.cli import CommandParser
from alignment.errors import AlignmentError, ArgumentsError, DataError
from alignment.log import get_logger, say_once

if TYPE_CHECKING:
    import numpy as np


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = CommandParser(prog="alignment generate", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder (OUTPUT_DIR/policy after PPO)")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    parser.add_argument(
        "--prompts", metavar="FILE", help="prompts: .jsonl/.json (prompt|input|src|question) or text, one a line"
    )
    parser.add_argument("--output", metavar="FILE", help="write JSONL here instead of printing the answers")
    parser.add_argument("--max_new_tokens", type=int, help="longest answer, in tokens (256, or half the context)")
    parser.add_argument("--temperature", type=float, default=1.0, help="sampling temperature (1.0)")
    parser.add_argument("--top_p", type=float, default=1.0, help="nucleus threshold; 1 is off (1.0)")
    parser.add_argument("--top_k", type=int, default=0, help="only the k likeliest tokens; 0 is off (0)")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 discourages repetition (1.0)")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="ends an answer; may be given several times")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token each time")
    parser.add_argument("--num_return_sequences", type=int, default=1, help="answers per prompt (1)")
    parser.add_argument("--batch_size", type=int, help="answers generated together (as many as fit the cache)")
    parser.add_argument("--disable_tqdm", action="store_true", help="lines in place of the progress bar")
    parser.add_argument("--seed", type=int, default=42, help="of the sampling (42)")
    parser.add_argument(
        "--prompt_template",
        help='"beaver", "chat" or a Jinja string (the one saved with the model, else its chat template, else beaver)',
    )
    return parser


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code.

    Raises:
        AlignmentError: an option, file or model cannot be used.
    """
    options = make_parser().parse_args(argv)
    _check(options)
    answerer = Answerer(options)
    if options.prompt or options.prompts:
        prompts = list(options.prompt or []) + (list(read_prompts(options.prompts)) if options.prompts else [])
        records = answerer.answer(prompts)
        if options.output:
            _write(options.output, records)
        else:
            show(records, sys.stdout)
        return 0
    answerer.engine.progress = None  # one answer is its own progress
    return converse(answerer)


def _check(options: argparse.Namespace) -> None:
    wrong = [
        (options.max_new_tokens is not None and options.max_new_tokens < 1, "--max_new_tokens must be at least 1"),
        (options.temperature <= 0, "--temperature must be above 0 (use --greedy for no chance at all)"),
        (not 0 < options.top_p <= 1, "--top_p must be above 0 and at most 1"),
        (options.top_k < 0, "--top_k must not be negative"),
        (options.repetition_penalty <= 0, "--repetition_penalty must be above 0"),
        (options.num_return_sequences < 1, "--num_return_sequences must be at least 1"),
        (options.batch_size is not None and options.batch_size < 1, "--batch_size must be at least 1"),
        ("" in (options.stop or []), "--stop must not be empty"),
    ]
    messages = [message for failed, message in wrong if failed]
    if messages:
        raise ArgumentsError("\n".join(messages))


class Answerer:
    """A model with its tokenizer and template, ready to answer.

    Args:
        options: of :func:`make_parser`.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        from alignment.ppo.data import Encoder, Limits, PromptTemplate
        from alignment.ppo.models import (
            check_model_folder,
            keep_tokens,
            load_causal_lm,
            load_tokenizer,
            model_context_length,
            vocabulary_size,
        )
        from alignment.rollout.generate import GenerationEngine
        from alignment.rollout.sampler import SamplingSettings
        from alignment.rollout.stopping import eos_token_ids

        check_model_folder(options.model, role="--model")
        tokenizer = load_tokenizer(options.model, role="--model")
        template, _, why = PromptTemplate.for_model(options.prompt_template, tokenizer, options.model)
        get_logger().info("prompt template: %s (%s)", template.describe(), why)
        context = model_context_length(options.model)
        longest = options.max_new_tokens or (256 if context is None else max(1, min(256, context // 2)))
        if context is not None and longest >= context:
            raise ArgumentsError(
                f"--max_new_tokens {longest} leaves no room for a prompt: the context of "
                f"{options.model} is {context} tokens"
            )
        limit = (context or 1 << 20) - 1
        self.encoder = Encoder(tokenizer, template, Limits(max_length=limit, max_src_len=limit))
        model = load_causal_lm(options.model, role="--model")
        keep_tokens(model, vocabulary_size(tokenizer))  # rows of the model that are no tokens have no text
        rows = options.batch_size
        eos_ids = eos_token_ids(model, tokenizer)
        self.engine = GenerationEngine(
            model, tokenizer, eos_ids, context, rows or 16, most_rows=rows, progress=not options.disable_tqdm
        )
        self.settings = SamplingSettings(
            max_new_tokens=longest,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            repetition_penalty=options.repetition_penalty,
            greedy=options.greedy,
            seed=options.seed,
            stop=tuple(options.stop or ()),
        )
        self.copies, self.asked = options.num_return_sequences, 0

    def prompt_ids(self, sample: Mapping[str, Any]) -> np.ndarray:
        """Return int64 [len]: a sample's prompt as the model reads it."""
        import numpy as np

        from alignment.ppo.data.encode import prompt_messages

        return np.asarray(self.encoder.prompt_ids(prompt_messages(sample), tools=sample.get("tools")), dtype=np.int64)

    def answer(self, prompts: Iterable[str | list[str] | Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Answer prompts: texts, conversations that end with the user's turn, or samples (``input``, ``system``,
        ``tools``; see :class:`alignment.ppo.data.RawSample`).

        Returns:
            One record per answer: ``prompt``, ``response``, ``finished`` (ended by itself), ``tokens``.

        Raises:
            DataError: the template has no place for something in a prompt (its number is named), or there is none.
        """
        from alignment.ppo.data.encode import prompt_turns
        from alignment.rollout.generate import GenerationPrompt

        rows = []
        for prompt in prompts:
            sample = prompt if isinstance(prompt, Mapping) else {"input": prompt}
            text = "\n\n".join(prompt_turns(sample))
            try:
                ids = self.prompt_ids(sample)
            except DataError as error:
                raise DataError(f"prompt {self.asked + 1} ({text!r:.60}): {error}") from error
            rows.append(GenerationPrompt(ids, self.asked, text, {}))
            self.asked += 1
        if not rows:
            raise DataError("there is no prompt to answer")
        rollout = self.engine.generate(rows, self.settings, self.copies)
        return [
            {
                "prompt": rollout.prompts[i],
                "response": rollout.responses[i],
                "finished": bool(rollout.finished[i]),
                "tokens": int(rollout.response_len[i]),
            }
            for i in range(len(rollout))
        ]


def read_prompts(path: str) -> Iterator[str | Mapping[str, Any]]:
    """Prompts of a file: rows as the ``jsonl`` data set reads them, or one a line of any other file.

    Raises:
        DataError: the file is missing or a row has no prompt.
    """
    from alignment.ppo.data import RawDataset
    from alignment.ppo.data.encode import prompt_messages
    from alignment.ppo.data.readers import format_of
    from alignment.ppo.data.rows import unread_prompt_columns

    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"--prompts: there is no file {path}")
    if format_of(file.name) is None:
        yield from (line for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
        return
    dataset = RawDataset.load("jsonl", path=str(file))
    for i in range(len(dataset)):
        try:
            sample = dataset[i]
            prompt_messages(sample)
        except DataError as error:
            raise DataError(f"--prompts: {dataset.where(i)}: {error}") from error
        for name in unread_prompt_columns(sample):
            say_once(f"--prompts: {name!r} looks like a part of the prompt and is not read", logging.WARNING)
        yield sample


def show(records: list[dict[str, Any]], stream: TextIO) -> None:
    """Print prompts and answers."""
    for record in records:
        note = "" if record["finished"] else "  [cut at --max_new_tokens]"
        print(f"> {record['prompt']}\n{record['response']}{note}\n", file=stream)


def _write(path: str, records: list[dict[str, Any]]) -> None:
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    except OSError as error:
        raise AlignmentError(f"--output: cannot write {path}: {error.strerror or error}") from error


def converse(answerer: Answerer, lines: TextIO | None = None) -> int:
    """Answer what is typed, a line at a time, until the end of the input (Ctrl-D)."""
    source = sys.stdin if lines is None else lines
    if source.isatty():
        print("Type a prompt; Ctrl-D ends.", file=sys.stderr)
    while True:
        if source.isatty():
            print("> ", end="", flush=True)
        line = source.readline()
        if not line:
            return 0
        if line.strip():
            for record in answerer.answer([line.strip()]):
                print(record["response"] + ("" if record["finished"] else " [cut]"), flush=True)
