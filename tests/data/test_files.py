"""Files and folders of rows."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import pytest

from alignment.errors import DataError
from alignment.ppo.data import RawDataset
from alignment.ppo.data.files import FileDataset, find_files
from alignment.ppo.data.readers import open_rows

ROWS = [{"input": f"question {number}", "answer": f"Antwort ä {number}"} for number in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def parquet(path, rows=ROWS):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.json", LINES),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json", json.dumps(ROWS, indent=2).encode()),
        ("a.json", json.dumps({"version": 1, "data": ROWS}, indent=1).encode()),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES),
        ("a.jsonl", b"\n\n" + LINES.replace(b"\n", b"\r\n\r\n")),
        ("a.jsonl", LINES.rstrip()),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.json.xz", lzma.compress(LINES)),
        ("a.jsonl.bz2", bz2.compress(LINES)),
        ("no_suffix", LINES),
        ("packed_without_saying.jsonl", gzip.compress(LINES)),
    ],
)
def test_json_in_all_its_forms(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert list(open_rows(tmp_path / name)) == ROWS


def test_parquet_and_arrow(tmp_path):
    import pyarrow

    assert list(open_rows(parquet(tmp_path / "a.parquet"))) == ROWS
    table = pyarrow.Table.from_pylist(ROWS)
    for name, writer in (("s.arrow", pyarrow.ipc.new_stream), ("f.arrow", pyarrow.ipc.new_file)):
        with writer(tmp_path / name, table.schema) as out:
            out.write_table(table)
        assert list(open_rows(tmp_path / name)) == ROWS


def test_one_object_is_one_row_even_if_it_holds_a_conversation(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "a.json").write_text(json.dumps(row, indent=2))
    assert list(open_rows(tmp_path / "a.json")) == [row]


@pytest.mark.parametrize(
    "layout",
    [
        {"train": ["train.jsonl"], "test": ["test.jsonl"]},
        {"train": ["train.jsonl.gz"], "test": ["test.jsonl.gz"]},
        {
            "train": ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
            "test": ["data/test-00000-of-00001.jsonl"],
        },
        {"train": ["train/b.json", "train/c.json"], "test": ["test/a.json"]},
        {"train": ["train.json"], "validation": ["dev.json"]},
    ],
)
def test_folder_layouts(tmp_path, layout):
    for names in layout.values():
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(gzip.compress(LINES) if name.endswith("gz") else LINES)
    for other in ("README.md", "dataset_infos.json", ".cache/train.jsonl", "notes.txt"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_text("{}")
    for split, names in layout.items():
        assert [str(file.relative_to(tmp_path)) for file in find_files(tmp_path, split)] == names
    assert find_files(tmp_path, "dev" if "validation" in layout else "test") == find_files(tmp_path, list(layout)[1])
    with pytest.raises(DataError, match=r"holds no file of split 'other'; it holds: .*train \(\d\)"):
        find_files(tmp_path, "other")


def test_a_folder_without_splits_is_read_whole_and_sorted(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_bytes(LINES)
    data = RawDataset.load("jsonl", path=tmp_path)
    assert len(data) == 6
    assert data.where(0) == f"{tmp_path / 'a.jsonl'}, line 1" and data.where(5) == f"{tmp_path / 'b.jsonl'}, line 3"


def test_rows_say_where_they_are_even_after_empty_lines(write_rows):
    path = write_rows("a.jsonl", ROWS[0], "", "", ROWS[1])
    assert RawDataset.load("jsonl", path).where(1) == f"{path}, line 4"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(LINES * 500)[:-20], "a.jsonl.gz is damaged or cut short"),
        ("a.jsonl.xz", lzma.compress(LINES * 500)[:-20], "a.jsonl.xz is damaged or cut short"),
        ("a.parquet", b"PAR1 and then nothing", "no readable parquet file"),
        ("a.parquet", b"", "no readable parquet file"),
        ("a.arrow", b"ARROW1xx", "no readable Arrow file"),
        ("a.json", b'[{"input": "a"},\n {"input": ]', "a.json, line 2: not valid JSON"),
        ("a.json", b'[{"input": "\xff"}]', "not UTF-8"),
        ("a.jsonl", b"", "holds no rows"),
        ("a.jsonl", b"\n\n", "holds no rows"),
        ("a.json", b"[]", "holds no rows"),
    ],
)
def test_files_that_are_damaged_as_a_whole(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        RawDataset.load("jsonl", path=tmp_path / name)


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(DataError, match=r"no_such\.jsonl does not exist"):
        RawDataset.load("jsonl", path="no_such.jsonl")
    (tmp_path / "only.txt").write_text("x")
    with pytest.raises(DataError, match="holds no data file; read are"):
        RawDataset.load("jsonl", path=tmp_path)
    with pytest.raises(DataError, match="missing a required argument: 'path'"):
        RawDataset.load("jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"input": "a"', "not valid JSON .*column"),
        ("[1, 2]", "must be an object with named fields, not list"),
        ('"text"', "must be an object with named fields, not str"),
        ("null", "not NoneType"),
        ('{"input": 3.5}', "'input' must be text, not float 3.5"),
        ("{}", "no known layout has the columns"),
    ],
)
def test_a_bad_line_is_bad_when_it_is_asked_for(write_rows, line, message):
    data = RawDataset.load("jsonl", write_rows("a.jsonl", {"input": "fine"}, line))
    assert data[0]["input"] == "fine"
    with pytest.raises(DataError, match=message):
        data[1]


def test_a_line_that_is_not_utf8(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES + b'{"input": "\xff"}\n')
    with pytest.raises(DataError, match="not UTF-8 text"):
        RawDataset.load("jsonl", tmp_path / "a.jsonl")[3]


def test_a_class_that_forgets_convert_is_told_when_it_is_made(write_rows, registry):
    class Forgets(FileDataset):
        NAME = "forgets"

    with pytest.raises(DataError, match=r"'forgets' could not be made: .*abstract.*convert"):
        RawDataset.load("forgets", write_rows("a.jsonl", {"input": "fine"}))
