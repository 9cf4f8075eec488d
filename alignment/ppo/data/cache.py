"""Token rows on disk: flat arrays under a key that changes with everything they depend on.

The folder is shared by all runs of a user. It may be emptied at any time, and is kept below :data:`MOST_BYTES` by
taking out what was not used for longest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from alignment.log import get_logger
from alignment.ppo.data.chat import tokenizer_folder

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
MOST_BYTES = 20 * 10**9
_PROBES = ("Hello, world! 12345\n\n  two", "Привет, 世界 \U0001f600", "")


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a hash of what decides a tokenizer's output: its class and that one's code, vocabulary, special tokens,
    files, and some probes.
    """
    digest = hashlib.sha256()
    module = sys.modules.get(type(tokenizer).__module__)
    if getattr(module, "__file__", None):
        digest.update(source_fingerprint(module).encode())
    facts = [
        type(tokenizer).__name__,
        _safe_len(tokenizer),
        [getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos")],
    ]
    if hasattr(tokenizer, "get_vocab"):
        facts.append(sorted(tokenizer.get_vocab().items()))
    facts.append([list(tokenizer(probe, add_special_tokens=True)["input_ids"]) for probe in _PROBES])
    digest.update(json.dumps(facts, default=str).encode())
    folder = tokenizer_folder(tokenizer)
    for name in _TOKENIZER_FILES if folder else ():
        if (folder / name).is_file():
            digest.update(name.encode() + (folder / name).read_bytes())
    return digest.hexdigest()


def _safe_len(tokenizer: Any) -> int | None:
    return len(tokenizer) if hasattr(tokenizer, "__len__") else None


def cache_key(facts: Mapping[str, Any], samples: str) -> str:
    """Return the hash of ``facts`` and of the hash of all samples."""
    return hashlib.sha256((json.dumps(facts, sort_keys=True, default=str) + samples).encode()).hexdigest()


def source_fingerprint(*modules: Any) -> str:
    """Return a hash of the source text of modules: what they make of a sample changes with it."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()


def cache_file(folder: Path, kind: str, key: str) -> Path:
    """Where the rows of ``key`` lie."""
    return folder / f"{kind}-{key[:20]}.npz"


def read_cache(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """Return the arrays stored under ``key``, or None: there are none, or (said in a warning) they are damaged."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:  # every array's checksum is verified by reading it
            arrays = {name: stored[name] for name in stored.files}
        if str(arrays.pop("key")) != key:
            raise ValueError("it belongs to other data")
        with contextlib.suppress(OSError):
            os.utime(path)  # used just now
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as err:
        get_logger().warning("the token cache %s is damaged (%s): tokenising again", path, err)
        return None
    return arrays


def write_cache(path: Path, key: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays to a temporary name, then rename. A cache that cannot be written is said, and done without."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            np.savez(stream, key=np.array(key), **arrays)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        _make_room(path)
    except OSError as err:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        get_logger().warning(
            "token rows could not be cached in %s (%s); they will be tokenised again next time", path, err
        )


def _make_room(newest: Path) -> None:
    """Take out the cached files that were not used for longest, until the folder is small enough; ``newest`` stays."""
    files = {}
    for file in newest.parent.glob("*.npz"):
        with contextlib.suppress(OSError):  # another run may have taken it out
            files[file] = file.stat()
    size = sum(facts.st_size for facts in files.values())
    for file in sorted(files, key=lambda file: files[file].st_mtime):
        if size > MOST_BYTES and file != newest:
            with contextlib.suppress(OSError):
                file.unlink()
            size -= files[file].st_size
