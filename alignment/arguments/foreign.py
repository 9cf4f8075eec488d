"""Keys that are accepted although this toolkit has no field for them: paddlenlp's other ``TrainingArguments``, and
options of the reference's scripts that it does not need or does not offer.

paddlenlp's keys, types and defaults are read from its source with :mod:`ast`: importing it takes many seconds, and a
list kept here would grow stale.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import operator
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignment.arguments.spec import Spec

NOT_USED = "paddlenlp's trainer uses it, this toolkit's does not"
#: Of paddlenlp's keys, what is done whether they are set or not.
DONE_ANYWAY = {"amp_master_grad": "with bf16, gradients always add up in float32"}

#: Kinds of the enums in paddlenlp's annotations: (kind, choices).
_ENUMS = {"IntervalStrategy": ("str", ("no", "steps", "epoch"))}
_PLAIN = {"bool": "bool", "int": "int", "float": "float", "str": "str", "List[str]": "list"}
_OPERATORS = {
    ast.Pow: operator.pow,
    ast.Mult: operator.mul,
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Div: operator.truediv,
}

_GPU_OPTION = "a setting of paddlenlp's GPU kernels or of their model classes that this version does not use"
_GRPO = "it is of paddlenlp's GRPO; here kl_coeff weighs the KL"
_PYTHON_REWARD = 'write the call as a Python reward: "reward": "file.py:function"'
_GLOBAL_BATCH = "give per_device_prompt_batch_size, per_device_train_batch_size and gradient_accumulation_steps"
_LATER = "not available yet in this version"
_STATIC = "the score and causal models return what this toolkit needs"


#: What other toolkits call the keys of this one (key here -> names there). They are not accepted, since ranges and
#: defaults differ; the message says the name.
ELSEWHERE = {
    "actor_model_name_or_path": "policy_model pretrain",
    "clip_range_ratio": "cliprange clip_ratio eps_clip epsilon",
    "clip_range_value": "cliprange_value value_clip",
    "eval_split_ratio": "val_size",
    "evaluation_strategy": "eval_strategy",
    "gae_lambda": "lam lambd",
    "kl_coeff": "init_kl_coef kl_loss_coef beta",
    "lora_rank": "lora_r",
    "max_dec_len": "max_new_tokens response_length max_response_length max_completion_length generate_max_len",
    "max_length": "max_seq_length max_seq_len cutoff_len",
    "max_src_len": "max_prompt_length prompt_max_len",
    "model_name_or_path": "model_name pretrain",
    "num_return_sequences": "num_generations n_samples_per_prompt rloo_k",
    "prompt_template": "template",
    "recompute": "gradient_checkpointing",
    "reward": "reward_funcs",
    "reward_model_name_or_path": "reward_model reward_model_path reward_pretrain",
    "train_datasets": "dataset dataset_name train_data",
    "update_iters": "num_ppo_epochs ppo_epochs",
    "value_coeff": "vf_coef",
    "zero_padding": "packing",
}


def named_elsewhere(name: str) -> list[str]:
    """The keys that other toolkits call ``name``."""
    return [key for key, names in ELSEWHERE.items() if name in names.split()]


def _option(name: str, default: Any, no_effect: str = "", *, unavailable: str = "", **details: Any) -> Spec:
    kind = type(default).__name__ if isinstance(default, (bool, int, float, str)) else details.pop("kind", "str")
    optional = default is None
    return Spec(
        name, kind, optional, default, no_effect=no_effect, unavailable=unavailable, group="Reference", **details
    )


def _table(*options: Spec) -> dict[str, Spec]:
    return {option.name: option for option in options}


#: Options that the reference's scripts of all stages take.
COMMON = _table(
    _option("unified_checkpoint_config", "", "checkpoints have one layout"),
    _option("tensor_parallel_output", False, _STATIC, neutral=(True,)),
    _option(
        "recompute_granularity",
        "full",
        "recomputation works on whole layers",
        choices=("full", "full_attn", "core_attn"),
    ),
    _option("recompute_use_reentrant", False, "recompute works either way"),
    _option("use_fused_head_and_loss_fn", False, _GPU_OPTION),
    _option("fused_linear", False, _GPU_OPTION),
    _option("fuse_attention_qkv", None, _GPU_OPTION, kind="bool", neutral=(False,)),
    _option("fuse_attention_ffn", None, _GPU_OPTION, kind="bool", neutral=(False,)),
    _option("use_fast_layer_norm", False, _GPU_OPTION),
    _option("flash_mask", False, _GPU_OPTION),
    _option("hidden_dropout_prob", 0.1, "the model's config.json decides", ge=0, lt=1),
    _option("attention_probs_dropout_prob", 0.1, "the model's config.json decides", ge=0, lt=1),
    _option("benchmark", False, unavailable="set max_steps, save_strategy=no and evaluation_strategy=no instead"),
    _option(
        "autotuner_benchmark", False, unavailable="set max_steps, save_strategy=no and evaluation_strategy=no instead"
    ),
    _option("no_cuda", False, help="The same as device cpu."),
    _option("lazy", False, "data are always tokenised once and cached"),
    _option("task_name", None, "a data set is named by its NAME or path alone"),
    _option("chat_template", None, unavailable="use prompt_template: chat, or a Jinja string", neutral=("none",)),
    _option("eos_token", "", unavailable="the end of a text is the tokenizer's eos token"),
    _option("continue_training", True, unavailable="training always starts from model_name_or_path's weights"),
    _option(
        "early_stopping", False, help="true: early_stopping_patience is 4 unless it is given; false: it is not used."
    ),
    _option("early_stopping_threshold", 0.0, unavailable="every improvement counts", ge=0),
)

#: The method that each value of paddlenlp's ``rl_algorithm`` means.
RL_ALGORITHMS = {"ppo": "ppo", "grpo": "grpo", "reinforce_plus_plus": "reinforce"}


def _reference_settings(cls: type, chosen: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What paddlenlp's algorithms take for granted and the methods here do not."""
    return {
        "grpo": {"kl_coeff": 0.001, "max_gen_batches": 32, "overlong_reward_buffer": 256},
        "reinforce_plus_plus": {"kl_coeff": 0.02},
    }


