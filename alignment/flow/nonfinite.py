"""When a loss or gradient is NaN or infinite: keep the batch that did it, in numbers and in words."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from alignment.errors import NonFiniteError


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
