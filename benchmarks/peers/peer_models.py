"""Models and tokenizer of the peers, of a workload's shape, made in memory."""

from __future__ import annotations

import zlib
from typing import Any

from benchmarks.peers.workloads import EOS_ID, PAD_ID, Workload


def config(w: Workload, **more: Any) -> Any:
    """transformers' config of the workload's model."""
    from transformers import Qwen2Config

    return Qwen2Config(**w.shape, bos_token_id=None, eos_token_id=EOS_ID, attn_implementation="sdpa", **more)


def causal_model(w: Workload, seed: int) -> Any:
    """A random causal model, float32."""
    import torch
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(seed)
    return Qwen2ForCausalLM(config(w))


def score_model(w: Workload, seed: int) -> Any:
    """A random model with one output per token, float32."""
    import torch
    from transformers import Qwen2ForSequenceClassification

    torch.manual_seed(seed)
    return Qwen2ForSequenceClassification(config(w, num_labels=1, pad_token_id=PAD_ID))


def checksums(model: Any) -> list[int]:
    """A number per parameter that any changed bit changes (copies of the weights would count as the peer's memory)."""
    return [zlib.crc32(p.detach().numpy()) for p in model.parameters()]


def tokenizer(w: Workload, pad_id: int = PAD_ID) -> Any:
    """A tokenizer that the trainers take pads and ids from; the rows are token ids already.

    Args:
        w: gives the size of the vocabulary.
        pad_id: of the pad token; the vocabulary grows by it if it lies beyond its end.
    """
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    names = {f"t{i}": i for i in range(max(w.vocab, pad_id + 1)) if i not in (EOS_ID, pad_id)}
    names |= {"<eos>": EOS_ID, "<pad>": pad_id}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(names, unk_token="<eos>")),
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
    )
    assert (made.eos_token_id, made.pad_token_id) == (EOS_ID, pad_id)
    return made
