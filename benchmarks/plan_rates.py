"""The rates of a plan's card on this machine, by micro-benchmarks that know nothing of the models that are planned, and
the small things that :mod:`benchmarks.plan` measures with them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from alignment.parallel.topology import Topology
from alignment.plan import work
from alignment.plan.hardware import Card
from alignment.plan.rollout_memory import rollout_of, rollout_ops
from alignment.plan.setting import RolePlan, Setting
from alignment.plan.shapes import shape_of_config

COPIES = 6
FAR = 16 << 20  # numbers of a tensor that no cache holds
FEW = 8  # rows of a decoding step


def mean(function: Callable[[], Any], repeats: int) -> float:
    """Seconds of a run, on average: on a busy machine the best would be faster than what a model meets."""
    function()
    began = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - began) / repeats


class Calibration:
    """The operators that the rates are read from; made once, timed in every round.

    Paddle's operators go over several tensors and keep their results, so that they meet cold memory as in a model.
    """

    def __init__(self) -> None:
        import paddle

        def draw(*shape: int) -> list[Any]:
            return [paddle.rand(list(shape)) for _ in range(COPIES)]

        self.paddle = paddle
        self.kernels = KernelRates(paddle)
        self.step = StepRate(paddle)
        self.states, self.others, self.row = draw(8, 128, 512), draw(8, 128, 512), paddle.rand([8, 128, 1])
        self.far = paddle.rand([FAR]), paddle.rand([FAR])
        self.small, self.weight = paddle.rand([8]), paddle.rand([512])
        self.updated = [paddle.create_parameter([512, 1024], "float32") for _ in range(COPIES)]
        for parameter in self.updated:
            parameter.grad = paddle.rand(parameter.shape)
        self.optimizer = paddle.optimizer.AdamW(1e-4, parameters=self.updated)

    def card(self, base: Card) -> Card:
        """``base`` with the rates of this moment."""
        with self.paddle.no_grad():
            return self._card(base)

    def _card(self, base: Card) -> Card:
        from alignment.engine.optimizer import global_norm

        paddle = self.paddle
        launch = mean(lambda: [self.small + self.small for _ in range(50)], 3) / 50
        states = 4.0 * self.states[0].size
        updated = sum(float(parameter.size) for parameter in self.updated)
        gemm, causal = self.kernels.products()
        kernels = {
            "stream": (3 * states, each(lambda x, y: x + y, self.states, self.others)),
            "broadcast": (2 * states, each(lambda x: self.row * x, self.states)),
            "reduction": (states, each(lambda x: x.mean(-1, keepdim=True), self.states)),
            "power": (2 * states, each(lambda x: x.pow(2), self.states)),
            "fold": (6 * states, self.folding()),
            "far": (3 * 4.0 * self.far[0].size, mean(lambda: paddle.add(*self.far), 2)),
            "adamw": (28 * updated, mean(self.optimizer_step, 2)),
            "squares": (4 * updated, mean(lambda: global_norm(self.updated), 2)),
            **self.kernels.moved(gemm),
        }
        rates = {kind: moved / spent / 1e9 for kind, (moved, spent) in kernels.items()}
        found = replace(
            base,
            tflops=gemm / 1e12,
            tflops_float32=gemm / 1e12,
            kernel_efficiency=1.0,
            causal_efficiency=causal / gemm,
            bandwidth=rates["far"],
            kernels={**base.kernels, **rates},
            launch=launch,
            step=0.0,
        )
        return replace(found, step=self.step.seconds(found))

    def optimizer_step(self) -> None:
        """One step of AdamW as an engine takes it, without the gradient norm."""
        from alignment.engine.optimizer import OptimizerSettings, adamw_step

        adamw_step(self.optimizer, self.updated, OptimizerSettings(1e-4), 1e-4, 0.5)

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


class KernelRates:
    """Rates of the CPU kernels, each by a call in which nothing else takes time."""

    def __init__(self, paddle: Any) -> None:
        import numpy as np

        from alignment.kernels.ops import ATTENTION, MLP, LayerShape, kernels

        found = kernels()
        if found is None:
            raise SystemExit("the CPU kernels cannot be had here, and the plan takes it that a CPU has them")
        self.call, self.paddle, self.parts = found, paddle, (ATTENTION, MLP)
        self.left, self.right = paddle.rand([1024, 512]), paddle.rand([512, 4096])
        # Read from far memory, as a model's are by a decoding step; wide and narrow ones.
        shapes = [(512, 1408)] * 12 + [(1408, 512)] * 12 + [(512, 8192)] * 3
        self.weights = [(paddle.rand([FEW, k]), paddle.rand([k, n])) for k, n in shapes]
        self.logits, self.uniforms = paddle.randn([16, 8192]), paddle.rand([16], dtype="float64")
        self.nothing, self.marks = paddle.empty([0]), paddle.empty([0], dtype="uint8")
        self.banned = paddle.zeros([16], dtype="uint8")
        self.states, self.head = paddle.rand([512, 8]), paddle.rand([8, 8192])
        self.head_block, self.labels = paddle.rand([8, 1024]), paddle.zeros([512], dtype="int64")
        # A layer that is all attention, and one that is all gate: nothing is multiplied with wide matrices.
        self.narrow, self.rows, self.length, self.wide = 16, 8, 256, 2048
        self.shape = LayerShape(self.narrow, self.wide, 8, 4, 64, 0, 0, 1e-6, 0.0, False)
        self.tokens = paddle.rand([self.rows * self.length, self.narrow])
        sizes = ((16,), (16, 512), (16, 256), (16, 256), (512, 16), (16,), (16, 2048), (16, 2048), (2048, 16))
        self.middle = paddle.rand([self.rows * self.length, self.wide])
        self.layer = [paddle.rand(list(size)) for size in sizes]
        self.angles = paddle.rand([512, 32]), paddle.rand([512, 32])
        positions, starts = np.tile(np.arange(self.length), self.rows), np.arange(self.rows + 1) * self.length
        nowhere = np.full(len(positions), -1)
        self.packed = paddle.to_tensor(np.concatenate([positions, nowhere, starts]))
        at = np.arange(self.rows) * self.length
        half = np.full(self.rows, self.length // 2)
        spans = np.stack([at, half, at + half, half], axis=1)
        last = np.full(self.rows, self.length - 1)
        self.cached = paddle.to_tensor(np.concatenate([last, at + last, spans.reshape(-1)]))
        # As many layers as make a cache that does not stay near the cores.
        self.caches = paddle.rand([COPIES, 2, self.rows * self.length, 256])

    def products(self) -> tuple[float, float]:
        """FLOPs per second of large products, and of causal attention."""
        flops = 2.0 * self.left.shape[0] * self.left.shape[1] * self.right.shape[1]
        gemm = flops / mean(lambda: self.call.project(self.left, self.right, tied=False), 3)
        spent = mean(lambda: self._stack(self.tokens, self.packed, self.parts[0], self.nothing), 2)
        around = 2.0 * self.tokens.shape[0] * self.narrow * 2 * (512 + 256) / gemm
        return gemm, 2.0 * self.rows * self.length**2 * 512 / (spent - around)

    def moved(self, gemm: float) -> dict[str, tuple[float, float]]:
        """``{kind: (bytes, seconds)}``, see :mod:`alignment.plan.kernels`; ``gemm`` as :meth:`products` gives it."""
        call, numbers, labels = self.call, 4.0 * self.logits.size, 4.0 * 512 * 8192
        scores, entropy, norm, _ = call.label_logprobs(
            self.states, self.head, self.labels, 1.0, tied=False, entropy=True
        )
        behind = (self.states, self.head, self.labels, norm, entropy, (scores, None), 1.0)
        one = self.tokens[: self.rows]
        reading = sum(4.0 * weight.size for _, weight in self.weights)
        # A product takes as long as reading its weights and computing: what is not computing is reading.
        product = mean(lambda: [call.project(rows, weight, tied=False) for rows, weight in self.weights], 2)

        # What else those calls do: narrow products, which take longer than their FLOPs do in a wide one.
        up, down = self.layer[6], self.layer[8]
        half = self.tokens.shape[0] // 2  # tokens of a group
        gates = [(self.tokens[:half], up), (self.tokens[:half], up), (self.middle[:half], down)] * 2
        block = [(self.states, self.head_block)] * 8

        def gate() -> Any:
            return self._stack(self.tokens, self.packed, self.parts[1], self.nothing)

        def score() -> Any:
            return call.label_logprobs(self.states, self.head, self.labels, 1.0, tied=False, entropy=True)

        def decode() -> None:
            for layer in range(COPIES):
                self._stack(one, self.cached, self.parts[0], self.caches, layer)

        return {
            "weights": (reading, max(0.2 * product, product - 2.0 * FEW * reading / 4 / gemm)),
            "normed": (
                2 * 4.0 * self.left.size,
                mean(lambda: call.rms_norm(self.left, self.layer_norm, self.shape), 3),
            ),
            "gate": (3 * 4.0 * self.tokens.shape[0] * self.wide, self._without(gate, gates)),
            "cache": (COPIES * 2 * 4.0 * self.rows * self.length * 256, mean(decode, 3)),
            "scan": (labels, self._without(score, block)),
            "slope": (
                labels,
                self._without(lambda: call.label_logprobs_backward(*behind, tied=False), block * 3),
            ),
            "choice": (numbers, mean(lambda: self._choose(1.0), 2)),
            "nucleus": (numbers, mean(lambda: self._choose(0.8), 2)),
        }

    @functools.cached_property
    def layer_norm(self) -> Any:
        """Of the width of ``left``."""
        return self.paddle.rand([self.left.shape[1]])

    def _without(self, function: Callable[[], Any], products: list[tuple[Any, Any]]) -> float:
        """Seconds of a call without those of products that it makes; at least a tenth of its own."""
        whole = mean(function, 2)

        def narrow() -> None:
            for left, right in products:
                self.call.project(left, right, tied=False)  # each result gives its place to the next

        part = mean(narrow, 2)
        return max(0.1 * whole, whole - part)

    def _stack(self, x: Any, plan: Any, part: int, cache: Any, layer: int = 0) -> Any:
        cached = plan is self.cached
        return self.call.stack(
            x,
            self.layer,
            self.angles,
            cache,
            plan,
            self.shape,
            0 if cached else self.rows,
            cached=cached,
            part=part,
            first_layer=layer,
        )

    def _choose(self, top_p: float) -> Any:
        how = {"temperature": 1.0, "top_k": 0, "top_p": top_p, "penalty": 1.0, "greedy": False, "banned_ids": [0]}
        return self.call.choose(self.logits, self.uniforms, self.marks, self.banned, **how)


class StepRate:
    """What a decoding step takes on the host: that of a model which is next to nothing."""

    ROWS, NEW = 8, 32

    def __init__(self, paddle: Any) -> None:
        self.model, self.setting = small_model(
            vocab=32, hidden=16, intermediate=16, layers=1, heads=1, keys=1, rows=self.ROWS, tokens=2 * self.NEW
        )
        self.generate = rollouts(self.model, self.setting)

    def seconds(self, card: Card) -> float:
        """Of one step, without what a plan counts anyway; ``card`` has the rates."""
        spent = mean(self.generate, 1)
        return max(0.0, (spent - rollout_seconds(self.setting, card)) / self.NEW)


def each(function: Callable[..., Any], *tensors: list[Any]) -> float:
    """Seconds of one of several calls, whose results are kept until the last; on average."""
    return mean(lambda: [function(*row) for row in zip(*tensors, strict=True)], 3) / COPIES


def small_model(
    *,
    vocab: int,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    keys: int,
    rows: int,
    tokens: int,
    nucleus: bool = False,
) -> tuple[Any, Setting]:
    """A model (random weights) and the plan's setting of it."""
    import paddle
    from paddlenlp.transformers import Qwen2Config, Qwen2ForCausalLM

    paddle.set_device("cpu")
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        max_position_embeddings=tokens,
        tie_word_embeddings=False,
    )
    shape = shape_of_config(config.to_dict(), "the model")
    answer = tokens // 2
    setting = Setting(
        stage="ppo",
        roles=(RolePlan("actor", shape, "lm", True),),
        topology=Topology(),
        item=4,
        micro_rows=rows,
        prompt_tokens=tokens - answer,
        response_tokens=answer,
        mean_prompt=tokens - answer,
        mean_response=answer,
        samples=rows,
        infer_rows=rows,
        nucleus=nucleus,
        kernels=True,
    )
    return Qwen2ForCausalLM(config), setting


