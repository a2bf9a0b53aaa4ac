"""From a pretrained model, a task and a device to the engine that device should run.

`nascompile.compile(model, train, …)` runs the whole pipeline; `nascompile.load(folder).predict(inputs)` uses an engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["compile", "load"]

if TYPE_CHECKING:
    from nascompile.api import compile, load


def __getattr__(name: str) -> Any:
    """The public functions, imported on first use: `nascompile --help` needs neither torch nor NumPy."""
    if name in __all__:
        from nascompile import api

        return getattr(api, name)
    raise AttributeError(f"module 'nascompile' has no attribute {name!r}")
