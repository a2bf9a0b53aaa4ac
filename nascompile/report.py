"""Last stage: what a run folder's records say, as one HTML file, Markdown and JSON. It reads records only and invents nothing.

Keys of `report.json`; a section whose records are not there has their names in its `missing` list:
  summary       what `nascompile run --json` prints
  headline      chosen engine, throughput ratio, accuracy change with its interval, size ratio, file, reason, budgets
  foreign       where predictions are a latency table's of another environment: what differs, there and here; else empty
  engines       one entry per engine folder: predicted, measured, throughput, size, validation and test scores
  chip          of engines for a microcontroller: memory, stack, instructions of each, and the float network's scores; else not there
  devices       of a search for several: each one's front, what the fronts share, what a shared network costs each; else not there
  front         non-dominated and scored candidates with predicted latency and emulated validation score
  prediction    predicted against measured latency: engines of this run, validation networks of the table
  agreement     emulated against engine score of random candidates
  operators     the table's latency of every block of the baseline, the uniform and the chosen engine
  architecture  every block of the full network: kept share, precision, size
  search        searcher, seed, hypervolume over scored candidates, why it was stopped early if it was
  explain       of `search --explain`: what each gene matters, what thinning each layer costs and saves; else not there
  data          splits (samples, classes, what was left out), labels, settings
  subject       model, task, metric and device of the recipe
  statistic     which quantile of the latencies is compared with predictions
  time_model    a sentence that says by what model milliseconds follow from counts; empty where they are measured
  ms            the unit of predictions: ms, or modelled ms
  observed      what latencies of engines are: measured, or simulated or modelled on a device that is
  environment   what must match for numbers to compare, and what is only recorded
  reproduce     recipe and commands
  stages        seconds per stage
"""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from nascompile import fronts, latency_table, variants
from nascompile.errors import RecordError
from nascompile.records import (
    Budget,
    Candidate,
    Choice,
    Correction,
    Differences,
    EngineManifest,
    Evaluation,
    Explanation,
    ForeignUse,
    Front,
    LatencyTable,
    Measurement,
    Quantity,
    R,
    Score,
    StageDone,
    Target,
    TestResult,
    Variant,
    digest,
    load,
    write_atomic,
)
from nascompile.scoring import worst
from nascompile.targets import label

if TYPE_CHECKING:
    from rich.table import Table

Json = dict[str, Any]
ASSETS = Path(__file__).with_name("report_assets")
WRITERS = {
    "table.json": "profile", "front.json": "search", "journal.jsonl": "search", "engines": "build", "agreement.json": "measure",
    "measurements": "measure", "correction.json": "rerank", "choice.json": "rerank", "test.json": "rerank",
}  # fmt: skip
"""Record ▸ the stage that writes it."""
STAGES = ("data", "profile", "finetune", "search", "build", "measure", "rerank", "report")
BASELINE = "baseline"
"""Name of the baseline's engine, and of its score where it has no engine."""
PERCENT_METRICS = ("accuracy", "f1", "auc")
MILLISECONDS = {"s": 1e3, "ms": 1.0, "us": 1e-3, "µs": 1e-3, "ns": 1e-6}


def report(run: Path) -> tuple[Path, Path, Path]:
    """Write report.html, report.md and report.json into the run folder; RecordError on a damaged record."""
    from plotly.offline import get_plotlyjs

    facts = gather(run)
    paths = (run / "report.html", run / "report.md", run / "report.json")
    style, charts = ((ASSETS / name).read_text("utf-8") for name in ("style.css", "charts.js"))
    html = _templates(html=True).get_template("report.html").render(f=facts, style=style, charts=charts, plotly=get_plotlyjs())
    markdown = _templates(html=False).get_template("report.md").render(f=facts)
    body = json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False)
    for path, text in zip(paths, (html, markdown, body), strict=True):
        write_atomic(path, (text.rstrip() + "\n").encode())
    return paths


def summary(run: Path) -> Json:
    """What `nascompile run --json` prints: tasks, environment, run and engine folder."""
    records = read(run)
    return _summary(records, _engines(records))


def closing_table(run: Path) -> Table:
    """Engines of the run, one a row, for a terminal."""
    from rich.table import Table

    records = read(run)
    engines = _engines(records)
    if any(e["chip"] for e in engines):
        return _chip_table(records, engines)
    caption = "\n".join(filter(None, (_caption(records.foreign), _time_model(records)))) or None
    table = Table(title=f"{run.name}: engines, relative to the baseline", title_justify="left", caption=caption)
    table.add_column("engine")
    latency = f"{_observed(records)} {_statistic(engines)}".strip() + " ms"
    for name in (f"predicted {_unit(records)}", latency, "p50 ms", "samples/s", "speed-up", "size MB", "validation", "test"):
        table.add_column(name, justify="right")
    for e in engines:
        table.add_row(
            f"{e['title']}", _interval(e["predicted"]), _latency(e["measured"]), _latency(e["measured"], "p50"), _rate(e["throughput"]),
            _times(e["speedup"]), number(e["size_bytes"] / 1e6), _score(e["validation"]), _score(e["test"]),
            style="bold" if e["chosen"] else "",
        )  # fmt: skip
    return table


def _chip_table(records: RunRecords, engines: list[Json]) -> Table:
    """The same for a microcontroller."""
    from rich.table import Table

    facts = _chip(records, engines)
    floats = [f"{split} {_score(facts[f'float_{split}'])}" for split in ("validation", "test") if facts[f"float_{split}"]]
    caption = [_caption(records.foreign), _time_model(records), f"FP32 network, which has no engine: {', '.join(floats)}" * bool(floats)]
    title = f"{records.folder.name}: engines for {facts['device']}"
    table = Table(title=title, title_justify="left", caption="\n".join(filter(None, caption)) or None)
    table.add_column("engine")
    speedup = [f"speed-up over {facts['compared'].removeprefix('the ')}"] if facts["compared"] else []
    for name in ("predicted modelled ms", "modelled ms", "instructions, counted", *speedup, "RAM", "flash", "stack", "validation", "test"):
        table.add_column(name, justify="right")
    for e in engines:
        chip, ratio = e["chip"], [_times(e["speedup"])] if speedup else []
        table.add_row(
            f"{e['title']}", _interval(e["predicted"]), _latency(e["measured"]), f"{chip['instructions']:,}", *ratio,
            *(_of_limit(chip[f"{part}_bytes"], chip[f"{part}_limit"]) for part in ("ram", "flash", "stack")), _score(e["validation"]),
            _score(e["test"]), style="bold" if e["chosen"] else "",
        )  # fmt: skip
    return table


