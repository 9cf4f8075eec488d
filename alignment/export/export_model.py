"""Exporting a trained model: from a run's folder to one that paddlenlp or ``transformers`` opens."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.errors import ArgumentsError, CheckpointError, ModelError, nearest
from alignment.export.export_weights import export_tensors, parse_size
from alignment.export.hf_config import causal_architecture, hf_config, hf_generation_config, score_architecture
from alignment.export.hf_tokenizer import open_source_tokenizer, write_hf_tokenizer, write_trained_template
from alignment.flow.checkpoint import MANIFEST, disk_errors, verify
from alignment.log import get_logger
from alignment.ppo.models.folders import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    LORA_CONFIG_FILE,
    WEIGHT_FILES,
    check_model_folder,
    read_json,
    write_json_file,
)
from alignment.ppo.models.gguf import ordinary_folder
from alignment.ppo.models.hf_layout import Weights
from alignment.ppo.models.json_tokenizer import JsonTokenizer
from alignment.ppo.models.loading import CAUSAL_MODELS, load_config
from alignment.ppo.models.lora import is_adapter_folder, merge_lora
from alignment.ppo.models.safetensors_file import DTYPE_CODES, StoredTensor, write_weights
from alignment.ppo.models.score_model import fill_score_config
from alignment.ppo.models.tokenizers import copy_tokenizer_files
from alignment.ppo.models.upstream import quiet_paddlenlp

FORMATS = ("paddle", "huggingface")
ROLES = ("policy", "value")
_CHECKPOINT = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Attributes:
        source: the model folder that was read.
        output: the folder that was written.
        architecture: as ``config.json`` says.
        weight_files: their names.
        size: bytes of weights.
        notes: what the reader of the folder should know.
    """

    source: Path
    output: Path
    architecture: str
    weight_files: list[str]
    size: int
    notes: list[str]


def export_model(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    *,
    format: str = "paddle",
    role: str | None = None,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
) -> ExportReport:
    """Write a checkpoint's model as one folder of safetensors with config, tokenizer and prompt template.

    A LoRA adapter is merged into its base on the way.

    Args:
        checkpoint: a model folder, a PPO run's ``output_dir``, or ``checkpoint-N`` of any stage (verified).
        output: the folder to write; it appears whole or not at all.
        format: ``"paddle"`` (paddlenlp opens it) or ``"huggingface"`` (``transformers`` opens it).
        role: ``"policy"`` or ``"value"`` where there are both; None means the policy.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; None keeps every tensor's own.
        max_shard_size: weights beyond it are split into files of at most that size.
        overwrite: replace what ``output`` holds.

    Raises:
        ArgumentsError: an argument cannot be used, or ``output`` is in use.
        CheckpointError: the checkpoint is damaged, or the disk refuses.
        ModelError: there is no model, or one that cannot be exported.
    """
    _known("format", format, FORMATS)
    _known("role", role, (None, *ROLES))
    _known("dtype", dtype, (None, *DTYPE_CODES))
    shard_bytes = parse_size(max_shard_size)
    quiet_paddlenlp()
    source = find_model(checkpoint, role)
    target = Path(output).expanduser()
    _check_output(target, source, Path(checkpoint).expanduser(), overwrite)
    with _replacing(target) as folder:
        read_from = source
        if is_adapter_folder(source):
            read_from = folder.parent / f"{folder.name}-merged"
            try:
                merge_lora(source, read_from)
                report = _write(read_from, folder, format, dtype, shard_bytes)
            finally:
                shutil.rmtree(read_from, ignore_errors=True)
        else:
            report = _write(read_from, folder, format, dtype, shard_bytes)
    return ExportReport(source, target, *report)


def find_model(checkpoint: str | os.PathLike, role: str | None = None) -> Path:
    """Return the model folder that a checkpoint means, after verifying the checkpoint if it has a manifest.

    Raises:
        CheckpointError: no such folder, no model in it, no such role, or a file that differs from the manifest.
    """
    folder = ordinary_folder(checkpoint, role="export")
    if not folder.is_dir():
        if folder.exists():
            raise CheckpointError(f"{checkpoint} is a file; give the folder that holds the model")
        siblings = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise CheckpointError(f"no such folder: {checkpoint}{nearest(folder.name, siblings)}")
    for place in (folder, folder.absolute().parent):
        is_checkpoint = _CHECKPOINT.fullmatch(place.name) and (place / "trainer").is_dir()
        if is_checkpoint or (place == folder and (place / MANIFEST).is_file()):
            verify(place)
    if _holds_model(folder):
        if role == "value" and not _is_score_folder(folder):
            raise CheckpointError(f"{folder} is one model, and no value model (it has no score head); leave out --role")
        return folder
    found = [name for name in ROLES if (folder / name / CONFIG_FILE).is_file()]
    if found:
        chosen = role or "policy"
        if chosen not in found:
            raise CheckpointError(
                f"{folder} holds no {chosen} model, only {found[0]}; export it with --role {found[0]}"
            )
        if role is None and len(found) > 1:
            get_logger().info("%s holds policy and value; exporting the policy (--role value for the other)", folder)
        return folder / chosen
    checkpoints = [entry.name for entry in folder.iterdir() if entry.is_dir() and _CHECKPOINT.fullmatch(entry.name)]
    if checkpoints:
        newest = max(checkpoints, key=lambda name: int(name.rpartition("-")[2]))
        raise CheckpointError(
            f"{folder} holds no final model, so its run has not finished; export one of its {len(checkpoints)} "
            f"checkpoints, such as {folder / newest}"
        )
    # Says which of config.json and weights is missing.
    check_model_folder(folder.absolute(), role="export")
    raise CheckpointError(f"{folder} holds no model")


