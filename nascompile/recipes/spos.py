"""Single path, one shot (Guo et al., 1904.00420): one uniformly random network a step, learning from the labels alone. The control."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from nascompile import space as spaces
from nascompile.recipes import StepBatch, Terms
from nascompile.records import SearchSpace


class Spos:
    name = "spos"
    distils = zeroed_residuals = False
    elastic = True
    random_subnets = 1

    def passes(self, terms: Terms) -> int:
        """One."""
        return 1

    def rate(self, left: float, epochs: float, terms: Terms) -> float:
        """Linear decay to zero."""
        return left

    def losses(self, net: Any, space: SearchSpace, batch: StepBatch, rng: np.random.Generator, terms: Terms) -> Iterator[Any]:
        subnet = net.subnet(space, spaces.sample(space, rng))
        yield terms.task.loss(net(batch.inputs, subnet), batch.labels, terms.class_weights)


PLUGIN = Spos()
