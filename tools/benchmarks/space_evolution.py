"""What evolution of the search space is worth under tight budgets: searches replayed with it and without, on spaces whose scores are known.

    python tools/benchmarks/space_evolution.py --json
    python tools/benchmarks/space_evolution.py --worlds fine --searchers random nsga2 linas --shares 0.05

Worlds: `demo`, `minilm` and `synthetic` of search_efficiency.py, and `fine`: the synthetic one with six choices of heads and six of width
in every layer, about 10^26 candidates, because windows can do little where a gene has two choices. Budgets: the latency that a share of all
candidates (of 20,000 random ones where they are too many) meets, 1 percent unless --shares says other. Questions: `front` (error and
latency within the budget: hypervolume), `accuracy` (error alone). Cost of a search is the number of candidates scored; what is over the
budget is not scored and costs nothing.

`to_99` is the cost at which a search has 99 % of the best hypervolume, or of the best accuracy, that there is within the budget, median
over seeds with quartiles; 97 where it never has. The best is that of all candidates; in the synthetic worlds, of all these replays.
`share` is what searches have of the best, mean over seeds and standard deviation, `ended` how many a search scored before it found nothing
within the budget 25 times in a row.

Finished searches are kept under --cache, by a digest of the code and the world; --seconds ends early, and a later call goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import search_efficiency as known

from nascompile import pareto, plugins, space as spaces
from nascompile.records import Candidate, digest, file_digest, write_atomic
from nascompile.search import IDLE_ROUNDS, UNKNOWN
from nascompile.searchers import Price, Problem, evolution
from nascompile.searchers.evolution import Evolving

BUDGET, POPULATION, SEEDS = 96, 16, 10
"""Candidates scored and asked for at a time, as in the default settings."""
BATCHES = {"linas": 48}
"""Searchers that take other populations: LINAS as published takes 50."""
NEVER = BUDGET + 1
CHECKPOINTS = (24, 48, 96)
TARGET = 0.99
SHARE = 0.01
"""Part of the candidates that a budget leaves."""
QUESTIONS = {"front": 2, "accuracy": 1}
"""Question ▸ objectives."""
SEARCHERS = ("random", "nsga2", "ehvi", "linas")
"""LINAS, half a minute a search, only where it is asked for."""
DRAWN = 20_000


class Fine(known.Synthetic):
    """The formula on more choices."""

    name, digest = "fine", f"{known.Synthetic.digest}-fine-1"

    def __init__(self) -> None:
        super().__init__()
        more = {"heads": (2, 4, 6, 8, 10, 12), "width": (512, 1024, 1536, 2048, 2560, 3072)}
        genes = (msgspec.structs.replace(gene, choices=more.get(gene.name.rpartition(".")[2], gene.choices)) for gene in self.space.genes)
        self.space = msgspec.structs.replace(self.space, genes=tuple(genes))


WORLDS = ("demo", "minilm", "synthetic", "fine")
WORST = 50.0
"""Error in percent from which on a candidate is worth nothing; the budget is the other side of the box."""


class World:
    """A space with all that is known of it, each candidate's price and error looked up once."""

    def __init__(self, name: str) -> None:
        self.name, self.inner = name, Fine() if name == "fine" else known.open_space(name)
        self.space, self.stored = self.inner.space, hasattr(self.inner, "latency")
        self.latencies: dict[Candidate, float] = {}
        self.errors: dict[Candidate, float] = {}

    def price(self, point: Candidate) -> float:
        """Latency in ms."""
        if point not in self.latencies:
            self.latencies[point] = self.inner.price(point)
        return self.latencies[point]

    def error(self, point: Candidate) -> float:
        """Percent of validation."""
        if point not in self.errors:
            self.errors[point] = 100 - 100 * float(self.inner.right(point).mean())
        return self.errors[point]

    @cache  # noqa: B019 - worlds live as long as the process
    def bound(self, share: float) -> float:
        """The latency in ms that such a share of the candidates meets."""
        if self.stored:
            return float(np.quantile(self.inner.latency, share))
        rng = np.random.default_rng(0)
        return float(np.quantile([self.inner.price(spaces.sample(self.space, rng)) for _ in range(DRAWN)], share))

    def best(self, question: str, share: float) -> float | None:
        """The most that there is within a budget; None where there are too many candidates to know."""
        if not self.stored:
            return None
        bound, samples = self.bound(share), self.inner.samples
        errors = 100 - 100 * np.unpackbits(self.inner.bits, axis=1)[:, :samples].mean(axis=1)
        fine = self.inner.latency <= bound
        return worth(question, errors[fine], self.inner.latency[fine], bound)