#: Options of the reference's reinforcement-learning script in its later versions, for every method that generates.
ONLINE = _table(
    _option(
        "rl_algorithm",
        "ppo",
        choices=tuple(RL_ALGORITHMS),
        sets=_reference_settings,
        help="Chooses the method, with `alignment ppo` and run_ppo.py: "
        + ", ".join(f"{name}: {method}" for name, method in RL_ALGORITHMS.items())
        + ".",
    ),
    _option("kl_loss_coeff", 0.001, _GRPO, ge=0),
    _option("pg_loss_coeff", 1.0, unavailable="scale learning_rate instead", ge=0),
    _option("use_rm_server", False, unavailable=_PYTHON_REWARD),
    _option("reward_server", None, unavailable=_PYTHON_REWARD),
    _option("use_rule_reward", False, unavailable=_PYTHON_REWARD),
    _option("use_tgt_len_value", False, unavailable=_LATER),
    _option("use_fp32_compute", False, "log-probabilities, rewards and statistics are always float32"),
    _option(
        "critic_recompute_granularity",
        "full",
        "recomputation works on whole layers",
        choices=("full", "full_attn", "core_attn"),
    ),
    _option("actor_tokenizer_alpha", None, unavailable="use tokenizer_name_or_path"),
    _option("reward_tokenizer_alpha", None, unavailable="use reward_tokenizer_name_or_path"),
    _option("reward_critic_tokenizer_alpha", None, unavailable="the critic reads the actor's tokens"),
    _option("use_ema", False, unavailable=_LATER),
    _option("shard_ema", False, "use_ema is not available yet in this version"),
    _option("offload_ema", True, "use_ema is not available yet in this version"),
    _option("ema_beta", 0.992, "use_ema is not available yet in this version", ge=0, lt=1),
    # paddlenlp/rl, the last version: batches are counted over all processes there
    *(_option(name, -1, unavailable=_GLOBAL_BATCH) for name in ("global_batch_size", "global_mini_batch_size")),
    _option("global_gen_batch_size", -1, unavailable=_GLOBAL_BATCH),
    _option("per_device_logprob_batch_size", None, unavailable="use rollout_logprob_batch_size", kind="int"),
    _option("per_device_reward_batch_size", None, unavailable="use rollout_logprob_batch_size", kind="int"),
    _option("per_device_value_batch_size", None, unavailable="use rollout_logprob_batch_size", kind="int"),
    _option("rollout_max_num_seqs", 8, unavailable="use per_device_rollout_batch_size", ge=1),
    _option("rollout_quant_type", "", unavailable="the rollout's weights are the training's own"),
    _option("rollout_tensor_parallel_degree", -1, unavailable="use eval_mode: the rollout's layout"),
    _option("balance_batch", False, "max_tokens_per_micro_batch groups rows by length"),
    _option("use_remove_padding", False, "max_tokens_per_micro_batch keeps padding small"),
    _option("dynamic_sampling", False, unavailable=_LATER),
    _option("max_gen_batches", 32, "dynamic_sampling is off", ge=1),
    _option("enable_overlong_reward_buffer", False, unavailable=_LATER),
    _option("overlong_reward_buffer", 256, "enable_overlong_reward_buffer is off", ge=0),
    _option("overlong_penalty_factor", 1.0, "enable_overlong_reward_buffer is off", ge=0),
    _option("prompt_key", "src", unavailable="a row's layout is known by its columns' names (docs/rows.md)"),
    _option("response_key", "tgt", unavailable="a row's layout is known by its columns' names (docs/rows.md)"),
)