class Tokenizer:
    """As much of a tokenizer as generation asks for."""

    pad_token_id = 0

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


def rollouts(model: Any, setting: Setting) -> Callable[[], None]:
    """A function that answers ``samples`` prompts at full length."""
    import numpy as np

    from alignment.rollout.generate import GenerationEngine, GenerationPrompt
    from alignment.rollout.sampler import SamplingSettings

    engine = GenerationEngine(model, Tokenizer(), [0], None, setting.samples)
    draw = np.random.default_rng(0)
    vocab = setting.roles[0].shape.vocab
    prompts = [
        GenerationPrompt(draw.integers(1, vocab, setting.prompt_tokens), i, "", {}) for i in range(setting.samples)
    ]
    new = setting.response_tokens
    settings = SamplingSettings(max_new_tokens=new, min_new_tokens=new, seed=1, top_p=0.8 if setting.nucleus else 1.0)

    def run() -> None:
        engine.generate(prompts, settings)

    return run


def rollout_seconds(setting: Setting, card: Card) -> float:
    """The plan's seconds of the same."""
    plan = rollout_of(setting, setting.topology, 1)
    ops = rollout_ops(setting, setting.topology, plan, setting.roles[0].shape.layers)
    return work.seconds(ops, card, 4) + plan.rounds * setting.mean_response * card.step


def middle(first: Card, second: Card) -> Card:
    """Rates between those before and behind a measurement: the means of the times that they stand for."""

    def between(a: float, b: float) -> float:
        return 2 / (1 / a + 1 / b)

    gemm = between(first.tflops, second.tflops)
    attention = between(first.tflops * first.causal_efficiency, second.tflops * second.causal_efficiency)
    return replace(
        first,
        tflops=gemm,
        tflops_float32=gemm,
        causal_efficiency=attention / gemm,
        bandwidth=between(first.bandwidth, second.bandwidth),
        kernels={kind: between(rate, second.kernels[kind]) for kind, rate in first.kernels.items()},
        launch=(first.launch + second.launch) / 2,
        step=(first.step + second.step) / 2,
    )
