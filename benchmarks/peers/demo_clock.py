"""``python -m alignment demo`` up to its first optimizer step: says so with a line on standard output, and stops.

A thread beside the demo looks where its main thread stands, as the toolkit's own heartbeats do; nothing of the demo is
changed. ``python -m benchmarks.peers.demo_clock DIR``
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
import time

POLL = 0.02
LOOP = os.path.join("alignment", "flow", "loop.py")
DONE = "first optimizer step"


def steps_done(main_thread: int) -> int:
    """Optimizer steps of the training loop that the thread is in; 0 outside of one."""
    frame = sys._current_frames().get(main_thread)
    while frame is not None:
        if frame.f_code.co_name == "train" and frame.f_code.co_filename.endswith(LOOP):
            return frame.f_locals["self"].state.global_step
        frame = frame.f_back
    return 0


def watch(main_thread: int, stdout: int) -> None:
    """Wait for the first step, say so and end the process."""
    while steps_done(main_thread) < 1:
        time.sleep(POLL)
    os.write(stdout, f"{DONE}\n".encode())
    os._exit(0)


def main() -> None:
    """Run the demo under watch."""
    stdout = os.dup(1)
    os.dup2(2, 1)
    threading.Thread(target=watch, args=(threading.get_ident(), stdout), daemon=True).start()
    sys.argv = ["alignment", "demo", "--output_dir", sys.argv[1]]
    runpy.run_module("alignment", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
