"""The run's folder: is it free, what is resumed, and how final files appear in it all at once."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from alignment.errors import ArgumentsError
from alignment.log import get_logger
from alignment.parallel import World
from alignment.paths import open_to_others
from alignment.training.checkpoint import BEST, MANIFEST, CheckpointStore, disk_errors, resolve_resume
from alignment.training.metrics import METRICS_FILE

PUBLISHING = ".publishing-"


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
        if found is None and (earlier or (folder / METRICS_FILE).exists()):
            if not args.overwrite_output_dir and not _wants_latest(args.resume_from_checkpoint):
                raise ArgumentsError(
                    f"output_dir {folder} holds an earlier run; set resume_from_checkpoint=true to continue it, "
                    "overwrite_output_dir=true to start afresh, or choose another output_dir"
                )
            if args.overwrite_output_dir:
                get_logger().info("overwrite_output_dir: removing the earlier run's checkpoints in %s", folder)
                with disk_errors(folder):
                    for path in earlier:
                        shutil.rmtree(path)
                    for name in (BEST, METRICS_FILE):
                        (folder / name).unlink(missing_ok=True)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # Better to learn now than after the first epoch that nothing can be written here.
            handle, probe = tempfile.mkstemp(prefix=".probe-", dir=folder)
            os.close(handle)
            os.unlink(probe)
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

    Weight files of an earlier save that the new one does not have are removed: they would be taken for parts of the
    model.

    Raises:
        CheckpointError: the disk refuses.
    """
    target = Path(folder)
    with disk_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=PUBLISHING, dir=target))
        try:
            yield temporary
            open_to_others(temporary)
            new = {path.name for path in temporary.iterdir()}
            for path in sorted(temporary.iterdir()):
                destination = target / path.name
                if destination.is_dir():
                    shutil.rmtree(destination)
                os.replace(path, destination)
            weights = [
                p for pattern in ("*model*.safetensors*", "*model_state*.pdparams*") for p in target.glob(pattern)
            ]
            for path in weights:
                if path.name not in new:
                    path.unlink()
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
