"""The run's folder as the command finds it: what blocks a start and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from alignment.errors import AlignmentError, ArgumentsError
from alignment.flow.checkpoint import CheckpointStore
from alignment.flow.metrics import read_metrics
from alignment.sft.run_sft import main
from tests.flow.disk_jobs import write_arguments


def test_a_start_that_failed_does_not_block_the_next(tmp_path: Path) -> None:
    """D13, A4: neither by its summaries nor by its lock."""
    file, weights = str(write_arguments("sft", tmp_path)), tmp_path / "model" / "model.safetensors"
    whole = weights.read_bytes()
    tensors = load_file(weights)
    del tensors[max(tensors)]
    save_file(tensors, weights)  # found when the model loads, which comes last
    for _ in range(2):
        with pytest.raises(AlignmentError, match="misses|missing|lack"):
            main([file, "max_steps=1"])
    assert (tmp_path / "run" / "data_summary.json").exists()
    weights.write_bytes(whole)
    assert main([file, "max_steps=1"]) == 0
    with pytest.raises(ArgumentsError, match="is not empty"):
        main([file, "max_steps=1"])
    assert not (tmp_path / "run" / ".lock").exists()


def test_overwriting_a_checkpoint_that_is_a_link(tmp_path: Path) -> None:
    """C6: the link goes, what it leads to stays."""
    file = str(write_arguments("sft", tmp_path))
    assert main([file, "max_steps=2"]) == 0
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (run / "checkpoint-2").rename(elsewhere)
    (run / "checkpoint-2").symlink_to(elsewhere)
    assert main([file, "max_steps=1", "overwrite_output_dir=true", "save_strategy=no"]) == 0
    assert CheckpointStore(run).steps() == [] and (elsewhere / "manifest.json").exists()
    assert [row["step"] for row in read_metrics(run)] == [1]


def test_an_evaluation_does_not_enter_a_folder_in_use(tmp_path: Path) -> None:
    """A4: it would start metrics.jsonl anew."""
    from alignment.flow.lock import RunLock

    file = str(write_arguments("sft", tmp_path))
    rows = tmp_path / "rows.jsonl"
    with RunLock(tmp_path / "run"), pytest.raises(ArgumentsError, match="is in use by process"):
        main([file, "do_train=false", "do_eval=true", f"eval_datasets=jsonl::{rows}"])
    assert main([file, "do_train=false", "do_eval=true", f"eval_datasets=jsonl::{rows}"]) == 0
