"""Our side of a PPO iteration: the runner's own ``PPOTrainer``, driven in this process. Prints one JSON line.

Task: ``workload``, ``folder`` (with ``actor/``, ``reward/``, ``critic/``), ``output``, ``iterations`` (the first is not
counted), ``arguments`` (further ones of PPO). What is timed is ``PPOTrainer.iterate``: prompts, rollout, log-probs,
reference, scores, values, one update of critic and actor, metrics.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from benchmarks.peers import measure
from benchmarks.peers.measure import require
from benchmarks.peers.models import common_arguments, write_jsonl
from benchmarks.peers.workloads import WORKLOADS, Workload, parameters, prompt_lengths, prompt_texts


def arguments(w: Workload, folder: Path, output: Path, iterations: int) -> dict[str, Any]:
    """Everything at the peer's settings: one pass, one optimizer step per iteration, no clipping, whitened
    advantages.
    """
    prompts = [{"prompt": text} for text in prompt_texts(w, w.prompts * iterations)]
    return {
        **common_arguments(output),
        "train_datasets": f"jsonl::{write_jsonl(output.with_suffix('.jsonl'), prompts)}",
        "actor_model_name_or_path": str(folder / "actor"),
        "reward_model_name_or_path": str(folder / "reward"),
        "reward_critic_model_name_or_path": str(folder / "critic"),
        "max_src_len": w.longest_prompt,
        "max_dec_len": w.new_tokens,
        "min_dec_len": w.new_tokens,
        "temperature": 1.0,
        "top_p": 1.0,
        "per_device_prompt_batch_size": w.prompts,
        "rollout_logprob_batch_size": w.micro_batch,
        "per_device_train_batch_size": w.micro_batch,
        "gradient_accumulation_steps": w.prompts // w.micro_batch,
        "update_iters": 1,
        "max_steps": iterations,
        "max_grad_norm": 0.0,
        "kl_coeff": 0.05,
        "normalize_advantage": True,
        "recompute": False,
    }


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Run the iterations, check that they did the work that is compared, and return the figures."""
    from alignment.arguments import parse_ppo
    from alignment.flow.runner import use_device
    from alignment.parallel import init_world
    from alignment.ppo import ppo_trainer

    w, folder, output = WORKLOADS[task["workload"]], Path(task["folder"]), Path(task["output"])
    iterations = task["iterations"]
    file = output.with_suffix(".json")
    output.mkdir(parents=True)
    file.write_text(json.dumps({**arguments(w, folder, output, iterations), **task["arguments"]}))
    args = parse_ppo([str(file)])
    use_device(args)
    data = ppo_trainer.load_data(args, show_progress=False)
    imported = measure.resident_memory()
    trainer = ppo_trainer.build_trainer(args, init_world(), data, args.derive_sizes(len(data.train)), [])
    engines = {name: trainer.roles[name].engine for name in ("actor", "reference", "critic", "reward")}
    heads = {"actor": "language", "reference": "language", "critic": "score", "reward": "score"}
    for name, engine in engines.items():
        count = sum(int(p.size) for p in engine.model.parameters())
        require(count == parameters(w, heads[name]), f"the {name} has {count} parameters")
    everything = [id(p) for engine in engines.values() for p in engine.model.parameters()]
    require(len(everything) == len(set(everything)), "roles share parameters")
    before = {name: engine.parameter_fingerprints() for name, engine in engines.items()}
    loaded = measure.resident_memory()

    seconds: list[float] = []
    peaks: list[int] = []
    iterate = trainer.iterate

    def timed() -> None:
        began = time.perf_counter()
        iterate()
        seconds.append(time.perf_counter() - began)
        peaks.append(measure.peak_memory())

    trainer.iterate = timed
    require(trainer.train() == 0, "the run failed")
    require(len(seconds) == iterations, f"{len(seconds)} iterations")
    for name, engine in engines.items():
        after = engine.parameter_fingerprints()
        moved = {key for key in after if after[key] != before[name][key]}
        require(moved == (set(after) if engine.trainable else set()), f"{name}: {len(moved)} of {len(after)} moved")
        require(not engine.trainable or engine.steps == iterations, f"{name}: {engine.steps} optimizer steps")
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    require(len(rows) == iterations, f"{len(rows)} rows of metrics")
    phases = [key for key in rows[-1] if key.startswith("time/") and key.endswith("_seconds")]
    for row in rows:
        require(row["train/mean_generated_length"] == w.new_tokens, "responses of another length")
        require(row["train/max_generated_length"] == w.new_tokens, "responses of another length")
        total = row["tokens_per_second/update"] * row["time/update_seconds"]
        row["tokens"] = round(total)
    lengths = prompt_lengths(w, w.prompts * iterations)
    expected = sum(lengths) + len(lengths) * w.new_tokens
    require(sum(row["tokens"] for row in rows) == expected, f"{[row['tokens'] for row in rows]} tokens, not {expected}")
    return {
        "seconds": seconds[1:],
        "first_seconds": seconds[0],
        "peak_bytes": peaks[-1],
        "imported_bytes": imported,
        "loaded_bytes": loaded,
        "optimizer_steps": iterations,
        "trained_parameters": parameters(w, "language") + parameters(w, "score"),
        "rows": w.prompts,
        "phases": {key[5:-8]: [row[key] for row in rows[1:]] for key in phases},
        "versions": measure.versions("paddlepaddle", "paddlenlp", "numpy"),
    }


if __name__ == "__main__":
    measure.answer(run)
