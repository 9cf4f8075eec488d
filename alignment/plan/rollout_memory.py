"""A rollout: the cache's size, how many answers are under way, and bytes.

The rollout engine (:mod:`alignment.rollout.continuous`) has a cache of a fixed number of tokens, in which a prompt
has one region however many answers it gets, and takes waiting answers in as others end. Where it cannot be used (see
:attr:`Setting.engine_generates`) the plain path lets batches of answers grow together in paddlenlp's own cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from alignment.parallel.topology import Topology, layers_of_stage
from alignment.plan.activations import GROWING, cache_bytes, layer_kind, stack_buffers
from alignment.plan.setting import Setting
from alignment.rollout.arena import BLOCK, rounded

#: Regions of the cache begin at multiples of so many tokens on a GPU: ``BLOCK`` of rollout/gpu_operators.py.
GPU_BLOCK = 64


@dataclass(frozen=True)
class RolloutPlan:
    """How one process generates.

    Attributes:
        prompts: that it answers in all.
        copies: answers to each.
        rows: answers that are under way at once.
        tokens: that the engine's cache holds; 0 on the plain path.
    """

    prompts: int
    copies: int
    rows: int
    tokens: int

    @property
    def answers(self) -> int:
        """In all."""
        return self.prompts * self.copies

    @property
    def rounds(self) -> float:
        """How often each place of the batch is filled."""
        return self.answers / self.rows

    @property
    def prompts_at_once(self) -> int:
        """Prompts that are read together at first."""
        return min(self.prompts, -(-self.rows // self.copies))


def rollout_of(setting: Setting, layout: Topology, shares: int) -> RolloutPlan:
    """How a process generates, its rows at their limits; what a cache has room for follows.

    Args:
        setting: the run.
        layout: that generates.
        shares: among how many processes a data rank's prompts are divided.
    """
    copies = setting.answers_per_prompt
    prompts = max(1, -(-setting.samples // copies // shares))
    answers = prompts * copies
    most = min(answers, setting.rollout_rows or answers)
    if not setting.engine_generates:
        per_batch = max(1, (setting.rollout_rows or setting.micro_rows) // copies)
        return RolloutPlan(prompts, copies, min(answers, per_batch * copies), 0)
    block = BLOCK if setting.kernels else GPU_BLOCK
    own, prompt = rounded(setting.response_tokens, block), rounded(setting.prompt_tokens, block)
    actor = setting.role("actor")
    assert actor is not None
    per_token = setting.readers * cache_bytes(actor.shape, actor.shape.layers, 1, 1, setting.item, layout.tensor)
    budget = setting.token_budget or int(setting.cache_bytes // per_token)
    tokens = min(answers * own + prompts * prompt, max(rounded(budget, block), own + prompt))
    # Whole groups of a prompt and its answers, and answers of one more prompt.
    groups, left = divmod(tokens, prompt + copies * own)
    room = groups * copies + min(copies - 1, max(0, left - prompt) // own)
    return RolloutPlan(prompts, copies, max(1, min(most, room)), tokens)


def rollout_memory(setting: Setting, layout: Topology, shares: int) -> dict[str, float]:
    """Bytes that a rollout adds: cache, activations and the kernels' buffers, at their limits."""
    actor = setting.role("actor")
    assert actor is not None
    shape, item, readers = actor.shape, setting.item, setting.readers
    plan = rollout_of(setting, layout, shares)
    # On a GPU the engine's attention is a fused operator whatever the training's is.
    layer = layer_kind(shape, item, layout.tensor, flash=setting.flash or setting.engine_generates)
    read = plan.prompts_at_once * setting.prompt_tokens
    logits = readers * plan.rows * shape.vocab * (item + 4.0) if layout.last_stage else 0.0
    if not setting.engine_generates:
        return _plain_memory(setting, layout, plan, read * layer.running(setting.prompt_tokens), logits)
    cache = readers * cache_bytes(shape, shape.layers, 1, plan.tokens, item, layout.tensor)
    if not setting.kernels:
        return {"kv_cache": cache, "activations": max(read * layer.running(setting.prompt_tokens), logits)}
    # Input, output; between tensor ranks also what a half adds, and the sum.
    states = 4.0 * shape.hidden * (2 if layout.tensor == 1 else 3)
    logits = readers * 4.0 * plan.rows * shape.vocab * (1 if layout.tensor == 1 else 2)
    buffers = stack_buffers(shape, max(read, plan.rows), max(setting.prompt_tokens, plan.rows), layout.tensor)
    return {"kv_cache": cache, "activations": max(read * states, logits), "buffers": buffers}


def _plain_memory(
    setting: Setting, layout: Topology, plan: RolloutPlan, reading: float, logits: float
) -> dict[str, float]:
    """Caches of the answers that are generated together, and one layer of the prefill or a step's logits."""
    actor = setting.role("actor")
    assert actor is not None
    shape, item, tokens = actor.shape, setting.item, setting.prompt_tokens + setting.response_tokens
    layers = len(layers_of_stage(shape.layers, layout.pipeline, layout.stage))
    cache = setting.readers * cache_bytes(shape, layers, plan.rows, tokens, item, layout.tensor)
    read = setting.readers * cache_bytes(
        shape, layers, plan.prompts_at_once, setting.prompt_tokens, item, layout.tensor
    )
    # One token behind the cache: keys and values of one layer, repeated to all heads, and one of them turned.
    repeated = 0.0 if setting.flash else 3.0 * plan.rows * tokens * shape.query / layout.tensor * item
    if reading + read > GROWING * cache + repeated + logits:
        return {"kv_cache": read, "activations": reading}
    return {"kv_cache": GROWING * cache, "activations": repeated + logits}
