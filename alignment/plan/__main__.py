"""``python -m alignment.plan [FILE]``: write ``docs/plan.md``, or the named file; ``-`` prints it."""

from __future__ import annotations

import sys
from pathlib import Path

from alignment.plan import docs


def main(argv: list[str]) -> int:
    """Write the page and return the exit status."""
    target = argv[0] if argv else str(Path(__file__).resolve().parents[2] / "docs" / "plan.md")
    if target == "-":
        print(docs.markdown(), end="")
    else:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_text(docs.markdown(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