def _of_limit(used: int, limit: int) -> str:
    return f"{used:,} ({used / limit:.0%})"


def _caption(foreign: Differences) -> str | None:
    """What a reader of predictions in a terminal must know of the table."""
    if not foreign:
        return None
    return f"predicted by {latency_table.FOREIGN}: " + "; ".join(latency_table.difference_lines(foreign))


def device_lines(run: Path) -> list[str]:
    """What a search for several devices found on each, for a terminal; nothing for one."""
    devices = _devices(read(run))
    if not devices or devices["missing"]:
        return []
    lines = []
    for d in devices["devices"]:
        text = f"{d['label']}: {len(d['front'])} of {devices['scored']} scored candidates on its front"
        if d["chosen"]:
            text += f"; chosen {number(d['chosen']['latency_ms'])} ms {d['chosen']['kind']}, {_score(d['chosen']['score'])}"
        if d["cost"]:
            text += f"; predicted {d['cost']['ratio']:.2f} times the fastest that is as accurate there"
        lines.append(text + (f" (not here: {d['absent']})" if d["absent"] else ""))
    lines.append(f"on the front of every device: {len(devices['common'])}; " + "; ".join(_agreement_words(t) for t in devices["tau"]))
    return lines


def variant_lines(run: Path) -> list[str]:
    """For every engine that was chosen among variants, what was kept and what was not; for a terminal."""
    return [f"{e.name}: {variants.describe(e.variants)}" for e in read(run).engines if e.variants]


def gather(run: Path) -> Json:
    """All sections as plain data (module docstring)."""
    records = read(run)
    engines = _engines(records)
    devices = _devices(records)
    return {
        **({"devices": devices} if devices else {}),
        **({"chip": chip} if (chip := _chip(records, engines)) else {}),
        **({"explain": _explain(records.explanation)} if records.explanation else {}),
        "summary": _summary(records, engines),
        "name": _name(records),
        "note": str(records.recipe.get("note", "")),
        "observed": _observed(records), "time_model": _time_model(records), "ms": _unit(records),
        "statistic": _statistic(engines),
        "subject": {key: records.recipe.get(key) for key in ("model", "task", "metric", "device") if records.recipe.get(key)},
        "headline": _headline(records, engines),
        "foreign": _foreign(records.foreign),
        "engines": engines,
        "front": _front(records),
        "prediction": _prediction(records, engines),
        "agreement": _agreement(records),
        "operators": _operators(records, engines),
        "architecture": _architecture(records),
        "search": _search(records),
        "data": _data(records),
        "environment": _environment(records),
        "reproduce": _reproduce(records),
        "stages": _stages(records),
    }


# ---------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Further:
    """A further device of a search: its table, and where it runs here its engines by name."""

    table: LatencyTable
    engines: dict[str, EngineManifest]
    measurements: dict[str, Measurement]


@dataclass(frozen=True)
class RunRecords:
    """What a run folder holds; None or empty where a record is not there."""

    folder: Path
    recipe: Json
    data: Json
    agreement: Json
    table: LatencyTable | None
    foreign: Differences
    """What differs where predictions are those of a table of another environment."""
    reference: Score | None
    """The float network's on validation."""
    front: Front | None
    explanation: Explanation | None
    """Of this front; one of an earlier front is not shown."""
    correction: Correction | None
    choice: Choice | None
    test: TestResult | None
    engines: tuple[EngineManifest, ...]
    measurements: dict[str, Measurement]
    stages: tuple[StageDone, ...]
    scored: tuple[Evaluation, ...]
    further: dict[str, Further]
    """Target id ▸ what there is of a further device of the search."""

    def engine(self, role: str) -> EngineManifest | None:
        """The first engine of a role; `chosen` is the choice's."""
        if role == "chosen":
            return next((e for e in self.engines if self.choice and e.name == self.choice.engine), None)
        return next((e for e in self.engines if e.role == role), None)


def read(run: Path) -> RunRecords:
    """Every record of the folder; RecordError if the folder or nothing in it exists, or a record is damaged."""
    if not run.is_dir():
        raise RecordError(f"no such run folder: {run}", hint="`nascompile run --out FOLDER` makes one")
    front = _optional(run / "front.json", Front)
    use = _optional(run / "foreign.json", ForeignUse)
    return RunRecords(
        folder=run,
        recipe=_plain(run / "recipe.json"),
        data=_plain(run / "data" / "data.json"),
        agreement=_plain(run / "agreement.json"),
        table=_optional(run / "table.json", LatencyTable),
        foreign=use.differences if use else front.foreign if front else (),
        reference=_optional(run / "baseline.json", Score),
        front=front,
        explanation=_explanation(run / "explain.json", front),
        correction=_optional(run / "correction.json", Correction),
        choice=_optional(run / "choice.json", Choice),
        test=_optional(run / "test.json", TestResult),
        engines=tuple(load(path, EngineManifest) for path in sorted(run.glob("engines/*/manifest.json"))),
        measurements={m.engine: m for m in (load(path, Measurement) for path in sorted(run.glob("measurements/*.json")))},
        stages=tuple(load(path, StageDone) for path in sorted(run.glob("stages/*.json"))),
        scored=fronts.scored(run / "journal.jsonl", front),
        further={found.table.target.id: found for found in map(_further, sorted(run.glob("tables/*.json")))},
    )


