"""InstaTune (Sarah et al., 2308.15609, Eq. 1): the super-network and M uniformly random sub-networks in every step.

L = a (CE_S + Σ CE_Si) + (1 - a) (g KL(S, T) + Σ [(1 - g) KL(Si, S) + g KL(Si, T)])

As published: a = 0.3, g = 1 or 0, M = 1, T the plainly fine-tuned model, outputs softened by ρ. KL(S, T) is KL(T ‖ S) ρ², as distillation
is usually written; no gradient flows from a sub-network into the outputs of S that it learns from.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from nascompile import space as spaces
from nascompile.recipes import StepBatch, Terms
from nascompile.records import SearchSpace


class InstaTune:
    name = "instatune"
    distils = elastic = True
    random_subnets = 1
    zeroed_residuals = False

    def passes(self, terms: Terms) -> int:
        """The super-network and each random sub-network."""
        return 1 + terms.random_subnets

    def rate(self, left: float, epochs: float, terms: Terms) -> float:
        """Linear decay to zero."""
        return left

    def losses(self, net: Any, space: SearchSpace, batch: StepBatch, rng: np.random.Generator, terms: Terms) -> Iterator[Any]:
        a, g = terms.ce_weight, terms.strong_teacher
        logits = net(batch.inputs, net.largest())
        loss = a * terms.task.loss(logits, batch.labels, terms.class_weights)
        if g > 0:
            loss = loss + (1 - a) * g * terms.task.distillation(logits, batch.teacher, terms.temperature)
        own = logits.detach()
        yield loss
        for _ in range(terms.random_subnets):
            subnet = net.subnet(space, spaces.sample(space, rng))
            logits = net(batch.inputs, subnet)
            loss = a * terms.task.loss(logits, batch.labels, terms.class_weights)
            for weight, reference in ((1 - g, own), (g, batch.teacher)):
                if weight > 0:
                    loss = loss + (1 - a) * weight * terms.task.distillation(logits, reference, terms.temperature)
            yield loss


PLUGIN = InstaTune()
