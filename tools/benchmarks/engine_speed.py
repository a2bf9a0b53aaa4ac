"""Is our engine ever slower than what a user would get otherwise, for the same network? Every contender on every cell.

    python tools/benchmarks/engine_speed.py --json
    python tools/benchmarks/engine_speed.py --cells minilm:1:1 vit_s:8:2

A cell is network:batch:threads. MiniLM has real weights, and its task where the main job has been run; the others have random ones.
All contenders of a cell take turns in one process. `ratio_to_best_rival` is a rival's time over ours, so more than 1 is good: the
median over blocks with a 95 % bootstrap interval. In FP32 we are compared with every float32 rival, in INT8 with every rival of any
precision whose output is no worse than ours (1 dB, or half a point of accuracy, more error is still no worse).

Files are kept under --cache by a digest of what they depend on; making them is timed apart. A timed cell is not timed again while
nothing of it has changed (--resume, the default); --fresh times anew. --prepare makes the files and times nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from speed import limits, networks, ours, rivals, turns
from speed.contenders import FP32, MADE, REDUCED, Contender, Missing, files
from speed.networks import Network, rows, sqnr

from nascompile.devices.cpu import PLUGIN as CPU
from nascompile.records import digest, write_atomic

BATCHES, THREADS = (1, 8), (1, 2)
BAR, MEAN_BAR = 0.97, 1.0
NO_WORSE = {"sqnr_db": 1.0, "accuracy": 0.5}
"""What an output may lack, in dB or points, and still counts as equal to ours."""
PRECISIONS = {"fp32": FP32, "int8": REDUCED}


def contenders() -> tuple[Contender, ...]:
    """Ours, then rivals."""
    return (*ours.contenders(), *rivals.contenders())


def _wanted(request: dict[str, Any]) -> list[Contender]:
    return [c for c in contenders() if not c.name.startswith(tuple(request["skip"]))]


# ------------------------------------------------------------------------------------------------ preparation


def prepare(request: dict[str, Any]) -> dict[str, Any]:
    """Files and output errors of one network, for some (batch, threads)."""
    network = networks.prepare(request["model"], Path(request["cache"]), Path(request["reviews"]))
    used: dict[str, float] = {}
    for batch, threads in request["shapes"]:
        for contender in _wanted(request):
            artefact = contender.artefact(batch, threads)
            if not (artefact.folder(network) / MADE).is_file():
                began = time.monotonic()
                _attempt(partial(files, network, artefact))
                used[artefact.name] = time.monotonic() - began
    return {"folder": str(network.folder), "made_seconds": used, "error": _errors(network, request), "weights": network.about["weights"]}


def _attempt(make: Any) -> str:
    try:
        make()
    except Missing as reason:
        return str(reason)
    return ""


def _errors(network: Network, request: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Contender ▸ what its outputs on evaluation are worth, sample by sample; remembered per file."""
    path = network.folder / "errors.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    found = {}
    for contender in _wanted(request):
        if contender.runtime == "torch" and contender.form == FP32:
            continue  # the reference itself, and a compiler that computes the same in float32
        artefact = contender.artefact(1, 1)
        key = f"{contender.name} {artefact.folder(network).name}"
        if key not in known:
            print(f"output error of {contender.name}", file=sys.stderr, flush=True)
            try:
                runner = contender.load(network, files(network, artefact), 1, 1)
                known[key] = _judge(network, [runner(rows(network.samples("evaluation"), i, i + 1)) for i in range(len(network.reference))])
            except Exception as error:  # whatever a rival raises is why it is missing; a cell says so
                print(f"  none: {error}"[:300], file=sys.stderr, flush=True)
                continue
            write_atomic(path, json.dumps(known).encode())
            gc.collect()
        found[contender.name] = known[key]
    return found


def _judge(network: Network, logits: list[Any]) -> dict[str, float]:
    found = np.concatenate(logits)
    worth = {"sqnr_db": round(sqnr(network.reference, found), 2)}
    if network.labels is not None:
        worth["accuracy"] = 100 * float((found.argmax(axis=1) == network.labels).mean())
    return worth


# ------------------------------------------------------------------------------------------------ one cell


