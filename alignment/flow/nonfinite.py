"""When a loss or gradient is NaN or infinite: keep the batch that did it, in numbers and in words."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alignment.errors import NonFiniteError
from alignment.rollout.batch import LIST, Batch


def dump_batches(
    output_dir: str | Path,
    step: int,
    rank: int,
    batches: Sequence[Mapping[str, np.ndarray]],
    decode: Callable[[Mapping[str, np.ndarray]], list[str]] | None = None,
) -> Path:
    """Write ``nonfinite_batch_step{step}.npz`` (``_rank{r}`` added on other ranks than 0) and beside it a readable
    ``.json``.

    Args:
        output_dir: the run's folder.
        step: optimizer step (1-based) that failed.
        rank: this process.
        batches: micro batches of arrays; with several, names are ``micro{i}/{name}``.
        decode: turns a batch into one text per row for the ``.json``.

    Returns:
        The path of the ``.npz``.
    """
    stem = f"nonfinite_batch_step{step}" + (f"_rank{rank}" if rank else "")
    path = Path(output_dir) / f"{stem}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    several = len(batches) > 1
    arrays = {
        (f"micro{i}/{name}" if several else name): np.asarray(value)
        for i, batch in enumerate(batches)
        for name, value in batch.items()
    }
    np.savez_compressed(path, **arrays)
    readable = {
        "step": step,
        "rank": rank,
        "arrays": {name: {"shape": list(value.shape), "dtype": str(value.dtype)} for name, value in arrays.items()},
        "texts": [decode(batch) for batch in batches] if decode else [],
    }
    with open(path.with_suffix(".json"), "w", encoding="utf-8") as handle:
        json.dump(readable, handle, indent=2, ensure_ascii=False)
    return path


def nonfinite(what: str, value: float, step: int, path: Path) -> NonFiniteError:
    """The error that names the quantity, the step and the dump."""
    return NonFiniteError(
        f"{what} became {value} in step {step}; no weight was changed by it. The batch is in {path} (readable: "
        f"{path.with_suffix('.json').name}). Usual causes: a learning rate that is too high, or half precision without "
        "enough range; the last checkpoint is still good."
    )


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
