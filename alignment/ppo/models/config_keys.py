"""What may stand in a model's ``config.json``: every key is read, changes nothing here, or is refused.

A key that changes what a model computes and is not read gives a model that looks sound and is wrong: it trains, a
little badly. So there are three lists. :data:`_READ` and :data:`_HARMLESS` are passed over; a key of :data:`_ASKS` may
only have values that ask for nothing; a key in none of them is named in one warning. What the keys mean was taken from
transformers' configuration classes (4.31 to 5) and from paddlenlp's.

Nothing here imports Paddle.
"""

from __future__ import annotations

import logging
from typing import Any

from alignment.errors import ModelError
from alignment.log import say_once


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Read by the modeling code, by the loader or by the score head.
_READ = _words(
    """
    architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_scaling_type
    rope_scaling_factor tie_word_embeddings hidden_act hidden_activation head_dim layer_types
    bos_token_id eos_token_id pad_token_id initializer_range seq_length
    score_type score_dim bias do_normalize normalizer_type momentum mean var normalizer_count
    fuse_attention_qkv fuse_attention_ffn alibi sliding_window use_sliding_window max_window_layers
    """
)
#: Of no effect on what is computed here: notes, settings of sampling, of other libraries' speed and memory, dropout
#: (always off here) and training losses that are computed here in another way.
_HARMLESS = _words(
    """
    torch_dtype dtype transformers_version paddlenlp_version _name_or_path _commit_hash _attn_implementation
    attn_implementation _attn_implementation_autoset _flash_attn_2_enabled _from_model_config unsloth_version
    unsloth_fixed model_name transformers.js_config is_llama_config library_name auto_class
    use_cache use_flash_attention use_flash_attn use_flash_attention_2 pretraining_tp gradient_checkpointing
    max_sequence_length model_max_length max_seq_len cache_implementation original_max_position_embeddings
    attention_dropout hidden_dropout hidden_dropout_prob attention_probs_dropout_prob resid_pdrop embd_pdrop attn_pdrop
    classifier_dropout residual_dropout dropout
    return_dict output_hidden_states output_attentions output_scores return_dict_in_generate torchscript use_bfloat16
    tie_encoder_decoder chunk_size_feed_forward finetuning_task id2label label2id num_labels num_choices problem_type
    tokenizer_class prefix sep_token_id unk_token_id cls_token_id mask_token_id decoder_start_token_id
    task_specific_params is_decoder keys_to_ignore_at_inference
    max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p min_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    dpo_config long_sequence_init_args long_sequence_strategy_name long_sequence_strategy_type
    use_flash_attention_for_generation use_last_token_for_generation immediate_clear_past_key_value
    use_fused_rms_norm use_fused_rope use_fused_linear use_fused_dropout_add use_fused_linear_cross_entropy
    tensor_parallel_degree tensor_parallel_rank tensor_parallel_output pipeline_parallel_degree virtual_pp_degree
    no_recompute_layers pp_recompute_interval sep_parallel_degree context_parallel_degree sequence_parallel
    fuse_sequence_parallel_allreduce recompute recompute_granularity recompute_use_reentrant refined_recompute
    offload_recompute_inputs
    normalize_function use_normalize normalizer_momentum
    output_router_logits router_aux_loss_coef router_jitter_noise norm_topk_prob
    """
)
#: key -> (values that ask for nothing, beside null and an empty list; what any other value asks for).
_ASKS: dict[str, tuple[tuple[Any, ...], str]] = {
    "attention_bias": ((False,), "biases in the attention's projections"),
    "attn_bias": ((False,), "biases in the attention's projections"),
    "qkv_bias": ((False,), "biases in the attention's projections"),
    "use_qkv_bias": ((False,), "biases in the attention's projections"),
    "attention_out_bias": ((False,), "a bias in the attention's output"),
    "mlp_bias": ((False,), "biases in the MLP"),
    "use_bias": ((False,), "biases"),
    "lm_head_bias": ((False,), "a bias in the LM head"),
    "partial_rotary_factor": ((1,), "rotary positions on a part of each head"),
    "rotary_pct": ((1,), "rotary positions on a part of each head"),
    "rope_interleaved": ((False,), "rotary positions that turn neighbouring numbers"),
    "use_mrope": ((False,), "multimodal rotary positions"),
    "rope_local_base_freq": ((), "rotary positions that differ between layers"),
    "position_embedding_type": (("rope", "rotary", "absolute"), "positions that are not rotary"),
    "no_rope_layers": ((), "layers without rotary positions"),
    "no_rope_layer_interval": ((0,), "layers without rotary positions"),
    "attn_logit_softcapping": ((), "a cap on the attention's logits"),
    "final_logit_softcapping": ((), "a cap on the logits"),
    "query_pre_attn_scalar": ((), "another scale of the attention's logits"),
    "attention_multiplier": ((), "another scale of the attention's logits"),
    "residual_multiplier": ((1,), "a factor on the residual branches"),
    "embedding_multiplier": ((1,), "a factor on the embeddings"),
    "scale_emb": ((1,), "a factor on the embeddings"),
    "scale_depth": ((), "a factor on the residual branches"),
    "dim_model_base": ((), "a factor on the logits"),
    "logits_scaling": ((1,), "a factor on the logits"),
    "logit_scale": ((1,), "a factor on the logits"),
    "clip_qkv": ((), "queries, keys and values that are clipped"),
    "qk_norm": ((False,), "norms of queries and keys"),
    "use_qk_norm": ((False,), "norms of queries and keys"),
    "qk_layernorm": ((False,), "norms of queries and keys"),
    "sliding_window_pattern": ((), "a sliding window in some layers"),
    "sliding_window_size": ((), "a sliding window"),
    "attention_chunk_size": ((), "attention in chunks"),
    "kv_lora_rank": ((), "compressed keys and values"),
    "q_lora_rank": ((), "compressed queries"),
    "num_experts": ((0,), "experts"),
    "num_local_experts": ((0,), "experts"),
    "n_routed_experts": ((0,), "experts"),
    "num_experts_per_tok": ((0,), "experts"),
    "moe_intermediate_size": ((0,), "experts"),
    "parallel_attn": ((False,), "attention beside the MLP"),
    "use_parallel_residual": ((False,), "attention beside the MLP"),
    "add_cross_attention": ((False,), "attention to an encoder"),
    "cross_attention_hidden_size": ((), "attention to an encoder"),
    "is_encoder_decoder": ((False,), "an encoder"),
    "pruned_heads": (({},), "heads that were cut out"),
    "text_config": ((), "a text model inside a larger one"),
    "vision_config": ((), "a text model inside a larger one"),
    "use_long_sequence_strategies": ((False,), "another kind of positions"),
}
#: What one architecture takes otherwise than the table says: its own code reads the key, or ignores it by its nature.
_FREE: dict[str, frozenset[str]] = {"qwen2": frozenset({"attention_bias", "qkv_bias", "use_qkv_bias"})}
_GELU = ("gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast")


