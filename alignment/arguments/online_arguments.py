"""Arguments of every method that generates: models, prompts, sampling, rewards and what their objectives share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alignment.arguments import foreign, values
from alignment.arguments.sizes import Sizes, online_sizes
from alignment.arguments.spec import argument, read_int
from alignment.arguments.stage_arguments import Arguments
from alignment.arguments.training import ONE_PROCESS, dataset_argument
from alignment.losses.compat import COMPAT, compat_settings

#: What :mod:`alignment.losses.compat` calls keys that have older names here.
_COMPAT_KEYS = {
    "aggregation": "policy_loss_mean",
    "clip_range_low": "clip_range_ratio_low",
    "clip_range_high": "clip_range_ratio_high",
}


def _compat_settings(cls: type[Arguments], chosen: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What each value of ``compat`` sets for a method: the peer's constants under the names of keys."""
    loss = chosen.get("policy_loss", "ppo")
    tables = {peer: compat_settings(peer, cls.STAGE, loss) for peer in COMPAT if cls.STAGE in COMPAT[peer]}
    own = cls.specs()
    return {
        peer: {key if key in own else _COMPAT_KEYS.get(key, key): value for key, value in table.items()}
        for peer, table in tables.items()
    }


@dataclass
class OnlineDataFields:
    """Models and data of methods that generate."""

    GROUP = "Online methods: models and data"

    actor_model_name_or_path: str = argument(
        "", "Folder (or name) of the SFT model: starts the actor, and is the reference.", required=True
    )
    reward_model_name_or_path: str | None = argument(None, "Folder (or name) of the reward model.")
    reward_tokenizer_name_or_path: str | None = argument(
        None, "Folder of the reward model's tokenizer.", derived="the reward model's"
    )
    reward_prompt_template: str = argument(
        "auto",
        "How prompts and answers are written for the reward model: auto (the template saved with it, else its "
        "tokenizer's chat template, else the run's), beaver, chat, a Jinja string or the name of a .jinja file.",
    )
    reward: str | dict[str, float] | None = argument(
        None,
        '"file.py:function", a registered NAME, a list, or an object NAME -> weight, where "model" is the reward '
        "model.",
        parse=values.read_reward,
        derived="the reward model",
    )
    reward_timeout: float = argument(
        0.0,
        "Longest time that a reward may take for a batch; 0: no limit, but the wait is said.",
        ge=0,
        unit="s",
    )
    reward_sees_special_tokens: bool = argument(
        False, "Whether special tokens other than end and padding stay in the text that Python rewards get."
    )
    train_datasets: str | dict[str, Any] | None = dataset_argument("Mixture of prompts.")
    eval_datasets: str | dict[str, Any] | None = dataset_argument("Mixture of evaluation prompts.")
    ptx_datasets: str | dict[str, Any] | None = dataset_argument(
        "Supervised mixture of the ptx loss; without it there is none."
    )


@dataclass
class RolloutFields:
    """Prompts and sampling."""

    GROUP = "Online methods: rollout"

    per_device_prompt_batch_size: int = argument(16, "Prompts that a process reads at a time.", ge=1, unit="prompts")
    num_return_sequences: int = argument(1, "Samples per prompt.", ge=1, aliases=("rollout_n",))
    per_device_rollout_batch_size: int = argument(
        -1,
        "Samples that a process generates at a time; -1: as many as rollout_token_budget allows (on the plain path "
        "per_device_train_batch_size).",
        ge=-1,
        unit="rows",
    )
    rollout_token_budget: int = argument(
        0,
        "Tokens whose keys and values the rollout engine keeps at once; 0: as many as 1 GiB (on a GPU an eighth of its "
        "memory) holds.",
        ge=0,
        unit="tokens",
    )
    rollout_logprob_batch_size: int | None = argument(
        None,
        "Samples per forward pass without gradients.",
        ge=1,
        unit="rows",
        derived="per_device_train_batch_size",
        parse=lambda value, is_text: None if value == "auto" else read_int(value),
    )
    max_length: int = argument(2048, "Default of both limits below.", ge=1, unit="tokens")
    max_src_len: int | None = argument(
        None, "Longest prompt.", ge=1, unit="tokens", aliases=("max_prompt_len",), derived="max_length"
    )
    max_dec_len: int | None = argument(None, "Longest answer.", ge=1, unit="tokens", derived="max_length")
    min_dec_len: int = argument(1, "Shortest answer: the end is not sampled before.", ge=0, unit="tokens")
    temperature: float = argument(1.0, "Sampling temperature, also of all log-probabilities.", gt=0)
    top_p: float = argument(
        0.8, "Sample from the most probable tokens that together reach this probability; 1: off.", gt=0, le=1
    )
    top_k: int = argument(0, "Sample from this many most probable tokens; 0: off.", ge=0)
    repetition_penalty: float = argument(
        1.0, "Divides the logits of tokens that were already there (CTRL's rule); 1: off.", gt=0
    )
    stop_strings: list[str] | None = argument(None, "Texts that end an answer, besides the end-of-text tokens.")
    use_fusemt: bool = argument(
        True, "Generate with the fused rollout engine; false: through paddlenlp's own layers, the plain path."
    )
    eval_mode: str | None = argument(
        None,
        "The rollout's layout; empty: that of the training; tensor_parallel: pipeline stages put together; single: "
        "tensor ranks too, one whole actor per process.",
        choices=("", "single", "tensor_parallel"),
        alone=ONE_PROCESS,
    )
    eval_temperature: float = argument(1.0, "Temperature of the sampled evaluation; 0: greedy only.", ge=0)
    eval_num_samples: int | None = argument(None, "Evaluation prompts used.", ge=1, unit="prompts", derived="all")
    sample_table_rows: int = argument(
        5, "Rows of the table of sample answers at each evaluation; 0: none.", ge=0, unit="rows"
    )


