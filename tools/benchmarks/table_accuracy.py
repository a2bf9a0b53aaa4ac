"""How well a latency table predicts whole networks it has never seen, and what other ways of predicting do with as many measurements.

    python tools/benchmarks/table_accuracy.py --json
    python tools/benchmarks/table_accuracy.py --cells vit_demo:mixed minilm:int8

A cell is MODEL:PRECISION. Its networks are fresh: half of them spread evenly over predicted latency, half from the front of a search for
low predicted latency and a random, monotone quality (a search picks what the table flatters). Random weights: speed does not depend on
them. Measured and predicted are milliseconds of one call at batch 1; errors are in percent of the measured value.

A shared machine's speed wanders by several percent within minutes, and a table speaks of the speed it was taken at. So a few of the
networks that the table was corrected by, of the cell's precision, are timed again beside every window of fresh ones, and what is measured
is brought to the table's pace: what their times were over what they are, as a smooth curve over the logarithm of their bytes of weights,
since networks that fit into a cache do not follow the memory's speed. Regressions get the same. `pace` is the mean of these factors,
`mape_as_timed` and `coverage_as_timed` are without it. Two floors, of engines that are timed twice: `noise_floor` is by how much fresh ones
differ in two windows one after the other, `known_floor` by how much the known ones, brought to the table's pace by each other, differ from
what they were when the table was made; `known_change` is the same without that.

Ways to predict, all of them given the same networks: `table` (what nascompile uses), `rows` (the same with no correction by networks),
`stacks` (rows alone, without what they cost in networks of other sizes), `isolated` (every operator timed alone in a hot loop, summed),
`profiler` (ONNX Runtime's own profile of the stacks, summed), and, fitted to as many whole networks as the table has rows and networks:
`macs` (least squares on MACs in float and in integers), `ridge` and `boosting` (scikit-learn, on the genes).

Everything is kept under --cache by a digest of what it depends on, so a run that was stopped goes on; --fresh times anew.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from scipy.stats import kendalltau
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.linear_model import RidgeCV
from transformers import BertConfig, ViTConfig

from nascompile import latency_table, models, network, pareto, plugins, profiler, records, space as spaces, targets
from nascompile.records import Candidate, LatencyTable, SearchSpace, TableRow, digest, write_atomic
from nascompile.searchers import Price, Problem

DEMO = Path(__file__).resolve().parents[2] / "nascompile" / "demo" / "model"
_SMALL = {"hidden_size": 384, "intermediate_size": 1536}
MODELS: dict[str, tuple[Callable[[], Any], int, int]] = {
    "vit_demo": (lambda: models.read_config(DEMO), 0, 40),
    "minilm": (lambda: BertConfig(**_SMALL, num_hidden_layers=6, num_attention_heads=12), 40, 40),
    "vit_s": (lambda: ViTConfig(**_SMALL, num_attention_heads=6, num_labels=1000), 0, 40),
    "bert_base": (BertConfig, 128, 20),
}
"""Configuration, tokens (images have their own), fresh networks of a cell."""
CELLS = ("fp32", "int8", "mixed")
TOY = "toy"
"""For the test of the benchmark itself: a ViT of 64 features."""
SEED = 7
"""Of fresh networks and of the search; tables have 0."""
GENERATIONS, POPULATION = 40, 40
LOADED_BYTES = 6 * 2**30
"""Of float32 weights of networks that take turns."""
SECONDS = 0.5
"""Timing per network."""
BARS = {"mape": {"fp32": 1.5, "int8": 1.5, "mixed": 2.5}, "within_5": 0.95, "kendall_tau": 0.95, "front_signed_error": 1.5}
COVERAGE_BAR = (0.85, 0.95)
KNOWN = 13
"""Networks of the table's own beside every window."""
OCTAVES = 0.5
"""Width of the curve's kernel (a normal distribution's standard deviation), in octaves of bytes."""
TURNS = 4
"""In which what lies far from the curve loses weight."""
CALLS = 20
"""Profiled calls of a stack, after as many that are not looked at."""


