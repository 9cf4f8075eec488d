"""``config.json`` and ``generation_config.json`` as ``transformers`` reads them, from paddlenlp's."""

from __future__ import annotations

from typing import Any

from alignment.errors import ModelError
from alignment.export.export_weights import head_size
from alignment.ppo.models.folders import SUPPORTED_MODEL_TYPES, ModelFolder

_COMMON = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_theta",
)
_SCORE = (
    "score_type",
    "score_dim",
    "bias",
    "do_normalize",
    "normalizer_type",
    "momentum",
    "mean",
    "var",
    "normalizer_count",
)
#: Keys of generation_config.json that both libraries know and mean alike.
_GENERATION = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "max_new_tokens",
    "min_new_tokens",
)
_SAMPLING = ("temperature", "top_k", "top_p")


def hf_config(
    folder: ModelFolder, config: Any, tokenizer: Any, *, dtype: str, architecture: str, score_dim: int | None
) -> dict[str, Any]:
    """Return the content of ``config.json`` for ``transformers``.

    Args:
        folder: the source.
        config: the source's paddlenlp config, which has the defaults filled in.
        tokenizer: the source's, or None.
        dtype: of the weights.
        architecture: name of the class, such as ``"LlamaForCausalLM"``.
        score_dim: outputs of the score head; None for a causal model.

    Raises:
        ModelError: the model computes something that ``transformers`` has no setting for.
    """
    kind = folder.model_type
    result: dict[str, Any] = {"architectures": [architecture], "model_type": kind, "torch_dtype": dtype}
    result |= {name: getattr(config, name) for name in _COMMON}
    result |= {
        "hidden_act": "silu",
        "rope_scaling": _rope_scaling(folder, config),
        "attention_dropout": 0.0,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "use_cache": True,
    }
    if kind == "qwen2":
        windows = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
        result |= {name: getattr(config, name) for name in windows if hasattr(config, name)}
    else:
        result["head_dim"] = head_size(config)
    if kind == "mistral":
        result["sliding_window"] = config.sliding_window
    if kind in ("llama", "gemma"):
        result["attention_bias"] = False
    if kind == "llama":
        result["mlp_bias"] = False
    if kind == "gemma":
        # paddlenlp computes the exact GELU, so these weights were trained with it; older and newer versions of
        # transformers read different keys.
        result |= {"hidden_act": "gelu", "hidden_activation": "gelu"}
    ids = special_ids(folder, config, tokenizer)
    result |= {name: ids[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if kind == "mistral":
        # paddlenlp's Mistral turns the embedding of this id into zeros, even where it is eos or stands in a text: a
        # pad that the source does not name would change the model. Generation config and tokenizer still name it.
        result["pad_token_id"] = special_ids(folder, config, None)["pad_token_id"]
    if score_dim is not None:
        result |= {name: getattr(config, name, None) for name in _SCORE} | {"score_dim": score_dim}
        labels = [f"LABEL_{index}" for index in range(score_dim)]  # transformers takes num_labels from these
        result |= {
            "id2label": {str(index): label for index, label in enumerate(labels)},
            "label2id": {label: index for index, label in enumerate(labels)},
        }
    return result


def hf_generation_config(folder: ModelFolder, config: Any, tokenizer: Any, saved: dict[str, Any]) -> dict[str, Any]:
    """Return the content of ``generation_config.json``.

    Args:
        folder, config, tokenizer: as for :func:`hf_config`.
        saved: the source's generation_config.json, or an empty dictionary.
    """
    ids = special_ids(folder, config, tokenizer)
    listed = saved.get("eos_token_id")
    eos = [] if ids["eos_token_id"] is None else [ids["eos_token_id"]]
    eos += [i for i in (listed if isinstance(listed, list) else [listed]) if _fits(i, config) and i not in eos]
    result = {"bos_token_id": ids["bos_token_id"], "pad_token_id": ids["pad_token_id"]}
    result["eos_token_id"] = eos[0] if len(eos) == 1 else eos or None
    kept = {name: saved[name] for name in _GENERATION if saved.get(name) is not None}
    if not kept.get("do_sample"):
        # Sampling values beside do_sample=False are an error when transformers saves the model again.
        kept = {name: value for name, value in kept.items() if name not in _SAMPLING}
    return {name: value for name, value in result.items() if value is not None} | kept


def special_ids(folder: ModelFolder, config: Any, tokenizer: Any) -> dict[str, int | None]:
    """Return bos, eos and pad: the tokenizer's, else the config's where they have a row in the embedding.

    A config that was copied from a larger model may name ids that this one has not; torch refuses such a pad id.
    """
    result: dict[str, int | None] = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = name.removesuffix("_id")
        own = None
        if tokenizer is not None and tokenizer.special_tokens_map.get(token) is not None:
            own = getattr(tokenizer, name)
        declared = folder.config.get(name, None if tokenizer is not None else getattr(config, name, None))
        declared = declared[0] if isinstance(declared, list) and declared else declared
        result[name] = next((int(i) for i in (own, declared) if _fits(i, config)), None)
    return result


def causal_architecture(model_type: str) -> str:
    """``transformers``' name of the causal model."""
    return f"{SUPPORTED_MODEL_TYPES[model_type]}ForCausalLM"


def score_architecture(model_type: str, *, plain: bool) -> str:
    """The name of a score model: ``transformers``' own for a plain linear head, else Safe RLHF's."""
    return f"{SUPPORTED_MODEL_TYPES[model_type]}{'ForSequenceClassification' if plain else 'ModelForScore'}"


def _fits(index: Any, config: Any) -> bool:
    return isinstance(index, int) and not isinstance(index, bool) and 0 <= index < config.vocab_size


def _rope_scaling(folder: ModelFolder, config: Any) -> dict[str, Any] | None:
    if getattr(config, "alibi", False):
        raise ModelError(
            f"{folder.path}: config.json sets alibi, which transformers' {folder.model_type} cannot compute; "
            "export it with --format paddle"
        )
    scaling = getattr(config, "rope_scaling", None)
    kind = getattr(config, "rope_scaling_type", None)
    if scaling:
        scaling = dict(scaling)
        scaling["rope_type"] = scaling.get("rope_type", scaling.get("type"))
        scaling.pop("type", None)
        return scaling
    if not kind:
        return None
    names = {"linear": "linear", "dynamic_ntk": "dynamic"}
    if folder.model_type != "llama" or kind not in names:
        raise ModelError(
            f"{folder.path}: config.json sets rope_scaling_type {kind!r}, which transformers' {folder.model_type} has "
            f"not (it has linear and dynamic_ntk for llama); export it with --format paddle"
        )
    return {"rope_type": names[kind], "factor": float(config.rope_scaling_factor)}