#: The same, where PPO answers otherwise.
PPO = _table(_option("pg_loss_coeff", 1.0, _GRPO, ge=0))

#: Options of the reference's reward-model script that do nothing there either.
REWARD = _table(
    _option("dataset_name_or_path", None, "reward models are trained on train_datasets"),
    _option("eval_with_do_generation", False, "a reward model generates nothing"),
    _option("save_generation_output", False, "a reward model generates nothing"),
)

_QUANT_OPTION = "quantisation is off"
_NO_QUANT = "training of quantised models is not available in this version"
_OTHER_TUNING = "not available in this version; lora is"

#: Options of the reference's fine-tuning script: other kinds of tuning, and quantisation.
SFT = _table(
    _option("use_quick_lora", False, unavailable=_OTHER_TUNING),
    _option("rslora", False, unavailable=_OTHER_TUNING),
    _option("lora_plus_scale", 1.0, unavailable=_OTHER_TUNING),
    _option("pissa", False, unavailable=_OTHER_TUNING),
    _option("vera", False, unavailable=_OTHER_TUNING),
    _option("vera_rank", 8, "vera is off", ge=1),
    _option("prefix_tuning", False, unavailable=_OTHER_TUNING),
    _option("prefix_path", None, unavailable=_OTHER_TUNING),
    _option("num_prefix_tokens", 128, "prefix_tuning is off", ge=1),
    _option("reft", False, unavailable=_OTHER_TUNING),
    _option("neftune", False, unavailable=_LATER),
    _option("neftune_noise_alpha", 5.0, "neftune is off", ge=0),
    _option("from_aistudio", False, unavailable="download the model first and give its folder"),
    _option("save_to_aistudio", False, unavailable="upload output_dir yourself"),
    _option("aistudio_repo_id", None, "nothing is uploaded"),
    _option("aistudio_repo_private", True, "nothing is uploaded"),
    _option("aistudio_repo_license", "Apache License 2.0", "nothing is uploaded"),
    _option("aistudio_token", None, "nothing is uploaded"),
    *(
        _option(name, default, unavailable=_NO_QUANT)
        for name, default in {
            "weight_quantize_algo": None,
            "do_qat": False,
            "do_ptq": False,
            "do_gptq": False,
            "do_awq": False,
            "load_quant_model": False,
            "do_quant_debug": False,
        }.items()
    ),
    *(
        _option(name, default, _QUANT_OPTION)
        for name, default in {
            "weight_blocksize": 64,
            "weight_double_quant": False,
            "weight_double_quant_block_size": 256,
            "quant_type": "a8w8",
            "weight_quant_method": "abs_max_channel_wise",
            "act_quant_method": "avg",
            "cachekv_quant_method": "avg_headwise",
            "search_alpha_min": 0.2,
            "search_alpha_max": 0.8,
            "search_scale_min": 1.0,
            "search_scale_max": 5.0,
            "ptq_step": 32,
            "shift": False,
            "shift_all_linears": False,
            "shift_sampler": "ema",
            "shift_step": 32,
            "smooth": False,
            "smooth_all_linears": False,
            "smooth_sampler": "none",
            "smooth_step": 32,
            "smooth_piecewise_search": False,
            "smooth_k_piece": 3,
            "smooth_search_piece": False,
            "gptq_step": 8,
            "auto_clip": False,
            "awq_step": 8,
            "autoclip_step": 8,
            "test_sample": None,
        }.items()
    ),
    _option("fp8_type", None, _QUANT_OPTION, kind="list"),
    _option("skip_list_names", None, _QUANT_OPTION, kind="list"),
)


