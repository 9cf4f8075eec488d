"""``import paddlenlp`` without its front page.

``paddlenlp/__init__.py`` imports everything the library has: task flows, servers, data augmentation, and with them
scikit-learn, SciPy, pandas and their like. This toolkit needs its models only. So the package is put in place with
its front page unread; reading an attribute that only the front page defines (``paddlenlp.Taskflow``) reads it then.
Nothing of paddlenlp is changed. It saves two thirds of the import time (9 s -> 3 s on one core) and 130 MB in every
process.

paddlenlp makes folders in the home directory while it is imported, and fails where it may not. There it gets a folder
among the temporary files (``PPNLP_HOME``, unless the user has set it).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import tempfile
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = "paddlenlp"
HOME = "PPNLP_HOME"
# Its modules import each other in circles; which of them must come first was found out for these versions.
KNOWN_VERSIONS = ("3.0.0b4",)
# The parts that can be imported by themselves; any other one (peft, trainer, ...) reads the front page first.
ALONE = frozenset({"data", "generation", "layers", "ops", "quantization", "transformers", "utils"})


def defer() -> None:
    """Let the next ``import paddlenlp`` (or of a part of it) leave the front page out. Does nothing if it was imported
    already or is of an unknown version.
    """
    if PACKAGE not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def settle_home() -> None:
    """Choose a folder for what paddlenlp keeps, where the home directory is none that may be written."""
    if HOME in os.environ:
        return
    home = Path(os.path.expanduser("~"), ".paddlenlp")
    try:
        if not home.is_absolute():  # a user without a home
            raise FileNotFoundError(home)
        for part in ("models", "datasets", "packages"):
            (home / part).mkdir(parents=True, exist_ok=True)
    except OSError:
        own = Path(tempfile.gettempdir(), f"paddlenlp-{os.getuid()}")
        own.mkdir(mode=0o700, exist_ok=True)
        is_own = own.stat().st_uid == os.getuid() and not own.is_symlink()
        os.environ[HOME] = str(own) if is_own else tempfile.mkdtemp(prefix="paddlenlp-")


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, part = fullname.partition(".")
        if package != PACKAGE:
            return None
        if part:
            return self._part(fullname, part)
        settle_home()
        spec = PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        try:
            version = importlib.metadata.version(PACKAGE)
        except importlib.metadata.PackageNotFoundError:
            return None
        if version not in KNOWN_VERSIONS:
            return None
        spec.loader = _Loader(spec.loader, version)
        return spec

    def _part(self, fullname: str, part: str) -> ModuleSpec | None:
        module = sys.modules.get(PACKAGE)
        if "." in part or part in ALONE or not isinstance(module, _Unread):
            return None
        module.read()
        found = sys.modules.get(fullname)
        return None if found is None else ModuleSpec(fullname, _Imported(found), is_package=hasattr(found, "__path__"))


class _Imported(Loader):
    """Hands out a module that the front page has imported meanwhile."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Loader(Loader):
    def __init__(self, front_page: Loader, version: str) -> None:
        self.front_page, self.version = front_page, version

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Unread(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__version__"] = self.version  # its own modules ask for it
        importlib.import_module(f"{PACKAGE}.data")  # first of all, or the circle does not close


class _Unread(ModuleType):
    """The package before its front page was read."""

    def __getattr__(self, name: str) -> Any:
        # Tools ask every module for __wrapped__, __all__ and the like.
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.read()
        return getattr(self, name)

    def read(self) -> None:
        """Read the front page."""
        loader = self.__spec__.loader  # type: ignore[union-attr]
        self.__class__ = ModuleType
        loader.front_page.exec_module(self)  # type: ignore[union-attr]