@dataclass(frozen=True)
class Case:
    """One model on one backend, and where its measurements are kept."""

    model: str
    backend_name: str
    threads: int
    cache: Path

    @cached_property
    def config(self) -> Any:
        if self.model == TOY:
            sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
            return ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1)
        return MODELS[self.model][0]()

    @cached_property
    def bench(self) -> profiler.Bench:
        return profiler.Bench(self.family, self.config, self.space, self.target, self.backend, self.folder, 0)

    @cached_property
    def family(self) -> Any:
        return models.family_of(self.config.model_type)

    @cached_property
    def backend(self) -> Any:
        return plugins.get("backends", self.backend_name)

    @cached_property
    def device(self) -> Any:
        return plugins.get("devices", targets.LOCAL)

    @cached_property
    def target(self) -> Any:
        tokens = MODELS[self.model][1] if self.model in MODELS else 0
        return targets.make(targets.LOCAL, self.backend_name, self.family.workload(self.config, 1, tokens), self.threads)

    @cached_property
    def space(self) -> SearchSpace:
        return network.search_space(self.family, self.config, self.backend, self.target, self.model, precisions=("int8",))

    @cached_property
    def environment(self) -> Any:
        return self.device.environment(self.target, self.backend.versions())

    @cached_property
    def folder(self) -> Path:
        path = self.cache / f"{self.model}-{digest(self.target, self.environment.must_match, self.space)[:12]}"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def predicted(self, table: LatencyTable, point: Candidate) -> Any:
        return latency_table.predict(table, network.graph(self.family, self.config, self.space, point, self.target))

    def footprint(self, table: LatencyTable, point: Candidate) -> int:
        """Bytes of weights that a call reads in layers."""
        rows = {row.operator: row for row in table.rows}
        return max(1, latency_table.footprint(rows, network.graph(self.family, self.config, self.space, point, self.target)))

    def cell_space(self, precision: str) -> SearchSpace:
        """The space with every precision gene free, or held at one value. Its points are points of the whole space."""
        if precision == "mixed":
            return self.space
        genes = tuple(msgspec.structs.replace(g, choices=(precision,)) if g.kind == "precision" else g for g in self.space.genes)
        return msgspec.structs.replace(self.space, genes=genes)

    def kind(self, point: Candidate) -> str:
        """The cell that a candidate belongs to."""
        graph = network.graph(self.family, self.config, self.space, point, self.target)
        names = {node.operator.precision.name for node in graph.nodes if node.operator.kind in self.bench.repeated}
        return names.pop() if len(names) == 1 else "mixed"

    def point(self, space: SearchSpace, point: Candidate) -> Candidate:
        return spaces.candidate(self.space, spaces.genome(space, point))


# ------------------------------------------------------------------------------------------------ what is measured


def table_of(case: Case, fresh: bool) -> LatencyTable:
    """Profiled as `nascompile profile` does it."""
    path = case.folder / "table.json"
    if fresh or not path.is_file():
        path.unlink(missing_ok=True)
        records.save(
            profiler.profile(case.family, case.config, case.space, case.target, case.backend, case.device, case.folder / "work", 0), path
        )
    return records.load(path, LatencyTable)


def isolated(case: Case, table: LatencyTable) -> list[float]:
    """Milliseconds of every row's operator alone in a hot loop."""
    with tempfile.TemporaryDirectory(dir=case.folder) as scratch:
        jobs = [case.bench.operator(row.operator, 1, Path(scratch)) for row in table.rows]
        before = _pace(case, table)
        found = [case.device.time([job], seconds=profiler.ROW_SECONDS / 2, seed=0)[0].value for job in jobs]
        pace = (before + _pace(case, table)) / 2
        return [ms * pace for ms in found]


