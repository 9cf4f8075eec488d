"""Jobs for a process of its own: runs on a disk that refuses."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import struct
from pathlib import Path
from typing import Any

from alignment.errors import AlignmentError, CheckpointError
from alignment.flow.checkpoint import CheckpointStore, verify
from tests.tiny import WORDS, copy_rows, tiny_model_dir, write_jsonl

LARGEST_FILE = 20_000  # bytes: enough for metrics, too little for the tiny model
COMMON = {
    "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1,
    "report_to": "none", "disable_tqdm": True, "device": "cpu",
}  # fmt: skip


def write_arguments(stage: str, folder: Path) -> Path:
    """Model, data and argument file of a tiny run in ``folder``."""
    model = str(tiny_model_dir(folder / "model"))
    values: dict[str, Any] = {**COMMON, "output_dir": str(folder / "run")}
    if stage == "sft":
        rows = write_jsonl(folder / "rows.jsonl", copy_rows(16))
        values.update(model_name_or_path=model, train_datasets=f"jsonl::{rows}", max_length=32, src_length=16)
    else:
        prompts = write_jsonl(folder / "prompts.jsonl", [{"prompt": f"say {word}"} for word in WORDS[:8]])
        rewards = folder / "own_rewards.py"
        rewards.write_text("def length(prompts, responses, **row):\n    return [float(len(r)) for r in responses]\n")
        values.update(
            actor_model_name_or_path=model, reward=f"{rewards}:length", train_datasets=f"jsonl::{prompts}",
            max_src_len=16, max_dec_len=4, per_device_prompt_batch_size=4,
        )  # fmt: skip
    file = folder / f"{stage}.json"
    file.write_text(json.dumps(values))
    return file


def fill_the_disk(stage: str, folder: str) -> dict[str, Any]:
    """Save a checkpoint, then go on where files may not grow beyond ``LARGEST_FILE``.

    Returns:
        The error's text, the entries of ``output_dir`` and the newest whole checkpoint's name.
    """
    import paddle

    from alignment.cli import TASKS, load_task

    paddle.set_device("cpu")
    main = load_task(TASKS[stage].target)
    file = write_arguments(stage, Path(folder))
    assert main([str(file), "max_steps=2"]) == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, before[1]))
    try:
        main([str(file), "max_steps=4", "resume_from_checkpoint=true"])
        message = ""
    except AlignmentError as error:
        message = f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    out = Path(folder) / "run"
    latest = CheckpointStore(out).latest()
    return {"message": message, "entries": sorted(os.listdir(out)), "latest": latest and latest.name}


def give_up_roots_rights() -> None:
    """Take the rights to write and read anything (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH) from this thread, as other
    users have not got them either.
    """
    if os.getuid() != 0:
        return
    header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    data = ctypes.create_string_buffer(24)  # (effective, permitted, inheritable) for capabilities 0-31 and 32-63
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capget(header, data) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    words = list(struct.unpack("6I", data.raw))
    words[0] &= ~(1 << 1 | 1 << 2)
    if libc.capset(header, struct.pack("6I", *words)) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def write_where_it_is_forbidden(folder: str, stage: str) -> list[str]:
    """As a user without rights: start in a read-only ``output_dir``, and save in one that has become read-only.

    Returns:
        The errors' texts.
    """
    from alignment.cli import TASKS, load_task

    main = load_task(TASKS[stage].target)
    file = write_arguments(stage, Path(folder))
    closed = Path(folder) / "closed"
    closed.mkdir(mode=0o555)
    give_up_roots_rights()
    messages = []
    try:
        main([str(file), f"output_dir={closed}"])
    except AlignmentError as error:
        messages.append(f"{type(error).__name__}: {error}")
    try:
        with CheckpointStore(closed).writing(4):
            raise AssertionError("a read-only folder was written to")
    except AlignmentError as error:
        messages.append(f"{type(error).__name__}: {error}")
    return messages


def read_what_cannot_be_read(folder: str) -> list[str]:
    """As a user without rights: find the newest checkpoint where a file of the newest one cannot be read.

    Returns:
        The name of the checkpoint found, and the error of the other.
    """
    store = CheckpointStore(folder)
    for step in (1, 2):
        with store.writing(step) as target:
            (target / "weights").write_text("whole")
    (store.path(2) / "weights").chmod(0)
    give_up_roots_rights()
    latest = store.latest()
    assert latest is not None
    try:
        verify(store.path(2))
    except CheckpointError as error:
        return [latest.name, str(error)]
    return [latest.name]
