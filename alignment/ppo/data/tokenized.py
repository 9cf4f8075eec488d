"""What the tokenised data sets share: mixture -> samples -> token rows -> an account of it all."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import operator
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from alignment.errors import DataError
from alignment.log import get_logger, say_once
from alignment.ppo.data import chat, encode, messages, rendering, template
from alignment.ppo.data.base import find_class
from alignment.ppo.data.cache import (
    cache_file,
    cache_key,
    read_cache,
    source_fingerprint,
    tokenizer_fingerprint,
    write_cache,
)
from alignment.ppo.data.encode import MALFORMED, Encoded, Encoder, Limits
from alignment.ppo.data.files import BadRow
from alignment.ppo.data.mixture import Source, parse_mixture
from alignment.ppo.data.read_mixture import Loaded, Sample, Samples, deduplicate, identities, load_source, mix, place
from alignment.ppo.data.readers import shorten
from alignment.ppo.data.rows import PROMPT_LIKE
from alignment.ppo.data.summary import DatasetSummary, SourceSummary, counts_text, length_percentiles
from alignment.ppo.data.survey import survey
from alignment.ppo.data.table import CUTS, TokenTable, compact
from alignment.ppo.data.template import PromptTemplate
from alignment.ppo.data.workers import encode_all


class TokenizedDataset(ABC):
    """A mixture of raw data sets as token rows. Use one of its kinds.

    Args:
        names_and_attrs: the mixture: ``{"alpaca": 0.75, "my-data": {"proportion": 0.5, "path": ...}}``, pairs of the
            same, or dataset strings; see :func:`parse_mixture`.
        tokenizer: a paddlenlp tokenizer.
        template: see :meth:`PromptTemplate.resolve`.
        max_length, max_src_len, overlong_prompts, overlong_answers: see :class:`Limits`.
        skip_bad_rows: count malformed rows under "malformed" and go on, where otherwise the first one raises.
        seed: of the rows that a broken proportion draws.
        cache_dir: keep token rows there; None keeps none.
        num_proc: processes to tokenise with.
        show_progress: show a progress bar.
        name: what to call the data set in tables and messages ("train", "eval", ...); by default the names of its
            sources.
        evaluation: ask folders for their validation or test part, where the mixture names none.

    Attributes:
        reads: the files (or data sets) that are read, each with the name of its source.

    Raises:
        DataError: a name is unknown, a file or row cannot be used (file and line are named), or nothing is left after
            filtering.
    """

    KIND: ClassVar[str]
    SEQUENCES: ClassVar[int] = 1
    DEDUPLICATE: ClassVar[bool] = False
    """Whether rows with a prompt that came before (in any source) are taken out before proportions are applied."""

    def __init__(
        self,
        names_and_attrs: Any,
        tokenizer: Any,
        *,
        template: PromptTemplate | str | None = None,
        max_length: int = 2048,
        max_src_len: int | None = None,
        overlong_prompts: str = "truncate",
        overlong_answers: str = "truncate",
        skip_bad_rows: bool = False,
        seed: int = 42,
        cache_dir: str | Path | None = None,
        num_proc: int = 1,
        show_progress: bool = True,
        name: str | None = None,
        evaluation: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = PromptTemplate.resolve(template, tokenizer)
        self.limits = Limits(max_length, max_src_len, overlong_prompts, overlong_answers)
        self.seed = seed
        encoder = Encoder(tokenizer, self.template, self.limits)
        sources = parse_mixture(names_and_attrs, evaluation)
        for source in sources:
            _check_fields(source, self.KIND)
        self.name = name or ", ".join(dict.fromkeys(source.name for source in sources))

        loaded = [load_source(source, skip_bad_rows) for source in sources]
        self.reads = identities(loaded)
        if self.DEDUPLICATE:
            deduplicate(loaded, skip_bad_rows)
        self._sources, origin, rows = mix(loaded, seed)
        # A sample that was taken twice is tokenised once: `unique` holds each (source, row) once, `_sample_of` leads
        # there.
        pairs = list(dict.fromkeys(zip(origin.tolist(), rows.tolist(), strict=True)))
        numbers = {pair: number for number, pair in enumerate(pairs)}
        self._source_of = origin
        self._sample_of = np.array(
            [numbers[p] for p in zip(origin.tolist(), rows.tolist(), strict=True)], dtype=np.int64
        )
        samples: Sequence[Sample] = Samples(loaded, pairs, skip_bad_rows)
        if self.DEDUPLICATE:  # prompts hand their rows to rewards all through the run
            samples = list(samples)
        source_numbers = [source for source, _ in pairs]
        self._survey = survey(samples, source_numbers, len(loaded), self.KIND)

        def encode(number: int) -> Encoded | str | BadRow:
            return compact(self._encode_one(encoder, samples[number], loaded[pairs[number][0]], pairs[number][1]))

        self._table, self._from_cache = self._tokenise(
            encode, samples, cache_dir and Path(cache_dir).expanduser(), num_proc, show_progress, skip_bad_rows
        )
        self._samples = samples if self.DEDUPLICATE else None
        self._kept = np.flatnonzero(self._table.reasons[self._sample_of] == "")
        self._account(loaded)
        #: The first kept sample, to be shown.
        self.example: Any = samples[int(self._sample_of[self._kept[0]])]
        self._count_repeats(source_numbers)
        _say_unread(self._sources, self._survey.unread, self.KIND)

    # ---------------------------------------------------------------- what a kind defines

    @abstractmethod
    def encode(self, encoder: Encoder, sample: Mapping[str, Any]) -> Encoded | str:
        """Tokenise a sample, or return the reason why it is dropped."""

    @abstractmethod
    def item(self, sample: int, position: int) -> dict[str, Any]:
        """Return the item of the table's row ``sample``, at ``position`` of the mixture."""

    @abstractmethod
    def trained_tokens(self, samples: np.ndarray) -> int | None:
        """Return how many tokens of the given rows a loss looks at; None if there is no such loss."""

    def labels(self, samples: np.ndarray) -> dict[str, int]:
        """Return how many of the given rows have which labels, where the kind has some worth counting."""
        return {}

    # ---------------------------------------------------------------- the sequence

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        position = int(self._kept[operator.index(index)])
        return self.item(int(self._sample_of[position]), position)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in range(len(self)):
            yield self[index]

    def select(self: _Self, indices: Sequence[int], name: str | None = None) -> _Self:
        """Return a data set of the given items, in the given order."""
        part = copy.copy(self)
        part._kept = self._kept[np.asarray(indices, dtype=np.int64)]
        part.name = name or self.name
        return part

    def lengths(self) -> np.ndarray:
        """Return int64 [len(self)]: the number of tokens of each item (of a pair, the longer row)."""
        longest = np.max([self._table.lengths(k) for k in range(self.SEQUENCES)], axis=0)
        return longest[self._sample_of[self._kept]]

    def prompt_ids(self) -> np.ndarray:
        """Return uint64 [len(self)]: equal numbers for items with the same prompt, in any data set. Of a conversation
        in which several answers are trained it is the prompt of the first.
        """
        return self._survey.prompts[self._sample_of[self._kept]]

    # ---------------------------------------------------------------- the account

    @property
    def rows_hash(self) -> str:
        """Hash of all token rows, in order, of which tokens are trained, and of the columns that rewards get."""
        digest = hashlib.sha256()
        table = self._table
        for sample in self._sample_of[self._kept].tolist():
            digest.update(np.array([table.prompt_lens[sample], *(t.size for t in table.parts(sample))]).tobytes())
            for part in table.parts(sample):
                digest.update(part.tobytes())
            if self._samples is not None:
                digest.update(json.dumps(self._samples[sample], sort_keys=True, default=_type_name).encode())
        return digest.hexdigest()

    @property
    def summary(self) -> DatasetSummary:
        """What was kept, dropped and cut, and how long it is."""
        samples = self._sample_of[self._kept]
        is_part = len(self._kept) != int((self._table.reasons[self._sample_of] == "").sum())
        reasons = Counter() if is_part else Counter(self._table.reasons[self._sample_of].tolist())
        reasons.pop("", None)
        cuts = self._table.cuts[samples]
        tokens = int(sum(self._table.lengths(k)[samples].sum() for k in range(self.SEQUENCES)))
        trained = self.trained_tokens(samples)
        truncated = {cut: int(((cuts >> bit) & 1).sum()) for bit, cut in enumerate(CUTS)}
        return DatasetSummary(
            name=self.name,
            kind=self.KIND,
            sources=self._source_summaries(is_part),
            rows=len(self._kept) if is_part else len(self._sample_of),
            kept=len(self._kept),
            dropped=dict(sorted(reasons.items())),
            truncated={cut: count for cut, count in truncated.items() if count},
            lengths=length_percentiles(self.lengths()),
            tokens=tokens,
            trained_fraction=None if trained is None else trained / max(tokens, 1),
            from_cache=self._from_cache,
            labels=self.labels(samples),
        )

    def mixture_record(self) -> dict[str, Any]:
        """Return how the data set was put together, as JSON values: for ``data_mixture.json`` in the run's folder."""
        return {
            **self.summary.to_dict(),
            "hash": self.rows_hash,
            "seed": self.seed,
            "limits": asdict(self.limits),
            "template": self.template.to_dict(),
        }

    def _source_summaries(self, is_part: bool) -> list[SourceSummary]:
        kept = np.bincount(self._source_of[self._kept], minlength=len(self._sources))
        reasons = self._table.reasons[self._sample_of]
        found = []
        for number, source in enumerate(self._sources):
            dropped = Counter(reasons[self._source_of == number].tolist())
            dropped.pop("", None)
            taken = int(kept[number]) if is_part else source.taken
            found.append(
                replace(
                    source,
                    taken=taken,
                    kept=int(kept[number]),
                    dropped={} if is_part else dict(sorted(dropped.items())),
                    unread=self._survey.unread[number],
                )
            )
        return found

    def _count_repeats(self, source_numbers: Sequence[int]) -> None:
        """Count rows that say what an earlier one says. Of prompts they are out already; others stay, which is said."""
        if self.DEDUPLICATE:
            return
        repeats = self._survey.repeats(source_numbers)
        pairs = zip(self._sources, repeats, strict=True)
        self._sources = [replace(source, duplicates=count) for source, count in pairs]
        if sum(repeats):
            say_once(
                f"{self.name}: {sum(repeats)} of {len(source_numbers)} rows have the prompt and the answers of an "
                "earlier row; they stay in"
            )

    def _account(self, loaded: Sequence[Loaded]) -> None:
        """Refuse a data set that has nothing left, or a source of which every row is unusable."""
        reasons = self._table.reasons[self._sample_of]
        first = f". The first malformed row: {self._table.messages[0]}" if self._table.messages else ""
        for number, one in enumerate(loaded):
            own = reasons[self._source_of == number]
            if len(own) and (own == MALFORMED).all():
                raise DataError(
                    f"every row of data set {one.source.label!r} that was taken ({len(own)}) is malformed{first}"
                )
        if not len(self._kept):
            dropped = counts_text(Counter(reasons.tolist()))
            raise DataError(
                f"no data is left of {self.name!r} ({self.KIND}) after filtering: {len(reasons)} rows taken, dropped: "
                f"{dropped} (max_length={self.limits.max_length}, max_src_len={self.limits.max_src_len}){first}"
            )

    # ---------------------------------------------------------------- tokenising

    def _encode_one(self, encoder: Encoder, sample: Sample, loaded: Loaded, row: int) -> Encoded | str | BadRow:
        if isinstance(sample, BadRow):
            return sample
        try:
            return self.encode(encoder, sample)
        except DataError as err:
            return BadRow(f"{place(loaded, row)}: {err}{_fitting(sample, self.KIND)}")

    def _tokenise(
        self,
        encode: Callable[[int], Any],
        samples: Sequence[Sample],
        cache_dir: Path | None,
        num_proc: int,
        show_progress: bool,
        skip_bad_rows: bool,
    ) -> tuple[TokenTable, bool]:
        """Return the token table and whether it came from the cache."""
        path, key = None, ""
        if cache_dir:
            key = cache_key(self._cache_facts(), self._survey.digest)
            path = cache_file(cache_dir, type(self).__name__, key)
            arrays = read_cache(path, key)
            if arrays is not None:
                table = TokenTable.from_arrays(arrays, self.SEQUENCES)
                if skip_bad_rows or not table.messages:
                    return table, True
        outcomes = encode_all(
            encode, range(len(samples)), num_proc=num_proc, show_progress=show_progress, title=f"tokenising {self.name}"
        )
        table = TokenTable.build(outcomes, self.SEQUENCES)
        if table.messages and not skip_bad_rows:
            raise DataError(table.messages[0])
        for message in table.messages:
            get_logger().warning("skipped (skip_bad_rows): %s", message)
        if path:
            write_cache(path, key, table.to_arrays())
        return table, False

    def _cache_facts(self) -> dict[str, Any]:
        return {
            "version": source_fingerprint(chat, encode, messages, rendering, template),
            "kind": type(self).__qualname__,
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "template": self.template.to_dict(),
            "specials": [self.template.eos_token, self.template.bos_token],
            "limits": asdict(self.limits),
        }


