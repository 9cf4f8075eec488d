"""Cheap checks of a model folder, made before anything is loaded.

Nothing here imports Paddle: a folder is judged from ``config.json``, the index file and the headers of the weight
files, so that a run with a wrong path or a download that was cut short stops within milliseconds and says which file
is at fault.
"""

from __future__ import annotations

import json
import os
import shlex
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.errors import ModelError, nearest
from alignment.paths import leaves_folder

from .config_keys import attention_window, check_keys, standard_form
from .gguf import GGUF_FILE, SUFFIX, ordinary_folder
from .safetensors_file import read_safetensors_header

#: ``model_type`` in config.json -> what the architecture is called in messages. These are the backbones that can be
#: trained.
SUPPORTED_MODEL_TYPES: dict[str, str] = {"llama": "Llama", "qwen2": "Qwen2", "mistral": "Mistral", "gemma": "Gemma"}

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
#: The file that marks an adapter of Hugging Face's peft.
PEFT_CONFIG_FILE = "adapter_config.json"
LORA_CONFIG_FILE = "lora_config.json"
LORA_WEIGHT_FILES = ("lora_model_state.pdparams", "peft_model.safetensors.index.json")

#: (index or single file, kind of its content), in the order in which paddlenlp itself looks for them.
WEIGHT_FILES: tuple[tuple[str, str], ...] = (
    ("model.safetensors.index.json", "safetensors"),
    ("model.safetensors", "safetensors"),
    ("model_state.pdparams.index.json", "paddle"),
    ("model_state.pdparams", "paddle"),
    ("pytorch_model.bin.index.json", "torch"),
    ("pytorch_model.bin", "torch"),
)


_LFS_POINTER = "version https://git-lfs.github.com/spec"
_LFS_ADVICE = (
    "is a Git LFS pointer, not the file that it stands for; run 'git lfs pull' where it was cloned, or download the "
    "file itself"
)
#: Ends of tensors' names that only quantised weights have.
_QUANTISED = (
    *(".qweight", ".qzeros", ".scales", ".g_idx", ".absmax", ".nested_absmax", ".quant_map", ".SCB", ".weight_format"),
    *(".weight_scale", ".weight_scale_inv", ".weight_packed", ".weight_quantizer", ".quant_scale"),
)


@dataclass(frozen=True)
class ModelFolder:
    """A model folder that passed the checks.

    Attributes:
        path: the folder.
        config: the content of its ``config.json``.
        model_type: one of :data:`SUPPORTED_MODEL_TYPES`.
        kind: format of the weight files: ``"safetensors"``, ``"paddle"`` (``.pdparams``) or ``"torch"`` (``.bin``).
        weight_files: all weight files, shards in the order of the index.
    """

    path: Path
    config: dict[str, Any]
    model_type: str
    kind: str
    weight_files: tuple[Path, ...]


def looks_like_hub_name(path: str | os.PathLike) -> bool:
    """Return whether ``path`` could be the name of a model on a hub (``name`` or ``owner/name``) and is not a local
    folder.
    """
    text = str(path)
    if not text or Path(text).expanduser().exists():
        return False
    return not text.startswith((".", "/", "~")) and not text.endswith("/") and text.count("/") <= 1 and "\\" not in text


def check_model_folder(path: str | os.PathLike, *, role: str = "model") -> ModelFolder | None:
    """Check all that can be checked about a model folder without loading weights.

    Args:
        path: a local folder, a GGUF file (or the folder of a ``model.gguf``), or the name of a model on a hub.
        role: what the model is for (``"actor"``, ``"reward model"``, ...), for messages.

    Returns:
        What was found (of a GGUF file, its unpacked copy), or ``None`` when ``path`` is no local folder but may be
        the name of a model on a hub (that is only known once it is fetched).

    Raises:
        ModelError: no such folder; ``config.json`` missing, empty or not JSON; architecture not supported; no
            weights; a shard that the index names is missing; a weight file that is cut short or damaged.
    """
    folder = ordinary_folder(path, role=role)
    if not folder.exists():
        if looks_like_hub_name(path):
            return None
        raise ModelError(f"{role}: no such folder: {path}{_sibling_hint(folder)}")
    if not folder.is_dir():
        raise ModelError(
            f"{role}: {path} is a file; give the folder that holds config.json and the weights, or a {SUFFIX} file"
        )
    _check_not_peft(folder, role=role)
    config = read_config(folder, role=role)
    model_type = model_type_of(config, folder, role=role)
    check_keys(config, model_type, where=f"{role}: {folder / CONFIG_FILE}")
    kind, weight_files = _find_weights(folder, role=role)
    for file in weight_files:
        _check_weight_file(file, kind, role=role)
    return ModelFolder(folder, config, model_type, kind, weight_files)