@cache
def world(name: str) -> World:
    """A world by name, opened once."""
    return World(name)


def worth(question: str, errors: Any, latencies: Any, bound: float) -> float:
    """Of scored candidates: the best accuracy in percent, or the hypervolume as a share of the box down to zero."""
    if not len(errors):
        return 0.0
    if question == "accuracy":
        return 100 - float(np.min(errors))
    corner = (WORST, bound * (1 + 1e-9))
    return float(pareto.hypervolume(np.column_stack([errors, latencies]), corner)) / (corner[0] * corner[1])


# ---------------------------------------------------------------------------------------------- one search


def replay(name: str, searcher: str, evolving: bool, question: str, share: float, seed: int, budget: int = BUDGET) -> known.Search:
    """What a searcher finds within the budget, as the search stage drives it."""
    there, count = world(name), QUESTIONS[question]
    bound, plugin = there.bound(share), plugins.get("searchers", searcher)

    def price(point: Candidate) -> Price:
        ms = there.price(point)
        return Price((None, ms)[:count], max(0.0, ms / bound - 1))

    began = time.monotonic()
    problem = Problem(there.space, count, price, bounded=True)
    run = (Evolving(plugin) if evolving else plugin).start(problem, BATCHES.get(searcher, POPULATION), (), seed)
    found: dict[Candidate, tuple[float, float]] = {}
    idle = 0
    while len(found) < budget and idle < IDLE_ROUNDS:
        points = run.ask()
        if not points:
            break
        overs = [price(point).over for point in points]
        rows = [(UNKNOWN if over else there.error(point), there.price(point)) for point, over in zip(points, overs, strict=True)]
        new = [(point, row) for point, row, over in zip(points, rows, overs, strict=True) if not over][: budget - len(found)]
        found.update(new)
        idle = 0 if new else idle + 1
        run.tell(points, np.array(rows)[:, :count], np.array(overs))
    return known.Search(tuple(e for e, _ in found.values()), tuple(ms for _, ms in found.values()), time.monotonic() - began, ())


def curve(question: str, bound: float, search: known.Search) -> np.ndarray[Any, Any]:
    """What a search had at costs 0, 1, … of the question's measure."""
    values = np.zeros(BUDGET + 1)
    for cost in range(1, BUDGET + 1):
        end = min(cost, len(search.errors))
        same = cost > len(search.errors)
        values[cost] = values[cost - 1] if same else worth(question, search.errors[:end], search.latencies[:end], bound)
    return values


# ---------------------------------------------------------------------------------------------- all of them


Key = tuple[str, str, float, str, bool, int]
"""(world, question, share, searcher, with evolution, seed)."""


def place(folder: Path, key: Key) -> Path:
    """Where a search is kept."""
    name, question, share, searcher, evolving, seed = key
    code = [known.code_digest(searcher), file_digest(Path(evolution.__file__)) if evolving else ""]
    constants = [BUDGET, BATCHES.get(searcher, POPULATION), DRAWN, share]
    name_digest = digest([world(name).inner.digest, code, constants, question, seed])[:16]
    return folder / f"{name}-{question}-{100 * share:g}-{searcher}-{'with' if evolving else 'without'}-{seed}-{name_digest}.json"


def perform(keys: Sequence[Key], folder: Path, seconds: float) -> dict[Key, known.Search]:
    """Every search, from the cache where it is there; SystemExit when the time is up."""
    folder.mkdir(parents=True, exist_ok=True)
    found, began = {}, time.monotonic()
    for number, key in enumerate(keys):
        path = place(folder, key)
        if not path.is_file():
            if time.monotonic() - began > seconds:
                raise SystemExit(f"{number} of {len(keys)} searches are there; the same command goes on")
            name, question, share, searcher, evolving, seed = key
            write_atomic(path, msgspec.json.encode(replay(name, searcher, evolving, question, share, seed, BUDGET)))
            print(f"\r{number + 1} of {len(keys)} searches", end="", file=sys.stderr, flush=True)
        found[key] = msgspec.json.decode(path.read_bytes(), type=known.Search)
    return found


