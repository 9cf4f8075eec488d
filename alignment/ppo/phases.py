"""An iteration up to the experience: the dataflow's phases on this data rank, and how they come together.

Each data rank generates answers to its own prompts, scores and evaluates them; then every rank gets all rows, and
rewards and advantages are computed of all of them, on each rank alike.
"""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignment import runtime
from alignment.errors import InvariantError
from alignment.flow.flow import PPO_ITERATION, PhaseTimer
from alignment.flow.invariants import Guard, check_rollout_gap, precision_of
from alignment.flow.notices import notices
from alignment.flow.statistics import Statistics
from alignment.log import get_logger
from alignment.losses.advantages import RunningMoments
from alignment.losses.kl import FixedKLController
from alignment.parallel import World
from alignment.ppo.experience import assemble_experience, describe_experience, rollout_gaps, summed_k1
from alignment.rollout.generate import GenerationPrompt
from alignment.rollout.layouts import RolloutEngine
from alignment.rollout.rewards import RewardResult
from alignment.rollout.roles import PolicyRole, RewardRole, ValueRole
from alignment.rollout.rollout import Experience, Rollout
from alignment.rollout.sampler import SamplingSettings


@dataclass
class Roles:
    """The models of a run; ``reward`` is absent when only callables score, ``reference`` and ``critic`` when nothing is
    trained.
    """

    actor: PolicyRole
    reference: PolicyRole | None
    critic: ValueRole | None
    reward: RewardRole | None


def no_rows(*_: Any) -> Any:
    """Stands for the functions of a pass over no micro batch."""
    raise AssertionError("a pass over nothing reads nothing")


