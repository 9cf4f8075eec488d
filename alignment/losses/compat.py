"""The same name, other maths: what the peers set where ours would be something else.

Each value is a setting of a function here: a field of :class:`~alignment.losses.estimators.AdvantageOptions` or
:class:`~alignment.losses.policy.PolicyOptions`, an argument of :func:`~alignment.losses.kl.kl_terms` with ``kl_`` in
front, or the name of an ``advantage``, a ``policy_loss`` or an ``aggregation``. What a peer does by mistake is not
here. docs/compat.md says in words where the names differ.
"""

from __future__ import annotations

from typing import Any

from alignment.errors import ArgumentsError, nearest

Settings = dict[str, Any]

_TRL_GRPO: Settings = {"std": "unbiased", "eps": 1e-4, "aggregation": "token", "kl_kind": "k3", "dual_clip": None}
# One ratio and one clip for the whole answer; the penalty's sum is part of the score.
_TRL_RLOO: Settings = {"policy_loss": "rloo", "aggregation": "sequence", "token_rewards": "score", "eps": 1e-4}
_TRL_PPO: Settings = {"whiten_std": "unbiased", "whiten_eps": 1e-8, "aggregation": "token", "dual_clip": None}
_VERL: Settings = {
    "singletons": "raw", "token_rewards": "score", "aggregation": "token", "dual_clip": 3.0,
    "kl_log_ratio_clamp": 20.0, "kl_clamp": 10.0, "cispo_low": 0.8, "cispo_high": 1.2,
}  # fmt: skip
_OPENRLHF: Settings = {"token_rewards": "tokens", "aggregation": "token", "dual_clip": None, "kl_clamp": 10.0}
_NEMO: Settings = {
    "aggregation": "token", "dual_clip": None, "kl_log_ratio_clamp": 20.0, "kl_clamp": 10.0,
    "cispo_low": 0.0, "cispo_high": 6.0,
}  # fmt: skip
_COMPOSE: Settings = {
    "aggregation": "sequence", "clip_range_low": 0.15, "kl_log_ratio_clamp": 40.0, "dual_clip": None,
}  # fmt: skip

#: peer -> method -> settings. Versions: docs/compat.md.
COMPAT: dict[str, dict[str, Settings]] = {
    "trl0.24": {"grpo": _TRL_GRPO, "rloo": _TRL_RLOO, "ppo": _TRL_PPO},
    "trl1": {"grpo": {**_TRL_GRPO, "cispo_low": 0.0}, "rloo": _TRL_RLOO},
    "verl": {
        "grpo": {**_VERL, "std": "unbiased", "eps": 1e-6},
        "rloo": _VERL,
        "reinforce": {**_VERL, "whiten_std": "unbiased", "whiten_eps": 1e-8},
        "remax": _VERL,
        "ppo": {**_VERL, "whiten_std": "unbiased", "whiten_eps": 1e-8},
    },
    "openrlhf": {
        "grpo": {**_OPENRLHF, "std": "unbiased", "eps": 1e-9},
        "rloo": _OPENRLHF,
        "reinforce": {**_OPENRLHF, "whiten_std": "biased", "whiten_eps": 1e-8},
        "ppo": {**_OPENRLHF, "whiten_std": "biased", "whiten_eps": 1e-8},
    },
    "nemo": {
        "grpo": {**_NEMO, "leave_one_out": True, "eps": 1e-6, "kl_kind": "k3"},
        # its reinforce_plus_plus takes the group's mean off unless told not to
        "reinforce": {
            **_NEMO, "advantage": "reinforce_plus_plus_baseline", "whiten_std": "biased", "whiten_eps": 1e-8,
        },
        "ppo": {**_NEMO, "dual_clip": 10.0, "clip_range_low": 0.2, "clip_range_high": 0.28},
    },
    "compose": {
        "grpo": {**_COMPOSE, "std": "biased", "eps": 1e-4, "singletons": "zero", "kl_kind": "k3"},
        "ppo": {**_COMPOSE, "whiten_std": "unbiased", "whiten_eps": 1e-8, "kl_kind": "k1"},
    },
}  # fmt: skip
COMPAT["trl"] = COMPAT["trl1"]


def compat_settings(peer: str, method: str) -> Settings:
    """What to set so that ``method`` computes what ``peer`` computes under that name.

    Args:
        peer: a name of :data:`COMPAT`.
        method: ``"grpo"``, ``"rloo"``, ``"reinforce"``, ``"remax"`` or ``"ppo"``.

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
    return dict(COMPAT[peer][method])
