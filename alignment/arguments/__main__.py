"""``python -m alignment.arguments [FILE]``: write ``docs/arguments.md``, or the named file; ``-`` prints it."""

from __future__ import annotations

import sys
from pathlib import Path

from alignment.arguments import markdown_table


def main(argv: list[str]) -> int:
    """Write the page and return the exit status."""
    target = argv[0] if argv else str(Path(__file__).resolve().parents[2] / "docs" / "arguments.md")
    if target == "-":
        print(markdown_table(), end="")
    else:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_text(markdown_table(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
