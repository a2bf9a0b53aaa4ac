#!/usr/bin/env python3
"""Writes docs/recipe.md: every setting of a recipe with its flag, default and meaning, from the records that hold them.

A meaning is the docstring under the field, or, where it has none, the help of the field's flag.
"""

from __future__ import annotations

import argparse
import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from nascompile import plugins
from nascompile.cli import FLAGS
from nascompile.records import Record
from nascompile.settings import Recipe, demo_recipe

PAGE = Path(__file__).resolve().parents[1] / "docs" / "recipe.md"
NAMED = {"task": "tasks", "metric": "tasks", "finetune.recipe": "recipes", "search.searcher": "searchers"}
"""Settings whose values are names of plug-ins."""
HEAD = """\
# Recipe

<!-- Written by tools/recipe_docs.py; edit the docstrings in nascompile/settings.py and nascompile/data.py, then run it again. -->

A recipe is everything a run depends on. It is a TOML file (`nascompile run recipe.toml`), flags, or both: a flag overrides the file.
The Python API takes the same names: `nascompile.compile(..., seed=1, finetune={"epochs": 2})`. A run keeps its recipe in
`recipe.json`; `nascompile run --out runs/NAME` without a file goes on with that one. Every unknown name and every wrong value is
reported together, before any work.

```toml
model = "path/or/hub-id"
metric = "f1"

[data]
data = "reviews.csv"
text_columns = ["text"]
label_column = "label"

[budgets]
max_drop = 1.0

[finetune]
epochs = 3
```

At least one budget is needed. Lists are TOML arrays; a flag that takes several values is given several times.
"""
DEMO = """
## The embedded demo

`nascompile run` without a model or data uses these settings in place of the defaults above:

| Setting | Value |
| --- | --- |
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--print", action="store_true", help="print the page, write nothing")
    arguments = parser.parse_args()
    if arguments.print:
        print(page(), end="")
    else:
        PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The whole page in Markdown."""
    default = Recipe()
    sections = [name for name in Recipe.__struct_fields__ if isinstance(getattr(default, name), Record)]
    top = [name for name in Recipe.__struct_fields__ if name not in sections]
    text = HEAD + "\n## Top level\n\n" + _table(Recipe, "", top)
    for section in sections:
        kind = type(getattr(default, section))
        text += f"\n## [{section}]\n\n{_plain(inspect.getdoc(kind) or '')}\n\n" + _table(kind, f"{section}.", kind.__struct_fields__)
    return text + DEMO + "".join(f"| `{name}` | {_value(value)} |\n" for name, value in _differences(demo_recipe(), default))


def rows(kind: type[Record], prefix: str, names: Any) -> Iterator[tuple[str, str, str, str]]:
    """(setting, flag, default, meaning) of a record's fields."""
    flags = {flag.setting: flag for group in FLAGS.values() for flag in group}
    own, default = docstrings(kind), kind()
    for name in names:
        flag = flags.get(prefix + name)
        meaning = own.get(name) or (flag.help if flag else "")
        if folder := NAMED.get(prefix + name):
            meaning = " ".join(filter(None, (meaning, _known(prefix + name, folder))))
        yield name, flag.name if flag else "", _value(getattr(default, name)), meaning


def docstrings(kind: type[Record]) -> dict[str, str]:
    """Field ▸ the string that stands under it in the class body."""
    (body,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                found[name] = " ".join(words.split())
    return found


def _known(setting: str, folder: str) -> str:
    if setting == "metric":
        known = (f"{name}: {', '.join(plugins.get(folder, name).metrics)}" for name in plugins.names(folder))
        return f"({'; '.join(known)})"
    return f"({', '.join(plugins.names(folder))})"


def _table(kind: type[Record], prefix: str, names: Any) -> str:
    lines = ["| Setting | Flag | Default | Meaning |", "| --- | --- | --- | --- |"]
    for name, flag, default, meaning in rows(kind, prefix, names):
        lines.append(f"| `{name}` | {f'`{flag}`' if flag else ''} | {default} | {_plain(meaning)} |")
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    """As TOML writes it; None and what cannot be written are dashes."""
    if value is None or value == ():
        return "–"
    if isinstance(value, tuple):
        return f"`[{', '.join(msgspec.json.encode(v).decode() for v in value)}]`"
    return f"`{msgspec.json.encode(value).decode()}`"


def _plain(text: str) -> str:
    return text.replace("|", "\\|")


def _differences(record: Record, other: Record, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(setting, value) where the first record is not as the second."""
    for name in record.__struct_fields__:
        value, default = getattr(record, name), getattr(other, name)
        if isinstance(value, Record):
            yield from _differences(value, default, f"{prefix}{name}.")
        elif value != default:
            yield prefix + name, value


if __name__ == "__main__":
    main()
