"""What an iteration begins with: the next rows of the data, each data rank's share of them, in an order that depends on
the seed and the position alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from alignment.engine.batching import rank_slice
from alignment.flow.streams import IndexStream
from alignment.rollout.generate import GenerationPrompt

if TYPE_CHECKING:
    from alignment.arguments import Sizes
    from alignment.parallel import World


class PromptFeed:
    """The prompts of an iteration.

    Args:
        prompts: a prompt-only data set.
        args: ``seed``, ``shuffle``, ``dataloader_drop_last``.
        sizes: how many prompts a rollout has.
        world: the data ranks.

    Attributes:
        began: the position at which this iteration began.
    """

    input = "prompts"
    of_all_ranks = False

    def __init__(self, prompts: Any, args: Any, sizes: Sizes, world: World) -> None:
        self.prompts, self.sizes, self.world = prompts, sizes, world
        self.drop_last = bool(args.dataloader_drop_last)
        self.stream, self.began = IndexStream(len(prompts), args.seed, shuffle=args.shuffle), 0

    @property
    def position(self) -> int:
        """Prompts taken since the start of the run."""
        return self.stream.position

    @position.setter
    def position(self, value: int) -> None:
        # an iteration that is taken up again began in the epoch of its last prompt, unless its method knows better
        self.stream.position, self.began = value, max(0, value - 1)

    @property
    def epoch(self) -> float:
        """Epochs since the start of the run."""
        return self.stream.position / self.stream.rows

    @property
    def epoch_ended(self) -> bool:
        """Whether this iteration's prompts were the last of an epoch (what is left of it may be dropped)."""
        left, passed = self.stream.left_in_epoch, self.stream.epoch > self.began // self.stream.rows
        return passed or (self.drop_last and left < self.sizes.prompts_per_rollout)

    def exhausted(self, rollouts: int) -> bool:
        """Whether all prompts of the run have been taken, after so many rollouts."""
        return rollouts >= self.sizes.rollouts

    def next(self, within: bool = False) -> list[GenerationPrompt]:
        """This rank's share of the next global batch of prompts, none of which is beyond the epoch's end.

        Args:
            within: they are further prompts of the iteration that has begun.
        """
        count = self.sizes.prompts_per_rollout
        if self.stream.left_in_epoch < count:
            if self.drop_last and self.stream.position % self.stream.rows != 0:
                self.stream.skip_epoch_rest()
            else:
                count = self.stream.left_in_epoch
        first = self.stream.position
        if not within:
            self.began = first
        rows = self.stream.take(count)
        share = rank_slice(np.arange(len(rows)), self.world.rank, self.world.size)
        return [as_prompt(self.prompts[rows[i]], first + int(i)) for i in share]


def as_prompt(row: dict[str, Any], prompt_index: int) -> GenerationPrompt:
    """A row of a ``PromptOnlyDataset`` as the engine takes it."""
    return GenerationPrompt(row["input_ids"], prompt_index, row["prompt"], row["row"])
