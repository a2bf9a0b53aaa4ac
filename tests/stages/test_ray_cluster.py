"""A real Ray cluster of two nodes on this machine: the front that one process finds, also where a node is lost in the middle."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nascompile import pipeline, workers
from nascompile.errors import UnsupportedError
from nascompile.progress import Silent
from nascompile.records import Front, load
from nascompile.settings import Recipe
from nascompile.workers import Actor, Inline, Pool

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ray() -> Any:
    if os.environ.get("CI") == "true":
        import ray as found  # which CI installs: to be without it is a failure there

        return found
    return pytest.importorskip("ray", reason="Ray is not installed: pip install 'nascompile[ray]'")


@pytest.fixture(scope="module")
def cluster(ray: Any) -> Iterator[Any]:
    """Two nodes of one processor each."""
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    found.add_node(num_cpus=1)
    found.wait_for_nodes()
    yield found
    found.shutdown()


def on(recipe: Recipe, **changes: Any) -> Recipe:
    return msgspec.structs.replace(recipe, search=msgspec.structs.replace(recipe.search, **changes))


def outcome(front: Front) -> tuple[Any, ...]:
    """A front without times."""
    return [msgspec.structs.replace(e, seconds=0.0) for e in front.evaluations], front.scored, front.hypervolume, front.stopped


def until(true: Callable[[], Any], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_the_front_is_the_one_that_one_process_finds(work: Recipe, ray: Any, cluster: Any) -> None:
    shutil.copytree("run", "alone")
    pipeline.run(on(work, workers=1), Path("alone"), until="search")
    notes = Notes()
    pipeline.run(on(work, ray=cluster.address), Path("run"), until="search", progress=notes)
    assert any(note.startswith("2 workers on the Ray cluster") for note in notes.notes)
    alone, together = (load(Path(f"{name}/front.json"), Front) for name in ("alone", "run"))
    assert outcome(alone) == outcome(together)
    assert together.scored == 40
    assert not ray.is_initialized()  # the connection is gone, and with it the workers


def test_a_worker_that_is_killed_and_a_node_that_is_lost(bare: Any, ray: Any, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "NODE_SECONDS", 30.0)
    wanted = {index: score for index, score, _ in Inline(bare.evaluator).score_all(bare.jobs, lambda: True)}
    extra = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    notes: list[str] = []
    jobs = bare.jobs * 25  # enough to be in the middle of them all the while
    with workers._cluster(cluster.address) as there:
        assert there.room(0) == 3
        with Pool(bare.evaluator, lambda: there.worker(bare.bench), 3, notes.append) as pool:
            results = pool.score_all(jobs, lambda: True)
            found = [next(results)]
            until(lambda: all(pool.workers) and pool._batch and pool._batch.working == 3)
            hosts = [ray.get(member.actor.place.remote()) for member in pool.workers if isinstance(member, Actor)]
            assert len({pid for _, pid in hosts}) == 3
            os.kill(hosts[0][1], signal.SIGKILL)
            until(lambda: len(notes) == 1)
            until(lambda: all(pool.workers) and pool._batch and pool._batch.working == 3)
            cluster.remove_node(extra)
            found += results
    assert "its evaluation is repeated" in notes[0]
    assert len(found) == len(jobs)
    assert {index % 40: score for index, score, _ in found} == wanted
    assert all(score == wanted[index % 40] for index, score, _ in found)
    assert len({index for index, _, _ in found}) == len(jobs)


def test_too_few_processors_and_no_cluster_are_errors(bare: Any, ray: Any, cluster: Any) -> None:
    with pytest.raises(UnsupportedError, match="9 workers need as many processors"), workers.opened(
        bare.evaluator, bare.bench, 9, cluster.address, 10, print
    ):
        raise AssertionError
    assert not ray.is_initialized()
    with pytest.raises(UnsupportedError, match=r"no Ray cluster at 127\.0\.0\.1:1"), workers.opened(
        bare.evaluator, bare.bench, 1, "127.0.0.1:1", 10, print
    ):
        raise AssertionError


def test_a_connection_of_the_callers_is_kept(bare: Any, ray: Any, cluster: Any) -> None:
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        with workers.opened(bare.evaluator, bare.bench, 1, cluster.address, 10, print) as executor:
            ((_, score, _),) = executor.score_all(bare.jobs[:1], lambda: True)
        assert ray.is_initialized()
    finally:
        ray.shutdown()
    assert score == next(Inline(bare.evaluator).score_all(bare.jobs[:1], lambda: True))[1]
