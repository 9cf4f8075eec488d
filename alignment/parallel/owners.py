"""Which rank of a sharding group owns which parameter. Needs no Paddle, so that a plan can ask too."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def assign_owners(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Share tensors out evenly: the largest first, each to the rank that has least.

    Args:
        sizes: elements of each tensor.
        ranks: to share them over.

    Returns:
        the owner of each.
    """
    load = np.zeros(ranks, dtype=np.int64)
    owners = {}
    for name in sorted(sizes, key=lambda key: (-sizes[key], key)):
        rank = int(load.argmin())
        owners[name] = rank
        load[rank] += sizes[name]
    return owners
