"""Candidate ▸ Score: the metric of the quantized sub-network on validation, emulated exactly as the backend computes it."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from nascompile import space as spaces
from nascompile.data import Split
from nascompile.latency_table import lowering_digest
from nascompile.quantization import ActivationRanges
from nascompile.records import Candidate, Score, SearchSpace, digest, file_digest
from nascompile.scoring import gain, score_of
from nascompile.supernet import Supernet, by_length, calibrate, emulate, load_batches

BATCH = 64
SCORED_AS_PROGRAMS = ("mcu_vit",)
"""Families whose networks nothing else runs: no score of this module depends on their code."""


@functools.cache
def _arithmetic() -> str:
    """Hash of the code that emulates: scores of other code are not taken for its own."""
    package = Path(__file__).resolve().parent
    families = sorted(path for path in (package / "families").glob("*.py") if path.stem not in SCORED_AS_PROGRAMS)
    return digest([file_digest(path) for path in (package / "supernet.py", *families)])


class Evaluator:
    """Scores candidates of one set of weights on fixed calibration and validation samples.

    `batch`: samples that an engine gets in a call, which matters for precisions that find their grids then.
    """

    def __init__(
        self, net: Supernet, weights: Path, space: SearchSpace, task: Any, metric: str, calibration: Split, validation: Split,
        method: str, calibration_samples: int, validation_samples: int, seed: int, batch: int = 1,
    ) -> None:  # fmt: skip
        self.net, self.space, self.task, self.metric, self.method = net, space, task, metric, method
        self.weights_digest = digest([(p.name, file_digest(p)) for p in sorted(weights.glob("*.safetensors"))])
        self.split_digest, self.batch = validation.digest, batch
        self.rows = scored_rows(validation, validation_samples, seed)
        """Positions in validation that candidates are scored on."""
        self.calibration = load_batches(calibration, scored_rows(calibration, calibration_samples, seed), BATCH)
        self.validation = load_batches(validation, self.rows, BATCH)
        self.target = space.targets[0]
        """The target whose precisions count."""
        self.digest = digest(
            space.precisions, lowering_digest(), _arithmetic(), calibration.digest, method, calibration_samples, validation_samples, seed,
            metric, getattr(task, "signature", ""),
        )

    def on(self, target: str) -> Evaluator:
        """The same evaluator for the precisions that candidates have on another target of the space."""
        other = copy.copy(self)
        other.target = target
        return other

    def ranges(self, point: Candidate) -> ActivationRanges:
        """Calibrated input ranges of the candidate's quantized products."""
        return calibrate(self.net, self.space, point, self.target, self.calibration, self.method)

    def reference(self) -> Score:
        """The whole network's metric in float."""
        return self.score(spaces.largest(self.space))

    def score(self, point: Candidate) -> Score:
        """The candidate's metric on validation at its precisions."""
        logits, labels = emulate(self.net, self.space, point, self.target, self.validation, self.ranges(point), self.batch)
        return score_of(
            self.task, self.metric, logits, labels,
            split=self.split_digest, weights=self.weights_digest, evaluator=self.digest,
        )  # fmt: skip


class Scorer(Protocol):
    """What tries a calibration method."""

    method: str

    def score(self, point: Candidate) -> Score: ...


E = TypeVar("E", bound=Scorer)


def best_method(
    evaluators: Sequence[E], point: Candidate
) -> tuple[E, tuple[tuple[str, float], ...]]:
    """The evaluator whose calibration method gives the best validation score of a candidate, and every method's score."""
    scored = [(evaluator, evaluator.score(point)) for evaluator in evaluators]
    best = max(scored, key=lambda pair: (gain(pair[1]), -evaluators.index(pair[0])))[0]
    return best, tuple((evaluator.method, score.value) for evaluator, score in scored)


def ladder(space: SearchSpace) -> tuple[Candidate, ...]:
    """Networks with every gene at the same relative size, float and quantized: where a search starts from."""
    found: dict[Candidate, None] = {spaces.largest(space): None, spaces.uniform(space): None}
    for quantized in (True, False):
        for share in (1.0, 0.75, 0.5, 0.25, 0.0):
            for depth_share in (1.0, 0.5, 0.0):
                genome: spaces.Genome = {}
                for slot in spaces.gene_names(space):
                    gene = spaces.slot_gene(space, slot)
                    level = depth_share if gene.name == "depth" else share
                    last = len(gene.choices) - 1
                    index = (last if quantized else 0) if gene.kind == "precision" else math.floor(level * last + 0.5)
                    genome[slot] = gene.choices[index]
                found[spaces.candidate(space, genome)] = None
    return tuple(found)


def scored_rows(split: Split, samples: int, seed: int) -> np.ndarray[Any, Any]:
    """Positions of so many samples of a split (0: all), drawn by the seed, in order; short texts first."""
    return by_length(split, np.sort(np.random.default_rng(seed).permutation(len(split))[: samples or len(split)]))
