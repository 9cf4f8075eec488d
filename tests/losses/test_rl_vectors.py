"""Conformance with what the peers' own functions return (shared/vectors/preference_and_rl.json), entry by entry.

Every entry of the kinds that this file is about is either checked by a function here or named in ``NOT_OFFERED``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from alignment.losses.advantages import RunningMoments, gae, whiten
from alignment.losses.aggregation import row_weights
from alignment.losses.compat import compat_settings
from alignment.losses.estimators import ADVANTAGES, AdvantageInputs, AdvantageOptions
from alignment.losses.kl import KL_CONTROLLERS, kl_estimate, kl_terms, shape_rewards
from alignment.losses.logprobs import score_labels
from alignment.losses.policy import POLICY_LOSSES, PolicyInputs, PolicyOptions, entropy_loss, kl_loss, value_loss
from alignment.losses.selection import select_answers, selection_percentile
from alignment.losses.shaping import overlong_penalty
from alignment.losses.vocabulary_mask import masked_softmax, vocabulary_mask

PREFIXES = ("adv", "loss", "kl", "klctl", "a2c", "nlpo", "rft", "ppo", "reward")

NOT_OFFERED = {
    "nlpo/rl4lms/loss value clip": (
        "the squared error of the clipped value alone: outside the range the critic gets no gradient; ours takes the "
        "maximum of both (PPO2). The policy's part is that of nlpo/rl4lms/loss"
    ),
    "nlpo/rl4lms/masked distribution": (
        "a defect: the log-prob of a kept token is that of the policy WITHOUT the mask, so ratios miss how much mass "
        "is kept, and a dropped token has log(eps) of the float type; ours is nlpo/paper/masked distribution"
    ),
}

# Figures beside a loss that are not what ours of a like name count.
NOT_COMPARED = {
    "actor/pg_clipfrac_lower": "verl splits what we count as one by the side or by the kind of clip",
    "actor/pg_clipfrac": "compared, but for SAPO (no clip) and GMPO, where verl counts clips that do not bind",
    "policy_loss/clip_frac": "Compose counts ratios below the range only, whether the clip binds or not",
    "ppo_kl": "OpenRLHF's k1 of old and new policy; compared with verl, ours is k2",
    "kl/policy_kl": "Compose's figure in the estimator of its KL loss, of old and new policy",
    "kl/online_ift_kl": "compared where the loss has it",
    "logged loss/policy_loss": "the total under another name",
    "keep_seq2seq": "RL4LMs' seq2seq class keeps one token more than asked: an off-by-one",
    "logprobs": "a cut of the input",
    "values": "a cut of the input",
    "lengths": "used as an input: the peer's rows are longer than the answers",
    "output_tokens": "a count of the input",
}

CHECKS: dict[str, Callable[[Case], None]] = {}


class Case:
    """One entry: its inputs as arrays, and a comparison at its own tolerance."""

    def __init__(self, document: dict, entry: dict) -> None:
        self.document, self.entry, self.options = document, entry, entry["options"]
        self.seen: set[str] = set()

    def raw(self, path: str) -> Any:
        section, name = path.split(".")
        return self.document["inputs"][section][name]

    def array(self, path: str) -> np.ndarray:
        return np.asarray(self.raw(path), np.float64)

    def expected(self, key: str) -> np.ndarray:
        self.seen.add(key)
        return np.asarray(_floats(self.entry["expected"][key]), np.float64)

    def equal(self, key: str, got: Any) -> None:
        tolerance = dict(self.entry["tolerance"])
        if "clip" in key:  # fractions which some peers compute in float32
            tolerance["atol"] = max(tolerance["atol"], 1e-5)
        wanted = self.expected(key)
        assert np.shape(got) == wanted.shape, key
        np.testing.assert_allclose(np.asarray(got, np.float64), wanted, **tolerance, err_msg=key)


def _floats(value: Any) -> Any:
    return [_floats(part) for part in value] if isinstance(value, list) else float(value)


def check(*names: str) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    def remember(function: Callable[[Case], None]) -> Callable[[Case], None]:
        for name in names:
            assert name not in CHECKS, name
            CHECKS[name] = function
        return function

    return remember


# ----------------------------------------------------------------------------------------------------------- advantages

GROUPS = np.array([0, 0, 0, 1, 1, 1])


def groups_of(case: Case) -> np.ndarray:
    given = case.entry["inputs"].get("group", "")
    if not given.startswith("@"):
        return GROUPS
    return np.unique(case.raw(given[1:]), return_inverse=True)[1]


def estimate(case: Case, name: str, options: AdvantageOptions | None = None, **more: Any) -> Any:
    inputs = AdvantageInputs(
        **{"scores": case.array("rl.scores"), "mask": case.array("rl.mask"), "groups": groups_of(case), **more},
        options=options or AdvantageOptions(),
    )
    return ADVANTAGES[name](inputs)


def settings(peer: str, method: str, **more: Any) -> AdvantageOptions:
    """The options that ``compat`` sets for a peer."""
    fields = AdvantageOptions.__dataclass_fields__
    chosen = {key: value for key, value in compat_settings(peer, method).items() if key in fields}
    return AdvantageOptions(**{**chosen, **more})


@check(
    "adv/trl1.x/grpo scale group",
    "adv/trl1.x/grpo scale batch",
    "adv/trl1.x/grpo scale none (Dr.GRPO)",
    "adv/trl1.x/grpo tied group",
)
def trl_grpo(case: Case) -> None:
    scores = case.array(case.entry["inputs"]["scores"][1:])
    got = estimate(case, "grpo", settings("trl", "grpo", scale=case.options["scale_rewards"]), scores=scores)
    case.equal("advantages", got.advantages[:, 0])


@check("adv/trl1.x/grpo two rewards sum_then_normalize")
def trl_weighted_sum(case: Case) -> None:
    scores = case.array("rl.two_rewards") @ np.asarray(case.options["reward_weights"])
    case.equal("advantages", estimate(case, "grpo", settings("trl", "grpo"), scores=scores).advantages[:, 0])


@check("adv/trl1.x/grpo two rewards normalize_then_sum (GDPO)")
def trl_gdpo(case: Case) -> None:
    weights = np.asarray(case.options["reward_weights"])
    got = estimate(case, "gdpo", settings("trl", "grpo"), rewards=case.array("rl.two_rewards"), reward_weights=weights)
    case.equal("advantages", got.advantages[:, 0])


@check("adv/trl1.x/rloo", "adv/trl1.x/rloo normalized")
def trl_rloo(case: Case) -> None:
    normalize = "sequences" if case.options["normalize_advantages"] else "none"
    case.equal("advantages", estimate(case, "rloo", settings("trl", "rloo", normalize=normalize)).advantages[:, 0])


@check("adv/verl/grpo", "adv/verl/grpo ragged groups", "adv/verl/dr_grpo", "adv/verl/dr_grpo ragged groups")
def verl_grpo(case: Case) -> None:
    scale = "group" if case.options.get("norm_adv_by_std_in_grpo", True) else "none"
    case.equal("advantages", estimate(case, "grpo", settings("verl", "grpo", scale=scale)).advantages)


@check(
    "adv/verl/rloo",
    "adv/verl/rloo ragged groups",
    "adv/verl/reinforce++_baseline",
    "adv/verl/reinforce++_baseline ragged groups",
    "adv/verl/opo",
    "adv/verl/opo ragged groups",
    "adv/verl/gpg",
    "adv/verl/grpo_passk",
    "adv/verl/rloo_vectorized ragged groups",
)
def verl_groups(case: Case) -> None:
    peers = case.entry["name"].split("/")[2].split(" ")[0]
    name = {"reinforce++_baseline": "reinforce_plus_plus_baseline", "rloo_vectorized": "rloo"}.get(peers, peers)
    singletons = "zero" if peers == "rloo_vectorized" else "raw"
    case.equal("advantages", estimate(case, name, settings("verl", "grpo", singletons=singletons)).advantages)


@check("adv/verl/reinforce++ gamma 1.0", "adv/verl/reinforce++ gamma 0.9", "adv/verl/reinforce++ with KL in the reward")
def verl_reinforce(case: Case) -> None:
    token_rewards = None
    if "kl_ratio" in case.options:
        kl = kl_estimate(case.array("rl.old_logprobs"), case.array("rl.ref_logprobs"), "k1")
        token_rewards = -case.options["kl_ratio"] * kl
        lengths = case.array("rl.mask").sum(axis=1).astype(int)
        case.equal("token_rewards", shape_rewards(case.array("rl.scores"), kl, lengths, case.options["kl_ratio"]))
    options = settings("verl", "reinforce", gamma=case.options["gamma"])
    got = estimate(case, "reinforce_plus_plus", options, token_rewards=token_rewards)
    case.equal("advantages", got.advantages)
    case.equal("returns", got.returns)


@check("adv/verl/remax")
def verl_remax(case: Case) -> None:
    got = estimate(case, "remax", greedy_scores=case.array("rl.seq_advantages"))
    case.equal("advantages", got.advantages)
    case.equal("returns", got.returns)


@check("adv/verl/gae")
def verl_gae(case: Case) -> None:
    options = AdvantageOptions(gamma=case.options["gamma"], lam=case.options["lam"], normalize="tokens")
    got = estimate(case, "gae", options, values=case.array("rl.values"))
    case.equal("advantages", got.advantages)
    case.equal("returns", got.returns)


@check(
    "adv/openrlhf/reinforce (REINFORCE++)",
    "adv/openrlhf/reinforce gamma .9 clipped",
    "adv/openrlhf/rloo",
    "adv/openrlhf/reinforce_baseline",
    "adv/openrlhf/group_norm (GRPO)",
    "adv/openrlhf/dr_grpo",
    "adv/openrlhf/gae",
)
def openrlhf(case: Case) -> None:
    estimator, given = case.options["estimator"], case.options
    name, method, more = {
        "reinforce": ("reinforce_plus_plus", "reinforce", {}),
        "rloo": ("rloo", "rloo", {}),
        "reinforce_baseline": ("reinforce_plus_plus_baseline", "reinforce", {}),
        "group_norm": ("grpo", "grpo", {}),
        "dr_grpo": ("grpo", "grpo", {"scale": "none"}),
        "gae": ("gae", "ppo", {"normalize": "tokens"}),
    }[estimator]
    kl = kl_estimate(case.array("rl.old_logprobs"), case.array("rl.ref_logprobs"), "k1")
    scores = case.array("rl.scores")
    if given["reward_clip_range"] is not None:
        scores = scores.clip(*given["reward_clip_range"])
    got = estimate(
        case,
        name,
        settings("openrlhf", method, gamma=given["gamma"], lam=given["lambd"], **more),
        scores=scores,
        token_rewards=-given["init_kl_coef"] * kl,
        values=case.array("rl.values"),
    )
    case.equal("advantages", got.advantages)
    case.equal("returns", got.returns)


@check("adv/compose/ppo gae")
def compose_gae(case: Case) -> None:
    everywhere = np.ones_like(case.array("rl.mask"))  # the peer has no mask
    got, _ = gae(
        case.array("rl.token_scores"), case.array("rl.values"), everywhere, case.options["gamma"],
        case.options["lambda_gae"],
    )  # fmt: skip
    case.equal("advantages", got)


@check("adv/compose/masked_normalize")
def compose_normalize(case: Case) -> None:
    values, mask = case.array("rl.token_advantages"), case.array("rl.mask")
    inside = values[mask > 0]
    case.equal("mean", inside.mean())
    case.equal("var", inside.var(ddof=1))
    case.equal("normalized", whiten(values, mask))


@check("adv/compose/grpo", "adv/compose/grpo not normalized", "adv/compose/grpo ragged groups")
def compose_grpo(case: Case) -> None:
    scale = "group" if case.options["normalize_advantage"] else "none"
    case.equal("advantages", estimate(case, "grpo", settings("compose", "grpo", scale=scale)).advantages)


# --------------------------------------------------------------------------------------------------------------- losses


class Loss:
    """A policy loss of one entry: one leaf for the gradient, sums over the rows of the batch."""

    def __init__(
        self, case: Case, aggregation: str, length_constant: float | None = None, mask: np.ndarray | None = None
    ) -> None:
        self.case, self.mask = case, case.array("rl.mask") if mask is None else mask
        self.new = paddle.to_tensor(case.array("rl.new_logprobs"), stop_gradient=False)
        rows = row_weights(aggregation, self.mask.sum(axis=1), GROUPS, length_constant)
        self.rows, self.denominator = paddle.to_tensor(rows.weights), rows.denominator

    def inputs(self, advantages: np.ndarray | None = None, **more: Any) -> PolicyInputs:
        if advantages is None:
            advantages = self.case.array("rl.seq_advantages")
        if advantages.ndim == 1:
            advantages = advantages[:, None] * np.ones_like(self.mask)
        return PolicyInputs(
            self.new,
            paddle.to_tensor(self.case.array("rl.old_logprobs")),
            paddle.to_tensor(advantages),
            paddle.to_tensor(self.mask),
            denominator=self.denominator,
            row_weights=self.rows,
            options=PolicyOptions(**more),
        )

    def gradient(self, total: paddle.Tensor) -> np.ndarray:
        total.backward()
        assert self.new.grad is not None
        return self.new.grad.numpy()

    def check(self, key: str, total: paddle.Tensor) -> None:
        self.case.equal(key, total.item())
        self.case.equal("grad_logprobs", self.gradient(total))


TRL_AGGREGATION = {
    "grpo": "sequence",
    "bnpo": "token",
    "dr_grpo": "constant",
    "dapo": "token",
    "luspo": "sequence_sum",
    "cispo": "token",
    "sapo": "sequence",
    "vespo": "token",
}


@check(
    "loss/trl1.x/grpo",
    "loss/trl1.x/grpo + k3 KL",
    "loss/trl1.x/grpo + bias-corrected KL",
    "loss/trl1.x/bnpo",
    "loss/trl1.x/dr_grpo",
    "loss/trl1.x/dapo clip-higher",
    "loss/trl1.x/grpo two-sided (delta)",
    "loss/trl1.x/gspo",
    "loss/trl1.x/luspo",
    "loss/trl1.x/cispo",
    "loss/trl1.x/sapo",
    "loss/trl1.x/vespo",
    "loss/trl1.x/grpo off-policy mask",
)
def trl_loss(case: Case) -> None:
    given = case.options
    kind = given["loss_type"]
    loss = Loss(case, TRL_AGGREGATION[kind], given.get("max_completion_length"))
    name = kind if kind in ("luspo", "cispo", "sapo", "vespo") else "ppo"
    if name == "ppo" and given["importance_sampling_level"] == "sequence":
        name = "gspo"
    inputs = loss.inputs(
        clip_range_low=given["epsilon"],
        clip_range_high=given["epsilon_high"],
        ratio_cap=given["delta"],
        cispo_high=given["epsilon_high"],  # TRL's is the bound itself
        off_policy_threshold=given.get("off_policy_mask_threshold"),
    )
    result = POLICY_LOSSES[name](inputs)
    total = result.loss
    if given["beta"]:
        corrected = inputs.old_logprobs if given.get("use_bias_correction_kl") else None
        reference = paddle.to_tensor(case.array("rl.ref_logprobs"))
        terms = kl_terms(loss.new, reference, inputs.mask, "k3", old_logprobs=corrected)
        case.equal("kl", (terms.sum() / loss.mask.sum()).item())
        total = total + given["beta"] * kl_loss(terms, inputs)
    expected = case.entry["expected"]
    if "clip_ratio/low_mean" in expected:
        whole = case.expected("clip_ratio/low_mean") + case.expected("clip_ratio/high_mean")
        count = result.clip_fraction.item() / loss.mask.sum()
        if name in ("gspo", "luspo"):  # TRL counts sequences there
            ratio = np.exp(np.sum((loss.new.numpy() - case.array("rl.old_logprobs")), 1) / loss.mask.sum(1))
            rising, falling = ratio > 1 + given["epsilon_high"], ratio < 1 - given["epsilon"]
            advantage = case.array("rl.seq_advantages")
            clipped = (rising & (advantage > 0)) | (falling & (advantage < 0))
            assert result.clip_fraction.item() == (clipped[:, None] * loss.mask).sum()
            count = clipped.mean()
        np.testing.assert_allclose(count, whole, atol=1e-5)
    if "cispo_clip_ratio" in expected:
        # TRL counts only weights that are cut while the advantage is positive
        high = np.exp(loss.new.numpy() - case.array("rl.old_logprobs")) > given["epsilon_high"]
        positive = (case.array("rl.seq_advantages") > 0)[:, None]
        case.equal("cispo_clip_ratio", (high & positive & (loss.mask > 0)).sum() / loss.mask.sum())
        assert result.clip_fraction.item() == (high & (loss.mask > 0)).sum()
    loss.check("loss", total)


@check("loss/trl1.x/rloo")
def trl_rloo_loss(case: Case) -> None:
    loss = Loss(case, "sequence")
    inputs = loss.inputs(clip_range_low=case.options["epsilon"], clip_range_high=case.options["epsilon_high"])
    loss.check("loss", POLICY_LOSSES["rloo"](inputs).loss)


@check(
    "loss/verl/ppo token-mean",
    "loss/verl/ppo seq-mean-token-mean",
    "loss/verl/ppo seq-mean-token-sum",
    "loss/verl/ppo seq-mean-token-sum-norm",
    "loss/verl/ppo dr_grpo constant norm",
    "loss/verl/ppo dual-clip 1.2",
    "loss/verl/ppo token advantages",
    "loss/verl/dapo clip-higher",
    "loss/verl/gspo",
    "loss/verl/sapo",
    "loss/verl/gpg",
    "loss/verl/gmpo (geo_mean)",
    "loss/verl/cispo",
)
def verl_loss(case: Case) -> None:
    given = case.options
    kind = case.entry["name"].split("/")[2].split(" ")[0]
    name = {"dapo": "ppo"}.get(kind, kind)
    low = given["clip_ratio"] if given["clip_ratio_low"] is None else given["clip_ratio_low"]
    high = given["clip_ratio"] if given["clip_ratio_high"] is None else given["clip_ratio_high"]
    mode = {
        None: "sequence",
        "token-mean": "token",
        "seq-mean-token-mean": "sequence",
        "seq-mean-token-sum": "sequence_sum",
        "seq-mean-token-sum-norm": "constant",
    }[given["loss_agg_mode"]]
    # without a factor the peer divides by the width of the padded batch
    loss = Loss(case, mode, given.get("loss_scale_factor", case.array("rl.mask").shape[1]))
    inputs = loss.inputs(
        case.array(case.entry["inputs"]["advantages"][1:]),
        clip_range_low=low,
        clip_range_high=high,
        dual_clip=given["clip_ratio_c"] if name == "ppo" else None,
        cispo_low=1 - low,
        cispo_high=1 + high,
    )
    result = POLICY_LOSSES[name](inputs)
    loss.check("loss", result.loss)
    tokens = loss.mask.sum()
    log_ratio = (loss.new.numpy() - case.array("rl.old_logprobs")) * loss.mask
    np.testing.assert_allclose(result.approx_kl.item(), 0.5 * np.square(log_ratio).sum(), rtol=1e-12)
    if "actor/ppo_kl" in case.entry["expected"]:
        case.equal("actor/ppo_kl", -log_ratio.sum() / tokens)
    if name not in ("sapo", "gpg", "gmpo"):  # verl's gmpo counts log-ratios out of range, whether the clip binds or not
        case.equal("actor/pg_clipfrac", result.clip_fraction.item() / tokens)


@check(
    "loss/openrlhf/ppo token",
    "loss/openrlhf/ppo sample",
    "loss/openrlhf/ppo clip-higher dual-clip",
    "loss/openrlhf/gspo",
)
def openrlhf_loss(case: Case) -> None:
    given = case.options
    name = given.get("policy_loss_type", "ppo")
    loss = Loss(case, "token" if name == "ppo" and given.get("token_level_loss", True) else "sequence")
    result = POLICY_LOSSES[name](
        loss.inputs(
            clip_range_low=given.get("clip_eps_low", 0.2),
            clip_range_high=given.get("clip_eps_high", 0.2),
            dual_clip=given.get("dual_clip"),
        )
    )
    loss.check("loss", result.loss)
    case.equal("clip_ratio", result.clip_fraction.item() / loss.mask.sum())


@check("loss/compose/ppo")
def compose_ppo(case: Case) -> None:
    raw, old_values = case.array("rl.token_advantages"), case.array("rl.values")
    loss = Loss(case, "sequence")
    inputs = loss.inputs(whiten(raw, loss.mask), clip_range_low=0.15)
    result = POLICY_LOSSES["ppo"](inputs)
    values = paddle.to_tensor(case.array("rl.new_values"), stop_gradient=False)
    critic, _ = value_loss(
        values, paddle.to_tensor(old_values), paddle.to_tensor((raw + old_values) * loss.mask), inputs.mask, 0.2,
        "sequence", loss.denominator,
    )  # fmt: skip
    case.equal("value_loss", critic.item())
    loss.check("total", result.loss + 0.2 * critic)
    case.equal("grad_new_values", values.grad.numpy())


@check("loss/compose/grpo", "loss/compose/grpo clip-high + direct KL k3")
def compose_grpo_loss(case: Case) -> None:
    given = case.options
    loss = Loss(case, "sequence")
    inputs = loss.inputs(
        clip_range_low=given.get("policy_clip_ratio", 0.15), clip_range_high=given.get("policy_clip_high_ratio")
    )
    result = POLICY_LOSSES["ppo"](inputs)
    total = result.loss
    terms = kl_terms(loss.new, paddle.to_tensor(case.array("rl.ref_logprobs")), inputs.mask, "k3", log_ratio_clamp=40.0)
    case.equal("kl/online_ift_kl", kl_loss(terms, inputs).item())
    if given.get("add_direct_kl_loss"):
        total = total + given["ift_kl_scalar"] * kl_loss(terms, inputs)
    loss.check("total", total)


@check("loss/compose/grpo summed tokens + KL k1 + entropy")
def compose_summed(case: Case) -> None:
    given = case.options
    loss = Loss(case, "token")
    loss.denominator = 1.0  # the peer sums over the micro batch
    inputs = loss.inputs(clip_range_low=0.15)
    terms = kl_terms(loss.new, paddle.to_tensor(case.array("rl.ref_logprobs")), inputs.mask, "k1")
    logits = paddle.to_tensor(case.array("rl.logits"))
    start, width = case.raw("rl.prompt_len"), loss.mask.shape[1]
    steps = logits[:, start - 1 : start - 1 + width]
    spread = score_labels(steps, paddle.zeros(steps.shape[:2], "int64"), entropy=True).entropy.numpy()
    rows = (spread * loss.mask).sum(axis=1) / loss.mask.sum(axis=1)
    case.equal("cur_seq_entropy", rows)
    total = POLICY_LOSSES["ppo"](inputs).loss + given["ift_kl_scalar"] * kl_loss(terms, inputs)
    loss.check("total", total - given["entropy_loss_weight"] * float(rows.mean()))


@check("loss/compose/apo (A*-PO regression)")
def compose_apo(case: Case) -> None:
    loss = Loss(case, "sequence")
    given = loss.inputs(apo_beta=case.options["beta"])
    targets = (case.array("rl.token_scores") * loss.mask).sum(axis=1) - case.array("rl.seq_advantages")
    inputs = PolicyInputs(
        given.logprobs, given.old_logprobs, given.advantages, given.mask,
        denominator=given.denominator, row_weights=given.row_weights,
        ref_logprobs=paddle.to_tensor(case.array("rl.ref_logprobs")), targets=paddle.to_tensor(targets),
        options=given.options,
    )  # fmt: skip
    loss.check("total", POLICY_LOSSES["apo"](inputs).loss)


# ------------------------------------------------------------------------------------------------------------------- KL


@check("kl/verl/k1", "kl/verl/abs", "kl/verl/k2", "kl/verl/k3", "kl/verl/k3+", "kl/verl/k1+")
def verl_kl(case: Case) -> None:
    kind, mask = case.entry["name"].split("/")[2], case.array("rl.mask")
    new = paddle.to_tensor(case.array("rl.new_logprobs"), stop_gradient=False)
    terms = kl_terms(new, paddle.to_tensor(case.array("rl.ref_logprobs")), paddle.to_tensor(mask), kind)
    case.equal("per_token", terms.numpy())
    case.equal("per_token", kl_estimate(case.array("rl.new_logprobs"), case.array("rl.ref_logprobs"), kind) * mask)
    (terms.sum() / mask.sum()).backward()
    case.equal("grad_of_token_mean", new.grad.numpy())


@check("kl/compose/approx_kl")
def compose_kl(case: Case) -> None:
    # the peer's r is log_p - log_q of samples from q
    for kind in ("k1", "k2", "k3", "k3_offpolicy"):
        clamp = case.options["kl_clip_range"]
        case.equal(kind, kl_estimate(case.array("rl.old_logprobs"), case.array("rl.new_logprobs"), kind, clamp))


@check(
    "klctl/compose/adaptive",
    "klctl/compose/pid",
    "klctl/compose/ball",
    "klctl/verl,trlx/adaptive",
    "klctl/rl4lms",
)
def controllers(case: Case) -> None:
    given, name = case.options, case.entry["name"].rsplit("/", 1)[1]
    target = given.get("target", given.get("target_kl"))
    more = {key: given[key] for key in ("horizon",) if key in given}
    if "kl_lr" in given:
        more["learning_rate"] = given["kl_lr"]
    controller = KL_CONTROLLERS[name](given.get("init_kl_coef", given.get("kl_coeff")), target=target, **more)
    values = []
    for current in case.entry["inputs"]["kl"]:
        state = controller.state_dict()
        controller = KL_CONTROLLERS[name](0.0, target=target, **more)
        controller.load_state_dict(state)  # a resumed run goes on alike
        controller.update(current, given.get("n_steps", 1))
        values.append(controller.kl_coeff)
    case.equal("values", values)


# ------------------------------------------------------------------------------------------------------------ A2C, NLPO


def actor_critic(case: Case, name: str, normalize: bool, low: float = 0.2) -> tuple[Any, ...]:
    """Plain means over the six steps of a batch, as Stable-Baselines3's classes do."""
    logprob = paddle.to_tensor(case.array("ac.log_prob")[None], stop_gradient=False)
    mask = np.ones(logprob.shape)
    advantages = case.array("ac.advantages")[None]
    if normalize:  # (A - mean) / (std + 1e-8)
        advantages = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-8)
    old = paddle.to_tensor(case.array("ac.old_log_prob")[None])
    inputs = PolicyInputs(
        logprob, old, paddle.to_tensor(advantages), paddle.to_tensor(mask), options=PolicyOptions(clip_range_low=low)
    )
    return logprob, inputs, POLICY_LOSSES[name](inputs)


