"""A recipe trains the weights that all sub-networks share: which networks a step runs and what each learns from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nascompile.records import SearchSpace


@dataclass(frozen=True)
class StepBatch:
    """One batch on the training device; `teacher` holds the teacher's logits for it, or None."""

    inputs: Any
    labels: Any
    teacher: Any


@dataclass(frozen=True)
class Terms:
    """The task's losses and the recipe's weights, fixed for a run."""

    task: Any
    class_weights: Any
    ce_weight: float
    strong_teacher: float
    temperature: float
    random_subnets: int
    decay_epochs: float = 0.0
    rate_floor: float = 0.05


class Recipe(Protocol):
    name: str
    distils: bool
    """Whether teacher logits are needed."""
    elastic: bool
    """Whether sub-networks are trained, not the largest network alone."""
    random_subnets: int
    """Random sub-networks per step where the settings do not say."""
    zeroed_residuals: bool
    """Whether residual blocks that start from random weights start as the identity."""

    def passes(self, terms: Terms) -> int:
        """Forward-backward passes per batch."""

    def rate(self, left: float, epochs: float, terms: Terms) -> float:
        """Share of the peak learning rate; `left`: share of the steps after warm-up that are still to come, `epochs`: those done."""

    def losses(self, net: Any, space: SearchSpace, batch: StepBatch, rng: np.random.Generator, terms: Terms) -> Iterator[Any]:
        """One torch scalar per pass; the caller back-propagates each before asking for the next.

        `net` is in training mode, and may be put into evaluation mode for passes that are not to be regularized.
        """
