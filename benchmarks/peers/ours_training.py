"""Our side of SFT and reward modelling: the stages' own runners, in this process. Prints one JSON line.

Task: ``stage`` (``"sft"`` or ``"rm"``), ``workload``, ``folder`` (with ``base/``), ``output``, ``lengths`` (of
:data:`benchmarks.peers.workloads.LENGTHS`), ``batch``, ``arguments`` (further ones of the stage). Two epochs; the
second, in which every row comes once, is timed from the rows of ``metrics.jsonl``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.peers import measure
from benchmarks.peers.measure import require
from benchmarks.peers.models import common_arguments, preference_row, supervised_row, write_jsonl
from benchmarks.peers.workloads import CONTEXT, LENGTHS, WORKLOADS, Row, parameters, training_rows


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Train, check that it was the work that is compared, and return the figures."""
    w, stage, output, batch = WORKLOADS[task["workload"]], task["stage"], Path(task["output"]), task["batch"]
    rows = training_rows(LENGTHS[task["lengths"]])
    steps = len(rows) // batch
    require(steps * batch == len(rows), f"{len(rows)} rows do not fill batches of {batch}")
    base = Path(task["folder"]) / "base"
    form = supervised_row if stage == "sft" else preference_row
    data = write_jsonl(output.with_suffix(".jsonl"), [form(row) for row in rows])
    values = {
        **common_arguments(output),
        "model_name_or_path": str(base),
        "train_datasets": f"jsonl::{data}",
        "max_length": CONTEXT,
        **({"src_length": CONTEXT // 2} if stage == "sft" else {"max_src_len": CONTEXT // 2, "regularization": 0.0}),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 2,
        "max_grad_norm": 1.0,
        "recompute": False,
        **task["arguments"],
    }
    file = output.with_suffix(".json")
    file.write_text(json.dumps(values))
    if stage == "sft":
        from alignment.sft import run_sft as runner
    else:
        from alignment.rm import run_reward as runner
    require(runner.main([str(file)]) == 0, "the run failed")
    peak = measure.peak_memory()

    logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in logged if "train/loss" in row]
    require([row["step"] for row in logged] == list(range(1, 2 * steps + 1)), f"{len(logged)} steps, not {2 * steps}")
    times = [row["time"] for row in logged]
    results = json.loads((output / "train_results.json").read_text())
    tokens = sum(row_tokens(row, stage) for row in rows)
    seen = round(results["train_tokens_per_second"] * results["train_runtime"])
    require(seen == 2 * tokens, f"{seen} tokens, not {2 * tokens}")
    moved, count = moved_tensors(base, output)
    require(moved == count, f"{moved} of {count} tensors moved")
    return {
        "seconds_per_step": (times[-1] - times[steps - 1]) / steps,
        "steps": [after - begin for begin, after in zip(times[steps - 1 :], times[steps:], strict=False)],
        "optimizer_steps": 2 * steps,
        "trained_parameters": parameters(w, "language" if stage == "sft" else "score"),
        "rows": len(rows),
        "tokens": tokens,
        "peak_bytes": peak,
        "versions": measure.versions("paddlepaddle", "paddlenlp", "numpy"),
    }


def row_tokens(row: Row, stage: str) -> int:
    """Tokens of a training row: of a pair both whole sequences."""
    return sum(len(part) for part in (row.supervised() if stage == "sft" else row.pair()))


def moved_tensors(before: Path, after: Path) -> tuple[int, int]:
    """How many tensors of a trained model differ from (or, a new head, are not in) those it started with, and how many
    there are.
    """
    from alignment.ppo.models import load_causal_lm, load_score_model

    def weights(folder: Path) -> dict[str, Any]:
        config = json.loads((folder / "config.json").read_text())
        causal = "CausalLM" in config["architectures"][0]
        model = load_causal_lm(str(folder)) if causal else load_score_model(str(folder), score_type="reward")
        return {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    old, new = weights(before), weights(after)
    trained = {name: value for name, value in new.items() if "normalizer" not in name}
    return sum(name not in old or bool((value != old[name]).any()) for name, value in trained.items()), len(trained)


if __name__ == "__main__":
    measure.answer(run)
