"""Advantage estimators by name (NumPy on the host; rows of ALL ranks; no gradient).

Each is a function from one :class:`AdvantageInputs` to one :class:`Advantages`. ``r`` is a row's score (with what its
tokens earned, for ``token_rewards: score``), g its prompt:

========================= ==========================================================================================
grpo                      ``(r - mean_g) / (std + eps)``
rloo                      ``r - mean of the others in g``
opo                       ``r - sum_g(len r) / sum_g(len)``
gpg                       ``alpha (r - mean_g)``, alpha = rows / rows with a score other than 0
grpo_passk                ``(max_g - second_g) / (std + eps)`` for the best of g, 0 for the others
gdpo                      several rewards, each normalised in g; weighted sum; normalised over sequences
reinforce_plus_plus       token returns, whitened over all tokens
reinforce_plus_plus_baseline ``r - mean_g``, whitened over all tokens
remax                     token returns minus the score of the greedy answer
gae                       generalised advantage estimation with a critic
========================= ==========================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from alignment.errors import ArgumentsError
from alignment.losses import groups as grouped
from alignment.losses.advantages import discounted_returns, gae, whiten
from alignment.losses.groups import Scale, Singletons, Std
from alignment.losses.kl import last_tokens
from alignment.named import Named

TOKEN_REWARDS = ("score", "tokens")
NORMALIZE = ("none", "tokens", "sequences")
STDS = ("unbiased", "biased")


@dataclass(frozen=True)
class AdvantageOptions:
    """The settings of the estimators; each reads those that its formula has.

    Attributes:
        scale: of ``grpo`` and ``grpo_passk``; see :func:`~alignment.losses.groups.group_advantages`.
        std: divided by n - 1 (``"unbiased"``) or by n (``"biased"``), in groups and over sequences.
        eps: added to those deviations.
        singletons: what becomes of a prompt with one answer; likewise.
        leave_one_out: ``grpo`` by the other answers' mean and deviation (NeMo).
        token_rewards: how what tokens earn (a KL penalty) enters the estimators of groups: ``"score"``, its sum is part
            of the row's score before the group's mean is taken (TRL, verl), or ``"tokens"``, the token returns of
            ``advantage at the last token + token rewards`` (OpenRLHF).
        gamma: discount of token returns and of ``gae``.
        lam: lambda of ``gae``.
        normalize: ``"tokens"`` whitens over all tokens, ``"sequences"`` over rows, ``"none"``; ``None`` is the
            estimator's own: tokens for the two REINFORCE++, none for the others.
        whiten_std: divided by n - 1 or by n, over tokens.
        whiten_eps: added to the variance over tokens.
    """

    scale: Scale = "group"
    std: Std = "unbiased"
    eps: float = 1e-6
    singletons: Singletons = "refuse"
    leave_one_out: bool = False
    token_rewards: str = "score"
    gamma: float = 1.0
    lam: float = 0.95
    normalize: str | None = None
    whiten_std: Std = "unbiased"
    whiten_eps: float = 1e-8

    def __post_init__(self) -> None:
        known = {
            "scale": grouped.SCALES, "std": STDS, "singletons": grouped.SINGLETONS, "token_rewards": TOKEN_REWARDS,
            "normalize": (None, *NORMALIZE), "whiten_std": STDS,
        }  # fmt: skip
        for name, values in known.items():
            if getattr(self, name) not in values:
                listed = ", ".join(str(value) for value in values)
                raise ArgumentsError(f"advantages: {name} is {getattr(self, name)!r}; it can be {listed}")


@dataclass(frozen=True)
class AdvantageInputs:
    """What an estimator is computed from.

    Attributes:
        scores: ``[B]`` float, one a row, shaped and clipped; NaN for not applicable (advantage 0, in no mean).
        mask: ``[B, R]``, 1 for the tokens that the policy chose.
        groups: ``[B]`` int, the global number of each row's prompt.
        token_rewards: ``[B, R]`` what tokens earn beside the score (``-beta KL``); ``None`` for nothing.
        values: ``[B, R]`` of the critic; ``gae`` only.
        greedy_scores: ``[B]`` score of the prompt's greedy answer; ``remax`` only.
        rewards: ``[B, K]`` each reward by itself; ``gdpo`` only.
        reward_weights: ``[K]``; ``None`` for 1 each.
        options: the settings.
    """

    scores: np.ndarray
    mask: np.ndarray
    groups: np.ndarray | None = None
    token_rewards: np.ndarray | None = None
    values: np.ndarray | None = None
    greedy_scores: np.ndarray | None = None
    rewards: np.ndarray | None = None
    reward_weights: np.ndarray | None = None
    options: AdvantageOptions = field(default_factory=AdvantageOptions)


@dataclass(frozen=True)
class Advantages:
    """What an estimator returns, both ``[B, R]`` float64, 0 where the mask is 0.

    Attributes:
        advantages: for the policy loss.
        returns: what a critic would be trained on: before normalisation, with the baseline in where it is the critic's
            or the greedy answer's.
    """

    advantages: np.ndarray
    returns: np.ndarray


ADVANTAGES: Named[Callable[[AdvantageInputs], Advantages]] = Named("advantage")


@ADVANTAGES.register("grpo")
def grpo(inputs: AdvantageInputs) -> Advantages:
    """Group-relative, scaled (Shao et al. 2024); with ``scale: none`` Dr.GRPO's (Liu et al. 2025)."""
    options = inputs.options
    rows = grouped.group_advantages(
        _scores(inputs), _groups(inputs), options.scale, options.std, options.eps, options.singletons,
        options.leave_one_out,
    )  # fmt: skip
    return _over_tokens(rows, inputs)


