"""Windows of a search space: what they move by, where they go, and that a search in them is a search of the whole space."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nascompile import plugins, search as stage, settings, space as spaces
from nascompile.errors import BudgetError
from nascompile.progress import Silent
from nascompile.records import FLOAT32, INT8, Budget, Candidate, Front, Gene, Interval, Score, SearchSpace, Target, Workload
from nascompile.searchers import Price, Problem, evolution, linas
from nascompile.searchers.encoding import Encoding
from nascompile.searchers.evolution import Evolving, EvolvingRun, Windows, beaten, tendency
from nascompile.settings import SearchSettings

SEARCHERS = plugins.names("searchers")
TARGET = Target(device="d", backend="b", workload=Workload())


@pytest.fixture(autouse=True)
def few_generations(monkeypatch: pytest.MonkeyPatch) -> None:
    """LINAS takes seconds a batch with the published 400 and all its models, which change nothing here."""
    for name, value in (("GENERATIONS", 4), ("ALPHAS", linas.ALPHAS[:2]), ("COSTS", linas.COSTS[:2])):
        monkeypatch.setattr(linas, name, value)


def gene(name: str, count: int, requires: tuple[tuple[str, int], ...] = ()) -> Gene:
    return Gene(name=name, kind="architecture", choices=tuple(range(1, count + 1)), requires=requires)


def precision(name: str, requires: tuple[tuple[str, int], ...] = ()) -> Gene:
    return Gene(name=name, kind="precision", choices=("fp32", "int8"), requires=requires)


def space_of(*genes: Gene) -> SearchSpace:
    return SearchSpace(family="f", model_digest="m", genes=genes, precisions=(FLOAT32, INT8), targets=(TARGET.id,), layer_order=(0, 1, 2))


WIDE = space_of(*(gene(name, 10) for name in "abcd"), precision("a.precision"))
"""20,000 candidates."""
SMALL = space_of(gene("depth", 4), gene("a", 5), precision("a.precision"), gene("b", 4, (("depth", 3),)))
"""100 candidates: 10 of depth 1, as many of depth 2, 40 of either other."""
EVERY = tuple(spaces.enumerate_all(SMALL))


def total(point: Candidate) -> float:
    return float(sum(value for _, value in point.architecture))


def worth(point: Candidate) -> float:
    """`a` is worth more than it costs, `b` less, the others nothing; the precision does not matter."""
    values = dict(point.architecture)
    return 10.0 * values["a"] + 2.0 * values.get("b", 0)


def problem(space: SearchSpace, bound: float | None, count: int = 1) -> Problem:
    """Error (and total as a cost) within a bound of the total."""

    def price(point: Candidate) -> Price:
        over = 0.0 if bound is None else max(0.0, total(point) / bound - 1)
        return Price((None, *[total(point)] * (count - 1)), over)

    return Problem(space, count, price, bound is not None)


def drive(
    searcher: str, asked: Problem, scored: int = 100, population: int = 16, seed: int = 0, first: tuple[Candidate, ...] = (),
    see: Callable[[EvolvingRun], None] = lambda run: None, lost: Callable[[Candidate], float] = lambda point: 0.0,
) -> tuple[list[Candidate], EvolvingRun]:  # fmt: skip
    """(all that was asked for, the run), as the search stage does it."""
    run = Evolving(plugins.get("searchers", searcher)).start(asked, population, first, seed)
    points: list[Candidate] = []
    for _ in range(2000):
        see(run)
        batch = run.ask()
        if not batch or scored <= 0:
            break
        over = np.array([asked.price(point).over for point in batch])
        values = np.array([[-worth(point), *[total(point)] * (asked.objectives - 1)] for point in batch])
        values[over > 0, 0] = 1e6
        run.tell(batch, values, np.where(over > 0, over, [lost(point) for point in batch]))
        points += batch
        scored -= int((over == 0).sum())
    return points, run


# ---------------------------------------------------------------------------------------------- what windows move by


def test_a_tendency_is_the_slope_of_a_straight_line_through_what_is_active():
    rng = np.random.default_rng(0)
    levels, active = rng.integers(0, 7, (60, 3)).astype(float), rng.random((60, 3)) < 0.7
    levels[:, 2] = 4
    values = levels[:, 0] - 0.3 * levels[:, 1] + rng.normal(size=60)
    slopes, counts = tendency(levels, active, values)
    assert counts.tolist() == active.sum(axis=0).tolist()
    for n in (0, 1):
        x, y = levels[active[:, n], n], values[active[:, n]]
        assert slopes[n] == pytest.approx(np.polyfit(x, y, 1)[0] * x.std() / y.std())
    assert slopes[0] > 0.5
    assert slopes[1] < 0
    assert slopes[2] == 0  # a gene that never varies says nothing
    assert tendency(levels[:0], active[:0], values[:0])[0].tolist() == [0, 0, 0]


def test_beaten_is_the_share_of_those_that_are_better_by_brute_force():
    rng = np.random.default_rng(1)
    objectives = rng.integers(0, 4, (40, 2)).astype(float)
    violations = rng.choice([0.0, 0.0, -1.0, 0.5, 2.0], 40)

    def better(a: int, b: int) -> bool:
        over = [max(0.0, violations[n]) for n in (a, b)]
        if over[0] != over[1]:
            return bool(over[0] < over[1])
        pairs = list(zip(objectives[a], objectives[b], strict=True))
        return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)

    assert beaten(objectives, violations).tolist() == [sum(better(a, b) for a in range(40)) / 40 for b in range(40)]
    one = beaten(objectives[:, :1], np.zeros(40))
    assert (np.argsort(one, kind="stable") == np.argsort(objectives[:, 0], kind="stable")).all()


# ---------------------------------------------------------------------------------------------- windows


def test_windows_begin_in_the_middle_and_leave_two_choices_and_all_precisions():
    space = space_of(*(gene(f"g{count}", count) for count in (1, 2, 3, 4, 5, 6, 10)), precision("p"))
    windows = Windows.middle(Encoding(space))
    assert windows.width == (1, 2, 2, 2, 3, 4, 6, 2)
    assert windows.low == (0, 0, 0, 1, 1, 1, 2, 0)
    assert [g.choices for g in windows.space().genes][2:] == [(1, 2), (2, 3), (2, 3, 4), (2, 3, 4, 5), (3, 4, 5, 6, 7, 8), ("fp32", "int8")]
    assert str(windows) == "g3 1–2, g4 2–3, g5 2–4, g6 2–5, g10 3–8"
    for _ in range(2):
        windows = windows.widened()
    assert windows.narrow == ()
    assert windows.space() == space


def test_what_windows_hold_are_the_candidates_of_their_space():
    """Also where their depths activate a gene never, or always."""
    encoding = Encoding(SMALL)
    rows = encoding.everything()
    for low, width in itertools.product(range(4), range(1, 5)):
        if low + width > 4:
            continue
        windows = Windows(encoding, (low, 1, 0, 1), (width, 2, 2, 2))
        own = windows.space()
        inside = {(point.architecture, point.precision) for point in spaces.enumerate_all(own)}
        held = [encoding.decode(row) for row, holds in zip(rows, windows.hold(rows), strict=True) if holds]
        assert {(point.architecture, point.precision) for point in held} == inside
        assert len(held) == len(inside) == spaces.size(own) > 0
        drawn = windows.draw(np.random.default_rng(0), 50)
        assert windows.hold(drawn).all()
        assert {gene.name for gene in own.genes} == {"depth", "a", "a.precision"} | ({"b"} if low + width >= 3 else set())


@pytest.mark.parametrize("searcher", ["random", "nsga2"])
def test_windows_move_to_the_legal_part_before_anything_is_scored(searcher):
    bound = 10.0
    rng = np.random.default_rng(0)
    assert np.mean([total(spaces.sample(WIDE, rng)) <= bound for _ in range(4000)]) < 0.03
    run = drive(searcher, problem(WIDE, bound), scored=0)[1]
    assert np.mean([total(run.encoding.decode(row)) <= bound for row in run.windows.draw(rng, 1000)]) > 0.08
    assert sum(run.windows.low) < 4 * 2
    assert len(run.rows) == 0
    assert drive(searcher, problem(WIDE, None), scored=0)[1].windows.low == (2, 2, 2, 2, 0)  # nothing says where to


@pytest.mark.parametrize("searcher", ["random", "nsga2"])
def test_windows_move_to_what_is_good_at_its_cost(searcher):
    """Five seeds: `a`, which is worth its cost, ends higher than where the budget alone leads, and higher than all others."""
    seen: list[tuple[int, ...]] = []

    def see(run: EvolvingRun) -> None:
        if len(run.windows.narrow) == 4 and run.windows.width == (6, 6, 6, 6, 2):
            last[:] = run.windows.low

    for seed in range(5):
        last: list[int] = []
        drive(searcher, problem(WIDE, 20.0), scored=150, seed=seed, see=see)
        seen.append(tuple(last))
    low = np.mean(seen, axis=0)
    assert low[0] >= 3
    assert low[0] > low[1:4].max() + 1
    # without a budget, up alone: the others say nothing
    free = drive(searcher, problem(WIDE, None), scored=64, see=see)[1]
    assert free.windows.low[0] + free.windows.width[0] == 10
    assert last[0] > 2


@pytest.mark.parametrize("searcher", SEARCHERS)
@pytest.mark.parametrize("count", [1, 2])
def test_windows_never_leave_the_choices(searcher, count):
    shapes = set()

    def see(run: EvolvingRun) -> None:
        windows = run.windows
        shapes.add((windows.low, windows.width))
        for low, width, own in zip(windows.low, windows.width, run.encoding.genes, strict=True):
            assert low >= 0
            assert low + width <= len(own.choices)
            assert width >= min(2, len(own.choices))

    points, _ = drive(searcher, problem(WIDE, 14.0, count), scored=60, see=see)
    for point in points:
        spaces.check(WIDE, point)
    assert len(points) == len(set(points))
    assert len(shapes) > 1


@pytest.mark.parametrize("searcher", SEARCHERS)
def test_proposals_are_in_the_windows_as_they_were_when_asked_for(searcher):
    run = Evolving(plugins.get("searchers", searcher)).start(problem(WIDE, 14.0, 2), 12, (), 3)
    asked = problem(WIDE, 14.0, 2)
    for _ in range(12):
        batch = run.ask()
        assert run.windows.hold(run.encoding.encode(list(batch))).all()
        over = np.array([asked.price(point).over for point in batch])
        run.tell(batch, np.array([[1e6 if o else -worth(p), total(p)] for p, o in zip(batch, over, strict=True)]), over)


# ---------------------------------------------------------------------------------------------- what every searcher promises


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of small spaces are looked at often enough to move in them."""
    monkeypatch.setattr(evolution, "PERIOD", 6)


