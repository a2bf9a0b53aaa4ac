"""Evolution of the search space around any searcher, after MCUFormer (Liang et al. 2023, arXiv 2310.16898).

A searcher proposes candidates of a part of the space: every architecture gene has a window, a contiguous part of its choices. Windows move
to where candidates are better and more of them are within the budgets, each by what straight lines say: how good scored candidates are and
how many drawn ones are legal, over the gene's values. Where windows have moved the searcher begins anew in them, with what is known of
candidates there; what was asked for before is never asked for again. Windows that have settled and bring nothing better are widened, until
they are the space.

Whether a candidate is legal costs nothing to know: before anything is scored, windows move by that alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from nascompile.records import Candidate, SearchSpace
from nascompile.searchers import Informed, Problem, Run, Searcher
from nascompile.searchers.encoding import Array, Encoding

WINDOW = 0.6
"""Part of a gene's choices that its window has; at least two of them."""
PERIOD = 16
"""Candidates newly scored after which windows are looked at."""
DRAWN, REMEMBERED = 256, 2048
"""Candidates drawn in the windows each time to see how many are legal, and how many of the last ones a line is fitted to."""
SHARE = 0.1
"""Legal part of what is in the windows from which on scoring begins. Where it is less, so many that are nearest to the budgets count."""
CERTAIN = 2.0
"""Standard errors by which a tendency differs from none if a window moves."""
AT_ONCE = 4
"""One window in so many moves at a time: the others see what that changed."""
ROUNDS = 64
"""Looks at the windows after which none moves any more."""
INFORMED = 8
"""Scored candidates in the windows from which on a searcher is told of all of them instead of beginning with the best."""


# ---------------------------------------------------------------------------------------------- windows


