"""`Engine`: one model, or this process's part of it, wrapped for training or frozen: passes over micro batches, one
optimizer step, save, load.

    engine = Engine("actor", model, world, OptimizerSettings(**args.policy_optimizer(total_steps)))   # trained
    engine = Engine("reference", model, world)                              # frozen: no gradients, eval mode
    results = engine.train_pass(batches, rows_of, loss_of)                  # forward and backward of micro batches
    result = engine.step()                                                  # StepResult(grad_norm, learning_rate)

Here the layouts end: whoever calls a pass says how a micro batch reads as :class:`~alignment.ppo.models.Rows` and what
is computed from its final hidden states, and gets the same results on one process and on a pipeline.

A loss is already divided by the **global** count (tokens or pairs) of the whole optimizer step over all ranks and micro
batches; therefore :meth:`Engine.step` *sums* gradients over data ranks and never averages.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import paddle
from paddle import Tensor

from alignment.engine.label_scores import head_columns, label_scores
from alignment.engine.optimizer import (
    MASTER,
    OptimizerSettings,
    StepResult,
    adamw_step,
    decays,
    global_norm,
    live_tensors,
    make_masters,
    slots_of,
)
from alignment.engine.weights import load_weights_into
from alignment.errors import CheckpointError, InvariantError, NonFiniteError, some_of
from alignment.log import say_once
from alignment.losses.logprobs import TokenScores
from alignment.losses.token_sets import TokenSets
from alignment.parallel import World
from alignment.parallel.gradients import add_up_in_float32, gradient, set_gradient
from alignment.parallel.layerwise import Layerwise
from alignment.parallel.sharding import Sharding
from alignment.parallel.tensor_ranks import VocabularyShard
from alignment.parallel.whole import Share, gather_whole
from alignment.ppo.models import (
    Piece,
    Rows,
    backbone_of,
    divides_vocabulary,
    hidden_states,
    is_rounded,
    pieces_of,
    round_weights,
    save_model,
    save_whole_model,
    stored_dtype,
    ties_ends,
)
from alignment.ppo.models.fused import FusedDecoder

B = TypeVar("B")
R = TypeVar("R")
NOTHING = Rows(np.zeros([1, 1], dtype=np.int64))


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
        self.topology = world.topology
        self.steps = self._awake = 0
        self._optimizer: Any = None
        local = pieces_of(model, self.topology) if self.topology.splits_model else {}
        named = dict(model.named_parameters())
        self._pieces = {name: local.get(name, Piece(name)) for name in named}
        trained = {n: p for n, p in named.items() if not p.stop_gradient} if optimizer is not None else {}
        self._parameters = {self._pieces[n].name: p for n, p in trained.items()}
        self._piece_of = {self._pieces[n].name: self._pieces[n] for n in named}
        self._sharding: Sharding | None = None
        if self.topology.sharding > 1 and world.groups is not None and (trained or self.topology.sharding_stage == 3):
            shared = self._parameters or {self._pieces[n].name: p for n, p in named.items()}
            self._sharding = Sharding(self.topology, world.groups.sharding, shared)
        self._layers = self._layerwise(bool(trained))
        divided = self.topology.splits_model or self.topology.sharding_stage >= 3
        self._fused = None if divided else FusedDecoder.of(model, recompute=recompute)
        if optimizer is None:
            for parameter in model.parameters():
                parameter.stop_gradient = True
            model.eval()
            return
        model.train()
        if not self._parameters:
            raise ValueError(f"{name}: the model has no trainable parameters")
        if recompute or self._layers is not None:
            enable_recompute(model)
        decayed = {p.name for p in self._parameters.values() if decays(p)}
        low_precision = any(p.dtype in (paddle.float16, paddle.bfloat16) for p in self._parameters.values())
        if low_precision:
            add_up_in_float32(self._parameters.values())
        self._by_rounding = is_rounded(model)
        self._has_masters = low_precision or self._by_rounding
        self._owned = self._sharding.owned if self._sharding is not None else self._parameters
        self._optimizer = paddle.optimizer.AdamW(
            learning_rate=optimizer.learning_rate_at(0),
            beta1=optimizer.adam_beta1,
            beta2=optimizer.adam_beta2,
            epsilon=optimizer.adam_epsilon,
            parameters=list(self._owned.values()),
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
    def dtype(self) -> str:
        """Of the weights: ``"float32"``, ``"bfloat16"``, ..."""
        return stored_dtype(self.model)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The trained parameters of this process, by their names in the whole model."""
        return self._parameters

    # -- passes over micro batches

    def train_pass(
        self, batches: Sequence[B], rows: Callable[[B], Rows], loss: Callable[[Tensor, B], tuple[Tensor, R]]
    ) -> list[R]:
        """Forward and backward of micro batches; gradients add up until :meth:`step`.

        Args:
            batches: this data rank's micro batches; may be empty.
            rows: how a micro batch reads.
            loss: from the final hidden states ``[batch, seq, hidden]`` to a scalar, already divided by the global
                denominator of the optimizer step, and a picklable result. With a pipeline it is called on the last
                stage only.

        Returns:
            The results, in order, on every process of the data rank.
        """
        self._need_optimizer("train_pass")
        if self._layers is not None and not self._awake:
            return self._train_layerwise(batches, rows, loss)
        results: list[R] = []
        schedule = self._schedule
        if batches and schedule is not None:
            inputs = [rows(batch) for batch in batches]
            results = schedule.train(
                len(batches),
                lambda number, received: hidden_states(self.model, inputs[number], received),
                lambda number, hidden: loss(hidden, batches[number]),
            )
        else:
            for batch in batches:
                value, result = loss(self.hidden_states(rows(batch)), batch)
                value.backward()
                results.append(result)
        if self._sharding is not None and self._reduces_in_passes:
            self._reduce_to_owners()
        return results

    def infer_pass(self, batches: Sequence[B], rows: Callable[[B], Rows], compute: Callable[[Tensor, B], R]) -> list[R]:
        """Forward of micro batches without gradient; as :meth:`train_pass`, with ``compute`` in place of the loss."""
        if self._layers is not None and not self._awake:
            return self._infer_layerwise(batches, rows, compute)
        if not batches:
            return []
        schedule = self._schedule
        if schedule is not None:
            inputs = [rows(batch) for batch in batches]
            return schedule.infer(
                len(batches),
                lambda number, received: hidden_states(self.model, inputs[number], received),
                lambda number, hidden: compute(hidden, batches[number]),
            )
        with paddle.no_grad():
            return [compute(self.hidden_states(rows(batch)), batch) for batch in batches]

    def hidden_states(self, rows: Rows) -> Tensor:
        """Final hidden states ``[batch, seq, hidden]`` of a micro batch; on the CPU by the fused kernels where they
        can stand for the whole model (see :mod:`alignment.ppo.models.fused`). Those of pads are meaningless.
        """
        if self._fused is not None and self._fused.applies:
            return self._fused.hidden_states(rows)
        return hidden_states(self.model, rows)

    def _layerwise(self, trained: bool) -> Layerwise | None:
        """Sharding stage 3 inside passes, for models whose parameters are trained all or not at all."""
        whole = not trained or len(self._parameters) == len(self._pieces)
        if self._sharding is None or self.topology.sharding_stage < 3 or not hasattr(self.model, "config") or not whole:
            return None
        self.model.config.recompute_use_reentrant = False  # saves nothing between forward and backward
        name_of = {id(parameter): name for name, parameter in self._sharding.parameters.items()}
        layers = list(backbone_of(self.model).layers)
        found = Layerwise(self._sharding, layers, lambda layer: [name_of[id(p)] for p in layer.parameters()])
        self._sharding.rest()
        return found

    def _even(self, batches: Sequence[B]) -> list[B | None]:
        """The micro batches, with None behind them up to the number that another data rank has."""
        most = max(self.world.data_peers(len(batches), f"micro batches of {self.name}"))
        return [*batches, *[None] * (most - len(batches))]

    def _train_layerwise(
        self, batches: Sequence[B], rows: Callable[[B], Rows], loss: Callable[[Tensor, B], tuple[Tensor, R]]
    ) -> list[R]:
        assert self._layers is not None
        results: list[R] = []
        for batch in self._even(batches):
            with self._layers.running():
                if batch is None:  # the others gather their layers from here too
                    value = hidden_states(self.model, NOTHING).sum() * 0.0
                else:
                    value, result = loss(hidden_states(self.model, rows(batch)), batch)
                    results.append(result)
                value.backward()
            self._reduce_to_owners()
        return results

    def _infer_layerwise(
        self, batches: Sequence[B], rows: Callable[[B], Rows], compute: Callable[[Tensor, B], R]
    ) -> list[R]:
        assert self._layers is not None
        results: list[R] = []
        with paddle.no_grad(), self._layers.running():
            for batch in self._even(batches):
                hidden = hidden_states(self.model, NOTHING if batch is None else rows(batch))
                if batch is not None:
                    results.append(compute(hidden, batch))
        return results

    def score_labels(
        self,
        states: Tensor,
        labels: Tensor,
        temperature: float = 1.0,
        *,
        entropy: bool = False,
        entropy_grad: bool = False,
        allowed: TokenSets | None = None,
    ) -> TokenScores:
        """Look tokens up in what a causal model predicts, its vocabulary divided or not; the logits are never whole in
        memory, see :func:`alignment.engine.label_scores.label_scores`.

        Args:
            states: ``[N, hidden]`` final hidden states of the positions that predict the labels.
            labels: ``[N]`` int64.
            temperature, entropy, entropy_grad, allowed: as there.
        """
        shard = None
        if self.topology.tensor > 1 and divides_vocabulary(self.model):
            assert self.world.groups is not None
            columns = head_columns(self.model)
            shard = VocabularyShard(self.world.groups.tensor, columns * self.topology.tensor_rank, columns)
        how = {"entropy": entropy, "entropy_grad": entropy_grad, "shard": shard, "allowed": allowed}
        return label_scores(self.model, states, labels, temperature, **how)

    @property
    def _schedule(self) -> Any:
        return self.world.groups.schedule if self.world.groups is not None else None

    def in_passes(self) -> contextlib.AbstractContextManager[None]:
        """What passes and steps need around them: nothing, but that parameters which cannot be gathered layer by layer
        (LoRA with sharding stage 3) are :meth:`awake`.
        """
        return contextlib.nullcontext() if self._layers is not None else self.awake()

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """With sharding stage 3 all parameters are here inside and rest at their owners outside; every process of the
        sharding group enters and leaves together. Without it nothing happens. Passes do without it: they gather layer
        by layer.
        """
        if self._sharding is None or self.topology.sharding_stage < 3:
            yield
            return
        self._awake += 1
        self._sharding.wake()
        try:
            yield
        finally:
            self._awake -= 1
            if not self._awake:
                self._sharding.rest()

    def optimizer_tensors(self) -> list[Tensor]:
        """The optimizer's tensors that exist now (none before the first step), for offloading."""
        return [] if self._optimizer is None else live_tensors(self._optimizer)

    def average(self, source: Engine, share: float) -> None:
        """Move every weight towards another model of the same shape: ``(1 - share) own + share source``.

        Raises:
            InvariantError: weights of half precision, in which a small step is rounded away, and ``share`` below 1.
        """
        if share < 1.0 and self.dtype != "float32":
            raise InvariantError(
                f"{self.name}: an average of weights in {self.dtype} stands still, since a small step is rounded away: "
                "use bf16: false, or copy the weights (share 1)"
            )
        with self.awake(), source.awake(), paddle.no_grad():
            theirs = dict(source.model.named_parameters())
            for name, parameter in self.model.named_parameters():
                parameter.set_value(parameter * (1.0 - share) + theirs[name] * share if share < 1.0 else theirs[name])

    def clear_gradients(self) -> None:
        """Forget the gradients that were collected since the last step."""
        for parameter in self._parameters.values():
            set_gradient(parameter, None)

    @paddle.no_grad()
    def step(self) -> StepResult:
        """Sum gradients over ranks, clip by global norm, one AdamW step, next learning rate, clear gradients.

        Raises:
            NonFiniteError: on a NaN or infinite gradient norm, before any weight is touched.
        """
        self._need_optimizer("step")
        assert self.settings is not None
        self._sum_gradients()
        norm = self._gradient_norm()
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"{self.name}: the gradient norm of optimizer step {self.steps + 1} is {norm}; no weight was changed"
            )
        limit = self.settings.max_grad_norm
        scale = limit / norm if 0 < limit < norm else 1.0
        rate = self.settings.learning_rate_at(self.steps)
        self._ready_masters()
        adamw_step(self._optimizer, list(self._owned.values()), self.settings, rate, scale)
        self.clear_gradients()
        if self._sharding is not None and (self._awake or self.topology.sharding_stage < 3):
            self._sharding.share_parameters()
        self.steps += 1
        return StepResult(norm, rate)

    def _sum_gradients(self) -> None:
        """Complete every gradient: over tensor ranks where sequence parallelism left partial sums, over the two places
        of a tied embedding, over data ranks.
        """
        groups = self.world.groups
        if groups is None:
            return
        if self.topology.sequence_parallel and groups.tensor is not None:
            partial = [p for p in self._parameters.values() if getattr(p, "sequence_parallel", False)]
            groups.sum_over_tensor_ranks([gradient(p) for p in partial if gradient(p) is not None])
        tied = [name for name, piece in self._piece_of.items() if piece.duplicate] if self.topology.last_stage else []
        groups.sum_over_ends(self._tied_gradient(tied))
        if self._sharding is None:
            self.world.sum_gradients(list(self._parameters.values()))
            return
        if not self._reduces_in_passes:
            self._reduce_to_owners()
        if groups.replicas is not None:
            groups.sum_over_replicas([gradient(p) for p in self._owned.values() if gradient(p) is not None])

    @property
    def _reduces_in_passes(self) -> bool:
        """Whether gradients go to their owners with each pass. In a pipeline they wait for the step: the two ends may
        give a tied embedding to different owners, so they add it up while every rank still has it.
        """
        return self.topology.sharding_stage >= 2 and self.topology.pipeline == 1

    def _tied_gradient(self, tied: list[str]) -> Tensor | None:
        """The gradient of a tied embedding on the first and the last stage of a pipeline, else None."""
        topology = self.topology
        if topology.pipeline == 1 or not ties_ends(self.model):
            return None
        if topology.last_stage:
            return gradient(self._parameters[tied[0]])
        name = f"{self.model.base_model_prefix}.embed_tokens.weight"
        return gradient(self._parameters[name]) if topology.first_stage else None

    def _reduce_to_owners(self) -> None:
        assert self._sharding is not None
        names = list(self._parameters)
        here = np.array([gradient(self._parameters[name]) is not None for name in names], dtype=bool)
        anywhere = np.any(np.stack(self.world.data_peers(here, f"gradients of {self.name}")), axis=0)
        self._sharding.reduce_gradients(dict(zip(names, anywhere, strict=True)))

    def _gradient_norm(self) -> float:
        """The global norm over all processes that share the model, each number counted once."""
        topology = self.topology
        if self._sharding is None and not topology.splits_model:
            return global_norm(list(self._parameters.values()))
        counted = [
            p
            for name, p in self._owned.items()
            if not self._piece_of[name].duplicate
            and (self._piece_of[name].axis is not None or topology.tensor_rank == 0)
        ]
        square = global_norm(counted) ** 2
        everyone = self.world.all_processes((topology.replica, square), f"gradient norm of {self.name}")
        return math.sqrt(sum(value for replica, value in everyone if replica == topology.replica))

    def parameter_fingerprints(self, *, trained: bool = True) -> dict[str, int]:
        """Per parameter, by structured name, the sum of its bit patterns as whole numbers: any one changed bit changes
        it, and it is computed where the parameter is. With sharding stage 3 of this process's own parameters.

        Args:
            trained: with false, only parameters that are not trained.
        """
        elsewhere: set[str] = set()
        if self._sharding is not None and self.topology.sharding_stage >= 3 and not self._awake:
            elsewhere = set(self._sharding.parameters) - set(self._sharding.owned)
        left_out = elsewhere if trained else elsewhere | set(self._parameters)
        named = {self._pieces[local].name: parameter for local, parameter in self.model.named_parameters()}
        sums = {name: _bit_sum(parameter) for name, parameter in named.items() if name not in left_out}
        return dict(zip(sums, paddle.stack(list(sums.values())).tolist(), strict=True)) if sums else {}

    def largest_moments(self) -> dict[str, float]:
        """The largest ``|first moment|`` of each tensor whose optimizer state this process has, by structured name:
        above 0 where a gradient has come.
        """
        found = {name: slot.abs().max().astype("float32") for name, kind, slot in self._slots() if kind == "moment1"}
        return dict(zip(found, paddle.stack(list(found.values())).tolist(), strict=True)) if found else {}

    def check_same_on_all_ranks(self) -> None:
        """Compare the trained weights over all ranks.

        Raises:
            InvariantError: they differ, so that the ranks would train different models.
        """
        if self.world.size == 1:
            return
        crc = 0
        with self.awake():
            for parameter in self._parameters.values():
                crc = zlib.crc32(np.ascontiguousarray(parameter.detach().numpy()).view(np.uint8).reshape(-1), crc)
        everyone = self.world.data_peers(crc, f"weights of {self.name}")
        if len(set(everyone)) > 1:
            raise InvariantError(f"{self.name}: the ranks hold different weights (checksums {everyone})")

    # -- state: whole tensors, whatever the layout

    def state_dict(self) -> dict[str, Any]:
        """``{"steps": int, "slots": {whole parameter name: {slot name: float array}}}`` of this process's part; the
        schedule needs only ``steps``.
        """
        self._need_optimizer("state_dict")
        slots: dict[str, dict[str, np.ndarray]] = {}
        if self.steps:
            for name, slot, tensor in self._slots():
                slots.setdefault(name, {})[slot] = tensor.numpy()
        return {"steps": self.steps, "slots": slots}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned (or the whole model's slots), bit for bit.

        Masters that a float32 run did not save stay what :meth:`load_weights` made of its weights; masters that this
        run does not keep become its weights.

        Raises:
            CheckpointError: when a trained parameter or slot is missing or has another shape.
        """
        self._need_optimizer("load_state_dict")
        steps, saved = int(state["steps"]), state["slots"]
        if steps:
            missing = sorted(set(self._owned) - set(saved))
            extra = [] if self.topology.splits_model else sorted(set(saved) - set(self._parameters))
            if missing or extra:
                raise CheckpointError(
                    f"{self.name}: the saved optimizer state belongs to another model: "
                    f"it lacks {some_of(missing)} and has {some_of(extra)} besides"
                )
            for name, slot, tensor in self._slots():
                value = saved[name].get(slot)
                if value is None and slot == MASTER:
                    say_once(f"{self.name}: the checkpoint is of a float32 run; its weights are the float32 masters")
                    continue
                piece = self._slot_piece(name, tensor)
                expected = piece.whole_shape(tensor.shape, self.topology)
                if value is not None and list(np.shape(value)) == expected != list(tensor.shape):
                    value = piece.cut(value, self.topology)
                if value is None or list(np.shape(value)) != list(tensor.shape):
                    found = "nothing" if value is None else f"shape {list(np.shape(value))}"
                    raise CheckpointError(
                        f"{self.name}: optimizer state {slot} of {name}: found {found}, expected shape {expected}"
                    )
                tensor.set_value(value)
            if not self._has_masters:
                self._take_masters(saved)
        self.steps = steps

    def _take_masters(self, saved: dict[str, dict[str, np.ndarray]]) -> None:
        """Let the float32 masters of a half-precision run be the weights of this one, which has none."""
        if not any(MASTER in slots for slots in saved.values()):
            return
        say_once(f"{self.name}: the checkpoint is of a half-precision run; its float32 masters are the weights now")
        with self.awake():
            for name, parameter in self._parameters.items():
                value = saved.get(name, {}).get(MASTER)
                if value is None:
                    raise CheckpointError(f"{self.name}: the optimizer state has no {MASTER} of {name}")
                parameter.set_value(self._piece_of[name].cut(value, self.topology))

    def _slot_piece(self, name: str, tensor: Tensor) -> Piece:
        """Moments are cut as their parameter is; the powers of beta are one number."""
        same = list(tensor.shape) == list(self._parameters[name].shape)
        return self._piece_of[name] if same else Piece(name)

    def save_state(self, file: str | Path) -> None:
        """Write the whole optimizer state to one safetensors file; every process calls it, the main one writes."""
        from safetensors.numpy import save_file

        self._need_optimizer("save_state")
        shares: dict[str, Share] = {}
        for name, slot, tensor in self._slots() if self.steps else ():
            axis = self._slot_piece(name, tensor).axis
            shares[f"{name}|{slot}"] = Share(axis, tensor.numpy, int(tensor.size) * tensor.element_size())
        flat = dict(gather_whole(self.world, shares))
        if self.world.is_main:
            save_file(flat, str(file), metadata={"format": "np", "steps": str(self.steps), "engine": self.name})

    def load_state(self, file: str | Path) -> None:
        """Restore a file of :meth:`save_state`, whatever the layout that wrote it.

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
                    taken = slot == MASTER and not self._has_masters and name in self._parameters
                    if name in self._owned or taken or not self.topology.splits_model:
                        slots.setdefault(name, {})[slot] = opened.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.name}: cannot read the optimizer state {file}: {error}") from error
        if "steps" not in metadata:
            raise CheckpointError(f"{self.name}: {file} is no optimizer state of this toolkit (no step count in it)")
        self.load_state_dict({"steps": int(metadata["steps"]), "slots": slots})

    def save_weights(self, folder: str | Path) -> None:
        """Save the whole model in paddlenlp's layout (``from_pretrained`` opens it); every process calls it, the main
        one writes.
        """
        if not self.topology.splits_model:
            with self.awake():
                if self.world.is_main:
                    save_model(self.model, str(folder))
            return
        with self.awake():
            whole = dict(gather_whole(self.world, self._weight_shares()))
        if self.world.is_main:
            save_whole_model(self.model, str(folder), whole)

    def _weight_shares(self) -> dict[str, Share]:
        local = pieces_of(self.model, self.topology)
        return {
            local[name].name: Share(local[name].axis, tensor.numpy, int(tensor.size) * tensor.element_size())
            for name, tensor in self.model.state_dict().items()
        }

    def load_weights(self, folder: str | Path) -> None:
        """Put the weights of a folder of :meth:`save_weights` into the model, which keeps its optimizer.

        Raises:
            CheckpointError: when files are missing or cut short, or tensors are missing or have other shapes.
        """
        with self.awake():
            load_weights_into(self.model, Path(folder), self.name, self.topology, self._masters())
            if is_rounded(self.model):
                round_weights(self.model.parameters())

    def _masters(self) -> Mapping[str, Tensor]:
        """The optimizer's float32 masters by Paddle's names of their parameters; empty if float32 or frozen."""
        if self._optimizer is None or not self._has_masters:
            return {}
        self._slots()  # makes them
        return self._optimizer._master_weights

    # -- details -------------------------------------------------------------------------------------------------------
    # ------------------

    def _need_optimizer(self, what: str) -> None:
        if self._optimizer is None:
            raise RuntimeError(f"{self.name} is frozen: {what} is for trained models")

    def _slots(self) -> list[tuple[str, str, Tensor]]:
        self._ready_masters()
        return slots_of(self._optimizer, self._owned)

    def _ready_masters(self) -> None:
        if self._by_rounding:
            make_masters(self._optimizer, self._owned.values())


def _bit_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bit patterns, int64 ``[]``; in pieces, because integers are summed from a wider copy."""
    flat = paddle.view(tensor.detach(), f"int{8 * tensor.element_size()}").reshape([-1])
    pieces = [flat[start : start + (1 << 24)].astype("int64").sum() for start in range(0, int(flat.shape[0]), 1 << 24)]
    return paddle.add_n(pieces)


def enable_recompute(model: Any) -> None:
    """Turn activation recomputation on in a paddlenlp model (or one that wraps it)."""
    if hasattr(model, "recompute_enable"):
        model.recompute_enable()
        return
    for layer in model.sublayers(include_self=True):
        if hasattr(layer, "enable_recompute"):
            layer.enable_recompute = True