def standard_form(config: dict[str, Any], *, where: str) -> dict[str, Any]:
    """Return a config as transformers 4 and paddlenlp write it.

    transformers 5 keeps all that concerns rotary positions in ``rope_parameters``: it becomes ``rope_theta``,
    ``partial_rotary_factor`` and ``rope_scaling`` again.

    Args:
        config: the content of ``config.json``.
        where: role and file, for messages.

    Raises:
        ModelError: the parameters differ between kinds of layers, or contradict the old keys.
    """
    result = {name: value for name, value in config.items() if name != "rope_parameters"}
    if not isinstance(result.get("rope_scaling"), dict | None):
        raise ModelError(f"{where}: rope_scaling must be an object or null, got {result['rope_scaling']!r}")
    for key in ("rope_scaling", "rope_parameters"):
        given = config.get(key)
        if given is None:
            continue
        if not isinstance(given, dict):
            raise ModelError(f"{where}: {key} must be an object or null, got {given!r}")
        nested = [name for name, value in given.items() if isinstance(value, dict)]
        if nested:
            raise ModelError(
                f"{where}: {key} gives rotary positions of their own to {' and '.join(nested)} layers, which is not "
                "supported: all layers must have the same"
            )
        given = dict(given)
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in given:
                _merge(result, name, given.pop(name), key, where)
        kind = given.pop("type", None)
        kind = given.pop("rope_type", kind)
        kind = "mrope" if "mrope_section" in given else kind
        scaling = None if kind == "default" or (kind is None and not given) else {"rope_type": kind, **given}
        if key == "rope_scaling":
            result["rope_scaling"] = scaling
        elif scaling is not None or result.get("rope_scaling") is not None:
            _merge(result, "rope_scaling", scaling, key, where)
    return result


def _merge(config: dict[str, Any], name: str, value: Any, source: str, where: str) -> None:
    if config.get(name) not in (None, value):
        raise ModelError(
            f"{where}: {name} is {config[name]!r}, but {value!r} in {source}; they must agree (transformers 5 reads "
            f"{source}, older versions {name})"
        )
    config[name] = value