@dataclass(frozen=True)
class Windows:
    """Of every position of the genome the choices from `low` on, `width` of them; precision genes have all of theirs."""

    encoding: Encoding
    low: tuple[int, ...]
    width: tuple[int, ...]

    @classmethod
    def middle(cls, encoding: Encoding) -> Windows:
        """What a search begins with."""
        low, width = [], []
        for gene in encoding.genes:
            size = len(gene.choices)
            width.append(min(size, max(2, round(WINDOW * size))) if gene.kind == "architecture" else size)
            low.append((size - width[-1]) // 2)
        return cls(encoding, tuple(low), tuple(width))

    @property
    def narrow(self) -> tuple[int, ...]:
        """Positions whose window is not all of the gene's choices."""
        return tuple(n for n, size in enumerate(self.encoding.sizes) if self.width[n] < size)

    def can_move(self, position: int, step: int) -> bool:
        """Whether there are choices on that side."""
        return 0 <= self.low[position] + step <= int(self.encoding.sizes[position]) - self.width[position]

    def moved(self, steps: Mapping[int, int]) -> Windows:
        """By position, choices up or down."""
        return Windows(self.encoding, tuple(low + steps.get(n, 0) for n, low in enumerate(self.low)), self.width)

    def widened(self) -> Windows:
        """By one choice on either side, where there is one."""
        low = tuple(max(0, n - 1) for n in self.low)
        ends = (min(n + width + 1, int(size)) for n, width, size in zip(self.low, self.width, self.encoding.sizes, strict=True))
        return Windows(self.encoding, low, tuple(end - n for n, end in zip(low, ends, strict=True)))

    def space(self) -> SearchSpace:
        """The space with these choices alone, without genes that none of them activates."""
        genes = {gene.name: gene for gene in self.encoding.space.genes}
        for slot, low, width in zip(self.encoding.slots, self.low, self.width, strict=True):
            if slot in genes and genes[slot].kind == "architecture":
                genes[slot] = msgspec.structs.replace(genes[slot], choices=genes[slot].choices[low : low + width])
        kept = (gene for gene in genes.values() if all(int(genes[name].choices[-1]) >= least for name, least in gene.requires))
        return msgspec.structs.replace(self.encoding.space, genes=tuple(kept))

    def draw(self, rng: np.random.Generator, count: int) -> Array:
        """Random candidates (count, positions) in them, some of them equal; of each a part of the precisions, also random, is the cheapest.

        A searcher soon knows which precisions are cheap: an architecture is not out of the budgets because most draws of precisions are.
        """
        rows = rng.integers(self.low, np.add(self.low, self.width), size=(count, len(self.low)))
        cheapest = (rng.random(rows.shape) < rng.random((count, 1))) & np.array([gene.kind == "precision" for gene in self.encoding.genes])
        return self.encoding.canonical(np.where(cheapest, self.encoding.sizes - 1, rows))

    def hold(self, rows: Array) -> Array:
        """(n,) bool: which candidates are in them; what is inactive may be anywhere."""
        inside = (rows >= self.low) & (rows < np.add(self.low, self.width))
        return np.asarray((inside | ~self.encoding.active(rows)).all(axis=1))

    def __str__(self) -> str:
        """Their choices, of those that are narrow, those of layers on average: `depth 6–9, heads 4–7`."""
        ends: dict[str, list[tuple[int, int]]] = {}
        for n in self.narrow:
            choices = self.encoding.genes[n].choices[self.low[n] : self.low[n] + self.width[n]]
            ends.setdefault(self.encoding.slots[n].rpartition(".")[2], []).append((int(choices[0]), int(choices[-1])))
        means = {kind: np.mean(pairs, axis=0) for kind, pairs in ends.items()}
        return ", ".join(f"{kind} {low:.0f}–{high:.0f}" for kind, (low, high) in means.items()) or "all of it"


def tendency(levels: Array, active: Array, values: Array) -> tuple[Array, Array]:
    """(Slopes of straight lines through values (n,) over each position's levels (n, positions), where it is active; how many those are).

    In standard deviations of both, so that a slope's standard error is about 1 / √n; 0 where nothing varies.
    """
    counts = active.sum(axis=0)
    least = np.maximum(counts, 1)
    x = np.where(active, levels - (levels * active).sum(axis=0) / least, 0.0)
    y = np.where(active, values[:, None] - (values[:, None] * active).sum(axis=0) / least, 0.0)
    spread = np.sqrt((x**2).sum(axis=0) * (y**2).sum(axis=0))
    return (x * y).sum(axis=0) / np.where(spread > 1e-12, spread, np.inf), counts


def beaten(objectives: Array, violations: Array) -> Array:
    """(n,) share of the candidates that are better than each: nowhere worse and somewhere better, or less in violation of a budget."""
    found, over = np.zeros(len(objectives)), np.maximum(violations, 0.0)
    for number, values in enumerate(objectives):
        dominating = (objectives <= values).all(axis=1) & (objectives < values).any(axis=1)
        found[number] = np.where(over == over[number], dominating, over < over[number]).mean()
    return found


# ---------------------------------------------------------------------------------------------- the search


class EvolvingRun:
    def __init__(
        self, searcher: Searcher, problem: Problem, population: int, first: tuple[Candidate, ...], seed: int, note: Callable[[str], None]
    ) -> None:  # fmt: skip
        self.searcher, self.problem, self.population, self.seed, self.note = searcher, problem, population, seed, note
        self.encoding, self.rng, self.id = Encoding(problem.space), np.random.default_rng(seed), problem.space.id
        self.windows = Windows.middle(self.encoding)
        self.given = tuple(dict.fromkeys(first))
        self.begin = self.given[:2] if self.windows.narrow else ()
        """Asked for before anything else, wherever they are."""
        self.known: dict[Candidate, tuple[Array, float]] = {}
        """What was told of each candidate: objectives, violation."""
        width = len(self.encoding.sizes)
        self.rows, self.values, self.violations = np.empty((0, width), np.int64), np.empty((0, problem.objectives)), np.empty(0)
        """Of those that were scored."""
        self.drawn, self.overs = np.empty((0, width), np.int64), np.empty(0)
        """Candidates drawn last, and their excess over the budgets of costs."""
        self.since, self.looks, self.starts = 0, 0, 0
        self.asked: tuple[Candidate, ...] = ()
        """The searcher's last proposals, as it made them; some may be known."""
        self._to_the_budgets()
        self._start()

    # ------------------------------------------------------------------------------------------ ask and tell

    def ask(self) -> tuple[Candidate, ...]:
        if self.begin:
            points, self.begin = self.begin, ()
            return points
        while True:
            self.asked = self.run.ask()
            if new := tuple(point for point in map(self._of_the_space, self.asked) if point not in self.known):
                return new
            if self.asked:
                self._pass_on()
            elif not self.windows.narrow:
                return ()
            else:
                self._go_on_in(self.windows.widened(), "all of the windows was seen")

    def tell(self, points: tuple[Candidate, ...], objectives: Any, violations: Any) -> None:
        values, over = np.asarray(objectives, dtype=float), np.asarray(violations, dtype=float)
        self.known.update((point, (values[n], float(over[n]))) for n, point in enumerate(points))
        scored = self._scored(points)
        self.rows = np.concatenate([self.rows, self.encoding.encode(points)[scored]])
        self.values, self.violations = np.concatenate([self.values, values[scored]]), np.concatenate([self.violations, over[scored]])
        self.since += int(scored.sum())
        if self.asked:
            self._pass_on()
        if self.since >= PERIOD and self.windows.narrow:
            self._look()

    def _pass_on(self) -> None:
        """Tells the searcher of all it asked for."""
        asked, self.asked = self.asked, ()
        self.run.tell(asked, *self._told([self._of_the_space(point) for point in asked]))

    def _told(self, points: Sequence[Candidate]) -> tuple[Array, Array]:
        """(objectives (n, m), violations (n,)) of known candidates."""
        pairs = [self.known[point] for point in points]
        return np.array([values for values, _ in pairs]).reshape(-1, self.problem.objectives), np.array([over for _, over in pairs])

    def _scored(self, points: Sequence[Candidate]) -> Array:
        """(n,) bool: which have a score, which nothing over a cost's budget has."""
        return np.array([self.problem.price(point).over == 0 for point in points], dtype=bool)

    # ------------------------------------------------------------------------------------------ the searcher within

    def _start(self) -> None:
        """The searcher in the windows, with what is known of candidates there."""
        problem = self.problem
        if self.windows.narrow:
            problem = Problem(
                self.windows.space(), problem.objectives, lambda point: self.problem.price(self._of_the_space(point)), problem.bounded
            )
        self.inside = problem.space.id
        known, given = self._held(tuple(self.known)), self._held(self.given)
        scored = [point for point, has in zip(known, self._scored(known), strict=True) if has]
        best = [scored[n] for n in np.argsort(beaten(*self._told(scored)), kind="stable")]
        seed = int(np.random.default_rng([self.seed, self.starts]).integers(2**31)) if self.starts else self.seed
        self.starts += 1
        first = dict.fromkeys((*best, *given))
        self.run: Run = self.searcher.start(problem, self.population, tuple(map(self._of_the_windows, first)), seed)
        if isinstance(self.run, Informed) and len(scored) >= INFORMED:
            self.run.know(tuple(map(self._of_the_windows, known)), *self._told(known))

    def _held(self, points: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
        """Those in the windows."""
        return tuple(point for point, held in zip(points, self.windows.hold(self.encoding.encode(points)), strict=True) if held)

    def _of_the_space(self, point: Candidate) -> Candidate:
        return msgspec.structs.replace(point, space=self.id)

    def _of_the_windows(self, point: Candidate) -> Candidate:
        return msgspec.structs.replace(point, space=self.inside)

    # ------------------------------------------------------------------------------------------ evolution

    def _look(self) -> None:
        """Moves the windows, or widens them where they have settled and what was scored since the last look is no better."""
        newest, self.since = self.since, 0
        moves = self._moves(self._legal()) if self.looks < ROUNDS else {}
        self.looks += 1
        if moves:
            self._go_on_in(self.windows.moved(moves), f"{len(moves)} moved")
        elif (beaten(self.values, self.violations)[-newest:] > 0).all():
            self._go_on_in(self.windows.widened(), "nothing better in them")

    def _go_on_in(self, windows: Windows, why: str) -> None:
        self.windows = windows
        self.note(f"windows of the space ({why}): {windows}")
        self._start()

    def _to_the_budgets(self) -> None:
        """Moves the windows until enough of what is in them is legal, or they go no further."""
        stalled = 0
        for _ in range(ROUNDS):
            share = self._legal()
            if share >= SHARE or stalled * DRAWN >= REMEMBERED or not self.windows.narrow:
                break
            moves = self._moves(share)
            stalled = 0 if moves else stalled + 1
            self.windows = self.windows.moved(moves)
        if self.windows.narrow:
            self.note(f"windows of the space ({share:.0%} of what was drawn in them within the budgets): {self.windows}")

    def _legal(self) -> float:
        """Part of the candidates in the windows that keeps all budgets of costs, of some that are drawn."""
        if not self.problem.bounded or not self.windows.narrow:
            return 1.0
        rows = self.windows.draw(self.rng, DRAWN)
        overs = np.array([self.problem.price(self.encoding.decode(row)).over for row in rows])
        self.drawn, self.overs = np.concatenate([self.drawn, rows])[-REMEMBERED:], np.concatenate([self.overs, overs])[-REMEMBERED:]
        return float((overs <= 0).mean())

    def _moves(self, share: float) -> dict[int, int]:
        """Position ▸ 1 or -1 of the windows that move, the clearest tendencies first.

        A tendency is a weighted sum: the fewer candidates are legal, the more legality counts, and the less how good scored ones are.
        """
        good, scored = tendency(self.rows, self.encoding.active(self.rows), -beaten(self.values, self.violations))
        bound = max(0.0, float(np.quantile(self.overs[-DRAWN:], SHARE))) if len(self.overs) else 0.0
        legal, drawn = tendency(self.drawn, self.encoding.active(self.drawn), (self.overs <= bound).astype(float))
        total = share * good + (1 - share) * legal
        noise = np.sqrt(sum(np.where(n > 0, weight**2 / np.maximum(n, 1), 0.0) for weight, n in ((share, scored), (1 - share, drawn))))
        clear = np.abs(total) / np.maximum(noise, 1e-12)
        steps = {n: int(np.sign(total[n])) for n in self.windows.narrow if clear[n] > CERTAIN}
        moving = sorted((n for n, step in steps.items() if self.windows.can_move(n, step)), key=lambda n: (-clear[n], n))
        return {n: steps[n] for n in moving[: max(1, len(self.windows.narrow) // AT_ONCE)]}


class Evolving:
    """A searcher in windows that move."""

    def __init__(self, searcher: Searcher, note: Callable[[str], None] = lambda text: None) -> None:
        self.searcher, self.note = searcher, note
        self.name, self.batch = searcher.name, searcher.batch

    def start(self, problem: Problem, population: int, first: tuple[Candidate, ...], seed: int) -> EvolvingRun:
        return EvolvingRun(self.searcher, problem, population, first, seed, self.note)
