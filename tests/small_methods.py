"""What a short run of each method is given besides what all of them are given: the rows of every table of methods (the
layouts, the kills, the cells of tests/methods/test_every_method.py, what is learnt). A new method is one row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignment import methods

_CRITIC: dict[str, Any] = {"critic_learning_rate": 5e-4}


@dataclass(frozen=True)
class Small:
    """A method's own settings.

    Attributes:
        keys: of its argument file; ``{files}`` in a text is the folder with the models.
        answers: to each prompt; there are so many times fewer prompts in a rollout.
    """

    keys: Mapping[str, Any] = field(default_factory=dict)
    answers: int = 1

    def words(self, files: Path, prompts: int) -> list[str]:
        """For the command line.

        Args:
            files: has the folder ``cost`` with a model that judges costs.
            prompts: of a process at a time, with one answer each.
        """
        keys = {"update_iters": 2, **self.keys, "per_device_prompt_batch_size": max(1, prompts // self.answers)}
        keys["num_return_sequences"] = self.answers
        return [f"{key}={str(value).format(files=files)}" for key, value in keys.items()]


_ROWS = {
    "ppo": Small({"kl_coeff": 0.1, "normalize_advantage": True, **_CRITIC}),
    "grpo": Small({"kl_coeff": 0.1}, answers=4),
    "rloo": Small({"kl_coeff": 0.1}, answers=4),
    "reinforce": Small({"kl_coeff": 0.1}),
    "remax": Small({"kl_coeff": 0.1}),
    "a2c": Small({"kl_coeff": 0.1, "update_iters": 1, **_CRITIC}),
    "nlpo": Small({"kl_coeff": 0.1, "mask_update_rollouts": 2, **_CRITIC}),
    "safe_ppo": Small({"kl_coeff": 0.1, "cost_model_name_or_path": "{files}/cost", **_CRITIC}),
    "rft": Small({"start_percentile": 0.0, "end_percentile": 0.2}, answers=4),
}
#: By the method's name.
METHODS: dict[str, Small] = {name: row for name, row in _ROWS.items() if name in methods.BUILT_IN}
