"""What all methods' argument classes have in common besides their fields: writing, showing, derived values."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from alignment.arguments import device, limits, presets
from alignment.arguments.layout import topology_of
from alignment.arguments.sizes import Sizes, supervised_sizes
from alignment.arguments.spec import Spec, specs
from alignment.arguments.training import TrainingFields
from alignment.log import say_once
from alignment.parallel.topology import Topology

if TYPE_CHECKING:
    from alignment.arguments.checks import Problems

#: Accepted keys whose values are neither written nor shown.
SECRETS = frozenset({"wandb_api_key", "aistudio_token"})


@dataclass
class Arguments(TrainingFields):
    """Arguments of one run; made by :func:`alignment.arguments.parse`.

    Every key is an attribute. After parsing, values that follow from other keys are filled in: an attribute is None
    only where None means something (it says so in ``docs/arguments.md``).

    Attributes:
        raw: keys and values as the user wrote them, command line over file.
        given: the keys that were given, under their canonical names.
        set_by: key -> what set it in the user's place (``"compat verl"``).
        unused: key -> why it changes nothing in this run.
        remarks: what is worth knowing, and nothing to worry about.
        notes: what is worth saying about combinations of keys.
        passthrough: values of accepted keys that have no attribute.
        file: the argument file, or None.
    """

    #: The method's name, as commands and checkpoints have it, and as people read it.
    STAGE: ClassVar[str] = ""
    TITLE: ClassVar[str] = ""
    #: Accepted keys without an attribute, besides those of all stages.
    FOREIGN: ClassVar[Mapping[str, Spec]] = {}
    #: What an evaluation gives, without ``eval_``; ``metric_for_best_model`` is the first unless the user says.
    METRICS: ClassVar[tuple[str, ...]] = ("loss",)
    #: Token rows of one row of the data: 2 where a row is a pair of answers.
    ROWS_EACH: ClassVar[int] = 1

    raw: dict[str, Any] = dataclasses.field(default_factory=dict)
    given: frozenset[str] = frozenset()
    set_by: dict[str, str] = dataclasses.field(default_factory=dict)
    remarks: list[str] = dataclasses.field(default_factory=list)
    unused: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    passthrough: dict[str, Any] = dataclasses.field(default_factory=dict)
    file: str | None = None

    @classmethod
    def specs(cls) -> dict[str, Spec]:
        """Return the description of every key that has an attribute."""
        return specs(cls)

    def resolve_keys(self) -> None:
        """Fill in, in place, what follows for the method's own keys; called when all shared keys are resolved."""

    def check_keys(self, problems: Problems) -> None:
        """Note in ``problems`` what cannot be run, and in ``self.notes`` what is odd, about the method's own keys."""

    @property
    def on_cpu(self) -> bool:
        """Whether this run computes on the CPU (found out without loading Paddle)."""
        return self.device == "cpu" or not device.gpu_available()

    @property
    def dtype(self) -> str:
        """Data type of the weights: ``"bfloat16"`` with ``bf16``, whatever ``fp16_opt_level``; else ``"float32"``."""
        return "bfloat16" if self.bf16 else "float32"

    @property
    def context_needed(self) -> int:
        """Tokens of the longest row that the limits allow."""
        return self.max_length  # type: ignore[attr-defined]

    def to_dict(self) -> dict[str, Any]:
        """Return all keys with their resolved values, then the accepted keys without attribute; all JSON values.

        Keys that hold a secret are left out, since the result is saved and logged.
        """
        values = {name: getattr(self, name) for name in self.specs()}
        return json.loads(json.dumps({**values, **self._shown_passthrough()}))

    def _shown_passthrough(self) -> dict[str, Any]:
        return {key: value for key, value in self.passthrough.items() if key not in SECRETS}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write :meth:`to_dict` as JSON; the file can be given to the same stage again. Returns its path."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return target

    def report(self) -> None:
        """Log, once, every key that changes nothing here and every note about combinations."""
        for line in self.remarks + self.unused_lines():
            say_once(line)
        for note in self.notes:
            say_once(note, logging.WARNING)

    def unused_lines(self) -> list[str]:
        """Return one line per reason, with all the keys that it concerns."""
        by_reason: dict[str, list[str]] = {}
        for key, reason in self.unused.items():
            by_reason.setdefault(reason, []).append(key)
        return [f"{', '.join(keys)}: {reason}" for reason, keys in by_reason.items()]

    def check_context(self, context_length: int | None, where: str = "the model") -> None:
        """Compare the length limits with a model's context; call it before the model is loaded.

        Limits that were not given are lowered to fit, and that is said.

        Args:
            context_length: positions that the model has (``max_position_embeddings``); None: unknown, nothing is
                checked.
            where: the model's name in messages, such as ``"actor ./sft"``.

        Raises:
            ArgumentsError: the limits that were given do not fit; with the numbers and what would fit.
        """
        if context_length is not None:
            for note in limits.fit(self, context_length, where):
                say_once(note)

    def derive_sizes(self, num_rows: int, world_size: int = 1) -> Sizes:
        """Derive the numbers of steps from the number of training rows.

        Args:
            num_rows: rows of the training set after filtering (packed rows with ``zero_padding``); prompts in PPO.
            world_size: data ranks.

        Raises:
            ArgumentsError: there is nothing to train on.
        """
        return supervised_sizes(self, num_rows, world_size)

    def topology(self) -> Topology:
        """How the run's processes share models and data; see :func:`alignment.arguments.layout.topology_of`.

        Raises:
            ArgumentsError: the degrees do not fit the number of processes.
        """
        return topology_of(self)

    def data_options(self, show_progress: bool) -> dict[str, Any]:
        """Return the keyword arguments that every data set of token rows of this run takes, as a dict.

        Args:
            show_progress: whether this process shows bars, where they are wanted.
        """
        return {
            "overlong_prompts": self.overlong_prompts,
            "overlong_answers": self.overlong_answers,
            "skip_bad_rows": self.skip_bad_rows,
            "seed": self.seed,
            "cache_dir": self.data_cache_dir,
            "num_proc": self.dataset_num_proc,
            "show_progress": show_progress and not self.disable_tqdm,
        }

    def optimizer(self, total_steps: int) -> dict[str, Any]:
        """Return the fields of the engine's ``OptimizerSettings`` as a dict.

        ``warmup_steps`` is resolved (steps win over the ratio) and so is ``decay_steps`` (0 becomes ``total_steps``).

        Args:
            total_steps: optimizer steps of the whole run.
        """
        return {
            "learning_rate": self.learning_rate,
            "min_learning_rate": self.min_learning_rate,
            "weight_decay": self.weight_decay,
            "adam_beta1": self.adam_beta1,
            "adam_beta2": self.adam_beta2,
            "adam_epsilon": self.adam_epsilon,
            "max_grad_norm": self.max_grad_norm,
            "lr_scheduler_type": self.lr_scheduler_type,
            "warmup_steps": self.warmup_steps or math.ceil(total_steps * self.warmup_ratio),
            "warmup_ratio": self.warmup_ratio,
            "decay_steps": self.decay_steps or total_steps,
            "total_steps": total_steps,
        }

    def policy_optimizer(self, total_steps: int) -> dict[str, Any]:
        """Return :meth:`optimizer`: the settings of the model that is being aligned."""
        return self.optimizer(total_steps)

    def dry_run_text(self, sizes: Sizes | None = None) -> str:
        """Return what ``--dry_run`` prints: resolved arguments (``*``: not the default), remarks, derived sizes."""
        known = self.specs()
        width = max(map(len, known))
        lines = [f"{self.TITLE}: resolved arguments (* differs from the default)"]
        group = ""
        for name, spec in known.items():
            if spec.group != group:
                group = spec.group
                lines += ["", group]
            value = getattr(self, name)
            mark = "*" if (name in self.given or name in self.set_by) and not spec.is_neutral(value) else " "
            source = f"  (by {self.set_by[name]})" if name in self.set_by else ""
            lines.append(f"{mark} {name:<{width}}  {json.dumps(value, ensure_ascii=False)}{source}")
        shown = self._shown_passthrough()
        if shown:
            lines += ["", "Accepted without a field of their own"]
            lines += [f"  {name:<{width}}  {json.dumps(value)}" for name, value in shown.items()]
        remarks = self.remarks + self.unused_lines() + self.notes
        if remarks:
            lines += ["", "Remarks", *(f"- {remark}" for remark in remarks)]
        if sizes is not None:
            lines += ["", sizes.render()]
        return "\n".join(lines)


def help_text(cls: type[Arguments]) -> str:
    """Return what ``--help`` prints for a stage: how arguments are given, then every key by group."""
    lines = [
        f"{cls.TITLE}: FILE [key=value | --key value | --key=value | --flag] ...",
        "",
        "FILE holds the same keys as JSON or YAML; the command line wins over it.",
        "--dry_run prints the resolved arguments and sizes, and stops.",
        "docs/arguments.md has ranges and effects as a table.",
    ]
    group = ""
    for name, spec in cls.specs().items():
        if spec.group != group:
            group = spec.group
            lines += ["", group]
        default = "required" if spec.required else spec.derived or json.dumps(spec.default, ensure_ascii=False)
        allowed = f" [{spec.range_text()}]" if spec.range_text() and spec.kind != "bool" else ""
        lines += [f"  {name}  (default: {default}){allowed}", f"      {spec.help}"]
        for value, settings in presets.settings_of(cls, spec).items():
            lines += [f"      {value}: {presets.in_words(settings)}"] * bool(settings)
    return "\n".join(lines)
