"""Genomes of a space as arrays: rows of indices into each position's choices, inactive positions 0."""

from __future__ import annotations

from typing import Any

import numpy as np

from nascompile import space as spaces
from nascompile.records import Candidate, SearchSpace

Array = np.ndarray[Any, Any]


class Encoding:
    """What is computed for many candidates of a space at once."""

    def __init__(self, space: SearchSpace) -> None:
        self.space, self.slots = space, spaces.gene_names(space)
        self.genes = [spaces.slot_gene(space, slot) for slot in self.slots]
        self.sizes = np.array([len(gene.choices) for gene in self.genes])
        position = {slot: number for number, slot in enumerate(self.slots)}
        self.requires = [
            [(position[name], sum(int(value) < least for value in self.genes[position[name]].choices)) for name, least in gene.requires]
            for gene in self.genes
        ]
        self._id = space.id  # which is a digest of the whole space
        self._architecture = [(n, gene.name, gene.choices) for n, gene in enumerate(self.genes) if gene.kind == "architecture"]
        of_target = [int(slot.partition("@")[2] or 0) for slot in self.slots]
        self._precision = [
            [(n, gene.name, gene.choices) for n, gene in enumerate(self.genes) if gene.kind == "precision" and of_target[n] == target]
            for target in range(len(space.targets))
        ]

    def active(self, indices: Array) -> Array:
        """(n, positions) bool: which positions have any effect."""
        found = np.ones(indices.shape, dtype=bool)
        for number, needed in enumerate(self.requires):
            for root, least in needed:
                found[:, number] &= indices[:, root] >= least
        return found

    def canonical(self, indices: Array) -> Array:
        """The same candidates with inactive positions 0: equal rows are equal candidates."""
        return np.where(self.active(indices), indices, 0)

    def everything(self) -> Array:
        """Every candidate once (n, positions), in the order of `space.enumerate_all`; for small spaces."""
        grid = np.indices(tuple(self.sizes)).reshape(len(self.sizes), -1).T
        rows, first = np.unique(self.canonical(grid), axis=0, return_index=True)
        return np.asarray(rows[np.argsort(first)])

    def one_hot(self, indices: Array) -> Array:
        """(n, choices of all positions) float: 1 at each active position's choice, all 0 at inactive ones."""
        active = self.active(indices)
        blocks = [(indices[:, [n]] == np.arange(size)) & active[:, [n]] for n, size in enumerate(self.sizes)]
        return np.concatenate(blocks, axis=1).astype(float)

    def sample(self, rng: np.random.Generator, count: int) -> Array:
        """Random candidates (count, positions), some of them equal."""
        return self.canonical(rng.integers(0, self.sizes, size=(count, len(self.sizes))))

    def encode(self, points: tuple[Candidate, ...] | list[Candidate]) -> Array:
        """Indices (n, positions) of candidates."""
        rows = [spaces.encode(self.space, point) for point in points]
        return self.canonical(np.array(rows, dtype=np.int64).reshape(len(rows), len(self.sizes)))

    def decode(self, row: Array) -> Candidate:
        """The candidate of a row, as `space.decode` has it, much sooner: searchers that breed decode ten thousands."""
        values = row.tolist()
        active = [all(values[root] >= least for root, least in needed) for needed in self.requires]
        return Candidate(
            space=self._id, architecture=tuple((name, int(choices[values[n]])) for n, name, choices in self._architecture if active[n]),
            precision=tuple(
                (target, tuple((name, str(choices[values[n]])) for n, name, choices in own if active[n]))
                for target, own in zip(self.space.targets, self._precision, strict=True)
            ),
        )  # fmt: skip