@pytest.mark.parametrize("searcher", SEARCHERS)
@pytest.mark.parametrize("bound", [None, 4.0])
def test_a_small_space_is_seen_whole_and_then_it_ends(searcher, bound, often):
    points, run = drive(searcher, problem(SMALL, bound, 2), scored=1000, population=8)
    legal = {point for point in EVERY if bound is None or total(point) <= bound}
    assert legal <= set(points) <= set(EVERY)
    assert len(points) == len(set(points))
    assert len(EVERY) == 100
    assert not run.windows.narrow
    assert run.starts > 1


@pytest.mark.parametrize("searcher", SEARCHERS)
def test_it_ends_where_nothing_is_within_the_budgets_or_good_enough(searcher, often):
    points, _ = drive(searcher, problem(SMALL, 1.0, 2), scored=1000, population=8)
    assert len(points) <= 100
    points, _ = drive(searcher, problem(SMALL, 9.0, 2), scored=1000, population=8, lost=lambda point: 1.0)
    assert len(points) == len(set(points)) <= 100


@pytest.mark.parametrize("searcher", SEARCHERS)
def test_the_same_seed_asks_for_the_same_and_what_was_given_comes_first(searcher):
    first = (spaces.smallest(WIDE), spaces.smallest(WIDE, "int8"), spaces.largest(WIDE))
    runs = [drive(searcher, problem(WIDE, 14.0, 2), scored=50, seed=seed, first=first)[0] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][:2] == list(first[:2])