def check_keys(config: dict[str, Any], model_type: str, *, where: str) -> None:
    """Refuse what a config asks for and is not computed here; name what is unknown in one warning.

    Args:
        config: in :func:`standard_form`.
        model_type: ``"llama"``, ``"qwen2"``, ``"mistral"`` or ``"gemma"``.
        where: role and file, for messages.

    Raises:
        ModelError: naming the key, what it asks for and what to do.
    """
    _check_quantised(config, where)
    free = _FREE.get(model_type, frozenset())
    for key, (nothing, asks) in _ASKS.items():
        value = config.get(key)
        if key in free or value is None or value == [] or value in nothing:
            continue
        if key == "no_rope_layers" and isinstance(value, list) and all(value):  # 1: this layer has them
            continue
        if key == "no_rope_layer_interval" and config.get("no_rope_layers"):  # the list says it
            continue
        raise _refusal(where, key, value, asks, model_type)
    _check_activation(config, model_type, where)
    _check_windows(config, model_type, where)
    if config.get("alibi") and model_type != "llama":
        raise _refusal(where, "alibi", True, "positions that are not rotary", model_type)
    unknown = sorted(set(config) - _READ - _HARMLESS - set(_ASKS) - {"quantization_config", "compression_config"})
    if unknown:
        file = where.partition(": ")[2] or where
        say_once(
            f"{file}: {', '.join(unknown)} {'is' if len(unknown) == 1 else 'are'} unknown here and not read; "
            "if it changes what the model computes, the model is not what it was",
            logging.WARNING,
        )


def attention_window(config: dict[str, Any], model_type: str) -> int | None:
    """Return the window of Qwen2's attention if some layers have one, else None; rows that are no longer than it do
    not feel it.

    ``transformers`` gives the window to the layers from ``max_window_layers`` on, or to those that ``layer_types``
    names. Here Qwen2 attends to everything, so longer rows are refused. Mistral's window, of all layers, is computed.

    Args:
        config: of the whole model.
        model_type: its architecture.
    """
    if model_type != "qwen2" or not config.get("use_sliding_window") or not config.get("sliding_window"):
        return None
    kinds = config.get("layer_types")
    first = config.get("max_window_layers")
    some = "sliding_attention" in kinds if kinds else config["num_hidden_layers"] > (28 if first is None else first)
    return int(config["sliding_window"]) if some else None


def _refusal(where: str, key: str, value: Any, asks: str, model_type: str) -> ModelError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return ModelError(
        f"{where}: {key} is {shown}: that asks for {asks}, which {model_type} models have not here; the model would "
        "compute something else than it was trained for, so it cannot be used"
    )


def _check_activation(config: dict[str, Any], model_type: str, where: str) -> None:
    if model_type == "gemma":
        # null means the tanh approximation, whatever hidden_act says
        name = "hidden_activation" if config.get("hidden_activation") else "hidden_act"
        known: tuple[str, ...] = _GELU
    else:
        name, known = "hidden_act", ("silu", "swish")
    value = config.get(name)
    if value is not None and value not in known:
        raise ModelError(f"{where}: {name} {value!r} is not supported for {model_type}; it must be {known[0]!r}")


def _check_windows(config: dict[str, Any], model_type: str, where: str) -> None:
    window, kinds = config.get("sliding_window"), set(config.get("layer_types") or ())
    other = kinds - {"full_attention", "sliding_attention"}
    if other:
        raise _refusal(where, "layer_types", sorted(other), "layers of another kind", model_type)
    if model_type == "qwen2":
        return
    if model_type == "mistral":
        if len(kinds) == 2 or (kinds == {"full_attention"} and window):
            raise _refusal(where, "layer_types", sorted(kinds), "a window in some layers only", model_type)
        return
    if window is not None and config.get("use_sliding_window", True):
        raise _refusal(where, "sliding_window", window, "a sliding window", model_type)
    if "sliding_attention" in kinds:
        raise _refusal(where, "layer_types", sorted(kinds), "a sliding window", model_type)


def _check_quantised(config: dict[str, Any], where: str) -> None:
    for key in ("quantization_config", "compression_config"):
        value = config.get(key)
        # paddlenlp writes an object that names no algorithm for models that are not quantised
        if not value or (isinstance(value, dict) and "quant_method" not in value and not _algorithm(value)):
            continue
        kind = value.get("quant_method") or _algorithm(value) if isinstance(value, dict) else value
        raise ModelError(
            f"{where}: {key} says that the weights are quantised ({kind}); training needs the original weights. Name "
            "the folder of the model that this one was made from, or dequantise it and save it as bfloat16"
        )


def _algorithm(value: dict[str, Any]) -> Any:
    return value.get("weight_quantize_algo") or value.get("quantization_status")
