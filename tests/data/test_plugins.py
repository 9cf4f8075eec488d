"""User code: the README's example from a file, a script, a module and an entry point, always in one registry."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from alignment.errors import AlignmentError, ArgumentsError, DataError
from alignment.plugins import load_object, load_plugins
from alignment.ppo.data import PreferenceDataset, RawDataset

README_EXAMPLE = """\
from datasets import load_dataset
from data import RawDataset, RawSample

class MyRawDataset(RawDataset):
    NAME = 'my-dataset-name'

    def __init__(self, path=None) -> None:
        # Load a dataset from Hugging Face or any other data source
        # self.data = load_dataset(path or 'my-organization/my-dataset')['train']
        self.data = [{
            'col1': 'question',
            'col2': 'answer1',
            'col3': 'answer2',
            'col4': 1,  # score of answer1
            'col5': 2  # score of answer2
        }] * 10  # dummy data for example

    def __getitem__(self, index: int) -> RawSample:
        data = self.data[index]
        # Construct a `RawSample` dictionary from your custom dataset item
        return RawSample(
            input=data['col1'],
            answer=data['col2'],
            other_answer=data['col3'],
            better=float(data['col4']) > float(data['col5']),
        )

    def __len__(self) -> int:
        return len(self.data)  # dataset size
