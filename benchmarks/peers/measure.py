"""What every child process needs: task, memory, versions, the line that it prints. Standard library only."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MIB = 1 << 20


def peak_memory() -> int:
    """Highest resident bytes of this process so far.

    ``VmHWM`` where there is a /proc: ``ru_maxrss`` also holds the peak of the process that this one was forked from.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def resident_memory() -> int:
    """Resident bytes of this process now (its peak where there is no /proc)."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_memory()


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of the packages."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def seconds_of(function: Callable[[], Any]) -> tuple[float, Any]:
    """Time one call, after a collection of garbage; returns the seconds and what it returned."""
    gc.collect()
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def best_of(function: Callable[[], Any], seconds: float = 0.4, repeats: int = 5) -> float:
    """The shortest time of one call, of at least ``repeats`` and ``seconds`` after a first one that is not counted."""
    function()
    times: list[float] = []
    while len(times) < repeats or sum(times) < seconds:
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times)


def task() -> dict[str, Any]:
    """What the driver asks of this process: the JSON object on the command line."""
    return json.loads(sys.argv[1])


@contextlib.contextmanager
def chatter_to_stderr() -> Iterator[None]:
    """Send what libraries print to standard output to standard error, child processes and C code included."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(own, 1)
        os.close(own)


def answer(function: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Run a child: do the task and print the result as one JSON line."""
    with chatter_to_stderr():
        result = function(task())
    print(json.dumps(result), flush=True)


def require(condition: bool, what: str) -> None:
    """Stop when the work that was done is not the work that was to be compared.

    Raises:
        AssertionError: saying so (unlike ``assert`` also under ``python -O``).
    """
    if not condition:
        raise AssertionError(f"not the work that is compared: {what}")


def wrap_calls(loop: Any, wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put ``wrap(name, function)`` in the place of the function of each of a loop's calls."""
    for call in loop.flow.calls:
        if call.kind == "train":
            loop._update = wrap(call.name, loop._update)
        else:
            loop.flow = loop.flow.edit(change={call.name: {"run": wrap(call.name, call.run)}})
