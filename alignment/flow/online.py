"""What methods that answer prompts have in common: the functions of their calls, the way of a score into a reward, the
figures and warnings of a rollout, and evaluation by answering held-out prompts.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from alignment import runtime
from alignment.errors import InvariantError
from alignment.flow.method import Loss, Method, RoleSpec, Window
from alignment.flow.statistics import Statistics
from alignment.log import get_logger
from alignment.losses.advantages import RunningMoments, explained_variance
from alignment.losses.correction import CorrectionOptions, correct_rollout
from alignment.losses.estimators import ADVANTAGES, AdvantageInputs, AdvantageOptions
from alignment.losses.kl import (
    AdaptiveKLController,
    FixedKLController,
    apply_missing_eos_rule,
    kl_estimate,
    shape_rewards,
)
from alignment.losses.policy import POLICY_LOSSES, PolicyInputs, PolicyOptions, kl_loss
from alignment.rollout.rollout import Experience
from alignment.rollout.sampler import SamplingSettings

if TYPE_CHECKING:
    from paddle import Tensor

    from alignment.flow.flow import PhaseTimer
    from alignment.flow.loop import Loop
    from alignment.parallel import World
    from alignment.rollout.generate import GenerationPrompt
    from alignment.rollout.masking import MaskingPolicy
    from alignment.rollout.rewards import RewardResult
    from alignment.rollout.rollout import Rollout

# Evaluation draws from a stream of its own, the same at every evaluation.
EVALUATION_SEED_OFFSET = 0x5EED

ACTOR = RoleSpec("actor", "policy", "actor_model_name_or_path", trained=True, folder="policy", evaluates=True)
REFERENCE = RoleSpec("reference", "policy", "actor_model_name_or_path")
CRITIC = RoleSpec(
    "critic", "value", "reward_critic_model_name_or_path", trained=True, folder="value", metric="reward_critic"
)
REWARD = RoleSpec("reward", "score", "reward_model_name_or_path", evaluates=True)


class OnlineMethod(Method):
    """A method whose iteration begins with prompts.

    Attributes:
        scored: what answers are scored by. For each NAME the key of that name says what gives it (as ``reward`` does),
            and a role of that name is the model among these, with the keys ``NAME_model_name_or_path``,
            ``NAME_tokenizer_name_or_path`` and ``NAME_prompt_template``.
        kl_controller: weighs the KL penalty; learns from every rollout.
        moments: of the scores, where they are normalised as they come; else None.
        generator: generates with the actor.
    """

    base: ClassVar[str] = "online"
    scored: ClassVar[tuple[str, ...]] = ("reward",)
    bar: ClassVar[tuple[str, ...]] = ("train/reward", "train/kl_divergence", "train/actor_loss")

    @classmethod
    def run(cls, args: Any, world: World, argv: list[str]) -> int:
        """Train and evaluate as the arguments say; see :func:`alignment.flow.online_run.run_online`."""
        from alignment.flow.online_run import run_online

        return run_online(cls(args), world, argv)

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self.moments: RunningMoments | None = None
        self.kl_controller: FixedKLController = FixedKLController(0.0)
        self.first, self.reshard_bytes, self.evaluation_bytes, self.tokens = True, 0, 0, 0
        self._said: set[str] = set()

    @property
    def partial_rewards(self) -> bool:
        """Whether one of several rewards may say of an answer that it does not apply to it (``None``)."""
        return False

    @property
    def reward_model(self) -> RoleSpec:
        """The reward model's role; see :meth:`scoring`."""
        return self.scoring(REWARD)

    def scoring(self, spec: RoleSpec) -> RoleSpec:
        """The role of a model that scores; it is there where the key of its name names it."""
        from alignment.rollout.rewards import uses_model

        return replace(spec, present=uses_model(getattr(self.args, spec.name)))

    @property
    def reference_model(self) -> RoleSpec:
        """The reference's role; it is there where the KL to it has a weight."""
        return replace(REFERENCE, present=self.args.kl_coeff > 0)

    def masking(self, roles: Mapping[str, Any]) -> MaskingPolicy | None:
        """What says which tokens may be sampled, of the run's roles; None: all may."""
        return None

    # -- at the run's beginning

    def begin(self, loop: Loop) -> None:
        args = self.args
        self.world, self.roles_there, self.guard, self.timer = loop.world, loop.roles, loop.guard, loop.timer
        self.loop, self.generator, self.scorers = loop, loop.given.generator, loop.given.scores
        self.moments = RunningMoments() if loop.given.running_normalization else None
        self.kl_controller = (
            AdaptiveKLController(args.kl_coeff, args.kl_target, args.kl_horizon)
            if args.adaptive_kl
            else FixedKLController(args.kl_coeff)
        )
        self.sampling = SamplingSettings(
            max_new_tokens=args.max_dec_len,
            min_new_tokens=args.min_dec_len,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            repetition_penalty=args.repetition_penalty,
            seed=args.seed,
            stop=tuple(args.stop_strings or ()),
        )
        self.evaluator = self._evaluator(loop)
        # a run that is resumed writes what it evaluated behind the checkpoint again
        self.evaluator.drop_after(loop.state.global_step or -1)

    @property
    def precision(self) -> str:
        """What the checks' bounds go by; the first rollout's products are exact (:meth:`before_iteration`)."""
        from alignment.flow.invariants import precision_of

        dtype = self.roles_there["actor"].engine.dtype
        return precision_of(dtype, on_cpu=runtime.is_cpu(), exact=self.first)

    def before_iteration(self) -> contextlib.AbstractContextManager[None]:
        """Exact float32 products in the first iteration, where exactness is checked."""
        checked = self.first and self.guard.looks and self.roles_there["actor"].engine.dtype == "float32"
        return runtime.exact_products() if checked else contextlib.nullcontext()

    # -- functions of calls

    def generate(self, actor: Any, prompts: list[GenerationPrompt]) -> Rollout | None:
        """Answer this data rank's prompts; None without any.

        Raises:
            InvariantError: processes that share a model have sampled different tokens.
        """
        return self.answer(prompts, self.sampling, self.args.num_return_sequences)

    def answer(self, prompts: list[GenerationPrompt], sampling: SamplingSettings, samples: int = 1) -> Rollout | None:
        """Answer this data rank's prompts, each ``samples`` times; None without any.

        Raises:
            InvariantError: processes that share a model have sampled different tokens.
        """
        self.evaluation_bytes = 0
        self.refresh()
        rollout = self.generator.generate(prompts, sampling, samples) if prompts else None
        self._same_tokens(rollout)
        return rollout

    def refresh(self) -> int:
        """Bring the rollout model's weights up to date, where it is not the actor itself; returns the bytes moved."""
        moved = self.generator.refresh()
        if moved is None:
            return 0
        self.timer.add("reshard", moved.seconds)
        self.reshard_bytes += moved.nbytes
        return moved.nbytes

    def score(self, reward: Any, rollout: Rollout) -> RewardResult:
        """The rewards of the answers, by the reward model and whatever else ``reward`` names."""
        return self.scorers["reward"](rollout)

    # -- the way of a score into a reward

    def shape_scores(self, rollout: Rollout, scores: np.ndarray, learn: bool = True) -> np.ndarray:
        """``[B]`` float32: normalised by the running moments (if any), which ``learn`` from them, then the missing-EOS
        rule.
        """
        args, shaped = self.args, scores.astype(np.float32)
        if self.moments is not None:
            if learn:
                self.moments.update(scores)
            shaped = self.moments.normalize(shaped)
        return apply_missing_eos_rule(
            shaped, rollout.finished, args.missing_eos_rule, args.missing_eos_score, args.missing_eos_penalty
        )

    def advantages_by(
        self,
        estimator: str,
        rollout: Rollout,
        scores: RewardResult,
        logprobs: np.ndarray,
        ref_logprobs: np.ndarray | None = None,
        options: AdvantageOptions | None = None,
        shaped: np.ndarray | None = None,
        **more: Any,
    ) -> Experience:
        """Advantages by name, of scores that are shaped and clipped and, given the reference's log-probs, of
        ``-kl_coeff KL`` at each token that the policy chose.

        Args:
            estimator: of :data:`~alignment.losses.estimators.ADVANTAGES`.
            rollout, scores: of all ranks.
            logprobs: ``[B, R]`` of the actor by the training network.
            ref_logprobs: ``[B, R]``; None where the KL is not in the reward.
            options: None: :meth:`advantage_options`.
            shaped: ``[B]`` of :meth:`shape_scores`, where that was called already.
            more: further fields of :class:`~alignment.losses.estimators.AdvantageInputs`.
        """
        args, mask = self.args, rollout.actions
        shaped = self.shape_scores(rollout, scores.total) if shaped is None else shaped
        columns, coeff = {"scores": scores.total, "shaped_scores": shaped, "logprobs": logprobs}, 0.0
        kl = np.zeros_like(mask)
        if ref_logprobs is not None:
            coeff = self.kl_controller.kl_coeff
            bounds = [getattr(args, name, None) for name in ("kl_log_ratio_clamp", "kl_clamp")]
            kl = kl_estimate(logprobs, ref_logprobs, args.kl_estimator, *bounds) * mask
            columns |= {"ref_logprobs": ref_logprobs, "kl": kl}
        rewards = shape_rewards(shaped, kl, rollout.response_len, coeff, args.clip_range_score, action_mask=mask)
        inputs = AdvantageInputs(
            self.clip_scores(shaped),
            mask,
            groups=rollout.prompt_index,
            token_rewards=None if ref_logprobs is None else -coeff * kl,
            options=options or self.advantage_options(),
            **more,
        )
        made = ADVANTAGES[estimator](inputs)
        columns |= {"rewards": rewards, "advantages": made.advantages, "returns": made.returns}
        in_float32 = {name: column.astype(np.float32) for name, column in columns.items()}
        return Experience(rollout, scores.parts, **in_float32)

    def clip_scores(self, scores: np.ndarray) -> np.ndarray:
        """Scores within ``clip_range_score``."""
        return scores.clip(-self.args.clip_range_score, self.args.clip_range_score)

    def advantage_options(self, **chosen: Any) -> AdvantageOptions:
        """The estimators' settings: each from the key of its name, where the method has one."""
        named = {f.name: getattr(self.args, f.name) for f in fields(AdvantageOptions) if hasattr(self.args, f.name)}
        return AdvantageOptions(**{**named, **chosen})

    def policy_options(self, **chosen: Any) -> PolicyOptions:
        """The policy losses' settings: each from the key of its name, where the method has one."""
        args = self.args
        named = {f.name: getattr(args, f.name) for f in fields(PolicyOptions) if hasattr(args, f.name)}
        named |= {"clip_range_low": args.clip_range_ratio_low, "clip_range_high": args.clip_range_ratio_high}
        return PolicyOptions(**{**named, **chosen})

    # -- the loss of a policy

    def policy_inputs(
        self, logprobs: Tensor, batch: Experience, window: Window, options: PolicyOptions, mean: str = "token"
    ) -> PolicyInputs:
        """What the policy losses are computed from: the batch's ``logprobs``, ``advantages``, ``actions``, the weights
        of an aggregation (else ``mean`` over the window) and those of a correction, where there are any.
        """
        rows = "row_weights" in batch
        return PolicyInputs(
            logprobs,
            batch.tensor("logprobs"),
            batch.tensor("advantages"),
            batch.tensor("actions"),
            mean,
            window.row_denominator if rows else window.denominator(mean),
            row_weights=batch.tensor("row_weights") if rows else None,
            token_weights=batch.tensor("token_weights") if "token_weights" in batch else None,
            options=options,
        )

    def policy_loss(
        self,
        name: str,
        inputs: PolicyInputs,
        entropy: Tensor,
        batch: Experience,
        window: Window,
        kl: Tensor | None = None,
    ) -> Loss:
        """A policy loss with its figures.

        Args:
            name: of :data:`~alignment.losses.policy.POLICY_LOSSES`.
            inputs: see :meth:`policy_inputs`.
            entropy: ``[b, R]``; its bonus is a mean over tokens.
            batch, window: the micro batch and its window.
            kl: per-token terms ``[b, R]`` that are added with ``kl_coeff``, aggregated as the loss is.
        """
        result, actions = POLICY_LOSSES[name](inputs), batch.actions
        tokens, answers = float(actions.sum()), float((actions.sum(axis=1) > 0).sum())
        entropies = (entropy * inputs.mask).sum()
        if inputs.row_weights is None:
            shown = (result.loss, tokens if inputs.mean == "token" else answers, inputs.denominator)
        else:
            shown = (result.loss, answers / max(1, window.answers))  # rows without a token come in no micro batch
        sums = {
            "train/actor_loss": shown,
            "train/entropy": (entropies, tokens),
            "train/clip_fraction": (result.clip_fraction, tokens),
            "train/approx_kl": (result.approx_kl, tokens),
            "train/ratio_mean": (result.ratio, tokens),
        }
        total = result.loss
        if kl is not None:
            total = total + self.kl_controller.kl_coeff * kl_loss(kl, inputs)
            sums["train/kl_loss"] = ((kl * inputs.mask).sum(), tokens)
        if self.args.entropy_coeff:
            total = total - self.args.entropy_coeff * entropies / window.denominator("token")
        maxima = {"train/ratio_max": result.max_ratio, "train/ratio_error_max": result.max_ratio_error}
        return Loss(total, sums, maxima)

    # -- figures

    def finish(
        self, experience: Experience, scores: RewardResult, **others: RewardResult
    ) -> tuple[Experience, Statistics]:
        """A rollout that is ready to be learnt from, and its figures; ``others`` are further scores by name.

        The rows of all ranks are seen here: warns of what spoils learning, checks that what sampled is what is trained,
        weighs tokens that were sampled from another distribution (``rollout_correction``; the column
        ``token_weights``), and lets the KL controller learn.

        Raises:
            InvariantError: the rollout's log-probs are not the training network's.
        """
        from alignment.flow.invariants import check_rollout_gap
        from alignment.flow.notices import notices

        stats = describe_experience(experience, self.kl_controller.kl_coeff, self.args.clip_range_score)
        for what, result in {"reward": scores, **others}.items():
            for name, figures in result.figures.items():
                stats.add(f"{what}/{name}_fraction", float(figures.sum()), len(figures))
        self._say(notices(experience, stats.result(), self.args, self.generator.inner.kept.mean))
        if "logprobs" in experience:
            check_rollout_gap(
                rollout_gaps(experience), self.precision, self.sampling.temperature, self.guard, first=self.first
            )
            experience = self._correct(experience, stats)
        self.first = False
        self.loop.tokens = int(experience.lengths.sum())
        self.count_tokens(experience, "rollout")
        # While the policy is not trained yet it is the reference: a KL of 0 says nothing about the coefficient.
        warm_up = next((spec.starts_at for spec in self.roles() if spec.name == "actor"), 0)
        if "ref_logprobs" in experience and self.loop.first_step >= warm_up:
            self.kl_controller.update(float(summed_k1(experience).mean()), len(experience))
        return experience, stats

    def _correct(self, experience: Experience, stats: Statistics) -> Experience:
        bounds = CorrectionOptions(**self.args.correction_bounds())
        mask, kind = experience.actions, self.args.rollout_correction
        found = correct_rollout(experience.logprobs, experience.sampler_logprobs, mask, kind, bounds)
        for name, value in found.figures.items():
            stats.set(f"train/rollout_{name}", value)
        if found.weights is None:
            return experience
        return experience.add("response", token_weights=found.weights.astype(np.float32))

    def _say(self, found: Mapping[str, str]) -> None:
        for kind, text in found.items():
            if self.world.is_main and kind not in self._said:
                self._said.add(kind)
                get_logger().warning("%s", text)

    def count_tokens(self, whole: Rollout, name: str) -> None:
        """Count all ranks' tokens of a value of the flow for the phases' rates: the answers' for the call that
        generates it, whole rows' for those that read it.
        """
        for call in self.loop.flow.calls:
            if call.kind == "generate" and name in call.outputs:
                self.timer.count_tokens(call.name, float(whole.chosen_len.sum()))
            elif (
                call.kind == "infer"
                and name in call.needs
                and any(self.roles_there.get(role) is not None for role in call.roles)
            ):
                self.timer.count_tokens(call.name, float(whole.lengths.sum()))

    def _same_tokens(self, rollout: Rollout | None) -> None:
        if not self.world.topology.splits_model:
            return
        crc = 0 if rollout is None else zlib.crc32(np.ascontiguousarray(rollout.tokens).view(np.uint8).reshape(-1))
        if len(set(self.world.model_peers(crc, "tokens of the rollout"))) > 1:
            raise InvariantError(
                f"data rank {self.world.rank}: the processes that share the actor sampled different tokens"
            )

    def drain(self, timer: PhaseTimer) -> dict[str, float]:
        if self.generator.resharder is None:
            return timer.drain()
        moved, self.reshard_bytes = float(self.reshard_bytes), 0
        return {**timer.drain(), "reshard/bytes": moved}

    # -- evaluation

    @property
    def evaluates(self) -> bool:
        return bool(self.loop.given.eval_prompts)

    def evaluate(self, step: int) -> dict[str, float]:
        self.evaluation_bytes = self.refresh()
        return self.evaluator.run(step)

    def _evaluator(self, loop: Loop) -> Any:
        from alignment.flow.evaluation import Evaluator

        args = self.args
        seeded = replace(self.sampling, seed=args.seed + EVALUATION_SEED_OFFSET)
        modes = {"greedy": seeded.as_greedy()}
        if args.eval_temperature > 0:
            modes = {"sampled": replace(seeded, temperature=args.eval_temperature), **modes}
        generate: Callable[..., Rollout] = lambda prompts, settings: self.generator.generate(  # noqa: E731
            prompts, settings, batch_size=args.per_device_eval_batch_size
        )
        return Evaluator(
            loop.given.eval_prompts,
            generate,
            modes,
            self.scorers,
            self.world,
            args.output_dir,
            args.sample_table_rows,
            loop.writer.write,
        )

    # -- what a resumed run needs

    def state(self) -> dict[str, Any]:
        return {
            "kl_controller": self.kl_controller.state_dict(),
            "reward_moments": self.moments.state_dict() if self.moments else {},
            # what the evaluation has moved since the update is moved again after a restart
            "reshard_bytes": self.reshard_bytes - self.evaluation_bytes,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.kl_controller.load_state_dict(state["kl_controller"])
        if self.moments is not None and state["reward_moments"]:
            self.moments.load_state_dict(state["reward_moments"])
        self.reshard_bytes = state["reshard_bytes"]


def logprobs(role: Any, rollout: Rollout) -> np.ndarray | None:
    """``[b, R]`` float32 of a policy; None where the run does not have it."""
    return None if role is None else role.logprobs(rollout)


def values(role: Any, rollout: Rollout) -> np.ndarray:
    """``[b, R]`` float32 of a critic."""
    return role.values(rollout)


def summed_k1(experience: Experience) -> np.ndarray:
    """``[B]`` k1 estimate of each answer's KL to the reference, in nats: what the adaptive controller and the metric
    use.
    """
    return ((experience.plain_logprobs - experience.ref_logprobs) * experience.actions).sum(axis=1)


def rollout_gaps(experience: Experience) -> np.ndarray:
    """``[N]``, of each token that the policy chose: how far the log-prob of the rollout engine is from the training
    network's.
    """
    return np.abs(experience.rollout.logprobs - experience.plain_logprobs)[experience.actions > 0]


def clipped_scores(experience: Experience, clip_range_score: float) -> np.ndarray:
    """``[B]`` bool, the rows whose score ``clip_range_score`` has cut."""
    return np.abs(experience.shaped_scores) > clip_range_score


def describe_experience(experience: Experience, kl_coeff: float, clip_range_score: float) -> Statistics:
    """The metrics of one rollout (names as in the reference where it has them), of the columns that it has."""
    stats, mask = Statistics(), experience.actions
    rows, tokens = len(experience), float(mask.sum())
    if "scores" in experience:
        stats.add("train/reward", experience.scores.sum(), rows)
        stats.add("train/reward_std", experience.scores.std() * rows if rows else 0.0, rows)
        if len(experience.score_parts) > 1:
            for name, part in experience.score_parts.items():
                stats.add(f"train/reward/{name}", np.nansum(part), int((~np.isnan(part)).sum()))
    if "shaped_scores" in experience:
        stats.add("train/norm_reward", experience.shaped_scores.sum(), rows)
        stats.add("reward/clipped_fraction", clipped_scores(experience, clip_range_score).sum(), rows)
    if "rewards" in experience:
        stats.add("train/norm_reward_with_kl", experience.rewards.sum(), rows)
    if "ref_logprobs" in experience:
        stats.add("train/kl_divergence", summed_k1(experience).sum(), rows)
        stats.add("train/kl_divergence_per_token", summed_k1(experience).sum(), tokens)
        stats.set("train/kl_coeff", kl_coeff)
    stats.add("train/mean_generated_length", experience.chosen_len.sum(), rows)
    stats.maximum("train/max_generated_length", float(experience.chosen_len.max(initial=0)))
    stats.add("train/truncation_rate", float((~experience.finished).sum()), rows)
    for name in ("values", "returns", "advantages"):
        if name in experience:
            stats.add(f"train/{name}", (experience[name] * mask).sum(), tokens)
    if "values" in experience and "returns" in experience:
        stats.add("train/explained_variance", explained_variance(experience.values, experience.returns, mask), 1)
    if "logprobs" in experience:
        gaps = rollout_gaps(experience)
        stats.add("train/rollout_logprob_gap_mean", gaps.sum(), tokens)
        stats.maximum("train/rollout_logprob_gap", float(gaps.max(initial=0.0)))
    return stats