def test_a_space_without_wide_genes_is_searched_as_without_windows():
    space = space_of(gene("a", 2), gene("b", 2), precision("p"))
    points, run = drive("nsga2", problem(space, None), population=4, seed=5)
    plain = plugins.get("searchers", "nsga2").start(problem(space, None), 4, (), 5)
    assert points[:4] == list(plain.ask())
    assert run.starts == 1


@pytest.mark.parametrize("searcher", ["ehvi", "linas", "linas-table", "mip"])
def test_a_searcher_that_is_told_beforehand_asks_for_none_of_it(searcher):
    known = EVERY[::2]
    run = plugins.get("searchers", searcher).start(problem(SMALL, None, 2), 8, (), 0)
    run.know(known, np.array([[-worth(p), total(p)] for p in known]), np.zeros(len(known)))
    asked: list[Candidate] = []
    while batch := run.ask():
        asked += batch
        run.tell(batch, np.array([[-worth(p), total(p)] for p in batch]), np.zeros(len(batch)))
    assert len(asked) == 50
    assert set(asked) == set(EVERY) - set(known)


# ---------------------------------------------------------------------------------------------- in the search stage


@dataclass
class Formula:
    """An evaluator that counts."""

    digest: str = "evaluator"
    split_digest: str = "split"
    weights_digest: str = "weights"
    calls: list[Candidate] = field(default_factory=list)
    kill_at: int = -1

    def score(self, point: Candidate) -> Score:
        if len(self.calls) == self.kill_at:
            raise KeyboardInterrupt
        self.calls.append(point)
        return score_of(worth(point))


