"""`MaskingPolicy`: a lagging copy of the policy says at each step which tokens may be sampled (NLPO: Ramamurthy et al.
2023, section 4.3).

It reads the same tokens as the policy, in lock step and behind a cache of its own, in the rollout engine and on the
plain path. What it allowed is kept for every token (``Rollout.allowed``), so that the update renormalises over the same
tokens. Its model is used as it is when answers are generated: a copy that is brought up to date between two rollouts
masks the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignment.losses.vocabulary_mask import vocabulary_mask


@dataclass(frozen=True)
class MaskingPolicy:
    """Which tokens may be sampled.

    Attributes:
        model: a causal model with the policy's vocabulary and layout; nothing is copied. None: the policy itself.
        kind: a name of :data:`~alignment.losses.vocabulary_mask.VOCABULARY_MASKS`.
        top_mask: p or k of it; -1 allows all tokens.
        keep_at_least: tokens that are allowed in any case.
    """

    model: Any
    kind: str = "learned_top_p"
    top_mask: float = 0.9
    keep_at_least: int = 1

    def allow(
        self, logits: np.ndarray, temperature: float, early: np.ndarray, eos_ids: Sequence[int] = ()
    ) -> np.ndarray:
        """The tokens that may be sampled, ``[N, V]`` bool.

        Args:
            logits: ``[N, V]`` float32 of the model.
            temperature: of sampling; the mask is of the distribution that the copy would sample from.
            early: ``[N]`` bool, rows in which ``eos_ids`` have no chance yet: other tokens make their set.
            eos_ids: always allowed, so that an answer can end. A row whose logits are NaN or infinite allows nothing.
        """
        sound = np.isfinite(logits).all(axis=-1)
        scaled = np.where(sound[:, None], logits, 0.0).astype(np.float64) / temperature
        if early.any():
            scaled[np.ix_(early, list(eos_ids))] = -np.inf
        keep = vocabulary_mask(self.kind, scaled, self.top_mask, self.keep_at_least, eos_ids)
        return keep & sound[:, None]
