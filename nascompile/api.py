"""The Python interface: `compile` runs the pipeline on objects or paths, `load` opens an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from nascompile import engine
from nascompile.engine import Engine
from nascompile.errors import RecipeError
from nascompile.progress import Lines, Silent
from nascompile.records import Choice, load as load_record

__all__ = ["Compiled", "compile", "load"]


@dataclass(frozen=True)
class Compiled:
    """What a run left behind."""

    run: Path
    engine: Path
    """Folder of the chosen engine."""
    report: Path
    """The HTML report."""
    summary: Mapping[str, Any]
    """Baseline, uniform INT8 and chosen engine: accuracy, latency_ms, p50_ms, throughput, size_bytes."""

    def load(self) -> Engine:
        """The chosen engine, ready to predict."""
        return engine.load(self.engine)


def compile(
    model: Any, train: Any, *, calibration: Any = None, validation: Any = None, test: Any = None, processor: Any = None,
    target: str = "cpu", metric: str | Callable[[Any, Any], float] = "", direction: Literal["maximize", "minimize"] = "maximize",
    max_drop: float | None = None, latency_ms: float | Mapping[str, float] | None = None, size_mb: float | None = None,
    macs_m: float | None = None, memory_mb: float | None = None, out: str | Path = "runs/api", progress: bool = True, **options: Any,
) -> Compiled:  # fmt: skip
    """Run the whole pipeline; a second call with the same `out` continues or returns what is there.

    `model`: a Hugging Face model in memory (with `processor`, its tokenizer or image processor), a folder or an id. `train` and the
    other splits: a path, a `datasets` name, lists of (x, y), (X, y) arrays, a DataFrame or a Dataset. `metric`: a name, or
    f(labels, logits) ▸ float with its `direction`. `options`: any other setting of a recipe, sections by underscore-free name, e.g.
    `task="regression"`, `seed=1`, `finetune={"epochs": 2}`, `data={"label_column": "y"}`,
    `also=["pi4"]` for one network on two devices. Raises NascompileError.
    """
    from nascompile import pipeline, report, settings  # with torch; `load` does without

    budgets = {"max_drop": max_drop, "latency_ms": latency_ms, "size_mb": size_mb, "macs_m": macs_m, "memory_mb": memory_mb}
    content = dict(options) | {"device": target, "budgets": {name: bound for name, bound in budgets.items() if bound is not None}}
    in_memory = not isinstance(model, str | Path)
    content["model"] = type(model).__name__ if in_memory else str(model)
    if isinstance(metric, str):
        content["metric"] = metric
    splits = {"train": train, "calibration": calibration, "validation": validation, "test": test}
    paths = {name: str(source) for name, source in splits.items() if isinstance(source, str | Path)}
    objects = {name: source for name, source in splits.items() if source is not None and name not in paths}
    content["data"] = dict(content.get("data", {})) | {("data" if name == "train" else name): path for name, path in paths.items()}
    recipe = settings.from_mapping(content, "the arguments of compile")
    if in_memory and not hasattr(model, "save_pretrained"):
        raise RecipeError(f"not a Hugging Face model: {type(model).__name__}", hint="give a PreTrainedModel, a folder or an id")
    given = pipeline.Given(
        model=model if in_memory else None, processor=processor, data=objects, metric=metric if callable(metric) else None,
        direction=direction,
    )  # fmt: skip
    run = Path(out)
    pipeline.run(recipe, run, progress=Lines() if progress else Silent(), given=given)
    choice = load_record(run / "choice.json", Choice)
    return Compiled(run, run / "engines" / choice.engine, run / "report.html", msgspec.to_builtins(report.summary(run)))


def load(folder: str | Path, threads: int | None = None) -> Engine:
    """An engine folder, ready: `.predict(["text", image, …])` gives (label, probability) pairs; needs neither torch nor transformers."""
    return engine.load(folder, threads)