def score_of(value: float) -> Score:
    return Score(
        metric="accuracy", direction="maximize", value=value, n=100, stderr=1.0, split_digest="split", weights_digest="weights",
        evaluator_digest="evaluator",
    )  # fmt: skip


class Prices:
    target, foreign = TARGET, ()

    def __init__(self, space: SearchSpace) -> None:
        self.space = space

    def costs(self, point: Candidate) -> dict[str, float]:
        return {"latency_ms": total(point), "size_mb": total(point), "macs_m": 1.0, "memory_mb": 1.0}

    def __call__(self, point: Candidate) -> Any:
        return self.costs(point), Interval(value=total(point), low=0, high=99, unit="ms"), int(total(point)), 1, 1


def run(path: Path, evaluator: Formula | None = None, space: SearchSpace = SMALL, bound: float = 8.0, **changes: Any) -> Front:
    path.mkdir(exist_ok=True)
    chosen = SearchSettings(**{"evaluations": 100, "population": 8, "space_evolution": True} | changes)
    budgets = (Budget(metric="latency_ms", bound=bound),)
    return stage.search(
        evaluator or Formula(), Prices(space), score_of(60.0), budgets, chosen, 0, path / "journal.jsonl", Silent()
    )  # fmt: skip


@pytest.mark.parametrize("searcher", SEARCHERS)
def test_the_front_of_a_space_that_was_seen_whole_is_the_true_one(searcher, often, tmp_path):
    front = run(tmp_path, searcher=searcher)
    legal = [point for point in EVERY if total(point) <= 8]
    beating = {p: [q for q in legal if (worth(q), -total(q)) != (worth(p), -total(p)) and worth(q) >= worth(p) and total(q) <= total(p)]
               for p in legal}  # fmt: skip
    assert {e.candidate for e in front.evaluations} == {p for p, others in beating.items() if not others}
    assert front.scored == len(legal)
    assert all(e.candidate.space == SMALL.id for e in front.evaluations)


@pytest.mark.parametrize(("searcher", "kill"), [("random", 3), ("nsga2", 20), ("nsga3", 20), ("linas", 20), ("ehvi", 3), ("ehvi", 20)])
def test_a_killed_search_goes_on_where_it_was(searcher, kill, tmp_path):
    asked = {"space": WIDE, "bound": 14.0, "searcher": searcher, "evaluations": 40}
    whole = run(tmp_path / "whole", **asked)
    dying, rest = Formula(kill_at=kill), Formula()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", dying, **asked)
    front = run(tmp_path / "killed", rest, **asked)
    assert [e.candidate for e in front.evaluations] == [e.candidate for e in whole.evaluations]
    assert (front.scored, front.hypervolume) == (whole.scored, whole.hypervolume)
    assert len(dying.calls) + len(rest.calls) == front.scored == 40
    assert not set(dying.calls) & set(rest.calls)


def test_a_budget_that_nothing_meets_is_told_with_the_nearest_candidate(tmp_path):
    evaluator = Formula()
    with pytest.raises(BudgetError, match=r"latency_ms ≤ 1") as caught:
        run(tmp_path, evaluator, bound=1.0)
    assert evaluator.calls == []
    assert "latency_ms 2 " in caught.value.detail.replace(",", " ")


def test_without_the_setting_no_window_is_opened(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(stage, "Evolving", refuse)
    assert SearchSettings().space_evolution is False
    assert run(tmp_path, space_evolution=False, searcher="nsga2").scored == len([p for p in EVERY if total(p) <= 8])
    with pytest.raises(AssertionError):
        run(tmp_path, searcher="nsga2")


def test_it_is_a_setting_of_a_recipe(tmp_path):
    (tmp_path / "recipe.toml").write_text('model = "toy"\n[budgets]\nmax_drop = 1.0\n[search]\nspace_evolution = true\n')
    assert settings.from_toml(tmp_path / "recipe.toml").search.space_evolution is True