def cell(request: dict[str, Any]) -> dict[str, Any]:
    """Seconds of every contender in every block, and why the others are missing."""
    model, batch, threads = _parsed(request["cell"])
    network = networks.prepare(model, Path(request["cache"]), Path(request["reviews"]))
    inputs = rows(network.samples("evaluation"), 0, batch)
    wanted = _wanted(request)
    runners, missing = {}, dict.fromkeys({c.name for c in contenders()} - {c.name for c in wanted}, "left out by --skip")
    for contender in wanted:
        try:
            runner = contender.load(network, files(network, contender.artefact(batch, threads)), batch, threads)
            if (agreement := sqnr(network.reference[:batch], runner(inputs))) < 3:
                raise Missing(f"its output is wrong, {agreement:.1f} dB")
            runners[contender.name] = runner
        except Exception as error:  # whatever a rival raises is why it is missing
            missing[contender.name] = str(error) if isinstance(error, Missing) else f"{type(error).__name__}: {error}"[:500]
            print(f"missing in {request['cell']}: {contender.name}: {missing[contender.name]}", file=sys.stderr, flush=True)
    calls = [partial(runner, inputs) for runner in runners.values()]
    plans = [turns.plan(call) for call in calls]
    times = turns.blocks(calls, plans, at_least=request["blocks"], seconds=request["seconds"], seed=0)
    return {"names": list(runners), "seconds": times.tolist(), "missing": missing, "macs": ours.macs(network, batch)}


def judge(name: str, measured: dict[str, Any], error: dict[str, Any], peaks: dict[str, Any]) -> dict[str, Any]:
    """A row of the result."""
    model, batch, threads = _parsed(name)
    known = {c.name: c for c in contenders()}
    times = dict(zip(measured["names"], np.array(measured["seconds"]), strict=True))
    middle = {n: 1e3 * float(np.median(values)) for n, values in times.items()}
    row: dict[str, Any] = {
        "model": model, "batch": batch, "threads": threads, "blocks": len(next(iter(times.values()))), "macs": measured["macs"],
        "rival_ms": {n: ms for n, ms in middle.items() if not known[n].ours},
        "ours_ms": {}, "ours_by_backend_ms": {n: ms for n, ms in middle.items() if known[n].ours},
        "ratio_to_best_rival": {}, "without_openvino": {"ours_ms": {}, "ratio_to_best_rival": {}},
        "missing": measured["missing"], "error": {n: error[n] for n in times if n in error}, "excluded": {},
    }  # fmt: skip
    for label, form in PRECISIONS.items():
        for runtimes, place in ((("onnxruntime", "openvino", "torch"), row), (("onnxruntime", "torch"), row["without_openvino"])):
            mine = [n for n in times if known[n].ours and known[n].form == form and known[n].runtime in runtimes]
            others = [n for n in times if not known[n].ours and known[n].runtime in runtimes]
            others = [n for n in others if form == REDUCED or known[n].form == FP32]
            if not mine or not others:
                place["ratio_to_best_rival"][label] = None
                continue
            best = min(mine, key=middle.__getitem__)
            counts = np.array([[form == FP32 or _no_worse(error, other, own) for other in others] for own in mine])
            place["ours_ms"][label] = middle[best]
            ratio = turns.advantage(np.array([times[n] for n in mine]), np.array([times[n] for n in others]), counts, seed=0)
            counted = [other for other, yes in zip(others, counts[mine.index(best)], strict=True) if yes]
            place["ratio_to_best_rival"][label] = {**ratio, "ours": best, "rival": min(counted, key=middle.__getitem__)}
            if place is row and form == REDUCED:
                row["excluded"] = {o: "more error than ours" for o in others if o not in counted}
                everyone = np.ones_like(counts)
                every = turns.advantage(np.array([times[n] for n in mine]), np.array([times[n] for n in others]), everyone, seed=0)
                row["int8_against_any_error"] = {**every, "rival": min(others, key=middle.__getitem__)}
    row["share_of_peak"] = {n: _share(n, known[n], 1e-3 * middle[n], measured["macs"], peaks) for n in row["ours_by_backend_ms"]}
    return row


def _no_worse(error: dict[str, Any], other: str, own: str) -> bool:
    """Whether a rival's output counts as no worse than ours; float32 does."""
    if other not in error or own not in error:
        return True
    measure = "accuracy" if "accuracy" in error[own] else "sqnr_db"
    return bool(error[other][measure] >= error[own][measure] - NO_WORSE[measure])


