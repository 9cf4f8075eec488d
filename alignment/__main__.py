"""``python -m alignment ...``: the same as the ``alignment`` command; this file is what the launcher of several
processes starts.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file, by the launcher: make the checkout importable
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from alignment.cli import main

if __name__ == "__main__":
    sys.exit(main())
