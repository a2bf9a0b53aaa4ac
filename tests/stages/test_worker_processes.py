"""Real worker processes on a real run: the same front whatever their number, none left behind, and what is killed is done again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import torch

from nascompile import data, pipeline, plugins, worker, workers
from nascompile.errors import DataError, NascompileError
from nascompile.journal import read as read_journal
from nascompile.progress import Silent
from nascompile.records import Evaluation, Front, SearchSpace, load
from nascompile.settings import Recipe
from nascompile.worker import Bench
from nascompile.workers import Inline, Pool, Process


def with_workers(recipe: Recipe, count: int, **changes: Any) -> Recipe:
    return msgspec.structs.replace(recipe, search=msgspec.structs.replace(recipe.search, workers=count, **changes))


def own_workers() -> list[psutil.Process]:
    """Worker processes of this one that are alive."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if child.status() != psutil.STATUS_ZOMBIE and "nascompile.worker" in child.cmdline():
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def outcome(front: Front) -> tuple[Any, ...]:
    """A front without times."""
    return [msgspec.structs.replace(e, seconds=0.0) for e in front.evaluations], front.scored, front.hypervolume, front.stopped


def test_the_front_does_not_depend_on_the_number_of_workers(work: Recipe) -> None:
    fronts, seen = {}, []

    class Watch(Silent):
        def step(self, label: str, done: int, total: int, limit: float = 0.0) -> None:
            if label == "candidates scored":
                seen.append(len(own_workers()))

    for count in (1, 2):
        shutil.copytree("run", f"run{count}")
        seen.clear()
        pipeline.run(with_workers(work, count), Path(f"run{count}"), until="search", progress=Watch())
        assert max(seen) == (count if count > 1 else 0)
        assert own_workers() == []  # before anything is timed
        fronts[count] = load(Path(f"run{count}/front.json"), Front)
    assert outcome(fronts[1])[1:2] == (40,)
    assert outcome(fronts[1]) == outcome(fronts[2])
    # nor is a search done again because other workers would do it now
    before = Path("run2/stages/search.json").stat().st_mtime_ns
    pipeline.run(with_workers(work, 1), Path("run2"), until="search")
    assert Path("run2/stages/search.json").stat().st_mtime_ns == before


def always() -> bool:
    return True


def pool_of(bare: Any, count: int, notes: list[str]) -> Pool:
    return Pool(bare.evaluator, lambda: Process(bare.bench), count, notes.append)


def until(true: Callable[[], Any], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_workers_that_are_killed_cost_what_they_were_at(bare: Any) -> None:
    wanted = {index: score for index, score, _ in Inline(bare.evaluator).score_all(bare.jobs, always)}
    notes: list[str] = []
    with pool_of(bare, 2, notes) as pool:
        results = pool.score_all(bare.jobs, always)
        found = [next(results)]
        until(lambda: all(pool.workers) and pool._batch and pool._batch.working == 2)
        killed = [member.process.pid for member in pool.workers if isinstance(member, Process)]
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        found += results
        assert not {p.pid for p in own_workers()} & set(killed)
    assert own_workers() == []
    assert len(found) == len(bare.jobs)
    assert {index: score for index, score, _ in found} == wanted
    assert len(notes) == 2
    assert all("repeated: killed by signal 9" in note for note in notes)


@pytest.mark.slow
def test_a_candidate_whose_worker_is_killed_again_is_named(bare: Any) -> None:
    job, over = bare.jobs[0], threading.Event()
    many = (job,) * 1000  # of which one is at work when the killer comes

    def kill(pool: Pool) -> None:
        while not over.wait(0.001):
            member, batch = pool.workers[0], pool._batch
            if isinstance(member, Process) and batch and batch.working:
                member.process.kill()

    with pool_of(bare, 1, []) as pool:
        killer = threading.Thread(target=kill, args=(pool,))
        killer.start()
        try:
            with pytest.raises(NascompileError, match=f"candidate {job.candidate.id} has killed 2 workers") as caught:
                list(pool.score_all(many, always))
        finally:
            over.set()
            killer.join()
    assert "killed by signal 9" in caught.value.detail
    assert own_workers() == []


@pytest.mark.slow
def test_what_keeps_a_worker_from_loading_is_said(bare: Any) -> None:
    bare.bench = msgspec.structs.replace(bare.bench, data=bare.bench.weights)
    with pool_of(bare, 1, []) as pool, pytest.raises(DataError, match="no other process has opened this split"):
        list(pool.score_all(bare.jobs, always))


@pytest.mark.slow
def test_a_worker_ends_with_the_process_that_it_works_for(bare: Any) -> None:
    member = Process(bare.bench)
    member.ready()
    pid = member.process.pid
    assert member.process.stdin
    member.process.stdin.close()  # as when this process dies
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    member.stop()


def test_a_worker_reads_no_test_data_and_says_nothing_of_what_it_reads(bare: Any) -> None:
    names = {name for name, _ in worker.files_of(bare.bench)}
    assert {name.split("/")[1] for name in names if name.startswith("data/")} == {
        "data.json", "access.jsonl", "preprocessor", "calibration", "validation",
    }  # fmt: skip
    assert "weights/model.safetensors" in names
    before = data.accesses(Path("run/data"))
    with pool_of(bare, 1, []) as pool:
        list(pool.score_all(bare.jobs[:1], always))
    assert data.accesses(Path("run/data")) == before


def test_as_an_actor_it_scores_the_same_from_files_alone(bare: Any) -> None:
    """Ray's side of a worker, without Ray."""
    ((_, wanted, _),) = Inline(bare.evaluator).score_all(bare.jobs[:1], always)
    files = worker.files_of(bare.bench)
    remote = worker.Remote(files, worker.encode(msgspec.structs.replace(bare.bench, weights="", data="")))
    shutil.rmtree("run")
    threads = torch.get_num_threads()
    try:
        ready = msgspec.json.decode(remote.ready(), type=worker.Answer)
        answer = msgspec.json.decode(remote.score(worker.encode(bare.jobs[0])), type=worker.Answer)
    finally:
        torch.set_num_threads(threads)
    assert (ready.fault, ready.versions) == (None, worker.versions())
    assert answer.score == wanted


# ---------------------------------------------------------------------------------------------- Ctrl-C


COMMAND = """
import os, sys
from nascompile import places
packaged = places._packaged
places._packaged = lambda kind: () if kind == places.TABLES else packaged(kind)
from nascompile.cli import main
main()
"""
"""`nascompile`, with no tables of the checkout."""


def begun(*arguments: str) -> subprocess.Popen[str]:
    """The command in a process group of its own, as a terminal has it."""
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what a shell starts in the background ignores it
    )  # fmt: skip


