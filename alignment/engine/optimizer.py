"""AdamW's settings, the outcome of a step, and the tensors that an optimizer keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from alignment.engine.schedule import learning_rate_at
from alignment.kernels.ops import Kernels, kernels
from alignment.parallel.gradients import gradient

#: The slot of a half-precision parameter's float32 values, as Paddle's own optimizers save it.
MASTER = "master_weight"


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (Loshchilov & Hutter 2019) and its learning-rate schedule.

    ``max_grad_norm`` 0 means no clipping. Weight decay touches matrices only, never biases and norm weights
    (one-dimensional tensors).
    """

    learning_rate: float
    min_learning_rate: float | None = None
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    decay_steps: int = 0
    total_steps: int = 1

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of optimizer step ``step`` (0-based)."""
        return learning_rate_at(
            step,
            schedule=self.lr_scheduler_type,
            peak=self.learning_rate,
            total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
            warmup_ratio=self.warmup_ratio,
            min_learning_rate=self.min_learning_rate,
            decay_steps=self.decay_steps,
        )


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: the gradient's global norm before clipping (float32) and the learning rate that was used."""

    grad_norm: float
    learning_rate: float


def global_norm(parameters: list[Tensor]) -> float:
    """Square root of the sum of squares of all gradients, each tensor (on a CPU each piece of one) in float32, their
    sums in float64.
    """
    operators = _operators(parameters)
    grads = [grad for grad in map(gradient, parameters) if grad is not None]
    if operators is not None:
        return float(np.sqrt(operators.square_sum(grads)))
    squares = [paddle.sum(paddle.square(grad.astype("float32"))) for grad in grads]
    if not squares:
        return 0.0
    return float(np.sqrt(np.sum(paddle.stack(squares).numpy(), dtype=np.float64)))


def adamw_step(
    optimizer: Any, parameters: list[Tensor], settings: OptimizerSettings, rate: float, scale: float
) -> None:
    """Multiply the gradients by ``scale`` and take one step of AdamW, on a CPU in one pass over the memory.

    Args:
        optimizer: a ``paddle.optimizer.AdamW`` made with ``settings``; its state is used either way, so that a run may
            go on elsewhere.
        parameters: that it updates; those without a gradient stay.
        settings: of the optimizer.
        rate: the learning rate.
        scale: of the gradients; 1 leaves them alone.

    A parameter that is rounded to bfloat16 numbers (:func:`make_masters`) is updated as its master, then rounded.
    """
    from alignment.ppo.models.precision import round_weights

    optimizer.set_lr(rate)
    learnt = [parameter for parameter in parameters if gradient(parameter) is not None]
    if not learnt:
        return  # of a sharding group with more ranks than tensors, this one owns nothing
    masters = optimizer._master_weights
    by_rounding = [p for p in learnt if p.name in masters and p.dtype == paddle.float32]
    for parameter in by_rounding:
        paddle.assign(masters[parameter.name], parameter)
    _update(optimizer, learnt, settings, rate, scale)
    for parameter in by_rounding:
        paddle.assign(parameter, masters[parameter.name])
    round_weights(by_rounding)


def _update(optimizer: Any, learnt: list[Tensor], settings: OptimizerSettings, rate: float, scale: float) -> None:
    operators = _operators(learnt)
    if operators is None:
        for parameter in learnt if scale != 1.0 else ():
            gradient(parameter).scale_(scale)
        # what optimizer.step() does, but for main gradients, of which it does not know
        pairs = [(parameter, gradient(parameter)) for parameter in learnt]
        optimizer._apply_optimize(loss=None, startup_program=None, params_grads=pairs)
        return
    optimizer._create_accumulators(paddle.static.default_main_program().global_block(), learnt)
    slots = [
        [optimizer._accumulators[slot][parameter.name] for parameter in learnt]
        for slot in ("moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc")
    ]
    operators.adamw(
        learnt,
        [parameter.grad.contiguous() for parameter in learnt],
        (slots[0], slots[1]),
        (slots[2], slots[3]),
        rate=rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        epsilon=settings.adam_epsilon,
        scale=scale,
        decay=[settings.weight_decay if decays(parameter) else 0.0 for parameter in learnt],
    )


def decays(parameter: Tensor) -> bool:
    """Whether weight decay touches a parameter: matrices, no biases or norm weights."""
    return bool(parameter.ndim >= 2)


def make_masters(optimizer: Any, parameters: Iterable[Tensor]) -> None:
    """Give float32 parameters whose values are rounded to bfloat16 numbers float32 masters, where Paddle keeps those of
    real bfloat16 tensors; what has one keeps it.
    """
    masters = optimizer._master_weights
    for parameter in parameters:
        if parameter.name not in masters:
            masters[parameter.name] = parameter.detach().clone()


def _operators(parameters: list[Tensor]) -> Kernels | None:
    """The CPU kernels where they can stand for Paddle's operators: float32 everywhere."""
    grads = [grad for grad in map(gradient, parameters) if grad is not None]
    plain = bool(grads) and all(tensor.dtype == paddle.float32 for tensor in [*parameters, *grads])
    return kernels() if plain else None


def slots_of(optimizer: Any, parameters: Mapping[str, Tensor]) -> list[tuple[str, str, Tensor]]:
    """All tensors of a Paddle optimizer as (parameter name, slot, tensor), made now if no step has been taken yet.

    Paddle keys its own state by generated names (``linear_3.w_0_moment1_0``) that differ from process to process.

    Args:
        optimizer: a ``paddle.optimizer.AdamW``.
        parameters: that it updates, by the names that the result is to have.
    """
    block = paddle.static.default_main_program().global_block()
    optimizer._create_accumulators(block, list(parameters.values()))
    found = []
    for name, parameter in parameters.items():
        for slot, by_parameter in optimizer._accumulators.items():
            # With master weights Paddle files the slots under the master's name.
            master = optimizer._master_weights.get(parameter.name)
            tensor = by_parameter.get(parameter.name)
            if tensor is None and master is not None:
                tensor = by_parameter.get(master.name)
            if tensor is not None:
                found.append((name, slot, tensor))
        if parameter.name in optimizer._master_weights:
            found.append((name, MASTER, optimizer._master_weights[parameter.name]))
    return found


def live_tensors(optimizer: Any) -> list[Tensor]:
    """The tensors of a Paddle optimizer that exist now (none before the first step)."""
    slots = [tensor for slot in optimizer._accumulators.values() for tensor in slot.values()]
    return slots + list(optimizer._master_weights.values())
