"""Our side of a GRPO iteration: the loop that ``alignment grpo`` runs, driven in this process. Prints one JSON line.

Task: ``workload``, ``folder`` (with ``actor/``), ``output``, ``iterations`` (the first is not counted), ``arguments``
(further ones of GRPO). What is timed is ``Loop.iterate``: prompts, 8 answers to each, rewards, log-probs, one update.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from benchmarks.peers import measure
from benchmarks.peers.measure import require
from benchmarks.peers.models import common_arguments, write_jsonl
from benchmarks.peers.workloads import ANSWERS, WORKLOADS, Workload, parameters, prompt_lengths, prompt_texts

REWARD = Path(__file__).with_name("rewards.py")


def arguments(w: Workload, folder: Path, output: Path, iterations: int) -> dict[str, Any]:
    """Everything at the peer's settings: one pass, one optimizer step per iteration, no clipping of gradients."""
    prompts = [{"prompt": text} for text in prompt_texts(w, w.prompts // ANSWERS * iterations)]
    return {
        **common_arguments(output),
        "train_datasets": f"jsonl::{write_jsonl(output.with_suffix('.jsonl'), prompts)}",
        "actor_model_name_or_path": str(folder / "actor"),
        "reward": f"{REWARD}:variety",
        "max_src_len": w.longest_prompt,
        "max_dec_len": w.new_tokens,
        "min_dec_len": w.new_tokens,
        "temperature": 1.0,
        "top_p": 1.0,
        "num_return_sequences": ANSWERS,
        "per_device_prompt_batch_size": w.prompts // ANSWERS,
        "rollout_logprob_batch_size": w.micro_batch,
        "per_device_train_batch_size": w.micro_batch,
        "gradient_accumulation_steps": w.prompts // w.micro_batch,
        "update_iters": 1,
        "max_steps": iterations,
        "max_grad_norm": 0.0,
        "compat": "trl0.24",
        "recompute": False,
    }


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Run the iterations, check that they did the work that is compared, and return the figures."""
    from alignment.arguments import parse
    from alignment.flow.online_run import build_loop, load_data
    from alignment.flow.runner import use_device
    from alignment.methods import arguments_of
    from alignment.methods.grpo import GRPO
    from alignment.parallel import init_world

    w, folder, output = WORKLOADS[task["workload"]], Path(task["folder"]), Path(task["output"])
    iterations = task["iterations"]
    file = output.with_suffix(".json")
    output.mkdir(parents=True)
    file.write_text(json.dumps({**arguments(w, folder, output, iterations), **task["arguments"]}))
    args = parse(arguments_of(GRPO), [str(file)])
    use_device(args)
    method = GRPO(args)
    data = load_data(method, show_progress=False)
    imported = measure.resident_memory()
    loop = build_loop(method, init_world(), data, args.derive_sizes(len(data.train)), [])
    require(set(loop.roles) == {"actor"}, f"models {', '.join(loop.roles)}")
    engine = loop.roles["actor"].engine
    count = sum(int(p.size) for p in engine.model.parameters())
    require(count == parameters(w, "language"), f"the actor has {count} parameters")
    before, loaded = engine.parameter_fingerprints(), measure.resident_memory()

    seconds: list[float] = []
    peaks: list[int] = []
    iterate = loop.iterate

    def timed() -> None:
        began = time.perf_counter()
        iterate()
        seconds.append(time.perf_counter() - began)
        peaks.append(measure.peak_memory())

    loop.iterate = timed
    require(loop.train() == 0, "the run failed")
    require(len(seconds) == iterations, f"{len(seconds)} iterations")
    after = engine.parameter_fingerprints()
    moved = {key for key in after if after[key] != before[key]}
    require(moved == set(after), f"{len(moved)} of {len(after)} tensors moved")
    require(engine.steps == iterations, f"{engine.steps} optimizer steps")
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    require(len(rows) == iterations, f"{len(rows)} rows of metrics")
    phases = [key for key in rows[-1] if key.startswith("time/") and key.endswith("_seconds")]
    for row in rows:
        require(row["train/mean_generated_length"] == w.new_tokens, "responses of another length")
        require(row["train/max_generated_length"] == w.new_tokens, "responses of another length")
        row["tokens"] = round(row["tokens_per_second/update"] * row["time/update_seconds"])
    lengths = prompt_lengths(w, w.prompts // ANSWERS * iterations)
    expected = ANSWERS * (sum(lengths) + len(lengths) * w.new_tokens)
    require(sum(row["tokens"] for row in rows) == expected, f"{[row['tokens'] for row in rows]} tokens, not {expected}")
    return {
        "seconds": seconds[1:],
        "first_seconds": seconds[0],
        "peak_bytes": peaks[-1],
        "imported_bytes": imported,
        "loaded_bytes": loaded,
        "optimizer_steps": iterations,
        "trained_parameters": parameters(w, "language"),
        "rows": w.prompts,
        "phases": {key[5:-8]: [row[key] for row in rows[1:]] for key in phases},
        "versions": measure.versions("paddlepaddle", "paddlenlp", "numpy"),
    }


if __name__ == "__main__":
    measure.answer(run)