@ADVANTAGES.register("rloo")
def rloo(inputs: AdvantageInputs) -> Advantages:
    """Leave-one-out baseline (Ahmadian et al. 2024)."""
    return _over_tokens(
        grouped.leave_one_out_advantages(_scores(inputs), _groups(inputs), inputs.options.singletons), inputs
    )


@ADVANTAGES.register("opo")
def opo(inputs: AdvantageInputs) -> Advantages:
    """Length-weighted baseline (Hao et al. 2025)."""
    lengths = (inputs.mask > 0).sum(axis=1)
    rows = grouped.length_weighted_advantages(_scores(inputs), _groups(inputs), lengths, inputs.options.singletons)
    return _over_tokens(rows, inputs)


@ADVANTAGES.register("gpg")
def gpg(inputs: AdvantageInputs) -> Advantages:
    """Unscaled group advantages, times rows / rows with a score other than 0 (Chu et al. 2025, as in verl)."""
    scores = _scores(inputs)
    rows = grouped.group_advantages(scores, _groups(inputs), "none", singletons=inputs.options.singletons)
    return _over_tokens(rows * len(scores) / max(1, np.count_nonzero(np.nan_to_num(scores))), inputs)


@ADVANTAGES.register("grpo_passk")
def grpo_passk(inputs: AdvantageInputs) -> Advantages:
    """Only a group's best answer counts (pass@k training, as in verl)."""
    options = inputs.options
    rows = grouped.best_of_group_advantages(
        _scores(inputs), _groups(inputs), options.std, options.eps, options.scale != "none"
    )
    return _over_tokens(rows, inputs)


@ADVANTAGES.register("gdpo")
def gdpo(inputs: AdvantageInputs) -> Advantages:
    """Several rewards, each normalised (Liu et al. 2026). Token rewards do not enter; put the KL into the loss."""
    rewards = _required(inputs.rewards, "rewards", "gdpo")
    weights = np.ones(rewards.shape[1]) if inputs.reward_weights is None else inputs.reward_weights
    options = inputs.options
    rows = grouped.several_rewards_advantages(
        rewards, _groups(inputs), weights, options.std, options.eps, options.singletons
    )
    return _over_tokens(rows, inputs)


@ADVANTAGES.register("reinforce_plus_plus")
def reinforce_plus_plus(inputs: AdvantageInputs) -> Advantages:
    """Token returns, whitened over the batch's tokens (Hu et al. 2025, REINFORCE++)."""
    returns = _token_returns(np.asarray(inputs.scores, np.float64), inputs)
    return Advantages(_normalized(returns, inputs, "tokens"), returns)


