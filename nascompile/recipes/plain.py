"""Plain fine-tuning of the largest network on the labels: what makes teachers and baselines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from nascompile.recipes import StepBatch, Terms
from nascompile.records import SearchSpace


class Plain:
    name = "plain"
    distils = elastic = zeroed_residuals = False
    random_subnets = 0

    def passes(self, terms: Terms) -> int:
        """One."""
        return 1

    def rate(self, left: float, epochs: float, terms: Terms) -> float:
        """Linear decay to zero."""
        return left

    def losses(self, net: Any, space: SearchSpace, batch: StepBatch, rng: np.random.Generator, terms: Terms) -> Iterator[Any]:
        yield terms.task.loss(net(batch.inputs, net.largest()), batch.labels, terms.class_weights)


PLUGIN = Plain()
