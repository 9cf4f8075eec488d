"""Loading causal and score models.

Loading is strict: every weight of the model must be in the folder with the right shape, and every tensor in the
folder must have a place in the model. Both are errors that name the tensor, because a model that is partly random
looks like one that trains badly.
"""

from __future__ import annotations

import copy
import logging
import os
from typing import Any

import paddle
from paddle import nn
from paddlenlp.generation import GenerationConfig
from paddlenlp.transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PretrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from alignment import runtime
from alignment.errors import ModelError, some_of
from alignment.log import get_logger, say_once
from alignment.parallel.topology import Topology

from .divisible import check_layout
from .folders import CONFIG_FILE, GENERATION_CONFIG_FILE, ModelFolder, check_model_folder, read_json
from .hf_layout import Weights
from .lora import LoRASettings, add_lora
from .parts import belongs_elsewhere, build_model, pieces_of
from .precision import store_in_bfloat16
from .score_model import SCORE_MODELS, fill_score_config
from .upstream import fetch_from_hub, quiet_paddlenlp, translate_rope_scaling

CONFIGS: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "mistral": MistralConfig,
    "gemma": GemmaConfig,
}
CAUSAL_MODELS: dict[str, type[PretrainedModel]] = {
    "llama": LlamaForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "mistral": MistralForCausalLM,
    "gemma": GemmaForCausalLM,
}
WHOLE = Topology()
#: What a score model of another kind gives, where rewards or costs are wanted.
_GIVES = {
    "critic": "critic: what it gives are values, of unfinished answers too",
    "reward": "reward model: what it gives rises with how good an answer is",
    "cost": "cost model: what it gives rises with how unsafe an answer is",
}
DTYPES = ("float32", "float16", "bfloat16")


def load_causal_lm(
    path: str | os.PathLike,
    *,
    dtype: str = "float32",
    config_overrides: dict[str, Any] | None = None,
    lora: LoRASettings | None = None,
    topology: Topology = WHOLE,
    role: str = "model",
) -> nn.Layer:
    """Load a causal language model from a folder in paddlenlp's or Hugging Face's layout.

    Dropout is switched off: log-probabilities must be the same in training and evaluation mode.

    Args:
        path: a folder, or the name of a model on a hub.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``. On a CPU bfloat16 is rounded storage and outputs
            (:mod:`alignment.ppo.models.precision`), and float16 cannot be had.
        config_overrides: config attributes to change (``use_flash_attention``, ``recompute``, ...).
        lora: wrap the model so that only low-rank adapters are trained.
        topology: the layout; of a divided model only this process's part is loaded.
        role: what the model is for, for messages.

    Returns:
        A paddlenlp model, or a ``paddlenlp.peft.LoRAModel`` around it.

    Raises:
        ModelError: the folder or hub name cannot be used, a tensor is missing, has another shape or no place in the
            model.
    """
    quiet_paddlenlp()
    folder = open_folder(path, role=role)
    config = load_config(folder, dtype=dtype, overrides=config_overrides, role=role)
    model_class = CAUSAL_MODELS[folder.model_type]
    weights = Weights(folder, model_class.base_model_prefix)
    dropped = [name for name in weights if name.startswith(("score_head.", "normalizer."))]
    if dropped:
        say_once(
            f"{role}: {folder.path} is a score model, no language model: its head ({', '.join(dropped)}) is not used "
            "here, and after its training to score it may write badly",
            logging.WARNING,
        )
    _check_divisible(folder, topology, lora, role)
    model = build_model(model_class, config, topology)
    _fill(model, weights, topology, role=role, ignore=("score_head.", "normalizer."), may_lack=())
    if not topology.splits_model:
        _fill_tied_head(model, weights)
    model.generation_config = _generation_config(model, folder, role=role)
    _say_what_differs(weights)
    return _finished(model, folder, lora, dtype)


