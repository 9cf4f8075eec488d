"""Offloading on a CPU: a group's memory becomes a private mapping of a file, at the very same addresses.

A tensor that leaves keeps its address. Its pages are written to the group's file in large buckets, and then ``mmap``
with ``MAP_FIXED`` puts that file in their place: the pages are given back to the system, and what reads the tensor gets
them from the file again. No tensor object, and no pointer in any of them, ever changes.

Three things follow from *private* (copy on write):

- A read or a write at the wrong time costs memory and never a bit: a read is served from the file, a write stays in the
  process. Correct results do not depend on the residency table.
- The kernel knows which pages were written since they were read from the file (``/proc/self/pagemap``). Only those are
  written when the group leaves again; a frozen model is written once, and an actor that only generated is just dropped.
- Where the same pages are read, they are the page cache's own: a resident model is in memory once, not twice. (Pages
  that were trained are the process's; the cache's stale copies of them are free for the system to take.)

The files have no names: they are unlinked while they are made (``O_TMPFILE`` where the file system has it), so nothing
is left of them when the process ends, however it ends, SIGKILL and loss of power included. A disk that fails while
pages are read from it ends the process with SIGBUS, as with every mapped file.

Only whole pages inside a tensor move. What lies in the first and last page of a tensor (less than 8 KiB of it, so most
norms and biases) always stays; so do buffers that are no parameters.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import platform
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from alignment.errors import AlignmentError
from alignment.log import get_logger

PAGE = mmap.PAGESIZE
#: Bytes of one write.
BUCKET = 64 << 20
# Most buffers of one writev(2) call on Linux (UIO_MAXIOV).
_MOST_BUFFERS = 1024

# From Linux' mman-common.h and mman.h.
_PROT_READ_WRITE = 0x1 | 0x2
_MAP_PRIVATE, _MAP_FIXED = 0x02, 0x10
_MADV_DONTNEED = 4
_MADV_POPULATE_READ = 22  # Linux 5.14
# Bits of an entry of /proc/PID/pagemap (Linux' admin-guide/mm/pagemap.rst); all of them are shown without privileges.
_PRESENT, _SWAPPED, _FILE_PAGE = (np.uint64(1 << bit) for bit in (63, 62, 61))
# f_type of statfs(2) of file systems that live in memory: tmpfs and ramfs.
_IN_MEMORY = (0x01021994, 0x858458F6)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Span:
    """Whole pages of memory: where they begin and how many bytes they are."""

    address: int
    length: int


@dataclass
class _Place:
    """Where in the file a span lies, and what keeps its memory from being freed and used by others."""

    offset: int
    owners: list[Any]


@dataclass
class _GroupFile:
    descriptor: int
    size: int = 0
    mapped: dict[Span, _Place] = field(default_factory=dict)


class MappedFiles:
    """Keeps groups in unnamed files, one per group.

    Args:
        folder: where the files are made; made itself if it is missing, and removed by :meth:`close` if it is empty
            then.

    Raises:
        AlignmentError: this is not Linux, or no file can be made there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if platform.system() != "Linux":
            raise AlignmentError("offload_level needs Linux on a CPU; leave it empty on this system")
        self._libc = _libc()
        self._files: dict[str, _GroupFile] = {}
        with self._disk_errors("its first file"):
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        if _lives_in_memory(self._libc, self.folder):
            get_logger().warning(
                "offload_dir %s lies in memory (tmpfs): offloading to it saves nothing; name a folder on a disk",
                self.folder,
            )

    def move_out(self, group: str, tensors: Sequence[Any], frozen: bool) -> int:
        """Write what changed and give the pages back; returns the bytes written.

        ``frozen`` is not needed here: the kernel says what changed.

        Raises:
            AlignmentError: the disk is full or fails. The tensors are as they were.
        """
        owners = spans_of(tensors)
        if not owners:
            return 0
        with self._disk_errors(f"{group} ({sum(span.length for span in owners) >> 20} MiB)"):
            file = self._file(group)
            # What is no tensor of the group any more is let go; its memory may be freed now, mapped as it is.
            file.mapped = {span: place for span, place in file.mapped.items() if span in owners}
            new = self._reserve(file, [span for span in owners if span not in file.mapped])
            pieces = list(new.items())
            for span, place in file.mapped.items():
                shift = place.offset - span.address
                pieces += [(part, part.address + shift) for part in changed_parts(span)]
            written = write_spans(file.descriptor, pieces)
            for span in file.mapped:
                self._advise(span, _MADV_DONTNEED)
            for span, offset in new.items():
                self._map(file.descriptor, span, offset)
                # only what is mapped may ever be dropped
                file.mapped[span] = _Place(offset, owners[span])
        # What the models freed in their phase is given back as well.
        self._libc.malloc_trim(0)
        return written

    def move_in(self, group: str, tensors: Sequence[Any]) -> int:
        """Read the group's pages into memory; returns their bytes.

        Raises:
            AlignmentError: the disk fails.
        """
        file = self._files.get(group)
        if file is None:
            return 0
        spans = [span for span in spans_of(tensors) if span in file.mapped]
        with self._disk_errors(group):
            self.prefetch(group)
            for span in spans:
                self._populate(span)
        return sum(span.length for span in spans)

    def prefetch(self, group: str) -> None:
        """Ask the system to read the file ahead, into its cache and not into this process."""
        file = self._files.get(group)
        if file is not None:
            os.posix_fadvise(file.descriptor, 0, file.size, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the files. What is mapped stays readable; the disk space returns with the memory, at the latest when
        the process ends.
        """
        for file in self._files.values():
            os.close(file.descriptor)
        self._files = {}
        with contextlib.suppress(OSError):  # somebody else's files are in it, or it is gone already
            self.folder.rmdir()

    # -- details

    def _file(self, group: str) -> _GroupFile:
        if group not in self._files:
            with tempfile.TemporaryFile(dir=self.folder, prefix=f"{group}-{os.getpid()}-") as file:
                self._files[group] = _GroupFile(os.dup(file.fileno()))
        return self._files[group]

    @staticmethod
    def _reserve(file: _GroupFile, spans: list[Span]) -> dict[Span, int]:
        """Reserve room on the disk for new spans (a full disk shows now) and return the place of each in the file."""
        need = sum(span.length for span in spans)
        if need:
            os.posix_fallocate(file.descriptor, file.size, need)
        places = {}
        for span in spans:
            # Places are never used twice: an older mapping of such a place may still be somebody's memory.
            places[span] = file.size
            file.size += span.length
        return places

    def _map(self, descriptor: int, span: Span, offset: int) -> None:
        flags = _MAP_PRIVATE | _MAP_FIXED
        address = self._libc.mmap(span.address, span.length, _PROT_READ_WRITE, flags, descriptor, offset)
        if address != span.address:
            _raise_errno()

    def _advise(self, span: Span, advice: int) -> None:
        if self._libc.madvise(span.address, span.length, advice):
            _raise_errno()

    def _populate(self, span: Span) -> None:
        try:
            self._advise(span, _MADV_POPULATE_READ)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            _view(span)[::PAGE].max()  # an older kernel: a byte of each page brings it in

    @contextlib.contextmanager
    def _disk_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _FULL:
                why = error.strerror
                with contextlib.suppress(OSError):
                    usage = os.statvfs(self.folder)
                    why = f"{why}; {usage.f_bavail * usage.f_frsize >> 20} MiB are free there"
                raise AlignmentError(
                    f"offload_dir {self.folder} has no room for {what} ({why}): choose another offload_dir, or fewer "
                    "words in offload_level"
                ) from error
            hint = ""
            if error.errno == errno.ENOMEM:
                hint = "; the system's limit of mappings (vm.max_map_count) may be too low"
            raise AlignmentError(
                f"offload_dir {self.folder} cannot hold {what}: {error.strerror or error}{hint}; choose another "
                "offload_dir, or leave offload_level empty"
            ) from error


def spans_of(tensors: Iterable[Any]) -> dict[Span, list[Any]]:
    """The whole pages inside the tensors' memory, by address; memory that several tensors share counts once.

    Args:
        tensors: Paddle tensors on the CPU. One that has no memory, or is no dense block of it, is left out.

    Returns:
        each span with tensors that share the memory of those it belongs to: as long as they live, so does it.
    """
    blocks = []
    for tensor in tensors:
        if tensor._is_initialized() and tensor.is_contiguous():
            address, length = tensor.data_ptr(), int(tensor.size) * tensor.element_size()
            first, end = -(-address // PAGE) * PAGE, (address + length) // PAGE * PAGE
            if first < end:
                blocks.append((first, end, tensor))
    merged: list[tuple[int, int, list[Any]]] = []
    for first, end, tensor in sorted(blocks, key=lambda block: block[:2]):
        if merged and first < merged[-1][1]:
            start, before, owners = merged.pop()
            merged.append((start, max(before, end), [*owners, tensor.detach()]))
        else:
            merged.append((first, end, [tensor.detach()]))
    return {Span(first, end - first): owners for first, end, owners in merged}


def page_flags(span: Span) -> np.ndarray | None:
    """The pagemap entries of a span, ``[pages]`` uint64, or None where the system does not show them."""
    try:
        # Opened anew each time: after a fork an open one would still show the parent's memory.
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            raw = os.pread(file.fileno(), 8 * (span.length // PAGE), 8 * (span.address // PAGE))
    except OSError:
        return None
    return np.frombuffer(raw, dtype=np.uint64) if len(raw) == 8 * (span.length // PAGE) else None


def changed_parts(span: Span) -> list[Span]:
    """The parts of a privately mapped span that were written since they were mapped or dropped, in order.

    All of it where the system does not show which pages these are.
    """
    flags = page_flags(span)
    if flags is None:
        return [span]
    changed = ((flags & _PRESENT) != 0) & ((flags & _FILE_PAGE) == 0) | ((flags & _SWAPPED) != 0)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], changed, [False]]).astype(np.int8)))
    starts, ends = edges[::2].tolist(), edges[1::2].tolist()
    return [Span(span.address + a * PAGE, (b - a) * PAGE) for a, b in zip(starts, ends, strict=True)]


def resident_bytes(tensors: Iterable[Any]) -> int | None:
    """Bytes of the tensors' whole pages that are in memory now, as the kernel counts them; None where it does not."""
    total = 0
    for span in spans_of(tensors):
        flags = page_flags(span)
        if flags is None:
            return None
        total += PAGE * int(((flags & _PRESENT) != 0).sum())
    return total


def write_spans(descriptor: int, pieces: Sequence[tuple[Span, int]]) -> int:
    """Write memory to a file, neighbours in the file together, :data:`BUCKET` bytes at a time.

    Args:
        descriptor: of the file.
        pieces: memory and its place in the file.

    Returns:
        the bytes written.

    Raises:
        OSError: the disk is full or fails.
    """
    buffers: list[memoryview] = []
    start = end = total = 0

    def flush() -> None:
        _write_all(descriptor, buffers, start)
        buffers.clear()

    for span, offset in pieces:
        done = 0
        while done < span.length:
            place = offset + done
            if buffers and (place != end or end - start >= BUCKET or len(buffers) == _MOST_BUFFERS):
                flush()
            if not buffers:
                start = end = place
            length = min(span.length - done, BUCKET - (end - start))
            buffers.append(memoryview(_view(Span(span.address + done, length))))
            done, end, total = done + length, end + length, total + length
    flush()
    return total


def _write_all(descriptor: int, buffers: list[memoryview], offset: int) -> None:
    left = list(buffers)
    while left:
        done = os.pwritev(descriptor, left, offset)
        offset += done
        while left and done >= len(left[0]):
            done -= len(left.pop(0))
        if done:
            left[0] = left[0][done:]


def _view(span: Span) -> np.ndarray:
    """The span's bytes, ``[length]`` uint8, not copied."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * span.length).from_address(span.address))


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,
    ]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def _lives_in_memory(libc: ctypes.CDLL, folder: Path) -> bool:
    # struct statfs begins with f_type, a long; it is 120 bytes on 64-bit Linux.
    buffer = (ctypes.c_long * 64)()
    return libc.statfs(os.fsencode(folder), buffer) == 0 and buffer[0] in _IN_MEMORY


def _raise_errno() -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number))
