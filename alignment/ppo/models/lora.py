"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) through ``paddlenlp.peft``, and merging them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import paddle
from paddle import nn
from paddlenlp.transformers import PretrainedModel

from alignment.errors import ModelError
from alignment.log import get_logger

from .folders import CONFIG_FILE, LORA_CONFIG_FILE, LORA_WEIGHT_FILES, read_config, read_json, shards_of
from .pickle_files import PaddleFile
from .safetensors_file import SafetensorsFile

if TYPE_CHECKING:  # at run time it is imported where it is needed: it takes seconds
    from paddlenlp.peft import LoRAModel

#: The linear layers of attention and MLP, fused or not, under the names that all four architectures share.
DEFAULT_TARGETS: tuple[str, ...] = (
    r".*self_attn\.(q|k|v|o|qkv)_proj",
    r".*mlp\.(gate|up|down|gate_up_fused)_proj",
)
#: What a score model trains whole beside its adapters.
_HEAD = r"score_head\..*"


@dataclass(frozen=True)
class LoRASettings:
    """How to adapt a model.

    Attributes:
        rank: of the update matrices.
        alpha: the update is scaled by ``alpha / rank``; None means ``2 * rank``.
        dropout: on the adapters' input while training. Leave it 0 in PPO, where old and new log-probabilities must
            agree.
        target_modules: regular expressions that match whole names of linear layers; None means attention and MLP.
    """

    rank: int = 8
    alpha: int | None = None
    dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ModelError(f"LoRA rank must be at least 1, got {self.rank}")
        if not 0.0 <= self.dropout < 1.0:
            raise ModelError(f"LoRA dropout must be at least 0 and below 1, got {self.dropout}")


def add_lora(
    model: PretrainedModel,
    settings: LoRASettings,
    *,
    base: str | os.PathLike | None = None,
    dtype: str | None = None,
) -> LoRAModel:
    """Wrap a model so that only adapters (and a score model's head) are trained.

    Args:
        model: a causal or score model.
        settings: rank and so on.
        base: the folder of the plain model, recorded in the adapter so that it can be merged later.
        dtype: that the model is stored in, recorded too; its tensors' own if not given.

    Raises:
        ModelError: no linear layer matches the target modules.
    """
    model.config.architectures = [type(model).__name__]
    from paddlenlp.peft import LoRAConfig, LoRAModel

    config = LoRAConfig(
        r=settings.rank,
        lora_alpha=settings.alpha if settings.alpha is not None else 2 * settings.rank,
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules or DEFAULT_TARGETS),
        trainable_modules=[_HEAD],
        dtype=str(model.config.dtype),
        tensor_parallel_degree=model.config.tensor_parallel_degree,
        base_model_name_or_path=None if base is None else str(Path(base).resolve()),
    )
    try:
        adapted = LoRAModel(model, config)
    except ValueError as error:
        raise ModelError(
            f"LoRA: target_modules {config.target_modules} match a layer that is not linear: {error}"
        ) from error
    if not any("lora_" in name for name in adapted.model.state_dict()):
        examples = [name for name, layer in model.named_sublayers() if isinstance(layer, nn.Linear)][:3]
        raise ModelError(
            f"LoRA: target_modules {config.target_modules} match no linear layer; they are regular expressions for "
            f"whole names such as {', '.join(examples)}"
        )
    if dtype is not None:
        adapted.lora_config.dtype = dtype  # tensors that are stored by rounding do not say it
    return adapted


def is_adapter_folder(path: str | os.PathLike) -> bool:
    """Return whether a folder holds a LoRA adapter."""
    return (Path(path) / LORA_CONFIG_FILE).is_file()


