"""`PlainDecoder`: one step of generation through a model, whole or divided.

With tensor parallelism every tensor rank sees all logits and chooses the same tokens. With a pipeline the stages keep
the caches of their own layers, hidden states travel forward, and the last stage chooses and tells the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import paddle
from paddle import Tensor

from alignment.ppo.models import cached_hidden_states, lm_logits

T = TypeVar("T")


class PlainDecoder:
    """Runs a causal model, or this process's stage of one, token by token.

    Args:
        model: a paddlenlp causal language model or a pipeline stage of one; nothing is copied.
        schedule: the pipeline (:class:`alignment.parallel.pipeline.Pipeline`) whose stage the model is, or ``None``.
    """

    def __init__(self, model: Any, schedule: Any = None) -> None:
        self.model, self.schedule = model, schedule

    @property
    def chooses(self) -> bool:
        """Whether this process has the logits."""
        return self.schedule is None or self.schedule.topology.last_stage

    def step(
        self, tokens: np.ndarray, mask: np.ndarray, positions: np.ndarray, caches: Any
    ) -> tuple[np.ndarray | None, Any]:
        """Read tokens behind a cache.

        Args:
            tokens: ``[B, S]`` int64.
            mask: ``[B, cached + S]`` int64, 1 where a slot is real.
            positions: ``[B, S]`` int64.
            caches: of the step before, None at first.

        Returns:
            ``(logits, caches)``: ``[B, vocab]`` float32 behind each row's last token, None where :attr:`chooses` is
            false; and the caches of this process's layers.
        """
        grown: list[Any] = []

        def compute(received: Tensor | None) -> Tensor:
            hidden, new = cached_hidden_states(
                self.model,
                paddle.to_tensor(tokens),
                paddle.to_tensor(mask),
                paddle.to_tensor(positions),
                caches,
                received,
            )
            grown.append(new)
            return hidden

        hidden = compute(None) if self.schedule is None else self.schedule.pass_on(compute)
        logits = lm_logits(self.model, hidden[:, -1]).numpy() if self.chooses else None
        return logits, grown[0]

    def decide(self, choose: Callable[[], T]) -> T:
        """What ``choose`` returns where the logits are, on every process."""
        if self.schedule is None:
            return choose()
        return self.schedule.share(choose() if self.chooses else None)
