"""`Pipeline`: fleet's 1F1B schedule over the stages of a model.

The schedule (who computes what when, what is sent to whom) is fleet's ``PipelineParallel``, unchanged. Here it is given
plain functions in place of a ``PipelineLayer``'s parts, because the stages of this toolkit are ordinary paddlenlp
models with fewer layers (:mod:`alignment.ppo.models.parts`), and because an RL loss needs more than one tensor of
labels: every process of a pipeline has the micro batches' arrays at hand, and only hidden states travel.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import paddle
from paddle import Tensor

from alignment.parallel.group_collectives import broadcast_object
from alignment.parallel.topology import Topology

#: ``(number of the micro batch, hidden states of the stage before or None) -> hidden states``.
Forward = Callable[[int, Tensor | None], Tensor]


@dataclass
class _Plan:
    """What one pass over the micro batches does on this stage."""

    forward: Forward
    finish: Callable[[int, Tensor], Tensor]
    forwarded: int = 0
    finished: int = 0


class Pipeline:
    """Runs passes over micro batches through all stages; every process of the pipeline makes the same calls.

    Args:
        topology: the layout.
        hcg: fleet's ``HybridCommunicateGroup``.
        group: the processes of this pipeline.
    """

    def __init__(self, topology: Topology, hcg: Any, group: Any) -> None:
        from paddle.distributed import fleet
        from paddle.distributed.fleet.meta_parallel import PipelineLayer, PipelineParallel

        self.topology, self._group = topology, group
        self._plan: _Plan | None = None
        # One function a stage; a stage's own parameters are not fleet's business.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="No shared comm")
            stages = PipelineLayer([self._forward] * topology.pipeline, topology=hcg.topology(), loss_fn=self._finish)
        self._schedule = PipelineParallel(stages, hcg, fleet.fleet._user_defined_strategy)

    def train(self, count: int, forward: Forward, loss: Callable[[int, Tensor], tuple[Tensor, Any]]) -> list[Any]:
        """Forward and backward of ``count`` micro batches.

        Args:
            count: at least 1.
            forward: this stage's share of the model.
            loss: called on the last stage with a micro batch's final hidden states; returns the scalar to differentiate
                and a picklable result.

        Returns:
            The results, on every stage.
        """
        results: list[Any] = []

        def finish(number: int, hidden: Tensor) -> Tensor:
            value, result = loss(number, hidden)
            results.append(result)
            return value * count if count > 1 else value  # fleet divides by the number of micro batches

        self._begin(count, forward, finish)
        self._schedule.forward_backward_pipeline(self._data(count))
        return self._shared(results)

    def infer(self, count: int, forward: Forward, compute: Callable[[int, Tensor], Any]) -> list[Any]:
        """Forward of ``count`` micro batches without gradient; ``compute`` turns final hidden states into a picklable
        result on the last stage. Returns the results, on every stage.
        """
        results: list[Any] = []

        def finish(number: int, hidden: Tensor) -> Tensor:
            results.append(compute(number, hidden))
            return paddle.zeros([], dtype="float32")

        self._begin(count, forward, finish)
        with paddle.no_grad():
            self._schedule.eval_batch(self._data(count), compute_loss=True)
        return self._shared(results)

    def share(self, value: Any) -> Any:
        """Give every stage the last stage's ``value`` (picklable)."""
        last = self.topology.process_at(self.topology.data_rank, self.topology.pipeline - 1, self.topology.tensor_rank)
        return broadcast_object(value, last, self._group)

    def pass_on(self, compute: Callable[[Tensor | None], Tensor]) -> Tensor:
        """One forward through the stages outside the schedule (a step of generation): receive, compute, hand on.

        Returns:
            This stage's output; the last stage's is the model's.
        """
        helper = self._new_helper()
        received = helper.recv_forward(self.topology.first_stage, batch_p2p_comm=self._schedule._use_batch_p2p_comm)
        output = compute(received)
        helper.send_forward(output, self.topology.last_stage, batch_p2p_comm=self._schedule._use_batch_p2p_comm)
        return output

    def _begin(self, count: int, forward: Forward, finish: Callable[[int, Tensor], Tensor]) -> None:
        self._plan = _Plan(forward, finish)
        self._schedule.accumulate_steps = count
        self._schedule._init_user_hooks()
        # A new helper forgets the shapes of the pass before.
        self._schedule._p2p_helper = self._new_helper()

    def _new_helper(self) -> Any:
        from paddle.distributed.fleet.meta_parallel.pp_utils.p2p_communication import P2pHelper

        return P2pHelper(use_cache=True, dynamic_shape=True)

    def _data(self, count: int) -> list[list[Tensor]] | None:
        """What the schedule hands to the first and the last stage: the micro batches' numbers."""
        if not (self.topology.first_stage or self.topology.last_stage):
            return None
        numbers = [paddle.to_tensor([number], dtype="int64") for number in range(count)]
        return [numbers, numbers]

    def _forward(self, received: Tensor) -> Tensor:
        assert self._plan is not None
        number = self._plan.forwarded
        self._plan.forwarded += 1
        return self._plan.forward(number, None if self.topology.first_stage else received)

    def _finish(self, hidden: Tensor, number: Tensor) -> Tensor:
        assert self._plan is not None
        count = self._plan.finished
        self._plan.finished += 1
        return self._plan.finish(count, hidden)

    def _shared(self, results: list[Any]) -> list[Any]:
        self._plan = None
        return self.share(results)
