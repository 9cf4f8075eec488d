"""The peer's side of SFT and reward modelling: trl's ``SFTTrainer`` and ``RewardTrainer``. Prints one JSON line.

Task: ``stage``, ``workload``, ``output``, ``lengths``, ``batch`` as for :mod:`benchmarks.peers.ours_training`. Two
epochs; the second is timed between its ``on_step_end`` events. Rows are token ids already.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks.peers import measure
from benchmarks.peers.measure import require
from benchmarks.peers.peer_models import causal_model, checksums, score_model, tokenizer
from benchmarks.peers.workloads import CONTEXT, LENGTHS, WORKLOADS, Row, parameters, training_rows


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Train, check that it was the work that is compared, and return the figures."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    w, stage, batch = WORKLOADS[task["workload"]], task["stage"], task["batch"]
    rows = training_rows(LENGTHS[task["lengths"]])
    steps = len(rows) // batch
    require(steps * batch == len(rows), f"{len(rows)} rows do not fill batches of {batch}")
    settings: dict[str, Any] = {
        "output_dir": task["output"],
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 2,
        "max_length": CONTEXT,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 1,
    }
    ends: list[float] = []
    peaks: list[int] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())
            peaks.append(measure.peak_memory())

    if stage == "sft":
        model = causal_model(w, 1)
        trainer_class: Any = SFTTrainer
        arguments: Any = SFTConfig(**settings, packing=False, completion_only_loss=True)
        data, head = [supervised(row) for row in rows], "language"
        tokens = sum(len(row["input_ids"]) for row in data)
    else:
        model = score_model(w, 1)
        trainer_class, arguments = RewardTrainer, RewardConfig(**settings)
        data, head = [preference(row) for row in rows], "score"
        tokens = sum(len(ids) for row in data for ids in row.values())
    count = sum(p.numel() for p in model.parameters())
    require(count == parameters(w, head), f"{count} parameters")
    before = checksums(model)
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer(w),
        callbacks=[Clock()],
    )
    require(len(trainer.train_dataset) == len(rows), "rows were left out")
    trainer.train()
    require(len(ends) == 2 * steps, f"{len(ends)} steps, not {2 * steps}")
    moved = sum(new != old for new, old in zip(checksums(model), before, strict=True))
    require(moved == len(before), f"{moved} of {len(before)} tensors moved")
    seen = trainer.state.log_history[-2]["num_tokens"]
    require(seen == 2 * tokens, f"{seen} tokens, not {2 * tokens}")
    return {
        "seconds_per_step": (ends[-1] - ends[steps - 1]) / steps,
        "steps": [after - begin for begin, after in zip(ends[steps - 1 :], ends[steps:], strict=False)],
        "optimizer_steps": 2 * steps,
        "trained_parameters": count,
        "rows": len(rows),
        "tokens": tokens,
        "peak_bytes": peaks[-1],
        "versions": measure.versions("torch", "transformers", "trl", "accelerate", "datasets", "numpy"),
    }


def supervised(row: Row) -> dict[str, list[int]]:
    """A row as ``SFTTrainer`` takes it, loss on the answer alone."""
    prompt, answer = row.supervised()
    return {"input_ids": prompt + answer, "completion_mask": [0] * len(prompt) + [1] * len(answer)}


def preference(row: Row) -> dict[str, list[int]]:
    """A row as ``RewardTrainer`` takes it."""
    better, worse = row.pair()
    return {"chosen_input_ids": better, "rejected_input_ids": worse}


if __name__ == "__main__":
    measure.answer(run)
