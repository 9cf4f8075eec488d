"""``alignment score``: what a reward model says of your own answers, row by row, and of pairs how often it is right."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from alignment import runtime
from alignment.cli import CommandParser
from alignment.errors import AlignmentError, ArgumentsError, DataError
from alignment.log import get_logger

CHUNK = 256  # rows that are sorted by length and scored together, then written
SHOWN_REASONS = 8  # many rows may each have a reason of their own, which holds their text


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = CommandParser(prog="alignment score", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of a reward model")
    parser.add_argument(
        "--file",
        required=True,
        metavar="FILE",
        help="rows with a prompt and an answer, or with a prompt and two answers (every layout that training reads)",
    )
    parser.add_argument("--output", metavar="FILE", help="write the scored rows here as JSONL (default: print them)")
    parser.add_argument("--batch_size", type=int, default=16, help="texts scored together; changes no score (16)")
    parser.add_argument("--max_length", type=int, help="tokens of prompt and answer (the model's context)")
    parser.add_argument(
        "--prompt_template",
        help='"beaver", "chat" or a Jinja string (the one saved with the model, else its chat template, else beaver)',
    )
    parser.add_argument("--skip_bad_rows", action="store_true", help="give malformed rows no score, and go on")
    parser.add_argument("--disable_tqdm", action="store_true", help="lines in place of the progress bar")
    return parser


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code.

    Raises:
        AlignmentError: an option, file or model cannot be used.
    """
    options = make_parser().parse_args(argv)
    if options.batch_size < 1:
        raise ArgumentsError("--batch_size must be at least 1")
    with runtime.quiet_import():
        from alignment.ppo.data import RawDataset
        from alignment.tally import Tally

    data = RawDataset.load("jsonl", path=options.file)
    scorer = Scorer(options)
    summary = Summary()
    with (
        _open(options.output) as out,
        Tally("scoring", len(data), bar=not options.disable_tqdm) as progress,
    ):
        for start in range(0, len(data), CHUNK):
            for record in scorer.score(data, range(start, min(start + CHUNK, len(data)))):
                summary.add(record)
                _write(record, out, options.output)
            progress.add(min(CHUNK, len(data) - start))
    print("\n".join(summary.lines()))
    return 0


class Scorer:
    """A reward model with its tokenizer and template.

    Args:
        options: of :func:`make_parser`.

    Raises:
        AlignmentError: the model cannot be used, or ``max_length`` is beyond its context.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        from alignment.engine.engine import Engine
        from alignment.parallel import init_world
        from alignment.ppo.data import Encoder, Limits, PromptTemplate
        from alignment.ppo.models import check_model_folder, load_score_model, load_tokenizer, model_context_length

        check_model_folder(options.model, role="--model")
        tokenizer = load_tokenizer(options.model, role="--model")
        template, _, why = PromptTemplate.for_model(options.prompt_template, tokenizer, options.model)
        get_logger().info("prompt template: %s (%s)", template.describe(), why)
        context = model_context_length(options.model)
        if options.max_length and context and options.max_length > context:
            raise ArgumentsError(f"--max_length {options.max_length}: the context of {options.model} is {context}")
        self.encoder = Encoder(tokenizer, template, Limits(max_length=options.max_length or context or 1 << 20))
        self.pad_id, self.size, self.skip = tokenizer.pad_token_id, options.batch_size, options.skip_bad_rows
        model = load_score_model(options.model, score_type=None, do_normalize=None, new_head="refused", role="--model")
        if model.config.score_type == "critic":
            get_logger().warning("--model: %s is a critic: what it gives are values, and no rewards", options.model)
        self.engine = Engine("reward model", model, init_world())

    def score(self, data: Any, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Score rows of a data set, in their order.

        Yields:
            The row's own columns and ``score``; of a pair ``score_chosen``, ``score_rejected`` and ``margin``. A row
            that cannot be scored has null scores and ``reason``; one that was cut to the length limit has ``cut``.

        Raises:
            DataError: a row is malformed (file and line are named), without ``skip_bad_rows``.
        """
        encoded = [self._encode(data, row) for row in rows]
        texts = [ids for one in encoded for ids in one.texts]
        scores = iter(self._scores(texts))
        for one in encoded:
            found = [next(scores) for _ in one.texts]
            record = dict(one.columns)
            if one.reason:
                record.update(score=None, reason=one.reason)
            elif len(found) == 2:
                record.update(score_chosen=found[0], score_rejected=found[1], margin=found[0] - found[1])
            else:
                record["score"] = found[0]
            if one.cuts:
                record["cut"] = ", ".join(one.cuts)
            yield record

    def _encode(self, data: Any, row: int) -> _Row:
        columns: Mapping[str, Any] = {}
        try:
            sample = {
                name: value for name, value in data[row].items() if name != "good"
            }  # bad answers have scores, too
            columns = sample.get("extra") or {k: v for k, v in sample.items() if isinstance(v, (str, int, float, list))}
            kind = self.encoder.preference if "other_answer" in sample else self.encoder.supervised
            outcome = kind(sample)
        except DataError as error:
            if not self.skip:
                raise DataError(f"--file: {data.where(row)}: {error}") from error
            return _Row(columns, [], str(error), [])
        if isinstance(outcome, str):
            return _Row(columns, [], outcome, [])
        return _Row(columns, outcome.rows, "", outcome.cuts)

    def _scores(self, texts: list[list[int]]) -> list[float]:
        """The score at each text's last token; texts of like length go together, so that padding is small."""
        from alignment.ppo.data.collate import lengths_of, pad_right
        from alignment.ppo.models import Rows, scores_of, take_end

        order = np.argsort([len(ids) for ids in texts], kind="stable")
        groups = [order[start : start + self.size] for start in range(0, len(order), self.size)]
        batches = [[texts[i] for i in group] for group in groups]
        found = self.engine.infer_pass(
            batches,
            lambda batch: Rows(pad_right(batch, self.pad_id), lengths=lengths_of(batch)),
            lambda hidden, batch: take_end(scores_of(self.engine.model, hidden), lengths_of(batch)).numpy(),
        )
        scores = np.zeros(len(texts), np.float32)
        for group, values in zip(groups, found, strict=True):
            scores[group] = values
        return [float(value) for value in scores]


