"""The peer's side of a GRPO iteration: trl's ``GRPOTrainer``. Prints one JSON line.

Task: ``workload``, ``output``, ``iterations`` (the first is not counted). What is timed is the time between two of its
``on_step_end`` events: 8 answers to each prompt, all in one call of its generation, rewards, and one optimizer step
over all rows in micro batches. With one step per generation it computes no old log-probs, and with beta 0 no
reference's.
"""

from __future__ import annotations

import math
import time
from typing import Any

from benchmarks.peers import measure
from benchmarks.peers.measure import require
from benchmarks.peers.peer_models import causal_model, checksums, tokenizer
from benchmarks.peers.rewards import variety
from benchmarks.peers.workloads import ANSWERS, WORKLOADS, parameters, prompt_ids, prompt_texts


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Run the iterations, check that they did the work that is compared, and return the figures."""
    from datasets import Dataset
    from tokenizers import pre_tokenizers
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    w, iterations = WORKLOADS[task["workload"]], task["iterations"]
    # Its prompts are texts: the tokens' names, which its tokenizer splits at the spaces.
    texts = prompt_texts(w, w.prompts // ANSWERS * iterations)
    rows = [{"prompt": " ".join(f"t{i}" for i in prompt_ids(text))} for text in texts]
    processing = tokenizer(w)
    processing.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    processing.model_input_names = ["input_ids", "attention_mask"]
    imported = measure.resident_memory()
    policy = causal_model(w, 1)
    count = sum(p.numel() for p in policy.parameters())
    require(count == parameters(w, "language"), f"{count} parameters")
    before, loaded = checksums(policy), measure.resident_memory()

    config = GRPOConfig(
        output_dir=task["output"],
        per_device_train_batch_size=w.micro_batch,
        gradient_accumulation_steps=w.prompts // w.micro_batch,
        max_steps=iterations,
        num_iterations=1,
        num_generations=ANSWERS,
        max_prompt_length=None,
        max_completion_length=w.new_tokens,
        generation_kwargs={"min_new_tokens": w.new_tokens},
        temperature=1.0,
        top_p=1.0,
        top_k=None,
        beta=0.0,
        max_grad_norm=0.0,
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
    read: list[int] = []
    plain_generate = policy.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        output = plain_generate(*args, **kwargs)
        generated.append((len(output), output.shape[1] - kwargs["input_ids"].shape[1]))
        read.append(int(kwargs["attention_mask"].sum()))
        return output

    policy.generate = generate
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=variety,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=processing,
        callbacks=[Clock()],
    )
    trainer.train()
    require(len(ends) == iterations + 1, f"{len(ends) - 1} iterations")
    require(generated == [(w.prompts, w.new_tokens)] * iterations, f"generated {generated}")
    tokens = ANSWERS * sum(len(prompt_ids(text)) for text in texts)
    require(sum(read) == tokens, f"{sum(read)} tokens of prompts, not {tokens}")
    state, trained = trainer.optimizer.optimizer.state, list(policy.parameters())
    steps = {int(state[p]["step"]) for p in trained if p in state}
    require(len(state) == len(trained) and steps == {iterations}, f"optimizer steps {steps} of {len(state)} tensors")
    moved = [new != old for new, old in zip(checksums(policy), before, strict=True)]
    require(all(moved), f"{sum(moved)} of {len(moved)} tensors moved")
    logged = [row for row in trainer.state.log_history if "loss" in row]
    require(all(math.isfinite(row["loss"]) for row in logged), "the loss is not finite")
    lengths = {row["completions/mean_length"] for row in logged}
    require(lengths == {float(w.new_tokens)}, f"answers of {lengths} tokens are trained on")
    seconds = [after - begin for begin, after in zip(ends, ends[1:], strict=False)]
    return {
        "seconds": seconds[1:],
        "first_seconds": seconds[0],
        "peak_bytes": peaks[-1],
        "imported_bytes": imported,
        "loaded_bytes": loaded,
        "optimizer_steps": iterations,
        "trained_parameters": count,
        "rows": w.prompts,
        "versions": measure.versions("torch", "transformers", "trl", "accelerate", "datasets", "numpy"),
    }


if __name__ == "__main__":
    measure.answer(run)
