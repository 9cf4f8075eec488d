"""What must hold in a sound run, looked at while it runs.

``checks: strict`` stops a run whose first iteration breaks one of these; ``warn`` says it and goes on; ``off`` looks at
nothing. A later iteration warns, unless the error is gross (:data:`GROSS`): rounding has rare outliers, and one token
in 10^8 must not end a week's run. Nothing is judged by a maximum, since a maximum grows with the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np

from alignment.engine.engine import Engine
from alignment.errors import InvariantError
from alignment.log import get_logger

MODES = ("strict", "warn", "off")
#: The part of the tokens that may be off by more than a tail's bound.
TAIL = 0.01


@dataclass(frozen=True)
class Bounds:
    """How much rounding may show, in nats (for ratios: of ``|ratio - 1|``).

    Attributes:
        gap: mean and 99th percentile of ``|log-prob while generating - log-prob while scoring|`` at temperature 1.
        ratio: mean and 99th percentile of ``|ratio - 1|`` before anything was learnt.
        kl: mean of ``0.5 (log ratio)^2`` then.
    """

    gap: tuple[float, float]
    ratio: tuple[float, float]
    kl: float


BOUNDS = {
    # Two ways to sum the same products. Worst case measured (C++ kernels; a head scaled by 100, an activation by
    # 1000): mean 7e-6, 99th percentile 2e-4, while the largest of 3,000 tokens was off by 4e-3.
    "float32": Bounds(gap=(1e-4, 1e-3), ratio=(1e-4, 1e-3), kl=1e-6),
    # TF32 keeps 10 bits: 5e-4 of every product, some 100 times the above. Never measured on a device.
    "tf32": Bounds(gap=(1e-2, 1e-1), ratio=(1e-2, 1e-1), kl=1e-3),
    # 10 bits in activations too.
    "float16": Bounds(gap=(2e-2, 2e-1), ratio=(2e-2, 2e-1), kl=2e-3),
    # 7 bits. Sound runs show 0.06 nats in the mean (verl) and 0.8 in the 99th percentile; the same rows in batches of
    # another width an approximate KL of 5e-3.
    "bfloat16": Bounds(gap=(0.15, 1.5), ratio=(0.15, 0.7), kl=2e-2),
}
#: A mean gap (nats) that no precision explains: the tokens are 1.6 times as likely to one as to the other.
GROSS = 0.5


def precision_of(dtype: str, *, on_cpu: bool, exact: bool) -> str:
    """The key of :data:`BOUNDS`.

    Args:
        dtype: of the weights.
        on_cpu: whether products are computed on a CPU, which rounds to float32.
        exact: whether a GPU was told not to use TF32 (:func:`alignment.runtime.exact_products`).
    """
    if dtype in BOUNDS and dtype != "float32":
        return dtype
    return "float32" if on_cpu or exact else "tf32"


class Guard:
    """What a check that fails does.

    Args:
        mode: ``"strict"``, ``"warn"`` or ``"off"``.
        speaks: whether this process warns; all of them find the same.

    Raises:
        ValueError: another mode.
    """

    def __init__(self, mode: str = "strict", speaks: bool = True) -> None:
        if mode not in MODES:
            raise ValueError(f"unknown checks {mode!r}; known: {', '.join(MODES)}")
        self.mode, self.speaks = mode, speaks
        self._said: set[str] = set()

    @property
    def looks(self) -> bool:
        """Whether anything is to be checked."""
        return self.mode != "off"

    def fail(self, check: str, message: str, *, stops: bool = True) -> None:
        """Stop the run where the mode is strict and the failure one that ``stops``; else warn, once for each check.

        Args:
            check: its name, so that each is said once.
            message: what was found and what it means.
            stops: whether it is bad enough.

        Raises:
            InvariantError: with the message.
        """
        if self.mode == "strict" and stops:
            raise InvariantError(f"{message} (`checks: warn` goes on all the same)")
        if self.looks and self.speaks and check not in self._said:
            self._said.add(check)
            get_logger().warning("%s (said once)", message)


@dataclass(frozen=True)
class Spread:
    """Mean and 99th percentile of some tokens' errors; NaN where one of them is NaN."""

    mean: float
    tail: float

    @classmethod
    def of(cls, errors: np.ndarray) -> Spread:
        """Of ``[N]`` errors, at least one."""
        wide = np.asarray(errors, dtype=np.float64)
        return cls(float(wide.mean()), float(np.quantile(wide, 1.0 - TAIL)))

    def within(self, bounds: tuple[float, float], scale: float = 1.0) -> bool:
        """Whether both are in bounds; NaN is not."""
        return self.mean <= bounds[0] * scale and self.tail <= bounds[1] * scale

    def __str__(self) -> str:
        return f"{self.mean:.3g} in the mean and {self.tail:.3g} at the 99th percentile"


