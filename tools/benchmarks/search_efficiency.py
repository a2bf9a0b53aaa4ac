"""How much a searcher must measure, on spaces whose every candidate has been scored beforehand, so that searches are replays.

    python tools/benchmarks/search_efficiency.py --json
    python tools/benchmarks/search_efficiency.py --spaces demo --searchers linas ours

Spaces: `demo` (a sub-space of the embedded vision transformer's super-network) and `minilm` (one of all-MiniLM-L6-v2's on movie reviews),
scored by tools/benchmarks/score_space.py and stored under tools/benchmarks/data; and `synthetic` (twelve layers, 49 genes, about 10^20
candidates, genes that interact), whose scores are a formula. Objectives: error on validation in percent, and the latency that the table
predicts in milliseconds, which is known beforehand (a searcher that does not use that is not helped).

Cost of a search: validation samples forwarded, divided by the size of validation. Every searcher here scores candidates on all of
validation, ablations included, so that is the number of candidates scored. The target is 99 % of LINAS's mean hypervolume at a cost of
250; `measurements_to_reach` is the cost at which a search has it, median over seeds with quartiles, 251 where it never has. Reference
points, checkpoints and budgets are constants of this file.

--variants replays `ours` with one part of it left out or set otherwise, against the same target.

Finished searches are kept under --cache, by a digest of the searchers' code and the space; --fresh forgets them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from nascompile import pareto, plugins, searchers, space as spaces
from nascompile.records import FLOAT32, INT8, Candidate, Gene, SearchSpace, digest, file_digest, write_atomic
from nascompile.searchers import Price, Problem
from nascompile.searchers.encoding import Encoding

DATA = Path(__file__).resolve().parent / "data"
BUDGET, TARGET_SHARE, SEEDS = 250, 0.99, 10
NEVER = BUDGET + 1
POPULATION = 50
"""Of LINAS as published, and of what it is compared with."""
CHECKPOINTS = (25, 50, 75, 100, 150, 200, 250)
OURS = "ours"
SEARCHERS = {"random": "random", "nsga2": "nsga2", "linas": "linas", "linas+table": "linas-table", "mip": "mip", OURS: "ehvi"}
"""As printed ▸ name of the plug-in."""
VARIANTS: dict[str, tuple[str, Any]] = {
    "batches of 8": ("ehvi.BATCH", 8),
    "batches of 50": ("ehvi.BATCH", 50),
    "begin with 12": ("ehvi.BEGIN", 12),
    "begin with 50": ("ehvi.BEGIN", 50),
    "no own effects": ("gaussian.PARTS", (0.0, 1.0, 1.0)),
    "no shared effects": ("gaussian.PARTS", (1.0, 0.0, 1.0)),
    "no joint effects": ("gaussian.PARTS", (1.0, 1.0, 0.0)),
    "only joint effects": ("gaussian.PARTS", (0.0, 0.0, 1.0)),
}
"""What is changed in `ours` ▸ constant and value."""
REFERENCES: dict[str, tuple[float, float]] = {"demo": (15.0, 1.15), "minilm": (22.0, 5.0), "synthetic": (18.0, 51.0)}
"""(error in percent, latency in ms): ten points above the largest network's error, twice the latency of uniform INT8."""


# ---------------------------------------------------------------------------------------------- spaces