@dataclass
class _Row:
    columns: Mapping[str, Any]
    texts: list[list[int]]
    reason: str
    cuts: list[str]


class Summary:
    """What all rows come to."""

    def __init__(self) -> None:
        self.scores: list[float] = []
        self.pairs: list[tuple[float, float]] = []
        self.reasons: dict[str, int] = {}
        self.cut = 0

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in one row's outcome."""
        self.cut += "cut" in record
        if record.get("reason"):
            self.reasons[record["reason"]] = self.reasons.get(record["reason"], 0) + 1
        elif "margin" in record:
            self.pairs.append((record["score_chosen"], record["score_rejected"]))
        else:
            self.scores.append(record["score"])

    def lines(self) -> list[str]:
        """The account, as text."""
        from alignment.rm.reward_metrics import pair_metrics

        lines = []
        if self.scores:
            low, middle, high = np.quantile(self.scores, (0.05, 0.5, 0.95))
            lines.append(
                f"{len(self.scores)} answers: score mean {np.mean(self.scores):.4f}, deviation "
                f"{np.std(self.scores):.4f}, 5 % {low:.4f}, median {middle:.4f}, 95 % {high:.4f}"
            )
        if self.pairs:
            metrics = pair_metrics(*np.asarray(self.pairs).T)
            lines.append(
                f"{len(self.pairs)} pairs: accuracy {metrics['accuracy']:.4f}, mean margin {metrics['margin']:.4f}, "
                f"calibration error {metrics['calibration_error']:.4f}"
            )
        reasons = sorted(self.reasons.items(), key=lambda item: -item[1])
        lines += [f"{count} rows without a score: {reason}" for reason, count in reasons[:SHOWN_REASONS]]
        if rest := reasons[SHOWN_REASONS:]:
            count = sum(count for _, count in rest)
            lines.append(f"{count} rows without a score for {len(rest)} other reasons (`reason` says which)")
        if self.cut:
            lines.append(f"{self.cut} rows were cut to the length limit (`cut` says where)")
        return lines or ["no rows"]


@contextlib.contextmanager
def _open(path: str | None) -> Iterator[TextIO]:
    """The output file (what was scored stays in it if the command is stopped), or standard output."""
    if path is None:
        yield sys.stdout
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w", encoding="utf-8")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise AlignmentError(f"--output: cannot write {path}: {error.strerror or error}") from error
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):  # every line is flushed: what could not be written was said then
            file.close()


def _can_be_written(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _write(record: Mapping[str, Any], out: TextIO, path: str | None) -> None:
    try:
        line = json.dumps(record, ensure_ascii=False, default=str)
        if not _can_be_written(line):  # half a surrogate pair, for which a row was left out
            line = json.dumps(record, default=str)
        out.write(line + "\n")
        out.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise AlignmentError(f"--output: cannot write {path}: {error.strerror or error}") from error
