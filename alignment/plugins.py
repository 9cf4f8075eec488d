"""User code by name: modules and files that register data sets and rewards, and objects named ``file.py:name``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from alignment.errors import AlignmentError, ArgumentsError, nearest

ENTRY_POINT_GROUP = "alignment.plugins"


def load_plugins(names: Sequence[str] | str | None = None) -> None:
    """Import user code, so that the data sets and rewards in it are registered.

    Everything that installed packages offer under the entry-point group ``alignment.plugins`` is loaded first, then
    ``names`` in order. In the code so loaded ``from data import RawDataset, RawSample`` means
    :mod:`alignment.ppo.data`, and a ``.py`` file can import its neighbours. Loading something again does nothing.

    Args:
        names: module names and ``.py`` files; a single one may be given as text.

    Raises:
        ArgumentsError: something cannot be found, or raises while it is imported.
    """
    with _named_data():
        _load_entry_points()
        for name in [names] if isinstance(names, str) else list(names or []):
            if not isinstance(name, str) or not name.strip():
                raise ArgumentsError(f"plugins: {name!r} is neither a module name nor a .py file")
            _load_module(name.strip(), "plugins")


def load_object(spec: str) -> Any:
    """Return what ``file.py:name`` or ``module:name`` names.

    Raises:
        ArgumentsError: the text has another form, the file or module cannot be imported, or has no such name (the
            nearest is told).
    """
    place, colon, name = spec.rpartition(":") if isinstance(spec, str) else ("", "", "")
    if not colon or not place or not name.isidentifier():
        raise ArgumentsError(f"{spec!r} must have the form file.py:name or module:name")
    with _named_data():
        module = _load_module(place, spec)
    if not hasattr(module, name):
        known = [known for known in vars(module) if not known.startswith("_")]
        raise ArgumentsError(
            f"{spec}: {place} has no {name!r}{nearest(name, known)} (it has: {', '.join(known) or 'nothing'})"
        )
    return getattr(module, name)


def _load_module(name: str, where: str) -> ModuleType:
    is_file = name.endswith(".py") or "/" in name or "\\" in name
    try:
        return _load_file(Path(name).expanduser(), where) if is_file else importlib.import_module(name)
    except AlignmentError:
        raise
    except (Exception, SystemExit) as err:
        if isinstance(err, ModuleNotFoundError) and err.name == name.partition(".")[0]:
            raise ArgumentsError(
                f"{where}: no module is named {name!r}; give a module that Python finds, or the path of a .py file"
            ) from err
        raise ArgumentsError(f"{where}: {name} failed while it was imported: {_explain(err)}") from err


def _explain(err: BaseException) -> str:
    from alignment.ppo.data.base import describe_exception

    text = describe_exception(err)
    if isinstance(err, ImportError) and (err.name or "").startswith("alignment.ppo.data"):
        text += ". In plug-ins `data` means alignment.ppo.data; give a module of your own another name"
    elif isinstance(err, ImportError) and (err.name or "").partition(".")[0] == "data":
        text += ". Another module called `data` was imported before; write `from alignment.ppo.data import ...`"
    return text


def _load_file(path: Path, where: str) -> ModuleType:
    if not path.is_file():
        raise ArgumentsError(f"{where}: the file {path} does not exist (looked in {Path.cwd()})")
    path = path.resolve()
    for module in list(sys.modules.values()):  # it may be imported already, under whatever name
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and file.endswith(path.name) and Path(file).resolve() == path:
            return module
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    name = f"alignment_plugin_{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ArgumentsError(f"{where}: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look their module up
    try:
        with _importable(path.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _load_entry_points() -> None:
    from importlib.metadata import entry_points

    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            point.load()
        except AlignmentError:
            raise
        except Exception as err:
            package = point.dist.name if point.dist else "an installed package"
            raise ArgumentsError(
                f"the plug-in {point.name!r} ({point.value}) of {package} could not be loaded: {_explain(err)}"
            ) from err


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let the code that runs meanwhile import modules from ``folder``."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@contextmanager
def _named_data() -> Iterator[None]:
    """Let ``data`` mean :mod:`alignment.ppo.data` in the code that is imported meanwhile.

    A module ``data`` that the user's program imported before keeps its name, and afterwards the name is free again.
    """
    from alignment.ppo.data import alias

    if "data" in sys.modules:
        yield
        return
    names = alias("data")
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)