class Scored:
    """A stored space: bits of every candidate, in the order of `space.enumerate_all`."""

    def __init__(self, name: str) -> None:
        self.name, path = name, DATA / f"search_{name}.npz"
        self.digest, expected = file_digest(path), json.loads((DATA / "digests.json").read_text()).get(path.name)
        if self.digest != expected:
            raise SystemExit(f"{path} is not the file of digests.json: {self.digest} instead of {expected}")
        with np.load(path, allow_pickle=False) as content:
            self.space = msgspec.json.decode(str(content["space"]), type=SearchSpace)
            self.samples, self.test_samples = (int(count) for count in content["samples"])
            self.latency, self.bits, self.test_bits = content["latency_ms"], content["validation"], content["test"]
        self.encoding = Encoding(self.space)
        self.rows = {row.tobytes(): number for number, row in enumerate(self.encoding.everything())}

    def row(self, point: Candidate) -> int:
        """Position of a candidate in the file."""
        return self.rows[self.encoding.encode([point])[0].tobytes()]

    def price(self, point: Candidate) -> float:
        """Latency in ms."""
        return float(self.latency[self.row(point)])

    def right(self, point: Candidate) -> np.ndarray[Any, Any]:
        """(samples,) bool: which of validation the candidate classifies correctly."""
        return np.unpackbits(self.bits[self.row(point)])[: self.samples].astype(bool)

    def test_error(self, point: Candidate) -> float:
        """Percent of test."""
        return 100 - 100 * float(np.unpackbits(self.test_bits[self.row(point)])[: self.test_samples].mean())


LAYERS, PAIRS = 12, 20


