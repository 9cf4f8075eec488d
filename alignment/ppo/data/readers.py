"""The rows of one file: JSON lines, JSON, csv, tsv, parquet and Arrow; the text formats also packed.

A file is opened once, and its rows are read when they are asked for: of JSON lines, parquet and Arrow files only the
part in use is in memory, so that a folder may be larger than it.

Parquet and Arrow are read with ``pyarrow`` itself. ``datasets.load_dataset`` would write an Arrow copy of every file
and find that copy again by the file's path and time alone. Of csv it makes types: the answer ``007`` becomes 7.0 and
the answer ``NA`` becomes null. Here a cell is the text that stands in the file.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

from alignment.errors import DataError

PACKED = (".gz", ".xz", ".bz2", ".zst")
TEXT_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
FORMATS = (*TEXT_FORMATS, ".parquet", ".arrow")
_MAGIC = {b"\x1f\x8b": "gz", b"\xfd7zXZ": "xz", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zst"}
_BLOCK = 512  # rows that are read together

# What is often meant as data but is not read, and what to do about it.
_TO_JSONL = ".to_json('rows.jsonl', orient='records', lines=True)"
_CONVERT = {
    ".xlsx": f"python -c \"import pandas; pandas.read_excel('{{file}}'){_TO_JSONL}\"",
    ".xls": f"python -c \"import pandas; pandas.read_excel('{{file}}'){_TO_JSONL}\"",
    ".pkl": f"python -c \"import pandas; pandas.read_pickle('{{file}}'){_TO_JSONL}\"",
    ".pickle": f"python -c \"import pandas; pandas.read_pickle('{{file}}'){_TO_JSONL}\"",
    ".feather": f"python -c \"import pandas; pandas.read_feather('{{file}}'){_TO_JSONL}\"",
    ".zip": "unzip '{file}'",
    ".tar": "tar -xf '{file}'",
    ".tgz": "tar -xf '{file}'",
    ".txt": "python -c \"import json; [print(json.dumps(dict(text=line.rstrip()))) for line in open('{file}')]\"",
}
# One JSON object is a table of rows if it holds one list of objects, and none of these, which a row itself would have.
_ROW_COLUMNS = {
    "prompt", "question", "instruction", "input", "query", "problem", "src", "text", "messages", "conversation",
    "conversations", "chosen", "context",
}  # fmt: skip


class BadRow:
    """A row that could not be read; looking at it raises."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BadRow) and other.reason == self.reason

    __hash__ = None  # type: ignore[assignment]


class Rows(Sequence[Any]):
    """The rows of one file.

    Attributes:
        unit: what ``numbers`` count: "line" or "row".
        numbers: the 1-based number of each row in its file.
    """

    unit: str = "row"
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))


class Joined(Sequence[Any]):
    """Rows of several files, one after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self.parts = parts
        self._starts = [0, *accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: Any) -> Any:
        number, inner = self.find(range(len(self))[index])
        return self.parts[number][inner]

    def find(self, index: int) -> tuple[int, int]:
        """Return (number of the part, row within it) of row ``index``."""
        number = bisect_right(self._starts, index) - 1
        return number, index - self._starts[number]


def shorten(row: object, limit: int = 240) -> str:
    """Show a row in one line of at most about ``limit`` characters."""
    text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=str)
    text = text.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair cannot be printed
    return text if len(text) <= limit else text[:limit] + " ..."


def format_of(name: str) -> str | None:
    """A file's format by its name: one of :data:`FORMATS`, or None."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def open_rows(file: Path) -> Rows:
    """Open a file of rows; its format is known by its first bytes, then by its name, else it is JSON.

    A row that is no JSON (or a csv line with too many cells) comes as a :class:`BadRow`.

    Raises:
        DataError: the file as a whole cannot be read (unpacking fails, parquet is damaged, a JSON array does not
            parse), or its format is not one that is read; the message says how to convert it.
    """
    kind = format_of(file.name)
    try:
        with file.open("rb") as raw:
            magic = raw.read(64)
        if magic.startswith(b"version https://git-lfs"):
            raise DataError(f"{file} is a Git LFS pointer and not the data itself; fetch it with `git lfs pull`")
        if magic.startswith(b"PAR1") or kind == ".parquet":
            return _Parquet(file)
        if magic.startswith(b"ARROW1") or kind == ".arrow":
            return _Arrow(file)
        if kind is None and file.suffix.lower() in _CONVERT:
            how = _CONVERT[file.suffix.lower()].format(file=file)
            raise DataError(f"{file}: {file.suffix} files are not read ({', '.join(FORMATS)} are); convert it: {how}")
        packed = next((name for start, name in _MAGIC.items() if magic.startswith(start)), None)
        source: Path | bytes = _unpack(file, packed) if packed else file
        _check_encoding(file, source if isinstance(source, bytes) else magic)
        if kind in (".csv", ".tsv"):
            return _Table(file, source, kind)
        return _open_json(file, source)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as err:
        raise DataError(f"{file} is damaged or cut short: {err}") from err
    except OSError as err:
        raise DataError(f"{file} cannot be read: {err}") from err