def _share(name: str, contender: Contender, seconds: float, macs: int, peaks: dict[str, Any]) -> float:
    """Of the peak rate of the precision most products have. In INT8 attention's own products are float32 all the same."""
    peak = peaks["fp32_gmacs" if contender.form == FP32 else "int8_gmacs"]
    return macs / seconds / 1e9 / peak if peak else 0.0


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The bars: the lowest interval end of any cell, the geometric mean of all."""
    result: dict[str, Any] = {"bar": BAR, "mean_bar": MEAN_BAR}
    for view in ("all", "without_openvino"):
        for label in PRECISIONS:
            ratios = {_name(row): (row if view == "all" else row[view])["ratio_to_best_rival"].get(label) for row in found}
            ratios = {name: ratio for name, ratio in ratios.items() if ratio}
            if not ratios:
                continue
            lowest = min(ratios, key=lambda name: ratios[name]["low"])
            mean = math.exp(sum(math.log(ratio["value"]) for ratio in ratios.values()) / len(ratios))
            result[f"{view} {label}"] = {
                "cells": len(ratios), "lowest_end": ratios[lowest]["low"], "lowest_cell": lowest, "geometric_mean": mean,
                "below_bar": sorted(name for name, ratio in ratios.items() if ratio["low"] < BAR),
                "met": ratios[lowest]["low"] >= BAR and mean >= MEAN_BAR,
            }  # fmt: skip
    return result


# ------------------------------------------------------------------------------------------------ the whole


def _name(row: dict[str, Any]) -> str:
    return f"{row['model']}:{row['batch']}:{row['threads']}"


def _parsed(name: str) -> tuple[str, int, int]:
    model, batch, threads = name.split(":")
    if model not in (*networks.NAMES, networks.TOY):
        raise SystemExit(f"error: unknown network: {model}\n\nhint: known are {', '.join(networks.NAMES)}")
    return model, int(batch), int(threads)


def _child(task: str, request: dict[str, Any], cache: Path, threads: int) -> dict[str, Any]:
    """The answer of a process of its own: what it loaded is gone afterwards, and a crash of a rival ends only that process."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": str((cache / "inductor").resolve()),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:  # quantizers and exporters leave files where they are run
        answer = Path(scratch) / "answer.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps({"task": task, "answer": str(answer), **request})]
        done = subprocess.run(command, env=environment, cwd=scratch, stdout=sys.stderr, check=False)
        if done.returncode:
            raise SystemExit(f"error: {task} of {request.get('cell', request.get('model', ''))} ended with status {done.returncode}")
        return dict(json.loads(answer.read_text()))


def _serve(text: str) -> None:
    request = json.loads(text)
    tasks: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "prepare": prepare, "cell": cell, "limits": lambda r: limits.measure(r["threads"]),
    }  # fmt: skip
    Path(request["answer"]).write_text(json.dumps(tasks[request["task"]](request)))
    sys.stderr.flush()
    os._exit(0)  # a dozen runtimes tear down in an order that none of them knows


