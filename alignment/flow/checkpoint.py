"""Checkpoints that are either whole or not there.

A checkpoint is written into ``output_dir/.writing-checkpoint-N-OWNER`` (the same file system), every file is flushed to
the disk, ``manifest.json`` with every file's size and SHA-256 comes last, and only then the folder is renamed to
``checkpoint-N``. A run that dies in between leaves a folder that no one takes for a checkpoint; one that is damaged
later is recognised by its manifest, named, and skipped. Deleting is best effort: what cannot be deleted is named in a
warning, and tried again at the next checkpoint.

    store = CheckpointStore(output_dir, save_total_limit=3)
    if world.is_main:
        with store.writing(step) as folder:      # folder: Path; fill it
            ...
    path = store.latest()                        # newest complete checkpoint, or None
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from alignment import __version__
from alignment.errors import CheckpointError
from alignment.flow.temporary import is_abandoned, temporary_folder
from alignment.log import get_logger, say_once
from alignment.paths import leaves_folder, open_to_others

MANIFEST = "manifest.json"
#: How the files of a checkpoint are laid out, and the layouts that this version reads.
FORMAT = 1
READABLE_FORMATS = (1,)
BEST = "best_checkpoint.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_TEMPORARY = ".writing-checkpoint-"
_OLD, _GONE = f"{_TEMPORARY}old-", f"{_TEMPORARY}gone-"


class FormatError(CheckpointError):
    """A whole checkpoint, but of a version of this toolkit that lays its files out differently."""


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        output_dir: the run's folder; made where it is missing.
        save_total_limit: how many complete checkpoints to keep; None or 0 keeps all. The newest complete one and the
            best one always stay.
    """

    def __init__(self, output_dir: str | Path, save_total_limit: int | None = None) -> None:
        self.output_dir = Path(output_dir)
        self.save_total_limit = save_total_limit or 0

    @contextlib.contextmanager
    def writing(self, step: int, *, best: bool = False) -> Iterator[Path]:
        """Give an empty temporary folder; when the body ends well it becomes ``checkpoint-{step}`` and old ones are
        pruned.

        Call it on one process only.

        Args:
            step: the optimizer step (PPO: iteration) that the checkpoint stands for.
            best: remember this checkpoint as the best one so far, so that pruning spares it.

        Raises:
            CheckpointError: when the disk is full, read-only or otherwise refuses; the temporary folder is removed,
                older checkpoints stay.
        """
        target, aside = self.output_dir / f"checkpoint-{step}", None
        with disk_errors(target):
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self._restore()
            for leftover in self._leftovers():
                _discard(leftover)
            temporary = temporary_folder(self.output_dir, f"{_TEMPORARY}{step}-")
        try:
            with disk_errors(target):
                yield temporary
                open_to_others(temporary)
                write_manifest(temporary, step)
                if target.exists():
                    # A rename cannot replace a full folder: the old one steps aside first and goes last.
                    aside = temporary_folder(self.output_dir, _OLD)
                    os.rename(target, aside / "old")
                os.rename(temporary, target)
                sync_folder(self.output_dir)
                if best:
                    self.mark_best(step)
        finally:
            if temporary.exists():
                shutil.rmtree(temporary, ignore_errors=True)
        if aside is not None:
            _discard(aside)
        self.prune(just_written=target)

    def steps(self) -> list[int]:
        """Steps of all folders named ``checkpoint-N``, complete or not, ascending."""
        if not self.output_dir.is_dir():
            return []
        found = (_NAME.fullmatch(entry.name) for entry in self.output_dir.iterdir() if entry.is_dir())
        return sorted(int(match.group(1)) for match in found if match)

    def path(self, step: int) -> Path:
        """The folder of checkpoint ``step``."""
        return self.output_dir / f"checkpoint-{step}"

    def latest(self) -> Path | None:
        """The newest complete checkpoint, its files read and compared with its manifest; damaged ones are named in a
        warning and skipped.

        Raises:
            FormatError: the newest complete one was written by another version, which is no reason to go back.
        """
        self._restore()
        for leftover in self._leftovers():
            if not leftover.name.startswith((_OLD, _GONE)):
                get_logger().warning("%s is a checkpoint that was never finished; it is ignored", leftover)
        for step in reversed(self.steps()):
            try:
                verify(self.path(step))
            except FormatError:
                raise
            except CheckpointError as error:
                get_logger().warning("skipping a damaged checkpoint: %s", error)
                continue
            return self.path(step)
        return None

    def mark_best(self, step: int) -> None:
        """Remember checkpoint ``step`` as the best one (in ``output_dir/best_checkpoint.json``)."""
        write_json(self.output_dir / BEST, {"step": step, "folder": f"checkpoint-{step}"})

    def remember_best(self, step: int) -> None:
        """As :meth:`mark_best`, where checkpoint ``step`` is here: for a run that was killed after a checkpoint got its
        name and before it was marked, and that goes on from it.
        """
        if self.path(step).is_dir() and self.best() != self.path(step):
            self.mark_best(step)

    def best(self) -> Path | None:
        """The best checkpoint's folder, or None where none was marked or it is gone."""
        try:
            step = int(json.loads((self.output_dir / BEST).read_text())["step"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return self.path(step) if self.path(step).is_dir() else None

    def prune(self, just_written: Path | None = None) -> None:
        """Delete the oldest complete checkpoints beyond ``save_total_limit``, never the newest complete one, the best
        one, or a damaged one. One that cannot be deleted is named in a warning.
        """
        if self.save_total_limit <= 0:
            return
        complete = []
        for step in self.steps():
            path = self.path(step)
            try:
                verify(path, read_files=False)
            except FormatError as error:
                get_logger().warning("another version's checkpoint is left as it is: %s", error)
                continue
            except CheckpointError as error:
                get_logger().warning("a damaged checkpoint is left as it is: %s", error)
                continue
            complete.append(path)
        keep = {just_written, self.best()}
        removable = [path for path in complete[:-1] if path not in keep]
        for path in removable[: max(0, len(complete) - self.save_total_limit)]:
            # Out of sight first, so that a crash in the middle of deleting leaves no half checkpoint under a
            # checkpoint's name; and not as "old", which would get its place back.
            try:
                doomed = temporary_folder(self.output_dir, _GONE)
            except OSError as error:
                _complain(path, error)
                continue
            try:
                os.rename(path, doomed / "gone")
            except OSError as error:
                _complain(path, error)
            _discard(doomed)

    def _leftovers(self) -> list[Path]:
        """Temporary folders that no other living run is writing."""
        if not self.output_dir.is_dir():
            return []
        found = (entry for entry in self.output_dir.iterdir() if entry.name.startswith(_TEMPORARY))
        return sorted(entry for entry in found if is_abandoned(entry))

    def _restore(self) -> None:
        """Where a run died between the two renames of a checkpoint that replaces another, the old one is whole: give it
        its place back.
        """
        for leftover in self._leftovers():
            old = leftover / "old"
            with contextlib.suppress(OSError, ValueError, KeyError):
                match = self.path(int(json.loads((old / MANIFEST).read_text())["step"]))
                if not match.exists():
                    os.rename(old, match)


def _discard(folder: Path) -> None:
    """Delete a folder as far as that is possible: an open file of a network file system, or one that is protected,
    makes no healthy run fail.
    """
    try:
        shutil.rmtree(folder)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)  # whatever else is in it
        if folder.exists():
            _complain(folder, error)


def _complain(path: Path, error: OSError) -> None:
    say_once(
        f"{path} cannot be deleted ({error.strerror or error}); it is tried again at the next checkpoint",
        logging.WARNING,
    )


def write_manifest(folder: Path, step: int) -> None:
    """Flush every file under ``folder`` to the disk and write ``manifest.json``: ``{"format", "version", "step",
    "files": {path: {"size", "sha256"}}}``.
    """
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.name == MANIFEST and path.parent == folder:
            continue
        with open(path, "rb+") as handle:
            digest = _digest(handle)
            os.fsync(handle.fileno())
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": digest.hexdigest()}
    write_json(folder / MANIFEST, {"format": FORMAT, "version": __version__, "step": step, "files": files})
    for inner in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        sync_folder(inner)


def verify(path: str | Path, *, read_files: bool = True) -> dict:
    """Check a checkpoint against its manifest and return the manifest.

    Args:
        path: the checkpoint's folder.
        read_files: read every file and compare its SHA-256; otherwise sizes only.

    Raises:
        FormatError: another version of this toolkit wrote it, in a layout that this one does not read.
        CheckpointError: naming the first file that is missing, cut short, changed or unreadable.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {folder}")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        layout = int(manifest.get("format", 1))
        if layout not in READABLE_FORMATS:
            raise FormatError(
                f"{folder} was written by version {manifest.get('version', 'unknown')} of this toolkit in checkpoint "
                f"format {layout}; this is version {__version__}, which reads {', '.join(map(str, READABLE_FORMATS))}. "
                "Resume it with that version, or start a new run from its model"
            )
        files = manifest["files"].items()
        entries = [(name, int(entry["size"]), str(entry["sha256"])) for name, entry in files]
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: it was not completely written, or is no checkpoint of this toolkit"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read ({type(error).__name__}: {error})") from None
    for name, size, digest in entries:
        if leaves_folder(name):
            raise CheckpointError(f"{folder / MANIFEST} names {name!r}, which is no file of the checkpoint")
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{folder}: {name} is missing")
        found = file.stat().st_size
        if found != size:
            raise CheckpointError(f"{folder}: {name} has {found} bytes, {size} were written")
        if read_files:
            try:
                with open(file, "rb") as handle:
                    found_digest = _digest(handle).hexdigest()
            except OSError as error:
                raise CheckpointError(f"{folder}: {name} cannot be read ({error.strerror or error})") from error
            if found_digest != digest:
                raise CheckpointError(f"{folder}: {name} has changed since it was written (SHA-256 differs)")
    return manifest


def resolve_resume(store: CheckpointStore, resume_from_checkpoint: object) -> Path | None:
    """Find the checkpoint to continue from, verified.

    Args:
        store: the run's checkpoints.
        resume_from_checkpoint: None/False (start anew), True/"true"/"latest" (newest complete one; none there is fine),
            or a folder.

    Raises:
        CheckpointError: when a named folder is missing or damaged.
    """
    if resume_from_checkpoint in (None, False, "", "false", "False"):
        return None
    if resume_from_checkpoint in (True, "true", "True", "latest"):
        found = store.latest()
        if found is None:
            get_logger().warning(
                "resume_from_checkpoint: %s holds no complete checkpoint; starting from the beginning", store.output_dir
            )
        return found
    path = Path(str(resume_from_checkpoint))
    if not path.is_dir():
        known = ", ".join(f"checkpoint-{step}" for step in store.steps()) or "none"
        raise CheckpointError(
            f"resume_from_checkpoint={path}: no such folder (checkpoints in {store.output_dir}: {known})"
        )
    verify(path)
    return path


def write_json(path: str | Path, value: object) -> None:
    """Write JSON to a temporary name, flush, rename: readers see the old file or the new one, never half of one."""
    path = Path(path)
    with disk_errors(path):
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with open(temporary, "w", encoding="utf-8") as handle:
            json.dump(value, handle, indent=2, ensure_ascii=False, allow_nan=False)
            handle.write("\n")
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)


def _digest(handle: BinaryIO) -> hashlib._Hash:
    digest = hashlib.sha256()
    while block := handle.read(1 << 20):
        digest.update(block)
    return digest


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, where its file system can do that: some of FUSE's and SMB's cannot."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path, *, doing: str = "write", place: str = "output_dir") -> Iterator[None]:
    """Say in a :class:`CheckpointError` what to do when the disk refuses ``path``; other errors pass.

    Args:
        path: what was to be written.
        doing: "write", "export to", ...: what was done to it.
        place: what the user may choose elsewhere.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as problem:
        error = _refusal(problem)
        if error is None:
            raise
        keep_fewer = ", or lower save_total_limit" if place == "output_dir" else ""
        cures = {
            errno.ENOSPC: f"the disk is full: free some space or choose another {place}" + keep_fewer,
            errno.EDQUOT: f"your disk quota is used up: free some space or choose another {place}",
            errno.EROFS: f"the file system is read-only: choose an {place} that can be written",
            errno.EACCES: f"permission denied: choose an {place} that you may write to",
            errno.EPERM: f"permission denied: choose an {place} that you may write to",
            errno.EFBIG: "the file is larger than allowed: raise `ulimit -f`, or choose another file system",
            errno.ENOTDIR: f"a part of the path is a file: choose another {place}",
        }
        cure = cures.get(error.errno or 0, "check the disk")
        raise CheckpointError(f"cannot {doing} {path}: {error.strerror or error}; {cure}") from problem


def _refusal(problem: BaseException | None) -> OSError | None:
    """The operating system's error behind an exception, if there is one."""
    while problem is not None:
        if isinstance(problem, OSError):
            return problem
        # safetensors writes in Rust and has the number in its text alone.
        found = re.search(r"\(os error (\d+)\)", str(problem)) if type(problem).__name__ == "SafetensorError" else None
        if found:
            number = int(found.group(1))
            return OSError(number, os.strerror(number))
        problem = problem.__cause__
    return None
