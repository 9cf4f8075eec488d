"""A PPO loss that is NaN or infinite stops the run, with the batch that made it on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from alignment.errors import NonFiniteError
from alignment.flow.nonfinite import dump_batches, nonfinite
from alignment.rollout.batch import LIST, Batch


@dataclass(frozen=True)
class FiniteCheck:
    """Lets finite losses pass.

    Attributes:
        output_dir: where the dump goes.
        rank: of this process.
        decode: token ids to text, for the readable part of the dump.
    """

    output_dir: str
    rank: int
    decode: Callable[[list[int]], str]

    def require(self, value: float, what: str, batch: Batch | Mapping[str, np.ndarray], step: int) -> float:
        """Return ``value``, or dump the batch and stop.

        Args:
            value: the loss.
            what: its name, for the message.
            batch: what it was computed on.
            step: optimizer steps done before this one.

        Raises:
            NonFiniteError: ``value`` is NaN or infinite; names the dump and the arrays of the batch that are not finite
                themselves.
        """
        if math.isfinite(value):
            return value
        arrays = _arrays(batch)
        path = dump_batches(self.output_dir, step + 1, self.rank, [arrays], self._texts)
        error = nonfinite(f"the {what}", value, step + 1, path)
        suspects = [name for name, array in arrays.items() if array.dtype.kind == "f" and not np.isfinite(array).all()]
        if suspects:
            error = NonFiniteError(f"{error} The batch itself holds non-finite values in: {', '.join(suspects)}.")
        raise error

    def _texts(self, arrays: Mapping[str, np.ndarray]) -> list[str]:
        ids = arrays["tokens"] if "tokens" in arrays else arrays["input_ids"]
        return [self.decode(row.tolist()) for row in ids]


def _arrays(batch: Batch | Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    if not isinstance(batch, Batch):
        return {name: np.asarray(array) for name, array in batch.items()}
    return {name: batch[name] for name, column in batch.columns.items() if column.kind != LIST}
