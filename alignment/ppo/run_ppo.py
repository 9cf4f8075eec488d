"""PPO from a JSON or YAML file, alone or under the launcher; the algorithm is in :mod:`alignment.methods.ppo`.

::

    python -u -m paddle.distributed.launch run_ppo.py ../../config/llama/ppo_argument.json
    python -m alignment ppo config/llama/ppo_argument.json output_dir=checkpoints/mine
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: make the checkout importable, its folder's names (data, ...) not
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from alignment.cli import run_main


def main(argv: list[str]) -> int:
    """Run PPO, or the method that paddlenlp's ``rl_algorithm`` names, with ``argv`` (a file and overrides).

    Returns:
        The exit status: 0, or 130 after an interruption.

    Raises:
        AlignmentError: whatever the user can mend.
    """
    from alignment.methods.ppo import PPO
    from alignment.methods.start import chosen_method, run_method

    return run_method(chosen_method(argv) or PPO, argv)


if __name__ == "__main__":
    sys.exit(run_main(main))
