"""Models and tokenizers: the only room that reaches into paddlenlp's modeling code.

``folders`` checks a folder without loading it, ``hf_layout`` reads weights of every layout, ``loading`` makes models
of them, ``score_model`` and ``normalizers`` are reward, cost and value models, ``forward`` runs right-padded and
packed rows, ``precision`` is bfloat16 on a CPU, ``lora`` adapts and merges, ``tokenizers`` loads tokenizers. Importing
a name loads its module (and Paddle with it) only then.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULE_OF = {
    "ModelFolder": "folders",
    "SUPPORTED_MODEL_TYPES": "folders",
    "check_model_folder": "folders",
    "local_folder": "folders",
    "model_context_length": "folders",
    "Weights": "hf_layout",
    "load_causal_lm": "loading",
    "load_score_model": "loading",
    "load_config": "loading",
    "open_folder": "loading",
    "save_model": "saving",
    "save_whole_model": "saving",
    "AutoModelForScore": "score_model",
    "ScoreModelOutput": "score_model",
    "ExponentialMovingAverage": "normalizers",
    "Normalizer": "normalizers",
    "RunningMeanStd": "normalizers",
    "make_normalizer": "normalizers",
    "backbone_of": "forward",
    "cached_hidden_states": "forward",
    "causal_logits": "forward",
    "divides_vocabulary": "forward",
    "end_scores": "forward",
    "final_hidden_states": "forward",
    "Rows": "forward",
    "head_is_tied": "forward",
    "hidden_states": "forward",
    "keep_tokens": "forward",
    "kept_tokens": "forward",
    "lm_logits": "forward",
    "predicted_tokens": "forward",
    "packed_causal_logits": "forward",
    "score_tokens": "forward",
    "scores_of": "forward",
    "take_end": "forward",
    "unwrap": "forward",
    "is_rounded": "precision",
    "round_weights": "precision",
    "store_in_bfloat16": "precision",
    "stored_dtype": "precision",
    "Piece": "parts",
    "check_layout": "divisible",
    "pieces_of": "parts",
    "ties_ends": "score_model",
    "empty_like": "parts",
    "without_sequence_parallel": "parts",
    "LoRASettings": "lora",
    "is_adapter_folder": "lora",
    "merge_lora": "lora",
    "vocabulary_size": "tokenizers",
    "check_tokenizer_fits": "tokenizers",
    "load_tokenizer": "tokenizers",
    "save_tokenizer": "tokenizers",
    "tokenizer_differs": "tokenizers",
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{module}", __name__), name)


def __dir__() -> list[str]:
    return __all__
