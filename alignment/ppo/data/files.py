"""Which files a path means: a file, a pattern, or a folder in the hub's layout; and the data set of their rows.

A split is a whole name. ``train-00000-of-00003.parquet`` and ``train/0001.parquet`` are parts of ``train``;
``train_prefs-00000-of-00001.parquet`` is a split of its own. Where more than one could be meant, an error lists them.
"""

from __future__ import annotations

import glob
import json
import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.errors import DataError, some_of
from alignment.log import say_once
from alignment.ppo.data.base import RawDataset, RawSample
from alignment.ppo.data.readers import FORMATS, PACKED, BadRow, Joined, Rows, format_of, open_rows, shorten

EVALUATION = "validation or test"
"""The split that evaluation asks for: validation if there is one, else test."""
ALL_CONFIGS = "*"
"""As ``config``: the files of all sub-folders together, where the folder's README.md does not say otherwise."""

_NOT_DATA = {
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "config.json",
    "prompt_template.json",
}
_SPLITS = {"train": "train", "training": "train", "test": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev", "eval"), "validation"
)


@dataclass(frozen=True)
class _Found:
    """A file of a folder: the name of its split as it stands ("" without one), which usual split that is (or None), and
    the sub-folder that its data set lies in.
    """

    file: Path
    name: str
    split: str | None
    config: str = ""


class FileDataset(RawDataset):
    """A raw data set whose rows are JSON objects; :meth:`convert` makes samples of them. A base for others: it has no
    NAME.

    Args:
        path: a file, a pattern (``data/*.parquet``), or a folder in the hub's layout (``train.jsonl``,
            ``data/train-00000-of-00001.parquet``, ``train/*.json``, what ``save_to_disk`` writes, ...).
        split: which part of a folder to read; a file is read whole. :data:`EVALUATION`: validation, else test.
        config: of a folder that holds several data sets, the one to read; :data:`ALL_CONFIGS`: all of them.

    Attributes:
        files: the files that are read, in order.
        rows: their rows, read when they are asked for.

    Raises:
        DataError: the path is missing, holds nothing for the split or several things, or is damaged. Malformed rows
            raise when they are asked for.
    """

    def __init__(self, path: str | Path, split: str = "train", config: str | None = None) -> None:
        self.files = find_files(path, split, config)
        self.rows: Sequence[Any] = Joined([open_rows(file) for file in self.files])
        if not self.rows:
            raise DataError(f"{path} holds no rows")

    @abstractmethod
    def convert(self, row: Mapping[str, Any]) -> RawSample:
        """Make a sample of a row; raises DataError saying what is wrong with it."""

    def __getitem__(self, index: int) -> RawSample:
        row = self.rows[index]
        if isinstance(row, BadRow):
            raise DataError(row.reason)
        if not isinstance(row, Mapping):
            raise DataError(f"a row must be an object with named fields, not {type(row).__name__}: {shorten(row)}")
        try:
            return self.convert(row)
        except DataError as err:
            raise DataError(f"{err}. The row: {shorten(row)}") from None

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        if not isinstance(self.rows, Joined) or not 0 <= index < len(self.rows):
            return f"row {index + 1}"
        number, inner = self.rows.find(index)
        part: Rows = self.rows.parts[number]
        return f"{self.files[number]}, {part.unit} {part.numbers[inner]}"


