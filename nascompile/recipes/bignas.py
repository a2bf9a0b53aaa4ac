"""BigNAS (Yu et al., 2003.11142): the biggest, the smallest and n random networks in every step (the sandwich rule).

Only the biggest sees the labels; the others learn from its outputs of the same step. Only the biggest is regularized: the others run
without dropout, and a decoupled weight decay shrinks every weight once a step, as belonging to the biggest. The learning rate decays
exponentially down to a floor and stays there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from nascompile import space as spaces
from nascompile.recipes import StepBatch, Terms
from nascompile.records import SearchSpace

DECAY = 0.97
"""Per `decay_epochs`, 2.4 as published."""
AT_FLOOR = 2 / 3
"""Share of the steps after which the floor is reached where no number of epochs is given; at 3 % per 2.4 epochs it takes 236 epochs."""


class BigNas:
    name = "bignas"
    distils = False
    elastic = zeroed_residuals = True
    random_subnets = 2

    def passes(self, terms: Terms) -> int:
        """The biggest, the smallest and each random network."""
        return 2 + terms.random_subnets

    def rate(self, left: float, epochs: float, terms: Terms) -> float:
        """Exponential decay, then constant."""
        if terms.decay_epochs:
            return max(terms.rate_floor, float(DECAY ** (epochs / terms.decay_epochs)))
        return max(terms.rate_floor, float(terms.rate_floor ** ((1 - left) / AT_FLOOR)))

    def losses(self, net: Any, space: SearchSpace, batch: StepBatch, rng: np.random.Generator, terms: Terms) -> Iterator[Any]:
        logits = net(batch.inputs, net.largest())
        yield terms.task.loss(logits, batch.labels, terms.class_weights)
        biggest = logits.detach()
        net.eval()
        for point in (spaces.smallest(space), *(spaces.sample(space, rng) for _ in range(terms.random_subnets))):
            yield terms.task.distillation(net(batch.inputs, net.subnet(space, point)), biggest, terms.temperature)


PLUGIN = BigNas()
