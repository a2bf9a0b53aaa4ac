"""The pages that are written from the code say what the code says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import msgspec
import pytest

from nascompile import cli, settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe_docs():
    spec = importlib.util.spec_from_file_location("recipe_docs", ROOT / "tools" / "recipe_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recipe_page_is_up_to_date(recipe_docs):
    assert (ROOT / "docs" / "recipe.md").read_text("utf-8") == recipe_docs.page(), "run tools/recipe_docs.py"


def test_every_setting_has_a_row_with_a_meaning(recipe_docs):
    """Counted from the defaults as plain values, which share nothing with the page's own walk over the records."""
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", recipe_docs.page().partition("## The embedded demo")[0], re.MULTILINE)
    values = msgspec.to_builtins(settings.Recipe())
    wanted = [name for name, value in values.items() if not isinstance(value, dict)]
    wanted += [name for value in values.values() if isinstance(value, dict) for name in value]
    assert sorted(name for name, _ in rows) == sorted(wanted)
    assert [name for name, meaning in rows if len(meaning) < 8] == []


def test_every_flag_is_on_the_recipe_page(recipe_docs):
    missing = [flag.name for group in cli.FLAGS.values() for flag in group if f"`{flag.name}`" not in recipe_docs.page()]
    assert missing == []


def test_the_example_on_the_recipe_page_is_a_recipe(recipe_docs, tmp_path):
    (example,) = re.findall(r"```toml\n(.*?)```", recipe_docs.page(), re.DOTALL)
    (tmp_path / "recipe.toml").write_text(example)
    assert settings.from_toml(tmp_path / "recipe.toml").finetune.epochs == 3


@pytest.mark.parametrize("page", ["architecture.md", "recipe.md", "tensorrt.md", "kits.md", "supernet_recipes.md"])
def test_files_that_a_page_names_exist(page):
    """Names in backticks that end like a file or a folder of this repository."""
    named = re.findall(r"`((?:nascompile|tools|tests|docs|profiles)/[\w./]*)`", (ROOT / "docs" / page).read_text("utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_examples_of_training_are_recipes(tmp_path):
    examples = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "supernet_recipes.md").read_text("utf-8"), re.DOTALL)
    found = []
    for number, example in enumerate(examples):
        path = tmp_path / f"{number}.toml"
        path.write_text(example)
        found.append(settings.from_toml(path).finetune)
    assert [(f.recipe, f.start) for f in found] == [("instatune", "pretrained"), ("bignas", "random")]
