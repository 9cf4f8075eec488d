"""Checkpoints that survive crashes, and those that do not are recognised."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
from pathlib import Path

import pytest

from alignment.errors import CheckpointError
from alignment.flow.checkpoint import CheckpointStore, resolve_resume, verify, write_json
from alignment.flow.output import publishing
from alignment.flow.temporary import is_abandoned, temporary_folder
from alignment.log import get_logger
from alignment.parallel.heartbeat import start_time


@pytest.fixture
def warnings_seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts of what the package's logger says (it does not propagate to pytest's own handler)."""
    texts: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    handler = Keep()
    get_logger().addHandler(handler)
    yield texts
    get_logger().removeHandler(handler)


def write(store: CheckpointStore, step: int, text: str = "weights", *, best: bool = False) -> Path:
    with store.writing(step, best=best) as folder:
        (folder / "model.bin").write_text(f"{text} {step}")
        (folder / "trainer").mkdir()
        (folder / "trainer" / "state.json").write_text("{}")
    return store.path(step)


def test_a_checkpoint_appears_whole_with_its_manifest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run")
    with store.writing(3) as folder:
        (folder / "model.bin").write_text("abc")
        assert store.steps() == []
    manifest = verify(store.path(3))
    assert manifest["step"] == 3
    assert manifest["files"]["model.bin"]["size"] == 3
    assert store.latest() == store.path(3)
    assert [p.name for p in store.output_dir.iterdir()] == ["checkpoint-3"]


def test_a_failed_body_leaves_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 1)
    with pytest.raises(ValueError, match="boom"), store.writing(2) as folder:
        (folder / "model.bin").write_text("half")
        raise ValueError("boom")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_cut_file_is_named_and_the_older_checkpoint_taken(tmp_path: Path, warnings_seen: list[str]) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 1)
    (write(store, 2) / "model.bin").write_text("wei")
    assert store.latest() == store.path(1)
    assert any("model.bin has 3 bytes, 9 were written" in text for text in warnings_seen)


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    path = write(CheckpointStore(tmp_path), 1)
    (path / "model.bin").write_text("WEIGHTS 1")
    with pytest.raises(CheckpointError, match="has changed since it was written"):
        verify(path)
    verify(path, read_files=False)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "manifest.json").unlink(), "has no manifest.json"),
        (lambda path: (path / "manifest.json").write_text('{"files": '), "cannot be read"),
        (lambda path: (path / "manifest.json").write_text("[]"), "cannot be read"),
        (lambda path: (path / "trainer" / "state.json").unlink(), "trainer/state.json is missing"),
    ],
)
def test_damage_is_described(tmp_path: Path, damage, message: str) -> None:
    store = CheckpointStore(tmp_path)
    path = write(store, 1)
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        verify(path)
    assert store.latest() is None


def test_a_leftover_of_a_crash_is_named_and_removed_by_the_next_write(tmp_path: Path, warnings_seen: list[str]) -> None:
    store = CheckpointStore(tmp_path)
    leftover = tmp_path / ".writing-checkpoint-5-abc"
    leftover.mkdir()
    (leftover / "model.bin").write_text("half")
    assert store.latest() is None
    assert any("never finished" in text for text in warnings_seen)
    write(store, 6)
    assert not leftover.exists()


def test_a_crash_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    path = write(store, 4, "first")
    aside = tmp_path / ".writing-checkpoint-old-x"
    aside.mkdir()
    os.rename(path, aside / "old")
    write(store, 5)
    assert (store.path(4) / "model.bin").read_text() == "first 4"
    verify(store.path(4))


def test_writing_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 4, "first")
    write(store, 4, "second")
    assert (store.path(4) / "model.bin").read_text() == "second 4"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-4"]


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, save_total_limit=2)
    for step in range(1, 6):
        write(store, step, best=step == 2)
    assert store.steps() == [2, 5]
    assert store.best() == store.path(2)
    write(store, 6)
    assert store.steps() == [2, 6]


