"""Policy and value losses on Paddle tensors.

Each returns a loss that is already divided by ``denominator``, the count of the WHOLE optimizer step (all micro
batches, all data ranks), so that summing the micro batches' losses gives the step's loss, whatever its split. Without a
denominator the count of the given batch is used. Statistics are sums over the mask, for the same reason.

:data:`POLICY_LOSSES` has every policy loss by name: a function from one :class:`PolicyInputs` to one
:class:`PolicyLoss`. With ``rho = exp(logprobs - old_logprobs)`` of a token and A its advantage:

============== =====================================================================================================
ppo            ``max(-A rho, -A clip(rho))``
gspo           the same with the sequence's geometric mean ratio, ``exp(mean_t log rho)``
luspo          GSPO's, to be aggregated as ``sequence_sum``, which takes its length bias away
rloo           the same with the sequence's product ratio, ``exp(sum_t log rho)``
gmpo           ``-A exp(mean_t clip(log rho))``, the clip one-sided by the sign of A
cispo          ``-A sg(clip(rho, low, high)) logprob``
sapo           ``-A (4 / tau) sigmoid(tau (rho - 1))``
vespo          ``-A sg(exp(l + k log w - l w)) logprob``, w the sequence's product ratio
reinforce      ``-A logprob`` (also named a2c and gpg)
apo            ``(beta sum_t (logprob - ref_logprob) - target)^2``, A*-PO's regression
============== =====================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from alignment.named import Named
from alignment.runtime import lazy

if TYPE_CHECKING:
    from paddle import Tensor

paddle = lazy("paddle")

LOSS_MEANS = ("token", "sequence")

# Log-ratios are cut to +-20, as in verl: exp() of more than 88 is infinite in float32, and then the gradient of the
# clipped loss is 0 * inf. A ratio of e^20 is far beyond every clip, so nothing else changes.
LARGEST_LOG_RATIO = 20.0


@dataclass(frozen=True)
class PolicyOptions:
    """The settings of the policy losses; each loss reads those that its formula has.

    Attributes:
        clip_range_low: epsilon below 1 (ppo, gspo, luspo, rloo); below 0 of the log-ratio (gmpo).
        clip_range_high: epsilon above 1; ``None`` for the same.
        dual_clip: c > 1 bounds the loss of negative advantages by ``-c A`` (ppo); ``None`` for off.
        ratio_cap: the ratio of the unclipped term is cut to it (ppo; INTELLECT-2, TRL's ``delta``); ``None`` for off.
        cispo_low: smallest weight, a ratio and not a distance from 1.
        cispo_high: largest weight, likewise.
        sapo_temperatures: tau for advantages above 0, and for the others.
        vespo_positive: ``(k, l)`` for advantages of at least 0.
        vespo_negative: ``(k, l)`` for the others.
        apo_beta: beta of A*-PO.
        off_policy_threshold: an answer with a negative advantage whose mean ``old_logprobs - logprobs`` is above it
            has no loss (DeepSeek-V3.2; TRL's ``off_policy_mask_threshold``); ``None`` for off.
    """

    clip_range_low: float = 0.2
    clip_range_high: float | None = None
    dual_clip: float | None = None
    ratio_cap: float | None = None
    cispo_low: float = 0.0
    cispo_high: float = 5.0
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)
    vespo_positive: tuple[float, float] = (2.0, 3.0)
    vespo_negative: tuple[float, float] = (3.0, 2.0)
    apo_beta: float = 1e-3
    off_policy_threshold: float | None = None

    @property
    def high(self) -> float:
        """The epsilon above 1."""
        return self.clip_range_low if self.clip_range_high is None else self.clip_range_high


@dataclass(frozen=True)
class PolicyInputs:
    """What a policy loss is computed from.

    Attributes:
        logprobs: ``[B, R]`` of the network in training, differentiable.
        old_logprobs: ``[B, R]`` of the same network before the update.
        advantages: ``[B, R]``; losses of whole sequences take the mean over the mask.
        mask: ``[B, R]``, 1 for the tokens that the policy chose.
        mean: see :func:`aggregate`; not read with ``row_weights``.
        denominator: see :func:`aggregate`.
        row_weights: ``[B]`` of :func:`~alignment.losses.aggregation.row_weights`, with its ``denominator``; ``None``
            for ``mean``.
        token_weights: ``[B, R]`` without gradient, multiplies each token's loss (see
            :mod:`~alignment.losses.correction`); ``None`` for 1.
        ref_logprobs: ``[B, R]`` of the reference; ``"apo"`` only.
        targets: ``[B]``, reward minus V*; ``"apo"`` only.
        options: the settings.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    mean: str = "token"
    denominator: float | None = None
    row_weights: Tensor | None = None
    token_weights: Tensor | None = None
    ref_logprobs: Tensor | None = None
    targets: Tensor | None = None
    options: PolicyOptions = field(default_factory=PolicyOptions)


@dataclass(frozen=True)
class PolicyLoss:
    """What a policy loss returns: scalars; all but ``loss`` are sums over the mask without gradient.

    Attributes:
        loss: to be minimised, divided by the denominator.
        clip_fraction: tokens whose clipped term was the larger one.
        approx_kl: ``0.5 (log ratio)^2``, the second-order estimate of KL(old || new).
        ratio: importance ratios.
        max_ratio_error: the largest ``|ratio - 1|`` (a maximum, not a sum).
        max_ratio: the largest ratio (a maximum, not a sum).
    """

    loss: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor
    ratio: Tensor
    max_ratio_error: Tensor
    max_ratio: Tensor


def aggregate(losses: Tensor, mask: Tensor, mean: str = "token", denominator: float | None = None) -> Tensor:
    """Reduce per-token losses to one scalar.

    Args:
        losses: ``[B, R]``.
        mask: ``[B, R]``.
        mean: ``"token"``, the sum over tokens by the count of tokens (TRL, trlX, DeepSpeed-Chat, verl's default), or
            ``"sequence"``, each answer's own mean first, then the mean over answers (safe-rlhf, OpenRLHF's sample
            mode).
        denominator: tokens (or answers, for ``"sequence"``) of the whole optimizer step; ``None`` counts this batch.
            For ``"sequence"`` only answers with at least one token count.

    Returns:
        A scalar.

    Raises:
        ValueError: ``mean`` is unknown.
    """
    mask = mask.astype(losses.dtype)
    if mean == "token":
        total = (losses * mask).sum()
        count = mask.sum() if denominator is None else denominator
    elif mean == "sequence":
        lengths = mask.sum(axis=-1)
        total = ((losses * mask).sum(axis=-1) / lengths.clip(min=1.0)).sum()
        count = (lengths > 0).astype(losses.dtype).sum() if denominator is None else denominator
    else:
        raise ValueError(f"unknown loss mean {mean!r}; known: {', '.join(LOSS_MEANS)}")
    return total / count


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range_low: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    mean: str = "token",
    denominator: float | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate: ``max(-A rho, -A clip(rho, 1 - low, 1 + high))`` with
    ``rho = exp(logprobs - old_logprobs)``.

    Source: Schulman et al. 2017, eq. 7. A different upper range is DAPO's clip-higher (Yu et al. 2025). ``dual_clip``
    (c > 1) bounds the loss of negative advantages by ``-c A`` (Ye et al. 2020, eq. 5).

    Args:
        logprobs: ``[B, R]`` of the network in training, differentiable.
        old_logprobs: ``[B, R]`` of the same network before the update.
        advantages: ``[B, R]``.
        mask: ``[B, R]``.
        clip_range_low: epsilon below 1.
        clip_range_high: epsilon above 1; ``None`` for the same.
        dual_clip: c, or ``None`` for off.
        mean: see :func:`aggregate`.
        denominator: see :func:`aggregate`.

    Returns:
        A :class:`PolicyLoss`.
    """
    options = PolicyOptions(clip_range_low, clip_range_high, dual_clip)
    return clipped_surrogate(PolicyInputs(logprobs, old_logprobs, advantages, mask, mean, denominator, options=options))


POLICY_LOSSES: Named[Callable[[PolicyInputs], PolicyLoss]] = Named("policy_loss")

# What each loss's own paper sets; a method's presets take it from here. ``aggregation`` is a name of
# :data:`~alignment.losses.aggregation.AGGREGATIONS`, the rest are fields of :class:`PolicyOptions`.
LOSS_DEFAULTS: dict[str, dict[str, Any]] = {
    "ppo": {"aggregation": "token", "clip_range_low": 0.2, "clip_range_high": 0.2},
    "gspo": {"aggregation": "sequence", "clip_range_low": 3e-4, "clip_range_high": 4e-4},
    "luspo": {"aggregation": "sequence_sum", "clip_range_low": 3e-4, "clip_range_high": 4e-4},
    "rloo": {"aggregation": "sequence", "clip_range_low": 0.2, "clip_range_high": 0.2},
    "gmpo": {"aggregation": "sequence", "clip_range_low": 0.4, "clip_range_high": 0.4},
    "cispo": {"aggregation": "token", "cispo_low": 0.0, "cispo_high": 5.0},
    "sapo": {"aggregation": "sequence", "sapo_temperatures": (1.0, 1.05)},
    "vespo": {"aggregation": "token", "vespo_positive": (2.0, 3.0), "vespo_negative": (3.0, 2.0)},
    "reinforce": {"aggregation": "token"},
    "a2c": {"aggregation": "token"},
    "gpg": {"aggregation": "token"},
    "apo": {"aggregation": "sequence", "apo_beta": 1e-3},
}


def loss_defaults(name: str) -> dict[str, Any]:
    """:data:`LOSS_DEFAULTS` of a policy loss; ``aggregation: token`` alone for one that a user registered.

    Raises:
        ArgumentsError: there is no policy loss of this name.
    """
    _ = POLICY_LOSSES[name]  # an unknown name is told
    return dict(LOSS_DEFAULTS.get(name, {"aggregation": "token"}))


@POLICY_LOSSES.register("ppo")
def clipped_surrogate(inputs: PolicyInputs) -> PolicyLoss:
    """``max(-A rho, -A clip(rho, 1 - low, 1 + high))``, with dual clip and cap; see :func:`policy_loss`."""
    options, advantages = inputs.options, inputs.advantages
    log_ratio = _log_ratio(inputs)
    losses, clipped = _clipped(log_ratio.exp(), advantages, options)
    if options.dual_clip is not None:
        bounded = paddle.minimum(losses, -advantages * options.dual_clip)
        losses = paddle.where(advantages < 0, bounded, losses)
    return _policy_loss(inputs, losses, log_ratio, clipped)


@POLICY_LOSSES.register("gspo")
def sequence_surrogate(inputs: PolicyInputs) -> PolicyLoss:
    """PPO's clip with one ratio for the whole answer, ``exp(mean_t log rho)``; the gradient goes through all tokens.

    Source: Zheng et al. 2025 (GSPO), eq. 5-7; clip 3e-4 and 4e-4, mean over answers.
    """
    log_ratio = _log_ratio(inputs)
    losses, clipped = _clipped(_row_mean(log_ratio, inputs).exp(), inputs.advantages, inputs.options)
    return _policy_loss(inputs, losses, log_ratio, clipped)


@POLICY_LOSSES.register("luspo")
def length_unbiased_surrogate(inputs: PolicyInputs) -> PolicyLoss:
    """GSPO's loss of each answer times its length: :func:`sequence_surrogate`, aggregated as ``sequence_sum``.

    Source: TRL 1 ``luspo`` (LUSPO, 2026).
    """
    return sequence_surrogate(inputs)


@POLICY_LOSSES.register("rloo")
def product_surrogate(inputs: PolicyInputs) -> PolicyLoss:
    """PPO's clip with the answer's own probability ratio, ``exp(sum_t log rho)``.

    Source: Ahmadian et al. 2024 (RLOO) as in TRL's ``RLOOTrainer``; mean over answers.
    """
    log_ratio = _log_ratio(inputs)
    whole = log_ratio.sum(axis=-1, keepdim=True).clip(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    losses, clipped = _clipped(whole.exp(), _row_mean(inputs.advantages, inputs), inputs.options)
    return _policy_loss(inputs, losses, log_ratio, clipped)


@POLICY_LOSSES.register("gmpo")
def geometric_surrogate(inputs: PolicyInputs) -> PolicyLoss:
    """``-A exp(mean_t c_t)`` with ``c_t = log rho`` cut above at ``high`` for A > 0 and below at ``-low`` for A < 0.

    Source: Zhao et al. 2025 (GMPO), eq. 5; clip 0.4 on the log-ratio, mean over answers.
    """
    options, advantages = inputs.options, inputs.advantages
    log_ratio = _log_ratio(inputs)
    cut = paddle.where(advantages > 0, log_ratio.clip(max=options.high), log_ratio.clip(min=-options.clip_range_low))
    losses = -_row_mean(advantages, inputs) * _row_mean(cut, inputs).exp()
    return _policy_loss(inputs, losses, log_ratio, cut != log_ratio)


@POLICY_LOSSES.register("cispo")
def clipped_weights(inputs: PolicyInputs) -> PolicyLoss:
    """``-A sg(clip(rho, cispo_low, cispo_high)) logprob``: no token loses its gradient.

    Source: MiniMax-M1 2025 (CISPO), eq. 4-5. The bounds are ratios; peers state them differently (docs/compat.md).
    """
    log_ratio = _log_ratio(inputs)
    ratio = log_ratio.detach().exp()
    weight = ratio.clip(inputs.options.cispo_low, inputs.options.cispo_high)
    return _policy_loss(inputs, -inputs.advantages * weight * _inside(inputs), log_ratio, weight != ratio)


@POLICY_LOSSES.register("sapo")
def soft_gate(inputs: PolicyInputs) -> PolicyLoss:
    """``-A (4 / tau) sigmoid(tau (rho - 1))``: a soft gate in place of the clip; its slope is A at rho 1.

    Source: Gao et al. 2025 (SAPO); tau 1.0 for A > 0, 1.05 otherwise (TRL, verl).
    """
    above, below = inputs.options.sapo_temperatures
    log_ratio = _log_ratio(inputs)
    tau = paddle.where(inputs.advantages > 0, paddle.full_like(log_ratio, above), paddle.full_like(log_ratio, below))
    gate = paddle.nn.functional.sigmoid(tau * (log_ratio.exp() - 1.0)) * 4.0 / tau
    return _policy_loss(inputs, -inputs.advantages * gate, log_ratio)


@POLICY_LOSSES.register("vespo")
def kernel_weights(inputs: PolicyInputs) -> PolicyLoss:
    """``-A sg(phi) logprob`` with ``phi = exp(l + k log w - l w)``, ``w = exp(sum_t log rho)``.

    phi is 1 at w = 1 and falls on both sides. Source: TRL 1 ``vespo`` (VESPO, 2026); k, l by the sign of A.
    """
    options, advantages = inputs.options, inputs.advantages
    log_ratio = _log_ratio(inputs)
    log_weight = log_ratio.detach().sum(axis=-1, keepdim=True).clip(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)

    def kernel(power: float, decay: float) -> Tensor:
        return (decay + power * log_weight - decay * log_weight.exp()).exp().expand_as(log_ratio)

    phi = paddle.where(advantages >= 0, kernel(*options.vespo_positive), kernel(*options.vespo_negative))
    return _policy_loss(inputs, -advantages * phi * _inside(inputs), log_ratio)


@POLICY_LOSSES.register("reinforce", "a2c", "gpg")
def policy_gradient(inputs: PolicyInputs) -> PolicyLoss:
    """``-A logprob``, no ratio and no clip: one pass over each rollout only.

    Source: Williams 1992; A2C (Mnih et al. 2016) and GPG (Chu et al. 2025) differ in their advantages.
    """
    return _policy_loss(inputs, -inputs.advantages * _inside(inputs), _log_ratio(inputs))


@POLICY_LOSSES.register("apo")
def reward_regression(inputs: PolicyInputs) -> PolicyLoss:
    """``(beta sum_t (logprob - ref_logprob) - target)^2`` per answer, target = reward - V*.

    Source: Brantley et al. 2025 (A*-PO), eq. 5; Compose-RL's ``apo``. Not TRL's "anchored preference optimization".

    Raises:
        ValueError: ``ref_logprobs`` or ``targets`` is missing.
    """
    if inputs.ref_logprobs is None or inputs.targets is None:
        raise ValueError('the policy loss "apo" needs ref_logprobs and targets (reward - V*)')
    mask = inputs.mask.astype(inputs.logprobs.dtype)
    moved = ((inputs.logprobs - inputs.ref_logprobs) * mask).sum(axis=-1)
    losses = (inputs.options.apo_beta * moved - inputs.targets).square().unsqueeze(-1)
    return _policy_loss(inputs, losses, _log_ratio(inputs))


def entropy_loss(entropy: Tensor, inputs: PolicyInputs) -> Tensor:
    """``-H``, aggregated as the policy loss is; to be added with a coefficient of at least 0.

    Args:
        entropy: ``[B, R]``, differentiable. Where it is not known, ``-logprobs`` is its one-sample estimate.
        inputs: the policy loss's.

    Returns:
        A scalar.
    """
    return _reduce(-entropy, inputs)


def kl_loss(terms: Tensor, inputs: PolicyInputs) -> Tensor:
    """Per-token KL terms of :func:`~alignment.losses.kl.kl_terms` ``[B, R]``, aggregated as the policy loss is; to be
    added with the KL coefficient. A scalar.
    """
    return _reduce(terms, inputs)


def _inside(inputs: PolicyInputs) -> Tensor:
    """The log-probs, 0 outside the mask (padding may have given anything)."""
    return inputs.logprobs * inputs.mask.astype(inputs.logprobs.dtype)


def _log_ratio(inputs: PolicyInputs) -> Tensor:
    # Outside the mask the log-probs are whatever padding gave: 0 there keeps exp() finite and its gradient 0.
    mask = inputs.mask.astype(inputs.logprobs.dtype)
    return ((inputs.logprobs - inputs.old_logprobs) * mask).clip(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


def _row_mean(values: Tensor, inputs: PolicyInputs) -> Tensor:
    """``[B, 1]`` mean over the mask."""
    mask = inputs.mask.astype(inputs.logprobs.dtype)
    return (values * mask).sum(axis=-1, keepdim=True) / mask.sum(axis=-1, keepdim=True).clip(min=1.0)


def _clipped(ratio: Tensor, advantages: Tensor, options: PolicyOptions) -> tuple[Tensor, Tensor]:
    """PPO's clip: the losses, and where the clipped term was the larger one."""
    free = ratio if options.ratio_cap is None else ratio.clip(max=options.ratio_cap)
    unclipped = -advantages * free
    clipped = -advantages * ratio.clip(1.0 - options.clip_range_low, 1.0 + options.high)
    return paddle.maximum(unclipped, clipped), clipped > unclipped


def _reduce(losses: Tensor, inputs: PolicyInputs) -> Tensor:
    if inputs.row_weights is None:
        return aggregate(losses, inputs.mask, inputs.mean, inputs.denominator)
    mask = inputs.mask.astype(losses.dtype)
    total = (losses * mask * inputs.row_weights.astype(losses.dtype).unsqueeze(-1)).sum()
    return total / (1.0 if inputs.denominator is None else inputs.denominator)


def _policy_loss(inputs: PolicyInputs, losses: Tensor, log_ratio: Tensor, clipped: Tensor | None = None) -> PolicyLoss:
    """Weigh, aggregate, and take the figures.

    Args:
        inputs: the loss's.
        losses: ``[B, R]``, or ``[B, 1]`` where one value holds for a whole answer.
        log_ratio: ``[B, R]`` of :func:`_log_ratio`.
        clipped: bool, of the shape of ``losses``; ``None`` where the loss has no clip.
    """
    mask = inputs.mask.astype(log_ratio.dtype)
    if inputs.options.off_policy_threshold is not None:
        with paddle.no_grad():
            stale = _row_mean(-log_ratio, inputs) > inputs.options.off_policy_threshold
            bad = paddle.logical_and(stale, _row_mean(inputs.advantages, inputs) < 0)
        losses = losses * (1.0 - bad.astype(losses.dtype))
    if inputs.token_weights is not None:
        losses = losses * inputs.token_weights.astype(losses.dtype)
    loss = _reduce(losses, inputs)
    with paddle.no_grad():
        ratio = log_ratio.exp()
        return PolicyLoss(
            loss=loss,
            clip_fraction=paddle.zeros([], mask.dtype)
            if clipped is None
            else (clipped.astype(mask.dtype) * mask).sum(),
            approx_kl=(0.5 * log_ratio.square()).sum(),
            ratio=(ratio * mask).sum(),
            max_ratio_error=((ratio - 1.0).abs() * mask).max(),
            max_ratio=(ratio * mask).max(),
        )


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip_range_value: float | None = None,
    mean: str = "token",
    denominator: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)``.

    Source: the PPO2 baseline's clipped value loss; field's checklist as in Huang et al. 2024.

    Args:
        values: ``[B, R]``, differentiable.
        old_values: ``[B, R]`` from before the update.
        returns: ``[B, R]``.
        mask: ``[B, R]``.
        clip_range_value: c; ``None`` for no clipping.
        mean: see :func:`aggregate`.
        denominator: see :func:`aggregate`.

    Returns:
        ``(loss, clip_count)``: a scalar to be minimised, and how many tokens' clipped term was the larger one.
    """
    mask = mask.astype(values.dtype)
    losses = (values - returns).square()
    clip_count = paddle.zeros([], dtype=values.dtype)
    if clip_range_value is not None:
        clipped = paddle.minimum(paddle.maximum(values, old_values - clip_range_value), old_values + clip_range_value)
        clipped_losses = (clipped - returns).square()
        with paddle.no_grad():
            clip_count = ((clipped_losses > losses).astype(mask.dtype) * mask).sum()
        losses = paddle.maximum(losses, clipped_losses)
    return aggregate(0.5 * losses, mask, mean, denominator), clip_count