class RolloutPhases:
    """The phases of :data:`~alignment.flow.flow.PPO_ITERATION` before the update.

    Args:
        args: the PPO arguments.
        world: the data ranks.
        roles: the models.
        score: rewards of a rollout.
        generator: generates with the actor.
        sampling: settings of the rollout.
        kl_controller: weighs the KL penalty; learns from every rollout.
        moments: of the scores, where they are normalised as they come; else ``None``.

    Attributes:
        timer: seconds and tokens of the phases.
        stats: figures of the newest rollout.
        tokens: of the newest rollout that have not been counted towards the rate yet.
        reshard_bytes: received by rollout weights since this was last set to 0.
        kl_adapts: whether the KL controller learns from the next rollout; not while only the critic is trained, since
            the policy is the reference until then and a KL of 0 says nothing about the coefficient.
        first: whether no rollout was made yet.
        guard: what a check that fails does.
    """

    def __init__(
        self,
        args: Any,
        world: World,
        roles: Roles,
        score: Callable[[Rollout], RewardResult],
        generator: RolloutEngine,
        sampling: SamplingSettings,
        kl_controller: FixedKLController,
        moments: RunningMoments | None,
    ) -> None:
        self.args, self.world, self.roles, self.score = args, world, roles, score
        self.generator, self.sampling, self.kl_controller, self.moments = generator, sampling, kl_controller, moments
        self.timer, self.stats, self.tokens, self.reshard_bytes = PhaseTimer(), Statistics(), 0, 0
        self.kl_adapts, self.first, self.guard = True, True, Guard(args.checks, world.is_main)
        self._said: set[str] = set()

    @property
    def precision(self) -> str:
        """What the checks' bounds go by; the first rollout's products are exact (:meth:`exactly`)."""
        return precision_of(self.roles.actor.engine.dtype, on_cpu=runtime.is_cpu(), exact=self.first)

    def exactly(self) -> contextlib.AbstractContextManager[None]:
        """Around an iteration: exact float32 products in the first one, where exactness is checked."""
        checked = self.first and self.guard.looks and self.roles.actor.engine.dtype == "float32"
        return runtime.exact_products() if checked else contextlib.nullcontext()

    def functions(self) -> dict[str, Callable[..., Any]]:
        """The phases' functions by name, for training."""
        roles = self.roles
        assert roles.reference is not None and roles.critic is not None
        functions: dict[str, Callable[..., Any]] = {
            "generate": self.generate,
            "actor_logprobs": functools.partial(self._where_rows, roles.actor, roles.actor.logprobs),
            "reference_logprobs": functools.partial(self._where_rows, roles.reference, roles.reference.logprobs),
            "reward_scores": functools.partial(self._where_rows, roles.reward, self.score),
            "critic_values": functools.partial(self._where_rows, roles.critic, roles.critic.values),
            "advantages": self.experience,
        }
        calls = {call.name: call for call in PPO_ITERATION.calls}
        return {
            name: self.awake(calls[name].roles, function, whole=calls[name].kind == "generate")
            for name, function in functions.items()
        }

    def awake(self, names: Sequence[str], function: Callable[..., Any], *, whole: bool = True) -> Callable[..., Any]:
        """``function`` with the parameters of the named roles there (sharding stage 3 lets them rest between); with
        ``whole`` false for passes alone, which gather layer by layer.
        """

        def call(*values: Any) -> Any:
            with contextlib.ExitStack() as stack:
                for name in names:
                    role = getattr(self.roles, name)
                    if role is not None:
                        stack.enter_context(role.engine.awake() if whole else role.engine.in_passes())
                return function(*values)

        return call

    def generate(self, prompts: list[GenerationPrompt]) -> Rollout | None:
        """Answer this data rank's prompts; ``None`` without any."""
        self.refresh()
        if not prompts:
            return None
        return self.generator.generate(prompts, self.sampling, self.args.num_return_sequences)

    def refresh(self) -> int:
        """Bring the rollout model's weights up to date, where it is not the actor itself; returns the bytes moved."""
        moved = self.generator.refresh()
        if moved is None:
            return 0
        self.timer.add("reshard", moved.seconds)
        self.reshard_bytes += moved.nbytes
        return moved.nbytes

    @staticmethod
    def _where_rows(
        role: PolicyRole | ValueRole | RewardRole | None, function: Callable[[Rollout], Any], rollout: Rollout | None
    ) -> Any:
        if rollout is None:
            if role is not None:
                role.engine.infer_pass([], no_rows, no_rows)  # other data ranks may gather layers from this one
            return None
        return function(rollout)

    def experience(
        self,
        rollout: Rollout | None,
        logprobs: np.ndarray | None,
        ref_logprobs: np.ndarray | None,
        scores: RewardResult | None,
        values: np.ndarray | None,
    ) -> Experience:
        """Gather every rank's rows, then compute rewards and advantages of all of them, on each rank alike.

        Raises:
            InvariantError: processes that share a model have sampled different tokens.
        """
        self._same_tokens(rollout)
        parts = self.world.all_gather_object((rollout, logprobs, ref_logprobs, scores, values))
        filled = [part for part in parts if part[0] is not None]
        whole = Rollout.join([part[0] for part in filled])

        def join(column: int) -> np.ndarray:
            width = whole.width
            return np.concatenate([np.pad(p[column], ((0, 0), (0, width - p[column].shape[1]))) for p in filled])

        totals = np.concatenate([part[3].total for part in filled])
        pieces = {name: np.concatenate([part[3].parts[name] for part in filled]) for name in filled[0][3].parts}
        experience = assemble_experience(
            whole, join(1), join(2), join(4), totals, pieces, self.args, self.kl_controller, self.moments
        )
        self.stats = describe_experience(experience, self.kl_controller.kl_coeff, self.args.clip_range_score)
        for name in filled[0][3].figures:
            figures = np.concatenate([part[3].figures[name] for part in filled])
            self.stats.add(f"reward/{name}_fraction", float(figures.sum()), len(figures))
        self._say(notices(experience, self.stats.result(), self.args, self.generator.inner.kept.mean))
        gaps = rollout_gaps(experience)
        check_rollout_gap(gaps, self.precision, self.sampling.temperature, self.guard, first=self.first)
        self.first = False
        self.tokens = int(whole.lengths.sum())
        self._count_tokens(whole)
        if self.kl_adapts:
            self.kl_controller.update(float(summed_k1(experience).mean()), len(experience))
        return experience

    def _say(self, found: Mapping[str, str]) -> None:
        for kind, text in found.items():
            if self.world.is_main and kind not in self._said:
                self._said.add(kind)
                get_logger().warning("%s", text)

    def _count_tokens(self, whole: Rollout) -> None:
        """Count all ranks' tokens for the phases' rates: the answers' for ``generate``, whole rows' for the others."""
        self.timer.count_tokens("generate", float(whole.response_len.sum()))
        scored = ("reward_scores",) if self.roles.reward is not None else ()
        for phase in ("actor_logprobs", "reference_logprobs", "critic_values", *scored):
            self.timer.count_tokens(phase, float(whole.lengths.sum()))

    def _same_tokens(self, rollout: Rollout | None) -> None:
        if not self.world.topology.splits_model:
            return
        crc = 0 if rollout is None else zlib.crc32(np.ascontiguousarray(rollout.tokens).view(np.uint8).reshape(-1))
        if len(set(self.world.model_peers(crc, "tokens of the rollout"))) > 1:
            raise InvariantError(
                f"data rank {self.world.rank}: the processes that share the actor sampled different tokens"
            )
