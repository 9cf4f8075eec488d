"""The run's folder: is it free, do all hosts see it, what is resumed, and how final files appear in it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from alignment.errors import ArgumentsError
from alignment.flow.checkpoint import BEST, MANIFEST, CheckpointStore, disk_errors, resolve_resume, sync_folder
from alignment.flow.lock import RunLock
from alignment.flow.temporary import is_abandoned, temporary_folder
from alignment.log import get_logger
from alignment.parallel import World
from alignment.paths import METRICS_FILE, last_step, open_to_others

PUBLISHING = ".publishing-"
SHARED_WITHIN = 10.0  # seconds that a network file system may take to show a new file on another host
_CONFIG = "config.json"


@contextlib.contextmanager
def claimed(args: Any, world: World) -> Iterator[None]:
    """Have ``args.output_dir`` for this run alone, and on all its hosts, for as long as this is entered. Every rank
    enters it; a dry run needs nothing.

    Raises:
        ArgumentsError: another run is at work in the folder, or a host sees another folder under that name.
        CheckpointError: the folder cannot be written.
    """
    if args.dry_run:
        yield
        return
    with RunLock(args.output_dir) if world.is_main else contextlib.nullcontext() as lock:
        _check_shared(Path(args.output_dir), world, lock)
        yield


def _check_shared(folder: Path, world: World, lock: RunLock | None) -> None:
    """See that every process finds the main one's lock: checkpoints are written by one host and read by all."""
    if world.processes == 1:
        return
    path, text = world.broadcast_object(lock and (lock.path.absolute(), lock.path.read_text(encoding="utf-8")))
    deadline = time.monotonic() + SHARED_WITHIN
    while not (found := _holds(path, text)) and time.monotonic() < deadline:
        time.sleep(0.2)
    everyone = world.all_processes((found, socket.gethostname()))
    blind = [f"rank {rank} on host {host}" for rank, (sees, host) in enumerate(everyone) if not sees]
    if blind:
        raise ArgumentsError(
            f"output_dir {path.parent} is not the same folder for all processes: what rank 0 on host {everyone[0][1]} "
            f"has written there is not seen by {', '.join(blind[:8])}{', ...' if len(blind) > 8 else ''}. Checkpoints "
            "are written by rank 0 and read by all: put output_dir on a disk that all hosts share, under the same path"
        )


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except OSError:
        return False


def prepare_output_dir(args: Any, world: World, store: CheckpointStore) -> Path | None:
    """Make ``args.output_dir`` ready and say which checkpoint to continue from (None: from the beginning).

    A folder with an earlier run's checkpoints or metrics is only used to resume, or with ``overwrite_output_dir``,
    which removes that run's checkpoints and metrics. Call it on every rank.

    Raises:
        ArgumentsError: the folder holds an earlier run and neither was asked for.
        CheckpointError: the checkpoint to resume from is missing or damaged, or the folder cannot be written.
    """
    found: Path | None = None
    if world.is_main:
        found = resolve_resume(store, args.resume_from_checkpoint)
        folder = store.output_dir
        earlier = [store.path(step) for step in store.steps() if _is_ours(store.path(step))]
        # What a start leaves that fails before its first row of training is nobody's work.
        results = last_step(folder / METRICS_FILE) > 0 or (folder / "all_results.json").exists()
        if found is None and (earlier or results):
            if not args.overwrite_output_dir and not _wants_latest(args.resume_from_checkpoint):
                raise ArgumentsError(
                    f"output_dir {folder} holds an earlier run; set resume_from_checkpoint=true to continue it, "
                    "overwrite_output_dir=true to start afresh, or choose another output_dir"
                )
            if args.overwrite_output_dir:
                get_logger().info("overwrite_output_dir: removing the earlier run's checkpoints in %s", folder)
                with disk_errors(folder):
                    for path in earlier:
                        path.unlink() if path.is_symlink() else shutil.rmtree(path)
                    for name in (BEST, METRICS_FILE):
                        (folder / name).unlink(missing_ok=True)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    return world.broadcast_object(found)


def _wants_latest(value: object) -> bool:
    return value in (True, "true", "latest")


def _is_ours(path: Path) -> bool:
    return (path / MANIFEST).exists() or (path / "trainer").is_dir()


@contextlib.contextmanager
def on_main(world: World, make: Callable[[], contextlib.AbstractContextManager[Path]]) -> Iterator[Path]:
    """Enter ``make()`` on the main process; the others get a path at which nothing is, and nothing must be written.

    For saving together: every process takes part in gathering, the main one writes.
    """
    if world.is_main:
        with make() as folder:
            yield folder
    else:
        yield Path("only the main process writes")


@contextlib.contextmanager
def publishing(folder: str | Path) -> Iterator[Path]:
    """Give a temporary folder inside ``folder``; when the body ends well its files move into ``folder``, replacing
    older ones.

    ``config.json`` goes first and comes last: a crash in between leaves a folder that no one takes for a model, rather
    than one of old and new weights. Weight files of an earlier save that the new one does not have are removed: they
    would be taken for parts of the model.

    Raises:
        CheckpointError: the disk refuses.
    """
    target = Path(folder)
    with disk_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        for leftover in target.glob(f"{PUBLISHING}*"):
            if is_abandoned(leftover):
                shutil.rmtree(leftover, ignore_errors=True)
        temporary = temporary_folder(target, PUBLISHING)
        try:
            yield temporary
            open_to_others(temporary)
            new = sorted(path.name for path in temporary.iterdir())
            for path in temporary.rglob("*"):
                if path.is_file():
                    with open(path, "rb+") as handle:
                        os.fsync(handle.fileno())
            if _CONFIG in new:
                (target / _CONFIG).unlink(missing_ok=True)
            for pattern in ("*model*.safetensors*", "*model_state*.pdparams*"):
                for old in target.glob(pattern):
                    if old.name not in new:
                        old.unlink()
            for name in sorted(new, key=_CONFIG.__eq__):
                destination = target / name
                if destination.is_dir():
                    shutil.rmtree(destination)
                os.replace(temporary / name, destination)
            sync_folder(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
