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
    """

    input = "prompts"

    def __init__(self, prompts: Any, args: Any, sizes: Sizes, world: World) -> None:
        self.prompts, self.sizes, self.world = prompts, sizes, world
        self.drop_last = bool(args.dataloader_drop_last)
        self.stream = IndexStream(len(prompts), args.seed, shuffle=args.shuffle)

    @property
    def position(self) -> int:
        """Prompts taken since the start of the run."""
        return self.stream.position

    @position.setter
    def position(self, value: int) -> None:
        self.stream.position = value

    @property
    def epoch(self) -> float:
        """Epochs since the start of the run."""
        return self.stream.position / self.stream.rows

    @property
    def epoch_ended(self) -> bool:
        """Whether the next prompt begins an epoch (what is left of this one may be dropped)."""
        left = self.stream.left_in_epoch
        return left == self.stream.rows or (self.drop_last and left < self.sizes.prompts_per_rollout)

    def next(self) -> list[GenerationPrompt]:
        """This rank's share of the next global batch of prompts."""
        count, first = self.sizes.prompts_per_rollout, self.stream.position
        if self.stream.left_in_epoch < count:
            if self.drop_last and first % self.stream.rows != 0:
                self.stream.skip_epoch_rest()
                first = self.stream.position
            else:
                count = self.stream.left_in_epoch
        rows = self.stream.take(count)
        share = rank_slice(np.arange(len(rows)), self.world.rank, self.world.size)
        return [as_prompt(self.prompts[rows[i]], first + int(i)) for i in share]


def as_prompt(row: dict[str, Any], prompt_index: int) -> GenerationPrompt:
    """A row of a ``PromptOnlyDataset`` as the engine takes it."""
    return GenerationPrompt(row["input_ids"], prompt_index, row["prompt"], row["row"])
