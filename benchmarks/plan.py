"""How far the plan's times are from what this machine takes: calibration, prediction and measurement take turns.

In one process: first the rates that a plan's card has (large products, attention's products, elementwise traffic,
exponentials, the start of an operator) by micro-benchmarks that know nothing of the model; then training passes,
forwards without gradient and rollouts of a mid-size model, which the plan predicts from these rates. Rounds alternate,
so that a busy machine slows all alike; the ratios' medians are printed. Prints a table to standard error and one JSON
line to standard output; about a minute.

    python benchmarks/plan.py [--rounds 5] [--hidden 512] [--layers 8] [--rows 8] [--tokens 128]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from alignment import runtime
from alignment.parallel.topology import Topology
from alignment.plan import work
from alignment.plan.hardware import Card, card_named
from alignment.plan.setting import RolePlan, Setting
from alignment.plan.shapes import shape_of_config
from alignment.plan.times import forward_ops, train_ops

COPIES = 6
FAR = 16 << 20  # numbers of a tensor that no cache holds


def mean(function: Callable[[], Any], repeats: int) -> float:
    """Seconds of a run, on average: on a busy machine the best would be faster than what a model meets."""
    function()
    began = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - began) / repeats


class Calibration:
    """The operators that the rates are read from; made once, timed in every round.

    Every operator goes over several tensors and keeps its results, so that it meets cold memory as in a model.
    """

    def __init__(self) -> None:
        import paddle
        import paddle.nn.functional as F

        def draw(*shape: int) -> list[Any]:
            return [paddle.rand(list(shape)) for _ in range(COPIES)]

        self.paddle, self.silu, self.softmax, self.pad = paddle, F.silu, F.softmax, F.pad
        self.products = [
            (paddle.rand([1024, k]), paddle.rand([k, n]))
            for k, n in ((512, 1408), (1408, 512), (512, 512), (512, 4096))
        ]
        self.heads, self.keys = draw(8, 128, 8, 64), draw(8, 128, 8, 64)
        self.angles, self.states, self.row = paddle.rand([8, 128, 1, 64]), draw(8, 128, 512), paddle.rand([8, 128, 1])
        self.scores, self.mask = draw(8, 8, 128, 128), paddle.rand([8, 1, 128, 128])
        self.far = paddle.rand([FAR]), paddle.rand([FAR])
        self.wide, self.small, self.weight = draw(8, 128, 1408), paddle.rand([8]), paddle.rand([512])

    def card(self, base: Card) -> Card:
        """``base`` with the rates of this moment."""
        with self.paddle.no_grad():
            return self._card(base)

    def _card(self, base: Card) -> Card:
        paddle, flops, seconds = self.paddle, 0.0, 0.0
        for a, b in self.products:
            flops += 2.0 * a.shape[0] * a.shape[1] * b.shape[1]
            seconds += mean(lambda a=a, b=b: paddle.matmul(a, b), 3)
        gemm = flops / seconds
        launch = mean(lambda: [self.small + self.small for _ in range(50)], 3) / 50
        turned = [x.transpose([0, 2, 1, 3]) for x in self.heads], [x.transpose([0, 2, 3, 1]) for x in self.keys]
        small = each(paddle.matmul, *turned) + each(paddle.matmul, self.scores, turned[0])
        attention = 2 * 2.0 * 64 * 128 * 128 * 64 / small
        heads, states, scores, wide = (4.0 * x[0].size for x in (self.heads, self.states, self.scores, self.wide))
        kernels = {
            "stream": (3 * heads, each(lambda x, y: x + y, self.heads, self.keys)),
            "broadcast": (
                2 * (heads + states + scores),
                each(lambda x: x * self.angles, self.heads)
                + each(lambda x: self.row * x, self.states)
                + each(lambda x: x + self.mask, self.scores),
            ),
            "reduction": (
                states + 3 * scores,
                each(lambda x: x.mean(-1, keepdim=True), self.states)
                + each(lambda x: x.max(-1, keepdim=True), self.scores)
                + each(lambda x: x - x[..., :1], self.scores),
            ),
            "power": (2 * states, each(lambda x: x.pow(2), self.states)),
            "exponential": (
                2 * (wide + scores),
                each(self.silu, self.wide) + each(lambda x: self.softmax(x, axis=-1), self.scores),
            ),
            "turn": (4 * heads, each(lambda x: x / 8.0, turned[0]) + each(lambda x: x.reshape([8, 8, -1]), turned[0])),
            "pad": (1.5 * heads, each(lambda x: self.pad(x[..., :32], [0, 0, 0, 0, 0, 0, 32, 0]), self.heads)),
            "fold": (6 * states, self.folding()),
            "far": (3 * 4.0 * self.far[0].size, mean(lambda: paddle.add(*self.far), 2)),
        }
        rates = {kind: moved / spent / 1e9 for kind, (moved, spent) in kernels.items()}
        return replace(
            base,
            tflops=gemm / 1e12,
            tflops_float32=gemm / 1e12,
            attention_efficiency=attention / gemm,
            bandwidth=rates["stream"],
            kernels=rates,
            launch=launch,
        )

    def folding(self) -> float:
        """Seconds of the gradients of a product with a number per row and of one with a row of weights."""
        paddle = self.paddle
        with paddle.enable_grad():
            weight, row = self.weight, self.row
            weight.stop_gradient = row.stop_gradient = False
            states = [x.detach() for x in self.states]
            for x in states:
                x.stop_gradient = False
            products = [row * x for x in states], [x * weight for x in states]

            def gradients(y: Any, z: Any, x: Any) -> Any:
                return (
                    paddle.grad(y, [row, x], x, retain_graph=True),
                    paddle.grad(z, [weight, x], x, retain_graph=True),
                )

            return each(gradients, *products, states)


def each(function: Callable[..., Any], *tensors: list[Any]) -> float:
    """Seconds of one of several calls, whose results are kept until the last; on average."""
    return mean(lambda: [function(*row) for row in zip(*tensors, strict=True)], 3) / COPIES


def build(options: argparse.Namespace) -> tuple[Any, Setting]:
    """The model (random weights) and the plan's setting of it."""
    import paddle
    from paddlenlp.transformers import Qwen2Config, Qwen2ForCausalLM

    paddle.set_device("cpu")
    config = Qwen2Config(
        vocab_size=8192,
        hidden_size=options.hidden,
        intermediate_size=int(options.hidden * 2.75),
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=options.tokens,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config)
    shape = shape_of_config(config.to_dict(), "the model")
    answer = options.tokens // 2
    setting = Setting(
        stage="ppo",
        roles=(RolePlan("actor", shape, "lm", True),),
        topology=Topology(),
        item=4,
        micro_rows=options.rows,
        prompt_tokens=options.tokens - answer,
        response_tokens=answer,
        mean_prompt=options.tokens - answer,
        mean_response=answer,
        samples=options.rows,
        rollout_rows=options.rows,
        infer_rows=options.rows,
    )
    return model, setting


