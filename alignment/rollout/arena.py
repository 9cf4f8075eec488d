"""Places in the key-value cache: regions of tokens, given out and taken back.

A prompt has one region however many answers are wanted of it, and each answer one of its own that is as long as it may
become. So nothing moves while rows come and go, and a row that ends makes room at once.
"""

from __future__ import annotations

# Regions begin at multiples of this: the CPU kernels keep the keys of so many tokens together.
BLOCK = 16


def rounded(tokens: int, block: int = BLOCK) -> int:
    """``tokens``, up to whole blocks."""
    return -(-tokens // block) * block


class TokenArena:
    """First-fit allocation of token regions.

    Args:
        tokens: in all; rounded up to whole blocks.
        block: regions begin at multiples of so many tokens.

    Attributes:
        block: see above.
        capacity: tokens in all.
        used: tokens in regions now.
        most_used: the most that there were.
    """

    def __init__(self, tokens: int, block: int = BLOCK) -> None:
        self.block, self.capacity = block, rounded(tokens, block)
        self.used = self.most_used = 0
        self._free: list[tuple[int, int]] = [(0, self.capacity)]  # (place, length), by place, never touching
        self._sizes: dict[int, int] = {}

    def allocate(self, tokens: int) -> int | None:
        """The place of a new region of at least ``tokens`` >= 1 tokens, or None while there is no room for it."""
        size = rounded(tokens, self.block)
        for number, (place, length) in enumerate(self._free):
            if length >= size:
                if length == size:
                    del self._free[number]
                else:
                    self._free[number] = (place + size, length - size)
                self._sizes[place] = size
                self.used += size
                self.most_used = max(self.most_used, self.used)
                return place
        return None

    def release(self, place: int) -> None:
        """Take a region back.

        Raises:
            KeyError: no region begins at ``place``.
        """
        size = self._sizes.pop(place)
        self.used -= size
        merged: list[tuple[int, int]] = []
        for start, length in sorted([*self._free, (place, size)]):
            if merged and merged[-1][0] + merged[-1][1] == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((start, length))
        self._free = merged
