"""Who scores the candidates of a search: this process, others on this machine, or a Ray cluster; each evaluation on one thread.

A batch of candidates is handed over whole and comes back in whatever order it is done. Which candidates are in it and what they cost was
decided before, one thread always adds up in the same order, so how many workers there are changes how long a search takes, not what it
finds. A worker that dies costs the evaluation it was at: another one repeats it.
"""

from __future__ import annotations

import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import psutil

from nascompile import errors
from nascompile.errors import NascompileError, UnsupportedError
from nascompile.records import Score, encode
from nascompile.worker import Answer, Bench, Job, Remote, files_of, versions

Scored = tuple[int, Score, float]
"""(index of the job, its score, seconds it took)."""
Note = Callable[[str], None]

DEATHS = 2
"""So many workers may die at one candidate until it is the candidate."""
STARTUP_SECONDS = 10.0
"""About what a worker takes to import torch and to load; where scoring alone would take twice that, more workers are worth it."""
AUTOMATIC_MOST = 8
"""More workers than this are only started where they are asked for."""
NODE_SECONDS = 120.0
"""A cluster without room for a worker for so long has lost a node."""
WATCH_SECONDS = 0.2
CONNECT_SECONDS = 10.0


class Executor(Protocol):
    """Who scores."""

    def score_all(self, jobs: Sequence[Job], go_on: Callable[[], bool]) -> Iterator[Scored]:
        """Every job's score, as they come in; no more are begun once `go_on` says no, those at work are still among the results."""


class Evaluators(Protocol):
    """What scores a candidate here: an Evaluator."""

    digest: str
    split_digest: str
    weights_digest: str

    def score(self, point: Any) -> Score:
        """On the space's first target."""

    def on(self, target: str) -> Evaluators:
        """The same for another target."""


@contextmanager
def opened(
    evaluator: Evaluators, bench: Bench | None, workers: int, ray: str, evaluations: int, note: Note, batch: int = 0
) -> Iterator[Executor]:  # fmt: skip
    """Who scores, for as long as the context lasts; afterwards no worker is left, and what is timed then has the machine to itself.

    `bench`: None where others cannot score: a metric that is a function of the caller's. `workers`: 0 for as many as are of use. `ray`: the
    address of a cluster, or empty. `batch`: evaluations that are wanted at a time, so that more workers would wait; 0: not known.
    """
    if bench is None and (ray or workers > 1):
        raise UnsupportedError(
            "a metric that is a Python function cannot be sent to other processes", hint="leave out `workers` and `ray`, or name a metric"
        )
    if bench is None or (workers == 1 and not ray):
        yield Inline(evaluator)
        return
    if ray:
        with _cluster(ray) as cluster:
            count = cluster.room(workers, batch)
            note(f"{count} workers on the Ray cluster {ray}")
            with Pool(evaluator, lambda: cluster.worker(bench), count, note) as pool:
                yield pool
        return
    with Pool(evaluator, lambda: Process(bench), workers or useful_workers(batch), note) as pool:
        yield pool if workers else Growing(evaluator, pool, evaluations, note)


def useful_workers(batch: int = 0) -> int:
    """One for each processor core, as far as a batch has work and memory has room for more processes like this one."""
    free = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(free, psutil.cpu_count(logical=False) or free, AUTOMATIC_MOST)
    room: int = psutil.virtual_memory().available // psutil.Process().memory_info().rss
    return max(1, min(cores, room, batch or cores))


# ---------------------------------------------------------------------------------------------- here


@dataclass
class Inline:
    """Scores in this process, one candidate after the other."""

    evaluator: Evaluators

    def score_all(self, jobs: Sequence[Job], go_on: Callable[[], bool]) -> Iterator[Scored]:
        for index, job in enumerate(jobs):
            if not (go_on() or _goes_on(jobs, index)):
                return
            began = time.monotonic()
            with _one_thread():
                score = (self.evaluator.on(job.target) if job.target else self.evaluator).score(job.candidate)
            yield index, score, time.monotonic() - began


