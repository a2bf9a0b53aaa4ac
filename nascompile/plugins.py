"""Folder ▸ plug-ins: each module of a plug-in folder with a `PLUGIN` object, and entry points `nascompile.<folder>`."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
from functools import cache
from pathlib import Path
from typing import Any

from nascompile.errors import UnsupportedError

FOLDERS = ("backends", "devices", "families", "passes", "quantization", "recipes", "searchers", "tasks")


@cache
def names(folder: str) -> tuple[str, ...]:
    """Sorted plug-in names of a folder, found without importing any of them."""
    found = {path.stem for path in (Path(__file__).parent / folder).glob("*.py") if _declares_plugin(path)}
    found |= {point.name for point in importlib.metadata.entry_points(group=f"nascompile.{folder}")}
    return tuple(sorted(found))


@cache
def get(folder: str, name: str) -> Any:
    """The plug-in object, its name written as its module or with hyphens; UnsupportedError naming the known ones."""
    module = name.replace("-", "_")
    if module not in names(folder):
        raise UnsupportedError(f"unknown {folder.rstrip('s')}: {name}", hint=f"known here: {', '.join(names(folder))}")
    for point in importlib.metadata.entry_points(group=f"nascompile.{folder}"):
        if point.name == module:
            return point.load()
    return importlib.import_module(f"nascompile.{folder}.{module}").PLUGIN


def _declares_plugin(path: Path) -> bool:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    targets = [t for node in body if isinstance(node, ast.Assign) for t in node.targets]
    targets += [node.target for node in body if isinstance(node, ast.AnnAssign)]
    return any(isinstance(t, ast.Name) and t.id == "PLUGIN" for t in targets)