def load_score_model(
    path: str | os.PathLike,
    *,
    score_type: str | None = "reward",
    do_normalize: bool | None = False,
    normalizer_type: str | None = None,
    momentum: float | None = None,
    dtype: str = "float32",
    config_overrides: dict[str, Any] | None = None,
    lora: LoRASettings | None = None,
    seed: int = 42,
    new_head: str = "trained",
    topology: Topology = WHOLE,
    role: str = "score model",
) -> nn.Layer:
    """Load a score model from a score model's folder, or make one from a causal model's folder with a new head.

    Args:
        path: a folder (ours, or in Hugging Face's layout such as PKU-Alignment's beaver models), or the name of a
            model on a hub.
        score_type: ``"reward"``, ``"cost"`` or ``"critic"``; None keeps what the folder says.
        do_normalize: apply the normaliser to the scores; None keeps what the folder says.
        normalizer_type: None (keep what the folder says), ``"RunningMeanStd"`` or ``"ExponentialMovingAverage"``.
        momentum: of the moving average; None keeps what the folder says, else 0.9.
        dtype, config_overrides, lora, topology, role: as for :func:`load_causal_lm`. With LoRA the head is trained
            whole.
        seed: of a new head.
        new_head: what is to become of a new head: it is ``"trained"``; it is ``"used"`` as it is, which is a warning;
            or it is ``"refused"``.

    Returns:
        A score model, or a ``paddlenlp.peft.LoRAModel`` around it.

    Raises:
        ModelError: as for :func:`load_causal_lm`, an unknown score or normaliser type, or no head where a new one is
            refused.
    """
    quiet_paddlenlp()
    folder = open_folder(path, role=role)
    config = load_config(folder, dtype=dtype, overrides=config_overrides, role=role)
    model_class = SCORE_MODELS[folder.model_type]
    weights = Weights(folder, model_class.base_model_prefix)
    found = getattr(config, "score_type", None)
    if score_type in ("reward", "cost") and found != score_type and found in _GIVES:
        say_once(f"{role}: {folder.path} is a {_GIVES[found]}, and no {score_type}s", logging.WARNING)
    wanted = {
        "score_type": score_type,
        "do_normalize": do_normalize,
        "normalizer_type": normalizer_type,
        "momentum": momentum,
    }
    for name, value in wanted.items():
        if value is not None:
            setattr(config, name, value)
    has_head = "score_head.weight" in weights
    if not has_head and new_head == "refused":
        raise ModelError(
            f"{role}: {folder.path} has no score head, so it is no reward model, and its scores would be random "
            "numbers; train one from it with `alignment rm` or `alignment cost`"
        )
    if has_head:
        config.bias = "score_head.bias" in weights
        config.score_dim = weights.shape("score_head.weight")[-1]
    fill_score_config(config)
    _check_divisible(folder, topology, lora, role)
    model = build_model(model_class, config, topology)
    if has_head:
        _fill(model, weights, topology, role=role, ignore=("lm_head.",), may_lack=("normalizer.",))
    else:
        _fill(model, weights, topology, role=role, ignore=("lm_head.",), may_lack=("normalizer.", "score_head."))
        if topology.last_stage:
            model.reset_head(seed)
        get_logger().log(
            logging.WARNING if new_head == "used" else logging.INFO,
            "%s: %s has no score head; a new one is drawn from normal(0, 1/sqrt(%d + 1)) with seed %d%s",
            role,
            folder.path,
            config.hidden_size,
            seed,
            ", and as it is not trained here, its scores are random numbers" if new_head == "used" else "",
        )
    _say_what_differs(weights)
    return _finished(model, folder, lora, dtype)


def _finished(model: PretrainedModel, folder: ModelFolder, lora: LoRASettings | None, dtype: str) -> nn.Layer:
    """The loaded model with adapters if wanted, in the storage that was asked for."""
    by_rounding = dtype == "bfloat16" and model.config.dtype == "float32"
    adapted = add_lora(model, lora, base=folder.path, dtype=dtype) if lora else model
    return store_in_bfloat16(adapted) if by_rounding else adapted


