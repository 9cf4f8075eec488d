"""Disks that are full, too small for a file, or read-only: said clearly, and older checkpoints stay."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from alignment.errors import CheckpointError, ModelError
from alignment.flow.checkpoint import CheckpointStore, disk_errors, verify
from alignment.flow.metrics import MetricWriter
from tests.flow import disk_jobs
from tests.parallel.forked import run_ranks


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_disk_that_refuses_the_next_checkpoint_leaves_the_last(tmp_path: Path, stage: str) -> None:
    (result,) = run_ranks(1, disk_jobs.fill_the_disk, stage, str(tmp_path))
    message = result["message"]
    assert message.startswith(f"CheckpointError: cannot write {tmp_path / 'run' / 'checkpoint-4'}: "), message
    assert "File too large; the file is larger than allowed: raise `ulimit -f`" in message
    assert result["latest"] == "checkpoint-2"
    assert not [name for name in result["entries"] if name.startswith(".writing")], "leftovers"


def test_a_full_device(tmp_path: Path) -> None:
    """The kernel's own refusal (``/dev/full``), as it is and behind another exception."""
    store = CheckpointStore(tmp_path)
    with store.writing(1) as folder:
        (folder / "model.bin").write_text("whole")

    def plain(folder: Path) -> None:
        (folder / "model.bin").symlink_to("/dev/full")
        (folder / "model.bin").write_text("more")

    def through_a_message(folder: Path) -> None:
        try:
            plain(folder)
        except OSError as error:
            raise ModelError(f"cannot save the model: {error}") from error

    for write in (plain, through_a_message):
        refusal = pytest.raises(CheckpointError, match=r"checkpoint-2: No space left.*; the disk is full: free some")
        with refusal, store.writing(2) as folder:
            write(folder)
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    verify(store.path(1))


def test_other_errors_of_a_save_keep_their_own_message(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="^two heads$"), disk_errors(tmp_path):
        raise ModelError("two heads")
    with pytest.raises(CheckpointError, match="^inner$"), disk_errors(tmp_path):
        raise CheckpointError("inner") from OSError(errno.ENOSPC, "No space left on device")


def test_a_read_only_folder(tmp_path: Path) -> None:
    (messages,) = run_ranks(1, disk_jobs.write_where_it_is_forbidden, str(tmp_path), "sft")
    assert len(messages) == 2
    for message in messages:
        assert message.startswith(f"CheckpointError: cannot write {tmp_path / 'closed'}"), message
        assert "Permission denied; permission denied: choose an output_dir that you may write to" in message


def test_a_checkpoint_that_cannot_be_read_is_named_and_the_one_before_used(tmp_path: Path) -> None:
    (found,) = run_ranks(1, disk_jobs.read_what_cannot_be_read, str(tmp_path))
    assert found == ["checkpoint-1", f"{tmp_path / 'checkpoint-2'}: weights cannot be read (Permission denied)"]


def test_metrics_on_a_full_disk(tmp_path: Path) -> None:
    import resource

    from alignment.parallel import World

    class Arguments:
        report_to, disable_tqdm = (), True

    writer = MetricWriter(tmp_path, Arguments(), World(), 10)
    writer.log(1, {"train/loss": 1.0})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*metrics\.jsonl: File too large"):
            writer.log(2, {"train/loss": 1.0}, echo=False)
        with pytest.raises(CheckpointError, match=r"cannot write .*metrics\.jsonl: File too large"):
            writer.close()  # what was not written is tried again
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "metrics.jsonl").stat().st_size == size
