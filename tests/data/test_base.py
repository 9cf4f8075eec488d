"""RawDataset and its registry."""

from __future__ import annotations

import gc
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from alignment.errors import DataError
from alignment.ppo.data import RawDataset, RawSample, known_names

BODY = """
from alignment.ppo.data import RawDataset, RawSample
class Mine(RawDataset):
    NAME = {name!r}
    ALIASES = {aliases!r}
    def __init__(self, path=None): self.path = path
    def __getitem__(self, index): return RawSample(input=str(index))
    def __len__(self): return 4
"""


def run_file(path: Path, name: str = "mine", aliases: object = ()) -> None:
    path.write_text(BODY.format(name=name, aliases=aliases))
    # a file of the same size that is written again within a second would run from the first one's bytecode
    Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)
    spec = importlib.util.spec_from_file_location(f"test_module_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


class Numbers(RawDataset):
    """Not registered: it has no NAME."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __getitem__(self, index: int) -> RawSample:
        return RawSample(input=str(index))

    def __len__(self) -> int:
        return self.count


def test_builtin_names_with_and_without_organisation():
    expected = [
        "PKU-SafeRLHF-10K/train",
        "PKU-SafeRLHF-30K/test",
        "PKU-SafeRLHF-30K/train",
        "PKU-SafeRLHF/test",
        "PKU-SafeRLHF/train",
    ]
    assert set(expected) | {"alpaca", "jsonl", "gsm8k/train", "gsm8k/test"} <= set(known_names())
    from alignment.ppo.data.base import find_class

    for name in expected:
        assert name == find_class(f"PKU-Alignment/{name}").NAME
    for alias, name in {
        "tatsu-lab/alpaca": "alpaca",
        "stanford-alpaca": "alpaca",
        "json": "jsonl",
        "Jsonfile": "jsonl",
    }.items():
        assert name == find_class(alias).NAME


def test_load_by_name_and_alias(registry, tmp_path):
    run_file(tmp_path / "one.py", "mine", ["my-alias"])
    assert RawDataset.load("mine", path="x").path == "x"
    assert RawDataset.make("my-alias", "y").path == "y"
    assert [row["input"] for row in RawDataset.load("mine")] == ["0", "1", "2", "3"]


def test_registration_survives_garbage_collection(registry, tmp_path):
    run_file(tmp_path / "one.py")
    del sys.modules["test_module_one"]
    gc.collect()
    assert len(RawDataset.load("mine")) == 4


def test_the_same_file_again_replaces_the_class(registry, tmp_path):
    run_file(tmp_path / "one.py", "mine", ["old-alias"])
    first = type(RawDataset.load("mine"))
    run_file(tmp_path / "one.py", "mine", ["new-alias"])
    assert type(RawDataset.load("new-alias")) is not first
    with pytest.raises(DataError, match="old-alias"):
        RawDataset.load("old-alias")


@pytest.mark.parametrize(("name", "aliases"), [("mine", ()), ("other", ["mine"]), ("other", ["my-alias"])])
def test_two_files_with_one_name_are_both_told(registry, tmp_path, name, aliases):
    run_file(tmp_path / "one.py", "mine", ["my-alias"])
    with pytest.raises(DataError, match="taken twice") as err:
        run_file(tmp_path / "two.py", name, aliases)
    assert str(tmp_path / "one.py") in str(err.value) and str(tmp_path / "two.py") in str(err.value)
    assert name == "mine" or name not in known_names()  # nothing was half registered


@pytest.mark.parametrize("name", ["", "  ", " a", "a:b", "a,b", 3])
def test_names_that_cannot_be_used(registry, tmp_path, name):
    with pytest.raises(DataError, match="NAME"):
        run_file(tmp_path / "one.py", name)


def test_aliases_as_bare_text(registry, tmp_path):
    with pytest.raises(DataError, match=r"ALIASES must be a list or tuple of names; write \('abc',\)"):
        run_file(tmp_path / "one.py", "mine", "abc")


def test_a_base_class_has_no_name_and_its_name_is_not_inherited(registry, tmp_path):
    run_file(tmp_path / "one.py")
    mine = type(RawDataset.load("mine"))

    class Child(mine):
        """No NAME of its own, so not registered."""

    assert type(RawDataset.load("mine")) is mine
    assert Child("x")[0] == {"input": "0"}


def test_unknown_name_lists_the_known_and_the_nearest():
    with pytest.raises(DataError, match="did you mean 'alpaca'") as err:
        RawDataset.load("alpacca")
    assert "PKU-SafeRLHF/train" in str(err.value) and "plugins" in str(err.value)


def test_arguments_that_the_class_does_not_take(registry):
    class NoPath(Numbers):
        NAME = "no-path"

        def __init__(self) -> None:
            super().__init__(3)

    with pytest.raises(DataError, match=r"'no-path' cannot be made with \(path='x'\).*takes \(\)"):
        RawDataset.load("no-path", path="x")


def test_an_error_in_the_constructor_names_data_set_and_line(registry):
    class Broken(Numbers):
        NAME = "broken"

        def __init__(self) -> None:
            raise KeyError("column")

    with pytest.raises(DataError, match=r"'broken' could not be made: KeyError: 'column' \(.*test_base.py, line \d+\)"):
        RawDataset.load("broken")


@pytest.mark.parametrize(
    ("count", "ratio", "test_size"), [(10, 0.2, 2), (10, 0.01, 1), (3, 0.99, 2), (2, 0.5, 1), (1, 0.5, 0)]
)
def test_split_never_leaves_train_empty(count, ratio, test_size):
    train, test = Numbers(count).split_train_test(ratio)
    assert len(test) == test_size and len(train) == count - test_size
    assert sorted(int(row["input"]) for part in (train, test) for row in part) == list(range(count))


def test_split_is_determined_by_the_seed():
    texts = [[row["input"] for row in Numbers(50).split_train_test(0.2, seed=seed)[1]] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    _, test = Numbers(5).split_train_test(0.4, shuffle=False)
    assert [row["input"] for row in test] == ["3", "4"]
    assert test.where(0) == "sample 3"


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 2, True, "0.5"])
def test_split_ratio_out_of_range(ratio):
    with pytest.raises(DataError, match="between 0 and 1"):
        Numbers(4).split_train_test(ratio)


def test_empty_data_sets_cannot_be_split():
    with pytest.raises(DataError, match="empty"):
        Numbers(0).split_train_test()


def test_import_is_light(repo):
    code = (
        "import sys, time; start = time.process_time(); import alignment.ppo.data, alignment.plugins\n"
        "print(time.process_time() - start)\n"
        "print([m for m in ('paddle', 'paddlenlp', 'datasets', 'numpy', 'jinja2', 'rich') if m in sys.modules])"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )
        for _ in range(3)
    ]
    assert runs[0][1] == "[]"
    assert min(float(run[0]) for run in runs) < 0.1