def check_rollout_gap(errors: np.ndarray, precision: str, temperature: float, guard: Guard, *, first: bool) -> None:
    """What sampled the answers and what learns from them are the same policy.

    Args:
        errors: ``[N]`` of all response tokens: ``|log-prob while generating - log-prob while scoring|``, in nats.
        precision: a key of :data:`BOUNDS`.
        temperature: of sampling; a lower one magnifies rounding.
        guard: what happens where a bound is passed.
        first: whether this is the first rollout; later only a gross error stops.

    Raises:
        InvariantError: see ``guard``.
    """
    if not guard.looks or not len(errors):
        return
    spread, bounds, scale = Spread.of(errors), BOUNDS[precision].gap, 1.0 / min(1.0, temperature)
    if not spread.within(bounds, scale):
        guard.fail(
            "gap",
            f"the rollout's log-probs differ from the training network's by {spread} nats (bounds in {precision}: "
            f"{bounds[0] * scale:.3g}, {bounds[1] * scale:.3g}): the answers were not sampled from the policy that is "
            "trained. `use_fusemt: false` generates through the training network's own layers; if that helps, please "
            "report it with the model's config.json",
            stops=first or not spread.mean <= GROSS * scale,
        )


def check_first_pass(log_ratios: np.ndarray, precision: str, temperature: float, guard: Guard) -> None:
    """On the first pass over the first rollout nothing was learnt yet: every ratio is 1 and the approximate KL is 0.

    Args:
        log_ratios: ``[N]`` of the response tokens of the first optimizer step, on all ranks.
        precision: a key of :data:`BOUNDS`.
        temperature: of all log-probs; a lower one magnifies rounding.
        guard: what happens where a bound is passed.

    Raises:
        InvariantError: see ``guard``.
    """
    if not guard.looks or not len(log_ratios):
        return
    wide, scale = np.asarray(log_ratios, dtype=np.float64), 1.0 / min(1.0, temperature)
    with np.errstate(over="ignore"):
        spread = Spread.of(np.abs(np.expm1(wide)))
    kl, bounds = float(0.5 * np.square(wide).mean()), BOUNDS[precision]
    if not spread.within(bounds.ratio, scale) or not kl <= bounds.kl * scale**2:
        guard.fail(
            "first pass",
            f"on the first pass the importance ratio must be 1 and the approximate KL 0, but |ratio - 1| is {spread} "
            f"(bounds in {precision}: {bounds.ratio[0] * scale:.3g}, {bounds.ratio[1] * scale:.3g}) and the KL "
            f"{kl:.3g} (bound {bounds.kl * scale**2:.3g}): the network gives other log-probs while training than while "
            "scoring. Is there dropout in the model, or a batch-dependent layer?",
        )


def check_later_pass(approx_kl: float, precision: str, temperature: float, guard: Guard) -> None:
    """As :func:`check_first_pass` for later rollouts, by the mean KL of their first optimizer step alone.

    Raises:
        InvariantError: the KL is gross.
    """
    bound = BOUNDS[precision].kl / min(1.0, temperature) ** 2
    if guard.looks and not approx_kl <= bound:
        guard.fail(
            "later pass",
            f"before anything was learnt from a rollout the approximate KL must be 0, but is {approx_kl:.3g} (bound in "
            f"{precision}: {bound:.3g}): the network gives other log-probs while training than while scoring",
            stops=not approx_kl <= 0.5 * GROSS**2,
        )


class FirstStepCheck:
    """A gradient reaches every trainable tensor in its model's first optimizer step, and no frozen tensor ever changes.

    The gradient is read off AdamW's first moment, which is there in every precision and layout; whether the weight
    itself moved says nothing, since a small rate cannot move a norm's weight in float32, nor most weights in bfloat16.
    Tensors are looked at where they are: two numbers of each come to the host.

    Args:
        engines: by role.
        guard: what happens where it does not hold.
        using: ``using(role)`` keeps a role's parameters in memory for a while (offloading).
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        guard: Guard,
        using: Callable[[str], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.engines, self.guard, self.using = dict(engines), guard, using
        self.before = {role: self._frozen(role) for role in self.engines}
        self.waiting = {role for role, engine in self.engines.items() if engine.trainable}

    def after_step(self, role: str, grad_norm: float) -> None:
        """Check a trained role after its optimizer step; a step with nothing to learn (gradient 0) is left out.

        Raises:
            InvariantError: naming the tensors; see the guard.
        """
        if role not in self.waiting or grad_norm == 0.0:
            return
        self.waiting.discard(role)
        engine = self.engines[role]
        largest = engine.largest_moments()
        here = {name for name, value in largest.items() if 0.0 < value < float("inf")}
        # a slice of a tensor, or a copy of it, may rightly get nothing: some process must have got something
        everyone = engine.world.all_processes((here, set(largest) - here), f"gradients of {role}")
        reached = set[str]().union(*(ok for ok, _ in everyone))
        missed = sorted(set[str]().union(*(rest for _, rest in everyone)) - reached)
        if missed:
            self.guard.fail(
                f"gradients of {role}",
                f"{role}: in the first optimizer step no gradient reached {len(missed)} of "
                f"{len(missed) + len(reached)} trainable tensors: {missed[:5]}. Does the loss depend on them?",
            )

    def frozen_tensors(self) -> None:
        """Check all tensors that are not trained, of every role.

        Raises:
            InvariantError: naming role and tensors; see the guard.
        """
        for role in self.engines:
            now = self._frozen(role)
            moved = sorted(name for name, print_ in now.items() if print_ != self.before[role][name])
            if moved:
                self.guard.fail(f"frozen {role}", f"{role}: these tensors are frozen, but changed: {moved[:5]}")

    def _frozen(self, role: str) -> dict[str, int]:
        with self.using(role):
            return self.engines[role].parameter_fingerprints(trained=False)

    @property
    def done(self) -> bool:
        """Whether every trained role was checked."""
        return not self.waiting
