"""Data sets that live on the Hugging Face hub: a local copy if a path is given, else fetched and cached by
``datasets``.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlparse

from alignment.errors import DataError
from alignment.ppo.data.base import describe_exception
from alignment.ppo.data.files import ALL_CONFIGS, FileDataset


class HubDataset(FileDataset):
    """A data set of the hub; a base for others.

    Args:
        path: a local copy (see :class:`FileDataset`); None fetches the data set, or finds it in the cache of
            ``datasets``.

    Raises:
        DataError: the path cannot be used, or there is none and the hub cannot be reached.
    """

    REPO: ClassVar[str]
    CONFIG: ClassVar[str | None] = None
    SPLIT: ClassVar[str] = "train"

    def __init__(self, path: str | Path | None = None) -> None:
        if path is not None:
            super().__init__(path, self.SPLIT, self.CONFIG or ALL_CONFIGS)
        else:
            self.files = []
            self.rows = fetch(self.REPO, self.CONFIG, self.SPLIT, str(self.NAME))


def fetch(repo: str, config: str | None, split: str, name: str) -> Any:
    """Return ``datasets.load_dataset(repo, config, split=split)``.

    Raises:
        DataError: it failed; the message says how to give a local copy of data set ``name`` instead.
    """
    cure = (
        f"Without network, give a local copy (a folder as on the hub, or one parquet, json or jsonl file): "
        f"{name}::/path/to/{repo.partition('/')[2]}"
    )
    try:
        import datasets
    except ImportError as err:
        raise DataError(
            f"data set {name!r} is fetched by the package `datasets`, which cannot be imported ({err}). {cure}"
        ) from err
    cached = Path(datasets.config.HF_DATASETS_CACHE) / repo.replace("/", "___")
    if not cached.exists() and not _reachable():
        raise DataError(f"data set {name!r} is not on this machine and the Hugging Face hub cannot be reached. {cure}")
    try:
        return datasets.load_dataset(repo, config, split=split)
    except Exception as err:  # whatever the library raises, the user needs to hear the way round it
        raise DataError(
            f"data set {name!r} could not be fetched from {repo}: {describe_exception(err)}. {cure}"
        ) from err


def _reachable() -> bool:
    """Whether the hub's name can be looked up: saves the library's half minute of retries on a machine without
    network.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # the proxy looks names up
    host = urlparse(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname or "huggingface.co"
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