def finish(case: Case, logprob: paddle.Tensor, inputs: PolicyInputs, policy: paddle.Tensor) -> None:
    given = case.options
    values = paddle.to_tensor(case.array("ac.values")[None], stop_gradient=False)
    # our value loss has the factor 0.5 of PPO's papers; here there is none
    critic, _ = value_loss(
        values,
        paddle.to_tensor(case.array("ac.old_values")[None]),
        paddle.to_tensor(case.array("ac.returns")[None]),
        inputs.mask,
    )
    known = "entropy" in case.entry["inputs"]
    spread = paddle.to_tensor(case.array("ac.entropy")[None], stop_gradient=False) if known else -logprob
    entropies = entropy_loss(spread, inputs)
    total = policy + given["ent_coef"] * entropies + given["vf_coef"] * 2.0 * critic
    case.equal("policy_loss", policy.item())
    case.equal("value_loss", 2.0 * critic.item())
    if "entropy_loss" in case.entry["expected"]:
        case.equal("entropy_loss", entropies.item())
    case.equal("total", total.item())
    total.backward()
    case.equal("grad_log_prob", logprob.grad.numpy()[0])
    case.equal("grad_values", values.grad.numpy()[0])
    if known:
        case.equal("grad_entropy", spread.grad.numpy()[0])