def _explanation(path: Path, front: Front | None) -> Explanation | None:
    found = _optional(path, Explanation)
    return found if found and front and found.front_digest == digest(front) else None


def _further(path: Path) -> Further:
    home = path.parent.parent / "devices" / path.stem
    return Further(
        table=load(path, LatencyTable),
        engines={m.name: m for m in (load(p, EngineManifest) for p in sorted(home.glob("engines/*/manifest.json")))},
        measurements={m.engine: m for m in (load(p, Measurement) for p in sorted(home.glob("measurements/*.json")))},
    )


def _optional(path: Path, kind: type[R]) -> R | None:
    return load(path, kind) if path.exists() else None


def _plain(path: Path) -> Json:
    """A file's JSON object, or the data of the record it holds, without asking which record."""
    if not path.exists():
        return {}
    try:
        body = json.loads(path.read_bytes())
    except ValueError as error:
        raise RecordError(f"damaged file: {path}", detail=str(error), hint="remove it; the stage will write it again") from error
    if not isinstance(body, dict):
        raise RecordError(f"{path} is not a JSON object: {type(body).__name__}", hint="remove it; the stage will write it again")
    return dict(body["data"]) if "record" in body else body


def _absent(*names: str) -> list[str]:
    return [f"{name} (stage {WRITERS[name]})" for name in names]


# ---------------------------------------------------------------------------------------------- sections


def _foreign(found: Differences) -> list[Json]:
    return [{"field": name, "table": there, "here": here} for name, there, here in found]


def _name(records: RunRecords) -> str:
    return str(records.recipe.get("name") or records.folder.resolve().name)


def _observed(records: RunRecords) -> str:
    """The word for what running the engines showed; no number of a simulator is called measured."""
    return " or ".join(sorted({m.latency.kind for m in records.measurements.values()})) or "measured"


def _unit(records: RunRecords) -> str:
    """The unit of predictions."""
    return "modelled ms" if _time_model(records) else "ms"


def _time_model(records: RunRecords) -> str:
    """A sentence for every place with milliseconds that nobody measured; empty where they were."""
    found = [m.environment for m in records.measurements.values()] + ([records.table.environment] if records.table else [])
    model = next(filter(None, map(latency_table.time_model, found)), "")
    return f"Milliseconds are modelled, not measured: {model}." if model else ""


def _engines(records: RunRecords) -> list[Json]:
    """Baseline, uniform, chosen, then the other candidates as they rank."""
    ranking = records.choice.ranking if records.choice else ()
    chosen = records.choice.engine if records.choice else ""
    order = {"baseline": 0, "uniform": 1, "candidate": 2}

    def place(e: EngineManifest) -> tuple[int, int, int, str]:
        return order[e.role], e.name != chosen, ranking.index(e.name) if e.name in ranking else len(ranking), e.name

    compared = _compared(records)
    reference = _throughput(records, compared) if compared else None
    return [_engine(records, e, compared, reference) for e in sorted(records.engines, key=place)]


def _compared(records: RunRecords) -> EngineManifest | None:
    """What sizes and speeds are relative to: the baseline's engine; the uniform one on a microcontroller, which runs no floats."""
    return records.engine("baseline") or next((e for e in records.engines if e.chip and e.role == "uniform"), None)


def _engine(records: RunRecords, e: EngineManifest, compared: EngineManifest | None, reference: Json | None) -> Json:
    measurement = records.measurements.get(e.name)
    is_chosen = records.choice is not None and e.name == records.choice.engine
    title = {"baseline": "Baseline", "uniform": f"Uniform {e.name.partition('-')[2].upper()}".strip()}.get(e.role, e.name)
    throughput = _throughput(records, e)
    batches = [_quantity(q) | {"batch": batch} for batch, q in measurement.throughput] if measurement else []
    test = dict(records.test.scores).get(e.name) if records.test else None
    differences = [d for d in records.test.differences if d.engine == e.name] if records.test else []
    own = compared.name if compared and compared.role == "baseline" else BASELINE
    against = next((d for d in differences if d.reference == own), None)
    return {
        "name": e.name, "role": e.role, "chosen": is_chosen, "title": f"Chosen: {title}" if is_chosen else title,
        "folder": str(records.folder / "engines" / e.name),
        "file": str(records.folder / "engines" / e.name / e.graphs[0]) if e.graphs else "",
        "predicted": msgspec.to_builtins(e.predicted) if e.predicted else None,
        "measured": _quantity(measurement.latency) if measurement else None,
        "throughput": throughput,
        "throughput_best": max(batches, key=lambda b: b["value"], default=None),
        "speedup": throughput["value"] / reference["value"] if throughput and reference else None,
        "size_bytes": e.size_bytes, "chip": msgspec.to_builtins(e.chip) if e.chip else None,
        "size_ratio": e.size_bytes / compared.size_bytes if compared and compared.size_bytes else None,
        "parameters": e.parameters,
        "peak_memory_bytes": measurement.peak_memory_bytes if measurement else None,
        "build_seconds": e.build_seconds,
        "validation": _score_facts(measurement.score) if measurement and measurement.score else None,
        "test": _score_facts(test) if test else None,
        "difference": msgspec.to_builtins(against) if against else None,
        "other_differences": [msgspec.to_builtins(d) for d in differences if d is not against],
        "precisions": dict(e.precision_counts),
        "backend": e.target.backend, "session": dict(e.target.session),
        "variants": [_variant(v) for v in e.variants],
        "tabled": _tabled(e, measurement),
        "candidate": _candidate(e.candidate) if e.candidate else None,
        "rejected": dict(records.choice.rejected).get(e.name, "") if records.choice else "",
    }  # fmt: skip


