"""What a plan is made for: the roles, the layout and the sizes of a run, as plain numbers.

:func:`setting_of` reads them from the arguments that the runners take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from alignment.arguments import OnlineArguments
from alignment.flow.flow import Call, Flow, optimizer_of
from alignment.flow.method import Method
from alignment.methods.ppo import PPO
from alignment.parallel.topology import Topology
from alignment.plan.shapes import ModelShape

#: The calls of PPO, and of stages that learn one model from given rows.
PPO_FLOW = PPO(None).flow()
ROWS_FLOW = Flow([Call("train", "train", ("model",), ("rows",), "stats")], inputs=("rows",))


@dataclass(frozen=True)
class RolePlan:
    """A model of the run.

    Attributes:
        name: ``"actor"``, ``"reference"``, ``"reward"``, ``"critic"``; ``"model"`` in SFT and reward-model training.
        shape: its sizes.
        head: ``"lm"`` or ``"score"``.
        trained: whether it has gradients and an optimizer.
        recompute: whether activations are recomputed.
        lora_rank: of the adapters that alone are trained; 0: everything is.
        changes: whether it changes without being trained, as an average of another role does.
        masked: whether it is trained over allowed tokens alone, which the CPU kernels do not compute.
    """

    name: str
    shape: ModelShape
    head: str
    trained: bool
    recompute: bool = False
    lora_rank: int = 0
    changes: bool = False
    masked: bool = False


@dataclass(frozen=True)
class Setting:
    """Everything that a plan follows from. Sizes are those of one data rank.

    Attributes:
        stage: ``"sft"``, ``"reward"``, ``"ppo"`` or another method's name.
        roles: the models.
        topology: of process 0; the plan asks for the others.
        title: of the stage or method, for people.
        item: bytes of a weight: 4, or 2 in half precision.
        flash: whether attention runs without storing its scores.
        micro_rows: rows of a micro batch of training.
        accumulation: micro batches of an optimizer step.
        row_tokens: tokens of a training row (SFT, reward model).
        prompt_tokens, response_tokens: of a row of PPO.
        mean_prompt, mean_response: what prompts and answers are taken to measure on average, for the times.
        samples: PPO: answers of a rollout.
        answers_per_prompt: PPO.
        rollout_rows: PPO: answers under way at once; 0: as many as the cache has room for (the plain path:
            ``micro_rows``).
        infer_rows: PPO: rows of a forward without gradient.
        max_tokens: padded tokens of a micro batch, in place of its rows; 0: rows count.
        update_iters: PPO: passes over a rollout.
        eval_mode, offload_level: as in the argument file.
        ptx: PPO: whether the actor's steps have a ptx loss too.
        temperature: of sampling.
        kernels: whether the CPU kernels are there: the plan takes it that a CPU has them.
        engine: whether rollouts go through the rollout engine where it can be used (``use_fusemt``).
        token_budget: tokens that the rollout engine keeps keys and values of; 0: what ``cache_bytes`` hold.
        cache_bytes: see above.
        calls: the flow of an iteration, from which phases and residency follow; None: PPO's, or one training call of
            SFT and reward models.
    """

    stage: str
    roles: tuple[RolePlan, ...]
    topology: Topology
    title: str = ""
    item: int = 2
    flash: bool = False
    micro_rows: int = 1
    accumulation: int = 1
    row_tokens: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    mean_prompt: float = 0.0
    mean_response: float = 0.0
    samples: int = 0
    answers_per_prompt: int = 1
    rollout_rows: int = 0
    infer_rows: int = 0
    max_tokens: int = 0
    update_iters: int = 1
    eval_mode: str = ""
    offload_level: str = ""
    ptx: bool = False
    temperature: float = 1.0
    kernels: bool = False
    engine: bool = True
    token_budget: int = 0
    cache_bytes: float = float(1 << 30)
    calls: Flow | None = field(default=None, repr=False, compare=False)

    @property
    def flow(self) -> Flow:
        """The calls of an iteration."""
        return self.calls or (ROWS_FLOW if self.stage in ("sft", "reward") else PPO_FLOW)

    @property
    def online(self) -> bool:
        """Whether an iteration generates the rows that it learns from."""
        return any(call.kind == "generate" for call in self.flow.calls)

    @property
    def managed(self) -> frozenset[str]:
        """The groups that ``offload_level`` lets leave (:func:`alignment.flow.method.offload_levels`)."""
        changing = [role.name for role in self.roles if role.trained or role.changes]
        groups = {
            "freeze_model": [role.name for role in self.roles if role.name not in changing],
            "optimizer": [optimizer_of(role.name) for role in self.roles if role.trained],
            "train_model": changing,
        }
        return frozenset(group for word in self.offload_level.split() for group in groups[word])

    @property
    def width(self) -> int:
        """Tokens of the longest training row."""
        return self.prompt_tokens + self.response_tokens if self.online else self.row_tokens

    @property
    def mean_width(self) -> float:
        """Tokens of the rows that times are for."""
        return self.mean_prompt + self.mean_response if self.online else float(self.row_tokens)

    @property
    def labels(self) -> int:
        """Tokens of the longest row that are learnt from: any of a given row may be an answer's."""
        return self.response_tokens if self.online else self.row_tokens

    @property
    def mean_labels(self) -> float:
        """The same of the rows that times are for."""
        return self.mean_response if self.online else float(self.row_tokens)

    @property
    def rows_of_item(self) -> int:
        """Rows that a forward sees for one row of the data: a pair of a reward model has two."""
        return 2 if self.stage == "reward" else 1

    @property
    def step_rows(self) -> int:
        """Rows (pairs) of this data rank in an optimizer step."""
        most = self.micro_rows * self.accumulation
        return min(most, self.samples) if self.online else most

    @property
    def passed_rows(self) -> int:
        """Rows of a pass without gradient over all that an iteration learns from."""
        return self.samples if self.online else self.step_rows * self.rows_of_item

    def rows_at(self, width: float, fixed: int) -> int:
        """Rows (pairs) of ``width`` tokens that a budget of tokens puts together; ``fixed`` without one."""
        if not self.max_tokens:
            return fixed
        return max(1, int(self.max_tokens // (width * self.rows_of_item)))

    def micro_batch_at(self, width: float) -> int:
        """Rows (pairs) of a micro batch of training whose rows have ``width`` tokens."""
        return min(self.rows_at(width, self.micro_rows), self.step_rows)

    def micro_batches_at(self, width: float) -> int:
        """Micro batches of an optimizer step whose rows have ``width`` tokens."""
        return -(-self.step_rows // self.micro_batch_at(width))

    def infer_batch_at(self, width: float) -> int:
        """Rows of ``width`` tokens of a forward without gradient."""
        return min(self.rows_at(width, self.infer_rows or self.micro_rows), self.passed_rows)

    @property
    def micro_batches(self) -> int:
        """Micro batches of an optimizer step whose rows have their mean lengths."""
        return self.micro_batches_at(self.mean_width)

    @property
    def steps(self) -> int:
        """Optimizer steps of a training call of an iteration: those of one rollout, else 1."""
        if not self.online:
            return 1
        return self.update_iters * max(1, self.samples // (self.micro_rows * self.accumulation))

    def fused_layers(self, role: RolePlan, topology: Topology) -> bool:
        """Whether the CPU kernels train and score a model (:class:`alignment.ppo.models.fused.FusedDecoder`): whole
        models without adapters.
        """
        divided = topology.splits_model or topology.sharding_stage >= 3
        return self.kernels and not divided and not role.lora_rank

    def fused_head(self, role: RolePlan, topology: Topology) -> bool:
        """Whether they compute an LM head: where this process has all of its columns."""
        divided = topology.tensor > 1 and role.shape.vocab % topology.tensor == 0
        return self.kernels and not divided and not role.masked

    def role(self, name: str) -> RolePlan | None:
        """A role by its name."""
        return next((role for role in self.roles if role.name == name), None)

    def present(self, names: Sequence[str]) -> list[RolePlan]:
        """Those of some roles that the run has."""
        return [role for role in map(self.role, names) if role is not None]

    def of_call(self, call: Call) -> Setting:
        """The setting as a call of the flow has it: with as many answers to a prompt as it generates, or as the call
        whose answers it reads; with as many passes as it trains.
        """
        if call.kind == "train":
            passes = getattr(call.run, "passes", None)
            return self if passes is None else replace(self, update_iters=passes)
        for source in self.flow.calls:
            if source.samples and (source is call or set(source.outputs) & set(call.needs)):
                samples = self.samples // self.answers_per_prompt * source.samples
                return replace(self, samples=samples, answers_per_prompt=source.samples)
        return self

    def averages(self, call: Call) -> list[tuple[RolePlan, RolePlan]]:
        """Source and target of what happens behind a call, where the run has both."""
        found = [self.present((average.source, average.target)) for average in call.after]
        return [(roles[0], roles[1]) for roles in found if len(roles) == 2]

    @property
    def readers(self) -> int:
        """Models that read every token while answers are generated: the actor, and one that masks it."""
        calls = [call for call in self.flow.calls if call.kind == "generate"]
        return max((sum(role.head == "lm" for role in self.present(call.roles)) for call in calls), default=1)

    def rollout_topology(self) -> tuple[Topology, int]:
        """The layout that generates, and among how many processes a data rank's prompts are divided.

        The same as :func:`alignment.rollout.layouts.rollout_layout`, of process 0.
        """
        topology = self.topology
        if self.eval_mode == "single" and topology.splits_model:
            return Topology(), topology.tensor * topology.pipeline
        if self.eval_mode == "tensor_parallel" and topology.pipeline > 1:
            return Topology(topology.tensor, 0, tensor=topology.tensor), topology.pipeline
        return topology, 1

    @property
    def reshards(self) -> bool:
        """Whether a rollout has a copy of the actor."""
        return self.online and self.rollout_topology()[1] > 1

    @property
    def engine_generates(self) -> bool:
        """Whether rollouts go through the rollout engine: it cannot where stages of a pipeline generate together."""
        return self.engine and self.rollout_topology()[0].pipeline == 1


def setting_of(
    args: Any,
    topology: Topology,
    shape: Callable[[str, str], ModelShape],
    *,
    half: bool,
    kernels: bool = False,
    cache_bytes: float = float(1 << 30),
    mean_prompt: float | None = None,
    mean_response: float | None = None,
    method: Method | None = None,
) -> Setting:
    """Read a setting from resolved arguments of any stage or method.

    Args:
        args: as ``parse`` returns.
        topology: the layout, of process 0.
        shape: finds a model's shape by ``(folder or name, key of the argument file)``.
        half: whether the card computes in half precision.
        kernels: whether it is a CPU, with its kernels.
        cache_bytes: of the rollout engine's cache where no budget is given.
        mean_prompt, mean_response: tokens on average; the limits if not given.
        method: whose roles and flow they are; None: SFT or a reward model.
    """
    common: dict[str, Any] = {
        "stage": args.STAGE,
        "topology": topology,
        "title": args.TITLE,
        "item": 2 if half and args.bf16 else 4,
        "flash": half and (args.bf16 if args.use_flash_attention is None else args.use_flash_attention),
        "micro_rows": args.per_device_train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
        "max_tokens": args.max_tokens_per_micro_batch,
        "kernels": kernels,
    }
    common |= {"roles": _roles(args, shape, method), "calls": None if method is None else method.flow()}
    if not isinstance(args, OnlineArguments):
        return Setting(row_tokens=args.max_length, **common)
    return Setting(
        prompt_tokens=args.max_src_len,
        response_tokens=args.max_dec_len,
        mean_prompt=min(mean_prompt or args.max_src_len, args.max_src_len),
        mean_response=min(mean_response or args.max_dec_len, args.max_dec_len),
        samples=args.per_device_prompt_batch_size * args.prompt_batches_per_rollout * args.num_return_sequences,
        answers_per_prompt=args.num_return_sequences,
        rollout_rows=max(0, args.per_device_rollout_batch_size),
        infer_rows=args.rollout_logprob_batch_size,
        update_iters=args.update_iters,
        eval_mode=args.eval_mode,
        offload_level=args.offload_level,
        ptx=args.use_ptx,
        temperature=args.temperature,
        engine=args.use_fusemt,
        token_budget=args.rollout_token_budget,
        cache_bytes=cache_bytes,
        **common,
    )


def _roles(args: Any, shape: Callable[[str, str], ModelShape], method: Method | None) -> tuple[RolePlan, ...]:
    rank = args.lora_rank if getattr(args, "lora", False) else 0
    if method is None:
        found = shape(args.model_name_or_path, "model_name_or_path")
        return (RolePlan("model", found, "lm" if args.STAGE == "sft" else "score", True, bool(args.recompute), rank),)
    return tuple(
        RolePlan(
            spec.name,
            shape(getattr(args, spec.key), spec.key),
            "lm" if spec.kind == "policy" or (spec.kind == "rows" and args.STAGE != "reward") else "score",
            spec.trained,
            spec.trained and bool(args.critic_recompute if spec.kind == "value" else args.recompute),
            rank if spec.trained else 0,
            bool(spec.folder),
            spec.masked,
        )
        for spec in method.roles()
        if spec.present
    )