@check("a2c/rl4lms", "a2c/rl4lms normalized advantage + entropy", "a2c/rl4lms entropy None")
def a2c(case: Case) -> None:
    logprob, inputs, result = actor_critic(case, "a2c", case.options["normalize_advantage"])
    finish(case, logprob, inputs, result.loss)


@check("nlpo/rl4lms/loss")
def nlpo_loss(case: Case) -> None:
    logprob, inputs, result = actor_critic(case, "ppo", case.options["normalize_advantage"], case.options["clip_range"])
    ratio = np.exp(case.array("ac.log_prob") - case.array("ac.old_log_prob"))
    case.equal("approx_kl", (ratio - 1 - np.log(ratio)).mean())
    finish(case, logprob, inputs, result.loss)


@check(
    "nlpo/rl4lms/mask learned_top_p 0.9 keep 1",
    "nlpo/rl4lms/mask learned_top_p 0.5 keep 3",
    "nlpo/rl4lms/mask learned_top_k 3 keep 1",
    "nlpo/rl4lms/mask topk 2 keep 1",
)
def nlpo_mask(case: Case) -> None:
    given, policy = case.options, case.array("nlpo.policy_logits")
    logits = policy if given["mask_type"] == "topk" else case.array("nlpo.mask_model_logits")
    keep = vocabulary_mask(
        given["mask_type"], logits, given["top_mask"], given["min_tokens_to_keep"], case.raw("nlpo.special_ids")
    )
    case.equal("keep", keep)
    case.equal("masked_logits", np.where(keep, policy, -np.inf))


