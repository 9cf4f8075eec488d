"""The precision that tests of models run in, and what each allows.

``pytest --precision bf16`` (``make test-bf16``) gives every argument file ``bf16: true`` and every model that a test
loads bfloat16 weights. :data:`TOLERANCE` is the one table of tolerances by precision.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

#: Set by ``--precision`` (``tests/conftest.py``), before any test module is imported; processes inherit it.
VARIABLE = "ALIGNMENT_TEST_PRECISION"
PRECISION = os.environ.get(VARIABLE, "float32")
BF16 = PRECISION == "bf16"
#: Of weights.
DTYPE = "bfloat16" if BF16 else "float32"
#: What an argument file says.
ARGUMENTS: dict[str, Any] = {"bf16": True} if BF16 else {}

# bfloat16 has 8 bits: a rounding moves a number by up to 2^-9 of it. Sums in another order move a float32 number by
# 1e-7 of it, and where that crosses the middle of two bfloat16 numbers the whole step of 2^-8 is taken, which the
# layers behind carry on.
TOLERANCE: dict[str, tuple[float, float]] = {
    #                (float32, bfloat16)
    "logprob": (1e-4, 0.15),  # nats, of one token, computed in two ways
    "mean logprob": (1e-5, 0.02),  # nats, on average
    "loss": (1e-6, 2e-2),  # of a batch; relative or nats
    "gradient": (1e-4, 5e-2),  # its norm, relative
    "score": (1e-4, 5e-2),  # of a reward or value model whose scores are about 1
}


def within(name: str) -> float:
    """The tolerance called ``name`` in this session's precision."""
    return TOLERANCE[name][BF16]


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
