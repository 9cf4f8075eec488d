"""What is compared: model shapes, prompts, response lengths and batches, the same for every side.

Standard library only, because the toolkit and its peers live in environments of their own and both import this.

Texts are written with a byte-level vocabulary without merges (:mod:`benchmarks.peers.models`), so a letter is a token:
``id = byte + FIRST_BYTE``. Prompts end with the template's header, one token.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.peers.gsm8k_lengths import GSM8K_LENGTHS

EOS_ID = 0
PAD_ID = 1
FIRST_BYTE = 2
HEADER = ":"
# What a conversation is written with: the prompt, the header, the answer.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}" + HEADER + "{% endif %}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}" + HEADER + "{% endif %}"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CONTEXT = 512


@dataclass(frozen=True)
class Workload:
    """A Qwen2 model (float32, untied) and the prompts of one PPO iteration.

    Attributes:
        name: as on the command line.
        vocab, hidden, intermediate, layers, heads, kv_heads: the model's shape.
        prompts: prompts of a rollout.
        shortest_prompt, longest_prompt: tokens; lengths are uniform between the two, both included.
        new_tokens: of every response.
        micro_batch: rows of one forward or backward, and of one call of a peer's generation.
    """

    name: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    prompts: int
    shortest_prompt: int
    longest_prompt: int
    new_tokens: int
    micro_batch: int

    @property
    def shape(self) -> dict[str, object]:
        """The model as both libraries' ``Qwen2Config`` name it."""
        return {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": CONTEXT,
            "tie_word_embeddings": False,
            "initializer_range": 0.02,
        }

    @property
    def model(self) -> str:
        """Equal for workloads with the same model."""
        return f"v{self.vocab}h{self.hidden}i{self.intermediate}l{self.layers}a{self.heads}k{self.kv_heads}"


W1 = Workload("W1", 8192, 256, 704, 8, 8, 4, 64, 64, 64, 64, 16)
W2 = Workload("W2", 32000, 512, 1408, 8, 8, 4, 32, 64, 64, 64, 8)
W3 = replace(W1, name="W3", shortest_prompt=16, longest_prompt=240)
# To see that everything runs; no figure of it means anything.
TINY = Workload("tiny", 512, 32, 64, 2, 4, 2, 8, 6, 12, 6, 4)
WORKLOADS = {w.name: w for w in (W1, W2, W3, TINY)}

# Of GRPO: answers to a prompt, so that its rollout has an eighth of the prompts and as many rows.
ANSWERS = 8
GEOMETRIC_MEAN = 24
GROWTH_BATCHES = (1, 4, 16, 64)
GROWTH_LENGTHS = (64, 128, 256)


def parameters(w: Workload, head: str) -> int:
    """Parameters of a Qwen2 of this shape (q, k and v have biases, nothing else has).

    Args:
        w: the shape.
        head: ``"language"`` (untied) or ``"score"`` (one output, no bias).
    """
    kv = w.hidden // w.heads * w.kv_heads
    attention = w.hidden * w.hidden * 2 + w.hidden * kv * 2 + w.hidden + 2 * kv
    layer = attention + 3 * w.hidden * w.intermediate + 2 * w.hidden
    last = w.vocab * w.hidden if head == "language" else w.hidden
    return w.vocab * w.hidden + w.layers * layer + w.hidden + last


def prompt_lengths(w: Workload, count: int, seed: int = 0) -> list[int]:
    """Tokens of ``count`` prompts, header included."""
    draw = random.Random(f"prompts {w.name} {seed}")
    return [draw.randint(w.shortest_prompt, w.longest_prompt) for _ in range(count)]


def response_lengths(w: Workload, count: int, seed: int = 0) -> list[int]:
    """Tokens of ``count`` responses of varying length: geometric with mean ``GEOMETRIC_MEAN``, cut at ``new_tokens``
    (which lowers the mean a little: 22.4 for a cut at 64).
    """
    draw = random.Random(f"responses {w.name} {seed}")
    lengths = []
    for _ in range(count):
        length = 1
        while length < w.new_tokens and draw.random() >= 1.0 / GEOMETRIC_MEAN:
            length += 1
        lengths.append(length)
    return lengths


def texts(lengths: Sequence[int], seed: str) -> list[str]:
    """Random letters; all different where there are enough letters for it."""
    draw = random.Random(seed)
    return ["".join(draw.choices(LETTERS, k=length)) for length in lengths]


def ids(text: str) -> list[int]:
    """Token ids of a text."""
    return [byte + FIRST_BYTE for byte in text.encode()]


def prompt_texts(w: Workload, count: int | None = None, seed: int = 0) -> list[str]:
    """Prompts without the header; with it they have the lengths of :func:`prompt_lengths`."""
    lengths = prompt_lengths(w, w.prompts if count is None else count, seed)
    return texts([length - len(HEADER) for length in lengths], f"prompt texts {w.name} {seed}")


def prompt_ids(text: str) -> list[int]:
    """Token ids of a prompt with the header."""
    return ids(text + HEADER)


@dataclass(frozen=True)
class Row:
    """A training row: a prompt, an answer and (for pairs) a worse answer, as texts without header and eos.

    With header and eos they have the lengths that were asked for.
    """

    prompt: str
    answer: str
    other: str

    def supervised(self) -> tuple[list[int], list[int]]:
        """Ids of prompt and answer."""
        return prompt_ids(self.prompt), [*ids(self.answer), EOS_ID]

    def pair(self) -> tuple[list[int], list[int]]:
        """Ids of the whole better and worse rows."""
        prompt = prompt_ids(self.prompt)
        return [*prompt, *ids(self.answer), EOS_ID], [*prompt, *ids(self.other), EOS_ID]


EQUAL_LENGTHS = ((64, 64),) * 64
LENGTHS = {"equal": EQUAL_LENGTHS, "gsm8k": GSM8K_LENGTHS}


def training_rows(lengths: Sequence[tuple[int, int]], seed: int = 0) -> list[Row]:
    """Rows with the given lengths (prompt with header, answer with eos); the worse answer of a row has the length of
    another row's answer.
    """
    order = list(range(len(lengths)))
    random.Random(f"others {seed}").shuffle(order)
    prompts = texts([prompt - len(HEADER) for prompt, _ in lengths], f"row prompts {seed}")
    answers = texts([answer - 1 for _, answer in lengths], f"row answers {seed}")
    others = texts([lengths[i][1] - 1 for i in order], f"row others {seed}")
    return [Row(*columns) for columns in zip(prompts, answers, others, strict=True)]


def gemm_shapes(w: Workload) -> list[tuple[int, int, int]]:
    """``(m, k, n)`` of the matrix products that a workload is made of: a forward's and a decode step's."""
    forward = w.micro_batch * (w.longest_prompt + w.new_tokens)
    return [
        (forward, w.hidden, w.intermediate),
        (forward, w.hidden, w.vocab),
        (w.micro_batch, w.hidden, w.intermediate),
        (w.micro_batch, w.hidden, w.vocab),
    ]