def _variant(v: Variant) -> Json:
    """One way that was tried; `setting` is empty where it is a backend as it comes."""
    return {
        "backend": v.backend, "setting": v.setting, "session": dict(v.session), "kept": v.kept, "reason": v.reason,
        "latency_ms": v.latency.value if v.latency else None, "n": v.latency.n if v.latency else 0,
        "kind": v.latency.kind if v.latency else "", "ratio": msgspec.to_builtins(v.ratio) if v.ratio else None,
    }  # fmt: skip


def _tabled(e: EngineManifest, measurement: Measurement | None) -> Json | None:
    """The latency of what the table predicts: the engine, or the variant of it that has the search's backend and session."""
    other = next((v for v in e.variants if v.predicted and v.latency), None)
    if e.predicted is None and other and other.latency:
        return _quantity(other.latency) | {"variant": other.backend, "predicted": msgspec.to_builtins(other.predicted)}
    return _quantity(measurement.latency) | {"variant": "", "predicted": msgspec.to_builtins(e.predicted)} if measurement else None


def _throughput(records: RunRecords, e: EngineManifest) -> Json | None:
    """Samples per second at the target's own batch."""
    measurement = records.measurements.get(e.name)
    found = dict(measurement.throughput) if measurement else {}
    batch = e.target.workload.batch
    return _quantity(found[batch]) | {"batch": batch} if batch in found else None


def _quantity(q: Quantity) -> Json:
    quantiles = {f"p{level * 100:g}": value for level, value in q.quantiles}
    statistic = next((name for name, value in quantiles.items() if value == q.value), "")
    return {"value": q.value, "statistic": statistic, "unit": q.unit, "kind": q.kind, "n": q.n, **quantiles}


def _score_facts(score: Score) -> Json:
    unit = "%" if score.metric.lower() in PERCENT_METRICS else ""
    return {
        "metric": score.metric, "direction": score.direction, "value": score.value, "unit": unit, "n": score.n, "stderr": score.stderr,
    }  # fmt: skip


def _candidate(point: Candidate) -> Json:
    return {
        "id": point.id,
        "architecture": dict(point.architecture),
        "precision": {target: dict(genes) for target, genes in point.precision},
        "text": _describe(point),
    }


def _describe(point: Candidate, number: int = 0) -> str:
    """Genes by kind, precisions as on target `number`, in network order: `depth 4 · heads 3 2 3 2 · width …; 7 of 8 blocks int8`."""
    groups: dict[str, list[str]] = {}
    for gene, value in point.architecture:
        groups.setdefault(gene.rpartition(".")[2], []).append(str(value))
    text = " · ".join(f"{name} {' '.join(values)}" for name, values in groups.items())
    for _, genes in point.precision[number : number + 1]:
        counts = sorted(Counter(value for _, value in genes).items())
        text += "; " * bool(counts) + ", ".join(f"{count} {'block' if count == 1 else 'blocks'} {name}" for name, count in counts)
    return text


def _summary(records: RunRecords, engines: list[Json]) -> Json:
    def numbers(role: str) -> Json | None:
        e = next((e for e in engines if (e["chosen"] if role == "chosen" else e["role"] == role)), None)
        if e is None:
            return _unbuilt(records) if role == "baseline" else None
        score = e["test"] or e["validation"] or {}
        found = {
            "accuracy": score.get("value"), "accuracy_split": "test" if e["test"] else "validation" if e["validation"] else None,
            "latency_ms": (e["measured"] or {}).get("value"), "p50_ms": (e["measured"] or {}).get("p50"),
            "throughput": (e["throughput"] or {}).get("value"), "size_bytes": e["size_bytes"],
        }  # fmt: skip
        if role == "chosen":
            found |= {"predicted_ms": (e["predicted"] or {}).get("value"), "candidate": e["candidate"]}
        return found

    chosen = next((e for e in engines if e["chosen"]), None)
    task = {
        "name": _name(records), "baseline": numbers("baseline"), "uniform_int8": numbers("uniform"), "chosen": numbers("chosen"),
        "seconds": {s["stage"]: s["seconds"] for s in _stages(records)},
        **({"stopped": records.front.stopped} if records.front and records.front.stopped else {}),
    }  # fmt: skip
    environment = _environment(records)
    devices = _devices(records)
    shown = ("label", "absent", "chosen", "cost")
    return {
        "tasks": [task], "environment": environment["must_match"] | environment["recorded"], "run": str(records.folder),
        "engine": chosen["folder"] if chosen else None,
        **({"devices": [{key: d[key] for key in shown} for d in devices["devices"]]} if devices else {}),
        **({"foreign": _foreign(records.foreign)} if records.foreign else {}),
    }  # fmt: skip


def _unbuilt(records: RunRecords) -> Json | None:
    """The float network where no engine can be made of it: its score, of test once that was read."""
    test = dict(records.test.scores).get(BASELINE) if records.test else None
    score = test or records.reference
    if score is None or not any(e.chip for e in records.engines):
        return None
    return {"accuracy": score.value, "accuracy_split": "test" if test else "validation"} | dict.fromkeys(
        ("latency_ms", "p50_ms", "throughput", "size_bytes")
    )


def _chip(records: RunRecords, engines: list[Json]) -> Json:
    """Memory and instructions of every engine for a microcontroller; nothing for other devices."""
    rows = [e for e in engines if e["chip"]]
    if not rows:
        return {}
    test = dict(records.test.scores).get(BASELINE) if records.test else None
    compared = _compared(records)
    return {
        "device": records.recipe.get("device", ""), "engines": [e["name"] for e in rows],
        "compared": f"the {compared.name} engine" if compared else "",
        "float_validation": _score_facts(records.reference) if records.reference else None,
        "float_test": _score_facts(test) if test else None,
    }  # fmt: skip


