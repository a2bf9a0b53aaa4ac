"""Whoever scores, and whoever dies of it: every job comes back once, with the score it would have had here."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field

import pytest

from nascompile import workers
from nascompile.errors import DataError, NascompileError, UnsupportedError
from nascompile.records import Candidate, Score
from nascompile.worker import Answer, Fault, Job
from nascompile.workers import Died, Growing, Inline, NoRoom, Pool


def candidate(number: int) -> Candidate:
    return Candidate(space="s", architecture=(("width", number),), precision=(("t", ()),))


JOBS = tuple(Job(candidate=candidate(n)) for n in range(12))


def score_of(value: float, weights: str = "weights") -> Score:
    return Score(
        metric="accuracy", direction="maximize", value=value, n=100, stderr=1.0, split_digest="split", weights_digest=weights,
        evaluator_digest="evaluator",
    )  # fmt: skip


class Formula:
    """An evaluator."""

    digest, split_digest, weights_digest = "evaluator", "split", "weights"

    def __init__(self, target: str = "") -> None:
        self.target = target

    def on(self, target: str) -> Formula:
        return Formula(target)

    def score(self, point: Candidate) -> Score:
        return score_of(point.value("width") + (1000 if self.target else 0))


@dataclass
class Team:
    """Workers of which some die, as told: candidate's width ▸ how often."""

    deadly: dict[int, int] = field(default_factory=dict)
    stillborn: int = 0
    """How many of the first die while they load."""
    rooms: int = 99
    """How many can be placed."""
    slow: float = 0.001
    answer: Answer | None = None
    stopped: int = 0
    started: int = 0
    asked: list[int] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> Member:
        with self.lock:
            self.started += 1
            return Member(self, self.started)


@dataclass
class Member:
    team: Team
    number: int
    gone: threading.Event = field(default_factory=threading.Event)

    def ready(self) -> None:
        if self.number > self.team.rooms:
            raise NoRoom("no room here")
        if self.number <= self.team.stillborn:
            raise Died("could not load")

    def score(self, job: Job) -> Answer:
        number = job.candidate.value("width")
        with self.team.lock:
            self.team.asked.append(number)
            dies = self.team.deadly.get(number, 0) > 0
            if dies:
                self.team.deadly[number] -= 1
        if self.gone.wait(self.team.slow) or dies:
            raise Died(f"killed by signal {number}")
        return self.team.answer or Answer(score=Formula(job.target).score(job.candidate), seconds=float(number))

    def stop(self) -> None:
        with self.team.lock:
            self.team.stopped += not self.gone.is_set()
        self.gone.set()


def always() -> bool:
    return True


def scored(team: Team, count: int = 3, jobs=JOBS, go_on=always, notes: list[str] | None = None) -> dict[int, float]:
    with Pool(Formula(), team.start, count, (notes if notes is not None else []).append) as pool:
        found = list(pool.score_all(jobs, go_on))
    assert len({index for index, _, _ in found}) == len(found)
    assert all(seconds == jobs[index].candidate.value("width") for index, _, seconds in found)
    return {index: score.value for index, score, _ in found}


HERE = {index: score.value for index, score, _ in Inline(Formula()).score_all(JOBS, always)}


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_every_job_comes_back_once_with_the_score_it_has_here(count):
    assert {n: float(n) for n in range(12)} == HERE
    team = Team()
    assert scored(team, count) == HERE
    assert sorted(team.asked) == list(range(12))
    assert team.stopped == team.started == count


def test_the_target_of_a_job_is_the_one_that_is_scored_for():
    jobs = (JOBS[3], Job(candidate=candidate(3), target="other"))
    assert scored(Team(), jobs=jobs) == {0: 3.0, 1: 1003.0}
    assert [s.value for _, s, _ in Inline(Formula()).score_all(jobs, always)] == [3.0, 1003.0]


@pytest.mark.parametrize("count", [1, 3])
def test_a_worker_that_dies_costs_one_evaluation(count):
    team, notes = Team(deadly={4: 1, 9: 1}), []
    assert scored(team, count, notes=notes) == HERE
    assert sorted(team.asked) == sorted([*range(12), 4, 9])
    assert team.started == count + 2
    assert team.stopped == team.started
    assert len(notes) == 2
    assert all("repeated: killed by signal" in note for note in notes)


@pytest.mark.parametrize("count", [1, 3])
def test_a_candidate_that_kills_twice_is_named(count):
    team = Team(deadly={5: 99})
    with pytest.raises(NascompileError, match=f"candidate {candidate(5).id} has killed 2 workers") as caught:
        scored(team, count)
    assert caught.value.detail == "killed by signal 5\nkilled by signal 5\nwidth=5"
    assert team.asked.count(5) == 2
    assert team.stopped == team.started


