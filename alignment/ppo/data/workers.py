"""Tokenising many samples, in this process or in several."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from alignment.errors import DataError
from alignment.log import get_logger, say_once

# What forked workers inherit. It is set while `encode_all` runs and empty otherwise: handing it over by memory saves
# every worker from loading a tokenizer (and Paddle with it) and the samples from being copied.
_JOB: dict[str, Any] = {}
_MIN_PARALLEL = 256
_PR_SET_PDEATHSIG = 1  # of prctl(2)


def encode_all(
    encode: Callable[[Any], Any],
    samples: Sequence[Any],
    *,
    num_proc: int = 1,
    show_progress: bool = True,
    title: str = "",
) -> list[Any]:
    """Return ``[encode(sample) for sample in samples]``, with a progress bar that shows the rate.

    Args:
        encode: must not touch Paddle: workers are forked from a process that may hold Paddle's threads.
        samples: what to encode.
        num_proc: how many processes. One is used for small data, and where processes cannot be forked (said once).
        show_progress: whether to show the bar; it is shown by the first rank alone.
        title: of the bar.

    Raises:
        DataError: ``num_proc`` is not a positive whole number.
    """
    from tqdm import tqdm

    if isinstance(num_proc, bool) or not isinstance(num_proc, int) or num_proc < 1:
        raise DataError(f"dataset_num_proc must be a whole number of at least 1, not {num_proc!r}")
    if num_proc > 1 and not sys.platform.startswith("linux"):
        say_once("tokenising with one process: several need an operating system that forks safely (Linux)")
        num_proc = 1
    hidden = not show_progress or os.environ.get("PADDLE_TRAINER_ID", "0") not in ("", "0")
    with tqdm(total=len(samples), desc=title, unit="row", disable=hidden, mininterval=0.5) as bar:
        if num_proc > 1 and len(samples) >= _MIN_PARALLEL:
            try:
                return _in_processes(encode, samples, num_proc, bar)
            except (BrokenProcessPool, OSError) as err:
                get_logger().warning("a tokenising process died (%s); going on with one process", err)
                bar.reset()
        done = []
        for sample in samples:
            done.append(encode(sample))
            bar.update()
        return done


def _in_processes(encode: Callable[[Any], Any], samples: Sequence[Any], num_proc: int, bar: Any) -> list[Any]:
    size = max(_MIN_PARALLEL // 4, -(-len(samples) // (num_proc * 16)))
    done: list[Any] = [None] * len(samples)
    with _job(encode, samples), warnings.catch_warnings():
        # Forking beside other threads is safe here: the workers run Python and the tokenizer alone.
        warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(num_proc, context, initializer=_end_with, initargs=(os.getpid(),)) as pool:
            chunks = [(start, min(start + size, len(samples))) for start in range(0, len(samples), size)]
            starts = {pool.submit(_encode_chunk, start, stop): start for start, stop in chunks}
            for future in as_completed(starts):
                found = future.result()
                done[starts[future] : starts[future] + len(found)] = found
                bar.update(len(found))
    return done


def _end_with(parent: int) -> None:
    """Have the kernel end this worker when its parent is killed: it would wait for work for ever, and keep the run's
    connections open, so that the other ranks would not notice.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


@contextmanager
def _job(encode: Callable[[Any], Any], samples: Sequence[Any]) -> Iterator[None]:
    _JOB.update(encode=encode, samples=samples)
    try:
        yield
    finally:
        _JOB.clear()


def _encode_chunk(start: int, stop: int) -> list[Any]:
    return [_JOB["encode"](sample) for sample in _JOB["samples"][start:stop]]