def _headline(records: RunRecords, engines: list[Json]) -> Json:
    chosen = next((e for e in engines if e["chosen"]), None)
    if records.choice is None or chosen is None:
        return {"missing": _absent("choice.json" if records.choice is None else "engines")}
    baseline = next((e for e in engines if e["role"] == "baseline"), None)
    budgets = _budgets(records, records.choice.budgets)
    change = chosen["difference"]
    if change is None and baseline and baseline["validation"] and chosen["validation"]:
        value = chosen["validation"]["value"] - baseline["validation"]["value"]
        change = {"value": value, "low": None, "high": None, "unit": "points" if chosen["validation"]["unit"] else ""}
    return {
        "engine": chosen, "baseline": baseline, "change": change, "change_split": "test" if chosen["difference"] else "validation",
        "reason": records.choice.reason, "budgets": budgets, "missing": [],
    }  # fmt: skip


def _front(records: RunRecords) -> Json:
    front = records.front
    if front is None:
        return {"missing": _absent("front.json"), "points": [], "scored": [], "unit": "", "metric": ""}
    members = {e.candidate for e in front.evaluations}
    first = front.evaluations[0].score if front.evaluations else None
    return {
        "missing": [] if records.scored else _absent("journal.jsonl"),
        "metric": first.metric if first else "",
        "unit": "%" if first and first.metric.lower() in PERCENT_METRICS else "",
        "direction": first.direction if first else "",
        "objectives": _objectives(front),
        "points": [_point(e) for e in front.evaluations],
        "scored": [_point(e) for e in records.scored if e.candidate not in members],
    }


def _objectives(front: Front) -> list[str]:
    """Names of what was minimized, a latency by device where there are several."""
    places = [f" on {label(t)}" for t in (front.target, *front.also)] if front.also else [""]
    return [name + place for name in front.objectives for place in (places if name == "latency_ms" else [""])]


def _budgets(records: RunRecords, budgets: Iterable[Budget]) -> list[str]:
    """Each as a person writes it, with its device where there are several."""
    front = records.front
    names = {t.id: f" on {label(t)}" for t in (front.target, *front.also)} if front and front.also else {}
    return [f"{b.metric} ≤ {b.bound:g}{names.get(b.target, '') if b.metric != 'macs_m' else ''}" for b in budgets]


def _devices(records: RunRecords) -> Json:
    """Each device of a search for several, all from the candidates that were scored; nothing where there is one."""
    front = records.front
    if front is None or not front.also:
        return {}
    found = (front.target, *front.also)
    evaluations = records.scored or front.evaluations
    seen = [fronts.seen(evaluations, number) for number in range(len(found))]
    own = [fronts.front(scored) for scored in seen]
    subnet = records.folder / "subnets" / records.choice.engine / "candidate.json" if records.choice else None
    chosen = load(subnet, Candidate) if subnet and subnet.is_file() else None
    shared = next((e for e in evaluations if e.candidate == chosen), None)
    common = fronts.common(own)
    rows = []
    for number, target in enumerate(found):
        members = {s.evaluation.candidate for s in own[number]}
        further = records.further.get(target.id)
        table = (further.table if further else None) if number else records.table
        rows.append(
            {
                "label": label(target), "first": number == 0, "absent": dict(front.absent).get(target.id, ""),
                "budgets": _budgets(records, [b for b in front.budgets if b.target == target.id and b.metric != "macs_m"]),
                "relative_error": table.relative_error if table else None,
                "front": [_seen(s, number) for s in own[number]],
                "scored": [_seen(s, number) for s in seen[number] if s.evaluation.candidate not in members],
                "chosen": _chosen_there(records, target, number, shared),
                "cost": _cost(fronts.cost(seen[number], shared), number) if shared else None,
            }
        )  # fmt: skip
    tau = [
        {"a": label(found[a]), "b": label(found[b]), "tau": fronts.kendall(seen[a], seen[b])} for a, b in combinations(range(len(found)), 2)
    ]
    return {
        "missing": [] if records.scored else _absent("journal.jsonl"), "devices": rows, "scored": len(evaluations), "common": list(common),
        "tau": tau, "metric": evaluations[0].score.metric if evaluations else "",
        "engine": records.choice.engine if records.choice else "", "candidate": shared.candidate.id if shared else "",
        "shared": [_shared(e, seen, common, e.candidate == chosen) for e in front.evaluations],
    }  # fmt: skip


def _seen(s: fronts.Seen, number: int) -> Json:
    e = s.evaluation
    there = msgspec.structs.replace(e, score=s.score, latency=s.latency, size_bytes=s.size_bytes)
    return _point(there) | {"text": _describe(e.candidate, number)}


def _cost(cost: fronts.Cost, number: int) -> Json:
    return {"ratio": cost.ratio, "shared": _seen(cost.shared, number), "alone": _seen(cost.alone, number)}


def _shared(e: Evaluation, seen: list[tuple[fronts.Seen, ...]], common: tuple[str, ...], chosen: bool) -> Json:
    """A candidate of the shared front: on each device, and what it costs there."""
    return {
        "id": e.candidate.id, "chosen": chosen, "worst": worst(e).value, "everywhere": e.candidate.id in common,
        "devices": [_cost(fronts.cost(scored, e), number) for number, scored in enumerate(seen)],
    }  # fmt: skip


def _chosen_there(records: RunRecords, target: Target, number: int, shared: Evaluation | None) -> Json | None:
    """Latency and score of the chosen network on a device: of its engine where that runs here, else predicted and emulated."""
    if records.choice is None:
        return None
    further = records.further.get(target.id)
    measurements = (further.measurements if further else {}) if number else records.measurements
    if m := measurements.get(records.choice.engine):
        score = _score_facts(m.score) if m.score else None
        latency = {"latency_ms": m.latency.value, "low": None, "high": None}
        return {"kind": m.latency.kind, "statistic": _quantity(m.latency)["statistic"], **latency, "score": score}
    if shared is None:
        return None
    there = fronts.seen((shared,), number)[0]
    interval = {"latency_ms": there.latency.value, "low": there.latency.low, "high": there.latency.high}
    return {"kind": "predicted", "statistic": "", **interval, "score": _score_facts(there.score)}


def _agreement_words(t: Json) -> str:
    value = "not defined" if t["tau"] is None else f"{t['tau']:.2f}"
    return f"Kendall τ of the latencies on {t['a']} and {t['b']}: {value}"