@dataclass
class ObjectiveFields:
    """Rewards, advantages and losses."""

    GROUP = "Online methods: objective"

    update_iters: int = argument(1, "Passes over each rollout.", ge=1)
    kl_coeff: float = argument(0.02, "Weight of the KL penalty in the reward (with adaptive_kl: the first one).", ge=0)
    kl_estimator: str = argument("k1", "Estimator of the KL (Schulman 2020): k1, k2 or k3.", choices=("k1", "k2", "k3"))
    adaptive_kl: bool = argument(False, "Steer kl_coeff towards kl_target (Ziegler et al. 2019, section 2.2).")
    kl_target: float = argument(6.0, "KL per answer that adaptive_kl aims at.", gt=0)
    kl_horizon: int = argument(10000, "Samples over which adaptive_kl corrects.", ge=1, unit="rows")
    gamma: float = argument(1.0, "Discount.", ge=0, le=1)
    normalize_reward: bool | None = argument(
        None, "Normalise the scores before the KL penalty is added.", derived="false"
    )
    normalize_advantage: bool | None = argument(
        None, "Whiten the advantages over the rollout's tokens.", derived="false"
    )
    clip_range_ratio: float = argument(0.2, "PPO's epsilon.", gt=0)
    clip_range_ratio_low: float | None = argument(None, "Epsilon below 1.", gt=0, le=1, derived="clip_range_ratio")
    clip_range_ratio_high: float | None = argument(None, "Epsilon above 1.", gt=0, derived="clip_range_ratio")
    clip_range_score: float = argument(50.0, "Scores are clipped to this absolute value.", gt=0)
    dual_clip: float | None = argument(
        None, "Dual clip: bound of the loss where the advantage is negative.", gt=1, derived="off"
    )
    policy_loss_mean: str = argument(
        "token",
        "Mean over the tokens of the optimizer step, or over its samples' means.",
        choices=("token", "sequence"),
    )
    entropy_coeff: float = argument(0.0, "Weight of the entropy bonus.", ge=0)
    ptx_coeff: float = argument(0.0, "Weight of the ptx loss.", ge=0)
    target_kl: float | None = argument(
        None, "End a rollout's updates when the approximate KL passes this.", gt=0, derived="off"
    )
    missing_eos_rule: str = argument(
        "none",
        "Answers cut off at max_dec_len: nothing, a fixed score, or a penalty off the score.",
        choices=("none", "score", "penalty"),
    )
    missing_eos_score: float = argument(-1.0, "The fixed score.")
    missing_eos_penalty: float = argument(1.0, "The penalty.", ge=0)
    compat: str | None = argument(
        None,
        "Set constants as a peer does, where they are not given: the same names mean other maths there. What is set is "
        "said.",
        choices=tuple(COMPAT),
        sets=_compat_settings,
        derived="this toolkit's",
    )


@dataclass
class CorrectionFields:
    """Importance weights between the policy that sampled and the one that is trained."""

    GROUP = "Online methods: off-policy correction"

    rollout_correction: str = argument(
        "none",
        "What is done where the training network's probability of a token is not that which it was sampled with, "
        "rho = p / q: tis weights a token's loss by min(rho, high), icepop by rho inside the bounds and 0 outside, "
        "mask leaves out answers whose geometric mean of rho lies outside.",
        choices=("none", "tis", "icepop", "mask"),
    )
    rollout_correction_low: float | None = argument(
        None, "Lower bound of rho.", ge=0, derived="icepop 0.5, mask 0.99; tis has none"
    )
    rollout_correction_high: float | None = argument(
        None,
        "Upper bound of rho.",
        gt=0,
        derived="tis 2, icepop 5, mask 1.01",
        aliases=("rollout_correction_cap",),
    )


@dataclass
class OnlineArguments(CorrectionFields, ObjectiveFields, RolloutFields, OnlineDataFields, Arguments):
    """What every method that generates has; see :class:`~alignment.arguments.stage_arguments.Arguments`.

    A method adds its own keys with :func:`~alignment.arguments.compose.compose`.
    """

    FOREIGN = foreign.ONLINE
    METRICS = ("reward",)

    @property
    def context_needed(self) -> int:
        """Tokens of the longest row: prompt and answer."""
        return self.max_src_len + self.max_dec_len  # type: ignore[operator]

    @property
    def use_ptx(self) -> bool:
        """Whether a ptx loss is added to the actor's updates."""
        return bool(self.ptx_datasets) and self.ptx_coeff > 0

    @property
    def prompt_batches_per_rollout(self) -> int:
        """Batches of prompts that make one rollout: 1, or as many as fill one optimizer step."""
        window = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return max(1, window // (self.per_device_prompt_batch_size * self.num_return_sequences))

    def derive_sizes(self, num_rows: int, world_size: int = 1) -> Sizes:
        """Derive the numbers of rollouts and steps from the number of prompts; see the base class."""
        return online_sizes(self, num_rows, world_size)

    def correction_bounds(self) -> dict[str, float | None]:
        """Return the given fields of ``CorrectionOptions`` of :mod:`alignment.losses.correction` as a dict."""
        kind, low, high = self.rollout_correction, self.rollout_correction_low, self.rollout_correction_high
        if kind == "none":
            return {}
        return {"tis_cap": high} if kind == "tis" else {f"{kind}_low": low, f"{kind}_high": high}
