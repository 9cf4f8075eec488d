"""Which checkpoints a run may go on from, and which changes of arguments it may do that with."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alignment.arguments import PPOArguments, RewardArguments, SFTArguments, from_dict
from alignment.errors import CheckpointError
from alignment.flow import checkpoint as checkpoints
from alignment.flow.checkpoint import CheckpointStore, FormatError, resolve_resume, verify
from alignment.flow.resume import (
    FREE,
    MUST_EQUAL,
    check_resumable,
    check_same_data,
    compare_arguments,
    save_arguments,
)
from alignment.log import get_logger
from alignment.methods import all_arguments
from alignment.parallel import World
from tests.tiny import tiny_tokenizer_dir

STAGES: dict[type, dict[str, Any]] = {
    SFTArguments: {"model_name_or_path": "m", "train_datasets": "a"},
    RewardArguments: {"model_name_or_path": "m", "train_datasets": "a"},
    PPOArguments: {"actor_model_name_or_path": "m", "reward_model_name_or_path": "r", "train_datasets": "a"},
}


@pytest.fixture
def said() -> Iterator[list[str]]:
    """Warnings of the package's logger (it does not propagate to pytest's own handler)."""
    texts: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    handler = Keep(logging.WARNING)
    get_logger().addHandler(handler)
    yield texts
    get_logger().removeHandler(handler)


def arguments(cls: type = SFTArguments, **values: Any) -> Any:
    return from_dict(cls, {"output_dir": "out", **STAGES[cls], **values})


def saved(folder: Path, args: Any, step: int = 4) -> Path:
    """A checkpoint that holds arguments and nothing else."""
    store = CheckpointStore(folder)
    with store.writing(step) as target:
        (target / "trainer").mkdir()
        save_arguments(target, args, World())
    return store.path(step)


def test_every_listed_key_is_an_argument_and_is_listed_once() -> None:
    known = {key for cls in [*STAGES, *all_arguments().values()] for key in cls.specs()}
    assert set(MUST_EQUAL) <= known and known >= FREE
    assert not set(MUST_EQUAL) & FREE


def test_equal_arguments_are_silent(tmp_path: Path, said: list[str]) -> None:
    for number, cls in enumerate(STAGES):
        check_resumable(arguments(cls), World(), saved(tmp_path / str(number), arguments(cls)))
    check_resumable(arguments(), World(), None)
    assert said == []


@pytest.mark.parametrize(
    ("cls", "then", "now", "line"),
    [
        (SFTArguments, {"seed": 1}, {"seed": 2}, "seed: 1 then, 2 now: the order of the data"),
        (SFTArguments, {}, {"train_datasets": "b"}, 'train_datasets: "a" then, "b" now: the position in the data'),
        (
            SFTArguments,
            {"max_length": 64, "src_length": 8},
            {"max_length": 32, "src_length": 8},
            "max_length: 64 then, 32",
        ),
        (SFTArguments, {"lora": True}, {"lora": False}, "lora: true then, false now: the saved weights"),
        (RewardArguments, {}, {"loss_type": "token-wise"}, 'loss_type: "sequence-wise" then, "token-wise" now'),
        (PPOArguments, {}, {"adaptive_kl": True}, "adaptive_kl: false then, true now: the saved state"),
        (PPOArguments, {}, {"actor_model_name_or_path": "n"}, 'actor_model_name_or_path: "m" then, "n" now: the ref'),
    ],
)
def test_what_must_be_equal(
    tmp_path: Path, said: list[str], cls: type, then: dict[str, Any], now: dict[str, Any], line: str
) -> None:
    path = saved(tmp_path, arguments(cls, **then))
    with pytest.raises(CheckpointError) as caught:
        check_resumable(arguments(cls, **now), World(), path)
    message = str(caught.value)
    assert message.startswith(f"{path} was made with other arguments:\n  {line}")
    assert "allow_changed_arguments=true" in message and len(message.splitlines()) == 3
    check_resumable(arguments(cls, **now, allow_changed_arguments=True), World(), path)
    assert line in said[-1]


class Data:
    """A data set, as far as it is compared."""

    def __init__(self, rows: str) -> None:
        self.rows_hash, self.reads = rows * 8, {"/d/a.jsonl": "jsonl (a.jsonl)"}

    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize("cls", STAGES)
@pytest.mark.parametrize("name", ["train", "ptx", "eval"])
def test_the_rows_behind_the_arguments_must_be_equal(tmp_path: Path, said: list[str], cls: type, name: str) -> None:
    """D11: another file of equal length under the same name went unnoticed."""
    args, all_the_same = (
        arguments(cls, output_dir=str(tmp_path / "out"), allow_changed_arguments=allow) for allow in (False, True)
    )
    (tmp_path / "out").mkdir()
    record = {"train": {"kept": 3, "hash": "aa" * 8}, name: {"kept": 5, "hash": "bb" * 8}}
    (tmp_path / "out" / "data_mixture.json").write_text(json.dumps(record))
    path = saved(tmp_path / "out", args)
    same = {"train": Data("aa" if name != "train" else "bb"), name: Data("bb")}
    check_same_data(args, World(), path, same)
    check_same_data(args, World(), None, {name: Data("cc")})
    check_same_data(args, World(), path, {"other": Data("cc")})  # the checkpoint knows nothing about it
    assert said == []
    line = f"{name} (jsonl (a.jsonl)): 5 token rows with hash bbbbbbbb then, 3 with cccccccc now"
    if name != "eval":
        with pytest.raises(CheckpointError, match="allow_changed_arguments=true") as caught:
            check_same_data(args, World(), path, {**same, name: Data("cc")})
        assert line in str(caught.value)
        args = all_the_same
    check_same_data(args, World(), path, {**same, name: Data("cc")})
    assert line in said[-1]


def test_what_may_change_is_said_and_what_is_free_is_not(tmp_path: Path, said: list[str]) -> None:
    path = saved(tmp_path, arguments(learning_rate=1e-3))
    free = {"logging_steps": 3, "save_steps": 9, "output_dir": "elsewhere", "recompute": True, "hang_timeout": 5}
    now = arguments(learning_rate=2e-3, per_device_train_batch_size=4, **free)
    check_resumable(now, World(), path)
    (text,) = said
    assert text.splitlines()[1:] == [
        "  per_device_train_batch_size: 8 then, 4 now",
        "  learning_rate: 0.001 then, 0.002 now",
    ]


def test_all_differences_are_told_at_once() -> None:
    before = arguments(PPOArguments).to_dict()
    now = arguments(PPOArguments, seed=1, train_datasets="b", learning_rate=1e-3, top_p=0.5, eval_steps=3)
    refused, changed = compare_arguments(before, now)
    assert set(refused) == {"seed", "train_datasets"}
    assert set(changed) == {"learning_rate", "critic_learning_rate", "top_p"}


def test_null_is_what_auto_was_called_before() -> None:
    then = arguments().to_dict() | {"prompt_template": None}
    assert compare_arguments(then, arguments()) == ([], [])
    assert compare_arguments(then, arguments(prompt_template="chat")) == (["prompt_template"], [])


def test_keys_of_another_version_are_not_compared() -> None:
    before = arguments().to_dict()
    del before["seed"]
    before["a_key_of_the_past"] = 1
    assert compare_arguments(before, arguments(seed=7)) == ([], [])


def test_paths_that_lead_to_the_same_folder_are_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    before = arguments(model_name_or_path=str(tmp_path / "model")).to_dict()
    for path in ("model", "./model/", str(tmp_path / "link")):
        assert compare_arguments(before, arguments(model_name_or_path=path)) == ([], [])


def test_another_stages_checkpoint_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, arguments(SFTArguments))
    with pytest.raises(CheckpointError, match="is a checkpoint of SFT, and this is PPO: give its model"):
        check_resumable(arguments(PPOArguments), World(), path)


def test_another_models_checkpoint_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    source = tiny_tokenizer_dir(tmp_path / "model")
    config = {"model_type": "qwen2", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 320}
    (source / "config.json").write_text(json.dumps({**config, "rope_theta": 1e4}))
    args = arguments(model_name_or_path=str(source))
    path = saved(tmp_path / "out", args)
    (path / "config.json").write_text(json.dumps({**config, "rope_theta": 10000}))
    check_resumable(args, World(), path)
    (path / "config.json").write_text(json.dumps({**config, "model_type": "llama", "hidden_size": 64}))
    with pytest.raises(CheckpointError) as caught:
        check_resumable(args, World(), path)
    assert f"{path} holds another model than model_name_or_path={source}" in str(caught.value)
    assert "model_type 'llama' there, 'qwen2' here, hidden_size 64 there, 32 here" in str(caught.value)


def test_a_checkpoint_of_another_format_is_named_and_not_skipped(tmp_path: Path, said: list[str]) -> None:
    saved(tmp_path, arguments(), 3)
    path = saved(tmp_path, arguments(), 4)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format"] == checkpoints.FORMAT and manifest["version"]
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99, "version": "9.9"}))
    store = CheckpointStore(tmp_path, save_total_limit=1)
    for resume in (True, str(path)):
        with pytest.raises(FormatError, match=r"checkpoint-4 was written by version 9\.9 .* in checkpoint format 99"):
            resolve_resume(store, resume)
    saved(tmp_path, arguments(), 5)
    store.prune()
    assert store.steps() == [4, 5], "another version's checkpoint is not ours to delete"
    assert any("left as it is" in text for text in said)
    shutil.rmtree(path)
    verify(store.path(5))
