"""Who imports whom inside ``alignment``, read from the sources: for ``test_rooms.py`` and ``count.py``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: Rooms inside rooms. Every other folder below ``alignment`` is a room, and the modules beside them are ``base``, but
#: for those that stand above some rooms and are rooms of their own.
INNER = ("ppo.data", "ppo.models", "rollout.rewards")
#: What the reward models' method needs of the room of their runners.
PAIRS = ("rm.reward_data", "rm.reward_metrics")
ALONE = {"cli": "cli", "__main__": "cli", "plugins": "plugins", "api": "api"}


@dataclass(frozen=True)
class Import:
    """One import: the module that has it, the line, and the dotted name that it asks for."""

    module: str
    line: int
    target: str


@dataclass(frozen=True)
class Tree:
    """The package's modules.

    Attributes:
        files: file of each module, by dotted name; a package's is its ``__init__.py``.
        sources: the same, parsed.
    """

    files: dict[str, Path]
    sources: dict[str, ast.Module]

    @classmethod
    def of(cls, repo: Path) -> Tree:
        """All modules below ``repo/alignment``."""
        files = {}
        for file in sorted((repo / "alignment").rglob("*.py")):
            words = file.relative_to(repo).with_suffix("").parts
            files[".".join(words[:-1] if words[-1] == "__init__" else words)] = file
        return cls(files, {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in files.items()})

    def is_package(self, module: str) -> bool:
        """Whether a module is a folder's ``__init__``."""
        return self.files[module].name == "__init__.py"

    def imports(self, module: str) -> Iterator[Import]:
        """Imports of a module, those inside functions and under ``TYPE_CHECKING`` too, by absolute names; of what is
        ours the module in which it lies.
        """
        package = module if self.is_package(module) else module.rpartition(".")[0]
        for node in ast.walk(self.sources[module]):
            if isinstance(node, ast.Import):
                for name in node.names:
                    yield Import(module, node.lineno, name.name)
            elif isinstance(node, ast.ImportFrom):
                words = package.split(".")
                start = words[: len(words) - node.level + 1] if node.level else []
                source = ".".join([*start, *([node.module] if node.module else [])])
                for name in node.names:
                    yield Import(module, node.lineno, self._home(source, name.name))

    def _home(self, source: str, name: str) -> str:
        """The module that ``from source import name`` takes ``name`` from."""
        whole = f"{source}.{name}"
        if whole in self.files or source not in self.files:
            return whole
        return self._handed_out(source).get(name, source) if self.is_package(source) else source

    def _handed_out(self, package: str) -> dict[str, str]:
        """Names that a package's ``__init__`` finds in its modules when they are asked for, by its tables
        ``{"name": "module"}`` or ``{"module": ("name", ...)}``.
        """
        found: dict[str, str] = {}
        for table in (node for node in ast.walk(self.sources[package]) if isinstance(node, ast.Dict)):
            for key, value in zip(table.keys, table.values, strict=True):
                pairs = [(key, value)] if isinstance(value, ast.Constant) else []
                if isinstance(value, ast.Tuple):
                    pairs = [(name, key) for name in value.elts]
                for name, module in pairs:
                    if isinstance(name, ast.Constant) and isinstance(module, ast.Constant):
                        found[str(name.value)] = f"{package}.{module.value}"
        return {name: module for name, module in found.items() if module in self.files}

    def reachable(self, start: str) -> set[str]:
        """Modules that ``start`` leads to by imports, wherever they stand, with the packages around them."""
        found, waiting = set[str](), [start]
        while waiting:
            module = waiting.pop()
            if module and module in self.files and module not in found:
                found.add(module)
                waiting += [module.rpartition(".")[0], *(entry.target for entry in self.imports(module))]
        return found

    def public_names(self, module: str) -> list[str]:
        """Functions, classes and constants of a module that do not begin with an underscore."""
        found = []
        for node in self.sources[module].body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.append(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found += [target.id for target in targets if isinstance(target, ast.Name)]
        return [name for name in found if not name.startswith("_")]

    def room(self, module: str) -> str:
        """The room that a module belongs to."""
        words = module.split(".")[1:]
        if ".".join(words) in PAIRS:
            return "rm.pairs"
        if ".".join(words[:2]) in INNER:
            return ".".join(words[:2])
        in_folder = bool(words) and f"alignment.{words[0]}" in self.files and self.is_package(f"alignment.{words[0]}")
        return words[0] if in_folder else ALONE.get(".".join(words), "base")