def merge_lora(path: str | os.PathLike, output_dir: str | os.PathLike, base: str | os.PathLike | None = None) -> None:
    """Merge an adapter into its base model and save a plain folder, tokenizer and prompt template included.

    Args:
        path: the adapter's folder, as :func:`alignment.ppo.models.save_model` wrote it.
        output_dir: where the merged model goes.
        base: the folder of the base model; None means the one that the adapter recorded.

    Raises:
        ModelError: no adapter there; its base is unknown or cannot be loaded; the adapter does not fit the base.
    """
    from .loading import load_causal_lm, load_score_model
    from .precision import store_in_bfloat16
    from .saving import save_model
    from .tokenizers import copy_tokenizer_files

    folder = Path(path)
    if not is_adapter_folder(folder):
        raise ModelError(f"{path} holds no LoRA adapter (no {LORA_CONFIG_FILE}); give the folder that a LoRA run saved")
    if not any((folder / name).is_file() for name in LORA_WEIGHT_FILES):
        raise ModelError(f"{path} has no adapter weights (looked for {', '.join(LORA_WEIGHT_FILES)})")
    if Path(output_dir).resolve() in (folder.resolve(), Path(base or folder).resolve()):
        raise ModelError(f"merging would overwrite {output_dir}; give another output folder")
    base = base or read_json(folder / LORA_CONFIG_FILE).get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"{folder / LORA_CONFIG_FILE} does not say which model the adapter belongs to; "
            "name it with --model_name_or_path"
        )
    saved = read_config(folder, role="LoRA adapter")
    if str((saved.get("architectures") or [""])[0]).endswith("ForScore"):
        overrides = {
            name: saved.get(name) for name in ("mean", "var", "normalizer_count") if saved.get(name) is not None
        }
        model = load_score_model(
            base,
            score_type=saved.get("score_type"),
            do_normalize=saved.get("do_normalize"),
            normalizer_type=saved.get("normalizer_type"),
            momentum=saved.get("momentum"),
            config_overrides=overrides,
            role="base of the LoRA adapter",
        )
        model.set_normalizer(**overrides)
    else:
        model = load_causal_lm(base, role="base of the LoRA adapter")
    plain = set(model.state_dict())
    _apply_adapter(model, folder)
    if read_json(folder / LORA_CONFIG_FILE).get("dtype") == "bfloat16":
        store_in_bfloat16(model)  # merged in float32, rounded once
    # Saved without the adapters' own tensors; peft's restore_original_model() would add biases to layers that have
    # none.
    state = {name: tensor for name, tensor in model.state_dict().items() if name in plain}
    save_model(model, output_dir, state_dict=state)
    copy_tokenizer_files(folder if (folder / "tokenizer_config.json").is_file() else base, output_dir)
    get_logger().info("merged %s into %s: %s", path, base, output_dir)


def _apply_adapter(model: PretrainedModel, folder: Path) -> None:
    """Load an adapter into a plain model and merge it into the weights.

    The files are read here and not by paddlenlp, whose reader runs the code that a crafted ``.pdparams`` names.
    """
    from paddlenlp.peft import LoRAConfig, LoRAModel

    try:
        config = LoRAConfig.from_pretrained(str(folder))
        config.lora_dropout, config.dtype = 0.0, "float32"
        adapted = LoRAModel(model, config)
        pickled, index = (folder / name for name in LORA_WEIGHT_FILES)
        files = [PaddleFile(pickled)] if pickled.is_file() else [SafetensorsFile(shard) for shard in shards_of(index)]
    except (ModelError, ValueError, RuntimeError, KeyError, TypeError, OSError, AttributeError) as error:
        raise ModelError(f"LoRA adapter {folder} cannot be loaded into its base: {error}") from error
    saved = {name: (file, shape) for file in files for name, shape in file.shapes().items()}
    expected = adapted.get_trainable_state_dict()
    wrong = [n for n, (_, shape) in saved.items() if n not in expected or list(expected[n].shape) != list(shape)]
    wrong += [n for n in expected if n not in saved]
    if wrong:
        raise ModelError(
            f"LoRA adapter {folder} does not fit its base: {len(wrong)} tensors differ in name or shape, such as "
            f"{wrong[0]}; is the base in {folder / CONFIG_FILE} the one that was adapted?"
        )
    for name, tensor in expected.items():
        tensor.set_value(paddle.to_tensor(saved[name][0].read(name)).astype(tensor.dtype))
    adapted.merge()
