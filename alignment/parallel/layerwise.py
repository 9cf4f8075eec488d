"""Sharding stage 3 while a model computes: a layer's parameters are gathered when it runs and dropped behind it.

Forward hooks gather and drop. A trained layer runs under recomputation, so it runs (and is gathered) once more in the
backward, and nothing of it need be kept between the two. The token embedding, the final norm and the head stay for the
whole pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from paddle import nn

from alignment.parallel.sharding import Sharding


class Layerwise:
    """Gathers the parameters of each layer as it runs.

    Args:
        sharding: who owns what.
        layers: the model's decoder layers.
        names_of: the whole names of a layer's parameters.
    """

    def __init__(
        self, sharding: Sharding, layers: Sequence[nn.Layer], names_of: Callable[[nn.Layer], list[str]]
    ) -> None:
        self.sharding, self._running = sharding, False
        inside: set[str] = set()
        for layer in layers:
            names = names_of(layer)
            inside.update(names)
            layer.register_forward_pre_hook(self._gather(names))
            layer.register_forward_post_hook(self._drop(names))
        self._outside = [name for name in sharding.parameters if name not in inside]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The model can compute inside; every rank of the group enters, and runs the same number of micro batches."""
        self._running = True
        self.sharding.wake(self._outside)
        try:
            yield
        finally:
            self._running = False
            self.sharding.rest()

    def _gather(self, names: list[str]) -> Callable[..., None]:
        def hook(layer: nn.Layer, inputs: Any) -> None:
            if self._running:
                self.sharding.wake(names)

        return hook

    def _drop(self, names: list[str]) -> Callable[..., None]:
        def hook(layer: nn.Layer, inputs: Any, outputs: Any) -> None:
            if self._running:
                self.sharding.rest(names)

        return hook