def test_a_limit_of_one_never_deletes_the_last_good_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, save_total_limit=1)
    write(store, 1)
    (write(store, 2) / "model.bin").write_text("x")
    assert store.steps() == [2]
    # The only other one is damaged: it does not count as a good one, and is left for its owner to look at.
    write(store, 3)
    assert store.steps() == [2, 3]
    assert store.latest() == store.path(3)
    with pytest.raises(RuntimeError), store.writing(4):
        raise RuntimeError
    assert store.latest() == store.path(3)


def test_disk_full_says_what_to_do(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoint-7.*disk is full: free some space"), store.writing(7):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match="choose another output_dir"),
        CheckpointStore(tmp_path / "file" / "run").writing(1),
    ):
        pass


def test_resolve_resume(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    assert resolve_resume(store, None) is None
    assert resolve_resume(store, "latest") is None
    path = write(store, 2)
    assert resolve_resume(store, True) == path
    assert resolve_resume(store, "true") == path
    assert resolve_resume(store, str(path)) == path
    with pytest.raises(CheckpointError, match=r"no such folder \(checkpoints in .*: checkpoint-2\)"):
        resolve_resume(store, str(tmp_path / "checkpoint-9"))
    (path / "model.bin").unlink()
    with pytest.raises(CheckpointError, match="model.bin is missing"):
        resolve_resume(store, str(path))


def test_write_json_refuses_nan_and_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_publishing_replaces_a_model_and_its_stale_shards(tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00002.safetensors").write_text("old")
    (tmp_path / "config.json").write_text("old")
    (tmp_path / "metrics.jsonl").write_text("kept")
    with publishing(tmp_path) as folder:
        (folder / "model.safetensors").write_text("new")
        (folder / "config.json").write_text("new")
        assert (tmp_path / "config.json").read_text() == "old"
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "model.safetensors": "new",
        "config.json": "new",
        "metrics.jsonl": "kept",
    }
    with pytest.raises(ValueError), publishing(tmp_path) as folder:
        (folder / "config.json").write_text("half")
        raise ValueError
    assert (tmp_path / "config.json").read_text() == "new"


def test_a_crash_in_the_middle_of_pruning_brings_nothing_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, save_total_limit=1)
    write(store, 1)
    with monkeypatch.context() as patch:

        def die(path: Path, **options: object) -> None:
            next(path.rglob("model.bin")).unlink()
            raise KeyboardInterrupt

        patch.setattr("alignment.flow.checkpoint.shutil.rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            write(store, 2)
    assert store.steps() == [2] and len(list(tmp_path.glob(".writing-*"))) == 1
    write(store, 3)
    assert store.steps() == [3] and not list(tmp_path.glob(".writing-*"))


def test_a_crash_between_the_two_renames_is_mended_by_a_resume(tmp_path: Path) -> None:
    """C4: the newest whole checkpoint is found, not the one before it."""
    store = CheckpointStore(tmp_path)
    write(store, 3)
    path = write(store, 4)
    aside = tmp_path / ".writing-checkpoint-old-x"
    aside.mkdir()
    os.rename(path, aside / "old")
    assert store.latest() == store.path(4)


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings_seen: list[str]
) -> None:
    """A6: the new checkpoint is safe, so the run goes on; the old one is deleted when that is possible."""
    store, real = CheckpointStore(tmp_path, save_total_limit=1), os.unlink
    write(store, 1)
    with monkeypatch.context() as patch:

        def refuse(path: object, **options: object) -> None:
            if str(path).endswith("model.bin"):
                raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
            real(path, **options)

        patch.setattr(os, "unlink", refuse)
        write(store, 2)
        write(store, 2, "again")  # the old one steps aside, and cannot be deleted either
        write(store, 3)
    assert store.steps() == [3] and store.latest() == store.path(3)
    assert any("cannot be deleted (Operation not permitted)" in text for text in warnings_seen)
    assert list(tmp_path.glob(".writing-*"))
    write(store, 4)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_checkpoint_that_cannot_be_moved_away_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings_seen: list[str]
) -> None:
    """A6: pruning stops no run either where the old folder cannot even be renamed."""
    store, real = CheckpointStore(tmp_path, save_total_limit=1), os.rename
    write(store, 1)
    with monkeypatch.context() as patch:

        def refuse(source: object, target: object) -> None:
            if str(source).endswith("checkpoint-1"):
                raise OSError(errno.EBUSY, "Device or resource busy")
            real(source, target)

        patch.setattr(os, "rename", refuse)
        write(store, 2)
    assert store.steps() == [1, 2]
    assert any("checkpoint-1 cannot be deleted (Device or resource busy)" in text for text in warnings_seen)
    write(store, 3)
    assert store.steps() == [3]


