"""What a search has learned: how much each gene matters for accuracy and latency, and what thinning a layer would cost and save.

Accuracy is that of a model fitted to the scored candidates, judged on candidates it was not fitted to; latency is the table's, exactly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nascompile import space as spaces
from nascompile.errors import RecordError
from nascompile.progress import Progress
from nascompile.records import Candidate, Evaluation, Explanation, Front, GeneImportance, SearchSpace, Thinning, digest
from nascompile.scoring import gain, worst
from nascompile.searchers.encoding import Encoding
from nascompile.targets import label, time_unit

Array = npt.NDArray[Any]
Latencies = Callable[[Candidate], tuple[float, ...]]
"""A candidate's latency in ms on every target."""

FEWEST = 16
"""Scored candidates below which there is nothing to fit and to judge by."""
FOLDS, REPEATS = 5, 5
PRICED = 4000
"""Candidates that are priced at most for the importance for latency."""
SOLID, HINT = 0.7, 0.3
"""Out-of-sample R² from which on a model is to be relied on, and from which on it is a hint."""


def explain(
    space: SearchSpace, front: Front, scored: Sequence[Evaluation], latencies: Latencies, seed: int, progress: Progress
) -> Explanation:  # fmt: skip
    """From a search's scored candidates; RecordError if they are too few or all score the same."""
    if len(scored) < FEWEST:
        raise RecordError(f"too few scored candidates to explain anything: {len(scored)}", hint=f"--evaluations {FEWEST} or more")
    values = np.array([gain(worst(e)) for e in scored])
    if np.ptp(values) == 0:
        raise RecordError(f"all {len(scored)} scored candidates score {values[0]:g}: there is nothing to explain")
    genome = Genome.of(space)
    x = genome.rows([e.candidate for e in scored], np.random.default_rng(seed))
    models = {name: _Judged.of(make(seed), genome, x, values, seed) for name, make in MODELS.items()}
    best = max(models, key=lambda name: models[name].r2)
    model = models[best]
    points = _rms(model.importance(seed, progress))
    table = _Table(genome, latencies)
    sample = np.sort(np.random.default_rng(seed).permutation(len(x))[: max(FEWEST, PRICED // (len(genome.slots) + 1))])
    milliseconds = [_rms(column) for column in table.importance(x[sample], seed, progress)]
    base = _base(space, scored)
    return Explanation(
        front_digest=digest(front), metric=scored[0].score.metric, model=best, r2=model.r2, scored=len(scored),
        others=tuple((name, judged.r2) for name, judged in models.items() if name != best), trust=trust(model.r2),
        targets=tuple(label(t) for t in (front.target, *front.also)), unit=time_unit(front.target), base=base, genes=tuple(
            GeneImportance(gene=slot, points=float(p), ms=tuple(float(column[i]) for column in milliseconds))
            for i, (slot, p) in enumerate(zip(genome.slots, points, strict=True))
        ),
        layers=_thinnings(space, base, {e.candidate: gain(worst(e)) for e in scored}, model, latencies),
    )  # fmt: skip


def trust(r2: float) -> str:
    """What an out-of-sample R² means for a reader."""
    if r2 >= SOLID:
        return "large differences are to be relied on, small ones are not"
    return "a hint at most" if r2 >= HINT else "not to be believed: the scored candidates do not tell genes apart"


# ---------------------------------------------------------------------------------------------- genes as numbers


@dataclass(frozen=True)
class Genome:
    """Positions of the genome that have a choice, as columns of indices; an inactive one has a value too, which counts for nothing."""

    encoding: Encoding
    columns: list[int]
    """Positions in the encoding, whose others have one choice each."""

    @classmethod
    def of(cls, space: SearchSpace) -> Genome:
        encoding = Encoding(space)
        return cls(encoding, [n for n, size in enumerate(encoding.sizes) if size > 1])

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self.encoding.slots[column] for column in self.columns)

    def rows(self, points: Sequence[Candidate], rng: np.random.Generator) -> Array:
        """(n, columns) indices; what is inactive in a candidate is drawn, so that a change of depth finds something there."""
        x = self.encoding.encode(tuple(points))[:, self.columns]
        drawn = np.stack([rng.integers(0, size, len(x)) for size in self.encoding.sizes[self.columns]], axis=1)
        return np.where(self.active(x), x, drawn)

    def whole(self, x: Array) -> Array:
        """(n, positions): with the positions that have one choice."""
        found = np.zeros((len(x), len(self.encoding.sizes)), dtype=np.int64)
        found[:, self.columns] = x
        return found

    def active(self, x: Array) -> Array:
        """(n, columns) whether each value has any effect."""
        return self.encoding.active(self.whole(x))[:, self.columns]

    def one_hot(self, x: Array) -> Array:
        """(n, all choices of the columns): 1 where a position is active and has that choice."""
        return self.encoding.one_hot(self.whole(x))[:, np.repeat(self.encoding.sizes > 1, self.encoding.sizes)]

    def masked(self, x: Array) -> Array:
        """(n, columns): the index, -1 where it is inactive."""
        return np.where(self.active(x), x, -1).astype(float)

    def candidates(self, x: Array) -> list[Candidate]:
        """What the rows stand for."""
        return [self.encoding.decode(row) for row in self.whole(x)]


def _ridge(seed: int) -> tuple[Any, str]:
    from sklearn.linear_model import RidgeCV

    return RidgeCV(alphas=np.logspace(-3, 3, 13)), "one_hot"


def _forest(seed: int) -> tuple[Any, str]:
    from sklearn.ensemble import RandomForestRegressor

    return RandomForestRegressor(n_estimators=60, min_samples_leaf=2, max_features=0.5, random_state=seed, n_jobs=1), "masked"


MODELS = {"ridge": _ridge, "forest": _forest}
"""Of accuracy from genes: one that adds up what each value is worth, one that sees what they do together."""


@dataclass(frozen=True)
class _Judged:
    """A model of accuracy, fitted to all folds but one, for each of them."""

    genome: Genome
    x: Array
    values: Array
    folds: tuple[tuple[Any, Array], ...]
    """(model, rows it has not seen)."""
    r2: float
    """Over all rows, each predicted by the model that has not seen it."""

    @classmethod
    def of(cls, made: tuple[Any, str], genome: Genome, x: Array, values: Array, seed: int) -> _Judged:
        from sklearn.base import clone
        from sklearn.model_selection import KFold
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import FunctionTransformer

        regressor, features = made
        folds, predicted = [], np.empty(len(x))
        for known, left_out in KFold(FOLDS, shuffle=True, random_state=seed).split(x):
            model = make_pipeline(FunctionTransformer(getattr(genome, features)), clone(regressor))
            model.fit(x[known], values[known])
            predicted[left_out] = model.predict(x[left_out])
            folds.append((model, left_out))
        r2 = 1 - float(np.square(values - predicted).sum() / np.square(values - values.mean()).sum())
        return cls(genome, x, values, tuple(folds), r2)

    def importance(self, seed: int, progress: Progress) -> Array:
        """(slots,) mean growth of the squared error on rows not seen where a gene's values are shuffled among them."""
        from sklearn.inspection import permutation_importance

        total, weights = np.zeros(len(self.genome.slots)), 0
        for number, (model, rows) in enumerate(self.folds, 1):
            found = permutation_importance(
                model, self.x[rows], self.values[rows], scoring="neg_mean_squared_error", n_repeats=REPEATS, random_state=seed
            )
            total, weights = total + len(rows) * found.importances_mean, weights + len(rows)
            progress.step("genes shuffled for accuracy", number, len(self.folds))
        return total / weights

    def loss(self, base: Candidate, other: Candidate) -> tuple[float, float]:
        """(points that the other candidate loses against the base, standard deviation over the folds' models)."""
        rows = self.genome.rows((base, other), np.random.default_rng(0))
        found = [float(np.subtract(*model.predict(rows))) for model, _ in self.folds]
        return float(np.mean(found)), float(np.std(found, ddof=1))


class _Table:
    """Latency as an estimator that is always right."""

    def __init__(self, genome: Genome, latencies: Latencies) -> None:
        self.genome, self.latencies = genome, latencies
        self.known: dict[Candidate, tuple[float, ...]] = {}

    def fit(self, x: Array, y: Array) -> _Table:
        return self

    def predict(self, x: Array) -> Array:
        """(n, targets) ms."""
        points = self.genome.candidates(x)
        for point in points:
            if point not in self.known:
                self.known[point] = self.latencies(point)
        return np.array([self.known[point] for point in points])

    def importance(self, x: Array, seed: int, progress: Progress) -> list[Array]:
        """Per target (slots,): mean squared change where a gene's values are shuffled among the rows."""
        from sklearn.inspection import permutation_importance

        truth = self.predict(x)
        repeats = max(1, min(REPEATS, PRICED // (len(x) * len(self.genome.slots))))
        total, shuffled = 1 + repeats * len(self.genome.slots), itertools.count(1)  # sklearn begins with rows as they are

        def changes(model: _Table, rows: Array, y: Array) -> dict[str, float]:
            squares = np.square(model.predict(rows) - y).mean(axis=0)
            progress.step("genes shuffled for latency", next(shuffled), total)
            return {str(target): -float(value) for target, value in enumerate(squares)}

        found = permutation_importance(self, x, truth, scoring=changes, n_repeats=repeats, random_state=seed)
        return [found[str(target)].importances_mean for target in range(truth.shape[1])]


def _rms(squares: Array) -> Array:
    """Root of what may be slightly below zero where there is nothing."""
    return np.sqrt(np.maximum(squares, 0.0))


# ---------------------------------------------------------------------------------------------- layers


def _base(space: SearchSpace, scored: Sequence[Evaluation]) -> Candidate:
    """The whole network as everything quantizes it, or, where that was not scored, the largest that was."""
    whole = spaces.uniform(space)
    known = [e.candidate for e in scored]
    return whole if whole in known else max(scored, key=lambda e: (e.macs, gain(worst(e)), e.candidate.id)).candidate


def _thinnings(
    space: SearchSpace, base: Candidate, known: dict[Candidate, float], model: _Judged, latencies: Latencies
) -> tuple[Thinning, ...]:
    """Every layer of the base at its thinnest, the others as they are; then fewer layers."""
    values = dict(base.architecture)
    genes = {gene.name: gene for gene in space.genes if gene.kind == "architecture"}
    changes: list[tuple[int, dict[str, int]]] = []
    for layer in spaces.kept_layers(space, base):
        own = {name: int(genes[name].choices[0]) for name in values if name.startswith(f"layers.{layer}.")}
        changes.append((layer, {name: least for name, least in own.items() if least < values[name]}))
    if "depth" in genes:
        changes += [(-1, {"depth": int(depth)}) for depth in reversed(genes["depth"].choices) if int(depth) < values["depth"]]
    return tuple(_thinning(space, base, layer, change, known, model, latencies) for layer, change in changes if change)


def _thinning(
    space: SearchSpace, base: Candidate, layer: int, change: dict[str, int], known: dict[Candidate, float], model: _Judged,
    latencies: Latencies,
) -> Thinning:  # fmt: skip
    before = spaces.genome(space, base)
    other = spaces.candidate(space, {**before, **change})
    both = base in known and other in known
    points, spread = (known[base] - known[other], math.nan) if both else model.loss(base, other)
    parts = [f"{name.removeprefix(f'layers.{layer}.')} {before[name]} to {value}" for name, value in change.items()]
    if layer < 0:
        gone = [str(i + 1) for i in sorted(set(spaces.kept_layers(space, base)) - set(spaces.kept_layers(space, other)))]
        parts.append(f"without layer{'s' * (len(gone) > 1)} {', '.join(gone)}")
    saved = tuple(a - b for a, b in zip(latencies(base), latencies(other), strict=True))
    return Thinning(
        layer=layer, change=", ".join(parts), points=points, spread=None if both else spread, ms=saved,
        kind="scored" if both else "predicted",
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- for a terminal


def lines(found: Explanation) -> list[str]:
    """The explanation as text."""
    names = found.targets if len(found.targets) > 1 else ("",)
    on = [f"{found.unit} on {name}" if name else found.unit for name in names]
    text = [headline(found), "", f"Genes, by what {found.metric} varies with them (root mean square; latency is the table's, exactly):"]
    genes = sorted(found.genes, key=lambda g: (-g.points, -sum(g.ms), g.gene))
    text += _aligned(("points", *on, "gene"), [(f"{g.points:.3f}", *(f"{ms:.3f}" for ms in g.ms), g.gene) for g in genes])
    if found.layers:
        text += ["", f"Thinning one layer of {found.base.id}, or leaving layers out:"]
        rows = []
        for t in sorted(found.layers, key=lambda t: (t.layer < 0, t.layer, -sum(t.ms))):
            loss = f"{t.points:+.2f}" + (f" ± {t.spread:.2f}" if t.spread is not None else "")
            rows.append((loss, *(f"{ms:.3f}" for ms in t.ms), t.kind, f"layer {t.layer + 1}: {t.change}" if t.layer >= 0 else t.change))
        text += _aligned(("points lost", *(f"{name} saved" for name in on), "", ""), rows)
    return text


def headline(found: Explanation) -> str:
    """Which model, and whether to believe it."""
    others = "".join(f", {name} {r2:.2f}" for name, r2 in found.others)
    return (
        f"{found.model} model of {found.metric} from {found.scored} scored candidates: R² {found.r2:.2f} on candidates it was not fitted to"
        f"{others}; {found.trust}"
    )


def _aligned(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns of numbers to the right, words to the left."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    numbers = len(header) - 1 if header[-1] == "gene" else len(header) - 2
    sides = [str.rjust if i < numbers else str.ljust for i in range(len(widths))]
    return [
        "  ".join(side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)).rstrip() for row in (header, *rows)
    ]