def test_different_candidates_that_kill_once_each_are_no_error():
    assert scored(Team(deadly=dict.fromkeys(range(12), 1)), 2) == HERE


def test_a_worker_that_dies_while_it_loads_is_started_again_but_not_for_ever():
    team = Team(stillborn=1)
    assert scored(team, 1) == HERE
    team = Team(stillborn=99)
    with pytest.raises(NascompileError, match="workers die while they load: could not load"):
        scored(team, 1)
    assert team.started == 2
    assert team.asked == []


def test_where_there_is_no_room_for_all_the_others_go_on():
    notes: list[str] = []
    team = Team(rooms=2)
    assert scored(team, 4, notes=notes) == HERE
    assert sorted(notes) == ["2 workers go on: no room here", "3 workers go on: no room here"]
    with pytest.raises(NascompileError, match="no worker is left: no room here"):
        scored(Team(rooms=0), 4)


def test_what_goes_wrong_in_a_worker_is_raised_here():
    fault = Fault(kind="DataError", message="damaged split: x", hint="prepare it again", detail="zip")
    with pytest.raises(DataError) as caught:
        scored(Team(answer=Answer(fault=fault)))
    assert (caught.value.message, caught.value.hint, caught.value.detail) == ("damaged split: x", "prepare it again", "zip")
    with pytest.raises(RuntimeError, match=r"(?s)in a worker, scoring candidate .*ZeroDivisionError") as bug:
        scored(Team(answer=Answer(fault=Fault(kind="", message="Traceback …\nZeroDivisionError: x"))))
    assert not isinstance(bug.value, NascompileError)


def test_a_score_of_other_weights_is_refused():
    with pytest.raises(NascompileError, match="other weights"):
        scored(Team(answer=Answer(score=score_of(1.0, weights="others"))))


def test_when_no_more_are_wanted_those_at_work_still_come_back():
    team, begun = Team(slow=0.05), time.monotonic()

    def go_on() -> bool:
        return len(team.asked) < 4

    found = scored(team, 2, go_on=go_on)
    assert 4 <= len(found) <= 5  # two may ask at the same time
    assert sorted(team.asked) == sorted(found)
    assert found == {n: HERE[n] for n in found}
    assert time.monotonic() - begun < 5


def test_several_batches_are_served_by_the_same_workers():
    team = Team()
    with Pool(Formula(), team.start, 2, print) as pool:
        for start in range(0, 12, 4):
            found = {start + index: score.value for index, score, _ in pool.score_all(JOBS[start : start + 4], always)}
            assert found == {n: HERE[n] for n in range(start, start + 4)}
        assert list(pool.score_all((), always)) == []
    assert team.started == team.stopped == 2


def test_leaving_in_the_middle_ends_the_workers_at_once():
    team, began = Team(slow=30.0), time.monotonic()

    def go_on() -> bool:
        if threading.current_thread() is threading.main_thread() and len(team.asked) == 3:
            raise KeyboardInterrupt
        return True

    with pytest.raises(KeyboardInterrupt):
        scored(team, go_on=go_on)
    assert time.monotonic() - began < 5
    assert team.stopped == team.started == 3


# ---------------------------------------------------------------------------------------------- which executor


@pytest.fixture
def growing(monkeypatch):
    """growing(seconds, …) ▸ (scores, team, notes) of two batches where scoring here takes so long."""

    def run(
        seconds: float, count: int = 2, team: Team | None = None, jobs: tuple[Job, ...] = JOBS
    ) -> tuple[dict[int, float], Team, list[str]]:
        class Slow(Formula):
            def score(self, point: Candidate) -> Score:
                clock[0] += seconds
                return super().score(point)

        clock, team, notes = [0.0], team or Team(), []
        monkeypatch.setattr(workers.time, "monotonic", lambda: clock[0])
        with Pool(Formula(), team.start, count, notes.append) as pool:
            executor = Growing(Slow(), pool, 12, notes.append)
            found = {index: score.value for index, score, _ in executor.score_all(jobs[:6], always)}
            found |= {6 + index: score.value for index, score, _ in executor.score_all(jobs[6:], always)}
        return found, team, notes

    return run


def test_workers_are_only_started_where_that_saves_time(growing):
    found, team, notes = growing(seconds=0.1)
    assert (found, team.started, notes) == (HERE, 0, [])
    found, team, notes = growing(seconds=10.0)  # the first takes so long that the other eleven are worth it
    assert found == HERE
    assert sorted(team.asked) == list(range(1, 12))
    assert notes == ["2 workers score from here on, each on one thread"]
    found, team, notes = growing(seconds=10.0, count=1)
    assert (found, team.started, notes) == (HERE, 0, [])


