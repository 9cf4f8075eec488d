"""Dataset strings, proportions and the rows that they take."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.errors import DataError
from alignment.ppo.data import parse_dataset, parse_mixture
from alignment.ppo.data.files import EVALUATION
from alignment.ppo.data.mixture import take_rows


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("alpaca", [("alpaca", {"proportion": 1.0})]),
        ("alpaca:0.5", [("alpaca", {"proportion": 0.5})]),
        ("alpaca:1/3", [("alpaca", {"proportion": 1 / 3})]),
        ("alpaca:100/-1", [("alpaca", {"proportion": Fraction(-100)})]),
        ("alpaca:0/-1", [("alpaca", {"proportion": 0.0})]),
        ("alpaca:2.3", [("alpaca", {"proportion": 2.3})]),
        ("alpaca::/d/a.json", [("alpaca", {"proportion": 1.0, "path": "/d/a.json"})]),
        ("alpaca:0.5:/d/a.json", [("alpaca", {"proportion": 0.5, "path": "/d/a.json"})]),
        ("jsonl::C:/d/a.json", [("jsonl", {"proportion": 1.0, "path": "C:/d/a.json"})]),
        ("jsonl::hub://d:8/a", [("jsonl", {"proportion": 1.0, "path": "hub://d:8/a"})]),
        ("jsonl::~/a.json", [("jsonl", {"proportion": 1.0, "path": str(Path.home() / "a.json")})]),
        ("PKU-SafeRLHF/train", [("PKU-SafeRLHF/train", {"proportion": 1.0})]),
        (" a:0.5 , b::c ", [("a", {"proportion": 0.5}), ("b", {"proportion": 1.0, "path": "c"})]),
    ],
)
def test_parse_dataset(text, expected):
    assert parse_dataset(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpaca:-0.5", "at least 0"),
        ("alpaca:1/0", "divides by zero"),
        ("alpaca:1/-3", "not a number of at least 0"),
        ("alpaca:half", "'half' is not a number"),
        ("alpaca:nan", "at least 0"),
        ("alpaca:inf", "at least 0"),
        ("alpaca:0.5:", "path after the second colon is empty"),
        ("alpaca::", "path after the second colon is empty"),
        ("alpaca:", "ends with a colon"),
        ("alpaca,,b", "no name"),
        ("", "no name"),
        (":0.5", "no name"),
        ("jsonl:data/train.jsonl", "two colons: jsonl::data/train.jsonl"),
        ("jsonl:C:/data/a.jsonl", "two colons: jsonl::C:/data/a.jsonl"),
    ],
)
def test_parse_dataset_errors(text, message):
    with pytest.raises(DataError, match=message):
        parse_dataset(text)


def test_a_mixture_can_be_written_in_many_ways():
    def flat(spec):
        return [(source.name, source.proportion, source.given, source.kwargs) for source in parse_mixture(spec)]

    expected = [("alpaca", 0.5, "0.5", {}), ("jsonl", Fraction(-3), "3/-1", {"path": "b"})]
    assert flat("alpaca:0.5,jsonl:3/-1:b") == expected
    assert flat(["alpaca:0.5", "jsonl:3/-1:b"]) == expected
    assert flat(["alpaca:0.5", ("jsonl", {"proportion": "3/-1", "path": Path("b")})]) == expected
    assert flat({"alpaca": 0.5, "jsonl": {"proportion": Fraction(-3), "path": "b"}}) == expected
    assert flat({"stanford-alpaca": 0.5, "Jsonfile": {"proportion": Fraction(3, -1), "path": "b"}}) == expected
    assert flat("alpaca:1/3")[0][2] == "1/3"
    assert flat({"jsonl": {"path": "b", "split": "dev"}})[0][3] == {"path": "b", "split": "dev"}


@pytest.mark.parametrize(
    ("written", "proportion", "path"),
    [("0.5:d/shards", 0.5, "d/shards"), ("1/3", 1 / 3, None), (":d/a,b.jsonl", 1.0, "d/a,b.jsonl"), (2, 2.0, None)],
)
def test_a_value_of_a_mixture_may_be_written_as_after_a_name(written, proportion, path):
    """D20: ``{"jsonl": "0.5:d/shards"}`` was read by PPO and refused by SFT and reward modelling."""
    for spec in ({"jsonl": written}, [("jsonl", written)]):
        (source,) = parse_mixture(spec)
        assert (source.proportion, source.kwargs.get("path")) == (proportion, path)


@pytest.mark.parametrize("form", [str, lambda path: f"{path}:0.5", lambda path: {str(path): 0.5}])
def test_a_path_in_place_of_a_name_is_read(write_rows, tmp_path, monkeypatch, form):
    """D26: an existing file was "no data set is named './r.jsonl'"."""
    path = write_rows("r.jsonl", {"prompt": "q"})
    monkeypatch.chdir(tmp_path)
    for place in (path, path.parent, Path("./r.jsonl"), Path("r.jsonl")):
        (source,) = parse_mixture(form(place))
        assert source.name == "jsonl" and Path(source.kwargs["path"]).resolve() == place.resolve()
        assert len(source.load()) == 1
    (source,) = parse_mixture(form(Path("*.jsonl")))
    assert source.kwargs["path"] == "*.jsonl" and len(source.load()) == 1


def test_a_name_on_a_hub_says_where_its_files_are_given():
    with pytest.raises(DataError, match="'a/b'.*from a folder that holds its files: jsonl::/path/to/a/b"):
        parse_mixture("a/b")


@pytest.mark.parametrize("name", ["./none.jsonl", "data/none.parquet", "/none"])
def test_a_path_that_leads_nowhere_says_so(name):
    """D26"""
    with pytest.raises(DataError, match=rf"there is no file {re.escape(name)} \(looked in .*no data set is named"):
        parse_mixture(name)


def test_evaluation_asks_for_its_own_split_where_none_is_given():
    """D4"""
    spec = [("jsonl", {"path": "a"}), ("jsonl", {"path": "b", "split": "train"}), "alpaca"]
    splits = [source.kwargs.get("split") for source in parse_mixture(spec, evaluation=True)]
    assert splits == [EVALUATION, "train", None]
    assert [source.kwargs.get("split") for source in parse_mixture(spec)] == [None, "train", None]


def test_the_same_name_with_two_paths_is_two_sources_but_not_the_same_path():
    assert len(parse_mixture("jsonl::a.jsonl,jsonl:0.5:b.jsonl.gz")) == 2
    for twice in ("alpaca,alpaca:0.5", "alpaca,tatsu-lab/alpaca", "jsonl::a,jsonl::a"):
        with pytest.raises(DataError, match="listed twice"):
            parse_mixture(twice)


def test_proportion_zero_leaves_a_source_out():
    assert [source.name for source in parse_mixture("alpaca:0,jsonl::a")] == ["jsonl"]
    for nothing in ("alpaca:0", {"alpaca": 0, "jsonl": 0.0}):
        with pytest.raises(DataError, match="all proportions are 0"):
            parse_mixture(nothing)


@pytest.mark.parametrize("spec", [{}, []])
def test_an_empty_mixture(spec):
    with pytest.raises(DataError, match="the list is empty"):
        parse_mixture(spec)


@pytest.mark.parametrize("spec", [None, 3, [3], [("a", 1, 2)], {"alpaca": None}, {"alpaca": True}, {3: 1.0}])
def test_things_that_are_no_mixture(spec):
    with pytest.raises(DataError):
        parse_mixture(spec)


@given(st.integers(0, 50), st.floats(0, 4), st.integers(0, 1000))
def test_a_share_takes_whole_copies_and_a_draw_without_replacement(available, proportion, seed):
    rows = take_rows(available, proportion, np.random.default_rng(seed))
    assert len(rows) == (round(available * proportion) if available else 0)
    assert (rows == take_rows(available, proportion, np.random.default_rng(seed))).all()
    if len(rows):
        counts = np.bincount(rows, minlength=available)
        assert counts.max() - counts.min() <= 1  # every row came equally often, or once more


@given(st.integers(1, 20), st.integers(1, 70))
def test_an_exact_number_of_rows(available, wanted):
    rows = take_rows(available, Fraction(-wanted), np.random.default_rng(0))
    assert len(rows) == wanted
    copies = wanted // available * available
    assert rows[:copies].tolist() == list(range(available)) * (wanted // available)
