"""The peer's side of the rollout: transformers' ``generate`` on torch. Prints one JSON line.

Task: ``workload``, ``runs`` as for :mod:`benchmarks.peers.ours_rollout`. Float32, ``inference_mode``, SDPA attention,
left padding; prompts of different lengths are grouped by length, which a user knows beforehand. Nothing that PPO would
need besides the tokens (scores) is asked for.
"""

from __future__ import annotations

from typing import Any

from benchmarks.peers import measure
from benchmarks.peers.measure import require
from benchmarks.peers.workloads import (
    EOS_ID,
    PAD_ID,
    WORKLOADS,
    Workload,
    parameters,
    prompt_ids,
    prompt_texts,
    response_lengths,
)


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Make the model and time each run after a short one that warms up."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    w = WORKLOADS[task["workload"]]
    torch.manual_seed(0)
    config = Qwen2Config(**w.shape, bos_token_id=None, eos_token_id=EOS_ID, attn_implementation="sdpa")
    model = Qwen2ForCausalLM(config).eval()
    count = sum(p.numel() for p in model.parameters())
    require(count == parameters(w, "language"), f"{count} parameters")
    require(all(p.dtype == torch.float32 for p in model.parameters()), "the weights are not float32")
    results = [{**wanted, **one(model, w, wanted)} for wanted in task["runs"]]
    return {
        "runs": results,
        "parameters": count,
        "peak_bytes": measure.peak_memory(),
        "versions": measure.versions("torch", "transformers", "numpy"),
        "threads": torch.get_num_threads(),
    }


def one(model: Any, w: Workload, wanted: dict[str, Any]) -> dict[str, Any]:
    """Seconds and useful response tokens of one run."""
    import torch

    longest = wanted.get("new_tokens", w.new_tokens)
    growth = "new_tokens" in wanted
    count = wanted["batch"] if growth else w.prompts
    rows = [prompt_ids(text) for text in prompt_texts(w, max(count, w.prompts))[:count]]
    limits = response_lengths(w, count) if wanted.get("lengths") == "varying" else None
    order = sorted(range(count), key=lambda i: len(rows[i]))
    batches = [order[i : i + wanted["batch"]] for i in range(0, count, wanted["batch"])]

    def generate(indices: list[int], tokens: int, limited: bool) -> Any:
        width = max(len(rows[i]) for i in indices)
        input_ids = torch.full((len(indices), width), PAD_ID)
        mask = torch.zeros_like(input_ids)
        for row, i in enumerate(indices):
            input_ids[row, width - len(rows[i]) :] = torch.tensor(rows[i])
            mask[row, width - len(rows[i]) :] = 1
        more: dict[str, Any] = {"eos_token_id": None, "min_new_tokens": tokens}
        if limited:
            more = {"eos_token_id": EOS_ID, "logits_processor": [end_after([limits[i] for i in indices], width)]}
        with torch.inference_mode():
            return model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                max_new_tokens=tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=PAD_ID,
                **more,
            )[:, width:]

    generate(batches[0], 4, False)
    seconds, outputs = measure.seconds_of(
        lambda: [generate(indices, longest, limits is not None) for indices in batches]
    )
    useful = 0
    for indices, output in zip(batches, outputs, strict=True):
        for i, row in zip(indices, output.tolist(), strict=True):
            if limits is None:
                require(len(row) == longest, f"a response of {len(row)} tokens")
                useful += len(row)
            else:
                require(EOS_ID in row and row.index(EOS_ID) + 1 == limits[i], f"a response of {row}, not {limits[i]}")
                useful += limits[i]
    return {"seconds": seconds, "tokens": useful}


def end_after(limits: list[int], prompt_width: int) -> Any:
    """A logits processor with which row ``i``'s token number ``limits[i]`` is eos and no earlier one."""
    import torch
    from transformers import LogitsProcessor

    class EndAfter(LogitsProcessor):
        def __init__(self) -> None:
            self.limits = torch.tensor(limits)

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            due = self.limits <= input_ids.shape[1] - prompt_width + 1
            scores[:, EOS_ID] = -torch.inf
            if due.any():
                scores[due] = -torch.inf
                scores[due, EOS_ID] = 0.0
            return scores

    return EndAfter()


if __name__ == "__main__":
    measure.answer(run)