def opened(**changes):
    given = {"bench": object(), "workers": 0, "ray": "", "evaluations": 10, "batch": 0} | changes
    order = ("bench", "workers", "ray", "evaluations")
    return workers.opened(Formula(), *(given[name] for name in order), print, given["batch"])


def test_one_worker_is_this_process():
    with opened(workers=1) as executor:
        assert isinstance(executor, Inline)
    with opened(workers=0) as executor:
        assert isinstance(executor, Growing)
        assert 1 <= executor.pool.count <= min(workers.AUTOMATIC_MOST, os.cpu_count() or 1)
    with opened(workers=3) as executor:
        assert isinstance(executor, Pool)
        assert executor.count == 3


@pytest.mark.parametrize("asked", [{"workers": 2}, {"ray": "auto"}])
def test_a_metric_that_only_this_process_has_is_not_sent_away(asked):
    with pytest.raises(UnsupportedError, match="metric that is a Python function"), opened(bench=None, **asked):
        raise AssertionError
    with opened(bench=None) as executor:
        assert isinstance(executor, Inline)


def test_an_evaluation_here_is_on_one_thread_and_the_others_come_back():
    import torch

    class Counting(Formula):
        def score(self, point: Candidate) -> Score:
            seen.append(torch.get_num_threads())
            return super().score(point)

    seen: list[int] = []
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        list(Inline(Counting()).score_all(JOBS[:2], always))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1]


# ---------------------------------------------------------------------------------------------- half of a candidate's scores

BOTH = tuple(Job(candidate=candidate(n), target=target) for n in range(6) for target in ("", "other"))
"""Jobs of six candidates, on two targets each."""


@pytest.mark.parametrize("after", [0, 3, 4])
def test_here_a_candidate_that_is_begun_gets_all_its_scores(after):
    found: list[int] = []
    for index, _, _ in Inline(Formula()).score_all(BOTH, lambda: len(found) < after):
        found.append(index)
    assert found == list(range({0: 0, 3: 4, 4: 4}[after]))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_workers_bring_a_candidate_that_is_begun_to_its_end(count):
    for after in range(1, 8):
        team = Team(slow=0.003)
        found = scored(team, count, jobs=BOTH, go_on=lambda team=team, after=after: len(team.asked) < after)
        assert {index ^ 1 for index in found} == set(found)
        assert after <= len(found) <= after + 1 + 2 * count
    everything = scored(Team(deadly={2: 1}), count, jobs=BOTH)
    assert len(everything) == 12


def test_a_growing_executor_begins_with_workers_between_candidates(growing):
    found, team, _ = growing(seconds=10.0, jobs=BOTH)
    assert len(found) == 12
    assert sorted(team.asked) == sorted([*range(1, 6)] * 2)


# ---------------------------------------------------------------------------------------------- workers that nobody asked for


@pytest.mark.parametrize(("team", "says"), [
    (Team(deadly={5: 99}), f"candidate {candidate(5).id} has killed 2 workers: this process goes on alone"),
    (Team(stillborn=99), "workers die while they load: could not load: this process goes on alone"),
])  # fmt: skip
def test_where_workers_that_nobody_asked_for_die_this_process_goes_on(growing, team, says):
    found, team, notes = growing(seconds=10.0, team=team)
    assert found == HERE
    assert notes[-1] == says
    assert notes.count(says) == 1
    assert team.stopped == team.started
    assert team.asked.count(5) == (2 if team.deadly else 0)


def test_what_else_goes_wrong_in_workers_is_still_an_error(growing):
    with pytest.raises(DataError, match="damaged"):
        growing(seconds=10.0, team=Team(answer=Answer(fault=Fault(kind="DataError", message="damaged"))))


def test_no_more_workers_are_started_than_a_batch_has_work_for(monkeypatch):
    class Memory:
        available = 10**13

    class Ray:
        def cluster_resources(self):
            return {"CPU": 16.0}

    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    monkeypatch.setattr(workers.psutil, "cpu_count", lambda logical: 16)
    monkeypatch.setattr(workers.psutil, "virtual_memory", Memory)
    assert [workers.useful_workers(batch) for batch in (0, 1, 4, 20)] == [workers.AUTOMATIC_MOST, 1, 4, workers.AUTOMATIC_MOST]
    for wanted, count in ((0, 4), (6, 6)):
        with opened(workers=wanted, batch=4) as executor:
            assert (executor if wanted else executor.pool).count == count
    cluster = workers.Cluster(Ray(), "here")
    assert [cluster.room(*numbers) for numbers in ((0,), (0, 4), (9, 4), (0, 99))] == [16, 4, 9, 16]