@check("nlpo/paper/masked distribution")
def nlpo_distribution(case: Case) -> None:
    mask = "nlpo/rl4lms/mask learned_top_p 0.9 keep 1"
    keep = np.asarray(next(e for e in case.document["entries"] if e["name"] == mask)["expected"]["keep"], bool)
    logits, actions = case.array("nlpo.policy_logits"), np.asarray(case.raw("nlpo.actions"))
    probs, logprobs, entropy = masked_softmax(logits, keep)
    case.equal("probs", probs)
    case.equal("log_prob", logprobs[np.arange(len(actions)), actions])
    case.equal("entropy", entropy)
    scores = score_labels(
        paddle.to_tensor(logits), paddle.to_tensor(actions), entropy=True, keep=paddle.to_tensor(keep)
    )
    got = scores.logprobs.numpy()
    case.equal("log_prob", np.where(got < -1e29, -np.inf, got))  # a finite stand-in keeps gradients finite
    case.equal("entropy", scores.entropy.numpy())


# --------------------------------------------------------------------------------------------------- trlX, RFT, lengths


@check("rft/trlx/selection epoch 0", "rft/trlx/selection epoch 1", "rft/trlx/selection epoch 3")
def rft(case: Case) -> None:
    given = case.options
    percentile = selection_percentile(
        given["epoch_count"], given["start_percentile"], given["end_percentile"], given["n_improve_steps"]
    )
    case.equal("percentile", percentile)
    pools = {prompt: [(answer, score) for answer, score in pool] for prompt, pool in case.raw("rft.pool").items()}
    selection = select_answers(pools, percentile)
    case.equal("thresholds", selection.thresholds)
    assert sorted(map(list, selection.chosen)) == case.entry["expected"]["selected"]
    case.seen.add("selected")


