"""Regions of the cache never overlap, and what is given back is used again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.rollout.arena import BLOCK, TokenArena, rounded


def test_regions_are_whole_blocks_and_the_arena_ends() -> None:
    arena = TokenArena(3 * BLOCK)
    assert [arena.allocate(n) for n in (1, BLOCK + 1, 1)] == [0, BLOCK, None]
    assert arena.used == 3 * BLOCK
    arena.release(0)
    assert arena.allocate(BLOCK) == 0


def test_neighbours_that_are_free_become_one_region() -> None:
    arena = TokenArena(4 * BLOCK)
    places = [arena.allocate(BLOCK) for _ in range(4)]
    for number in (1, 3, 2, 0):
        arena.release(places[number])  # type: ignore[arg-type]
    assert arena.used == 0
    assert arena.allocate(4 * BLOCK) == 0


def test_a_place_that_was_not_given_is_refused() -> None:
    with pytest.raises(KeyError):
        TokenArena(BLOCK).release(0)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 100)), max_size=60))
def test_regions_never_overlap(moves: list[tuple[bool, int]]) -> None:
    arena, held = TokenArena(256), {}
    for take, size in moves:
        if take:
            place = arena.allocate(size)
            if place is None:
                continue
            region = range(place, place + rounded(size))
            assert region.stop <= arena.capacity
            assert all(region.stop <= other.start or other.stop <= region.start for other in held.values())
            held[place] = region
        elif held:
            place = sorted(held)[size % len(held)]
            arena.release(place)
            del held[place]
        assert arena.used == sum(len(region) for region in held.values())
