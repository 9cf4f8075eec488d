"""What must hold in a correct first step, asserted while it runs. A run that breaks one of these cannot be trusted, so
it stops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

from alignment.errors import InvariantError
from alignment.ppo.engine import Engine

# (largest |ratio - 1|, largest approximate KL): the same network on the same tokens, differently batched, differs by
# rounding only.
_BOUNDS = {"float32": (1e-3, 1e-6), "bfloat16": (0.3, 5e-3), "float16": (0.1, 1e-3)}


# The largest |log-prob of the rollout engine - log-prob of the training network| at temperature 1. Two ways to compute
# the same function in float32 differ by rounding; in half precision a single token may be far off without any fault.
_ROLLOUT_GAP = {"float32": 1e-3, "bfloat16": 1.0, "float16": 0.3}


def check_rollout_gap(gap: float, dtype: str, temperature: float) -> None:
    """What sampled the answers and what learns from them are the same policy.

    Args:
        gap: the largest difference of a response token's two log-probs (``train/rollout_logprob_gap``), in nats.
        dtype: of the actor's weights; it sets how much rounding may show.
        temperature: of sampling; a lower one magnifies rounding.

    Raises:
        InvariantError: the bound is passed.
    """
    bound = _ROLLOUT_GAP.get(dtype, _ROLLOUT_GAP["float32"]) / min(1.0, temperature)
    if not gap <= bound:
        raise InvariantError(
            f"the rollout's log-probs differ from the training network's by up to {gap:.3g} nats (bound {bound:.3g}): "
            "the answers were not sampled from the policy that is trained. `use_fusemt: false` generates through the "
            "training network's own layers; if that helps, please report it with the model's config.json"
        )


def check_first_pass(max_ratio_error: float, approx_kl: float, dtype: str) -> None:
    """On the first pass over a rollout nothing was learnt yet: every ratio is 1 and the approximate KL is 0.

    Args:
        max_ratio_error: the largest ``|ratio - 1|`` of the first micro batches.
        approx_kl: their mean ``0.5 (log ratio)^2``.
        dtype: of the actor's weights; it sets how much rounding may show.

    Raises:
        InvariantError: a bound is passed.
    """
    ratio_bound, kl_bound = _BOUNDS.get(dtype, _BOUNDS["float32"])
    if max_ratio_error > ratio_bound or approx_kl > kl_bound:
        raise InvariantError(
            "on the first pass the importance ratio must be 1 and the approximate KL 0, but the largest |ratio - 1| "
            f"is {max_ratio_error:.3g} (bound {ratio_bound:g}) and the approximate KL {approx_kl:.3g} (bound "
            f"{kl_bound:g}): the network gives other log-probs while training than while scoring. Is there dropout in "
            "the model, or a batch-dependent layer?"
        )


class MovementCheck:
    """Every trainable tensor moves in its model's first optimizer step, and no frozen one ever does.

    Args:
        engines: by role.
        using: ``using(role)`` keeps a role's parameters in memory for a while (offloading).
    """

    def __init__(
        self, engines: Mapping[str, Engine], using: Callable[[str], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self.engines, self.using = dict(engines), using
        self.before = {role: self._fingerprints(role) for role in self.engines}
        self.waiting = {role for role, engine in self.engines.items() if engine.trainable}

    def after_step(self, role: str, learning_rate: float, grad_norm: float) -> None:
        """Check a trained role after its optimizer step; a step with nothing to learn (rate or gradient 0) is left out.

        Raises:
            InvariantError: naming the tensors.
        """
        if role not in self.waiting or learning_rate == 0.0 or grad_norm == 0.0:
            return
        self.waiting.discard(role)
        engine, before = self.engines[role], self.before[role]
        now = self._fingerprints(role)
        trainable = set(engine.parameters)
        stuck = sorted(name for name in trainable if now[name] == before[name])
        moved = sorted(name for name in now if name not in trainable and now[name] != before[name])
        if stuck:
            raise InvariantError(
                f"{role}: the first optimizer step left {len(stuck)} of {len(trainable)} trainable tensors where they "
                f"were: {stuck[:5]}. Does the loss reach them?"
            )
        if moved:
            raise InvariantError(f"{role}: the first optimizer step moved frozen tensors: {moved[:5]}")

    def frozen_roles(self) -> None:
        """Check the roles that are not trained.

        Raises:
            InvariantError: naming role and tensors.
        """
        for role, engine in self.engines.items():
            if engine.trainable:
                continue
            now = self._fingerprints(role)
            moved = sorted(name for name, print_ in now.items() if print_ != self.before[role][name])
            if moved:
                raise InvariantError(f"{role} is frozen, but these tensors changed: {moved[:5]}")

    def _fingerprints(self, role: str) -> dict[str, tuple[float, float]]:
        with self.using(role):
            return self.engines[role].parameter_fingerprints()

    @property
    def done(self) -> bool:
        """Whether every trained role was checked."""
        return not self.waiting
