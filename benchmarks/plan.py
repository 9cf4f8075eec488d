"""How far the plan's roofline is from what this machine takes, on the card ``cpu`` with this process's own peak.

Training passes, optimizer steps, forwards without gradient and rollouts of a mid-size model of random weights, each
timed between two measurements of a large product; the ratios' medians are printed: a table to standard error and one
JSON line to standard output. Some twenty seconds.

    python benchmarks/plan.py [--hidden 512] [--layers 8] [--rows 8] [--tokens 128] [--vocab 8192] [--top_p 1.0]
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
from alignment.flow.flow import Call, Flow
from alignment.parallel.topology import Topology
from alignment.plan.cards import card_named
from alignment.plan.roofline import times_of
from alignment.plan.setting import RolePlan, Setting
from alignment.plan.shapes import shape_of_config
from tests.plan.plan_jobs import Tokenizer, rollout

#: What is measured, as the graph that is planned.
MEASURED = Flow(
    [
        Call("rollout", "generate", ("actor",), ("prompts",), "rollout"),
        Call("forward", "infer", ("actor",), ("rollout",), "logprobs"),
        Call("training pass and optimizer step", "train", ("actor",), ("logprobs",), "stats"),
    ],
    inputs=("prompts",),
)


def model_and_setting(options: argparse.Namespace) -> tuple[Any, Setting]:
    """A model (random weights) and the plan's setting of it."""
    import paddle
    from paddlenlp.transformers import Qwen2Config, Qwen2ForCausalLM

    paddle.set_device("cpu")
    config = Qwen2Config(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=int(options.hidden * 2.75),
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=options.tokens,
        tie_word_embeddings=False,
    )
    actor = RolePlan("actor", shape_of_config(config.to_dict(), "the model"), "lm", True)
    half = options.tokens // 2
    sizes = {"prompt_tokens": half, "response_tokens": half, "mean_prompt": half, "mean_response": half}
    rows = {"micro_rows": options.rows, "infer_rows": options.rows, "samples": options.rows}
    return Qwen2ForCausalLM(config), Setting(
        "ppo", (actor,), Topology(), item=4, kernels=True, calls=MEASURED, **sizes, **rows
    )


def passes(model: Any, setting: Setting, top_p: float) -> dict[str, Callable[[], Any]]:
    """What is measured, by name: functions that do it once."""
    import numpy as np

    from alignment.engine.engine import Engine, OptimizerSettings
    from alignment.parallel import init_world
    from alignment.rollout.generate import GenerationEngine, GenerationPrompt
    from alignment.rollout.roles import PolicyRole
    from alignment.rollout.sampler import SamplingSettings

    engine = Engine("actor", model, init_world(), OptimizerSettings(1e-4))
    role, rows, new = PolicyRole(engine, 1.0, setting.infer_rows), setting.micro_rows, setting.response_tokens
    batch = rollout(rows, setting.prompt_tokens, new)
    generator = GenerationEngine(model, Tokenizer(), [0], None, rows)
    how = SamplingSettings(max_new_tokens=new, min_new_tokens=new, seed=1, top_p=top_p)
    prompts = [GenerationPrompt(np.arange(1, setting.prompt_tokens + 1), i, "", {}) for i in range(rows)]

    def train() -> None:
        role.train([batch], lambda logprobs, entropy, part: (-logprobs.mean(), None))
        engine.step()

    train()
    return {
        "training pass and optimizer step": train,
        "forward": lambda: role.logprobs(batch),
        "rollout": lambda: generator.generate(prompts, how),
    }


def peak() -> float:
    """10^12 FLOPs per second of a large product by the kernels."""
    import paddle

    from alignment.kernels.ops import kernels

    found = kernels()
    if found is None:
        raise SystemExit("the CPU kernels cannot be had here, and the plan takes it that a CPU has them")
    left, right = paddle.rand([1024, 512]), paddle.rand([512, 4096])
    found.project(left, right, tied=False)
    began = time.perf_counter()
    for _ in range(5):
        found.project(left, right, tied=False)
    return 5 * 2.0 * left.size * right.shape[1] / (time.perf_counter() - began) / 1e12


def predicted(setting: Setting, tflops: float) -> dict[str, float]:
    """The plan's seconds of the same."""
    card = card_named("cpu", {"tflops": tflops})
    return {time.phase: time.seconds for time in times_of(setting, card)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"rounds": 3, "hidden": 512, "layers": 8, "rows": 8, "tokens": 128, "vocab": 8192}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--top_p", type=float, default=1.0, help="below 1: only the most probable tokens (default 1)")
    options = parser.parse_args()
    with runtime.quiet_import():
        model, setting = model_and_setting(options)
    functions = passes(model, setting, options.top_p)
    ratios: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(options.rounds):
        for name, function in functions.items():
            before = peak()
            began = time.perf_counter()
            function()
            took = time.perf_counter() - began
            ratios[name].append(predicted(setting, (before + peak()) / 2)[name] / took)
    medians = {name: round(statistics.median(values), 2) for name, values in ratios.items()}
    print("\n".join(f"{name:<34}{ratio:>6.2f}" for name, ratio in medians.items()), file=sys.stderr)
    print(json.dumps({"benchmark": "plan", "sizes": vars(options), "predicted / measured": medians}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
