"""NSGA-II on predictions against pymoo's, and its operators against what they promise."""

from __future__ import annotations

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.problem import Problem
from pymoo.operators.crossover.sbx import SBX, cross_sbx
from pymoo.operators.mutation.pm import PM
from pymoo.operators.repair.rounding import RoundingRepair
from pymoo.operators.sampling.rnd import IntegerRandomSampling
from pymoo.optimize import minimize

from nascompile import pareto
from nascompile.records import FLOAT32, Gene, SearchSpace
from nascompile.searchers import breeding
from nascompile.searchers.encoding import Encoding

WIDTH, CHOICES = 12, 6
SPACE = SearchSpace(
    family="f", model_digest="m", precisions=(FLOAT32,), targets=("cpu",), layer_order=(),
    genes=tuple(Gene(name=f"g{n}", kind="architecture", choices=tuple(range(CHOICES))) for n in range(WIDTH)),
)  # fmt: skip
WEIGHTS = np.random.default_rng(0).uniform(0.2, 1.0, (2, WIDTH))


def judge(rows):
    """Two sums that pull apart, with neighbours that interact; a 3 in front violates."""
    share = rows / (CHOICES - 1)
    objectives = np.column_stack([(1 - share) ** 2 @ WEIGHTS[0], share @ WEIGHTS[1] + share[:, 1:].max(axis=1) * share[:, 0]])
    return objectives, np.where(rows[:, 0] == 3, 1.0, 0.0)


class Vectors(Problem):
    def __init__(self):
        super().__init__(n_var=WIDTH, n_obj=2, n_ieq_constr=1, xl=0, xu=CHOICES - 1, vtype=int)

    def _evaluate(self, x, out, *args, **kwargs):
        out["F"], violations = judge(np.asarray(x, dtype=np.int64))
        out["G"] = violations[:, None]


def hypervolume(rows):
    objectives, violations = judge(rows)
    return pareto.hypervolume(objectives[violations <= 0], (8.0, 9.0))


def test_it_gets_as_far_as_pymoo_does():
    """Means of five seeds; their spread is below one percent."""
    settings = {"crossover": 0.9, "crossover_eta": 15.0, "mutation": 0.02, "mutation_eta": 20.0}
    own, theirs = [], []
    for seed in range(5):
        own.append(hypervolume(breeding.breed(Encoding(SPACE), judge, 30, 40, rng=np.random.default_rng(seed), **settings)))
        found = minimize(
            Vectors(), NSGA2(
                pop_size=30, sampling=IntegerRandomSampling(), eliminate_duplicates=True,
                crossover=SBX(prob=0.9, eta=15.0, vtype=float, repair=RoundingRepair()),
                mutation=PM(prob=0.02, eta=20.0, vtype=float, repair=RoundingRepair()),
            ), ("n_gen", 40), seed=seed,
        )  # fmt: skip
        theirs.append(hypervolume(found.pop.get("X").astype(np.int64)))
    start = hypervolume(Encoding(SPACE).sample(np.random.default_rng(0), 30))
    assert abs(np.mean(own) / np.mean(theirs) - 1) < 0.015
    assert np.mean(own) > 1.1 * start


def test_every_child_is_judged_once_and_none_twice():
    asked = []

    def watched(rows):
        asked.extend(row.tobytes() for row in rows)
        return judge(rows)

    encoding = Encoding(SPACE)
    last = breeding.breed(encoding, watched, 20, 10, 0.9, 15.0, 0.5, 20.0, np.random.default_rng(1))
    assert len(last) == 20
    assert len(asked) == 200
    assert {row.tobytes() for row in last} <= set(asked)
    again = breeding.breed(encoding, judge, 20, 10, 0.9, 15.0, 0.5, 20.0, np.random.default_rng(1))
    assert (last == again).all()


def test_crossover_spreads_as_pymoos_does():
    """Distribution of children of one pair of parents: shares of each value within two percent."""
    rng, pairs = np.random.default_rng(0), 4000
    parents = np.stack([np.full((pairs, 1), 1), np.full((pairs, 1), 4)])
    own = breeding._crossed(parents, np.array([5]), 1.0, 2.0, rng)[:, 0]
    theirs = cross_sbx(
        parents.astype(float), np.zeros(1), np.full(1, 5.0), np.full((pairs, 1), 2.0), np.full((pairs, 1), 0.5),
        np.full((pairs, 1), 0.5), random_state=np.random.default_rng(1),
    )  # fmt: skip
    shares = [np.bincount(np.rint(x).astype(int).ravel(), minlength=6) / (2 * pairs) for x in (own, theirs)]
    assert np.abs(shares[0] - shares[1]).max() < 0.02
    assert shares[0].min() > 0.02


def test_mutation_keeps_to_the_choices_and_to_its_share():
    rng, top = np.random.default_rng(0), np.array([5, 5, 0, 1])
    rows = rng.integers(0, top + 1, (20000, 4))
    changed = breeding._mutated(rows, top, 0.5, 3.0, rng)
    assert (changed >= 0).all()
    assert (changed <= top).all()
    assert (changed[:, 2] == 0).all()
    assert 0.02 < (changed != rows).any(axis=1).mean() < 0.45
    assert (breeding._mutated(rows, top, 0.0, 3.0, rng) == rows).all()


def test_those_that_violate_survive_last_least_first():
    objectives = np.array([[1.0, 2.0], [2.0, 1.0], [3.0, 3.0], [0.0, 0.0], [0.0, 0.1]])
    kept, crowding = breeding._survivors(objectives, np.array([0, 0, 0, 5.0, 2.0]), 4)
    assert kept[:2].tolist() in ([0, 1], [1, 0])
    assert kept[2:].tolist() == [2, 4]
    assert len(crowding) == 4
