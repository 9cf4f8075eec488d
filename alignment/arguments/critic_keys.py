"""The keys of a critic, which methods with one mix into their own."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from alignment.arguments import foreign
from alignment.arguments.spec import argument, specs
from alignment.arguments.training import SCHEDULERS

#: Keys of the actor's optimizer that the critic has as ``critic_KEY``.
FROM_ACTOR = (
    "learning_rate",
    "min_learning_rate",
    "weight_decay",
    "lr_scheduler_type",
    "warmup_ratio",
    "decay_steps",
    "recompute",
)


@dataclass
class CriticKeys:
    """The keys of methods with a critic: what starts it, its advantages and loss, its own optimizer.

    Such a method's own keys derive from this class.
    """

    GROUP = "Critic"

    reward_critic_model_name_or_path: str | None = argument(
        None,
        "Folder (or name) of the model that starts the critic.",
        derived="the reward model, else the actor's with a new head",
    )
    gae_lambda: float = argument(0.95, "Lambda of GAE.", ge=0, le=1)
    clip_range_value: float = argument(5.0, "Values are clipped to this distance from the old ones.", gt=0)
    value_coeff: float = argument(1.0, "Weight of a critic's loss.", ge=0)
    critic_warmup_steps: int = argument(
        0, "First optimizer steps, in which only critics learn.", ge=0, unit="optimizer steps"
    )
    critic_learning_rate: float | None = argument(None, "The critic's learning_rate.", ge=0, derived="learning_rate")
    critic_min_learning_rate: float | None = argument(
        None, "The critic's min_learning_rate.", ge=0, derived="min_learning_rate"
    )
    critic_weight_decay: float | None = argument(None, "The critic's weight_decay.", ge=0, derived="weight_decay")
    critic_lr_scheduler_type: str | None = argument(
        None, "The critic's lr_scheduler_type.", choices=SCHEDULERS, derived="lr_scheduler_type"
    )
    critic_warmup_ratio: float | None = argument(
        None,
        "The critic's warmup_ratio; if given, warmup_steps does not count for it.",
        ge=0,
        le=1,
        derived="warmup_ratio",
    )
    critic_decay_steps: int | None = argument(
        None, "The critic's decay_steps.", ge=0, unit="optimizer steps", derived="decay_steps"
    )
    critic_recompute: bool | None = argument(None, "The critic's recompute.", derived="recompute")

    def critic_optimizer(self, total_steps: int) -> dict[str, Any]:
        """Return the critic's settings like :meth:`optimizer`: each ``critic_*`` value, else the actor's."""
        settings = self.optimizer(total_steps)  # type: ignore[attr-defined]
        for name in ("learning_rate", "min_learning_rate", "weight_decay", "lr_scheduler_type", "warmup_ratio"):
            settings[name] = getattr(self, f"critic_{name}")
        settings["decay_steps"] = self.critic_decay_steps or total_steps
        if "critic_warmup_ratio" in self.given:
            settings["warmup_steps"] = math.ceil(total_steps * self.critic_warmup_ratio)  # type: ignore[operator]
        return settings


#: ``FOREIGN`` of methods without a critic that take over its keys from a file for several methods (paddlenlp has one
#: script, and one set of keys, for its algorithms with a critic and without).
NO_CRITIC = {
    **foreign.ONLINE,
    **{name: replace(spec, no_effect="there is no critic") for name, spec in specs(CriticKeys).items()},
}