@contextmanager
def _one_thread() -> Iterator[None]:
    """As workers compute, so that every sum is added up in the same order wherever it is."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Growing:
    """Scores here until that is seen to take much longer than workers take to start, then by them; here again if they do not last."""

    evaluator: Evaluators
    pool: Pool
    evaluations: int
    """Candidates that will be scored at most."""
    note: Note
    done: int = 0
    seconds: float = 0.0
    grown: bool = False
    lost: bool = False
    """Whether workers were tried and died."""

    def score_all(self, jobs: Sequence[Job], go_on: Callable[[], bool]) -> Iterator[Scored]:
        left = deque(range(len(jobs)))
        while left and not self.grown:
            index = left.popleft()
            if not (go_on() or _goes_on(jobs, index)):
                return
            for _, score, seconds in Inline(self.evaluator).score_all(jobs[index : index + 1], lambda: True):
                self.done, self.seconds = self.done + 1, self.seconds + seconds
                yield index, score, seconds
            rest = self.seconds / self.done * (self.evaluations - self.done)
            worth = self.pool.count > 1 and rest > 2 * STARTUP_SECONDS and not self.lost
            if worth and not (left and _goes_on(jobs, left[0])):  # whose other scores Ctrl-C must not cost
                self.grown = True
                self.note(f"{self.pool.count} workers score from here on, each on one thread")
        if not left:
            return
        order = tuple(left)
        try:
            for number, score, seconds in self.pool.score_all([jobs[index] for index in order], go_on):
                left.remove(order[number])
                yield order[number], score, seconds
        except Lost as error:
            self.pool.close()
            self.grown, self.lost = False, True
            self.note(f"{error.message}: this process goes on alone")
        if self.lost:
            remaining = tuple(left)
            for number, score, seconds in self.score_all([jobs[index] for index in remaining], go_on):
                yield remaining[number], score, seconds


def _goes_on(jobs: Sequence[Job], index: int) -> bool:
    """Whether a job is for the same candidate as the one before: what is begun of it is brought to an end, since half of it is lost."""
    return index > 0 and jobs[index].candidate == jobs[index - 1].candidate


# ---------------------------------------------------------------------------------------------- several workers


class Lost(NascompileError):
    """Workers die, of what they load or of a candidate."""


class Died(Exception):
    """A worker ended before it had answered; why, as far as that is known."""


class NoRoom(Exception):
    """A worker could not be placed anywhere."""


class Worker(Protocol):
    """One of several; it begins to load when it is made."""

    def ready(self) -> None:
        """Returns when it can score; Died, NoRoom, or what kept it from getting ready."""

    def score(self, job: Job) -> Answer:
        """The answer; Died if it ends before it has one."""

    def stop(self) -> None:
        """End it, whatever it is doing."""


@dataclass
class _Batch:
    jobs: Sequence[Job]
    go_on: Callable[[], bool]
    waiting: deque[int]
    working: int = 0
    found: deque[Scored] = field(default_factory=deque)
    deaths: dict[int, list[str]] = field(default_factory=dict)
    fault: BaseException | None = None

    @property
    def over(self) -> bool:
        return not self.waiting and not self.working

    def end(self) -> None:
        """Begin no more candidates; what is begun of one on one target is brought to an end on the others, since half of it is lost."""
        waiting = set(self.waiting)
        begun = {job.candidate for index, job in enumerate(self.jobs) if index not in waiting}
        self.waiting = deque(index for index in self.waiting if self.jobs[index].candidate in begun)


class Pool:
    """Several workers, each looked after by a thread, which starts it again where it dies."""

    def __init__(self, evaluator: Evaluators, start: Callable[[], Worker], count: int, note: Note) -> None:
        self.evaluator, self.start, self.count, self.note = evaluator, start, count, note
        self.workers: list[Worker | None] = [None] * count
        self._turn = threading.Condition()
        self._batch: _Batch | None = None
        self._threads: list[threading.Thread] = []
        self._serving = count
        self._fault: BaseException | None = None
        """Why no worker is left."""
        self._closed = False

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers, whatever they are doing; none is started again."""
        with self._turn:
            self._closed = True
            self._turn.notify_all()
        for worker in self.workers:
            if worker is not None:
                worker.stop()  # which ends what its thread waits for
        for thread in self._threads:
            thread.join()

    def score_all(self, jobs: Sequence[Job], go_on: Callable[[], bool]) -> Iterator[Scored]:
        """As an executor does; NascompileError naming a candidate that workers die of, or saying why none can be started."""
        batch = _Batch(jobs, go_on, deque(range(len(jobs))))
        with self._turn:
            self._batch = batch
            self._turn.notify_all()
        if not self._threads:
            self._threads = [threading.Thread(target=self._serve, args=(place,), daemon=True) for place in range(self.count)]
            for thread in self._threads:
                thread.start()
        try:
            while True:
                with self._turn:
                    # a signal's handler runs between two waits; workers that are only starting see no end of the batch themselves
                    self._turn.wait_for(lambda: batch.found or batch.fault or self._fault or batch.over, WATCH_SECONDS)
                    if not go_on():
                        batch.end()
                    if batch.found:
                        scored = batch.found.popleft()
                    elif fault := batch.fault or self._fault:
                        raise fault
                    elif batch.over:
                        return
                    else:
                        continue
                yield scored
        finally:
            with self._turn:
                self._batch = None

    def _serve(self, place: int) -> None:
        """One worker's life, and its successors'."""
        lost = 0
        while not self._closed:
            if self.workers[place] is None:
                try:
                    self._begin(place)
                except Died as death:  # while it was loading: no candidate's fault
                    lost += 1
                    if lost == DEATHS:
                        error = Lost(f"workers die while they load: {death}", hint="fewer --workers need less memory")
                        return self._give_up(error)
                    continue
                except NoRoom as reason:
                    return self._leave(str(reason))
                except BaseException as fault:
                    return self._give_up(fault)
            task = self._next()
            if task is None:
                return
            batch, index = task
            worker = self.workers[place]
            assert worker is not None
            try:
                answer = worker.score(batch.jobs[index])
                scored = (index, self._checked(answer, batch.jobs[index]), answer.seconds)
            except Died as death:
                worker.stop()
                self.workers[place] = None
                self._repeat(batch, index, str(death))
            except BaseException as fault:
                self._finish(batch, fault=fault)
            else:
                lost = 0
                self._finish(batch, scored)

    def _begin(self, place: int) -> None:
        worker = self.start()
        with self._turn:
            self.workers[place] = worker
            closed = self._closed
        if closed:  # in the meantime
            worker.stop()
        try:
            worker.ready()
        except BaseException:
            self.workers[place] = None
            worker.stop()
            raise

    def _next(self) -> tuple[_Batch, int] | None:
        """The next job; None where there will be none."""
        with self._turn:
            while not self._closed:
                batch = self._batch
                if batch and batch.waiting and not batch.fault:
                    if not batch.go_on():
                        batch.end()
                    if batch.waiting:
                        batch.working += 1
                        return batch, batch.waiting.popleft()
                    self._turn.notify_all()
                self._turn.wait()
            return None

    def _finish(self, batch: _Batch, scored: Scored | None = None, fault: BaseException | None = None) -> None:
        with self._turn:
            batch.working -= 1
            if scored:
                batch.found.append(scored)
            batch.fault = batch.fault or fault
            self._turn.notify_all()

    def _repeat(self, batch: _Batch, index: int, why: str) -> None:
        """An evaluation that was lost with its worker goes to whoever is free next."""
        if self._closed:
            return
        with self._turn:
            batch.working -= 1
            deaths = batch.deaths.setdefault(index, [])
            deaths.append(why)
            deadly = len(deaths) == DEATHS
            if deadly:
                batch.fault = batch.fault or _deadly(batch.jobs[index], deaths)
            else:
                batch.waiting.appendleft(index)
            self._turn.notify_all()
        if not deadly:
            self.note(f"a worker died, its evaluation is repeated: {why}")

    def _give_up(self, fault: BaseException) -> None:
        with self._turn:
            self._serving -= 1
            self._fault = self._fault or fault
            self._turn.notify_all()

    def _leave(self, why: str) -> None:
        """One worker less, as long as there are others."""
        with self._turn:  # one section: of two that leave together, one is the last
            self._serving -= 1
            left = self._serving
            if not left:
                fault = Lost(f"no worker is left: {why}", hint="run the same command again: every score is kept")
                self._fault = self._fault or fault
                self._turn.notify_all()
        if left:
            self.note(f"{left} workers go on: {why}")

    def _checked(self, answer: Answer, job: Job) -> Score:
        """The score, which must have been made of the same weights and samples by the same arithmetic as one of this process."""
        if answer.fault:
            raise _raised(answer.fault, f"scoring candidate {job.candidate.id}")
        assert answer.score is not None
        own, other = (
            (s.weights_digest, s.split_digest, evaluator) for s, evaluator in
            ((self.evaluator, self.evaluator.digest), (answer.score, answer.score.evaluator_digest))
        )  # fmt: skip
        if own != other:
            raise NascompileError("a worker scores by other weights, samples or arithmetic", hint="the same nascompile must be everywhere")
        return answer.score