def open_folder(path: str | os.PathLike, *, role: str = "model") -> ModelFolder:
    """Return the checked folder of a path or, after fetching it, of a hub name.

    Raises:
        ModelError: see :func:`alignment.ppo.models.folders.check_model_folder`; or the hub cannot be reached.
    """
    folder = check_model_folder(path, role=role) or check_model_folder(fetch_from_hub(str(path), role=role), role=role)
    assert folder is not None  # what was fetched is a local folder
    return folder


def load_config(
    folder: ModelFolder, *, dtype: str = "float32", overrides: dict[str, Any] | None = None, role: str = "model"
) -> PretrainedConfig:
    """Return the paddlenlp config of a folder, with dropout off and Hugging Face's attributes translated.

    Raises:
        ModelError: a value in ``config.json`` makes no sense or asks for something that paddlenlp's modeling code
            would silently ignore.
    """
    try:
        config = CONFIGS[folder.model_type].from_dict(copy.deepcopy(folder.config))
    except (ValueError, TypeError, KeyError, OSError, AttributeError) as error:
        raise ModelError(f"{role}: {folder.path / CONFIG_FILE} cannot be used: {error}") from error
    for name, value in (overrides or {}).items():
        setattr(config, name, value)
    for name, value in list(vars(config).items()):
        if "dropout" in name and isinstance(value, float) and value:
            setattr(config, name, 0.0)
    if folder.model_type == "mistral":
        # paddlenlp's Mistral embeds this id as zeros; it may be eos or an ordinary token, and pads are never read
        config.pad_token_id = None
    config.dtype = built_dtype(dtype, role=role)
    _check_config(config, folder, role=role)
    translate_rope_scaling(config, where=f"{role}: {folder.path / CONFIG_FILE}")
    return config


def built_dtype(dtype: str, *, role: str = "model") -> str:
    """Return the dtype of the tensors that a model of ``dtype`` is built with: itself, or on a CPU ``"float32"``, where
    bfloat16 is rounded storage.

    Raises:
        ModelError: no such dtype, or float16 on a CPU.
    """
    if dtype not in DTYPES:
        raise ModelError(f"{role}: dtype {dtype!r} is unknown; it is one of {', '.join(DTYPES)}")
    if not runtime.is_cpu():
        return dtype
    if dtype == "float16":
        raise ModelError(f"{role}: Paddle has no float16 kernels on CPUs; load it as float32 or bfloat16")
    return "float32"