def _point(e: Evaluation) -> Json:
    return {
        "id": e.candidate.id, "latency_ms": e.latency.value, "low_ms": e.latency.low, "high_ms": e.latency.high, "level": e.latency.level,
        "score": e.score.value, "stderr": e.score.stderr, "n": e.score.n, "size_bytes": e.size_bytes, "parameters": e.parameters,
        "macs": e.macs, "memory_bytes": e.memory_bytes or None, "text": _describe(e.candidate),
    }  # fmt: skip


def _prediction(records: RunRecords, engines: list[Json]) -> Json:
    """Engines from the correction (or manifest and measurement before there is one), and the table's own validation networks."""
    stated = {name: (predicted, measured) for name, predicted, measured in records.correction.residuals} if records.correction else {}
    rows = []
    for e in engines:
        tabled = e["tabled"] or {}
        interval, value = tabled.get("predicted"), tabled.get("value")
        predicted, measured = stated.get(e["name"], (interval["value"] if interval else None, value))
        if predicted and measured:
            low, high = (interval["low"], interval["high"]) if interval else (None, None)
            which = {"engine": e["name"], "role": e["role"], "chosen": e["chosen"]}
            title = e["title"] + (f", {tabled['variant']} as it comes" if tabled.get("variant") else "")
            rows.append(_residual(title, predicted, measured, low, high) | which)
    networks, table = [], records.table
    for r in table.validation if table else ():
        half = latency_table.half_width(table, r.predicted_ms) if table else 0.0
        networks.append(_residual(r.candidate.id, r.predicted_ms, _ms(r.measured), r.predicted_ms - half, r.predicted_ms + half))
    missing = [] if table else _absent("table.json")
    missing += [] if rows else _absent("engines", "measurements")
    missing += [] if records.correction else _absent("correction.json")
    return {
        "engines": rows, "networks": networks, "mape_engines": _mape(rows), "mape_networks": _mape(networks),
        "relative_error": table.relative_error if table else None,
        "merged": bool(table and latency_table.MERGED in dict(table.environment.recorded)),
        "factor": records.correction.factor if records.correction else None,
        "spread": records.correction.spread if records.correction else None,
        "missing": missing,
    }  # fmt: skip


def _residual(title: str, predicted: float, measured: float, low: float | None, high: float | None) -> Json:
    inside = low <= measured <= high if low is not None and high is not None else None
    return {
        "title": title, "predicted_ms": predicted, "low_ms": low, "high_ms": high, "measured_ms": measured,
        "residual_percent": 100 * (measured / predicted - 1), "inside": inside,
    }  # fmt: skip


def _mape(rows: list[Json]) -> float | None:
    """Mean of |predicted − measured| / measured, in percent."""
    if not rows:
        return None
    return 100 * math.fsum(abs(r["predicted_ms"] - r["measured_ms"]) / r["measured_ms"] for r in rows) / len(rows)


def _agreement(records: RunRecords) -> Json:
    return {"missing": [] if records.agreement else _absent("agreement.json")} | records.agreement


def _operators(records: RunRecords, engines: list[Json]) -> Json:
    """Table rows of each engine's blocks, the call itself and what belongs to neither, as the table counts them: predicted ms."""
    named = {m.name: m for m in (records.engine(role) for role in ("baseline", "uniform", "chosen")) if m and m.graph}
    shown = list(named.values())
    if records.table is None or not shown:
        return {"missing": _absent(*(["table.json"] if records.table is None else []), *([] if shown else ["engines"])), "engines": []}
    rows = {row.operator: row for row in records.table.rows}
    facts = {e["name"]: e for e in engines}
    found = []
    for manifest in shown:
        blocks: list[Json] = []
        unknown = []
        size = latency_table.footprint(rows, manifest.graph) if manifest.graph else 0
        for node in manifest.graph.nodes if manifest.graph else ():
            if row := rows.get(node.operator):
                in_ms = msgspec.structs.replace(row, latency=msgspec.structs.replace(row.latency, value=_ms(row.latency)))
                blocks.append(
                    {
                        "block": node.name, "kind": node.operator.kind, "operator": node.operator.label, "noisy": row.noisy,
                        "latency_ms": latency_table.counted(records.table, in_ms, size), "precision": node.operator.precision.name,
                    }
                )  # fmt: skip
            else:
                unknown.append(f"{node.name}: {node.operator.label}")
        kinds: dict[str, float] = {}
        if records.table.call is not None:
            call = {"block": "call", "kind": "call", "operator": "one call of the runtime, whatever the network", "precision": ""}
            blocks.append(call | {"noisy": False, "latency_ms": _ms(records.table.call) * records.table.scale})
        if records.table.correction is not None and manifest.graph and not unknown:
            between = {"block": "between blocks", "kind": "between", "operator": "changes of precision, and weights that leave the caches"}
            ms = latency_table.between(records.table, rows, manifest.graph)
            blocks.append(between | {"precision": "", "noisy": False, "latency_ms": ms})
        for block in blocks:
            kinds[block["kind"]] = kinds.get(block["kind"], 0.0) + block["latency_ms"]
        found.append(
            {
                "name": manifest.name, "title": facts[manifest.name]["title"], "blocks": blocks, "without_row": unknown, "by_kind": kinds,
                "total_ms": math.fsum(kinds.values()), "measured_ms": (facts[manifest.name]["tabled"] or {}).get("value"),
            }
        )  # fmt: skip
    names = list(dict.fromkeys(b["kind"] for e in found for b in e["blocks"]))
    return {"missing": [], "engines": found, "kinds": names, "scale": records.table.scale}


