"""All tokenised samples of a data set as flat arrays: small in memory, quick to save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alignment.ppo.data.encode import ANSWER_CUT, MALFORMED, PROMPT_CUT, Encoded
from alignment.ppo.data.files import BadRow

CUTS = (PROMPT_CUT, ANSWER_CUT)
_ARRAYS = ("reasons", "cuts", "prompt_lens", "trained", "signs")


def compact(outcome: Encoded | str | BadRow) -> Encoded | str | BadRow:
    """Turn an outcome's lists into arrays, which are far smaller than lists of Python numbers."""
    if isinstance(outcome, Encoded):
        outcome.rows = [np.array(row, dtype=np.int32) for row in outcome.rows]  # type: ignore[misc]
        if outcome.trained is not None:
            outcome.trained = np.array(outcome.trained, dtype=bool)  # type: ignore[assignment]
    return outcome


@dataclass(frozen=True)
class TokenTable:
    """The outcomes of tokenising ``n`` samples.

    ``reasons`` [n] str: why the sample was dropped, "" if it was not. ``cuts`` [n] uint8: bit ``i`` says ``CUTS[i]``
    happened. ``prompt_lens`` [n] int32. ``ids[k]`` int32, flat: the k-th sequences of all samples, sample ``i`` at
    ``offsets[k][i]:offsets[k][i + 1]`` (offsets int64 [n + 1]). ``trained`` bool, flat like ``ids[0]``, or empty.
    ``signs`` int8 [n, 2]: those of safety pairs (see :class:`~alignment.ppo.data.encode.Encoded`); [0, 2] of others.
    ``messages``: what is wrong with the first malformed samples.
    """

    reasons: np.ndarray
    cuts: np.ndarray
    prompt_lens: np.ndarray
    ids: tuple[np.ndarray, ...]
    offsets: tuple[np.ndarray, ...]
    trained: np.ndarray
    signs: np.ndarray
    messages: tuple[str, ...]

    @classmethod
    def build(cls, outcomes: Sequence[Encoded | str | BadRow], sequences: int) -> TokenTable:
        """Join outcomes; ``sequences`` is the number of sequences per sample (2 for pairs)."""
        empty = np.zeros(0, dtype=np.int32)
        good = [outcome if isinstance(outcome, Encoded) else None for outcome in outcomes]
        rows = [[outcome.rows[k] if outcome else empty for outcome in good] for k in range(sequences)]
        trained = [outcome.trained for outcome in good if outcome and outcome.trained is not None]
        signs = [g.signs if g and g.signs else [0, 0] for g in good] if any(g and g.signs for g in good) else []
        reasons = [
            "" if g else MALFORMED if isinstance(o, BadRow) else str(o) for o, g in zip(outcomes, good, strict=True)
        ]
        return cls(
            reasons=np.array(reasons, dtype=np.str_),
            cuts=np.array([sum(1 << CUTS.index(cut) for cut in g.cuts) if g else 0 for g in good], dtype=np.uint8),
            prompt_lens=np.array([g.prompt_len if g else 0 for g in good], dtype=np.int32),
            ids=tuple(np.concatenate([empty, *own]) for own in rows),
            offsets=tuple(np.cumsum([0, *map(len, own)], dtype=np.int64) for own in rows),
            trained=np.concatenate([np.zeros(0, dtype=bool), *trained]),
            signs=np.array(signs, dtype=np.int8).reshape(-1, 2),
            messages=tuple(o.reason for o in outcomes if isinstance(o, BadRow))[:3],
        )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the table as named arrays, for the disk."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        for k, (ids, offsets) in enumerate(zip(self.ids, self.offsets, strict=True)):
            arrays |= {f"ids{k}": ids, f"offsets{k}": offsets}
        return arrays | {"messages": np.array(self.messages, dtype=np.str_)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], sequences: int) -> TokenTable:
        """The inverse of :meth:`to_arrays`; raises KeyError if one is missing."""
        return cls(
            **{name: arrays[name] for name in _ARRAYS},
            ids=tuple(arrays[f"ids{k}"] for k in range(sequences)),
            offsets=tuple(arrays[f"offsets{k}"] for k in range(sequences)),
            messages=tuple(map(str, arrays["messages"])),
        )

    def lengths(self, k: int) -> np.ndarray:
        """Return int64 [n]: the lengths of the k-th sequences."""
        return np.diff(self.offsets[k])

    def row(self, index: int, k: int = 0) -> np.ndarray:
        """Return int64 [len]: the ids of sample ``index``'s k-th sequence."""
        return self.ids[k][self.offsets[k][index] : self.offsets[k][index + 1]].astype(np.int64)

    def trained_of(self, index: int) -> np.ndarray:
        """Return bool [len]: which ids of sample ``index`` are learned."""
        return self.trained[self.offsets[0][index] : self.offsets[0][index + 1]]

    def parts(self, index: int) -> list[np.ndarray]:
        """Return all that sample ``index`` is made of: its sequences, which ids of the first are learned, and the signs
        of a safety pair.
        """
        rows = [ids[o[index] : o[index + 1]] for ids, o in zip(self.ids, self.offsets, strict=True)]
        return [*rows, self.trained_of(index), *self.signs[index : index + 1]]
