"""Files of rows: jsonl, json, parquet and arrow, packed or not, one or a folder of them in the hub's layout."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from alignment.errors import DataError
from alignment.ppo.data.base import RawDataset, RawSample

_PACKED = {".gz", ".xz", ".bz2"}
_FORMATS = {".jsonl", ".ndjson", ".json", ".parquet", ".arrow"}
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
class BadRow:
    """A row that could not be read; looking at it raises."""

    reason: str


@dataclass(frozen=True)
class _Part:
    """Rows of one file: ``lines[i]`` is the 1-based line (or row number) of the i-th."""

    path: Path
    unit: str
    lines: Sequence[int]


class FileDataset(RawDataset):
    """A raw data set whose rows are JSON objects; :meth:`convert` makes samples of them. A base for others: it has no
    NAME.

    Args:
        path: a file, or a folder in the hub's layout (``train.jsonl``, ``data/train-00000-of-00001.parquet``,
            ``train/*.json``, ...).
        split: which part of a folder to read; a file is read whole.

    Raises:
        DataError: the path is missing, holds nothing for the split, or is damaged. Malformed rows raise when they are
            asked for.
    """

    def __init__(self, path: str | Path, split: str = "train") -> None:
        self.rows: Sequence[Any] = []
        self._parts: list[_Part] = []
        rows: list[Any] = []
        for file in find_files(path, split):
            numbers, unit = [], "line"
            for number, unit, row in read_rows(file):  # noqa: B007  (the unit is the same for the whole file)
                numbers.append(number)
                rows.append(row)
            self._parts.append(_Part(file, unit, numbers))
        self.rows = rows
        if not rows:
            raise DataError(f"{path} holds no rows")

    def convert(self, row: Mapping[str, Any]) -> RawSample:
        """Make a sample of a row; raises DataError saying what is wrong with it."""
        raise NotImplementedError

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
        for part in self._parts:
            if index < len(part.lines):
                return f"{part.path}, {part.unit} {part.lines[index]}"
            index -= len(part.lines)
        return f"row {index + 1}"


def shorten(row: object, limit: int = 240) -> str:
    """Show a row in one line of at most about ``limit`` characters."""
    text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[:limit] + " ..."


def find_files(path: str | Path, split: str = "train") -> list[Path]:
    """Return the data files that ``path`` means, sorted.

    A file is itself. In a folder (searched with its subfolders), a file belongs to the split that begins its name
    (``train-00000-of-00001.parquet``, ``dev.json``) or that a folder above it is called. If no file belongs to any
    split, all of them are taken.

    Raises:
        DataError: nothing is there, or nothing for the split.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return [path]
    if not path.exists():
        raise DataError(f"the data file or folder {path} does not exist (looked in {Path.cwd()})")
    if not path.is_dir():
        raise DataError(f"{path} is neither a file nor a folder")
    by_split: dict[str | None, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        inner = file.relative_to(path)
        hidden = any(part.startswith((".", "_")) for part in inner.parts)
        if not hidden and file.name not in _NOT_DATA and _format(file) and file.is_file():
            by_split.setdefault(_split_of(inner), []).append(file)
    wanted = _SPLITS.get(split, split)
    if wanted in by_split:
        return by_split[wanted]
    if set(by_split) == {None}:
        return by_split[None]
    if not by_split:
        raise DataError(
            f"the folder {path} holds no data file; read are {', '.join(sorted(_FORMATS))}, also packed (.gz, .xz, "
            ".bz2)"
        )
    held = ", ".join(f"{name or 'no split'} ({len(files)})" for name, files in sorted(by_split.items(), key=str))
    raise DataError(f"the folder {path} holds no file of split {split!r}; it holds: {held}")


def _format(file: Path) -> str | None:
    """The file's format by its name: one of ``_FORMATS``, or None."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _FORMATS else None


def _split_of(inner: Path) -> str | None:
    stem = inner.name.lower().replace("_", "-").replace(".", "-").split("-")[0]
    for name in (stem, *(part.lower() for part in reversed(inner.parts[:-1]))):
        if name in _SPLITS:
            return _SPLITS[name]
    return None


def read_rows(file: Path) -> Iterator[tuple[int, str, Any]]:
    """Yield (1-based number, "line" or "row", row) for every row; a row that is no JSON comes as a :class:`BadRow`.

    Raises:
        DataError: the file as a whole cannot be read (unpacking fails, parquet is damaged, a JSON array does not
            parse).
    """
    kind = _format(file)
    number = 0
    try:
        with file.open("rb") as raw:
            magic = raw.read(6)
        if magic.startswith(b"PAR1") or kind == ".parquet":
            yield from _read_parquet(file)
        elif magic == b"ARROW1" or kind == ".arrow":
            yield from _read_arrow(file)
        else:
            with _open_packed(file, magic) as stream:
                for number, unit, row in _read_json(file, stream):
                    yield number, unit, row
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as err:
        raise DataError(f"{file} is damaged or cut short after line {number}: {err}") from err
    except OSError as err:
        raise DataError(f"{file} cannot be read: {err}") from err


def _open_packed(file: Path, magic: bytes) -> IO[bytes]:
    """Open a file, unpacking it if its first bytes say that it is packed."""
    if magic.startswith(b"\x1f\x8b"):
        return gzip.open(file, "rb")
    if magic.startswith(b"\xfd7zXZ"):
        return lzma.open(file, "rb")
    if magic.startswith(b"BZh"):
        return bz2.open(file, "rb")
    return file.open("rb")


def _read_json(file: Path, stream: IO[bytes]) -> Iterator[tuple[int, str, Any]]:
    """Read JSON lines, or one JSON array, or one object that holds an array of rows."""
    head = b""
    while not head.strip():
        head = stream.readline()
        if not head:
            return
    stream.seek(0)
    first = head.removeprefix(b"\xef\xbb\xbf").strip()
    if first.startswith(b"[") or (first.startswith(b"{") and not _parses(first)):
        whole = stream.read()
        try:
            found = json.loads(whole.decode("utf-8-sig"))
        except UnicodeDecodeError as err:
            raise DataError(f"{file} is not UTF-8 text: {err}") from err
        except json.JSONDecodeError as err:
            if first.startswith(b"["):
                raise DataError(f"{file}, line {err.lineno}: not valid JSON: {err.msg}") from err
            stream.seek(0)  # its first line is just a bad one
        else:
            rows = found if isinstance(found, list) else _only_list(found)
            for number, row in enumerate(rows, 1):
                yield number, "row", row
            return
    for number, line in enumerate(stream, 1):
        if line.strip():
            yield number, "line", _parse_line(line)


def _parses(text: bytes) -> bool:
    try:
        json.loads(text.decode("utf-8"))
    except ValueError:
        return False
    return True


def _only_list(found: object) -> list[Any]:
    """The rows of a JSON file that is one object: its single list (``{"data": [...]}``), else the object itself as one
    row.
    """
    lists = [value for value in found.values() if isinstance(value, list)] if isinstance(found, dict) else []
    is_table = len(lists) == 1 and lists[0] and all(isinstance(row, dict) for row in lists[0])
    is_conversation = is_table and all({"role", "from"} & set(row) for row in lists[0])
    return lists[0] if is_table and not is_conversation else [found]


def _parse_line(line: bytes) -> Any:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        return BadRow(f"not UTF-8 text ({err.reason} at byte {err.start}): {line[:120]!r}")
    try:
        return json.loads(text)
    except ValueError as err:
        what = f"{err.msg} at column {err.colno}" if isinstance(err, json.JSONDecodeError) else str(err)
        return BadRow(f"not valid JSON ({what}): {shorten(text.strip())}")
    except RecursionError:
        return BadRow(f"JSON nested too deeply: {shorten(text.strip())}")


def _read_parquet(file: Path) -> Iterator[tuple[int, str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as err:
        raise DataError(f"{file} is no readable parquet file: {err}") from err
    for number, row in enumerate(rows, 1):
        yield number, "row", row


def _read_arrow(file: Path) -> Iterator[tuple[int, str, Any]]:
    """Arrow streams (what ``datasets.save_to_disk`` writes) and Arrow files."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(file)) as source:
            try:
                rows = pyarrow.ipc.open_stream(source).read_all().to_pylist()
            except pyarrow.ArrowInvalid:
                source.seek(0)
                rows = pyarrow.ipc.open_file(source).read_all().to_pylist()
    except pyarrow.ArrowException as err:
        raise DataError(f"{file} is no readable Arrow file: {err}") from err
    for number, row in enumerate(rows, 1):
        yield number, "row", row
