"""The precision that tests of models run in, and what it allows.

With ``ALIGNMENT_TEST_PRECISION=bf16`` (``make test-bf16``) every argument file says ``bf16: true`` and the models that
tests load have bfloat16 weights. Tolerances of float32 stand where they are used; those of bfloat16 are in one table.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

PRECISION = os.environ.get("ALIGNMENT_TEST_PRECISION", "float32")
if PRECISION not in ("float32", "bf16"):
    raise ValueError(f"ALIGNMENT_TEST_PRECISION is {PRECISION!r}; it is float32 or bf16")
BF16 = PRECISION == "bf16"
#: Of weights.
DTYPE = "bfloat16" if BF16 else "float32"
#: What an argument file says.
ARGUMENTS: dict[str, Any] = {"bf16": True} if BF16 else {}

#: What two ways to compute the same may differ by in bfloat16, which has 8 bits: rounding moves a number by up to 2^-9
#: of it. Sums in another order move a float32 number by 1e-7 of it; where that crosses the middle of two bfloat16
#: numbers the whole step of 2^-8 is taken, and the layers behind carry it on.
TOLERANCE = {
    "logprob": 0.15,  # nats, of one token
    "loss": 2e-2,  # of a batch; its figures too (margins, accuracies, scores); absolute or relative
    "gradient": 5e-2,  # its norm, relative
    "run": 0.1,  # every figure of a whole PPO run
    "caught gap": 0.5,  # nats: what the checks of the first step must stop a run for
    "learnt accuracy": 0.8,
    "learnt loss": 0.45,  # what tiny runs end below
    "score": 5e-2,  # of a reward or value model whose scores are about 1
}


def within(float32: float, name: str) -> float:
    """The tolerance of this session's precision: the given one, or the table's."""
    return TOLERANCE[name] if BF16 else float32


def same_answers(some: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> bool:
    """Whether two ways to compute chose the same tokens: all of them. In bfloat16 two tokens may be so close that
    rounding decides, and answers go apart behind it: 60 % of a pair's tokens until then, on average.
    """
    if not BF16:
        return [list(row) for row in some] == [list(row) for row in others]
    shares = []
    for one, other in zip(some, others, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        shares.append(same / max(len(one), len(other)))
    return float(np.mean(shares)) >= 0.6


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of ``folder/model.safetensors``; bfloat16 as float32."""
    from alignment.ppo.models.safetensors_file import SafetensorsFile

    file = SafetensorsFile(Path(folder) / "model.safetensors")
    return {name: np.array(file.read(name)) for name in file.shapes()}


def stored_codes(folder: Path) -> set[str]:
    """The dtypes in the header of ``folder/model.safetensors``, as the format writes them, but for a normaliser's."""
    from alignment.ppo.models.safetensors_file import read_safetensors_header

    _, tensors, _ = read_safetensors_header(Path(folder) / "model.safetensors")
    return {info["dtype"] for name, info in tensors.items() if not name.startswith("normalizer.")}
