"""Runs of several ranks for tests, forked from one process that has imported Paddle already.

A launch costs each rank the imports of paddle and paddlenlp (9 s of a core). Here a helper process imports them once
and forks the ranks of each job: 2 ranks start in about half a second. The helper runs no Paddle operator itself,
because threads do not survive a fork.

    results = run_ranks(4, cpu_backend_jobs.train, "llama", timeout=60)      # one result per rank

The function and its arguments are pickled (the function by its module's name), so it lives in a module that can be
imported. Each rank finds the variables that ``paddle.distributed.launch`` sets.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import importlib
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

_PR_SET_PDEATHSIG = 1  # of prctl(2)
_SIZE = struct.Struct("!Q")
_REPO = Path(__file__).resolve().parents[2]
# After a rank has failed the others have this long to notice it themselves.
_GRACE = 8.0


class RankError(AssertionError):
    """A rank of a job failed; the message has its traceback and the end of what it wrote."""


@dataclass
class JobResult:
    """What the ranks of a job returned, wrote and raised.

    Attributes:
        values: one per rank; None where it failed.
        errors: rank -> traceback (or why there is none).
        output: rank -> the end of its standard output and error.
        seconds: wall time.
    """

    values: list[Any]
    errors: dict[int, str] = field(default_factory=dict)
    output: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0

    def check(self) -> list[Any]:
        """Return the ranks' values.

        Raises:
            RankError: when a rank failed or was still running at the time limit.
        """
        if self.errors:
            told = [
                f"--- rank {rank} of {len(self.values)}\n{error.rstrip()}\n{self.output.get(rank, '')[-2000:]}"
                for rank, error in sorted(self.errors.items())
            ]
            raise RankError("\n".join(told))
        return self.values


def run_ranks(size: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0, **kwargs: Any) -> list[Any]:
    """Run ``function(*args, **kwargs)`` on ``size`` forked ranks and return their results in rank order.

    Raises:
        RankError: when a rank fails or does not end within ``timeout`` seconds.
    """
    return try_ranks(size, function, *args, timeout=timeout, **kwargs).check()


def try_ranks(size: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0, **kwargs: Any) -> JobResult:
    """As :func:`run_ranks`, but failures are in the result."""
    return warm_helper().run(size, function, args, kwargs, timeout)


@functools.cache
def warm_helper() -> Helper:
    """The helper process of this test session, started on first use."""
    helper = Helper()
    atexit.register(helper.close)
    return helper


class Helper:
    """The process that forks, seen from the tests."""

    def __init__(self) -> None:
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_REPO)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from tests.parallel.forked import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_REPO,
            env=environ,
        )

    def run(self, size: int, function: Callable[..., Any], args: tuple, kwargs: dict, timeout: float) -> JobResult:
        """Have the helper fork a job and wait for its result."""
        _write(self._process.stdin, (size, timeout, pickle.dumps((function, args, kwargs))))
        return _read(self._process.stdout)

    def close(self) -> None:
        """End the helper; its ranks have ended with their jobs."""
        self._process.stdin.close()
        self._process.wait(10)


def serve() -> None:
    """The helper's life: import, then fork one job after the other until the tests close its standard input."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for module in ("paddle", "paddle.distributed.fleet", "paddlenlp.transformers"):
        importlib.import_module(module)
    while True:
        try:
            size, timeout, job = _read(sys.stdin.buffer)
        except EOFError:
            return
        _write(replies, _run_job(size, timeout, job))


def _run_job(size: int, timeout: float, job: bytes) -> JobResult:
    began = time.monotonic()
    ports = _free_ports(size + 1)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        logs = [Path(folder) / f"{rank}.log" for rank in range(size)]
        ranks = [_fork(rank, size, ports, job, logs[rank]) for rank in range(size)]
        result = JobResult([None] * size)
        try:
            _collect(ranks, result, began + timeout, timeout)
        finally:
            for pid, pipe in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                os.close(pipe)
        result.output = {rank: logs[rank].read_text(errors="replace")[-4000:] for rank in result.errors}
    result.seconds = time.monotonic() - began
    return result


def _collect(ranks: list[tuple[int, int]], result: JobResult, deadline: float, timeout: float) -> None:
    """Read each rank's reply; the end of its pipe is the end of the rank."""
    waiting = {pipe: rank for rank, (_, pipe) in enumerate(ranks)}
    data = {pipe: b"" for pipe in waiting}
    while waiting:
        left = deadline - time.monotonic()
        if left <= 0:
            for rank in waiting.values():
                result.errors[rank] = f"still running after {timeout:.0f} s" + (
                    "" if not result.errors else f" (or {_GRACE:.0f} s after another rank failed)"
                )
            return
        for pipe in select.select(list(waiting), [], [], left)[0]:
            part = os.read(pipe, 1 << 20)
            data[pipe] += part
            if part:
                continue
            rank = waiting.pop(pipe)
            ok, value = pickle.loads(data[pipe]) if data[pipe] else (False, "ended without a result (killed?)")
            if ok:
                result.values[rank] = value
            else:
                result.errors[rank] = value
                deadline = min(deadline, time.monotonic() + _GRACE)


def _fork(rank: int, size: int, ports: list[int], job: bytes, log: Path) -> tuple[int, int]:
    """Start one rank; return its process id and the pipe on which its reply comes."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    # From here on this is the rank; whatever happens, it must not return into the helper's code.
    status = 1
    try:
        os.close(reading)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a rank ends with the helper
        _redirect(log)
        os.environ.update(_launch_variables(rank, size, ports))
        reply = _work(job)
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(reply)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _work(job: bytes) -> bytes:
    import paddle

    from alignment.parallel import cpu_backend

    # The helper has looked these up when it imported Paddle, as a run of one process.
    paddle.distributed.parallel._global_parallel_env = None
    paddle.distributed.collective._global_env = None
    try:
        function, args, kwargs = pickle.loads(job)
        reply = pickle.dumps((True, function(*args, **kwargs)))
    except BaseException as error:
        cpu_backend.leave(f"{type(error).__name__}: {error}")
        return pickle.dumps((False, traceback.format_exc()))
    cpu_backend.leave()
    return reply


def _redirect(log: Path) -> None:
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)


def _launch_variables(rank: int, size: int, ports: list[int]) -> dict[str, str]:
    """What ``paddle.distributed.launch`` sets for a run of ``size`` CPU processes on one host."""
    endpoints = [f"127.0.0.1:{port}" for port in ports[1:]]
    return {
        "PADDLE_MASTER": f"127.0.0.1:{ports[0]}",
        "PADDLE_GLOBAL_SIZE": str(size),
        "PADDLE_LOCAL_SIZE": str(size),
        "PADDLE_GLOBAL_RANK": str(rank),
        "PADDLE_LOCAL_RANK": str(rank),
        "PADDLE_NNODES": "1",
        "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
        "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
        "PADDLE_TRAINER_ID": str(rank),
        "PADDLE_TRAINERS_NUM": str(size),
        "PADDLE_RANK_IN_NODE": str(rank),
        "PADDLE_DISTRI_BACKEND": "gloo",
    }


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _write(stream: BinaryIO, value: object) -> None:
    data = pickle.dumps(value)
    stream.write(_SIZE.pack(len(data)) + data)
    stream.flush()


def _read(stream: BinaryIO) -> Any:
    header = stream.read(_SIZE.size)
    if len(header) < _SIZE.size:
        raise EOFError("the other process has ended")
    return pickle.loads(stream.read(_SIZE.unpack(header)[0]))