def local_folder(path: str | os.PathLike, *, role: str = "model") -> Path:
    """Return the folder that a path means: itself, the unpacked copy of a GGUF file, or that of a hub's model, whose
    files (but for the weights, which loading fetches) are fetched the first time.

    Raises:
        ModelError: there is no such folder, or the hub cannot be reached.
    """
    folder = ordinary_folder(path, role=role)
    if folder.is_dir():
        return folder
    if not looks_like_hub_name(path):
        raise ModelError(f"{role}: no such folder: {path}{_sibling_hint(folder)}")
    from .upstream import fetch_from_hub  # imports paddlenlp, which takes seconds

    return fetch_from_hub(str(path), role=role, weights=False)


def read_config(folder: Path, *, role: str = "model") -> dict[str, Any]:
    """Return the content of ``folder/config.json`` in :func:`~alignment.ppo.models.config_keys.standard_form`.

    Raises:
        ModelError: the file is missing, empty, not JSON or not an object, or contradicts itself.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise ModelError(
            f"{role}: {folder} has no {CONFIG_FILE}, so it is not a model folder (it holds: {_listing(folder)})"
        )
    config = read_json(file, role=role)
    if not isinstance(config, dict) or not config:
        raise ModelError(f"{role}: {file} is empty; it must be a JSON object that describes the model")
    return standard_form(config, where=f"{role}: {file}")


def read_json(file: Path, *, role: str = "model") -> Any:
    """Return the content of a JSON file; a :class:`ModelError` names the file and line if it is not JSON."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{role}: cannot read {file}: {error}") from error
    if text.startswith(_LFS_POINTER):
        raise ModelError(f"{role}: {file} {_LFS_ADVICE}")
    if not text.strip():
        raise ModelError(f"{role}: {file} is empty; it must hold JSON")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ModelError(
            f"{role}: {file} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error


def write_json_file(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object for people."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def model_type_of(config: dict[str, Any], folder: str | os.PathLike, *, role: str = "model") -> str:
    """Return the supported ``model_type`` that a config describes, by its ``model_type`` or else its ``architectures``.

    Raises:
        ModelError: the architecture is missing or not supported; the message lists the supported ones.
    """
    known = ", ".join(SUPPORTED_MODEL_TYPES)
    model_type = config.get("model_type")
    if model_type in SUPPORTED_MODEL_TYPES:
        return model_type
    if model_type:
        raise ModelError(
            f"{role}: {folder}: model_type {model_type!r} in {CONFIG_FILE} is not supported; supported are {known}"
        )
    for architecture in config.get("architectures") or []:
        for name, title in SUPPORTED_MODEL_TYPES.items():
            if str(architecture).startswith((f"{title}For", f"{title}Model")):
                return name
    raise ModelError(
        f"{role}: {folder}: {CONFIG_FILE} names no supported architecture (model_type is missing, architectures is "
        f"{config.get('architectures')!r}); supported are {known}"
    )


def model_context_length(path: str | os.PathLike) -> int | None:
    """Return the longest sequence a model's positions reach, from ``config.json`` alone.

    Returns:
        ``max_position_embeddings``, or the attention's window where that is shorter and is not computed here; ``None``
        if the config does not say. Of a model on a hub, what is small is fetched for it.

    Raises:
        ModelError: there is no such model, or its config cannot be read.
    """
    folder = local_folder(path)
    config = read_config(folder)
    window = attention_window(config, model_type_of(config, folder))
    reaches = [n for n in (config.get("max_position_embeddings"), window) if isinstance(n, int) and n > 0]
    return min(reaches, default=None)


def _find_weights(folder: Path, *, role: str) -> tuple[str, tuple[Path, ...]]:
    """Return the kind and the files of a folder's weights, following an index if there is one."""
    for name, kind in WEIGHT_FILES:
        file = folder / name
        if not file.is_file():
            continue
        if not name.endswith(".index.json"):
            return kind, (file,)
        return kind, shards_of(file, role=role)
    if (folder / LORA_CONFIG_FILE).is_file():
        raise ModelError(
            f"{role}: {folder} is a LoRA adapter, not a whole model; merge it into its base first: "
            f"python -m alignment merge_lora --lora_path {shlex.quote(str(folder))} --output_path "
            f"{shlex.quote(f'{folder}-merged')}"
        )
    names = ", ".join((*(name for name, _ in WEIGHT_FILES), GGUF_FILE))
    raise ModelError(f"{role}: {folder} has no weights (looked for {names}; it holds: {_listing(folder)})")


def shards_of(index_file: Path, *, role: str = "model") -> tuple[Path, ...]:
    """Return the shard files that an index names.

    Raises:
        ModelError: the index is no such thing, one of its files is missing or would lie outside its folder.
    """
    index = read_json(index_file, role=role)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{role}: {index_file} has no weight_map; it must name the shard of every tensor")
    names = list(dict.fromkeys(str(name) for name in weight_map.values()))
    outside = [name for name in names if leaves_folder(name)]
    if outside:
        raise ModelError(f"{role}: {index_file} names {outside[0]!r}, which is no file of its folder")
    missing = [name for name in names if not (index_file.parent / name).is_file()]
    if missing:
        raise ModelError(
            f"{role}: {index_file.parent} lacks {len(missing)} of the {len(names)} weight files that {index_file.name} "
            f"names: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
        )
    return tuple(index_file.parent / name for name in names)


def _check_weight_file(file: Path, kind: str, *, role: str) -> None:
    if file.stat().st_size == 0:
        raise ModelError(f"{role}: {file} is empty; copy it again")
    with file.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER.encode():
            raise ModelError(f"{role}: {file} {_LFS_ADVICE}")
    if kind == "safetensors":
        _, tensors, _ = read_safetensors_header(file, role=role)
        refuse_quantised(tensors, file, role=role)
    elif kind == "torch":
        check_torch_zip(file, role=role)


def refuse_quantised(names: Iterable[str], file: Path, *, role: str = "model") -> None:
    """Refuse weights in the forms of GPTQ, AWQ, bitsandbytes, FP8 and their like, known by their tensors' names.

    Raises:
        ModelError: naming a tensor.
    """
    for name in names:
        if name.endswith(_QUANTISED):
            raise ModelError(
                f"{role}: {file} holds quantised weights ({name}); training needs the original ones. Name the folder "
                "of the model that this one was made from, or dequantise it and save it as bfloat16"
            )


def _check_not_peft(folder: Path, *, role: str) -> None:
    file = folder / PEFT_CONFIG_FILE
    if not file.is_file() or any((folder / name).is_file() for name, _ in WEIGHT_FILES):
        return
    settings = read_json(file, role=role)
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    raise ModelError(
        f"{role}: {folder} is an adapter of the peft library (for {base or 'a model that it does not name'}), not a "
        "whole model; merge it into its base with peft (merge_and_unload), save that model and name its folder here"
    )


def check_torch_zip(file: Path, *, role: str = "model") -> str:
    """Check that a ``.bin`` file is a whole zip archive as ``torch.save`` writes it (since torch 1.6).

    Returns:
        The name of the archive's folder (``archive``, ``pytorch_model``, ...), without a slash.

    Raises:
        ModelError: the file is cut short, older than the zip format, or something else.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    except (zipfile.BadZipFile, OSError) as error:
        with file.open("rb") as stream:
            is_zip = stream.read(4) == b"PK\x03\x04"
        reason = (
            "is cut short (a zip archive without its end)"
            if is_zip
            else "is not a zip archive as torch >= 1.6 writes it"
        )
        raise ModelError(f"{role}: {file} {reason}; copy it again, or save the model as safetensors") from error
    if len(pickles) != 1:
        raise ModelError(f"{role}: {file} is a zip archive but holds no data.pkl, so it is not a torch weight file")
    return pickles[0][: -len("/data.pkl")]


def _listing(folder: Path, limit: int = 8) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return (", ".join(names[:limit]) + (", ..." if len(names) > limit else "")) or "nothing"


def _sibling_hint(folder: Path) -> str:
    parent = folder.parent
    return nearest(folder.name, [entry.name for entry in parent.iterdir()]) if parent.is_dir() else f" (nor {parent})"
