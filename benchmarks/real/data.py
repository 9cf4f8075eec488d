"""The data of the real model's stages: real rows of GSM8K and HH where a path gives them, and sums from a generator.

Where there is no file, a seeded generator makes rows of the same kind, so that the stage runs; its figures are then no
figures of GSM8K or HH, and every report says so.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignment.errors import AlignmentError

Rows = list[dict[str, Any]]

SFT_ROWS = {"train": 400, "dev": 100}
PAIRS = {"train": 600, "dev": 200}
#: Longest transcript of a pair, in characters: some 200 tokens, which keeps the stage within minutes.
PAIR_LENGTH = 700
HELD_OUT_SUMS = 150
SMALLEST, LARGEST = 2, 49


def sums(seed: int) -> dict[str, Rows]:
    """``What is a + b?`` with a and b from 2 to 49.

    Args:
        seed: of the choice and the order.

    Returns:
        ``train`` and ``dev``: rows with ``prompt`` and ``answer``. No pair of numbers is in both, in neither order.
    """
    draw = random.Random(f"sums {seed}")
    pairs = [(a, b) for a in range(SMALLEST, LARGEST + 1) for b in range(a, LARGEST + 1)]
    draw.shuffle(pairs)
    held_out = [pair if draw.random() < 0.5 else pair[::-1] for pair in pairs[:HELD_OUT_SUMS]]
    train = [order for pair in pairs[HELD_OUT_SUMS:] for order in dict.fromkeys((pair, pair[::-1]))]
    draw.shuffle(train)
    return {"train": [_sum(*pair) for pair in train], "dev": [_sum(*pair) for pair in held_out]}


def _sum(a: int, b: int) -> dict[str, Any]:
    return {"prompt": f"What is {a} + {b}? Reply with the number only.", "answer": str(a + b)}


def solutions(path: Path | None, seed: int) -> dict[str, Rows]:
    """Rows with ``question`` and ``answer``: GSM8K's from ``path``, else :func:`word_problems`."""
    rows = word_problems(seed) if path is None else list(read(path, ("question", "answer")))
    return _split(rows, SFT_ROWS, seed, path)


def pairs(path: Path | None, seed: int) -> dict[str, Rows]:
    """Rows with ``chosen`` and ``rejected``, transcripts as HH writes them: those of ``path`` that are not too long,
    else :func:`manners`.
    """
    rows = manners(seed) if path is None else list(read(path, ("chosen", "rejected")))
    return _split([row for row in rows if max(map(len, map(str, row.values()))) <= PAIR_LENGTH], PAIRS, seed, path)


def read(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The rows of a ``.jsonl`` or ``.jsonl.gz`` file, with these columns alone.

    Raises:
        AlignmentError: the file cannot be read, or a row lacks a column.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                row = json.loads(line)
                if not set(columns) <= set(row):
                    raise AlignmentError(f"{path}, line {number}: the row has no {' and '.join(columns)}")
                yield {name: row[name] for name in columns}
    except (OSError, ValueError, TypeError) as error:
        raise AlignmentError(f"{path} cannot be read: {error}") from error


def _split(rows: Rows, counts: dict[str, int], seed: int, path: Path | None) -> dict[str, Rows]:
    """Draw rows for training and evaluation; rows whose text begins alike (one question) are on one side only."""
    groups: dict[str, Rows] = {}
    for row in rows:
        groups.setdefault(str(row.get("question") or row["chosen"].rpartition("\n\nAssistant:")[0]), []).append(row)
    order = list(groups.values())
    random.Random(f"rows {seed}").shuffle(order)
    result: dict[str, Rows] = {name: [] for name in ("dev", "train")}
    for group in order:
        part = "dev" if len(result["dev"]) < counts["dev"] else "train"
        result[part].extend(group)
    if len(result["train"]) < counts["train"]:
        raise AlignmentError(f"{path} has {len(rows)} usable rows; {sum(counts.values())} are needed")
    return {name: part[: counts[name]] for name, part in result.items()}


def word_problems(seed: int) -> Rows:
    """Problems of two steps with worked solutions, written as GSM8K writes them."""
    draw = random.Random(f"word problems {seed}")
    rows = []
    for number in range(2 * sum(SFT_ROWS.values())):
        name, thing = (
            draw.choice(("Mia", "Tom", "Ana", "Leo", "Zoe")),
            draw.choice(("apples", "books", "coins", "cards")),
        )
        have, bags, each = draw.randint(2, 40), draw.randint(2, 9), draw.randint(2, 9)
        rows.append(
            {
                "question": f"{name} has {have} {thing} and buys {bags} bags with {each} {thing} in each. How many "
                f"{thing} does {name} have on day {number + 1}?",
                "answer": f"The bags hold {bags}*{each} = <<{bags}*{each}={bags * each}>>{bags * each} {thing}.\n"
                f"{name} has {have}+{bags * each} = <<{have}+{bags * each}={have + bags * each}>>{have + bags * each} "
                f"{thing}.\n#### {have + bags * each}",
            }
        )
    return rows


def manners(seed: int) -> Rows:
    """Pairs of a civil and a rude reply, written as HH writes them; one pair in ten is the wrong way round."""
    draw = random.Random(f"manners {seed}")
    civil = ("Of course, I'm happy to help with that.", "Good question! Let me explain.", "Sure, here is what I know.")
    rude = ("What a stupid question.", "Find out yourself, I don't care.", "Why would anybody tell you that?")
    topics = ("bake bread", "repair a bicycle", "learn the piano", "plant a tree", "write a letter", "train a dog")
    rows = []
    for number in range(2 * sum(PAIRS.values())):
        asked = f"\n\nHuman: How do I {draw.choice(topics)} in {number + 2} days?\n\nAssistant: "
        better, worse = draw.choice(civil), draw.choice(rude)
        if draw.random() < 0.1:
            better, worse = worse, better
        rows.append({"chosen": asked + better, "rejected": asked + worse})
    return rows


def write(folder: Path, gsm8k: Path | None, hh: Path | None, seed: int = 1) -> None:
    """Write all files of the stages into ``folder``.

    Raises:
        AlignmentError: a file cannot be read or written.
    """
    files = {"sums": sums(seed), "gsm8k": solutions(gsm8k, seed), "hh": pairs(hh, seed)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, parts in files.items():
            for part, rows in parts.items():
                text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                (folder / f"{name}_{part}.jsonl").write_text(text, encoding="utf-8")
    except OSError as error:
        raise AlignmentError(f"cannot write {folder}: {error.strerror or error}") from error