def _unpack(file: Path, packed: str) -> bytes:
    if packed == "zst":
        return _unpack_zst(file.read_bytes())
    opener = {"gz": gzip.open, "xz": lzma.open, "bz2": bz2.open}[packed]
    with opener(file, "rb") as stream:  # type: ignore[operator]
        return stream.read()


def _unpack_zst(data: bytes) -> bytes:
    """All frames of a zstd file. The library's stream reader takes a file that was cut short for a whole one."""
    import zstandard

    parts = []
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            parts.append(frame.decompress(data))
        except zstandard.ZstdError as err:
            raise EOFError(str(err)) from err
        if not frame.eof:
            raise EOFError("the last zstd frame has no end")
        data = frame.unused_data
    return b"".join(parts)


def _check_encoding(file: Path, start: bytes) -> None:
    """Refuse UTF-16, which has a mark in front or a zero byte beside every ASCII character."""
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or (len(start) > 1 and 0 in start[:2]):
        raise DataError(
            f"{file} is not UTF-8 text but UTF-16; convert it: iconv -f UTF-16 -t UTF-8 '{file}' > utf8.jsonl"
        )


def _stream(source: Path | bytes) -> IO[bytes]:
    return io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")


# ---------------------------------------------------------------- JSON


def _open_json(file: Path, source: Path | bytes) -> Rows:
    """JSON lines, or one JSON array, or one object that holds an array of rows."""
    with _stream(source) as stream:
        first = b""
        while not first.strip():
            first = stream.readline()
            if not first:
                return _Whole([])
        first = first.removeprefix(b"\xef\xbb\xbf").strip()
        value, parses = _parsed(first)
        if parses and isinstance(value, dict):
            # One line is a row, or a table written on one line; in a file that calls itself JSON lines it is a row.
            single = ".jsonl" not in file.suffixes and not any(line.strip() for line in stream)
            return _Whole(_table_of(value)) if single and _table_of(value) != [value] else _Lines(source)
        if not first.startswith((b"[", b"{")):
            return _Lines(source)
        stream.seek(0)
        whole = stream.read()
    try:
        found = json.loads(whole.decode("utf-8-sig"))
    except UnicodeDecodeError as err:
        raise DataError(f"{file} is not UTF-8 text: {err}") from err
    except json.JSONDecodeError as err:
        if err.msg == "Extra data" and not parses:
            cure = f"write one object a line: jq -c . '{file}' > rows.jsonl"
            raise DataError(f"{file}, line {err.lineno}: a second JSON value begins here; {cure}") from err
        if first.startswith(b"[") and not parses:
            raise DataError(f"{file}, line {err.lineno}: not valid JSON: {err.msg}") from err
        return _Lines(source)  # the first line is just a bad one
    return _Whole(found if isinstance(found, list) else _table_of(found))


def _parsed(text: bytes) -> tuple[Any, bool]:
    try:
        return json.loads(text.decode("utf-8")), True
    except (ValueError, RecursionError):
        return None, False


def _table_of(found: dict[str, Any]) -> list[Any]:
    """The rows of a JSON file that is one object: its single list of objects (``{"version": 1, "data": [...]}``), else
    the object itself as one row.
    """
    lists = [value for value in found.values() if isinstance(value, list)]
    is_table = len(lists) == 1 and lists[0] and all(isinstance(row, dict) for row in lists[0])
    return lists[0] if is_table and not _ROW_COLUMNS & set(found) else [found]


class _Whole(Rows):
    """Rows that had to be read together."""

    def __init__(self, rows: list[Any]) -> None:
        self._rows = rows
        self.numbers = range(1, len(rows) + 1)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]


class _Lines(Rows):
    """JSON lines: only where each line begins and ends is kept, and the block of lines that was read last."""

    unit = "line"

    def __init__(self, source: Path | bytes) -> None:
        self._source = source
        numbers, starts, ends = array("q"), array("q"), array("q")
        at = 0
        with _stream(source) as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    numbers.append(number)
                    starts.append(at)
                    ends.append(at + len(line))
                at += len(line)
        self.numbers, self._starts, self._ends = numbers, starts, ends
        self._block, self._from = b"", range(0)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        if index not in self._from:
            first = index - index % _BLOCK
            self._from = range(first, min(first + _BLOCK, len(self)))
            with _stream(self._source) as stream:
                stream.seek(self._starts[first])
                self._block = stream.read(self._ends[self._from[-1]] - self._starts[first])
        base = self._starts[self._from[0]]
        return _parse_line(self._block[self._starts[index] - base : self._ends[index] - base])


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


