"""How far the plan's times are from what this machine takes: calibration, prediction and measurement take turns.

In one process: first the rates that a plan's card has (the kernels' large products, reading weights, attention,
elementwise traffic, AdamW, the choice of tokens, the host's share of a decoding step) by micro-benchmarks that know
nothing of the model; then training passes, optimizer steps, forwards without gradient and rollouts of a mid-size model,
which the plan predicts from these rates. Rounds alternate, so that a busy machine slows all alike; the ratios' medians
are printed. Prints a table to standard error and one JSON line to standard output; about half a minute.

    python benchmarks/plan.py [--rounds 5] [--hidden 512] [--layers 8] [--rows 8] [--tokens 128] [--top_p 1.0]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from alignment import runtime
from alignment.plan import work
from alignment.plan.hardware import Card, card_named
from alignment.plan.setting import Setting
from alignment.plan.times import forward_ops, train_ops
from benchmarks.plan_rates import Calibration, middle, rollout_seconds, rollouts, small_model


def passes(model: Any, setting: Setting) -> dict[str, Callable[[], None]]:
    """What is measured, by name: functions that do it once."""
    import numpy as np

    from alignment.engine.engine import Engine, OptimizerSettings
    from alignment.parallel import init_world
    from alignment.rollout.roles import PolicyRole
    from alignment.rollout.rollout import Rollout

    engine = Engine("actor", model, init_world(), OptimizerSettings(1e-4))
    role = PolicyRole(engine, 1.0, setting.infer_rows)
    rows, width = setting.micro_rows, setting.width
    draw = np.random.default_rng(0)
    rollout = Rollout(
        tokens=draw.integers(0, setting.roles[0].shape.vocab, [rows, width]),
        prompt_len=np.full(rows, setting.prompt_tokens),
        response_len=np.full(rows, setting.response_tokens),
        finished=np.zeros(rows, dtype=bool),
        logprobs=np.zeros([rows, setting.response_tokens], dtype=np.float32),
        sampler_logprobs=np.zeros([rows, setting.response_tokens], dtype=np.float32),
        prompt_index=np.arange(rows),
        sample_index=np.zeros(rows, dtype=np.int64),
        prompts=[""] * rows,
        responses=[""] * rows,
        rows=[{}] * rows,
    )

    def train() -> None:
        role.train([rollout], lambda part: part, lambda logprobs, entropy, part: (-logprobs.mean(), None))

    train()
    engine.step()
    return {
        "training pass": train,
        "optimizer step": engine.step,
        "forward": lambda: role.logprobs(rollout) is None or None,
        "rollout": rollouts(model, setting),
    }


def predicted(setting: Setting, card: Card) -> dict[str, float]:
    """The plan's seconds of the same."""
    actor, topology = setting.roles[0], setting.topology
    rows, width = setting.micro_rows, float(setting.width)
    labels = float(rows * setting.response_tokens)
    first, second = train_ops(setting, actor, topology, rows, width, labels, True)
    forward = forward_ops(setting, actor, topology, rows, width, labels)
    elements = actor.shape.parameters
    return {
        "training pass": work.seconds(first + second, card, 4),
        "optimizer step": work.seconds(work.adamw(elements, 4), card, 4),
        "forward": work.seconds(forward, card, 4),
        "rollout": rollout_seconds(setting, card),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds (default 5)")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--top_p", type=float, default=1.0, help="below 1: only the most probable tokens (default 1)")
    options = parser.parse_args()
    with runtime.quiet_import():
        model, setting = small_model(
            vocab=options.vocab,
            hidden=options.hidden,
            intermediate=int(options.hidden * 2.75),
            layers=options.layers,
            heads=8,
            keys=4,
            rows=options.rows,
            tokens=options.tokens,
            nucleus=options.top_p < 1,
        )
    functions = passes(model, setting)
    calibration = Calibration()
    base = card_named("cpu")
    calibration.card(base)  # the first calls make threads and plans
    ratios: dict[str, list[float]] = {name: [] for name in functions}
    figures: dict[str, dict[str, list[float]]] = {name: {"predicted": [], "measured": []} for name in functions}
    cards = []
    for _ in range(options.rounds):
        before = calibration.card(base)
        took = {}
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            took[name] = time.perf_counter() - began
        after = calibration.card(base)
        cards.append(middle(before, after))
        for name, seconds in predicted(setting, cards[-1]).items():
            ratios[name].append(seconds / took[name])
            figures[name]["predicted"].append(seconds)
            figures[name]["measured"].append(took[name])
    result = {
        "benchmark": "plan",
        "model": {"parameters": setting.roles[0].shape.parameters, **vars(options)},
        "ratio": {name: round(statistics.median(values), 3) for name, values in ratios.items()},
        "seconds": {
            name: {kind: round(statistics.median(values), 4) for kind, values in row.items()}
            for name, row in figures.items()
        },
        "card": {
            "gflops": round(1e3 * statistics.median(card.tflops for card in cards), 1),
            "attention_gflops": round(
                1e3 * statistics.median(card.tflops * card.causal_efficiency for card in cards), 1
            ),
            "kernels_gb_per_s": {
                kind: round(statistics.median(card.kernels[kind] for card in cards), 2) for kind in cards[0].kernels
            },
            "launch_us": round(1e6 * statistics.median(card.launch for card in cards), 2),
            "step_us": round(1e6 * statistics.median(card.step for card in cards), 1),
        },
    }
    print(table(result), file=sys.stderr)
    print(json.dumps(result))
    return 0


def table(result: dict[str, Any]) -> str:
    lines = [f"{'':<18}{'predicted':>12}{'measured':>12}{'ratio':>8}"]
    for name, ratio in result["ratio"].items():
        row = result["seconds"][name]
        lines.append(f"{name:<18}{row['predicted']:>10.3f} s{row['measured']:>10.3f} s{ratio:>8.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