class Synthetic:
    """A formula in the shape of BERT-base: a sample is right while the damage of a candidate stays below its margin.

    Every gene does damage of its own, more or less so for each sample; neighbouring layers that are both thin, heads and precision of one
    attention, and twenty random pairs of genes do more, or less, than the sum of theirs.
    """

    name, samples = "synthetic", 1500

    def __init__(self) -> None:
        rng = np.random.default_rng(2311)
        order = tuple(int(layer) for layer in rng.permutation(LAYERS))
        genes = [Gene(name="depth", kind="architecture", choices=tuple(range(LAYERS // 2, LAYERS + 1)))]
        precisions = []
        for layer in range(LAYERS):
            rank = order.index(layer)
            needs = (("depth", rank + 1),) if rank >= LAYERS // 2 else ()
            genes += [
                Gene(name=f"layers.{layer}.heads", kind="architecture", choices=(6, 8, 10, 12), requires=needs),
                Gene(name=f"layers.{layer}.width", kind="architecture", choices=(1024, 2048, 3072), requires=needs),
            ]
            for part in ("attention", "mlp"):
                gene = Gene(name=f"layers.{layer}.{part}.precision", kind="precision", choices=("fp32", "int8"), requires=needs)
                precisions.append(gene)
        self.space = SearchSpace(
            family="synthetic", model_digest="", genes=(*genes, *precisions), precisions=(FLOAT32, INT8), targets=("formula",),
            layer_order=order,
        )  # fmt: skip
        self.own = rng.lognormal(np.log([[0.03], [0.035], [0.003], [0.004]]), [[0.7], [0.7], [0.9], [0.9]], (4, LAYERS))
        self.drop = 0.05 * 1.45 ** np.arange(LAYERS // 2)[::-1]
        """Damage of dropping the layer at each rank of the order's second half: the last one least."""
        self.taste = rng.normal(0, 0.6, (self.samples, 4 * LAYERS))
        self.margin = (np.sort(rng.random(self.samples)) - 0.08) / 0.12
        pairs = rng.choice(4 * LAYERS, (PAIRS, 2))
        self.pairs, self.pull = pairs, rng.normal(0.01, 0.03, PAIRS)

    digest = "3"

    def parts(self, point: Candidate) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """(how much each of (heads, width, attention, mlp) of each layer is reduced (4, layers), 0 … 1; which layers are there)."""
        reduced, there = np.zeros((4, LAYERS)), np.zeros(LAYERS, dtype=bool)
        values, precisions = dict(point.architecture), dict(point.precision[0][1])
        for layer in spaces.kept_layers(self.space, point):
            there[layer] = True
            reduced[0, layer] = ((12 - values[f"layers.{layer}.heads"]) / 6) ** 1.4
            reduced[1, layer] = ((3072 - values[f"layers.{layer}.width"]) / 2048) ** 1.4
            reduced[2, layer] = precisions[f"layers.{layer}.attention.precision"] == "int8"
            reduced[3, layer] = precisions[f"layers.{layer}.mlp.precision"] == "int8"
        return reduced, there

    def price(self, point: Candidate) -> float:
        """Latency in ms, additive in blocks."""
        values, (reduced, there) = dict(point.architecture), self.parts(point)
        total = 0.8
        for layer in np.flatnonzero(there):
            heads, width = values[f"layers.{layer}.heads"], values[f"layers.{layer}.width"]
            total += (0.4 + 1.6 * heads / 12) * (0.42 if reduced[2, layer] else 1.0)
            total += (0.2 + 3.0 * width / 3072) * (0.38 if reduced[3, layer] else 1.0)
        return total

    def right(self, point: Candidate) -> np.ndarray[Any, Any]:
        """(samples,) bool."""
        reduced, there = self.parts(point)
        damage = (1 + self.taste) @ (self.own * reduced).ravel()
        thin = (reduced[0] + reduced[1])[there]
        shared = 0.02 * float(thin[:-1] @ thin[1:]) + float(self.own[2] @ (reduced[0] * reduced[2])) * 2
        flat = reduced.ravel()
        shared += float(self.pull @ (flat[self.pairs[:, 0]] * flat[self.pairs[:, 1]]))
        dropped = LAYERS - int(there.sum())
        total = (damage + shared) * (1 + 0.1 * dropped) + float(self.drop[LAYERS // 2 - dropped :].sum())
        return np.asarray(self.margin > total)

    def test_error(self, point: Candidate) -> None:
        """There is no other data."""


def open_space(name: str) -> Any:
    """A space by name."""
    return Synthetic() if name == "synthetic" else Scored(name)


# ---------------------------------------------------------------------------------------------- one search


@dataclass(frozen=True)
class Search:
    """One finished replay."""

    errors: tuple[float, ...]
    """Of the candidates in the order they were scored."""
    latencies: tuple[float, ...]
    seconds: float
    """Of the searcher's own work."""
    test: tuple[tuple[float, float], ...]
    """(error on test, latency) of the final front, where there is a test."""


def replay(world: Any, searcher: str, seed: int, budget: int = BUDGET, population: int = POPULATION) -> Search:
    """What a searcher finds until the budget is spent, or it ends."""
    problem = Problem(world.space, 2, lambda point: Price((None, world.price(point))))
    began = time.monotonic()
    run, busy = plugins.get("searchers", searcher).start(problem, population, (), seed), 0.0
    points: list[Candidate] = []
    errors: list[float] = []
    while len(points) < budget:
        asked = run.ask()
        busy += time.monotonic() - began
        if not asked:
            break
        rows = [[100 - 100 * float(world.right(point).mean()), world.price(point)] for point in asked]
        points += asked[: budget - len(points)]
        errors += [error for error, _ in rows][: budget - len(errors)]
        began = time.monotonic()
        run.tell(asked, np.array(rows), np.zeros(len(rows)))
    latencies = [world.price(point) for point in points]
    front = pareto.front(np.array([errors, latencies]).T)
    test = [(world.test_error(points[i]), latencies[i]) for i in front]
    return Search(tuple(errors), tuple(latencies), busy, tuple((error, ms) for error, ms in test if error is not None))


def curve(found: Search, reference: tuple[float, float]) -> np.ndarray[Any, Any]:
    """Hypervolume at cost 0, 1, … as a share of the box between the reference and (0, 0)."""
    values, best = np.zeros(BUDGET + 1), np.empty((0, 2))
    for cost in range(1, BUDGET + 1):
        if cost > len(found.errors):
            values[cost] = values[cost - 1]
            continue
        best = np.concatenate([best, [[found.errors[cost - 1], found.latencies[cost - 1]]]])
        best = best[list(pareto.front(best))]
        values[cost] = pareto.hypervolume(best, reference) / (reference[0] * reference[1])
    return values


# ---------------------------------------------------------------------------------------------- all of them


KIN = {
    "linas": ("breeding", "encoding", "blocks"),
    "linas-table": ("linas", "breeding", "encoding", "blocks"),
    "mip": ("encoding", "blocks"),
    "ehvi": ("encoding", "blocks", "gaussian"),
}
"""Searcher ▸ modules beside it that its behaviour depends on."""


def code_digest(searcher: str) -> str:
    """Of what a searcher's behaviour depends on."""
    folder = Path(searchers.__file__).parent
    own = [folder / f"{name.replace('-', '_')}.py" for name in ("__init__", searcher, *KIN.get(searcher, ()))]
    return digest([file_digest(path) for path in (*own, folder.parent / "space.py")])


def finished(cache: Path, name: str, label: str, seed: int, space_digest: str) -> Path:
    """Where a search is kept."""
    searcher = SEARCHERS.get(label, SEARCHERS[OURS])
    key = digest([space_digest, code_digest(searcher), VARIANTS.get(label), BUDGET, POPULATION, seed])[:16]
    return cache / f"{name}-{label.replace(' ', '_')}-{seed}-{key}.json"


_OPEN: dict[str, Any] = {}


def _perform(job: tuple[str, str, int, str]) -> None:
    name, label, seed, path = job
    if name not in _OPEN:
        _OPEN[name] = open_space(name)
    with varied(label):
        found = replay(_OPEN[name], SEARCHERS.get(label, SEARCHERS[OURS]), seed)
    write_atomic(Path(path), msgspec.json.encode(found))


@contextlib.contextmanager
def varied(label: str) -> Iterator[None]:
    """`ours` as a variant has it, for a while."""
    if label not in VARIANTS:
        yield
        return
    (module, _, constant), value = VARIANTS[label][0].partition("."), VARIANTS[label][1]
    place = importlib.import_module(f"{searchers.__name__}.{module}")
    before = getattr(place, constant)
    setattr(place, constant, np.array(value) if isinstance(value, tuple) else value)
    try:
        yield
    finally:
        setattr(place, constant, before)


def perform(names: Sequence[str], labels: Sequence[str], seeds: int, cache: Path, jobs: int) -> dict[str, dict[str, list[Search]]]:
    """Every search, from the cache where it is there."""
    cache.mkdir(parents=True, exist_ok=True)
    paths, todo = {}, []
    for name in names:
        space_digest = open_space(name).digest
        for label in labels:
            for seed in range(seeds):
                path = finished(cache, name, label, seed, space_digest)
                paths[name, label, seed] = path
                if not path.is_file():
                    todo.append((name, label, seed, str(path)))
    if todo:
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            for done, _ in enumerate(pool.imap_unordered(_perform, todo), 1):
                print(f"\r{done} of {len(todo)} searches", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
    found: dict[str, dict[str, list[Search]]] = {}
    for (name, label, _), path in paths.items():
        found.setdefault(name, {}).setdefault(label, []).append(msgspec.json.decode(path.read_bytes(), type=Search))
    return found


def summary(name: str, found: dict[str, list[Search]]) -> dict[str, Any]:
    """A row of the result: costs to the target and hypervolumes, mean and spread over seeds."""
    reference = REFERENCES[name]
    curves = {label: np.array([curve(search, reference) for search in searches]) for label, searches in found.items()}
    row: dict[str, Any] = {"space": name, "reference": reference, "seeds": len(next(iter(found.values())))}
    row["hypervolume_curve"] = {
        label: {str(c): [round(float(v), 5) for v in (all_[:, c].mean(), all_[:, c].std(ddof=1))] for c in CHECKPOINTS}
        for label, all_ in curves.items()
    }
    row["searcher_seconds"] = {label: round(float(np.median([s.seconds for s in searches])), 2) for label, searches in found.items()}
    tests = {
        label: [pareto.hypervolume(s.test, reference) / (reference[0] * reference[1]) for s in searches if s.test]
        for label, searches in found.items()
    }
    row["hypervolume_on_test"] = {
        label: [round(float(v), 5) for v in (np.mean(t), np.std(t, ddof=1))] for label, t in tests.items() if len(t) > 1
    }
    if "linas" in curves:
        target = TARGET_SHARE * float(curves["linas"][:, BUDGET].mean())
        reach = {label: [_first(values, target) for values in all_] for label, all_ in curves.items()}
        row["target"] = target
        row["measurements_to_reach"] = {
            label: dict(zip(("median", "low", "high"), (float(np.quantile(costs, q)) for q in (0.5, 0.25, 0.75)), strict=True))
            for label, costs in reach.items()
        }
        row["per_seed"] = reach
    if {"linas", OURS} <= set(curves):
        row["checks"] = checks(row, curves)
    return row


def _first(values: np.ndarray[Any, Any], target: float) -> int:
    """The first cost at which a curve is at the target."""
    hits = np.flatnonzero(values >= target)
    return int(hits[0]) if len(hits) else NEVER


def checks(row: dict[str, Any], curves: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    """The bars: half of LINAS's own cost, 125 at most, and at no checkpoint below LINAS by more than two standard errors."""
    ours, linas = (row["measurements_to_reach"][label]["median"] for label in (OURS, "linas"))
    below = []
    for cost in CHECKPOINTS:
        a, b = curves[OURS][:, cost], curves["linas"][:, cost]
        noise = math.hypot(a.std(ddof=1), b.std(ddof=1)) / math.sqrt(len(a))
        if a.mean() < b.mean() - 2 * noise:
            below.append(cost)
    return {"share_of_linas": ours / linas, "half_of_linas": ours <= linas / 2, "at_most_125": ours <= 125, "below_linas_at": below}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--spaces", nargs="+", choices=tuple(REFERENCES), default=list(REFERENCES))
    parser.add_argument("--searchers", nargs="+", choices=tuple(SEARCHERS), default=list(SEARCHERS))
    parser.add_argument("--variants", nargs="*", choices=tuple(VARIANTS), default=[], metavar="NAME", help=", ".join(VARIANTS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cache", type=Path, default=Path(".cache/search_efficiency"))
    parser.add_argument("--resume", action="store_true", help="the default: go on with what is cached")
    parser.add_argument("--fresh", action="store_true", help="forget the cached searches of these spaces and searchers first")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    labels = [*arguments.searchers, *(arguments.variants or ())]
    if arguments.fresh:
        for name in arguments.spaces:
            for label in labels:
                for path in arguments.cache.glob(f"{name}-{label.replace(' ', '_')}-[0-9]*.json"):
                    path.unlink()
    found = perform(arguments.spaces, labels, arguments.seeds, arguments.cache, arguments.jobs)
    rows = [summary(name, searches) for name, searches in found.items()]
    if arguments.json:
        print(json.dumps({"rows": rows, "budget": BUDGET, "target_share": TARGET_SHARE}, indent=1))
        return
    for row in rows:
        print(f"\n{row['space']}: reference {row['reference']}, {row['seeds']} seeds" + f", target {row['target']:.4f}" * ("target" in row))
        for label, points in row["hypervolume_curve"].items():
            cost = row.get("measurements_to_reach", {}).get(label)
            text = f"{cost['median']:6.1f} [{cost['low']:.0f}, {cost['high']:.0f}]" if cost else ""
            print(f"  {label:18} {text:20}", "  ".join(f"{c}: {mean:.4f}±{sd:.4f}" for c, (mean, sd) in points.items()))
        for name in ("hypervolume_on_test", "searcher_seconds", "checks"):
            print(f"  {name}: {row.get(name)}")


if __name__ == "__main__":
    main()