# ---------------------------------------------------------------- csv and tsv


class _Table(Rows):
    """csv and tsv with a header. Cells are text as it stands; a column of which every cell is true or false, or a whole
    number written as Python writes it, holds those (labels, scores).
    """

    unit = "line"

    def __init__(self, file: Path, source: Path | bytes, kind: str) -> None:
        data = source if isinstance(source, bytes) else source.read_bytes()
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as err:
            line = data[: err.start].count(b"\n") + 1
            raise DataError(f"{file}, line {line}: not UTF-8 text ({err.reason}); save it as UTF-8") from err
        csv.field_size_limit(2**31 - 1)  # long answers are longer than the library's 128 KiB
        first_line = text.partition("\n")[0]
        marks = ("\t",) if kind == ".tsv" else (",", ";", "\t")
        mark = next((mark for mark in marks if mark in first_line), marks[0])
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
        self._header, self._cells, numbers, begin = [], [], array("q"), 1
        try:
            for cells in reader:
                if cells and not self._header:
                    self._header = cells
                elif cells:
                    self._cells.append(cells)
                    numbers.append(begin)
                begin = reader.line_num + 1
        except csv.Error as err:
            raise DataError(
                f"{file}, line {begin}: not valid {kind[1:]} ({err}); is a quotation mark not closed?"
            ) from err
        self.numbers = numbers
        names = [name.strip() for name in self._header]
        if "" in names or len(set(names)) < len(names):
            raise DataError(f"{file}, line 1: the first line must name the columns, each by a name of its own: {names}")
        self._header = names
        self._types = [_type_of(column) for column in self._columns()]

    def _columns(self) -> Iterable[set[str]]:
        width = len(self._header)
        return ({row[i] for row in self._cells if len(row) == width} for i in range(width))

    def __getitem__(self, index: Any) -> Any:
        cells = self._cells[index]
        if len(cells) != len(self._header):
            return BadRow(f"{len(cells)} cells, but the header names {len(self._header)} columns: {shorten(cells)}")
        typed = zip(self._header, self._types, cells, strict=True)
        return {name: make(cell) for name, make, cell in typed}


def _type_of(cells: set[str]) -> Any:
    if cells and {cell.lower() for cell in cells} <= {"true", "false"}:
        return lambda cell: cell.lower() == "true"
    if cells and all(cell.lstrip("-").isdecimal() and len(cell) < 19 and str(int(cell)) == cell for cell in cells):
        return int
    return str


# ---------------------------------------------------------------- parquet and Arrow


class _Arrow(Rows):
    """An Arrow stream (what ``datasets.save_to_disk`` writes) or Arrow file, mapped into memory."""

    def __init__(self, file: Path) -> None:
        import pyarrow

        try:
            source = pyarrow.memory_map(str(file))
            try:
                table = pyarrow.ipc.open_stream(source).read_all()
            except pyarrow.ArrowInvalid:
                source.seek(0)
                table = pyarrow.ipc.open_file(source).read_all()
        except pyarrow.ArrowException as err:
            raise DataError(f"{file} is no readable Arrow file: {err}") from err
        self._parts = [table]
        self._set_lengths([len(table)])

    def _set_lengths(self, lengths: Sequence[int]) -> None:
        self.numbers = range(1, sum(lengths) + 1)
        self._part_starts = [0, *accumulate(lengths)]
        self._page: list[Any] = []
        self._from = range(0)

    def _part(self, number: int) -> Any:
        """Part ``number`` of the file as a ``pyarrow.Table``."""
        return self._parts[number]

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        if index not in self._from:
            number = bisect_right(self._part_starts, index) - 1
            start, stop = self._part_starts[number], self._part_starts[number + 1]
            first = index - (index - start) % _BLOCK
            self._from = range(first, min(first + _BLOCK, stop))
            self._page = self._part(number).slice(first - start, len(self._from)).to_pylist()
        return self._page[index - self._from[0]]


class _Parquet(_Arrow):
    """A parquet file; one row group is in memory at a time."""

    def __init__(self, file: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        self._path = file
        try:
            with pyarrow.parquet.ParquetFile(file) as opened:
                groups = range(opened.metadata.num_row_groups)
                self._set_lengths([opened.metadata.row_group(number).num_rows for number in groups])
        except (pyarrow.ArrowException, OSError) as err:
            raise DataError(f"{file} is no readable parquet file: {err}") from err
        self._number = -1

    def _part(self, number: int) -> Any:
        import pyarrow
        import pyarrow.parquet

        if number != self._number:
            try:
                with pyarrow.parquet.ParquetFile(self._path) as opened:
                    self._group = opened.read_row_group(number)
            except (pyarrow.ArrowException, OSError) as err:
                raise DataError(f"{self._path}, row group {number + 1}, is not readable: {err}") from err
            self._number = number
        return self._group