@check("ppo/trlx/running moments")
def running_moments(case: Case) -> None:
    moments, got = RunningMoments(), []
    for batch in (np.asarray(case.entry["inputs"][key]) for key in ("first", "second")):
        moments.update(batch)
        got.append([batch.mean(), batch.std(ddof=1), moments.mean, moments.unbiased_std])
    case.equal("batch_mean_std_running_mean_std", got)
    np.testing.assert_allclose(moments.scale(batch), batch / got[-1][-1], rtol=1e-12)


@check("ppo/trlx/reward scalar", "ppo/trlx/reward dense")
def trlx_reward(case: Case) -> None:
    """The formulas are ours; the peer's rows end up to two tokens behind the answer's, and its KL mask is that of the
    token before. Given these rows and this mask, the numbers are its own.
    """
    prompt, output = case.array("trlx_ppo.prompt"), case.array("trlx_ppo.output")
    start, pad = prompt.shape[1] - 1, case.raw("trlx_ppo.pad_id")
    lengths = np.asarray(case.entry["expected"]["lengths"])
    width = int(lengths.max())
    logprobs, reference = (case.array(f"trlx_ppo.{name}")[:, start:] for name in ("logprobs", "ref_logprobs"))
    fed = np.concatenate([prompt, output], axis=1)[:, start : start + width] != pad
    kl = kl_estimate(logprobs, reference, "k1")[:, :width] * fed
    rows, scores, dense = len(prompt), np.zeros(len(prompt)), np.zeros((len(prompt), width))
    if case.entry["name"].endswith("scalar"):
        scores = case.array("trlx_ppo.scalar_scores")[:, 0]
    else:
        for row in range(rows):
            given = case.raw("trlx_ppo.dense_scores")[row]
            dense[row, : len(given)] = given
    got = shape_rewards(scores, kl, lengths, case.options["kl_coef"], token_scores=dense)
    case.equal("rewards", got)