def passes(model: Any, setting: Setting) -> dict[str, Callable[[], None]]:
    """What is measured, by name: functions that do it once."""
    import numpy as np

    from alignment.parallel import init_world
    from alignment.ppo.engine import Engine, OptimizerSettings
    from alignment.ppo.roles import PolicyRole
    from alignment.ppo.rollout import Rollout

    engine = Engine("actor", model, init_world(), OptimizerSettings(1e-4))
    role = PolicyRole(engine, 1.0, setting.infer_rows)
    rows, width = setting.micro_rows, setting.width
    draw = np.random.default_rng(0)
    rollout = Rollout(
        tokens=draw.integers(0, 8192, [rows, width]),
        prompt_len=np.full(rows, setting.prompt_tokens),
        response_len=np.full(rows, setting.response_tokens),
        finished=np.zeros(rows, dtype=bool),
        logprobs=np.zeros([rows, setting.response_tokens], dtype=np.float32),
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
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds (default 5)")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    with runtime.quiet_import():
        model, setting = build(options)
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
                1e3 * statistics.median(card.tflops * card.attention_efficiency for card in cards), 1
            ),
            "kernels_gb_per_s": {
                kind: round(statistics.median(card.kernels[kind] for card in cards), 2) for kind in cards[0].kernels
            },
            "launch_us": round(1e6 * statistics.median(card.launch for card in cards), 2),
        },
    }
    print(table(result), file=sys.stderr)
    print(json.dumps(result))
    return 0


def middle(first: Card, second: Card) -> Card:
    """Rates between those before and behind a measurement: the means of the times that they stand for."""

    def between(a: float, b: float) -> float:
        return 2 / (1 / a + 1 / b)

    gemm = between(first.tflops, second.tflops)
    attention = between(first.tflops * first.attention_efficiency, second.tflops * second.attention_efficiency)
    return replace(
        first,
        tflops=gemm,
        tflops_float32=gemm,
        attention_efficiency=attention / gemm,
        bandwidth=between(first.bandwidth, second.bandwidth),
        kernels={kind: between(rate, second.kernels[kind]) for kind, rate in first.kernels.items()},
        launch=(first.launch + second.launch) / 2,
    )


def table(result: dict[str, Any]) -> str:
    lines = [f"{'':<18}{'predicted':>12}{'measured':>12}{'ratio':>8}"]
    for name, ratio in result["ratio"].items():
        row = result["seconds"][name]
        lines.append(f"{name:<18}{row['predicted']:>10.3f} s{row['measured']:>10.3f} s{ratio:>8.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
