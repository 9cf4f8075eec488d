"""Small dealings with paddlenlp: its log, its downloads, and config values that its modeling code would ignore."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from paddlenlp.transformers import PretrainedConfig
from paddlenlp.utils.download import resolve_file_path
from paddlenlp.utils.log import log_config
from paddlenlp.utils.log import logger as paddlenlp_logger

from alignment.errors import ModelError
from alignment.log import get_logger

from .folders import CONFIG_FILE, GENERATION_CONFIG_FILE, WEIGHT_FILES, read_json

_LEVEL_VARIABLE = "PADDLENLP_LOG_LEVEL"
_ROPE_TYPES = {"linear": "linear", "dynamic": "dynamic_ntk"}


#: What a model's folder may hold beside config and weights: all of it decides how texts are read and written.
_SMALL_FILES = (
    *(GENERATION_CONFIG_FILE, "prompt_template.json", "chat_template.json", "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "sentencepiece.bpe.model"),
)


def quiet_paddlenlp() -> None:
    """Show only the warnings of paddlenlp's log, which else reports every file; ``PADDLENLP_LOG_LEVEL`` sets a level.

    Raises:
        ModelError: ``PADDLENLP_LOG_LEVEL`` names no level.
    """
    level = os.environ.get(_LEVEL_VARIABLE, "WARNING").upper()
    if level not in log_config:
        raise ModelError(f"{_LEVEL_VARIABLE}={level!r} is no log level; it is one of {', '.join(log_config)}")
    paddlenlp_logger.set_level(level)
    # Its modeling code calls swiglu by an old name, of which Paddle warns on every model.
    warnings.filterwarnings("ignore", message=r"(?s).*paddle\.incubate\.nn\.functional\.swiglu")


@functools.cache
def fetch_from_hub(name: str, *, role: str = "model", weights: bool = True) -> Path:
    """Fetch a model by name through paddlenlp's download code and return the local folder that holds it.

    Args:
        name: ``name`` or ``owner/name``.
        role: what the model is for, for messages.
        weights: fetch them too, or only config, tokenizer and templates.

    Raises:
        ModelError: the name is unknown or the hub cannot be reached; the message says how to give a local folder
            instead.
    """
    get_logger().info("%s: there is no folder %s here, so it is looked for on the model hub", role, name)
    try:
        config_file = resolve_file_path(name, [CONFIG_FILE])
        if config_file is None:
            raise FileNotFoundError(f"{name} has no {CONFIG_FILE} there, or the hub did not answer")
        for file in _SMALL_FILES:
            with contextlib.suppress(OSError):  # it has none
                resolve_file_path(name, [file])
        if weights:
            found = resolve_file_path(name, [file for file, _ in WEIGHT_FILES])
            if found is None:
                raise FileNotFoundError(f"{name} has no weights there")
            if str(found).endswith(".index.json"):
                for shard in dict.fromkeys(read_json(Path(found), role=role)["weight_map"].values()):
                    resolve_file_path(name, [shard])
    except (OSError, ValueError, KeyError, TypeError, AssertionError, RuntimeError, json.JSONDecodeError) as error:
        raise ModelError(
            f"{role}: there is no folder {name!r}, and fetching a model of that name failed ({type(error).__name__}: "
            f"{_first_line(error)}). Give the path of a local folder that holds config.json, the tokenizer and the "
            f"weights, or download {name} elsewhere and copy it here"
        ) from error
    return Path(config_file).parent


def fetch_tokenizer_from_hub(name: str, files: Sequence[str], *, role: str = "tokenizer") -> Path:
    """Fetch a tokenizer by name and return the local folder that holds it.

    Args:
        name: of the model.
        files: names of all files that a tokenizer may have; ``tokenizer_config.json`` must be there.
        role: for messages.

    Raises:
        ModelError: the name is unknown or the hub cannot be reached.
    """
    failures = (OSError, ValueError, KeyError, TypeError, AssertionError, RuntimeError)
    try:
        found = resolve_file_path(name, ["tokenizer_config.json"])
        if found is None:
            raise FileNotFoundError(f"{name} has no tokenizer_config.json there, or the hub did not answer")
    except failures as error:
        raise ModelError(
            f"{role}: there is no folder {name!r}, and fetching a tokenizer of that name failed "
            f"({type(error).__name__}: {_first_line(error)}); give the path of a local folder"
        ) from error
    for file in files:
        with contextlib.suppress(*failures):  # most tokenizers have some of the files only
            resolve_file_path(name, [file])
    return Path(found).parent


def translate_rope_scaling(config: PretrainedConfig, *, where: str) -> None:
    """Bring Hugging Face's ``rope_scaling`` into the form that paddlenlp's modeling code reads.

    Only paddlenlp's Llama knows scaled rotary positions: ``llama3`` from ``rope_scaling`` itself, ``linear`` and
    ``dynamic`` from attributes of its own. Anything else it would run without scaling, which gives a model that looks
    sound and is wrong beyond its original length.

    Raises:
        ModelError: the scaling is not supported for this architecture.
    """
    scaling = getattr(config, "rope_scaling", None)
    if not scaling:
        return
    kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, dict) else None
    if kind == "default":
        return
    if config.model_type == "llama" and kind == "llama3":
        config.rope_scaling = {**scaling, "rope_type": "llama3"}
    elif config.model_type == "llama" and kind in _ROPE_TYPES:
        config.rope_scaling_type = _ROPE_TYPES[kind]
        config.rope_scaling_factor = float(scaling["factor"])
    else:
        supported = "llama3, linear and dynamic" if config.model_type == "llama" else "none"
        raise ModelError(
            f"{where}: rope_scaling of type {kind!r} is not supported by paddlenlp's {config.model_type} (supported: "
            f"{supported}); set rope_scaling to null if sequences stay within the original context"
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0] if lines else "no details"
