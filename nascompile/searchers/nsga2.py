"""NSGA-II (Deb et al. 2002) from pymoo over indices of the genome; offspring that were asked for before are bred again."""

from __future__ import annotations

from typing import Any

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.duplicate import DuplicateElimination
from pymoo.core.evaluator import Evaluator
from pymoo.core.mutation import Mutation
from pymoo.core.population import Population
from pymoo.core.problem import Problem as Vectors
from pymoo.operators.crossover.ux import UniformCrossover
from pymoo.problems.static import StaticProblem

from nascompile import space as spaces
from nascompile.records import Candidate, SearchSpace
from nascompile.searchers import Problem

CROSSOVER = 0.9


class Nsga2Run:
    def __init__(self, problem: Problem, population: int, first: tuple[Candidate, ...], seed: int) -> None:
        space, objectives = problem.space, problem.objectives
        self.space = space
        slots = [spaces.slot_gene(space, slot).choices for slot in spaces.gene_names(space)]
        top = np.array([len(choices) - 1 for choices in slots])
        self.problem = Vectors(n_var=len(top), n_obj=objectives, n_ieq_constr=1, xl=np.zeros(len(top)), xu=top, vtype=int)
        self.seen: set[Candidate] = set()
        self.size, self.rng = spaces.size(space), np.random.default_rng(seed)
        start = _start(space, population, first, self.rng, self.size)
        self.algorithm = self.breeding(
            objectives, pop_size=population, sampling=np.array([spaces.encode(space, point) for point in start]),
            crossover=UniformCrossover(prob=CROSSOVER), mutation=_Reset(top), eliminate_duplicates=_Unseen(space, self.seen),
        )  # fmt: skip
        self.algorithm.setup(self.problem, termination=("n_gen", 10**6), seed=seed)
        self.asked: Any = None

    def breeding(self, objectives: int, **settings: Any) -> Any:
        """pymoo's algorithm, which decides who survives."""
        return NSGA2(**settings)

    def ask(self) -> tuple[Candidate, ...]:
        if len(self.seen) == self.size:
            return ()
        self.asked = self.algorithm.ask()
        if self.asked is None or len(self.asked) == 0:  # parents too alike to breed anything new
            self.asked = Population.new(X=self._strangers())
        points = tuple(spaces.decode(self.space, tuple(int(i) for i in row)) for row in self.asked.get("X"))
        self.seen.update(points)
        return points

    def _strangers(self) -> np.ndarray[Any, Any]:
        """Genomes (n, genes) of random candidates that are new to the run, at most a population of them."""
        drawn = (spaces.sample(self.space, self.rng) for _ in range(200 * self.algorithm.pop_size))
        found = list(dict.fromkeys(point for point in drawn if point not in self.seen))[: self.algorithm.pop_size]
        return np.array([spaces.encode(self.space, point) for point in found]).reshape(len(found), self.problem.n_var)

    def tell(self, points: tuple[Candidate, ...], objectives: Any, violations: Any) -> None:
        static = StaticProblem(self.problem, F=np.asarray(objectives, dtype=float), G=np.asarray(violations, dtype=float)[:, None])
        Evaluator().eval(static, self.asked)
        self.algorithm.tell(infills=self.asked)


def _start(space: SearchSpace, population: int, first: tuple[Candidate, ...], rng: np.random.Generator, size: int) -> list[Candidate]:
    """The first generation: what was given, then random candidates."""
    start = dict.fromkeys(first)
    for _ in range(200 * population):
        if len(start) >= min(population, size):
            break
        start[spaces.sample(space, rng)] = None
    return list(start)[:population]


class _Reset(Mutation):  # type: ignore[misc]
    """Each gene is drawn anew, its own value among the choices, with probability 1 / genes."""

    def __init__(self, top: np.ndarray[Any, Any]) -> None:
        super().__init__(prob=1.0)
        self.top = top

    def _do(self, problem: Any, X: Any, *args: Any, random_state: Any = None, **kwargs: Any) -> Any:
        X = X.copy()
        hit = random_state.random(X.shape) < 1 / X.shape[1]
        X[hit] = random_state.integers(0, np.broadcast_to(self.top + 1, X.shape))[hit]
        return X


class _Unseen(DuplicateElimination):  # type: ignore[misc]
    """Leaves candidates that are new to the run; genomes that differ only in inactive genes are one candidate."""

    def __init__(self, space: SearchSpace, seen: set[Candidate]) -> None:
        super().__init__()
        self.space, self.seen = space, seen
        self.decoded: dict[tuple[int, ...], Candidate] = {}

    def _do(self, pop: Any, other: Any, is_duplicate: Any) -> Any:
        known = set(self.seen) if other is None else {self._candidate(individual) for individual in other}
        for index, individual in enumerate(pop):
            point = self._candidate(individual)
            is_duplicate[index] = point in known
            if other is None:
                known.add(point)
        return is_duplicate

    def _candidate(self, individual: Any) -> Candidate:
        indices = tuple(int(i) for i in individual.X)
        if indices not in self.decoded:
            self.decoded[indices] = spaces.decode(self.space, indices)
        return self.decoded[indices]


class Nsga2:
    name = "nsga2"
    batch = 0

    def start(self, problem: Problem, population: int, first: tuple[Candidate, ...], seed: int) -> Nsga2Run:
        return Nsga2Run(problem, population, first, seed)


PLUGIN = Nsga2()