def find_files(path: str | Path, split: str = "train", config: str | None = None) -> list[Path]:
    """Return the data files that ``path`` means, sorted.

    A file is itself, and a pattern is the files that match it. In a folder (searched with its sub-folders) a file
    belongs to the split that its name is without shard numbers (``train-00000-of-00001.parquet``, ``dev.json``), or
    that a folder above it is called. If no file belongs to any split, all of them are taken. A README.md with the hub's
    ``configs`` is followed. Files of which ``save_to_disk`` keeps a list are those of the list.

    Raises:
        DataError: nothing is there, nothing for the split, or more than one thing that the split could mean.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _of_folder(path, split, config)
    if path.exists():
        raise DataError(f"{path} is neither a file nor a folder")
    if glob.has_magic(str(path)):
        return _of_pattern(path)
    raise DataError(f"the data file or folder {path} does not exist (looked in {Path.cwd()})")


def _of_pattern(path: Path) -> list[Path]:
    files = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    files = [file for file in files if file.is_file() and _is_data(Path(file.name))]
    if not files:
        raise DataError(f"no data file matches {path} (looked in {Path.cwd()}); read are {', '.join(FORMATS)}")
    splits = {_describe(Path(file.name), file).split for file in files} - {None}
    if len(splits) > 1:
        listed = some_of((file.name for file in files), 6)
        raise DataError(f"{path} matches files of several splits ({listed}); narrow it, or name the folder")
    return files


def _of_folder(folder: Path, split: str, config: str | None) -> list[Path]:
    card = _read_card(folder)
    everything = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    saved = _saved_lists(everything)
    data = [
        file
        for file in everything
        if _is_data(file.relative_to(folder)) and (file.parent not in saved or file.name in saved[file.parent])
    ]
    found = card or [_describe(file.relative_to(folder), file) for file in data]
    if not found:
        held = some_of((file.name for file in everything if not file.name.startswith(".")), 6)
        raise DataError(
            f"the folder {folder} holds no data file; read are {', '.join(FORMATS)}, the text formats also packed "
            f"({', '.join(PACKED)}). It holds: {held}"
        )
    chosen = _choose_split(folder, _choose_config(folder, found, split, config, bool(card)), split)
    files = [one.file for one in chosen]
    unread = [str(file.relative_to(folder)) for file in everything if format_of(file.name) and file not in files]
    unread = [name for name in unread if Path(name).name not in _NOT_DATA and not _is_hidden(Path(name))]
    if unread:
        read = some_of((str(file.relative_to(folder)) for file in files), 6)
        say_once(
            f"the folder {folder}: of split {chosen[0].name or split} is read {read}; not read: {some_of(unread, 6)}"
        )
    return files


def _is_hidden(inner: Path) -> bool:
    return any(part.startswith((".", "_")) for part in inner.parts)


def _is_data(inner: Path) -> bool:
    """Whether a file may hold rows. ``cache-*`` and ``tmp*`` are what ``datasets.map`` leaves in a saved folder."""
    left_over = inner.name.startswith(("cache-", "tmp"))
    return bool(format_of(inner.name)) and not _is_hidden(inner) and inner.name not in _NOT_DATA and not left_over


def _saved_lists(files: Iterable[Path]) -> dict[Path, set[str]]:
    """The files of each folder that ``datasets.save_to_disk`` wrote, by its ``state.json``."""
    lists = {}
    for file in files:
        if file.name == "state.json":
            try:
                listed = json.loads(file.read_text(encoding="utf-8"))["_data_files"]
                lists[file.parent] = {one["filename"] for one in listed}
            except (ValueError, KeyError, TypeError):
                continue  # some other state.json
            missing = [name for name in lists[file.parent] if not (file.parent / name).is_file()]
            if missing:
                raise DataError(f"{file} lists {some_of(missing, 6)}, which the folder lacks; copy it again")
    return lists


def _describe(inner: Path, file: Path) -> _Found:
    """Say which split and sub-folder a file belongs to by its path inside the folder."""
    name = inner.name
    for suffix in reversed(inner.suffixes):
        if suffix.lower() in (*PACKED, *FORMATS):
            name = name[: -len(suffix)]
    levels = [_without_shard(name), *reversed(inner.parts[:-1])]
    for number, level in enumerate(levels):
        split = _split_of(level)
        if split:
            above = list(inner.parts[: len(levels) - 1 - number]) if number else list(inner.parts[:-1])
            return _Found(file, level, split, "/".join(part for part in above if part != "data"))
    return _Found(file, levels[0], None)


def _without_shard(stem: str) -> str:
    """``train-00000-of-00003-0a1b`` and ``train-3`` are parts of ``train``."""
    stem = re.sub(r"[-_.]\d+-of-\d+.*$", "", stem)
    return re.sub(r"[-_.](?:part|shard)?[-_.]?\d+$", "", stem)


def _split_of(name: str) -> str | None:
    """The usual split that a name is or has as one of its words; None without one or with several."""
    if name.lower() in _SPLITS:
        return _SPLITS[name.lower()]
    words = {_SPLITS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLITS}
    return words.pop() if len(words) == 1 else None


def _choose_config(folder: Path, found: list[_Found], split: str, wanted: str | None, has_card: bool) -> list[_Found]:
    """The files of one data set of the folder, of those that have the split at all."""
    asked = {"validation", "test"} if split == EVALUATION else {split, _SPLITS.get(split.lower())} - {None}
    have_it = [one for one in found if {one.name, one.split} & asked and (one.split or has_card)]
    configs = sorted({one.config for one in have_it})
    named = wanted if wanted != ALL_CONFIGS else None
    if configs in ([], [""]) or (len(configs) == 1 and named in (None, *configs)):
        return found
    if wanted == ALL_CONFIGS and not has_card:
        return found
    choice = named or "default"
    if choice in configs:
        return [one for one in found if one.config == choice]
    holds = f"no data set {named!r}; it holds" if named else "several data sets"
    listed = ", ".join(config or "(the folder itself)" for config in configs)
    example = json.dumps({"jsonl": {"path": str(folder), "config": next(config for config in configs if config)}})
    every = "" if has_card else f', or all of them: "config": "{ALL_CONFIGS}"'
    raise DataError(f"the folder {folder} holds {holds}: {listed}. Choose one: {example}{every}")


def _choose_split(folder: Path, found: list[_Found], wanted: str) -> list[_Found]:
    """The files of a split, or of the only one whose name has it as a word."""
    if all(one.split is None for one in found) and wanted in ("train", EVALUATION):
        return found
    for split in ("validation", "test") if wanted == EVALUATION else (wanted,):
        usual = _SPLITS.get(split.lower())
        exact = [one for one in found if one.name == split or (usual and _SPLITS.get(one.name.lower()) == usual)]
        if exact:
            return exact
        candidates = [one for one in found if usual and one.split == usual]
        names = sorted({one.name for one in candidates})
        if len(names) == 1:
            return candidates
        if names:
            raise DataError(
                f"the folder {folder} has no split named {split!r} but several that could be meant: "
                f"{', '.join(names)}. Choose one: {_choosing(folder, names[0])}"
            )
    counts: dict[str, int] = {}
    for one in found:
        label = one.name if one.split else "no split"
        counts[label] = counts.get(label, 0) + 1
    held = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
    names = sorted({one.name for one in found if one.split})
    held += "; eval_split_ratio would hold out some of the training rows" if wanted == EVALUATION and names else ""
    cure = f". To read one of these: {_choosing(folder, names[0])}" if names else ", which are read without a `split`"
    raise DataError(f"the folder {folder} holds no file of split {wanted!r}; it holds: {held}{cure}")


def _choosing(folder: Path, split: str) -> str:
    return f"{json.dumps({'jsonl': {'path': str(folder), 'split': split}})}, or a pattern: jsonl::{folder}/**/{split}*"


def _read_card(folder: Path) -> list[_Found]:
    """The files that the hub's dataset card (the YAML head of README.md) gives to configs and splits; empty without."""
    card = folder / "README.md"
    head = re.match(r"---\s*\n(.*?)\n---", card.read_text("utf-8", "replace"), re.DOTALL) if card.is_file() else None
    if head is None or "configs:" not in head[1]:
        return []
    import yaml

    try:
        configs = yaml.safe_load(head[1]).get("configs") or []
        flagged = [one["config_name"] for one in configs if one.get("default")]
        found = []
        for one in configs:
            name = "default" if flagged[:1] == [one["config_name"]] else one["config_name"]
            for split, pattern in _card_patterns(one["data_files"]):
                base = folder / (one.get("data_dir") or "")
                for file in sorted(base.glob(pattern.removeprefix("./"))):
                    if file.is_file() and format_of(file.name):
                        found.append(_Found(file, split, _split_of(split) or split, name))
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError):
        say_once(f"{card}: its `configs` could not be understood; files are found by their names")
        return []
    return found


def _card_patterns(data_files: Any) -> list[tuple[str, str]]:
    """``data_files`` of a dataset card as (split, pattern) pairs."""
    if isinstance(data_files, str) or (
        isinstance(data_files, list) and all(isinstance(one, str) for one in data_files)
    ):
        data_files = [{"split": "train", "path": data_files}]
    pairs = []
    for one in data_files:
        paths = [one["path"]] if isinstance(one["path"], str) else one["path"]
        pairs += [(str(one["split"]), str(path)) for path in paths]
    return pairs
