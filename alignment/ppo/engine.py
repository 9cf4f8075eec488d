"""`Engine`: one model, wrapped for training or frozen: backward, one optimizer step, save, load.

    engine = Engine("actor", model, world, optimizer_settings(args, total_steps))   # trained
    engine = Engine("reference", model, world)                                      # frozen: no gradients, eval mode
    engine.backward(loss_sum / global_count)                                        # once per micro batch
    result = engine.step()                                                          # StepResult(grad_norm,
    learning_rate)

A loss handed to :meth:`Engine.backward` is already divided by the **global** count (tokens or pairs) of the whole
optimizer step over all ranks and micro batches; therefore :meth:`Engine.step` *sums* gradients over ranks and never
averages.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from alignment.errors import CheckpointError, InvariantError, NonFiniteError
from alignment.parallel import World
from alignment.training.schedule import learning_rate_at
from alignment.training.weights import load_weights_into, some_names


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


class Engine:
    """One model, trained or frozen.

    Args:
        name: what messages call it ("actor", "critic", ...).
        model: a ``paddle.nn.Layer``.
        world: the processes of the run.
        optimizer: settings of a trained model; None freezes it (no gradients, eval mode).
        recompute: trade compute for memory where the model can.

    Attributes:
        model, name, world: as given.
        trainable: whether there is an optimizer.
        steps: optimizer steps taken.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        world: World,
        optimizer: OptimizerSettings | None = None,
        *,
        recompute: bool = False,
    ) -> None:
        self.name, self.model, self.world, self.settings = name, model, world, optimizer
        self.steps = 0
        self._parameters: dict[str, Tensor] = {}
        self._optimizer: Any = None
        if optimizer is None:
            for parameter in model.parameters():
                parameter.stop_gradient = True
            model.eval()
            return
        model.train()
        self._parameters = {n: p for n, p in model.named_parameters() if not p.stop_gradient}
        if not self._parameters:
            raise ValueError(f"{name}: the model has no trainable parameters")
        if recompute:
            enable_recompute(model)
        decayed = {p.name for p in self._parameters.values() if p.ndim >= 2}
        low_precision = any(p.dtype in (paddle.float16, paddle.bfloat16) for p in self._parameters.values())
        self._optimizer = paddle.optimizer.AdamW(
            learning_rate=optimizer.learning_rate_at(0),
            beta1=optimizer.adam_beta1,
            beta2=optimizer.adam_beta2,
            epsilon=optimizer.adam_epsilon,
            parameters=list(self._parameters.values()),
            weight_decay=optimizer.weight_decay,
            apply_decay_param_fun=decayed.__contains__,
            multi_precision=low_precision,
        )

    @property
    def trainable(self) -> bool:
        """Whether this model is trained."""
        return self._optimizer is not None

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step (0 for a frozen model)."""
        return self.settings.learning_rate_at(self.steps) if self.settings else 0.0

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The trained parameters by structured name."""
        return self._parameters

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` (a scalar already divided by the global denominator of the optimizer step)."""
        self._need_optimizer("backward")
        loss.backward()

    def optimizer_tensors(self) -> list[Tensor]:
        """The optimizer's tensors that exist now (none before the first step), for offloading."""
        if self._optimizer is None:
            return []
        slots = [tensor for slot in self._optimizer._accumulators.values() for tensor in slot.values()]
        return slots + list(self._optimizer._master_weights.values())

    def clear_gradients(self) -> None:
        """Forget the gradients that were collected since the last step."""
        for parameter in self._parameters.values():
            # clear_gradient() would leave zeros, which the optimizer takes for a gradient.
            parameter.grad = None

    @paddle.no_grad()
    def step(self) -> StepResult:
        """Sum gradients over ranks, clip by global norm, one AdamW step, next learning rate, clear gradients.

        Raises:
            NonFiniteError: on a NaN or infinite gradient norm, before any weight is touched.
        """
        self._need_optimizer("step")
        assert self.settings is not None
        parameters = list(self._parameters.values())
        self.world.sum_gradients(parameters)
        norm = global_norm(parameters)
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"{self.name}: the gradient norm of optimizer step {self.steps + 1} is {norm}; no weight was changed"
            )
        limit = self.settings.max_grad_norm
        if limit > 0 and norm > limit:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.scale_(limit / norm)
        rate = self.settings.learning_rate_at(self.steps)
        self._optimizer.set_lr(rate)
        self._optimizer.step()
        self.clear_gradients()
        self.steps += 1
        return StepResult(norm, rate)

    def parameter_fingerprints(self) -> dict[str, tuple[float, float]]:
        """Per parameter (trained or frozen, by structured name) ``(crc32 of its bytes, sum of its values)``: any
        changed bit changes it.
        """
        result = {}
        for name, parameter in self.model.named_parameters():
            array = np.ascontiguousarray(parameter.detach().numpy())
            # bfloat16 comes as uint16 bit patterns: their sum is no value, but a checksum all the same.
            result[name] = (float(zlib.crc32(array.view(np.uint8).reshape(-1))), float(array.sum(dtype=np.float64)))
        return result

    def check_same_on_all_ranks(self) -> None:
        """Compare the trained weights over all ranks.

        Raises:
            InvariantError: they differ, so that the ranks would train different models.
        """
        if self.world.size == 1:
            return
        crc = 0
        for parameter in self._parameters.values():
            crc = zlib.crc32(np.ascontiguousarray(parameter.detach().numpy()).view(np.uint8).reshape(-1), crc)
        everyone = self.world.all_gather_object(crc, f"weights of {self.name}")
        if len(set(everyone)) > 1:
            raise InvariantError(f"{self.name}: the ranks hold different weights (checksums {everyone})")

    # -- state ---------------------------------------------------------------------------------------------------------
    # ------------------

    def state_dict(self) -> dict[str, Any]:
        """``{"steps": int, "slots": {structured parameter name: {slot name: float array}}}``; the schedule needs only
        ``steps``.
        """
        self._need_optimizer("state_dict")
        slots: dict[str, dict[str, np.ndarray]] = {}
        if self.steps:
            for name, slot, tensor in self._slots():
                slots.setdefault(name, {})[slot] = tensor.numpy()
        return {"steps": self.steps, "slots": slots}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, bit for bit.

        Raises:
            CheckpointError: when a trained parameter or slot is missing or has another shape.
        """
        self._need_optimizer("load_state_dict")
        steps, saved = int(state["steps"]), state["slots"]
        if steps:
            missing = sorted(set(self._parameters) - set(saved))
            extra = sorted(set(saved) - set(self._parameters))
            if missing or extra:
                raise CheckpointError(
                    f"{self.name}: the saved optimizer state belongs to another model: "
                    f"it lacks {some_names(missing)} and has {some_names(extra)} besides"
                )
            for name, slot, tensor in self._slots():
                value = saved[name].get(slot)
                if value is None or list(np.shape(value)) != list(tensor.shape):
                    found = "nothing" if value is None else f"shape {list(np.shape(value))}"
                    raise CheckpointError(
                        f"{self.name}: optimizer state {slot} of {name}: found {found}, expected shape {tensor.shape}"
                    )
                tensor.set_value(value)
        self.steps = steps

    def save_state(self, file: str | Path) -> None:
        """Write :meth:`state_dict` to one safetensors file."""
        from safetensors.numpy import save_file

        state = self.state_dict()
        flat = {f"{name}|{slot}": value for name, slots in state["slots"].items() for slot, value in slots.items()}
        save_file(flat, str(file), metadata={"format": "np", "steps": str(state["steps"]), "engine": self.name})

    def load_state(self, file: str | Path) -> None:
        """Restore a file of :meth:`save_state`.

        Raises:
            CheckpointError: when the file is missing, cut short, or belongs to another model.
        """
        from safetensors import SafetensorError, safe_open

        slots: dict[str, dict[str, np.ndarray]] = {}
        try:
            with safe_open(str(file), framework="np") as opened:
                metadata = opened.metadata() or {}
                for key in opened.keys():  # noqa: SIM118  (no mapping)
                    name, slot = key.rsplit("|", 1)
                    slots.setdefault(name, {})[slot] = opened.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.name}: cannot read the optimizer state {file}: {error}") from error
        if "steps" not in metadata:
            raise CheckpointError(f"{self.name}: {file} is no optimizer state of this toolkit (no step count in it)")
        self.load_state_dict({"steps": int(metadata["steps"]), "slots": slots})

    def save_weights(self, folder: str | Path) -> None:
        """Save the model in paddlenlp's layout (``from_pretrained`` opens it)."""
        from alignment.ppo.models import save_model

        save_model(self.model, str(folder))

    def load_weights(self, folder: str | Path) -> None:
        """Put the weights of a folder of :meth:`save_weights` into the model, which keeps its optimizer.

        Raises:
            CheckpointError: when files are missing or cut short, or tensors are missing or have other shapes.
        """
        load_weights_into(self.model, Path(folder), self.name)

    # -- details -------------------------------------------------------------------------------------------------------
    # ------------------

    def _need_optimizer(self, what: str) -> None:
        if self._optimizer is None:
            raise RuntimeError(f"{self.name} is frozen: {what} is for trained models")

    def _slots(self) -> list[tuple[str, str, Tensor]]:
        """All optimizer tensors as (structured parameter name, slot, tensor), made now if no step has been taken yet.

        Paddle keys its own state by generated names (``linear_3.w_0_moment1_0``) that differ from process to process.
        """
        optimizer = self._optimizer
        block = paddle.static.default_main_program().global_block()
        optimizer._create_accumulators(block, list(self._parameters.values()))
        found = []
        for name, parameter in self._parameters.items():
            for slot, by_parameter in optimizer._accumulators.items():
                # With master weights Paddle files the slots under the master's name.
                master = optimizer._master_weights.get(parameter.name)
                tensor = by_parameter.get(parameter.name)
                if tensor is None and master is not None:
                    tensor = by_parameter.get(master.name)
                if tensor is not None:
                    found.append((name, slot, tensor))
            if parameter.name in optimizer._master_weights:
                found.append((name, "master_weight", optimizer._master_weights[parameter.name]))
        return found


def global_norm(parameters: list[Tensor]) -> float:
    """Square root of the sum of squares of all gradients, each tensor in float32, their sums in float64."""
    squares = [paddle.sum(paddle.square(p.grad.astype("float32"))) for p in parameters if p.grad is not None]
    if not squares:
        return 0.0
    return float(np.sqrt(np.sum(paddle.stack(squares).numpy(), dtype=np.float64)))


def enable_recompute(model: Any) -> None:
    """Turn activation recomputation on in a paddlenlp model (or one that wraps it)."""
    if hasattr(model, "recompute_enable"):
        model.recompute_enable()
        return
    for layer in model.sublayers(include_self=True):
        if hasattr(layer, "enable_recompute"):
            layer.enable_recompute = True
