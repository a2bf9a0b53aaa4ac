"""Imports point down only, and what must start fast imports nothing heavy."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import nascompile
from nascompile import plugins

PACKAGE = Path(nascompile.__file__).parent

# A module may import modules of earlier rows, and of its own row unless the row is in SEPARATE.
ROWS: dict[str, tuple[str, ...]] = {
    "errors": ("errors",),
    "records": ("records",),
    "plain": (
        "cuda_driver", "plugins", "space", "pareto", "latency_table", "table_check", "table_fit", "table_view", "journal", "progress",
        "places", "processes", "mcu",
    ),
    "samples": ("preprocess", "data_sources", "data"),
    "plug-ins": plugins.FOLDERS,
    "shared": (
        "settings", "targets", "network", "models", "supernet", "quantization_aware", "augmentation", "checkpoint", "lowering",
        "pass_check", "scoring", "accuracy", "engine", "variants", "several", "programs", "program_accuracy",
        "program_costs", "program_runs", "replay", "fronts", "stopping", "worker", "workers",
    ),
    "stages": ("profiler", "program_profiler", "finetune", "search", "build", "measure", "rerank", "report", "explain"),
    "kits": ("kit", "kit_import", "kit_limits", "remote", "remote_device"),
    "pipeline": ("pipeline", "beside"),
    "surface": ("api", "terminal", "cli", "__main__"),
}
SEPARATE = ("stages", "plug-ins")
"""Rows whose modules import none of their neighbours; a plug-in folder is one module of its row."""
STANDALONE = ("run_template", "kit_template", "remote_agent")
"""Copied out of the package: imports nothing of it."""
LIGHT = (
    "__init__", "errors", "records", "plugins", "space", "pareto", "network", "latency_table", "journal", "places", "settings", "data",
    "data_sources", "preprocess", "cli", "progress", "processes", "targets", "engine", "run_template",
    "kit_template", "remote_agent", "cuda_driver", "table_check", "table_view", "stopping", "worker", "workers",
)  # fmt: skip
HEAVY = {"torch", "transformers", "onnxruntime", "openvino", "tensorrt", "ray", "accelerate", "datasets"}


def unit_of(path: Path) -> str:
    """`search` of nascompile/search.py, `families` of nascompile/families/vit.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source: str, *, top_only: bool) -> set[str]:
    """Dotted names imported: everywhere, or only where importing the module runs them. TYPE_CHECKING blocks never run."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child)
            return
        if top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def faults(unit: str, source: str, rows: dict[str, tuple[str, ...]] = ROWS) -> list[str]:
    """Imports of the package that do not point down."""
    rank = {name: (number, row) for number, (row, names) in enumerate(rows.items()) for name in names}
    used = {parts[1] for name in imports(source, top_only=False) if (parts := name.split("."))[0] == "nascompile" and len(parts) > 1}
    used -= {"__version__", unit}
    if unit in STANDALONE:
        return sorted(f"{unit} stands alone but imports {name}" for name in used)
    if unit not in rank:
        return [f"{unit} has no row in this test: decide where it belongs"]
    own, row = rank[unit]
    found = []
    for name in sorted(used):
        if name not in rank:
            found.append(f"{unit} imports {name}, which has no row")
        elif rank[name][0] > own:
            found.append(f"{unit} ({row}) imports {name} ({rank[name][1]})")
        elif rank[name][0] == own and row in SEPARATE:
            found.append(f"{unit} imports its neighbour {name}")
    return found


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    assert faults(unit_of(path), path.read_text("utf-8")) == []


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_nothing_heavy(name):
    top = {dotted.split(".")[0] for dotted in imports((PACKAGE / f"{name}.py").read_text("utf-8"), top_only=True)}
    assert top & HEAVY == set()


@pytest.mark.parametrize(
    ("unit", "source", "says"),
    [
        ("records", "from nascompile import pipeline", "imports pipeline"),
        ("records", "def f():\n    from nascompile.search import search", "imports search"),
        ("search", "import nascompile.build", "neighbour build"),
        ("families", "from nascompile.backends.fake import PLUGIN", "neighbour backends"),
        ("pipeline", "from nascompile.cli import app", "imports cli"),
        ("novelty", "", "no row"),
        ("report", "from nascompile import novelty", "no row"),
        ("run_template", "from nascompile import records", "stands alone"),
    ],
)
def test_the_checker_sees_what_it_should(unit, source, says):
    [fault] = faults(unit, source)
    assert says in fault


@pytest.mark.parametrize(
    ("unit", "source"),
    [
        ("search", "from nascompile import accuracy, space as spaces\nimport torch"),
        ("families", "from nascompile.families.encoder import Encoder\nfrom nascompile.records import Node"),
        ("records", "if TYPE_CHECKING:\n    from nascompile import pipeline"),
    ],
)
def test_the_checker_lets_pass_what_it_should(unit, source):
    assert faults(unit, source) == []


def test_the_checker_knows_what_runs_on_import():
    lazy = "class A:\n    import torch\ndef f():\n    import onnx\nif TYPE_CHECKING:\n    import ray\n"
    source = "import json\n" + lazy + "try:\n    import numpy as np\nexcept ImportError: ..."
    assert imports(source, top_only=True) == {"json", "torch", "numpy"}
    assert imports(source, top_only=False) == {"json", "torch", "numpy", "onnx"}


def test_every_row_names_modules_that_exist():
    missing = [name for names in ROWS.values() for name in names if not (PACKAGE / name).is_dir() and not (PACKAGE / f"{name}.py").exists()]
    assert missing == []