@dataclass(frozen=True)
class Known:
    """Networks of the table's own, timed again beside others: what their times were over what they are is the pace."""

    case: Case
    table: LatencyTable
    scratch: Path
    precision: str
    """Of a cell; empty: of all."""

    @cached_property
    def residuals(self) -> list[Any]:
        own = [r for r in self.table.validation if self.precision in ("", self.case.kind(r.candidate))]
        found = sorted(own, key=lambda r: r.measured.value)
        count = min(KNOWN, len(found))
        return [found[round((i + 0.5) * len(found) / count - 0.5)] for i in range(count)]

    @cached_property
    def jobs(self) -> list[Any]:
        return [self.case.bench.network(r.candidate, self.scratch) for r in self.residuals]

    def ratios(self, found: Sequence[Any]) -> list[float]:
        """Then over now of every known network; `found` begins with their latencies."""
        return [r.measured.value / q.value for r, q in zip(self.residuals, found, strict=False)]

    def paces(self, found: Sequence[Any], points: Sequence[Candidate]) -> list[float]:
        """Then over now for networks of these candidates' bytes."""
        logs, places = np.log(self.ratios(found)), self._places([r.candidate for r in self.residuals])
        return [math.exp(_smooth(places, logs, place)) for place in self._places(points)]

    def own_paces(self, found: Sequence[Any]) -> list[float]:
        """The same for every known network, by the others."""
        logs, places = np.log(self.ratios(found)), self._places([r.candidate for r in self.residuals])
        return [math.exp(_smooth(np.delete(places, i), np.delete(logs, i), places[i])) for i in range(len(places))]

    def _places(self, points: Sequence[Candidate]) -> Any:
        return np.log2([self.case.footprint(self.table, p) for p in points])


def _smooth(places: Any, values: Any, place: float) -> float:
    """The value at a place by a line through its neighbours, the nearer the heavier; what lies far from its own place's counts less."""
    trust = np.ones(len(places))
    for _ in range(TURNS):
        missed = np.abs(values - [_line(places, values, trust, p) for p in places])
        trust = np.minimum(1.0, 2 * np.median(missed) / np.maximum(missed, 1e-12)) ** 2 if missed.any() else trust
    return _line(places, values, trust, place)


def _line(places: Any, values: Any, trust: Any, place: float) -> float:
    weights = trust * (np.exp(-0.5 * ((places - place) / OCTAVES) ** 2) + 1e-3)
    middle, mean = np.average(places, weights=weights), np.average(values, weights=weights)
    spread = np.average((places - middle) ** 2, weights=weights)
    slope = np.average((places - middle) * (values - mean), weights=weights) / spread if spread > 1e-4 else 0.0
    return float(mean + slope * (place - middle))


def _anchors(case: Case, table: LatencyTable, scratch: Path) -> profiler.Anchors:
    known = {row.operator: row for row in table.rows} | {profiler.CALL: TableRow(operator=profiler.CALL, latency=table.call)}
    return profiler.Anchors(case.bench, [row.operator for row in table.rows], known, scratch)


def _pace(case: Case, table: LatencyTable) -> float:
    """The table's time over time now."""
    with tempfile.TemporaryDirectory(dir=case.folder) as scratch:
        anchors = _anchors(case, table, Path(scratch))
        return anchors.pace(case.device.time(anchors.jobs, seconds=len(anchors.jobs) * profiler.ROW_SECONDS, seed=0))


def profiled(case: Case, table: LatencyTable) -> list[float]:
    """Milliseconds that ONNX Runtime's profiler gives the nodes of every row's stack, for one copy: each node's tenth percentile."""
    found, before = [], _pace(case, table)
    for row in table.rows:
        with tempfile.TemporaryDirectory(dir=case.folder) as scratch:
            copies = case.bench.copies(row.operator)
            found.append(_profile(case, row.operator, copies, Path(scratch)) / copies)
    pace = (before + _pace(case, table)) / 2
    return [ms * pace for ms in found]


def _profile(case: Case, operator: Any, copies: int, scratch: Path) -> float:
    import onnxruntime

    from nascompile import lowering

    model = lowering.lower_operator(case.bench.blueprint, case.family, case.config, operator, copies, case.backend, 0)
    (name,) = case.backend.build(model, case.target, scratch)
    session, options = dict(case.target.session), onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = case.threads, 1
    options.enable_profiling, options.profile_file_prefix = True, str(scratch / "profile")
    run = onnxruntime.InferenceSession(
        str(scratch / name), options, providers=["CPUExecutionProvider"], disabled_optimizers=session["disabled_optimizers"].split(",")
    )
    inputs = case.bench._inputs(model)
    for _ in range(2 * CALLS):
        run.run(None, inputs)
    events = json.loads(Path(run.end_profiling()).read_text())
    nodes: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            nodes.setdefault(event["name"], []).append(event["dur"])
    return sum(float(np.quantile(durations[CALLS:], 0.1)) for durations in nodes.values()) / 1e3


