"""``alignment score``: what a reward or cost model says of your own answers, row by row, and of pairs how often it is
right.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of a reward or cost model")
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
    summary = Summary(scorer.noun)
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
    """A reward or cost model with its tokenizer and template.

    Args:
        options: of :func:`make_parser`.

    Attributes:
        noun: what it gives: ``"score"``, or ``"cost"``, which rises with how unsafe an answer is.

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
        self.noun = "cost" if model.config.score_type == "cost" else "score"
        self.engine = Engine(f"{model.config.score_type} model", model, init_world())

    def score(self, data: Any, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Score rows of a data set, in their order.

        Yields:
            The row's own columns and ``score``; of a pair ``score_chosen``, ``score_rejected`` and ``margin``. A cost
            model's rows have ``cost``; of a pair with safety labels ``cost_safer``, ``cost_unsafer``, and ``signs``,
            on which side of zero the two belong. The margin is above 0 where the model is right. A row that cannot be
            scored has null scores and ``reason``; one that was cut to the length limit has ``cut``.

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
                record.update({self.noun: None, "reason": one.reason})
            elif len(found) == 2:
                names = ("safer", "unsafer") if one.signs else ("chosen", "rejected")
                record.update({f"{self.noun}_{name}": value for name, value in zip(names, found, strict=True)})
                record["margin"] = found[1] - found[0] if self.noun == "cost" else found[0] - found[1]
                if one.signs:
                    record["signs"] = one.signs
            else:
                record[self.noun] = found[0]
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
            if "other_answer" not in sample:
                outcome = self.encoder.supervised(sample)
            elif self.noun == "cost" and "safer" in sample:
                outcome = self.encoder.safety_preference(sample)
            else:
                outcome = self.encoder.preference(sample)
        except DataError as error:
            if not self.skip:
                raise DataError(f"--file: {data.where(row)}: {error}") from error
            return _Row(columns, reason=str(error))
        if isinstance(outcome, str):
            return _Row(columns, reason=outcome)
        return _Row(columns, outcome.rows, cuts=outcome.cuts, signs=outcome.signs)

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
    texts: list[list[int]] = field(default_factory=list)
    reason: str = ""
    cuts: list[str] = field(default_factory=list)
    signs: list[int] | None = None


class Summary:
    """What all rows come to; ``noun`` as of :class:`Scorer`."""

    def __init__(self, noun: str = "score") -> None:
        self.noun = noun
        self.scores: list[float] = []
        self.margins: list[float] = []
        self.right_signs: list[bool] = []
        self.reasons: dict[str, int] = {}
        self.cut = 0

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in one row's outcome."""
        self.cut += "cut" in record
        if record.get("reason"):
            self.reasons[record["reason"]] = self.reasons.get(record["reason"], 0) + 1
        elif "margin" in record:
            self.margins.append(record["margin"])
            if "signs" in record:
                costs = (record["cost_safer"], record["cost_unsafer"])
                self.right_signs += [cost * sign > 0 for cost, sign in zip(costs, record["signs"], strict=True)]
        else:
            self.scores.append(record[self.noun])

    def lines(self) -> list[str]:
        """The account, as text."""
        from alignment.rm.reward_metrics import calibration

        lines = []
        if self.scores:
            low, middle, high = np.quantile(self.scores, (0.05, 0.5, 0.95))
            lines.append(
                f"{len(self.scores)} answers: {self.noun} mean {np.mean(self.scores):.4f}, deviation "
                f"{np.std(self.scores):.4f}, 5 % {low:.4f}, median {middle:.4f}, 95 % {high:.4f}"
            )
            if self.noun == "cost":
                lines[-1] += f"; {np.mean(np.asarray(self.scores) > 0):.1%} above 0 (unsafe)"
        if self.margins:
            margins = np.asarray(self.margins)
            lines.append(
                f"{len(margins)} pairs: accuracy {(margins > 0).mean():.4f}, mean margin {margins.mean():.4f}, "
                f"calibration error {calibration(margins)['calibration_error']:.4f}"
            )
            if self.right_signs:
                lines[-1] += f", accuracy_sign {np.mean(self.right_signs):.4f}"
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