def _deadly(job: Job, deaths: Sequence[str]) -> Lost:
    point = job.candidate
    return Lost(
        f"candidate {point.id} has killed {len(deaths)} workers",
        detail="\n".join((*deaths, " ".join(f"{name}={value}" for name, value in point.architecture))),
        hint="with --workers 1 it is scored in the process itself, whose end then says more; fewer workers leave each more memory",
    )


def _raised(fault: Any, doing: str) -> BaseException:
    if fault.kind:
        kind: type[NascompileError] = getattr(errors, fault.kind, NascompileError)
        return kind(fault.message, hint=fault.hint, detail=fault.detail)
    return RuntimeError(f"in a worker, {doing}:\n{fault.message}")


def _same_versions(found: Answer, where: str) -> None:
    """Raises what kept a worker from getting ready, and UnsupportedError if its sums may differ from those of others."""
    if found.fault:
        raise _raised(found.fault, "loading")
    here = versions()
    if found.versions != here:
        pairs = zip(found.versions, here, strict=True)
        wrong = "; ".join(f"{name} {there} {where}, {ours} here" for (name, there), (_, ours) in pairs if there != ours)
        raise UnsupportedError(f"workers have other versions: {wrong}", hint="install the same ones everywhere")


# ---------------------------------------------------------------------------------------------- processes