def _holds_model(folder: Path) -> bool:
    names = (LORA_CONFIG_FILE, *(name for name, _ in WEIGHT_FILES))
    return (folder / CONFIG_FILE).is_file() and any((folder / name).is_file() for name in names)


def _is_score_folder(folder: Path) -> bool:
    config = read_json(folder / CONFIG_FILE, role="export")
    return isinstance(config, dict) and (
        "score_type" in config or any("ForScore" in str(name) for name in config.get("architectures") or [])
    )


def _write(
    source: Path, target: Path, format: str, dtype: str | None, shard_bytes: int
) -> tuple[str, list[str], int, list[str]]:
    """Fill ``target``; returns architecture, weight files, bytes and notes."""
    folder = check_model_folder(source.absolute(), role="export")
    if folder is None:
        raise ModelError(f"no such folder: {source}")
    config = load_config(folder, role="export")
    prefix = CAUSAL_MODELS[folder.model_type].base_model_prefix
    weights = Weights(folder, prefix)
    tensors = export_tensors(weights, config, prefix, style=format, dtype=dtype)
    written_dtype = dtype or _main_dtype(tensors)
    is_score = "score_head.weight" in weights
    if is_score:
        config.bias = "score_head.bias" in weights
        config.score_dim = weights.shape("score_head.weight")[-1]
        fill_score_config(config)
    tokenizer = open_source_tokenizer(source)
    notes = [] if tokenizer is not None else ["the source has no tokenizer, so none was exported"]
    if format == "paddle":
        score_class = score_architecture(folder.model_type, plain=False)
        architecture = score_class if is_score else causal_architecture(folder.model_type)
        _write_paddle_config(target, config, architecture, written_dtype)
        copy_tokenizer_files(source, target)
        if isinstance(tokenizer, JsonTokenizer):
            tokenizer.save_pretrained(target)
        if tokenizer is not None:
            write_trained_template(source, target)
        if not is_score and (source / GENERATION_CONFIG_FILE).is_file():
            shutil.copyfile(source / GENERATION_CONFIG_FILE, target / GENERATION_CONFIG_FILE)
    else:
        architecture, score_dim = causal_architecture(folder.model_type), None
        plain_head = is_score and _is_plain_head(config)
        if is_score:
            architecture, score_dim = score_architecture(folder.model_type, plain=plain_head), config.score_dim
        if plain_head:
            # The same numbers under the name that transformers' *ForSequenceClassification reads.
            head = next(tensor for tensor in tensors if tensor.name == "score_head.weight")
            tensors.append(StoredTensor("score.weight", head.shape, head.code, head.read))
        elif is_score:
            notes.append(
                "the score head has a bias or a normaliser, which transformers' *ForSequenceClassification cannot "
                "compute; load the backbone with AutoModel and apply score_head and normalizer from the weights"
            )
        content = hf_config(
            folder, config, tokenizer, dtype=written_dtype, architecture=architecture, score_dim=score_dim
        )
        write_json_file(target / CONFIG_FILE, content)
        if not is_score:
            file = source / GENERATION_CONFIG_FILE
            saved = read_json(file, role="export") if file.is_file() else {}
            write_json_file(target / GENERATION_CONFIG_FILE, hf_generation_config(folder, config, tokenizer, saved))
        if tokenizer is not None:
            write_hf_tokenizer(source, target, tokenizer)
    files = write_weights(
        target, tensors, metadata_format="pt" if format == "huggingface" else "np", max_shard_bytes=shard_bytes
    )
    return architecture, files, sum(tensor.size for tensor in tensors), notes


def _is_plain_head(config: Any) -> bool:
    """Whether the scores are the head's product alone, without bias or normaliser."""
    normalises = config.do_normalize and config.normalizer_type and config.score_type != "critic"
    return not config.bias and not normalises


def _main_dtype(tensors: list[StoredTensor]) -> str:
    code = max(tensors, key=lambda tensor: tensor.size).code
    return next((name for name, value in DTYPE_CODES.items() if value == code), "float32")


def _write_paddle_config(target: Path, config: Any, architecture: str, dtype: str) -> None:
    config.architectures = [architecture]
    config.dtype = dtype
    if config.model_type == "mistral":
        config.tie_word_embeddings = False  # paddlenlp's Mistral cannot; its head is written out
    for name in ("torch_dtype", "transformers_version", "_name_or_path"):
        if hasattr(config, name):
            delattr(config, name)
    config.save_pretrained(str(target))


def _known(name: str, value: str | None, known: tuple[str | None, ...]) -> None:
    if value not in known:
        names = [item for item in known if item]
        raise ArgumentsError(
            f"{name} {value!r} is unknown{nearest(str(value), names)}; it is one of {', '.join(names)}"
        )


def _check_output(target: Path, source: Path, checkpoint: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise ArgumentsError(f"output {target} is a file; give a folder")
    place = target.resolve()
    for read in (source.resolve(), checkpoint.resolve()):
        if place == read or place in read.parents:
            raise ArgumentsError(f"output {target} is where the model is read from; give another folder")
    with disk_errors(target, doing="export to", place="output"):
        if target.is_dir() and any(target.iterdir()) and not overwrite:
            raise ArgumentsError(f"output {target} is not empty; give another folder, or --overwrite to replace it")


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Give an empty folder beside ``target``; when the body ends well it takes ``target``'s place."""
    with disk_errors(target, doing="export to", place="output"):
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".exporting-{target.name}-", dir=target.absolute().parent))
        try:
            folder = work / "new"
            folder.mkdir()
            yield folder
            if target.exists():
                os.rename(target, work / "old")
            try:
                os.rename(folder, target)
            except OSError:
                if (work / "old").exists():
                    os.rename(work / "old", target)
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