@check("reward/trl1.x/soft_overlong", "reward/openrlhf/overlong")
def overlong(case: Case) -> None:
    given = case.options
    longest = given.get("max_completion_len", given.get("max_new_tokens"))
    buffer = given.get("soft_punish_cache", given.get("overlong_buffer_len"))
    got = overlong_penalty(
        np.asarray(case.entry["inputs"]["lengths"]), longest, buffer, given.get("overlong_penalty_factor", 1.0)
    )
    case.equal("reward" if "reward" in case.entry["expected"] else "added", got)


# ------------------------------------------------------------------------------------------------------------ the tests


@pytest.fixture(scope="module")
def document(shared_data: Path) -> dict:
    return json.loads((shared_data.parent / "vectors" / "preference_and_rl.json").read_text())


def test_every_entry_is_checked_or_named(document: dict) -> None:
    names = {entry["name"] for entry in document["entries"] if entry["name"].split("/")[0] in PREFIXES}
    assert len(names) > 100
    assert names == CHECKS.keys() | NOT_OFFERED.keys()
    assert not CHECKS.keys() & NOT_OFFERED.keys()


@pytest.mark.parametrize("name", CHECKS)
def test_entry(document: dict, name: str) -> None:
    case = Case(document, next(entry for entry in document["entries"] if entry["name"] == name))
    CHECKS[name](case)
    assert case.entry["expected"].keys() - case.seen <= NOT_COMPARED.keys()