_Self = TypeVar("_Self", bound=TokenizedDataset)


def _type_name(value: object) -> str:
    return type(value).__name__  # what a data set's author made; its text may hold an address


def _say_unread(sources: Sequence[SourceSummary], unread: Sequence[Mapping[str, int]], kind: str) -> None:
    for source, counts in zip(sources, unread, strict=True):
        if counts:
            where = f"{source.name}{f' ({source.path})' if source.path else ''}, as {kind} data"
            say_once(f"data set {where}: not read: {', '.join(counts)}")
        looks = [name for name in counts if name in PROMPT_LIKE]
        if looks:
            say_once(
                f"data set {where}: {' and '.join(map(repr, looks))} looks like a part of the prompt and is not read. "
                "If the model is to see it, put it into the prompt's column",
                logging.WARNING,
            )


_NEEDS = {
    "preference": ("input", "answer", "other_answer", "better"),
    "safety preference": ("input", "answer", "other_answer", "safer", "is_safe", "is_other_safe"),
    "supervised": ("input", "answer"),
    "prompt only": ("input",),
}


def _check_fields(source: Source, kind: str) -> None:
    """Refuse a data set that is known to lack what the kind needs, before it is loaded."""
    fields = find_class(source.name).FIELDS
    missing = [name for name in _NEEDS[kind] if fields is not None and name not in fields]
    if missing:
        names = " and ".join(f"`{name}`" for name in missing)
        raise DataError(f"data set {source.name!r} has no {names}{_fitting(dict.fromkeys(fields), kind)}")


def _fitting(sample: Mapping[str, Any], kind: str) -> str:
    """Say which kinds of data set a sample that does not fit ``kind`` would fit."""
    has = set(sample)
    if "unusable" in has:
        return f". The row: {shorten(sample.get('extra'))}"
    nulls = [name for name, value in (sample.get("extra") or {}).items() if value is None]
    null = f" (null in this row: {', '.join(map(repr, nulls))})" if nulls else ""
    if set(_NEEDS[kind]) <= has or (kind == "supervised" and {"dialogue", "text"} & has):
        return null
    fits = [f"{name} data" for name, fields in _NEEDS.items() if set(fields) <= has]
    text = f"{null}. Its samples have ({', '.join(sorted(has - {'extra', 'unread'}))})"
    text += f", which fits {' and '.join(fits)}" if fits else ""
    if kind == "preference":
        text += "; preference data are for example PKU-SafeRLHF/train, or a jsonl file with the columns prompt, "
        text += "chosen, rejected"
    if kind == "safety preference":
        text += "; safety preference data are for example PKU-SafeRLHF/train"
    return text