def summary(name: str, question: str, share: float, found: dict[tuple[str, bool], list[known.Search]]) -> dict[str, Any]:
    """A row of the result: one question in one world."""
    there = world(name)
    bound = there.bound(share)
    curves = {key: np.array([curve(question, bound, search) for search in searches]) for key, searches in found.items()}
    best = there.best(question, share)
    best = max(float(values.max()) for values in curves.values()) if best is None else best
    row: dict[str, Any] = {"world": name, "question": question, "share_legal": share, "latency_ms": bound, "best": best, "searchers": {}}
    for (searcher, evolving), values in curves.items():
        costs, shares = [_first(each, TARGET * best) for each in values], {c: values[:, c] / best for c in CHECKPOINTS}
        row["searchers"].setdefault(searcher, {})["with" if evolving else "without"] = {
            "to_99": [float(np.quantile(costs, q)) for q in (0.5, 0.25, 0.75)],
            "share": {str(c): [round(float(v), 5) for v in (each.mean(), each.std(ddof=1))] for c, each in shares.items()},
            "ended": float(np.median([len(search.errors) for search in found[searcher, evolving]])),
            "seconds": round(float(np.median([search.seconds for search in found[searcher, evolving]])), 2),
            "per_seed": costs,
        }  # fmt: skip
    for each in row["searchers"].values():
        if len(each) == 2:
            each["verdict"] = verdict(each["with"]["per_seed"], each["without"]["per_seed"])
    return row


def _first(values: np.ndarray[Any, Any], target: float) -> int:
    """The first cost at which a curve is at the target."""
    hits = np.flatnonzero(values >= target)
    return int(hits[0]) if len(hits) else NEVER


def verdict(with_it: Sequence[int], without: Sequence[int]) -> str:
    """Of costs by seed: `helps` or `hurts` where a rank test sees a difference (Mann-Whitney, two-sided, 5 %), else `same`."""
    from scipy.stats import mannwhitneyu

    if len({*with_it, *without}) == 1:
        return "same"
    test = mannwhitneyu(with_it, without)
    if test.pvalue >= 0.05:
        return "same"
    return "helps" if np.mean(with_it) < np.mean(without) else "hurts"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    parser.add_argument("--searchers", nargs="+", choices=SEARCHERS, default=list(SEARCHERS[:-1]))
    parser.add_argument("--questions", nargs="+", choices=tuple(QUESTIONS), default=list(QUESTIONS))
    parser.add_argument("--shares", nargs="+", type=float, default=[SHARE])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no search is begun after so many")
    parser.add_argument("--cache", type=Path, default=Path(".cache/space_evolution"))
    a = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    groups = [(name, question, share) for name in a.worlds for question in a.questions for share in a.shares]
    ways = [(searcher, evolving) for searcher in a.searchers for evolving in (False, True)]
    found = perform([(*group, *way, seed) for group in groups for way in ways for seed in range(a.seeds)], a.cache, a.seconds)
    rows = [summary(*group, {way: [found[*group, *way, seed] for seed in range(a.seeds)] for way in ways}) for group in groups]
    if a.json:
        print(json.dumps({"rows": rows, "budget": BUDGET, "target": TARGET, "seeds": a.seeds}, indent=1))
        return
    for row in rows:
        print(f"\n{row['world']}, {row['question']}, {row['share_legal']:.0%} within {row['latency_ms']:.4g} ms, best {row['best']:.4f}")
        for searcher, each in row["searchers"].items():
            for way in ("without", "with"):
                cost, shares = each[way]["to_99"], each[way]["share"]
                text = "  ".join(f"{c}: {mean:.4f}±{sd:.4f}" for c, (mean, sd) in shares.items())
                last = f"ended {each[way]['ended']:g}, {each[way]['seconds']:.1f} s" + f", {each['verdict']}" * (way == "with")
                print(f"  {searcher:8} {way:8} {cost[0]:5.1f} [{cost[1]:.0f}, {cost[2]:.0f}]  {text}  {last}")


if __name__ == "__main__":
    main()
