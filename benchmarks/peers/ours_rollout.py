"""Our side of the rollout: the generation engine on a model folder, as PPO uses it. Prints one JSON line.

Task: ``workload``, ``folder`` (with ``actor/``), ``runs`` (``{"batch", "lengths": "fixed" | "varying"}`` or ``{"batch",
"new_tokens"}`` for the engine's growth), ``arguments`` (further ones of :class:`GenerationEngine`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from alignment import runtime
from benchmarks.peers import measure
from benchmarks.peers.measure import require
from benchmarks.peers.workloads import EOS_ID, WORKLOADS, Workload, prompt_ids, prompt_texts, response_lengths


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Load the actor and time each run after a short one that warms up."""
    with runtime.quiet_import():
        import paddle
    paddle.set_device("cpu")
    from alignment.ppo.models import load_causal_lm, load_tokenizer, model_context_length
    from alignment.rollout.generate import GenerationEngine

    w, folder = WORKLOADS[task["workload"]], Path(task["folder"]) / "actor"
    model = load_causal_lm(str(folder), role="actor")
    require(all(p.dtype == paddle.float32 for p in model.parameters()), "the weights are not float32")
    tokenizer, context = load_tokenizer(folder), model_context_length(str(folder))
    engines: dict[int, Any] = {}
    results = []
    for wanted in task["runs"]:
        batch = wanted["batch"]
        if batch not in engines:
            engines[batch] = GenerationEngine(model, tokenizer, (EOS_ID,), context, batch, **task["arguments"])
        results.append({**wanted, **one(engines[batch], w, wanted)})
    return {
        "runs": results,
        "parameters": sum(int(p.size) for p in model.parameters()),
        "peak_bytes": measure.peak_memory(),
        "versions": measure.versions("paddlepaddle", "paddlenlp", "numpy"),
        "runtime": runtime.describe(),
    }


def one(engine: Any, w: Workload, wanted: dict[str, Any]) -> dict[str, Any]:
    """Seconds and response tokens of one run; ``seconds`` is None where this engine cannot do it."""
    from alignment.rollout.generate import GenerationPrompt
    from alignment.rollout.sampler import SamplingSettings

    longest = wanted.get("new_tokens", w.new_tokens)
    growth = "new_tokens" in wanted
    count = wanted["batch"] if growth else w.prompts
    texts = prompt_texts(w, max(count, w.prompts))[:count]
    limits: list[int] | None = None
    if wanted.get("lengths") == "varying":
        limits = response_lengths(w, count)
        if "max_new_tokens" not in {field.name for field in dataclasses.fields(GenerationPrompt)}:
            return {"seconds": None, "tokens": None, "why": "GenerationPrompt has no max_new_tokens of its own"}
    prompts = []
    for i, text in enumerate(texts):
        more = {} if limits is None else {"max_new_tokens": limits[i]}
        prompts.append(GenerationPrompt(prompt_ids_of(text), i, text, {}, **more))
    settings = SamplingSettings(max_new_tokens=longest, min_new_tokens=longest, temperature=1.0, top_k=0, top_p=1.0)
    engine.generate(prompts[: wanted["batch"]], dataclasses.replace(settings, max_new_tokens=4, min_new_tokens=4))
    seconds, rollout = measure.seconds_of(lambda: engine.generate(prompts, settings))
    expected = [longest] * count if limits is None else limits
    require(rollout.response_len.tolist() == expected, f"responses of {rollout.response_len.tolist()}")
    require(rollout.prompt_len.tolist() == [len(prompt.input_ids) for prompt in prompts], "other prompts")
    vocabulary = int(engine.model.config.vocab_size)
    require(bool((rollout.tokens >= 0).all() and (rollout.tokens < vocabulary).all()), "tokens of no vocabulary")
    return {"seconds": seconds, "tokens": int(rollout.response_len.sum())}


def prompt_ids_of(text: str) -> Any:
    """Token ids of a prompt as the engine takes them."""
    import numpy as np

    return np.asarray(prompt_ids(text), dtype=np.int64)


if __name__ == "__main__":
    measure.answer(run)