def test_what_another_living_run_writes_is_left_alone(tmp_path: Path) -> None:
    """A4: only folders of processes that have ended are cleared away."""
    name = temporary_folder(tmp_path, ".writing-checkpoint-7-").name
    mine = f"{os.getpid()}.{start_time(os.getpid())}"
    assert mine in name and is_abandoned(tmp_path / name), "one's own are from an earlier save"
    living = tmp_path / name.replace(mine, f"{os.getppid()}.{start_time(os.getppid())}")
    ended = tmp_path / name.replace(mine, f"{os.getpid()}.1")
    elsewhere = tmp_path / name.replace(name.split("-")[3].split(".")[0], "00000000")
    forgotten = tmp_path / f"{elsewhere.name[:-1]}{'0' if elsewhere.name[-1] != '0' else '1'}"
    for folder in (living, ended, elsewhere, forgotten):
        folder.mkdir()
        (folder / "model.bin").write_text("half")
    for path in (forgotten / "model.bin", forgotten):
        os.utime(path, (1e9, 1e9))
    write(CheckpointStore(tmp_path), 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([living.name, elsewhere.name, "checkpoint-8"])


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    """A19: whoever may read the neighbours may read checkpoints and final models."""
    before = os.umask(0o027)
    try:
        path = write(CheckpointStore(tmp_path), 1)
        with publishing(tmp_path / "policy") as folder:
            (folder / "config.json").write_text("{}")
        write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    folders = (path, path / "trainer", tmp_path / "policy")
    files = (path / "model.bin", path / "manifest.json", tmp_path / "policy" / "config.json", tmp_path / "a.json")
    assert [oct(entry.stat().st_mode & 0o777) for entry in folders] == ["0o750"] * 3
    assert [oct(entry.stat().st_mode & 0o777) for entry in files] == ["0o640"] * 4


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EIO])
def test_a_file_system_that_cannot_sync_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """C2: some of FUSE's and SMB's refuse; an error of the disk is still one."""
    real = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    store = CheckpointStore(tmp_path)
    if number == errno.EIO:
        with pytest.raises(CheckpointError, match="Input/output error"):
            write(store, 1)
    else:
        write(store, 1)
        assert store.latest() == store.path(1)


def test_a_model_that_was_half_published_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C3: a crash leaves no folder that is taken for a model of old and new weights."""

    def publish(text: str) -> None:
        with publishing(tmp_path) as folder:
            for name in ("config.json", "model-1.safetensors", "model-2.safetensors", "tokenizer.json"):
                (folder / name).write_text(text)

    publish("old")
    real = os.replace
    with monkeypatch.context() as patch:

        def die(source: Path, target: Path) -> None:
            real(source, target)
            if Path(target).name == "model-1.safetensors":
                raise KeyboardInterrupt

        patch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            publish("new")
    assert not (tmp_path / "config.json").exists()
    publish("newer")
    assert {path.read_text() for path in tmp_path.iterdir()} == {"newer"}


def test_a_best_checkpoint_that_was_not_yet_marked_is_remembered(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, save_total_limit=1)
    write(store, 1, best=True)
    write(store, 2)  # killed before it was marked
    store.remember_best(7)
    assert store.best() == store.path(1), "there is no checkpoint 7"
    store.remember_best(2)
    write(store, 3)
    assert store.best() == store.path(2) and store.steps() == [2, 3]