def _check_config(config: PretrainedConfig, folder: ModelFolder, *, role: str) -> None:
    """Refuse what would only fail, or be ignored, deep inside the modeling code."""
    where = f"{role}: {folder.path / CONFIG_FILE}"
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ):
        value = getattr(config, name, None)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{where}: {name} must be a whole number of at least 1, got {value!r}")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise ModelError(f"{where}: num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}")
    if folder.model_type == "gemma":
        return
    if config.hidden_size % heads:
        raise ModelError(f"{where}: hidden_size {config.hidden_size} must be a multiple of num_attention_heads {heads}")
    head_dim = folder.config.get("head_dim")
    if head_dim not in (None, config.hidden_size // heads):
        raise ModelError(
            f"{where}: head_dim {head_dim} differs from hidden_size / num_attention_heads = "
            f"{config.hidden_size // heads}; paddlenlp's {folder.model_type} cannot do that"
        )


def _check_divisible(folder: ModelFolder, topology: Topology, lora: LoRASettings | None, role: str) -> None:
    check_layout(folder.config, topology, f"{role}: {folder.path}")
    if lora and topology.splits_model:
        raise ModelError(f"{role}: LoRA adapters cannot be divided over tensor or pipeline ranks; use data parallelism")


def _fill(
    model: PretrainedModel,
    weights: Weights,
    topology: Topology,
    *,
    role: str,
    ignore: tuple[str, ...],
    may_lack: tuple[str, ...],
) -> None:
    """Set all weights of a model or of this process's part of it.

    Args:
        ignore: prefixes of tensors that the folder may have and the model has not.
        may_lack: prefixes of tensors that the model has and the folder may lack.
    """
    state = model.state_dict()
    pieces = pieces_of(model, topology)
    folder = weights.folder.path
    tied = model.config.tie_word_embeddings
    wanted = {piece.name for piece in pieces.values()}
    unexpected = [
        n
        for n in weights
        if n not in wanted
        and not (tied and n == "lm_head.weight")
        and not n.endswith("rotary_emb.inv_freq")
        and not n.startswith(ignore)
        and not belongs_elsewhere(n, model, topology)
    ]
    missing = [
        n for n in wanted if n not in weights and not n.startswith(may_lack) and not (tied and n == "lm_head.weight")
    ]
    if any("qkv_proj" in name or "gate_up_fused_proj" in name for name in missing):
        raise ModelError(
            f"{role}: {folder} stores attention and MLP weights apart; fuse_attention_qkv and fuse_attention_ffn "
            f"must be false to load it"
        )
    if missing:
        raise ModelError(
            f"{role}: {folder} lacks {len(missing)} of the {len(state)} tensors that its config asks for: "
            f"{some_of(sorted(missing))}; the config belongs to another model, or the weights are incomplete"
        )
    if unexpected:
        raise ModelError(
            f"{role}: {folder} has {len(unexpected)} tensors that its config has no place for: "
            f"{some_of(sorted(map(weights.stored_name, unexpected)))}; the config belongs to another model, or "
            f"paddlenlp's {weights.folder.model_type} lacks a feature that this model uses"
        )
    for name, tensor in state.items():
        piece = pieces[name]
        whole = piece.name
        if whole not in weights or (tied and whole == "lm_head.weight"):
            continue
        array = weights.read(whole)
        if whole.startswith("normalizer.") and array.size == tensor.size:
            array = array.reshape(tensor.shape)  # a count may be stored as [] or [1]
        expected = piece.whole_shape(tensor.shape, topology)
        if list(array.shape) != expected:
            raise ModelError(
                f"{role}: {weights.file_of(whole)}: tensor {weights.stored_name(whole)} has shape {list(array.shape)} "
                f"(as [in, out]); the config asks for {expected}"
            )
        tensor.set_value(paddle.to_tensor(piece.cut(array, topology)).astype(tensor.dtype))


def _generation_config(model: PretrainedModel, folder: ModelFolder, *, role: str) -> GenerationConfig:
    """Return the folder's generation_config.json, which may name more ids that end an answer than config.json does."""
    if not (folder.path / GENERATION_CONFIG_FILE).is_file():
        return model.generation_config
    read_json(folder.path / GENERATION_CONFIG_FILE, role=role)
    try:
        return GenerationConfig.from_pretrained(str(folder.path))
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise ModelError(
            f"{role}: {folder.path / GENERATION_CONFIG_FILE} cannot be used: {error}; mend it or take it away"
        ) from error


def _fill_tied_head(model: PretrainedModel, weights: Weights) -> None:
    """Give Mistral's head the embedding's values if the config ties them: paddlenlp's Mistral has no tied head of its
    own.
    """
    embedding, head = model.get_input_embeddings().weight, model.lm_head.weight
    if not model.config.tie_word_embeddings or head is embedding:
        return
    say_once(
        f"{weights.folder.path}: paddlenlp's {weights.folder.model_type} cannot tie the LM head to the embedding; "
        f"the head becomes a copy"
    )
    head.set_value(embedding if list(head.shape) == list(embedding.shape) else embedding.t())
    model.config.tie_word_embeddings = False


def _say_what_differs(weights: Weights) -> None:
    if weights.is_torch_layout and weights.folder.model_type == "gemma":
        say_once(
            f"{weights.folder.path}: paddlenlp's gemma computes GELU exactly where Hugging Face's takes its tanh "
            "approximation; logits differ by about one part in a thousand"
        )