def scored_lines(run: str) -> int:
    path = Path(run, "journal.jsonl")
    return path.read_bytes().count(b"\n") if path.exists() else 0


FLAGS = ("--out", "run", "--evaluations", "4000")


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_ends_the_search_and_the_run_is_finished_all_the_same(work: Recipe, count: int) -> None:
    with begun("run", *FLAGS, "--workers", str(count), "--json") as process:
        until(lambda: scored_lines("run") >= 20 or process.poll() is not None, 60)
        os.killpg(process.pid, signal.SIGINT)
        out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert "Ctrl-C: the search ends" in error
    assert "the search was stopped early: interrupted" in error
    assert "Traceback" not in error
    front = load(Path("run/front.json"), Front)
    assert front.stopped == "interrupted"
    assert 20 <= front.scored == scored_lines("run") < 4000
    (task,) = json.loads(out)["tasks"]
    assert task["stopped"] == "interrupted"
    assert task["chosen"]["accuracy_split"] == "test"
    assert "It was stopped early: interrupted" in Path("run/report.html").read_text()
    # the same command again leaves the finished run alone
    again = begun("run", *FLAGS, "--workers", "1", "--json")
    out, error = again.communicate(timeout=120)
    assert again.returncode == 0, error
    assert load(Path("run/front.json"), Front) == front


def test_ctrl_c_twice_quits_and_the_same_command_goes_on(work: Recipe) -> None:
    flags = ("--out", "run", "--evaluations", "400")
    with begun("search", *flags, "--workers", "1") as process:
        until(lambda: scored_lines("run") >= 5 or process.poll() is not None, 60)
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.003)  # two signals at once are one
        began = time.monotonic()
        while process.poll() is None and time.monotonic() - began < 10:
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.001)
        _, error = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT), error
    assert not Path("run/front.json").exists()
    kept = scored_lines("run")
    assert kept >= 5
    limited = with_workers(work, 1, evaluations=kept + 3)
    pipeline.run(limited, Path("run"), until="search")
    lines = list(read_journal(Path("run/journal.jsonl"), Evaluation))
    assert len({e.candidate for e in lines}) == len(lines) == kept + 3
    assert load(Path("run/front.json"), Front).stopped == ""


def test_the_space_a_worker_gets_is_the_runs(bare: Any) -> None:
    assert isinstance(bare.bench.space, SearchSpace)
    assert msgspec.json.decode(worker.encode(bare.bench), type=Bench) == bare.bench
    assert {job.candidate.space for job in bare.jobs} == {bare.bench.space.id}
    assert workers.versions() == worker.versions()
    assert plugins.get("families", bare.bench.family).name == bare.bench.family