def _architecture(records: RunRecords) -> Json:
    """Blocks of the full network in execution order, with what the chosen engine keeps of each."""
    chosen = records.engine("chosen")
    if chosen is None or chosen.graph is None:
        return {"missing": _absent("choice.json" if records.choice is None else "engines"), "blocks": []}
    whole = next((m.graph for m in (records.engine("baseline"), records.engine("uniform")) if m and m.graph), chosen.graph)
    full = {g.name: int(g.choices[-1]) for g in chosen.space.genes if g.kind == "architecture"} if chosen.space else {}
    own = dict(chosen.candidate.architecture) if chosen.candidate else {}
    kept = {node.name: node for node in chosen.graph.nodes}
    blocks = []
    for node in whole.nodes:
        mine = kept.get(node.name)
        sizes = [(gene.rpartition(".")[2], own.get(gene, full[gene]), full[gene]) for gene in node.genes if gene in full] if mine else []
        blocks.append(
            {
                "block": node.name, "title": _block_title(node.name), "kind": node.operator.kind, "kept": mine is not None,
                "fraction": math.prod((min(value, most) / most for _, value, most in sizes), start=1.0) if mine else 0.0,
                "sizes": [{"name": name, "kept": value, "full": most} for name, value, most in sizes],
                "precision": mine.operator.precision.name if mine else "",
                "parameters": mine.parameters if mine else 0, "size_bytes": mine.size_bytes if mine else 0,
                "full_parameters": node.parameters, "macs": mine.macs if mine else 0,
            }
        )  # fmt: skip
    layers = [{n.name.split(".")[1] for n in g.nodes if n.name.startswith("layers.")} for g in (chosen.graph, whole)]
    return {
        "missing": [] if whole is not chosen.graph else ["a full network to compare with (engine baseline)"],
        "engine": chosen.name, "candidate": _candidate(chosen.candidate) if chosen.candidate else None, "blocks": blocks,
        "layers_kept": len(layers[0]), "layers_full": len(layers[1]),
        "precisions": list(dict.fromkeys(b["precision"] for b in blocks if b["kept"])),
    }  # fmt: skip


def _block_title(name: str) -> str:
    parts = name.split(".")
    return f"Layer {int(parts[1]) + 1} {parts[2]}" if len(parts) == 3 and parts[1].isdigit() else name.capitalize()


def _search(records: RunRecords) -> Json:
    front = records.front
    if front is None:
        return {"missing": _absent("front.json"), "hypervolume": []}
    return {
        "missing": [] if front.hypervolume else ["hypervolume in front.json"], "searcher": front.searcher, "seed": front.seed,
        "candidate_epochs": records.recipe.get("finetune", {}).get("candidate_epochs", 0),
        "scored": front.scored, "seconds": front.seconds, "objectives": _objectives(front), "found": len(front.evaluations),
        "budgets": _budgets(records, front.budgets), "hypervolume": [list(pair) for pair in front.hypervolume], "stopped": front.stopped,
    }  # fmt: skip


def _explain(found: Explanation) -> Json:
    """Genes by what accuracy varies with them, layers in their order, then fewer layers."""
    names = [f" on {name}" for name in found.targets] if len(found.targets) > 1 else [""]
    genes = sorted(found.genes, key=lambda g: (-g.points, -math.fsum(g.ms), g.gene))
    layers = sorted(found.layers, key=lambda t: (t.layer < 0, t.layer, -math.fsum(t.ms)))
    return {
        "metric": found.metric, "model": found.model, "r2": found.r2, "others": [list(pair) for pair in found.others],
        "trust": found.trust, "scored": found.scored, "targets": names, "unit": found.unit, "base": _candidate(found.base),
        "genes": msgspec.to_builtins(genes),
        "layers": [
            msgspec.to_builtins(t) | {"title": f"Layer {t.layer + 1}" if t.layer >= 0 else "Fewer layers"} for t in layers
        ],
    }  # fmt: skip


def _data(records: RunRecords) -> Json:
    """The data's record: `splits` as rows, everything else by name, settings that were left empty left out."""
    body = {key: value for key, value in records.data.items() if not key.endswith("digest")}
    splits = body.pop("splits", [])
    settings = {key: value for key, value in body.pop("settings", {}).items() if value not in ("", 0, [])}
    facts = {key: value for key, value in body.items() if value not in ("", 0, None, [])}
    return {"missing": [] if records.data else ["data/data.json (stage data)"], "splits": splits, "facts": facts | settings}


def _environment(records: RunRecords) -> Json:
    """Of the chosen engine's measurement, else the first one, else the table."""
    names = [records.choice.engine] if records.choice else []
    found = [records.measurements[n].environment for n in (*names, *records.measurements) if n in records.measurements]
    found += [records.table.environment] if records.table else []
    if not found:
        return {"missing": _absent("measurements"), "must_match": {}, "recorded": {}, "target": {}, "versions": {}}
    engine = records.engine("chosen") or records.engine("baseline")
    target = engine.target if engine else records.table.target if records.table else None
    shown = _flat(msgspec.to_builtins(target) | {"session": dict(target.session)}) if target else {}
    must_match = dict(found[0].must_match)
    if found[0] is (records.table and records.table.environment):  # nothing was measured yet, and the table may be from elsewhere
        must_match = {k: v for k, v in (must_match | {name: here for name, _, here in records.foreign}).items() if v is not None}
    return {
        "missing": [], "must_match": must_match, "recorded": dict(found[0].recorded),
        "target": {k: v for k, v in shown.items() if v not in (0, (0, 0))}, "versions": dict(engine.versions) if engine else {},
    }  # fmt: skip


