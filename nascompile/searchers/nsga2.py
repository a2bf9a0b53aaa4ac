"""NSGA-II (Deb et al. 2002) from pymoo over indices of the genome; inactive genes never make two candidates of one."""

from __future__ import annotations

from typing import Any

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.duplicate import ElementwiseDuplicateElimination
from pymoo.core.evaluator import Evaluator
from pymoo.core.mutation import Mutation
from pymoo.core.problem import Problem
from pymoo.operators.crossover.ux import UniformCrossover
from pymoo.problems.static import StaticProblem

from nascompile import space as spaces
from nascompile.records import Candidate, SearchSpace

CROSSOVER = 0.9


class Nsga2Run:
    def __init__(self, space: SearchSpace, objectives: int, population: int, first: tuple[Candidate, ...], seed: int) -> None:
        self.space = space
        slots = [spaces.slot_gene(space, slot).choices for slot in spaces.gene_names(space)]
        top = np.array([len(choices) - 1 for choices in slots])
        self.problem = Problem(n_var=len(top), n_obj=objectives, n_ieq_constr=1, xl=np.zeros(len(top)), xu=top, vtype=int)
        rng = np.random.default_rng(seed)
        start = list(dict.fromkeys(first))[:population]
        for _ in range(200 * population):
            if len(start) >= population:
                break
            point = spaces.sample(space, rng)
            if point not in start:
                start.append(point)
        self.algorithm = NSGA2(
            pop_size=population, sampling=np.array([spaces.encode(space, point) for point in start]),
            crossover=UniformCrossover(prob=CROSSOVER), mutation=_Reset(top), eliminate_duplicates=_SameCandidate(space),
        )  # fmt: skip
        self.algorithm.setup(self.problem, termination=("n_gen", 10**6), seed=seed)
        self.asked: Any = None

    def ask(self) -> tuple[Candidate, ...]:
        self.asked = self.algorithm.ask()
        if self.asked is None or len(self.asked) == 0:
            return ()
        return tuple(spaces.decode(self.space, tuple(int(i) for i in row)) for row in self.asked.get("X"))

    def tell(self, points: tuple[Candidate, ...], objectives: Any, violations: Any) -> None:
        static = StaticProblem(self.problem, F=np.asarray(objectives, dtype=float), G=np.asarray(violations, dtype=float)[:, None])
        Evaluator().eval(static, self.asked)
        self.algorithm.tell(infills=self.asked)


class _Reset(Mutation):  # type: ignore[misc]
    """Each gene takes another of its values with probability 1 / genes."""

    def __init__(self, top: np.ndarray[Any, Any]) -> None:
        super().__init__(prob=1.0)
        self.top = top

    def _do(self, problem: Any, X: Any, *args: Any, random_state: Any = None, **kwargs: Any) -> Any:
        X = X.copy()
        hit = random_state.random(X.shape) < 1 / X.shape[1]
        X[hit] = random_state.integers(0, np.broadcast_to(self.top + 1, X.shape))[hit]
        return X


class _SameCandidate(ElementwiseDuplicateElimination):  # type: ignore[misc]
    def __init__(self, space: SearchSpace) -> None:
        super().__init__()
        self.space = space

    def is_equal(self, a: Any, b: Any) -> bool:
        return spaces.decode(self.space, tuple(int(i) for i in a.X)) == spaces.decode(self.space, tuple(int(i) for i in b.X))


class Nsga2:
    name = "nsga2"

    def start(self, space: SearchSpace, objectives: int, population: int, first: tuple[Candidate, ...], seed: int) -> Nsga2Run:
        return Nsga2Run(space, objectives, population, first, seed)


PLUGIN = Nsga2()