"""
LIGHT_EXAMPLE = README_EXAMPLE.split("\n", 1)[1]  # without the import of `datasets`, which takes seconds


@pytest.fixture
def plugin(tmp_path, registry) -> Path:
    path = tmp_path / "my_plugin.py"
    path.write_text(LIGHT_EXAMPLE)
    return path


def run_script(tmp_path: Path, repo: Path, code: str, *, cwd: Path | None = None, pythonpath: str = "") -> str:
    path = (cwd or tmp_path) / "user_script.py" if cwd is None else tmp_path / "user_script.py"
    path.write_text(textwrap.dedent(code))
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=cwd or tmp_path,
        env={"PYTHONPATH": pythonpath, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_readme_example_from_a_plugin_file(tmp_path, registry, tokenizer):
    path = tmp_path / "readme.py"
    path.write_text(README_EXAMPLE)
    load_plugins([str(path)])
    dataset = PreferenceDataset({"my-dataset-name": 0.5}, tokenizer, show_progress=False)
    assert len(dataset) == 5
    row = dataset[0]
    assert tokenizer.decode(row["better_input_ids"][row["prompt_len"] :]) == "answer2<|endoftext|>"
    assert tokenizer.decode(row["worse_input_ids"][row["prompt_len"] :]) == "answer1<|endoftext|>"


def test_loading_twice_does_nothing_and_the_name_data_is_free_again(plugin):
    load_plugins(str(plugin))
    first = type(RawDataset.load("my-dataset-name"))
    load_plugins([str(plugin)])
    assert type(RawDataset.load("my-dataset-name")) is first
    assert not [name for name in sys.modules if name == "data" or name.startswith("data.")]


def test_plugin_by_module_name(plugin, monkeypatch):
    monkeypatch.syspath_prepend(plugin.parent)
    monkeypatch.delitem(sys.modules, "my_plugin", raising=False)
    load_plugins(["my_plugin"])
    load_plugins([str(plugin)])  # the same file under another name: not executed again
    assert type(RawDataset.load("my-dataset-name")).__module__ == "my_plugin"
    del sys.modules["my_plugin"]


def test_plugin_with_a_neighbour_and_a_submodule_of_data(tmp_path, registry):
    (tmp_path / "neighbour_of_plugin.py").write_text("NAME = 'from-neighbour'\n")
    (tmp_path / "with_neighbour.py").write_text(
        "from neighbour_of_plugin import NAME as N\nfrom data.base import RawDataset\n"
        "class A(RawDataset):\n    NAME = N\n    def __init__(self): pass\n"
        "    def __getitem__(self, i): return {'input': 'x'}\n    def __len__(self): return 1\n"
    )
    before = list(sys.path)
    load_plugins([str(tmp_path / "with_neighbour.py")])
    assert len(RawDataset.load("from-neighbour")) == 1
    assert sys.path == before


def test_plugin_by_entry_point(tmp_path, registry, monkeypatch):
    (tmp_path / "entry_plugin.py").write_text(LIGHT_EXAMPLE)
    info = tmp_path / "entry_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: entry-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[alignment.plugins]\nmine = entry_plugin\n")
    monkeypatch.syspath_prepend(tmp_path)
    load_plugins()
    assert len(RawDataset.load("my-dataset-name")) == 10
    (tmp_path / "entry_plugin.py").write_text("raise RuntimeError('no luck')")
    del sys.modules["entry_plugin"]
    with pytest.raises(
        ArgumentsError, match=r"plug-in 'mine' \(entry_plugin\) of entry-plugin .*RuntimeError: no luck"
    ):
        load_plugins()


CHECK = """
import alignment.ppo.data as real
import data
assert data is real, data
import data.base, alignment.ppo.data.base
assert data.base is alignment.ppo.data.base
assert data.RawDataset.load('my-dataset-name')[0]['other_answer'] == 'answer2'
assert type(real.RawDataset.load('my-dataset-name')) is MyRawDataset
print('one registry')
"""


@pytest.mark.parametrize("first", ["", "import alignment.ppo.data\n"])
def test_script_that_imports_data_with_the_folder_on_the_path(tmp_path, repo, first):
    path = f"{repo}:{repo / 'alignment' / 'ppo'}"
    assert run_script(tmp_path, repo, first + LIGHT_EXAMPLE + CHECK, pythonpath=path) == "one registry"


def test_script_without_the_checkout_on_the_path(tmp_path, repo):
    code = "import data\nimport alignment.ppo.data as real\n" + LIGHT_EXAMPLE + CHECK
    assert run_script(tmp_path, repo, code, pythonpath=str(repo / "alignment" / "ppo")) == "one registry"


def test_load_object(tmp_path):
    (tmp_path / "rewards.py").write_text("def helpfulness(prompts, responses):\n    return [1.0 for _ in prompts]\n")
    assert load_object(f"{tmp_path / 'rewards.py'}:helpfulness")(["a"], ["b"]) == [1.0]
    assert load_object("os.path:join")("a", "b") == "a/b"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rewards.py", "must have the form"),
        (":f", "must have the form"),
        ("missing_file.py:f", "missing_file.py does not exist"),
        ("no_such_module_here:f", "no module is named 'no_such_module_here'"),
        ("os.path:joyn", "has no 'joyn'; did you mean 'join'"),
    ],
)
def test_load_object_errors(spec, message):
    with pytest.raises(ArgumentsError, match=message):
        load_object(spec)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("1 / 0", r"failed while it was imported: ZeroDivisionError: .*bad_plugin.py, line 1"),
        ("def f(:", "failed while it was imported: SyntaxError"),
        ("import no_such_thing_at_all", "No module named 'no_such_thing_at_all'"),
        ("from data import Nonsense", "In plug-ins `data` means alignment.ppo.data"),
        ("raise SystemExit(3)", "failed while it was imported: SystemExit"),
    ],
)
def test_plugins_that_fail(tmp_path, code, message):
    path = tmp_path / "bad_plugin.py"
    path.write_text(code + "\n")
    with pytest.raises(ArgumentsError, match=message):
        load_plugins([str(path)])
    assert not [name for name in sys.modules if name.startswith("alignment_plugin_bad_plugin")]


@pytest.mark.parametrize(
    ("name", "message"), [("no_such.py", "does not exist"), ("no_such_mod", "no module is named"), ("", "neither")]
)
def test_plugins_that_are_not_there(name, message):
    with pytest.raises(ArgumentsError, match=message):
        load_plugins([name])


def test_errors_of_a_plugins_data_set_pass_through(tmp_path, plugin):
    load_plugins([str(plugin)])
    other = tmp_path / "other.py"
    other.write_text(LIGHT_EXAMPLE)
    with pytest.raises(DataError, match="taken twice") as err:
        load_plugins([str(other)])
    assert isinstance(err.value, AlignmentError) and str(plugin) in str(err.value)