def _remembered(path: Path, key: str, fresh: bool, measure: Any) -> dict[str, Any]:
    """What a file holds if it was measured under the same key, else a new measurement."""
    if not fresh and path.is_file():
        before = dict(json.loads(path.read_text()))
        if before["key"] == key:
            return dict(before["result"])
    result = dict(measure())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({"key": key, "result": result}).encode())
    return result


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--models", nargs="+", choices=(*networks.NAMES, networks.TOY), default=list(networks.NAMES))
    parser.add_argument("--cells", nargs="+", metavar="NETWORK:BATCH:THREADS", help="these cells only, whatever --models says")
    parser.add_argument("--cache", type=Path, default=Path(".cache/engine_speed"))
    parser.add_argument("--reviews", type=Path, default=Path(".cache/main_job/reviews"), help="a run of the main job, for MiniLM")
    parser.add_argument("--blocks", type=int, default=5, help="fewest blocks of a cell")
    parser.add_argument("--seconds", type=float, default=25.0, help="blocks go on for so long")
    parser.add_argument("--resume", action="store_true", help="the default: do not time again what has not changed")
    parser.add_argument("--fresh", action="store_true", help="time all of these cells again; files that still fit are used")
    parser.add_argument("--skip", nargs="+", default=[], metavar="NAME", help="leave out rivals whose names begin so")
    parser.add_argument("--prepare", action="store_true", help="make the files and stop")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    if arguments.child:
        _serve(arguments.child)
    names = arguments.cells or [f"{m}:{b}:{t}" for m in arguments.models for b in BATCHES for t in THREADS]
    places = {"cache": str(arguments.cache.resolve()), "reviews": str(arguments.reviews.resolve()), "skip": arguments.skip}
    prepared, seconds = {}, {}
    for model in dict.fromkeys(_parsed(name)[0] for name in names):
        shapes = [_parsed(name)[1:] for name in names if _parsed(name)[0] == model]
        began = time.monotonic()
        prepared[model] = _child("prepare", {**places, "model": model, "shapes": shapes}, arguments.cache, max(THREADS))
        seconds[model] = round(time.monotonic() - began, 1)
        print(f"{model} prepared in {seconds[model]:.0f} s", file=sys.stderr, flush=True)
    preparation = {model: {"seconds": seconds[model], "made_seconds": prepared[model]["made_seconds"]} for model in prepared}
    if arguments.prepare:
        print(json.dumps({"preparation": preparation}, indent=1))
        return
    began, versions = time.monotonic(), rivals.environment()
    results = arguments.cache / "results"
    peaks = {
        t: _remembered(results / f"limits-{t}.json", digest(versions, limits.METHOD), arguments.fresh,
                       lambda t=t: _child("limits", {"threads": t}, arguments.cache, t))
        for t in dict.fromkeys(_parsed(name)[2] for name in names)
    }  # fmt: skip
    found = []
    for name in names:
        model, batch, threads = _parsed(name)
        network = Network(model, Path(prepared[model]["folder"]))
        artefacts = [c.artefact(batch, threads).folder(network).name for c in contenders()]
        key = digest(versions, network.folder.name, artefacts, CPU.describe(), arguments.blocks, arguments.seconds, arguments.skip)
        request = {**places, "cell": name, "blocks": arguments.blocks, "seconds": arguments.seconds}
        path = results / f"{name.replace(':', '-')}.json"
        start = time.monotonic()
        measured = _remembered(path, key, arguments.fresh, partial(_child, "cell", request, arguments.cache, threads))
        found.append(judge(name, measured, prepared[model]["error"], peaks[threads]))
        print(f"{name} in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    content = {
        "rows": found, "summary": summary(found), "limits": list(peaks.values()), "preparation": preparation,
        "timing_seconds": round(time.monotonic() - began, 1), "weights": {m: prepared[m]["weights"] for m in prepared},
        "environment": {**versions, "cpu": CPU.describe()},
    }  # fmt: skip
    print(json.dumps(content, indent=1)) if arguments.json else _show(content)


def _show(content: dict[str, Any]) -> None:
    for row in content["rows"]:
        print(f"\n{_name(row)}, {row['blocks']} blocks, {row['macs'] / 1e9:.2f} GMAC")
        for name, ms in sorted({**row["rival_ms"], **row["ours_by_backend_ms"]}.items(), key=lambda pair: pair[1]):
            error = " ".join(f"{key} {value:.1f}" for key, value in row["error"].get(name, {}).items())
            share = f" {100 * row['share_of_peak'][name]:.0f} % of peak" if name in row["share_of_peak"] else ""
            print(f"  {ms:10.3f} ms  {name:36} {error}{share}{' (more error than ours)' if name in row['excluded'] else ''}")
        for view, place in (("", row), (" without openvino", row["without_openvino"])):
            for label, ratio in place["ratio_to_best_rival"].items():
                if ratio:
                    span = f"{ratio['low']:.3f} to {ratio['high']:.3f}"
                    print(f"  {label}{view}: {ratio['value']:.3f} ({span}), {ratio['ours']} against {ratio['rival']}")
        for name, reason in row["missing"].items():
            print(f"  missing: {name}: {reason}")
    print()
    for name, value in content["summary"].items():
        print(f"{name}: {value}")
    for peak in content["limits"]:
        rates = ", ".join(f"{k} {v:.0f}" for k, v in peak.items() if isinstance(v, float))
        print(f"limits, {peak['threads']} threads: {rates}")


if __name__ == "__main__":
    main()
