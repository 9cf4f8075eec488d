"""Files and folders as they are published: each is read row for row, or refused in one line that says what to do."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignment.errors import DataError
from alignment.ppo.data import RawDataset
from alignment.ppo.data.files import EVALUATION, find_files
from alignment.ppo.data.readers import BadRow, open_rows

Row = dict[str, Any]


def rows(name: str, count: int = 4) -> list[Row]:
    return [{"input": f"{name} {number} é", "answer": f'line one\nline, "two" {number}'} for number in range(count)]


def jsonl(path: Path, content: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in content).encode()
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst}.get(path.suffix, bytes)
    path.write_bytes(pack(text))
    return path


def zst(data: bytes) -> bytes:
    import zstandard

    half = len(data) // 2  # two frames, as parallel compressors write
    return zstandard.compress(data[:half]) + zstandard.compress(data[half:])


def parquet(path: Path, content: list[Row], group: int = 3) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path, row_group_size=group)
    return path


def table(path: Path, content: list[Row], mark: str = ",") -> Path:
    import csv

    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter=mark)
        writer.writerow(content[0])
        writer.writerows(row.values() for row in content)
    return path


def saved(path: Path, content: list[Row]) -> Path:
    import datasets

    datasets.Dataset.from_list(content).save_to_disk(path)
    return path


def saved_dict(path: Path, **splits: list[Row]) -> Path:
    import datasets

    datasets.DatasetDict({name: datasets.Dataset.from_list(one) for name, one in splits.items()}).save_to_disk(path)
    return path


def read(path: Path | str, **choice: Any) -> list[Row]:
    data = RawDataset.load("jsonl", path=path, **choice)
    return [data.rows[index] for index in range(len(data))]


# -------------------------------------------------------------------- one file


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_packed_json_lines_keep_their_line_numbers(tmp_path: Path, suffix: str) -> None:
    """D21: .zst was "not UTF-8 text"."""
    content = rows("a", 1200)  # more than one block
    data = RawDataset.load("jsonl", path=jsonl(tmp_path / f"a.jsonl{suffix}", content))
    assert [data.rows[index] for index in range(len(data))] == content
    assert data.rows[3] == content[3] and data.rows[-1] == content[-1]
    assert data.where(1100).endswith(f"a.jsonl{suffix}, line 1101")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_packed_file_that_was_cut_short_is_refused(tmp_path: Path, suffix: str) -> None:
    path = jsonl(tmp_path / f"a.jsonl{suffix}", rows("a", 900))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=f"a.jsonl{suffix} is damaged or cut short"):
        read(path)


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.tsv", "\t"), ("excel.csv", ";")])
def test_csv_and_tsv(tmp_path: Path, name: str, mark: str) -> None:
    """D21: csv and tsv were "not valid JSON". Cells are the text in the file; lines are counted as editors do."""
    content = rows("a")
    content[1]["answer"] = "007"
    content[2]["answer"] = "NA"
    for number, row in enumerate(content):
        row |= {"better": number % 2 == 0, "score": number - 2, "note": ""}
    data = RawDataset.load("jsonl", path=table(tmp_path / name, content, mark))
    assert [data.rows[index] for index in range(4)] == content
    assert data[1]["answer"] == "007" and data[2]["answer"] == "NA"
    assert data.where(0).endswith("line 2") and data.where(1).endswith("line 4")  # the first answer has two lines


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('a,b\n1,"open\n2,3\n', "line 2: not valid csv .*not closed"),
        ("a,a\n1,2\n", r"line 1: the first line must name the columns, each by a name of its own: \['a', 'a'\]"),
        ("a,\n1,2\n", "line 1: the first line must name the columns"),
        ("input,answer\n", "holds no rows"),
    ],
)
def test_broken_csv(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.csv")


def test_a_csv_line_with_too_many_cells_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("input,answer\nq,a\nq,a,b\n")
    data = RawDataset.load("jsonl", path=tmp_path / "a.csv")
    assert data[0]["answer"] == "a"
    with pytest.raises(DataError, match="3 cells, but the header names 2 columns"):
        data[1]


def test_parquet_is_read_by_row_group(tmp_path: Path) -> None:
    content = [row | {"messages": [{"role": "user", "content": "q"}]} for row in rows("a", 10)]
    found = open_rows(parquet(tmp_path / "a.parquet", content))
    assert [found[index] for index in (9, 0, 4, 3)] == [content[index] for index in (9, 0, 4, 3)]
    assert list(found) == content and len(found) == 10


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"version": 1, "data": rows("a")}, rows("a")),
        (rows("a"), rows("a")),
        ({"prompt": "q", "tools": [{"name": "f"}]}, [{"prompt": "q", "tools": [{"name": "f"}]}]),
        ({"messages": [{"role": "user", "content": "q"}]}, [{"messages": [{"role": "user", "content": "q"}]}]),
    ],
)
def test_json_means_the_same_on_one_line_and_on_many(
    tmp_path: Path, value: object, expected: list[Row], indent: int | None
) -> None:
    """D24: a table in an object was one row when it stood on one line."""
    (tmp_path / "a.json").write_text(json.dumps(value, indent=indent))
    assert list(open_rows(tmp_path / "a.json")) == expected


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_line_of_json_lines_is_a_row_also_where_it_is_the_only_one(tmp_path: Path, name: str) -> None:
    """A row that holds a list of objects (OpenAI's summaries) was taken for a table of them."""
    row = {"info": {"post": "p"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0}
    line = json.dumps(row).encode()
    (tmp_path / name).write_bytes(gzip.compress(line) if name.endswith(".gz") else line)
    assert list(open_rows(tmp_path / name)) == [row]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"input": "ä"}\n'.encode("utf-16"), "not UTF-8 text but UTF-16; convert it: iconv"),
        ("a.csv", "input,answer\nä,b\n".encode("utf-16-le"), "not UTF-8 text but UTF-16; convert it: iconv"),
        ("a.csv", b"input,answer\nq,\xe4\n", "a.csv, line 2: not UTF-8 text"),
        ("a.xlsx", b"PK\x03\x04", r"\.xlsx files are not read .* convert it: python .*read_excel"),
        ("a.zip", b"PK\x03\x04", r"convert it: unzip"),
        ("a.pkl", b"\x80\x04", r"convert it: python .*read_pickle"),
        ("a.txt", b"a text", r"\.txt files are not read .* convert it: python"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*git lfs pull"),
        ("a.json", b'{\n "input": "a"\n}\n{\n "input": "b"\n}\n', "line 4: a second JSON value begins here; .*jq -c"),
    ],
)
def test_what_is_not_read_says_how_to_convert_it(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """D21: the messages for these spoke of JSON or of nothing."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_oddities_of_json_lines(tmp_path: Path) -> None:
    text = (
        '\ufeff{"input": "a\\u0000b", "answer": "\U0001f468\u200d\U0001f469"}\r\n\r\n'
        '{"input": "x\\r\\ny", "answer": "", "score": NaN}\r\n'
    )
    (tmp_path / "a.jsonl").write_bytes(text.encode())
    data = RawDataset.load("jsonl", path=tmp_path / "a.jsonl")
    assert data[0]["input"] == "a\0b" and data[0]["answer"] == "\U0001f468\u200d\U0001f469"
    assert data[1]["input"] == "x\r\ny" and data.where(1).endswith("line 3")


# -------------------------------------------------------------------- folders


def test_a_hub_folder_with_shards_and_a_card(tmp_path: Path) -> None:
    for number in range(3):
        parquet(tmp_path / "data" / f"train-0000{number}-of-00003.parquet", rows(f"train {number}"))
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows("test"))
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A data set\n")
    assert read(tmp_path) == [*rows("train 0"), *rows("train 1"), *rows("train 2")]
    assert read(tmp_path, split="test") == read(tmp_path, split=EVALUATION) == rows("test")


@pytest.mark.parametrize("layout", ["{}.jsonl", "{}/rows.jsonl", "{}-1.jsonl", "{}.part1.jsonl", "mine_{}.jsonl"])
def test_evaluation_takes_validation_then_test_and_never_train(tmp_path: Path, layout: str) -> None:
    """D4: evaluation read the split "train"."""
    for split in ("train", "test"):
        jsonl(tmp_path / layout.format(split), rows(split))
    assert read(tmp_path, split=EVALUATION) == rows("test")
    jsonl(tmp_path / layout.format("dev"), rows("dev"))
    assert read(tmp_path, split=EVALUATION) == rows("dev")
    assert read(tmp_path) == rows("train")


def test_a_folder_with_training_rows_alone_is_refused_for_evaluation(tmp_path: Path) -> None:
    """D4: and the message says how to read them all the same."""
    jsonl(tmp_path / "train.jsonl", rows("train"))
    with pytest.raises(
        DataError, match=r"no file of split 'validation or test'; it holds: train \(1\).*\"split\": \"tr"
    ):
        read(tmp_path, split=EVALUATION)
    assert read(tmp_path, split="train") == rows("train")


@pytest.fixture
def ultrafeedback(tmp_path: Path) -> Path:
    """The layout of HuggingFaceH4/ultrafeedback_binarized."""
    for name in ("train_prefs", "train_sft", "train_gen", "test_prefs", "test_sft", "test_gen"):
        parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet", rows(name))
    return tmp_path


@pytest.mark.parametrize(("split", "names"), [("train", "train_gen, train_prefs, train_sft"), (EVALUATION, "test_gen")])
def test_several_splits_that_could_be_meant_are_listed(ultrafeedback: Path, split: str, names: str) -> None:
    """D5: all files whose names begin with the split were read together, every row three times."""
    with pytest.raises(DataError, match=f'several that could be meant: {names}.*Choose one: .*"split": "t'):
        read(ultrafeedback, split=split)


def test_a_split_is_a_whole_name(ultrafeedback: Path) -> None:
    """D5: and it can be named, or matched by a pattern."""
    assert read(ultrafeedback, split="train_prefs") == rows("train_prefs")
    assert read(f"{ultrafeedback}/**/train_prefs*") == rows("train_prefs")
    parquet(ultrafeedback / "data" / "train-00000-of-00001.parquet", rows("train"))
    assert read(ultrafeedback) == rows("train")


def test_a_folder_of_the_hubs_own_conversion(tmp_path: Path) -> None:
    for split in ("train_prefs", "test_prefs"):
        for number in range(2):
            parquet(tmp_path / "default" / split / f"000{number}.parquet", rows(f"{split} {number}"))
    assert read(tmp_path) == [*rows("train_prefs 0"), *rows("train_prefs 1")]  # the only one that can be meant
    assert read(tmp_path, split=EVALUATION) == [*rows("test_prefs 0"), *rows("test_prefs 1")]


@pytest.fixture
def gsm(tmp_path: Path) -> Path:
    """Two data sets in one repository, as in openai/gsm8k."""
    for config in ("main", "socratic"):
        for split in ("train", "test"):
            parquet(tmp_path / config / f"{split}-00000-of-00001.parquet", rows(f"{config} {split}"))
    return tmp_path


CARD = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  data_files:
  - split: train
    path: socratic/train-*
---
"""


@pytest.mark.parametrize("card", ["", CARD])
def test_several_data_sets_in_one_folder_are_listed(gsm: Path, card: str) -> None:
    """D5: the files of all sub-folders were read together."""
    (gsm / "README.md").write_text(card)
    with pytest.raises(DataError, match=r"several data sets: main, socratic. Choose one: .*\"config\": \"main\""):
        read(gsm)
    with pytest.raises(DataError, match=r"no data set 'other'; it holds: main, socratic"):
        read(gsm, config="other")
    assert read(gsm, config="socratic") == rows("socratic train")
    assert read(gsm / "main") == rows("main train")
    data = RawDataset.load("gsm8k/test", path=gsm)  # it knows which one it is
    assert data.files == [gsm / "main" / "test-00000-of-00001.parquet"]


def test_the_card_names_the_default(gsm: Path) -> None:
    (gsm / "README.md").write_text(CARD.replace("- config_name: main\n", "- config_name: main\n  default: true\n"))
    assert read(gsm) == rows("main train") and read(gsm, split=EVALUATION) == rows("main test")


def test_a_card_may_join_sub_folders(tmp_path: Path) -> None:
    """PKU-SafeRLHF's layout; its own name reads all of them with or without the card."""
    for name in ("Alpaca-7B", "Alpaca2-7B"):
        jsonl(tmp_path / "data" / name / "train.jsonl", rows(name))
    both = [*rows("Alpaca-7B"), *rows("Alpaca2-7B")]
    with pytest.raises(DataError, match=r"several data sets: Alpaca-7B, Alpaca2-7B"):
        read(tmp_path)
    assert read(tmp_path, config="*") == both == list(RawDataset.load("PKU-SafeRLHF/train", path=tmp_path).rows)
    paths = "[data/Alpaca-7B/train.jsonl, data/Alpaca2-7B/train.jsonl]"
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {paths}\n---\n"
    (tmp_path / "README.md").write_text(card)
    assert read(tmp_path) == both


def test_left_overs_of_map_are_not_data(tmp_path: Path) -> None:
    """D6: ``datasets.load_from_disk(d).map(f)`` leaves cache-*.arrow in d; its rows were read as data."""
    import datasets

    folder = saved(tmp_path / "d", rows("a"))
    datasets.load_from_disk(str(folder)).map(lambda row: {"input": "changed"})
    assert [file for file in folder.iterdir() if file.name.startswith("cache-")]
    assert read(folder) == rows("a")
    (folder / "state.json").unlink()
    (folder / "tmp1a2b.arrow").write_bytes((folder / "data-00000-of-00001.arrow").read_bytes())
    assert read(folder) == rows("a")


def test_what_a_saved_folder_lists_is_what_is_read(tmp_path: Path) -> None:
    """D6: ``_data_files`` of state.json is the truth."""
    folder = saved(tmp_path / "d", rows("a"))
    (folder / "data-00001-of-00002.arrow").write_bytes((folder / "data-00000-of-00001.arrow").read_bytes())
    assert read(folder) == rows("a")
    (folder / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(DataError, match="state.json lists data-00000-of-00001.arrow, which the folder lacks"):
        read(folder)


def test_a_saved_dict_of_data_sets(tmp_path: Path) -> None:
    folder = saved_dict(tmp_path / "d", train=rows("train"), test=rows("test"))
    assert read(folder) == rows("train") and read(folder, split=EVALUATION) == rows("test")
    folder = saved_dict(tmp_path / "e", train_sft=rows("s"), train_prefs=rows("p"))
    with pytest.raises(DataError, match="could be meant: train_prefs, train_sft"):
        read(folder)
    assert read(folder, split="train_prefs") == rows("p")


@pytest.mark.parametrize("write", [jsonl, parquet, table])
def test_patterns(tmp_path: Path, write: Callable[[Path, list[Row]], Path]) -> None:
    """D21: a pattern "did not exist"."""
    suffix = {jsonl: "jsonl", parquet: "parquet", table: "csv"}[write]
    for number in range(3):
        write(tmp_path / f"part-{number}.{suffix}", rows(str(number)))
    (tmp_path / "part-README.md").write_text("x")
    assert read(f"{tmp_path}/part-*") == [*rows("0"), *rows("1"), *rows("2")]
    assert read(f"{tmp_path}/part-[02].{suffix}") == [*rows("0"), *rows("2")]
    with pytest.raises(DataError, match=r"no data file matches .*none-\*"):
        read(f"{tmp_path}/none-*")
    for split in ("train", "test"):
        write(tmp_path / f"{split}.{suffix}", rows(split))
    with pytest.raises(DataError, match="matches files of several splits"):
        read(f"{tmp_path}/t*.{suffix}")


def test_the_users_folder_stays_as_it_is(tmp_path: Path) -> None:
    folder = saved_dict(tmp_path / "d", train=rows("train"))
    table(folder / "train.csv", rows("csv"))
    before = sorted(folder.rglob("*"))
    for file in find_files(folder):
        assert not any(isinstance(row, BadRow) for row in open_rows(file))
    assert sorted(folder.rglob("*")) == before