@ADVANTAGES.register("reinforce_plus_plus_baseline")
def reinforce_plus_plus_baseline(inputs: AdvantageInputs) -> Advantages:
    """``r - mean_g``, whitened over the batch's tokens (Hu et al. 2025, REINFORCE++-baseline)."""
    rows = grouped.group_advantages(_scores(inputs), _groups(inputs), "none", singletons=inputs.options.singletons)
    return _over_tokens(rows, inputs, "tokens")


@ADVANTAGES.register("remax")
def remax(inputs: AdvantageInputs) -> Advantages:
    """Token returns minus the score of the greedy answer to the same prompt (Li et al. 2024, ReMax)."""
    baseline = _required(inputs.greedy_scores, "greedy_scores", "remax").astype(np.float64)
    returns = _token_returns(np.asarray(inputs.scores, np.float64), inputs)
    advantages = (returns - np.nan_to_num(baseline)[:, None]) * _mask(inputs)
    return Advantages(_normalized(advantages, inputs, "none"), returns)


@ADVANTAGES.register("gae")
def gae_estimator(inputs: AdvantageInputs) -> Advantages:
    """Generalised advantage estimation (Schulman et al. 2016); see :func:`~alignment.losses.advantages.gae`."""
    values = _required(inputs.values, "values", "gae")
    rewards = _with_score(np.nan_to_num(np.asarray(inputs.scores, np.float64)), inputs)
    advantages, returns = gae(
        rewards, values.astype(np.float64), _mask(inputs), inputs.options.gamma, inputs.options.lam
    )
    return Advantages(_normalized(advantages, inputs, "none"), returns)


def _mask(inputs: AdvantageInputs) -> np.ndarray:
    """The mask of the rows to which the score applies."""
    return (inputs.mask > 0).astype(np.float64) * ~np.isnan(inputs.scores)[:, None]


def _scores(inputs: AdvantageInputs) -> np.ndarray:
    scores = np.asarray(inputs.scores, np.float64)
    if inputs.token_rewards is None or inputs.options.token_rewards == "tokens":
        return scores
    return scores + (inputs.token_rewards * (inputs.mask > 0)).sum(axis=1, dtype=np.float64)


def _groups(inputs: AdvantageInputs) -> np.ndarray:
    return _required(inputs.groups, "groups", "an estimator of groups")


def _required(value: np.ndarray | None, name: str, who: str) -> np.ndarray:
    if value is None:
        raise ArgumentsError(f"{who} needs {name}, which this method does not give")
    return np.asarray(value)


def _with_score(rows: np.ndarray, inputs: AdvantageInputs) -> np.ndarray:
    """``[B, R]``: what tokens earn, and ``rows`` at each row's last token."""
    mask = _mask(inputs)
    rewards = np.zeros_like(mask) if inputs.token_rewards is None else inputs.token_rewards * mask
    places, columns = last_tokens(mask)
    rewards[places, columns] += rows[places]
    return rewards


def _token_returns(rows: np.ndarray, inputs: AdvantageInputs) -> np.ndarray:
    return discounted_returns(_with_score(rows, inputs), _mask(inputs), inputs.options.gamma)


def _over_tokens(rows: np.ndarray, inputs: AdvantageInputs, own: str = "none") -> Advantages:
    """From one advantage a row to one a token."""
    if inputs.options.token_rewards == "tokens":
        returns = _token_returns(rows, inputs)
    else:
        returns = rows[:, None] * _mask(inputs)
    return Advantages(_normalized(returns, inputs, own), returns)


def _normalized(advantages: np.ndarray, inputs: AdvantageInputs, own: str) -> np.ndarray:
    options = inputs.options
    how = own if options.normalize is None else options.normalize
    mask = _mask(inputs)
    if how == "tokens":
        return whiten(advantages, mask, options.whiten_eps, options.whiten_std)
    if how == "sequences":
        filled = mask.any(axis=1)
        means = advantages.sum(axis=1) / np.maximum(mask.sum(axis=1), 1.0)
        spread = grouped.deviation_of(np.where(filled, means, np.nan), options.std)
        centre = means[filled].mean() if filled.any() else 0.0
        return (advantages - centre) * mask / (spread + options.eps)
    return advantages