def fresh_networks(case: Case, table: LatencyTable, precision: str, count: int) -> tuple[list[Candidate], list[Candidate]]:
    """(spread evenly over predicted latency, from the front of a search); no network of the table's own among them."""
    space, rng = case.cell_space(precision), np.random.default_rng((SEED, CELLS.index(precision)))
    own = {r.candidate for r in table.calibration}
    drawn = {case.point(space, spaces.sample(space, rng)) for _ in range(20 * count)} - own
    price = {point: case.predicted(table, point).value for point in sorted(drawn, key=lambda c: c.id)}
    stratified = _evenly(price, count // 2)
    front = {p: case.predicted(table, p).value for p in _front(case, table, space) if p not in own and p not in stratified}
    return stratified, _evenly(front, count - count // 2)


def _evenly(price: dict[Candidate, float], count: int) -> list[Candidate]:
    """Candidates nearest to evenly spaced prices, each once."""
    low, high, chosen = min(price.values()), max(price.values()), []
    for i in range(min(count, len(price))):
        place = low + (high - low) * (i + 0.5) / count
        chosen.append(min((p for p in price if p not in chosen), key=lambda p: abs(price[p] - place)))
    return chosen


def _front(case: Case, table: LatencyTable, space: SearchSpace) -> list[Candidate]:
    """Non-dominated points of NSGA-II for predicted latency and two random qualities, one after the other.

    A quality is a sum over active genes that rises with every step of size, by random amounts, and falls with fewer bits.
    """
    found: dict[Candidate, None] = {}
    problem = Problem(space, 2, lambda point: Price((None, None)))
    for turn in range(2):
        rng = np.random.default_rng((SEED, turn))
        worth = {}
        for gene in space.genes:
            sizes = np.cumsum(rng.exponential(size=len(gene.choices))) * rng.exponential()
            worth[gene.name] = dict(zip(gene.choices, sizes if gene.kind == "architecture" else -0.3 * sizes, strict=True))
        run = plugins.get("searchers", "nsga2").start(problem, POPULATION, (), SEED + turn)
        scored: dict[Candidate, list[float]] = {}
        for _ in range(GENERATIONS):
            if not (points := run.ask()):
                break
            for p in points:
                quality = sum(worth[_gene(space, slot)][value] for slot, value in spaces.genome(space, p).items())
                scored[p] = [-quality, case.predicted(table, case.point(space, p)).value]
            run.tell(points, np.array([scored[p] for p in points]), np.zeros(len(points)))
        names = list(scored)
        found |= dict.fromkeys(case.point(space, names[i]) for i in pareto.front(np.array(list(scored.values()))))
    return list(found)


def _gene(space: SearchSpace, slot: str) -> str:
    return spaces.slot_gene(space, slot).name


def measure(
    case: Case, table: LatencyTable, points: Sequence[Candidate], seconds: float, precision: str = "", windows: int = 2
) -> tuple[list[list[list[float]]], list[list[float]]]:
    """(milliseconds, pace) of every network in each of some windows, the first being what is measured; and of known ones in all windows
    (then over now, pace)."""
    found: list[list[list[float]]] = []
    known: list[list[float]] = []
    per = 4 * sum(int(np.prod(shape)) for shape in case.family.parameters(case.config).values())
    size = max(4, LOADED_BYTES // per)
    for start in range(0, len(points), size):
        part = points[start : start + size]
        with tempfile.TemporaryDirectory(dir=case.folder) as scratch:
            anchors = Known(case, table, Path(scratch), precision)
            jobs = [*anchors.jobs, *(case.bench.network(point, Path(scratch)) for point in part)]
            timed = []
            for seed in range(SEED, SEED + windows):
                options: dict[str, Any] = {"seconds": seconds * len(jobs), "seed": seed, "min_samples": profiler.NETWORK_SAMPLES}
                first = profiler.quieter(case.device, jobs, case.device.time(jobs, **options), **options)
                known += [list(pair) for pair in zip(anchors.ratios(first), anchors.own_paces(first), strict=True)]
                here = zip(first[len(anchors.jobs) :], anchors.paces(first, part), strict=True)
                timed.append([[quantity.value, pace] for quantity, pace in here])
            found += [list(both) for both in zip(*timed, strict=True)]
    return found, known


def training_networks(case: Case, table: LatencyTable, count: int) -> list[Candidate]:
    """Random networks of the whole space: a third of them in float, a third in integers, a third mixed."""
    rng, found = np.random.default_rng((SEED, 99)), dict[Candidate, None]()
    for i in range(20 * count):
        space = case.cell_space(CELLS[i % len(CELLS)])
        found[case.point(space, spaces.sample(space, rng))] = None
        if len(found) == count:
            break
    return list(found)


# ------------------------------------------------------------------------------------------------ what is predicted


def predictors(
    case: Case, table: LatencyTable, rows: dict[str, list[float]], training: tuple[list[Candidate], list[float]]
) -> dict[str, Callable[[Candidate], float]]:
    """Name ▸ milliseconds of a candidate."""
    plain = msgspec.structs.replace(table, scale=1.0, correction=None)
    stacks = msgspec.structs.replace(plain, rows=tuple(msgspec.structs.replace(row, reach=()) for row in table.rows))

    def graph(point: Candidate) -> Any:
        return network.graph(case.family, case.config, case.space, point, case.target)

    def summed(values: Sequence[float], point: Candidate) -> float:
        known = dict(zip((row.operator for row in table.rows), values, strict=True))
        return sum(known[node.operator] for node in graph(point).nodes)

    def fitted(model: Any, features: Callable[[Candidate], list[float]]) -> Callable[[Candidate], float]:
        points, values = training
        model.fit(np.array([features(p) for p in points]), np.array(values))
        return lambda point: float(model.predict(np.array([features(point)]))[0])

    def macs(point: Candidate) -> list[float]:
        nodes = graph(point).nodes
        integer = sum(node.macs for node in nodes if node.operator.precision.weights.kind == "int")
        return [(sum(node.macs for node in nodes) - integer) / 1e9, integer / 1e9]

    order = [(slot, spaces.slot_gene(case.space, slot)) for slot in spaces.gene_names(case.space)]

    def genes(point: Candidate) -> list[float]:
        chosen = spaces.genome(case.space, point)
        return [float(chosen.get(slot) == value) for slot, gene in order for value in gene.choices]

    found: dict[str, Callable[[Candidate], float]] = {
        "table": lambda p: case.predicted(table, p).value,
        "rows": lambda p: case.predicted(plain, p).value,
        "stacks": lambda p: case.predicted(stacks, p).value,
        **{name: partial(summed, values) for name, values in rows.items()},
        "macs": fitted(RidgeCV(np.logspace(-9, 0, 10)), macs),
        "ridge": fitted(RidgeCV(np.logspace(-3, 3, 13)), genes),
        "boosting": fitted(GradientBoostingRegressor(n_estimators=300, max_depth=3, learning_rate=0.05, random_state=0), genes),
    }
    return found


def cell_row(case: Case, table: LatencyTable, precision: str, measured: dict[str, Any], ways: dict[str, Any]) -> dict[str, Any]:
    """A row of the result, and under `rivals` the same errors of the other ways."""
    half = len(measured["stratified"])
    points = [msgspec.convert(p, Candidate) for p in (*measured["stratified"], *measured["front"])]
    times = np.array(measured["ms"])  # (networks, windows, (milliseconds, pace))
    paced, known = times[:, :, 0] * times[:, :, 1], np.array(measured["known"])
    actual = paced[:, 0]
    intervals = [case.predicted(table, p) for p in points]
    inside = [low.low <= ms <= low.high for low, ms in zip(intervals, actual, strict=True)]
    row: dict[str, Any] = {"family": case.model, "precision": precision, "n": len(points)}
    predicted = np.array([ways["table"](p) for p in points])
    row |= _errors(actual, predicted, half)
    row |= {
        "interval_coverage": float(np.mean(inside)), "interval": latency_table.error_text(table), "inside": int(sum(inside)),
        "typical_interval": 100 * latency_table.typical_error(table),
        "coverage_as_timed": float(np.mean([i.low <= ms <= i.high for i, ms in zip(intervals, times[:, 0, 0], strict=True)])),
        "noise_floor": 100 * float(np.mean(np.abs(paced[:, 1] / paced[:, 0] - 1))), "rows": len(table.rows),
        "known_floor": 100 * float(np.mean(np.abs(known[:, 1] / known[:, 0] - 1))),
        "known_change": 100 * float(np.mean(np.abs(1 / known[:, 0] - 1))),
        "pace": float(times[:, 0, 1].mean()), "mape_as_timed": _errors(times[:, 0, 0], predicted, half)["mape"],
        "profile_seconds": table.seconds, "drift": 100 * table.drift, "scale": table.scale,
        "fastest_ms": float(actual.min()), "slowest_ms": float(actual.max()),
        "rivals": {n: _errors(actual, np.array([way(p) for p in points]), half) for n, way in ways.items() if n != "table"},
    }  # fmt: skip
    return row


def _errors(actual: Any, predicted: Any, half: int) -> dict[str, float]:
    error = 100 * (predicted / actual - 1)
    return {
        "mape": float(np.abs(error).mean()), "mape_stratified": float(np.abs(error[:half]).mean()),
        "within_5": float((np.abs(error) <= 5).mean()), "within_10": float((np.abs(error) <= 10).mean()),
        "kendall_tau": float(kendalltau(predicted[:half], actual[:half]).statistic),
        "signed_error": float(error[:half].mean()), "front_signed_error": float(error[half:].mean()),
    }  # fmt: skip


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The bars, cell by cell where they are missed."""
    missed = []
    for row in rows:
        name = f"{row['family']}:{row['precision']}"
        if row["mape"] > BARS["mape"][row["precision"]]:
            missed.append(f"{name} mape {row['mape']:.2f}")
        missed += [f"{name} {key} {row[key]:.3f}" for key in ("within_5", "kendall_tau") if row[key] < BARS[key]]
        if abs(row["front_signed_error"]) > BARS["front_signed_error"]:
            missed.append(f"{name} front_signed_error {row['front_signed_error']:.2f}")
        if row["precision"] == "mixed" and row["rivals"]["macs"]["mape"] < 2 * row["mape"]:
            missed.append(f"{name} macs {row['rivals']['macs']['mape']:.2f}, less than twice the table's {row['mape']:.2f}")
    coverage = sum(row["inside"] for row in rows) / max(1, sum(row["n"] for row in rows))
    if not COVERAGE_BAR[0] <= coverage <= COVERAGE_BAR[1]:
        missed.append(f"coverage {coverage:.3f}")
    return {"bars": BARS, "coverage": coverage, "coverage_bar": COVERAGE_BAR, "missed": missed}


# ------------------------------------------------------------------------------------------------ the whole


def _kept(path: Path, fresh: bool, make: Callable[[], Any]) -> Any:
    if fresh or not path.is_file():
        write_atomic(path, json.dumps(json.loads(msgspec.json.encode(make()))).encode())
    return json.loads(path.read_text())


def run_model(
    case: Case, precisions: Sequence[str], count: int, seconds: float, fresh: bool, without: Sequence[str]
) -> list[dict[str, Any]]:
    """The rows of one model's cells; `without`: ways of timing operators that are left out."""
    began = time.monotonic()

    def said(what: str) -> None:
        print(f"{case.model}: {what}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    table = table_of(case, fresh)
    said(f"table of {len(table.rows)} rows, {latency_table.error_text(table)}, scale {table.scale:.3f}")
    of_table = digest(table)[:8]
    rows = {}
    if "isolated" not in without:
        rows["isolated"] = _kept(case.folder / f"isolated-{of_table}.json", fresh, lambda: isolated(case, table))
    if "profiler" not in without and case.backend_name == "onnxruntime":
        rows["profiler"] = _kept(case.folder / f"profiler-{of_table}.json", fresh, lambda: profiled(case, table))
    said("operators alone and profiled")
    amount = len(table.rows) + len(table.calibration)
    points = training_networks(case, table, amount)
    kept = case.folder / f"training-{amount}-{of_table}.json"
    training = _kept(kept, fresh, lambda: [ms * pace for ((ms, pace),) in measure(case, table, points, seconds / 2, windows=1)[0]])
    said(f"{len(points)} networks for regressions")
    ways, found = predictors(case, table, rows, (points, training)), []
    for precision in precisions:
        path = case.folder / f"cell-{precision}-{digest(of_table, count, seconds, SEED, KNOWN, OCTAVES)[:8]}.json"

        def make(precision: str = precision) -> dict[str, Any]:
            stratified, front = fresh_networks(case, table, precision, count)
            ms, known = measure(case, table, [*stratified, *front], seconds, precision)
            return {"stratified": stratified, "front": front, "ms": ms, "known": known}

        found.append(cell_row(case, table, precision, _kept(path, fresh, make), ways))
        said(f"{precision}: MAPE {found[-1]['mape']:.2f} %")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cells", nargs="+", metavar="MODEL:PRECISION", default=[f"{m}:{p}" for m in MODELS for p in CELLS])
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--networks", type=int, default=0, help="fresh networks of a cell; 0: 40 of small models, 20 of base ones")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of timing per network")
    parser.add_argument("--without", nargs="+", choices=("isolated", "profiler"), default=(), help="ways that take long for large models")
    parser.add_argument("--cache", type=Path, default=Path(".cache/table_accuracy"))
    parser.add_argument("--resume", action="store_true", help="the default: do not time again what has not changed")
    parser.add_argument("--fresh", action="store_true", help="time everything again")
    given = parser.parse_args()
    wanted: dict[str, list[str]] = {}
    for cell in given.cells:
        model, _, precision = cell.partition(":")
        if model not in (*MODELS, TOY) or precision not in CELLS:
            raise SystemExit(f"error: unknown cell: {cell}\n\nhint: models are {', '.join(MODELS)}; precisions {', '.join(CELLS)}")
        wanted.setdefault(model, []).append(precision)
    rows = []
    for model, precisions in wanted.items():
        case = Case(model, given.backend, given.threads, given.cache)
        count = given.networks or MODELS.get(model, (None, 0, 8))[2]
        rows += run_model(case, precisions, count, given.seconds, given.fresh, given.without)
    device = plugins.get("devices", targets.LOCAL).describe()
    versions = dict(plugins.get("backends", given.backend).versions())
    content = {
        "rows": rows,
        "summary": summary(rows),
        "backend": given.backend,
        "threads": given.threads,
        "versions": versions,
        "device": device,
    }
    print(json.dumps(content, indent=1)) if given.json else _show(content)


def _show(content: dict[str, Any]) -> None:
    for row in content["rows"]:
        print(f"{row['family']} {row['precision']}, {row['n']} networks of {row['fastest_ms']:.2f} to {row['slowest_ms']:.2f} ms:")
        print(f"  MAPE {row['mape']:.2f} %, within 5 % {row['within_5']:.2f}, τ {row['kendall_tau']:.3f}")
        print(f"  on the front {row['front_signed_error']:+.2f} %; the same networks again: {row['noise_floor']:.2f} %")
        print(f"  known networks against what they were: {row['known_floor']:.2f} % ({row['known_change']:.2f} % as timed)")
        print(f"  pace {row['pace']:.3f}, MAPE as timed {row['mape_as_timed']:.2f} %, scale {row['scale']:.3f}")
        print(f"  {row['interval_coverage']:.2f} inside {row['interval']}; as timed {row['coverage_as_timed']:.2f}")
        print("  MAPE of " + ", ".join(f"{name} {errors['mape']:.2f}" for name, errors in row["rivals"].items()))
    print(content["summary"])


if __name__ == "__main__":
    main()
