"""How long our side takes to start: ``import alignment``, and the demo up to its first optimizer step. Prints one JSON
line.

Task: ``repeats`` (fresh processes of which the fastest import counts), ``output`` (a folder for the demo).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

from benchmarks.peers import measure
from benchmarks.peers.demo_clock import DONE
from benchmarks.peers.measure import require

PROBE = "import time; t = time.perf_counter(); import alignment; print(time.perf_counter() - t)"


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds of both, in processes that choose their threads themselves."""
    environ = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    imports = []
    for _ in range(task["repeats"]):
        done = subprocess.run([sys.executable, "-c", PROBE], env=environ, capture_output=True, text=True, check=True)
        imports.append(float(done.stdout))
    return {"import_seconds": imports, "demo_first_step_seconds": demo_first_step(task["output"], environ)}


def demo_first_step(folder: str, environ: dict[str, str]) -> float:
    """Seconds from the command to the end of the demo's first optimizer step."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.peers.demo_clock", folder]
    began = time.perf_counter()
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - began
    require(DONE in done.stdout, f"the demo ended with status {done.returncode} before its first step")
    return seconds


if __name__ == "__main__":
    measure.answer(run)
