"""Supervised fine-tuning: ``alignment sft FILE [key=value ...]``, or this file as a script, alone or under the
launcher; the algorithm is in :mod:`alignment.methods.sft`.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: make the checkout importable
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from alignment.cli import run_main


def main(argv: list[str]) -> int:
    """Run the stage and return its exit status: 0, or 130 after an interruption.

    Raises:
        AlignmentError: whatever the user can mend.
    """
    from alignment.methods.sft import SFT
    from alignment.methods.start import run_method

    return run_method(SFT, argv)


if __name__ == "__main__":
    sys.exit(run_main(main))
