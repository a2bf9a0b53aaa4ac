"""NSGA-III (Deb and Jain 2014): as NSGA-II, but survivors are spread over reference directions, for three objectives and more."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from pymoo.algorithms.moo.nsga3 import NSGA3
from pymoo.operators.selection.tournament import TournamentSelection
from pymoo.util.ref_dirs import get_reference_directions

from nascompile.records import Candidate
from nascompile.searchers import Problem
from nascompile.searchers.nsga2 import Nsga2Run


class Nsga3Run(Nsga2Run):
    def breeding(self, objectives: int, **settings: Any) -> Any:
        """pymoo's algorithm with about as many directions as there are survivors."""
        selection = TournamentSelection(func_comp=_winners)
        return NSGA3(ref_dirs=directions(objectives, settings["pop_size"]), selection=selection, **settings)


def _winners(pop: Any, P: Any, random_state: Any, **kwargs: Any) -> np.ndarray[Any, Any]:
    """(pairs, 1) of each pair (pairs, 2) of members the one with less violation, else one at random.

    As pymoo has it, whose own draws between equal violations from a generator without a seed.
    """
    violations = pop.get("CV")[:, 0]
    found = [random_state.choice([a, b]) if violations[a] == violations[b] else min(a, b, key=violations.__getitem__) for a, b in P]
    return np.array(found, dtype=int)[:, None]


def directions(objectives: int, most: int) -> np.ndarray[Any, Any]:
    """Evenly spaced directions (n, objectives), at most `most` of them unless one for each objective is more (Das and Dennis 1998)."""
    if objectives == 1:
        return np.ones((1, 1))
    parts = 1
    while math.comb(parts + objectives, objectives - 1) <= most:
        parts += 1
    found: np.ndarray[Any, Any] = get_reference_directions("das-dennis", objectives, n_partitions=parts)
    return found


class Nsga3:
    name = "nsga3"
    batch = 0

    def start(self, problem: Problem, population: int, first: tuple[Candidate, ...], seed: int) -> Nsga3Run:
        return Nsga3Run(problem, population, first, seed)


PLUGIN = Nsga3()
