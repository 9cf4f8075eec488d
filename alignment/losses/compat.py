"""The same name, other maths: what the peers set where ours would be something else.

Each value is a setting of a function here: a field of :class:`~alignment.losses.estimators.AdvantageOptions` or
:class:`~alignment.losses.policy.PolicyOptions`, a clamp of :func:`~alignment.losses.kl.kl_terms` with ``kl_`` in front,
or the name of an ``advantage``, a ``policy_loss``, an ``aggregation`` or a ``kl_estimator``. What a peer does by
mistake is not here. docs/compat.md says in words where the names differ.
"""

from __future__ import annotations

from typing import Any

from alignment.errors import ArgumentsError, nearest

Settings = dict[str, Any]

_TRL_GRPO: Settings = {"std": "unbiased", "eps": 1e-4, "aggregation": "token", "kl_estimator": "k3"}
# One ratio and one clip for the whole answer; the penalty's sum is part of the score.
_TRL_RLOO: Settings = {"policy_loss": "rloo", "aggregation": "sequence", "token_rewards": "score", "eps": 1e-4}
_VERL_LOSS: Settings = {"aggregation": "token", "dual_clip": 3.0}
_VERL_KL: Settings = {"kl_log_ratio_clamp": 20.0, "kl_clamp": 10.0}
_VERL_GROUPS: Settings = {
    "singletons": "raw", "token_rewards": "score", **_VERL_LOSS, "cispo_low": 0.8, "cispo_high": 1.2, **_VERL_KL,
}  # fmt: skip
_OPENRLHF_LOSS: Settings = {"aggregation": "token", "dual_clip": None, "kl_clamp": 10.0}
_OPENRLHF_GROUPS: Settings = {"token_rewards": "tokens", **_OPENRLHF_LOSS}
_NEMO_LOSS: Settings = {"aggregation": "token", **_VERL_KL}
_COMPOSE_LOSS: Settings = {"aggregation": "sequence", "clip_range_low": 0.15, "kl_log_ratio_clamp": 40.0}
_BY_N_LESS_ONE: Settings = {"whiten_std": "unbiased", "whiten_eps": 1e-8}
_BY_N: Settings = {"whiten_std": "biased", "whiten_eps": 1e-8}

#: peer -> method -> settings. Versions: docs/compat.md.
COMPAT: dict[str, dict[str, Settings]] = {
    "trl0.24": {"grpo": _TRL_GRPO, "rloo": _TRL_RLOO, "ppo": {"aggregation": "token", **_BY_N_LESS_ONE}},
    "trl1": {"grpo": _TRL_GRPO, "rloo": _TRL_RLOO},
    "verl": {
        "grpo": {"std": "unbiased", "eps": 1e-6, **_VERL_GROUPS},
        "rloo": _VERL_GROUPS,
        "reinforce": {**_VERL_GROUPS, **_BY_N_LESS_ONE},
        "remax": {**_VERL_LOSS, **_VERL_KL},
        "ppo": {**_VERL_LOSS, **_VERL_KL, **_BY_N_LESS_ONE},
    },
    "openrlhf": {
        "grpo": {"std": "unbiased", "eps": 1e-9, **_OPENRLHF_GROUPS},
        "rloo": _OPENRLHF_GROUPS,
        "reinforce": {**_OPENRLHF_GROUPS, **_BY_N},
        "ppo": {**_OPENRLHF_LOSS, **_BY_N},
    },
    "nemo": {
        "grpo": {
            "leave_one_out": True, "eps": 1e-6, "kl_estimator": "k3", **_NEMO_LOSS, "cispo_low": 0.0, "cispo_high": 6.0,
        },
        # its reinforce_plus_plus takes the group's mean off unless told not to
        "reinforce": {"advantage": "reinforce_plus_plus_baseline", **_NEMO_LOSS, **_BY_N},
        "ppo": {"dual_clip": 10.0, "clip_range_low": 0.2, "clip_range_high": 0.28, **_NEMO_LOSS},
    },
    "compose": {
        "grpo": {"std": "biased", "eps": 1e-4, "singletons": "zero", "kl_estimator": "k3", **_COMPOSE_LOSS},
        "ppo": {"kl_estimator": "k1", **_COMPOSE_LOSS, **_BY_N_LESS_ONE},
    },
}  # fmt: skip
COMPAT["trl"] = COMPAT["trl1"]


def compat_settings(peer: str, method: str, policy_loss: str = "ppo") -> Settings:
    """What to set so that ``method`` computes what ``peer`` computes under that name.

    Args:
        peer: a name of :data:`COMPAT`.
        method: ``"grpo"``, ``"rloo"``, ``"reinforce"``, ``"remax"`` or ``"ppo"``.
        policy_loss: the loss that is chosen. Any but ``"ppo"`` keeps the aggregation of its own paper
            (:data:`~alignment.losses.policy.LOSS_DEFAULTS`), as it does at the peers: ``aggregation`` is left out then.

    Returns:
        A new dictionary.

    Raises:
        ArgumentsError: the peer is unknown, or it has no such method.
    """
    if peer not in COMPAT:
        raise ArgumentsError(f"unknown compat {peer!r}{nearest(peer, COMPAT)}\nKnown: {', '.join(COMPAT)}.")
    if method not in COMPAT[peer]:
        raise ArgumentsError(
            f"compat {peer!r} says nothing of {method!r}: it knows {', '.join(COMPAT[peer])} (see docs/compat.md)"
        )
    settings = dict(COMPAT[peer][method])
    if policy_loss != "ppo" and "policy_loss" not in settings:
        settings.pop("aggregation", None)
    return settings
