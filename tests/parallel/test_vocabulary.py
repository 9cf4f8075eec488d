"""Log-probs, entropy and their gradients over a vocabulary that is cut over tensor ranks are those of the whole."""

from __future__ import annotations

import pytest

from tests.parallel import vocabulary_jobs
from tests.parallel.forked import run_ranks


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_cut_vocabulary_changes_nothing(ranks: int, masked: bool) -> None:
    for far in run_ranks(ranks, vocabulary_jobs.differences, masked):
        assert far["greedy"] == 0
        assert max(far["logprobs"], far["entropy"], far["gradient"]) < 2e-5, far