class Process:
    """A worker process of this machine. It is not of this terminal's group, so that Ctrl-C is this process's to handle alone."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.errors = bench, tempfile.TemporaryFile()  # noqa: SIM115
        places = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "nascompile.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            env={**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip

    def ready(self) -> None:
        _same_versions(self._ask(self.bench), "in a worker")

    def score(self, job: Job) -> Answer:
        return self._ask(job)

    def _ask(self, question: Bench | Job) -> Answer:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin
        assert stdout
        line = b""
        with suppress(OSError, ValueError):  # a pipe that nobody reads any more, or that `stop` has closed
            stdin.write(encode(question) + b"\n")
            stdin.flush()
            line = stdout.readline()
        if not line.endswith(b"\n"):
            raise Died(self._end())
        return msgspec.json.decode(line, type=Answer)

    def _end(self) -> str:
        code = self.process.wait()
        words = ""
        with suppress(ValueError):  # `stop` has closed it, and nobody asks
            self.errors.seek(0)
            lines = self.errors.read().decode(errors="replace").splitlines()
            words = next((line.strip() for line in reversed(lines) if line.strip()), "")
        how = f"killed by signal {-code}" if code < 0 else f"ended with status {code}"
        how += " (the system does that where memory runs out)" if code == -9 else ""
        return how + (f": {words}" if words else "")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with suppress(OSError, ValueError):  # what was written and never read
                if stream:
                    stream.close()
        self.errors.close()


# ---------------------------------------------------------------------------------------------- a cluster


@dataclass
class Cluster:
    """A Ray cluster that this process is connected to."""

    ray: Any
    address: str
    files: Any = None
    turn: threading.Lock = field(default_factory=threading.Lock)

    def room(self, wanted: int, batch: int = 0) -> int:
        """How many workers to start: as many as are wanted, or one for each processor that a batch has work for.

        UnsupportedError if there are not so many processors.
        """
        there = math.floor(self.ray.cluster_resources().get("CPU", 0))
        if there < max(wanted, 1):
            raise UnsupportedError(
                f"{wanted or 1} workers need as many processors; the Ray cluster {self.address} has {there}",
                hint=f"--workers {there}" if there else "start nodes with `ray start --address ADDRESS --num-cpus N`",
            )
        return wanted or min(there, batch or there)

    def worker(self, bench: Bench) -> Worker:
        """A worker on a node with a free processor; NoRoom if there is none for a while."""
        with self.turn:  # workers are started side by side: what they load goes to the cluster once
            if self.files is None:
                self.files = self.ray.put(files_of(bench))
        return Actor(self.ray, self.files, bench)


class Actor:
    """A worker that is an actor of a Ray cluster."""

    def __init__(self, ray: Any, files: Any, bench: Bench) -> None:
        self.ray = ray
        made = ray.remote(num_cpus=1, max_restarts=0)(Remote)
        self.actor = made.remote(files, encode(msgspec.structs.replace(bench, weights="", data="")))

    def ready(self) -> None:
        loaded = self.actor.ready.remote()
        if not self.ray.wait([loaded], timeout=NODE_SECONDS)[0]:
            raise NoRoom(f"the cluster has had no free processor for {NODE_SECONDS:.0f} s")
        _same_versions(self._answer(loaded), "on a node")

    def score(self, job: Job) -> Answer:
        return self._answer(self.actor.score.remote(encode(job)))

    def _answer(self, reference: Any) -> Answer:
        try:
            return msgspec.json.decode(self.ray.get(reference), type=Answer)
        except self.ray.exceptions.RayError as error:  # what goes wrong in a worker's own code is in its answer
            raise Died(_first_line(error)) from error

    def stop(self) -> None:
        with suppress(Exception):  # it is gone, or the cluster is
            self.ray.kill(self.actor)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _cluster(address: str) -> Iterator[Cluster]:
    """A connection to the cluster; a caller's own is used and kept."""
    try:
        import ray
    except ImportError as error:
        raise UnsupportedError("--ray needs Ray, which is not installed", hint="pip install 'nascompile[ray]'") from error
    own = not ray.is_initialized()
    if not own and address not in ("auto", here := str(ray.get_runtime_context().gcs_address)):
        raise UnsupportedError(
            f"this process is connected to the Ray cluster {here}, not to {address}", hint="ray=\"auto\" is the one it is connected to"
        )
    if own:
        try:
            if there := re.fullmatch(r"(?:ray://)?(.+):(\d+)", address):  # Ray itself would try for minutes
                socket.create_connection((there[1].strip("[]"), int(there[2])), CONNECT_SECONDS).close()
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:  # ConnectionError is an OSError
            raise UnsupportedError(
                f"no Ray cluster at {address}", detail=_first_line(error), hint="`ray start --head` starts one and says its address"
            ) from error
    try:
        yield Cluster(ray, address)
    finally:
        if own:
            ray.shutdown()
