"""The peer's side of a PPO iteration: trl's ``PPOTrainer``. Prints one JSON line.

Task: ``workload``, ``output``, ``iterations`` (the first is not counted). What is timed is the time between two of its
``on_step_end`` events: one rollout, scores, reference, values, and one optimizer step over all rows in micro batches.
"""

from __future__ import annotations

import math
import time
from typing import Any

from benchmarks.peers import measure
from benchmarks.peers.measure import require
from benchmarks.peers.peer_models import causal_model, checksums, score_model, tokenizer
from benchmarks.peers.workloads import WORKLOADS, parameters, prompt_ids, prompt_texts


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Run the iterations, check that they did the work that is compared, and return the figures."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import PPOConfig, PPOTrainer

    w, iterations = WORKLOADS[task["workload"]], task["iterations"]
    # One batch more than is used: on the last batch of its loader accelerate steps after every micro batch.
    rows = [{"input_ids": prompt_ids(text)} for text in prompt_texts(w, w.prompts * (iterations + 1))]
    # No token of the model is the pad, so a response is never cut where the model happens to draw the pad.
    processing = tokenizer(w, pad_id=w.vocab)
    imported = measure.resident_memory()
    policy, reference = causal_model(w, 1), causal_model(w, 1)
    value, reward = score_model(w, 2), score_model(w, 3)
    models = {"policy": policy, "reference": reference, "value": value, "reward": reward}
    for name, model in models.items():
        count = sum(p.numel() for p in model.parameters())
        head = "language" if name in ("policy", "reference") else "score"
        require(count == parameters(w, head), f"{name}: {count} parameters")
    everything = [p.data_ptr() for model in models.values() for p in model.parameters()]
    require(len(everything) == len(set(everything)), "models share parameters")
    before = {name: checksums(model) for name, model in models.items()}
    loaded = measure.resident_memory()

    config = PPOConfig(
        output_dir=task["output"],
        per_device_train_batch_size=w.micro_batch,
        gradient_accumulation_steps=w.prompts // w.micro_batch,
        total_episodes=w.prompts * iterations,
        num_ppo_epochs=1,
        num_mini_batches=1,
        local_rollout_forward_batch_size=w.micro_batch,
        response_length=w.new_tokens,
        stop_token=None,
        missing_eos_penalty=None,
        num_sample_generations=0,
        temperature=1.0,
        kl_coef=0.05,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        save_strategy="no",
        eval_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        seed=1,
    )
    ends: list[float] = []
    peaks: list[int] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())
            peaks.append(measure.peak_memory())

    generated: list[tuple[int, int]] = []
    plain_generate = policy.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        output = plain_generate(*args, **kwargs)
        generated.append((len(output.sequences), output.sequences.shape[1] - kwargs["input_ids"].shape[1]))
        return output

    policy.generate = generate
    data = Dataset.from_list(rows)
    trainer = PPOTrainer(
        args=config,
        processing_class=processing,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=data,
        eval_dataset=data.select(range(w.micro_batch)),
        callbacks=[Clock()],
    )
    trainer.train()
    require(len(ends) == iterations + 1, f"{len(ends) - 1} iterations")
    per_iteration = w.prompts // w.micro_batch
    require(generated == [(w.micro_batch, w.new_tokens)] * per_iteration * iterations, f"generated {generated}")
    trained = [*policy.parameters(), *value.parameters()]
    state = trainer.optimizer.optimizer.state
    steps = {int(state[p]["step"]) for p in trained if p in state}
    require(len(state) == len(trained) and steps == {iterations}, f"optimizer steps {steps} of {len(state)} tensors")
    for name, model in models.items():
        moved = [new != old for new, old in zip(checksums(model), before[name], strict=True)]
        expected = name in ("policy", "value")
        require(all(m == expected for m in moved), f"{name}: {sum(moved)} of {len(moved)} tensors moved")
    require(math.isfinite(trainer.state.log_history[-1]["loss/policy_avg"]), "the loss is not finite")
    seconds = [after - begin for begin, after in zip(ends, ends[1:], strict=False)]
    return {
        "seconds": seconds[1:],
        "first_seconds": seconds[0],
        "peak_bytes": peaks[-1],
        "imported_bytes": imported,
        "loaded_bytes": loaded,
        "optimizer_steps": iterations,
        "trained_parameters": sum(p.numel() for p in trained),
        "rows": w.prompts,
        "versions": measure.versions("torch", "transformers", "trl", "accelerate", "datasets", "numpy"),
    }


if __name__ == "__main__":
    measure.answer(run)