def _flat(body: Json, prefix: str = "") -> Json:
    found: Json = {}
    for key, value in body.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _reproduce(records: RunRecords) -> Json:
    folder = shlex.quote(str(records.folder))
    commands = []
    if command := records.recipe.get("command"):
        commands.append(("As it was called", shlex.join(map(str, command)) if isinstance(command, list) else str(command)))
    if records.recipe:
        commands.append(("The whole run again, from the recipe below saved as recipe.toml", "nascompile run recipe.toml --out runs/again"))
    if chosen := records.engine("chosen"):
        path = str(records.folder / "engines" / chosen.name)
        engine = shlex.quote(path)
        commands.append(("Check the engine's files and its reference sample", f"nascompile verify {engine}"))
        if (Path(path) / "run.py").is_file():
            commands.append(("Run the engine with the runtime and NumPy alone", f"python {engine}/run.py"))
        if (Path(path) / "Makefile").is_file():
            commands.append(("Its reference sample in QEMU: outputs, instructions per operator, memory", f"make -C {engine} run"))
        commands.append(("Use it from Python", f"import nascompile; nascompile.load({path!r}).predict(samples)"))
    commands.append(("This report again", f"nascompile report --out {folder}"))
    recipe = {key: value for key, value in records.recipe.items() if key not in ("command", "note", "name")}
    return {
        "missing": [] if recipe else ["recipe.json (written when the run starts)"],
        "commands": [{"what": what, "command": command} for what, command in commands], "recipe": recipe, "toml": toml(recipe),
    }  # fmt: skip


def _stages(records: RunRecords) -> list[Json]:
    order = {stage: place for place, stage in enumerate(STAGES)}
    done = sorted(records.stages, key=lambda s: (order.get(s.stage, len(order)), s.stage))
    return [{"stage": s.stage, "seconds": s.seconds} for s in done]


def _statistic(engines: list[Json]) -> str:
    """Which quantile the engines' latencies are, and predictions of them."""
    return next((str(e["measured"]["statistic"]) for e in engines if e["measured"]), "")


def _ms(q: Quantity) -> float:
    """The quantity's own statistic in ms, which predictions are made of."""
    if q.unit not in MILLISECONDS:
        raise RecordError(f"a latency in an unknown unit: {q.unit}", hint=f"units: {', '.join(MILLISECONDS)}")
    return q.value * MILLISECONDS[q.unit]


def toml(body: Json) -> str:
    """A recipe as TOML; entries that are None are left out."""
    lines = _toml_entries({k: v for k, v in body.items() if not isinstance(v, dict)})
    for name, table in body.items():
        if isinstance(table, dict) and table:
            lines += ["", f"[{_toml_key(name)}]", *_toml_entries(table)]
    return "\n".join(lines)


def _toml_entries(body: Json) -> list[str]:
    return [f"{_toml_key(k)} = {_toml(v)}" for k, v in body.items() if v is not None]


def _toml_key(key: str) -> str:
    return key if key.replace("-", "").replace("_", "").isalnum() and key.isascii() else json.dumps(key)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(k)} = {_toml(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value if v is not None) + "]"
    return json.dumps(value, ensure_ascii=False)


# ---------------------------------------------------------------------------------------------- text of numbers


def number(value: float | None) -> str:
    """Three significant digits, thousands separated; a dash for nothing."""
    if value is None:
        return "–"
    if not value:
        return "0"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def signed(value: float | None, digits: int = 2) -> str:
    """With its sign, a true minus."""
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def file_size(value: float | None) -> str:
    """In MB, below 0.1 MB in kB (powers of ten)."""
    return "–" if value is None else f"{number(value / 1e3)} kB" if value < 1e5 else f"{number(value / 1e6)} MB"


def count(value: float | None) -> str:
    """1.2 M, 340 k, 12."""
    if value is None:
        return "–"
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{number(value / factor)} {letter}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """4.2 s, 3 min 05 s, 1 h 02 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _interval(predicted: Json | None) -> str:
    return f"{number(predicted['value'])} [{number(predicted['low'])}, {number(predicted['high'])}]" if predicted else "–"


def _latency(measured: Json | None, name: str = "value") -> str:
    return number(measured[name]) if measured and name in measured else "–"


def _rate(throughput: Json | None) -> str:
    return number(throughput["value"]) if throughput else "–"


def _times(ratio: float | None) -> str:
    return f"{ratio:.2f}×" if ratio is not None else "–"


def _score(score: Json | None) -> str:
    return f"{score['value']:.2f}{' ' + score['unit'] if score['unit'] else ''}" if score else "–"


def _plain_value(value: Any) -> str:
    """A setting of the environment or the data, for a person."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain_value, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_plain_value(v)}" for k, v in value.items()) or "none"
    return f"{value:,}" if isinstance(value, int) else "–" if value is None or value == "" else str(value)


def _balance(counts: list[tuple[str, int]]) -> str:
    """Samples per class; the smallest and largest where there are many classes."""
    if len(counts) > 4:
        sizes = sorted(int(n) for _, n in counts)
        return f"{len(counts)} classes of {sizes[0]:,} to {sizes[-1]:,}"
    return ", ".join(f"{name}: {n:,}" for name, n in counts) or "–"


class Code(str):
    """Text inside a Markdown code span, where nothing needs escaping."""


def _code(text: str) -> Code:
    fence = "`" * (1 + max((len(run) for run in _backticks(text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return Code(f"{fence}{pad}{text}{pad}{fence}".replace("\n", " "))


def _backticks(text: str) -> Iterable[str]:
    return "".join(c if c == "`" else " " for c in text).split()


def _markdown(value: Any) -> Any:
    """User text cannot become Markdown or HTML."""
    if not isinstance(value, str) or isinstance(value, Code):
        return value
    for mark in "\\`*_[]|#~":
        value = value.replace(mark, "\\" + mark)
    return value.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\n", " ")


def _templates(*, html: bool) -> Any:
    """A jinja2 environment over report_assets; HTML autoescapes, Markdown escapes its own marks."""
    import jinja2

    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS), autoescape=html, finalize=None if html else _markdown, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=False,
    )  # fmt: skip
    found.filters |= {
        "number": number, "signed": signed, "file_size": file_size, "count_si": count, "duration": duration, "interval": _interval,
        "of_limit": _of_limit,
        "latency": _latency, "rate": _rate, "times": _times, "score": _score, "plain": _plain_value, "code": _code,
        "verbatim": Code, "agreement": _agreement_words, "balance": _balance,
    }  # fmt: skip
    return found
