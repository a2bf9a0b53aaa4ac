"""The search against every candidate of a small space, scored by a formula and priced by another."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field

import pytest

from nascompile import journal, plugins, search as stage, space as spaces
from nascompile.errors import BudgetError, RecordError
from nascompile.progress import Silent
from nascompile.records import FLOAT32, INT8, Budget, Candidate, Evaluation, Gene, Interval, Score, SearchSpace, Target, Workload
from nascompile.settings import SearchSettings

SEARCHERS = plugins.names("searchers")
TARGET = Target(device="d", backend="b", workload=Workload())
BASELINE = 90.0


def make_space() -> SearchSpace:
    """20 candidates: depth 1 (4) or 2 (16)."""
    genes = [Gene(name="depth", kind="architecture", choices=(1, 2))]
    for layer, requires in ((1, ()), (0, (("depth", 2),))):
        genes.append(Gene(name=f"layers.{layer}.width", kind="architecture", choices=(8, 16), requires=requires))
        genes.append(Gene(name=f"layers.{layer}.precision", kind="precision", choices=("fp32", "int8"), requires=requires))
    return SearchSpace(
        family="f", model_digest="m", genes=tuple(genes), precisions=(FLOAT32, INT8), targets=(TARGET.id,), layer_order=(1, 0)
    )


SPACE = make_space()
EVERY = tuple(spaces.enumerate_all(SPACE))


def accuracy(point: Candidate) -> float:
    """Percent; with ties between candidates (INT8 of layer 0 costs nothing) and dominated ones."""
    widths = sum(value for name, value in point.architecture if name.endswith("width"))
    rounded = dict(dict(point.precision)[TARGET.id])["layers.1.precision"] == "int8"
    return 60.0 + widths - (2.5 if rounded else 0.0)


def latency(point: Candidate) -> float:
    """ms; INT8 halves a layer."""
    precisions = dict(dict(point.precision)[TARGET.id])
    total = 1.0
    for name, value in point.architecture:
        if name.endswith("width"):
            total += value / (2 if precisions[name.replace("width", "precision")] == "int8" else 1)
    return total


def size_bytes(point: Candidate) -> int:
    return int(sum(value for name, value in point.architecture if name.endswith("width")) * 100_000)


def memory_bytes(point: Candidate) -> int:
    """Grows with size, and with depth where size does not."""
    return size_bytes(point) // 2 + 200_000 * len(point.architecture)


@dataclass
class Formula:
    """An evaluator that counts."""

    digest: str = "evaluator"
    split_digest: str = "split"
    weights_digest: str = "weights"
    calls: list[Candidate] = field(default_factory=list)
    kill_at: int = 0

    def score(self, point: Candidate) -> Score:
        if self.kill_at and len(self.calls) == self.kill_at:
            raise KeyboardInterrupt
        self.calls.append(point)
        return score_of(accuracy(point), self)


def score_of(value: float, by: Formula | None = None) -> Score:
    by = by or Formula()
    return Score(
        metric="accuracy", direction="maximize", value=value, n=100, stderr=1.0, split_digest=by.split_digest,
        weights_digest=by.weights_digest, evaluator_digest=by.digest,
    )  # fmt: skip


class Prices:
    space, target, foreign = SPACE, TARGET, (("cpu", "A", "B"),)

    def costs(self, point):
        return self(point)[0]

    def __call__(self, point):
        ms = latency(point)
        interval = Interval(value=ms, low=ms, high=ms, unit="ms")
        size = size_bytes(point)
        macs = size // 2
        costs = {"latency_ms": ms, "size_mb": size / 1e6, "macs_m": macs / 1e6, "memory_mb": memory_bytes(point) / 1e6}
        return costs, interval, size, size // 4, macs


def run(path, evaluator=None, budgets=(), seed=0, deadline=float("inf"), **settings):
    settings = SearchSettings(**{"evaluations": 50, "population": 4} | settings)
    return stage.search(
        evaluator or Formula(), Prices(), score_of(BASELINE), budgets, settings, seed, path / "journal.jsonl", Silent(), deadline
    )


def brute_force(within=lambda point: True, costs=(latency,)) -> set[Candidate]:
    """Candidates that no other of the allowed ones beats: nowhere worse, somewhere better."""
    allowed = [p for p in EVERY if within(p)]

    def beaten(p, q):
        pairs = [(-accuracy(p), -accuracy(q)), *((cost(p), cost(q)) for cost in costs)]
        return all(b <= a for a, b in pairs) and any(b < a for a, b in pairs)

    return {p for p in allowed if not any(beaten(p, q) for q in allowed)}


def test_the_fixture_has_ties_and_dominated_points():
    assert len(EVERY) == 20
    values = [(accuracy(p), latency(p)) for p in EVERY]
    assert len(set(values)) < len(values)
    assert 3 <= len(brute_force()) < 20


@pytest.mark.parametrize("name", SEARCHERS)
@pytest.mark.parametrize(
    ("objectives", "costs"),
    [
        (("error", "latency_ms"), (latency,)),
        (("error", "latency_ms", "size_mb"), (latency, size_bytes)),
        (("size_mb", "error"), (size_bytes,)),
        (("error",), ()),
        (("error", "memory_mb"), (memory_bytes,)),
        (("error", "latency_ms", "size_mb", "memory_mb"), (latency, size_bytes, memory_bytes)),
        (("macs_m", "memory_mb", "error"), (size_bytes, memory_bytes)),
    ],
)
def test_the_front_of_a_space_that_was_seen_whole_is_the_true_one(name, objectives, costs, tmp_path):
    front = run(tmp_path, searcher=name, objectives=objectives)
    assert {e.candidate for e in front.evaluations} == brute_force(costs=costs)
    assert front.scored == 20
    for e in front.evaluations:
        assert (e.score.value, e.latency.value, e.size_bytes) == (accuracy(e.candidate), latency(e.candidate), size_bytes(e.candidate))
        assert e.memory_bytes == memory_bytes(e.candidate)
    order = [(e.latency.value, -e.score.value, e.candidate.id) for e in front.evaluations]
    assert order == sorted(order)


@pytest.mark.parametrize("name", [name for name in SEARCHERS if name not in ("ehvi", "linas_table", "mip")])
@pytest.mark.parametrize("objectives", [("latency_ms",), ("latency_ms", "memory_mb")])
def test_without_the_error_among_the_objectives_the_drop_decides_who_may_be_on_the_front(name, objectives, tmp_path):
    front = run(tmp_path, searcher=name, objectives=objectives, budgets=(Budget(metric="drop", bound=10.0),))
    fine = [p for p in EVERY if accuracy(p) >= BASELINE - 10]
    assert 0 < len(fine) < 20
    costs = {p: (latency(p), memory_bytes(p))[: len(objectives)] for p in fine}
    best = {p for p in fine if not any(all(b <= a for a, b in zip(costs[p], c, strict=True)) and c != costs[p] for c in costs.values())}
    assert {e.candidate for e in front.evaluations} == best


def test_new_prices_are_written_with_the_scores_there_were(tmp_path, monkeypatch):
    """A run with another latency table: its journal says what that one predicts."""
    run(tmp_path)
    before = {p: latency(p) for p in EVERY}
    monkeypatch.setitem(globals(), "latency", lambda p: 3 * before[p])
    evaluator = Formula()
    run(tmp_path, evaluator)
    assert evaluator.calls == []
    last = {e.candidate: e.latency.value for e in journal.read(tmp_path / "journal.jsonl", Evaluation)}
    assert last == {p: 3 * before[p] for p in EVERY}


@pytest.mark.parametrize("name", SEARCHERS)
def test_nothing_is_scored_twice_not_even_in_another_run(name, tmp_path):
    first, second, other = Formula(), Formula(), Formula()
    front = run(tmp_path, first, searcher=name)
    assert len(first.calls) == len(set(first.calls)) == 20
    again = run(tmp_path, second, searcher=name)
    assert second.calls == []
    assert again.evaluations == front.evaluations
    run(tmp_path, other, searcher=name, budgets=(Budget(metric="latency_ms", bound=15.0),), seed=5)  # a new question, no new score
    assert other.calls == []
    assert len(list(journal.read(tmp_path / "journal.jsonl", Evaluation))) == 20


@pytest.mark.parametrize("change", ["digest", "split_digest", "weights_digest"])
def test_a_score_of_another_evaluator_split_or_weights_is_not_taken(change, tmp_path):
    run(tmp_path)
    other = Formula(**{change: "other"})
    run(tmp_path, other)
    assert len(other.calls) == 20


@pytest.mark.parametrize("name", SEARCHERS)
@pytest.mark.parametrize("kill", [1, 5, 13])
def test_a_killed_search_goes_on_where_it_was(name, kill, tmp_path):
    whole = run(tmp_path / "whole", searcher=name, evaluations=16)
    dying, rest = Formula(kill_at=kill), Formula()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", dying, searcher=name, evaluations=16)
    front = run(tmp_path / "killed", rest, searcher=name, evaluations=16)
    assert [e.candidate for e in front.evaluations] == [e.candidate for e in whole.evaluations]
    assert (front.scored, front.hypervolume) == (whole.scored, whole.hypervolume)
    assert len(dying.calls) + len(rest.calls) == 16
    assert not set(dying.calls) & set(rest.calls)


@pytest.fixture(autouse=True)
def folders(tmp_path):
    for name in ("whole", "killed", "a", "b", "c"):
        (tmp_path / name).mkdir()


@pytest.mark.parametrize("name", SEARCHERS)
def test_the_same_seed_finds_the_same_front(name, tmp_path):
    counted = {run_name: Formula() for run_name in "abc"}
    fronts = [
        run(tmp_path / key, counted[key], searcher=name, evaluations=9, seed=seed) for key, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    assert counted["a"].calls == counted["b"].calls
    if name in ("random", "nsga2", "nsga3"):  # the others draw next to nothing at random in a space this small
        assert counted["a"].calls != counted["c"].calls
    assert [e.candidate for e in fronts[0].evaluations] == [e.candidate for e in fronts[1].evaluations]
    assert fronts[0].hypervolume == fronts[1].hypervolume
    assert [f.seed for f in fronts] == [3, 3, 4]


@pytest.mark.parametrize("name", SEARCHERS)
def test_no_more_are_scored_than_allowed(name, tmp_path):
    evaluator = Formula()
    front = run(tmp_path, evaluator, searcher=name, evaluations=7)
    assert len(evaluator.calls) == front.scored == 7
    assert [n for n, _ in front.hypervolume] == list(range(1, 8))
    volumes = [v for _, v in front.hypervolume]
    assert volumes == sorted(volumes)


@pytest.mark.parametrize("name", SEARCHERS)
@pytest.mark.parametrize(
    ("budgets", "within"),
    [
        ((Budget(metric="latency_ms", bound=12.0),), lambda p: latency(p) <= 12.0),
        (
            (Budget(metric="latency_ms", bound=17.0), Budget(metric="size_mb", bound=1.6)),
            lambda p: latency(p) <= 17 and size_bytes(p) <= 1_600_000,
        ),
        ((Budget(metric="macs_m", bound=0.4),), lambda p: size_bytes(p) // 2 <= 400_000),
        ((Budget(metric="memory_mb", bound=1.2),), lambda p: memory_bytes(p) <= 1_200_000),
    ],
)
def test_what_is_over_budget_is_never_scored(name, budgets, within, tmp_path):
    evaluator = Formula()
    front = run(tmp_path, evaluator, budgets, searcher=name)
    assert 0 < sum(within(p) for p in EVERY) < 20
    assert set(evaluator.calls) == {p for p in EVERY if within(p)}  # a candidate exactly at the bound is within
    assert any(latency(p) in (12.0, 17.0) or size_bytes(p) in (1_600_000, 800_000) or memory_bytes(p) == 1_200_000 for p in evaluator.calls)
    assert {e.candidate for e in front.evaluations} == brute_force(within)


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_budget_that_nothing_meets_names_the_nearest_candidate_and_what_to_change(name, tmp_path):
    least = min(map(latency, EVERY))
    evaluator = Formula()
    with pytest.raises(BudgetError, match=r"latency_ms ≤ 3") as caught:
        run(tmp_path, evaluator, (Budget(metric="latency_ms", bound=3.0),), searcher=name)
    assert evaluator.calls == []
    assert least == 5.0
    assert "latency_ms 5" in caught.value.detail
    assert "width=8" in caught.value.detail
    bound = float(caught.value.hint.split("`--latency-ms` to ")[1].split(",")[0])
    assert least <= bound < 1.02 * least
    front = run(tmp_path, evaluator, (Budget(metric="latency_ms", bound=bound),), searcher=name)  # the hint works
    assert front.scored >= 1


def test_of_two_budgets_only_the_broken_one_is_to_be_raised(tmp_path):
    with pytest.raises(BudgetError) as caught:
        run(tmp_path, budgets=(Budget(metric="latency_ms", bound=3.0), Budget(metric="size_mb", bound=5.0)))
    assert "--latency-ms" in caught.value.hint
    assert "--size-mb" not in caught.value.hint


@pytest.mark.parametrize("drop", [0.14, 1.0, 1.001, 1.24, 9.96, 10.49])
def test_a_drop_that_nothing_meets_is_told_so_that_raising_to_it_works(drop, tmp_path):
    best = max(map(accuracy, EVERY))
    baseline = best + drop
    settings = SearchSettings(evaluations=50, population=4)
    arguments = (settings, 0, tmp_path / "journal.jsonl", Silent())
    evaluator = Formula()
    with pytest.raises(BudgetError, match=r"drop ≤ 0\.1 points") as caught:
        stage.search(evaluator, Prices(), score_of(baseline), (Budget(metric="drop", bound=0.1),), *arguments)
    assert f"{best:.2f}" in caught.value.detail
    bound = float(caught.value.hint.split("`--max-drop` to ")[1].split(",")[0])
    assert drop <= bound <= 1.02 * drop
    front = stage.search(evaluator, Prices(), score_of(baseline), (Budget(metric="drop", bound=bound),), *arguments)
    assert any(e.score.value == best for e in front.evaluations)
    assert len(evaluator.calls) == len(set(evaluator.calls))


def test_inactive_genes_never_make_a_second_scoring(tmp_path):
    """16 of the 32 genomes have depth 1 and mean 4 networks."""
    evaluator = Formula()
    run(tmp_path, evaluator, searcher="random")
    shallow = [p for p in evaluator.calls if p.value("depth") == 1]
    assert len(shallow) == 4
    assert len({(p.value("layers.1.width"), p.precision_of("layers.1.precision", TARGET.id)) for p in shallow}) == 4


def test_a_deadline_in_the_past_still_scores_one(tmp_path):
    evaluator = Formula()
    front = run(tmp_path, evaluator, deadline=0.0)
    assert len(evaluator.calls) == front.scored == len(front.evaluations) == 1


def test_a_damaged_journal_line_is_an_error_not_a_repeat(tmp_path):
    run(tmp_path)
    path = tmp_path / "journal.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[3] = lines[3].replace(b"accuracy", b"precision", 1)
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(RecordError, match="line 4"):
        run(tmp_path)


class Shuffled:
    """An executor that is done with the last job first, and with one in three first of all."""

    def __init__(self, evaluator: Formula) -> None:
        self.evaluator, self.batches = evaluator, []

    def score_all(self, jobs, go_on):
        self.batches.append(len(jobs))
        for index in sorted(range(len(jobs)), key=lambda i: (i % 3, -i)):
            yield index, self.evaluator.score(jobs[index].candidate), 1.0


@pytest.mark.parametrize("name", SEARCHERS)
def test_who_is_done_first_changes_nothing(name, tmp_path):
    budgets = (Budget(metric="drop", bound=25.0),)
    plain = run(tmp_path / "a", budgets=budgets, searcher=name, evaluations=14)
    evaluator = Formula()
    executor = Shuffled(evaluator)
    settings = SearchSettings(searcher=name, evaluations=14, population=4)
    path = tmp_path / "b" / "journal.jsonl"
    found = stage.search(evaluator, Prices(), score_of(BASELINE), budgets, settings, 0, path, Silent(), executor=executor)
    assert [e.candidate for e in found.evaluations] == [e.candidate for e in plain.evaluations]
    assert (found.hypervolume, found.scored, found.stopped) == (plain.hypervolume, plain.scored, "")
    assert len(evaluator.calls) == len(set(evaluator.calls)) == 14
    assert max(executor.batches) > 1


def test_how_a_search_ended_is_in_its_front(tmp_path):
    assert run(tmp_path / "a").stopped == ""  # the whole space was seen
    assert run(tmp_path / "b", evaluations=5).stopped == ""
    assert run(tmp_path / "c", deadline=0.0).stopped == "out of time"
    assert run(tmp_path / "whole", patience=1, population=2).stopped == "no better hypervolume in 1 batch"


class Pressed(Formula):
    """Ctrl-C while candidate number `at` is scored."""

    at = 6

    def score(self, point):
        if len(self.calls) + 1 == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        return super().score(point)


@pytest.fixture
def keyboard():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_leaves_the_front_of_what_was_scored(keyboard, tmp_path):
    evaluator = Pressed()
    front = run(tmp_path, evaluator)
    assert (front.stopped, front.scored, len(evaluator.calls)) == ("interrupted", 6, 6)
    assert {e.candidate for e in front.evaluations} <= set(evaluator.calls)
    rest = Formula()
    assert run(tmp_path, rest).stopped == ""
    assert len(rest.calls) == 14  # the others of the space


def test_ctrl_c_before_anything_is_scored_is_an_interruption(keyboard, tmp_path):
    class Idle:
        def score_all(self, jobs, go_on):
            os.kill(os.getpid(), signal.SIGINT)
            assert not go_on()
            yield from ()

    with pytest.raises(KeyboardInterrupt):
        stage.search(
            Formula(), Prices(), score_of(BASELINE), (), SearchSettings(), 0, tmp_path / "journal.jsonl", Silent(), executor=Idle()
        )


def test_what_was_found_so_far_is_told_after_every_batch(tmp_path):
    class Told(Silent):
        def standing(self, found):
            standings.append(found)

    standings = []
    settings = SearchSettings(evaluations=10, population=4)
    arguments = (Formula(), Prices(), score_of(BASELINE), (), settings, 0, tmp_path / "journal.jsonl")
    front = stage.search(*arguments, Told())
    assert [s.headline.split(",")[0] for s in standings] == ["4 of 10 scored", "8 of 10 scored", "10 of 10 scored"]
    last = standings[-1]
    assert last.columns == ("ms", "accuracy", "MB")
    assert f"hypervolume {front.hypervolume[-1][1]:.4g} (+" in last.headline
    assert [row[:2] for row in last.rows] == [(f"{e.latency.value:.3g}", f"{e.score.value:.2f}") for e in front.evaluations]


def test_what_is_foreign_about_the_prices_goes_into_every_evaluation(tmp_path):
    front = run(tmp_path)
    assert {e.foreign for e in (*front.evaluations, *journal.read(tmp_path / "journal.jsonl", Evaluation))} == {Prices.foreign}
    assert front.foreign == Prices.foreign