@functools.cache
def paddlenlp_keys() -> dict[str, Spec]:
    """Return all keys of paddlenlp's ``TrainingArguments`` and the model-configuration flags that its scripts add to
    them.

    Nothing of paddlenlp is imported. Without an installed paddlenlp the dict is empty.
    """
    found = importlib.util.find_spec("paddlenlp")
    if found is None or not found.submodule_search_locations:
        return {}
    folder = Path(next(iter(found.submodule_search_locations)))
    result = _model_flags(folder / "transformers" / "configuration_utils.py")
    result.update(_training_arguments(folder / "trainer" / "training_args.py"))
    return result


def _training_arguments(file: Path) -> dict[str, Spec]:
    result = {}
    for statement in _class_body(file, "TrainingArguments"):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            default: ast.expr | None = statement.value
            if isinstance(default, ast.Call) and getattr(default.func, "id", "") == "field":
                default = next((word.value for word in default.keywords if word.arg == "default"), None)
            name = statement.target.id
            result[name] = _foreign_spec(name, ast.unparse(statement.annotation), _constant(default))
    return result


def _model_flags(file: Path) -> dict[str, Spec]:
    """Read the tuples (name, type, default, comment) in the lists of ``LlmMetaConfig``."""
    result = {}
    for statement in _class_body(file, "LlmMetaConfig"):
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.List):
            for item in statement.value.elts:
                name, kind, default = item.elts[:3]  # type: ignore[attr-defined]
                result[name.value] = _foreign_spec(name.value, ast.unparse(kind), _constant(default))
    return result


def _class_body(file: Path, name: str) -> list[ast.stmt]:
    """Return the statements of a class in a source file.

    The rest of the file is cut off before parsing, which saves most of the time.
    """
    text = file.read_text(encoding="utf-8")
    start = re.search(rf"^class {name}\b", text, re.MULTILINE)
    if start is None:
        return []
    text = text[start.start() :]
    end = re.search(r"^    (def|@)|\n\S", text, re.MULTILINE)
    tree = ast.parse(text[: end.start()] if end else text)
    return tree.body[0].body  # type: ignore[attr-defined]


def _foreign_spec(name: str, annotation: str, default: Any) -> Spec:
    optional = annotation.startswith("Optional[")
    inner = annotation.removeprefix("Optional[").removesuffix("]") if optional else annotation
    kind, choices = _ENUMS.get(inner, (_PLAIN.get(inner, "json"), None))
    return Spec(
        name, kind, optional, default, choices=choices, no_effect=DONE_ANYWAY.get(name, NOT_USED), group="paddlenlp"
    )


def _constant(node: ast.expr | None) -> Any:
    """Evaluate a default: a literal, ``2**15`` or ``pow(2, 32)``; None for anything else."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_constant(node.left), _constant(node.right))
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "pow":
        return pow(*(_constant(argument) for argument in node.args))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_constant(node.operand)
    return None
